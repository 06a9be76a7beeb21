"""Triton kernels: ``pelt_fast/kernels``."""
