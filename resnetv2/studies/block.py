"""One pre-activation block, step by step: He et al. 2016, Figure 4(e) and equation (5).

The children are called by hand on real activations; what comes out must be what the block computes
by itself, and so must the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..blocks import PreActBlock
from ..data.batches import Batches
from .harness import Result, StudyOptions, Table, study
from .tracing import trace_block
from .variants import initialise
from .visualizer import ResNetV2Visualizer


def first_activations(options: StudyOptions) -> Tensor:
    """Real images after a random 3x3 stem of `width` channels, scaled to std 1 (N, width, H, W)."""
    data = options.load()
    images, _ = next(Batches(data, options.batch_size, 0, options.place).training())
    stem = nn.Sequential(nn.Conv2d(data.channels, options.width, 3, padding=1, bias=False))
    initialise(stem)
    with torch.no_grad():
        activations: Tensor = stem.to(images)(images)
    return activations / activations.std()


@study(
    "block",
    title="Block: one step after another",
    question="What does each step of a pre-activation block do to shape, mean and spread, and what "
    "gradient arrives at its input?",
    defaults={"data": "digits", "root": "data", "image_size": None, "width": 64, "batch_size": 64},
)
def block(options: StudyOptions) -> Result:
    """Trace of `PreActBlock(width, width)` in training mode, initialised as the paper's."""
    inputs = first_activations(options)
    module = PreActBlock(options.width, options.width)
    initialise(module)
    module.to(inputs.device).train()
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(inputs.shape, generator=generator).to(inputs)
    upstream /= upstream.norm()

    x = inputs.clone().requires_grad_()
    steps = trace_block(module, x)
    for step in steps:
        step.output.retain_grad()
    steps[-1].output.backward(upstream)
    gradients = [_gradient_norm(step.output) for step in steps]
    residual_gradient = float((_gradient(x) - upstream).norm())

    again = inputs.clone().requires_grad_()
    out = module(again)
    out.backward(upstream)
    by_hand = steps[-1].output
    error = _relative(out, by_hand)
    gradient_error = _relative(_gradient(again), _gradient(x))

    rows = []
    for step, gradient in zip(steps, gradients):
        values = step.output.detach()
        rows.append(
            [
                step.name,
                step.what,
                "x".join(map(str, values.shape)),
                float(values.mean()),
                float(values.std(correction=0)),
                100 * float((values == 0).float().mean()),
                gradient,
            ]
        )
    columns = ["step", "what", "shape", "mean", "std", "zeros %", "gradient norm"]
    table = Table("Steps", columns, rows)
    checks = Table(
        "By hand against the block's own forward and backward",
        ["quantity", "largest difference, relative to the largest value"],
        [["output", error], ["gradient at the input", gradient_error]],
    )
    return Result(
        tables=[table, checks],
        conclusions=_conclusions(table, error, gradient_error, residual_gradient),
        figures={"steps": ResNetV2Visualizer().plot_steps(steps, gradients)},
        series={"input_gradient": gradients[0], "gradient_through_F": residual_gradient},
        notes=[
            "The gradient that arrives at the output is random with norm 1. Activations are those "
            "of real images after a random 3x3 stem, scaled to std 1; the block is untrained and "
            "in training mode."
        ],
    )


def _conclusions(
    table: Table, error: float, gradient_error: float, through_residual: float
) -> list[str]:
    mean, std, gradient = (table.column(name) for name in ("mean", "std", "gradient norm"))
    if error == gradient_error == 0:
        agreement = "agree bit for bit, in outputs and in gradients at the input"
    else:
        agreement = "agree up to rounding" if max(error, gradient_error) < 1e-4 else "do not agree"
        agreement += (
            f": outputs differ by {error:.1e} of the largest value, gradients at the input by "
            f"{gradient_error:.1e}"
        )
    return [
        f"The steps by hand and the block {agreement}.",
        f"bn1 takes mean {mean[0]:.2g} and std {std[0]:.3g} to mean {mean[1]:.2g} and std "
        f"{std[1]:.3g}; the output's std is {std[-1] / std[0]:.2f} times the input's.",
        f"Of a gradient of norm 1 at the output, {gradient[0]:.3f} arrives at the input; through F "
        f"alone, without the identity path, it would be {through_residual:.3f}.",
    ]


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def _gradient_norm(tensor: Tensor) -> float:
    return float(_gradient(tensor).norm())


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max())
