"""How units, stages and networks are checked and timed, for ``doctor`` and the benchmarks."""
