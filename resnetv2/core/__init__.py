"""One forward and one backward for chains of pre-activation units, and what runs them.

resnetv2/README.md, "The way of a tensor", has the modules in the order of a call.
"""
