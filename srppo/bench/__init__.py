"""Benchmarks: the kernels against their rivals, and what they compile to."""
