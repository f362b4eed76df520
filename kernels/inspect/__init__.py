"""What looks at the kernels without a GPU: compiled code, launches counted, a dry run.

Tests and benchmarks import it; the library does not.
"""
