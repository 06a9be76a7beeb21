"""Broken copies of a module, made by replacing text in its real source: a check that misses them checks nothing."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType


def mutant(module: ModuleType, old: str, new: str, folder: Path) -> ModuleType:
    """A copy of ``module`` in which ``old`` is ``new``, everywhere it occurs.

    Args:
        module: imported from a file.
        old: text that must occur in the source.
        new: what takes its place.
        folder: where the copy is written; Triton reads a kernel's source from its file.
    """
    source = inspect.getsource(module)
    if old not in source:
        raise ValueError(f"{module.__name__} has no {old!r}: the mutation no longer applies")
    name = f"{module.__name__}_mutant_{abs(hash((old, new)))}"
    path = folder / f"{name.rpartition('.')[2]}.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    sys.modules[name] = copy  # relative imports and dataclasses look their module up
    try:
        spec.loader.exec_module(copy)
    finally:
        del sys.modules[name]
    return copy
