"""Compositions of PyTorch's own operators."""
