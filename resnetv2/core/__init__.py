"""One forward and one backward for chains of pre-activation units, and what runs them.

In order of reading: ``spec`` (what a chain is), ``chain`` (the mathematics), ``operators``
(autograd and torch.compile), ``run`` (from modules to operators and back).
"""
