"""Which threads compile a first step's kernels, as JSON.

Run by test_ahead.py in a process of its own, over a libcuda that does nothing (stub_driver.py).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import warnings
from typing import Any

import torch

from resnetv2.kernels.inspect import stub_driver


def main() -> int:
    stub_driver.install()
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(dir=sys.argv[1])
    from triton.compiler import compiler
    from triton.runtime import jit

    from resnetv2 import BottleneckPreActBlock
    from resnetv2.kernels import ahead, launch
    from resnetv2.kernels.fallback import FallbackWarning

    ahead.processors = lambda: 2
    compiled: list[str] = []
    started: list[str] = []
    in_main = 0
    compile_, make, first = compiler.compile, jit.JITFunction.create_binder, launch._first

    def noted(src: Any, *args: Any, **options: Any) -> Any:
        nonlocal in_main
        compiled.append(src.name)
        in_main += threading.current_thread() is threading.main_thread()
        if src.name == sys.argv[2]:
            raise RuntimeError("PassManager::run failed")
        return compile_(src, *args, **options)

    def binder(self: Any) -> Any:
        made = make(self)
        self.compile = noted
        return made

    def start(kernel: Any, *args: Any) -> Any:
        started.append(kernel.fn.__name__)
        return first(kernel, *args)

    jit.JITFunction.create_binder = binder
    launch._first = start
    torch.manual_seed(0)
    block = BottleneckPreActBlock(32, 32, backend="triton").to(memory_format=torch.channels_last)
    x = torch.randn(2, 32, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", FallbackWarning)
        block(x).sum().backward()
    said = [str(w.message) for w in warned if w.category is FallbackWarning]
    print(json.dumps({"compiled": compiled, "in_main": in_main, "started": started, "said": said}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
