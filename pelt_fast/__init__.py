"""pelt_fast: parameter-efficient tuning of language models at the cost of the frozen model."""

from __future__ import annotations

from typing import Any

from . import functional, nn
from .dispatch import BackendUnavailable, use_backend
from .functional import explain
from .segments import MultiAdapterPlan, use_plan

__version__ = "0.1.0"
__all__ = [
    "AdapterPool",
    "BackendUnavailable",
    "MultiAdapterPlan",
    "__version__",
    "accelerate",
    "add_unipelt",
    "explain",
    "functional",
    "mixed_batch",
    "nn",
    "restore",
    "unipelt_config",
    "use_backend",
    "use_plan",
]


def __getattr__(name: str) -> Any:
    # the integrations need transformers or PEFT only when they are called; the import of the package must not
    if name in ("accelerate", "mixed_batch", "restore"):
        from . import integrations

        return getattr(integrations, name)
    if name in ("add_unipelt", "unipelt_config"):
        from .integrations import adapters_unipelt

        return getattr(adapters_unipelt, name)
    if name == "AdapterPool":
        from .serving import AdapterPool

        return AdapterPool
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
