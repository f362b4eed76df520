"""Where there is no GPU, kernels run in Triton's interpreter, which must be asked for before
triton is imported; with one, the same tests run on it."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
