"""Kernels of fused pre-activation units: tensors in, tensors out (kernels/README.md).

``dispatch.engine`` gives the implementation that a device and dtype call for: the Triton files of
this folder, or ``reference``, the same functions in plain PyTorch. Importing this package needs
neither Triton nor a GPU.
"""
