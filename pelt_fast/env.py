"""Every ``PELT_FAST_*`` environment variable, read once, here.

| variable | meaning | default |
|---|---|---|
| ``PELT_FAST_BACKEND`` | backend for every operation, as ``use_backend`` takes it | ``auto`` |
| ``PELT_FAST_STRICT`` | ``1``: an operation that its preferred backend cannot run raises, no fallback | ``0`` |
| ``PELT_FAST_TRITON_CPU`` | ``1``: a stand-in driver runs Triton kernels on CPU tensors (kernel proofs) | ``0`` |
| ``PELT_FAST_CPU_ISA`` | highest instruction set of C++ kernels: ``amx``, ``avx512``, ``avx2``, ``default`` | best |
| ``PELT_FAST_PACK_LIMIT_MB`` | memory for packed copies of frozen weights, in MiB; ``0`` keeps none | ``4096`` |
| ``PELT_FAST_POOL_LIMIT_MB`` | freed memory kept for the next large CPU results, in MiB; ``0`` keeps none | ``1024`` |

``PELT_FAST_BUILD`` is read by ``setup.py`` alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

BACKENDS = ("auto", "reference", "torch", "cpp", "triton", "cuda")
CPU_ISAS = ("default", "avx2", "avx512", "amx")
_MOST_MB = (2**63 - 1) >> 20  # in bytes it must fit 64 bits
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")


@dataclass(frozen=True)
class Env:
    """The parsed variables."""

    backend: str = "auto"
    strict: bool = False
    triton_cpu: bool = False
    cpu_isa: str | None = None
    pack_limit_mb: int = 4096
    pool_limit_mb: int = 1024

    @classmethod
    def parse(cls, environ: Mapping[str, str]) -> Env:
        """Reads the variables; a value that cannot be understood raises ValueError."""
        return cls(
            backend=_choice(environ, "PELT_FAST_BACKEND", BACKENDS) or "auto",
            strict=_flag(environ, "PELT_FAST_STRICT"),
            triton_cpu=_flag(environ, "PELT_FAST_TRITON_CPU"),
            cpu_isa=_choice(environ, "PELT_FAST_CPU_ISA", CPU_ISAS),
            pack_limit_mb=_count(environ, "PELT_FAST_PACK_LIMIT_MB", 4096),
            pool_limit_mb=_count(environ, "PELT_FAST_POOL_LIMIT_MB", 1024),
        )


def _choice(environ: Mapping[str, str], name: str, allowed: tuple[str, ...]) -> str | None:
    value = environ.get(name, "").strip().lower()
    if value and value not in allowed:
        raise ValueError(
            f"{name}={value!r} is not understood; expected one of {', '.join(allowed)}"
        )
    return value or None


def _flag(environ: Mapping[str, str], name: str) -> bool:
    value = environ.get(name, "").strip().lower()
    if value not in _TRUE + _FALSE:
        raise ValueError(f"{name}={value!r} is not understood; expected 0 or 1")
    return value in _TRUE


def _count(environ: Mapping[str, str], name: str, default: int) -> int:
    value = environ.get(name, "").strip()
    if not value:
        return default
    if not value.isdecimal() or int(value) > _MOST_MB:
        raise ValueError(
            f"{name}={value!r} is not understood; expected a whole number, 0 to {_MOST_MB}"
        )
    return int(value)


env = Env.parse(os.environ)
