"""Benchmarks: a real fine-tune and the kernel table. Run `python -m bench`."""
