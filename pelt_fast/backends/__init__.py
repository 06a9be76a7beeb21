"""The backends, one package each; in it a module for every family of operations, all with the same functions.

See ``pelt_fast/dispatch/registry.py``.
"""
