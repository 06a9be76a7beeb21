"""From a problem to the backend that runs it."""

from .explain import Choice, Explanation, explain_problem
from .problem import (
    FEW_KEYS,
    AdapterProblem,
    CompacterProblem,
    DeltaProblem,
    FusionProblem,
    LoRAProblem,
    MultiBottleneckProblem,
    MultiElementwiseProblem,
    MultiLoRAProblem,
    PrefixProblem,
    arch_of,
)
from .registry import ORDINARY, BackendUnavailable, backend, cpp_extension
from .select import asked_for, check_name, select, use_backend

__all__ = [
    "FEW_KEYS",
    "ORDINARY",
    "AdapterProblem",
    "BackendUnavailable",
    "Choice",
    "CompacterProblem",
    "DeltaProblem",
    "Explanation",
    "FusionProblem",
    "LoRAProblem",
    "MultiBottleneckProblem",
    "MultiElementwiseProblem",
    "MultiLoRAProblem",
    "PrefixProblem",
    "arch_of",
    "asked_for",
    "backend",
    "check_name",
    "cpp_extension",
    "explain_problem",
    "select",
    "use_backend",
]
