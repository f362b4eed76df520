"""Weights of pre-activation nets of other code bases, loaded into a ``PreActResNet`` by name.

Names say what a tensor is, not what a net computes with it. The code bases below agree with this
one in the order of norm, activation and convolution, in projections that read the activated input,
and in a bottleneck's stride on its 3x3. They differ in one place: their very first unit adds its
own input where it has no projection, as ``PreActResNet(first_identity="raw")``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..models import PreActResNet


class _Names(NamedTuple):
    """How a code base names what is here conv1, stageI.J.bnK, stageI.J.convK,
    stageI.J.shortcut.0, bn and fc.

    marks: a name that only its state_dicts have. patterns: pairs for ``re.sub``, the first that
    fits. first: the number of its first stage and first unit.
    """

    source: str
    marks: str
    patterns: Sequence[tuple[str, str]]
    first: tuple[int, int]


_SCHEMES = (
    _Names(
        "timm",
        r"stages\.0\.blocks\.0\.",
        (
            (r"stem\.conv\.", "conv1."),
            (r"stages\.(\d+)\.blocks\.(\d+)\.norm(\d)\.", r"stage\1.\2.bn\3."),
            (r"stages\.(\d+)\.blocks\.(\d+)\.conv(\d)\.", r"stage\1.\2.conv\3."),
            (r"stages\.(\d+)\.blocks\.(\d+)\.downsample\.conv\.", r"stage\1.\2.shortcut.0."),
            (r"norm\.", "bn."),
            (r"head\.fc\.", "fc."),
        ),
        (0, 0),
    ),
    _Names(
        "pytorchcv",
        r"features\.stage1\.unit1\.body\.",
        (
            (r"features\.init_block\.(?:conv\.)?(?=weight)", "conv1."),
            (r"features\.stage(\d+)\.unit(\d+)\.body\.conv(\d)\.bn\.", r"stage\1.\2.bn\3."),
            (r"features\.stage(\d+)\.unit(\d+)\.body\.conv(\d)\.conv\.", r"stage\1.\2.conv\3."),
            (r"features\.stage(\d+)\.unit(\d+)\.identity_conv\.", r"stage\1.\2.shortcut.0."),
            (r"features\.post_activ\.bn\.", "bn."),
            (r"output\.", "fc."),
        ),
        (1, 1),
    ),
    _Names(
        "torchvision's style",
        r"layer1\.0\.",
        (
            (r"conv1\.", "conv1."),
            (r"layer(\d+)\.(\d+)\.bn(\d)\.", r"stage\1.\2.bn\3."),
            (r"layer(\d+)\.(\d+)\.conv(\d)\.", r"stage\1.\2.conv\3."),
            (
                r"layer(\d+)\.(\d+)\.(?:downsample|shortcut)\.(?:0\.)?(?!\d)",
                r"stage\1.\2.shortcut.0.",
            ),
            (r"(?:bn|bn1|norm)\.", "bn."),
            (r"(?:fc|linear)\.", "fc."),
        ),
        (1, 0),
    ),
)


def load_weights(
    model: PreActResNet,
    weights: Mapping[str, Any] | str | Path,
    *,
    classifier: bool = True,
) -> PreActResNet:
    """Load the weights of a pre-activation net, this library's or another's, into ``model``.

    Args:
        model: of the same architecture, such as ``preact_resnet50()`` for timm's resnetv2_50. It
            is changed in place, all of it or, where an error is raised, nothing.
        weights: a state_dict, or a file that ``torch.save`` wrote of one (or of a dictionary with
            one under "state_dict" or "model"). Names may be this library's; those of timm's
            ``resnetv2_*`` with batch norm; those of pytorchcv's nets for CIFAR; or torchvision's
            style: conv1, layer1.0.bn1, layer1.0.conv1, layer1.0.downsample.0, bn, fc.
        classifier: False leaves ``fc`` as it is, for other classes.

    Returns:
        ``model``.

    Raises:
        InputError: entries are missing, unexpected or of another shape; or the other net adds the
            first unit's own input, and ``model`` does not.
    """
    state = _plain(_read(weights) if isinstance(weights, (str, Path)) else weights)
    own = model.state_dict()
    scheme = next((s for s in _SCHEMES if any(re.match(s.marks, name) for name in state)), None)
    if scheme is not None:
        entry = model.stages[0][0]
        if entry.identity_reads == "preact" and not entry.has_projection():
            raise InputError(
                f"weights of {scheme.source}, whose first unit adds its own input; the model's "
                'adds its activated input: make it with first_identity="raw"'
            )
        state = {_renamed(name, scheme): value for name, value in state.items()}
        if "fc.weight" in state and state["fc.weight"].dim() == 4:  # a 1x1 convolution
            state["fc.weight"] = state["fc.weight"].flatten(1)
    if not classifier:
        state = {name: value for name, value in state.items() if not name.startswith("fc.")}
        state |= {name: value for name, value in own.items() if name.startswith("fc.")}
    for name, value in own.items():
        if name.endswith("num_batches_tracked"):  # older files have none
            state.setdefault(name, torch.zeros_like(value))
    wrong = difference(own, state)
    if wrong:
        source = "" if scheme is None else f" (names of {scheme.source} made this library's)"
        raise InputError(f"the weights are not this net's: {wrong}{source}")
    model.load_state_dict(state)
    return model


def difference(own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> str:
    """What stands between two state_dicts in one line; empty where they fit each other."""
    missing = [name for name in own if name not in other]
    unexpected = [name for name in other if name not in own]
    shapes = [
        f"{name} {tuple(other[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in other and own[name].shape != other[name].shape
    ]
    found = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    return "; ".join(f"{what}: {_listed(names)}" for what, names in found if names)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _renamed(name: str, scheme: _Names) -> str:
    """This library's name of an entry; one that fits no pattern stays, and is then unexpected."""
    for pattern, ours in scheme.patterns:
        match = re.match(pattern, name)
        if match is not None:
            new = match.expand(ours) + name[match.end() :]
            return re.sub(r"^stage(\d+)\.(\d+)", lambda m: _numbered(m, scheme.first), new)
    return name


def _numbered(match: re.Match[str], first: tuple[int, int]) -> str:
    """Stages count from 1 here, units from 0."""
    return f"stage{int(match[1]) - first[0] + 1}.{int(match[2]) - first[1]}"


def _plain(weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state_dict itself, without what training scripts put around it and its names."""
    for key in ("state_dict", "model"):
        if isinstance(weights.get(key), Mapping):
            weights = weights[key]
    wrong = [name for name, value in weights.items() if not isinstance(value, Tensor)]
    if wrong:
        raise InputError(f"expected a state_dict of tensors, got {_listed(list(map(str, wrong)))}")
    return {name.removeprefix("module."): value for name, value in weights.items()}


def _read(path: str | Path) -> Mapping[str, Any]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    # torch.load has no class of its own for a file that is none of its own.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"cannot read weights from {path}: {reason}") from error
    if isinstance(found, nn.Module) or not isinstance(found, Mapping):
        raise InputError(f"expected a state_dict in {path}, got a {type(found).__name__}")
    return found
