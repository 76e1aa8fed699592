"""Pallas kernels, one folder each: a function with several implementations, checked against the plain one."""
