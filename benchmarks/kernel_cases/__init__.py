"""Cases of benchmarks/kernels.py, a file per family."""
