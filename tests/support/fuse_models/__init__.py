"""Minimal models of the pre-activation dataflows that people write, for the tests of ``fuse``.

No class here imitates another's code: what matters is the dataflow, and names and style vary on
purpose (children bn1, norm1, batchnorm_0, residual.0, body.conv1.bn; functional, in-place and
shared activations; ``x + out``, ``out += x``, ``torch.add``). ``FAMILIES`` are computed fused or
not, always with eager's results; ``NEGATIVES`` must be left alone altogether.
"""

from tests.support.fuse_models.families import FAMILIES
from tests.support.fuse_models.negatives import NEGATIVES, PostActivation
from tests.support.fuse_models.parts import (
    EndsWith,
    NormAct,
    NormThenAct,
    OfNormActs,
    OfTuples,
    SqueezeExcite,
    ThrownAwayNorm,
)
from tests.support.fuse_models.plain import (
    Basic,
    Bottleneck,
    Dropping,
    FunctionalDropping,
    FunctionalLeaky,
    IdentityFromPreact,
    OneSidedConvs,
    PaddedBoth,
    RawSequence,
    Residual,
    StrideOnConv2,
    Wide,
    WithAct,
    branch,
    conv1,
    conv3,
)
from tests.support.fuse_models.unusual import (
    AddsIntoX,
    Checking,
    Listing,
    MiddleReadTwice,
    PlainNet,
    Remembering,
    tuple_block,
)

__all__ = [
    "FAMILIES",
    "NEGATIVES",
    "AddsIntoX",
    "Basic",
    "Bottleneck",
    "Checking",
    "Dropping",
    "EndsWith",
    "FunctionalDropping",
    "FunctionalLeaky",
    "IdentityFromPreact",
    "Listing",
    "MiddleReadTwice",
    "NormAct",
    "NormThenAct",
    "OfNormActs",
    "OfTuples",
    "OneSidedConvs",
    "PaddedBoth",
    "PlainNet",
    "PostActivation",
    "RawSequence",
    "Remembering",
    "Residual",
    "SqueezeExcite",
    "StrideOnConv2",
    "ThrownAwayNorm",
    "Wide",
    "WithAct",
    "branch",
    "conv1",
    "conv3",
    "tuple_block",
]
