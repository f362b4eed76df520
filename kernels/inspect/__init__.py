"""What looks at the kernels: compiled code, launches counted, a dry run, errors against float64.

Tests, benchmarks and ``resnetv2.doctor`` import it; the rest of the library does not.
"""
