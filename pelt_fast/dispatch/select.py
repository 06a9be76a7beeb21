"""Which backend runs a problem: asked for by name, or the best that can."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from ..env import BACKENDS, env
from .registry import AUTOMATIC, Backend, BackendUnavailable, backend

logger = logging.getLogger("pelt_fast")
_asked: ContextVar[str | None] = ContextVar("pelt_fast_backend", default=None)
_chosen: dict[tuple[Any, str], Backend] = {}
_logged: set[tuple[str, str]] = set()
_CACHE_LIMIT = 4096  # shapes; a serving process that sees ever new T must not grow without bound


def check_name(name: str) -> str:
    """Returns ``name`` when it names a backend, raises ValueError otherwise."""
    if name not in BACKENDS:
        raise ValueError(
            f"backend={name!r} is not known; expected one of {', '.join(map(repr, BACKENDS))}"
        )
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, in this thread, operations run on this backend.

    Args:
        name: "torch", "cpp", "triton", "cuda" or "reference"; a backend that cannot run an operation raises
            ``BackendUnavailable`` with its reasons. "auto": the best that can run, whatever is asked for outside.
    """
    token = _asked.set(check_name(name))
    try:
        yield
    finally:
        _asked.reset(token)


def asked_for() -> str:
    """What ``use_backend``, else PELT_FAST_BACKEND asks for; "auto" when neither does."""
    name = _asked.get()
    return env.backend if name is None else name


def select(problem: Any, name: str) -> Backend:
    """The backend for ``problem``; ``name`` is a backend or "auto"."""
    key = (problem, name)
    found = _chosen.get(key)
    if found is None:
        found = _forced(problem, name) if name != "auto" else _best(problem)
        if len(_chosen) >= _CACHE_LIMIT:
            _chosen.clear()
        _chosen[key] = found
    return found


def _forced(problem: Any, name: str) -> Backend:
    found = backend(name, problem.family)
    reasons = found.unsupported(problem)
    if reasons:
        raise BackendUnavailable(f"backend {name!r} cannot run {problem}:\n" + _bullets(reasons))
    return found


def ranked(problem: Any) -> list[tuple[Backend, list[str]]]:
    """Every automatic backend with its reasons against the problem, the preferred first."""
    candidates = [backend(name, problem.family) for name in AUTOMATIC]
    candidates.sort(key=lambda b: -b.priority(problem))
    return [(b, b.unsupported(problem)) for b in candidates]


def _best(problem: Any) -> Backend:
    rejected: list[tuple[Backend, list[str]]] = []
    for candidate, reasons in ranked(problem):
        if not reasons:
            return candidate
        if candidate.priority(problem) > 0:  # 0: not meant for this device, so no fallback happened
            rejected.append((candidate, reasons))
            if env.strict:
                break
            for reason in reasons:
                if (problem.op, reason) not in _logged:
                    _logged.add((problem.op, reason))
                    logger.info("%s: not on %s: %s", problem.op, candidate.name, reason)
    lines = "\n".join(f"{b.name}:\n{_bullets(reasons)}" for b, reasons in rejected)
    strict = " and PELT_FAST_STRICT=1 forbids the fallback" if env.strict else ""
    raise BackendUnavailable(f"no backend can run {problem}{strict}\n{lines}")


def _bullets(reasons: list[str]) -> str:
    return "\n".join(f"  - {reason}" for reason in reasons)
