"""The backends by name and family of operations.

Each pair is a module, ``pelt_fast/backends/<package>/<family>.py``, with ``unsupported(problem)``,
``priority(problem)`` and the operations of the family.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from typing import Any

PACKAGES = {
    "triton": "pelt_fast.backends.triton_",
    "cpp": "pelt_fast.backends.cpp",
    "torch": "pelt_fast.backends.torch_",
    "cuda": "pelt_fast.backends.cuda",
    "reference": "pelt_fast.backends.reference_",
}
AUTOMATIC = (
    "triton",
    "cpp",
    "torch",
)  # the reference is an oracle, CUDA C++ has not run on a GPU yet: only when they are asked for


_NO_CUDA = "no CUDA C++ kernel serves this operation; on a GPU use 'triton' or 'torch'"


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot run this problem; the message lists its reasons."""


@dataclass(frozen=True)
class Backend:
    """A backend's module for one family, or the reason why it could not be imported."""

    name: str
    module: Any  # None when it could not be imported
    missing: str | None = None

    def unsupported(self, problem: Any) -> list[str]:
        """Why this backend cannot run the problem; empty when it can."""
        if self.module is None:
            return [self.missing or "not available"]
        reasons: list[str] = self.module.unsupported(problem)
        return reasons

    def priority(self, problem: Any) -> int:
        """The highest one that can run wins."""
        return int(self.module.priority(problem)) if self.module is not None else 0


@cache
def backend(name: str, family: str) -> Backend:
    """The backend of that name for a family of operations, imported on first use."""
    module = f"{PACKAGES[name]}.{family}"
    try:
        return Backend(name, importlib.import_module(module))
    except ImportError as error:
        if error.name == module:
            missing = _NO_CUDA if name == "cuda" else f"no {name} kernel serves this operation"
            return Backend(name, None, missing)
        return Backend(name, None, f"cannot be imported: {error}")


ORDINARY = "ordinary"
"""In place of a backend: the C++ backend's own functions, of a call that ``functional/ordinary.py`` let pass."""


@cache
def cpp_extension() -> Any:
    """The C++ extension; None where it was not built."""
    return getattr(backend("cpp", "lora").module, "_C", None)
