"""Fused pre-activation residual blocks (ResNet V2) for PyTorch."""

from . import _started as _started  # isort: skip  # before torch, for Ctrl-C meanwhile
from .blocks import BottleneckPreActBlock, PreActBlock
from .core.memory import BudgetError
from .core.sync import SyncBatchNorm, convert_sync_batchnorm
from .data import _torchvision as _torchvision  # mends later imports of torchvision
from .doctor import doctor
from .fuse.rewrite import BlockReport, Report, explain, fuse, unfuse
from .fuse.weights import load_weights
from .models import (
    PreActResNet,
    preact_resnet18,
    preact_resnet20,
    preact_resnet34,
    preact_resnet50,
    preact_resnet56,
    preact_resnet101,
    preact_resnet110,
    preact_resnet152,
    preact_resnet164,
    preact_resnet200,
    preact_resnet1001,
    preact_resnet1202,
    wide_resnet16_8,
    wide_resnet28_10,
    wide_resnet40_2,
)
from .planning.memory import Plan, plan

__version__ = "0.1.0"

__all__ = [
    "BlockReport",
    "BottleneckPreActBlock",
    "BudgetError",
    "Plan",
    "PreActBlock",
    "PreActResNet",
    "Report",
    "SyncBatchNorm",
    "convert_sync_batchnorm",
    "doctor",
    "explain",
    "fuse",
    "load_weights",
    "plan",
    "preact_resnet18",
    "preact_resnet20",
    "preact_resnet34",
    "preact_resnet50",
    "preact_resnet56",
    "preact_resnet101",
    "preact_resnet110",
    "preact_resnet152",
    "preact_resnet164",
    "preact_resnet200",
    "preact_resnet1001",
    "preact_resnet1202",
    "unfuse",
    "wide_resnet16_8",
    "wide_resnet28_10",
    "wide_resnet40_2",
]
