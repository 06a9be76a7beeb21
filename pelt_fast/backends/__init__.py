"""The backends. Each module implements the same operations; see ``pelt_fast/dispatch/registry.py``."""
