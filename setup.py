"""Packaging. `kernels/` is installed as `resnetv2.kernels`; nothing imports it as `kernels`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

# Read, not imported: the package needs torch.
(VERSION,) = re.findall(
    r'^__version__ = "(.+)"$', (ROOT / "resnetv2/__init__.py").read_text(encoding="utf-8"), re.M
)

KERNELS = "resnetv2.kernels"

ONNX = ["onnx", "onnxscript"]  # what PyTorch's exporter needs
TEST = [
    "accelerate",
    "diffusers",
    "expecttest",  # torch.library.opcheck
    "hypothesis",
    "ipykernel",
    "lightning",
    "mypy",
    "nbclient",
    *ONNX,
    "pytest",
    "pytest-benchmark",
    "pytest-xdist",
    "pytorchcv",
    "ruff",
    "tensorboard",
    "timm",
]
BENCH = ["pytest", "pytest-benchmark"]

setup(
    name="resnetv2",
    version=VERSION,
    description="Fused pre-activation residual blocks (ResNet V2) for PyTorch, in Triton",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[
        # resnetv2/kernels is a link to kernels/, for tools that read the checkout without
        # installing it; the build takes the folder itself, link or no link.
        *find_packages(include=["resnetv2", "resnetv2.*"], exclude=[KERNELS, f"{KERNELS}.*"]),
        KERNELS,
        *(f"{KERNELS}.{name}" for name in find_packages("kernels")),
    ],
    package_dir={KERNELS: "kernels"},
    package_data={
        "resnetv2": ["py.typed"],
        f"{KERNELS}.inspect": ["cuda_stub.c"],
        "resnetv2.studies": ["page.html"],
        "resnetv2.training": ["recipes/*.yaml"],
    },
    include_package_data=False,
    install_requires=[
        "torch>=2.11",
        "torchvision",
        "triton>=3.6; sys_platform == 'linux'",
        "numpy",
        "click>=8.1",
        "jinja2>=3.1",
        "matplotlib>=3.7",
        "pyyaml>=6",
        "scikit-learn>=1.3",
        "tqdm>=4.65",
    ],
    extras_require={
        "test": TEST,
        "bench": BENCH,
        "onnx": ONNX,
        "tensorboard": ["tensorboard"],
        "dev": sorted({*TEST, *BENCH}),
    },
    entry_points={"console_scripts": ["resnetv2 = resnetv2.cli:main"]},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
