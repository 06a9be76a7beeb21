"""The rows of the bottleneck adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from pelt_fast.testing import adapter_workloads
from pelt_fast.testing.adapter_workloads import HOULSBY, PARALLEL, PFEIFFER

from ..case import DTYPES, Case, with_compile

ACTIVATION = "gelu"
BLOCKS = {"houlsby": HOULSBY, "pfeiffer": PFEIFFER, "parallel": PARALLEL}
"""LN(o + up(gelu(down(o))) + x); the same behind a layernorm of o + x; LN(o + 4·up(gelu(down(x))) + x)."""
KINDS = list(BLOCKS)
WIDTHS = ((768, 48), (768, 64), (1024, 64), (4096, 64))
TOKENS = (512, 2048, 8192)
EAGER_PASSES = 30
"""About as many tensors of T × d does an eager step read or write."""


@dataclass(frozen=True)
class AdapterCase(Case):
    """One adapter with the residuals and layernorms around it, everything trained."""

    family: ClassVar[str] = "adapter"

    features: int
    bottleneck: int
    kind: str = field(default="houlsby", kw_only=True)

    @property
    def label(self) -> str:
        kind = "" if self.kind == "houlsby" else f" {self.kind}"
        return f"{self.tokens} × {self.features} → {self.bottleneck}{kind}"

    @property
    def workload(self) -> adapter_workloads.AdapterCase:
        block = {**BLOCKS[self.kind], "activation": ACTIVATION}
        return adapter_workloads.AdapterCase(
            str(self), (self.tokens,), self.features, self.bottleneck, **block
        )

    @property
    def order(self) -> tuple[Any, ...]:
        shape = (self.features, self.bottleneck, self.tokens)
        return (list(DTYPES).index(self.dtype), KINDS.index(self.kind), *shape)

    @property
    def work(self) -> tuple[int, int]:
        traffic = EAGER_PASSES * self.tokens * self.features * DTYPES[self.dtype].itemsize
        return self.flops, traffic

    @property
    def flops(self) -> int:
        """Down and up; backward twice that."""
        return 12 * self.tokens * self.features * self.bottleneck

    @property
    def bytes(self) -> int:
        """Compulsory traffic: x, skip, y and the weights once; in backward dy, x, skip, dx, dskip, weights, gradients.

        Of a Pfeiffer adapter the gradients of x and skip are one tensor.
        """
        rows = self.tokens * self.features * (7 if self.kind == "pfeiffer" else 8)
        weights = 2 * self.features * self.bottleneck
        return (rows + 3 * weights) * DTYPES[self.dtype].itemsize


def quick_cases() -> list[AdapterCase]:
    """The shapes of issue and papers, the short ones first; those that take too long say so."""
    both = ("fp32", "bf16")
    shapes = sorted((t * d, t, d, m) for t in TOKENS for d, m in WIDTHS)
    rows = [AdapterCase(dtype, t, d, m) for _, t, d, m in shapes for dtype in both]
    others = [AdapterCase(dtype, 2048, 768, 48, kind=kind) for kind in KINDS[1:] for dtype in both]
    rows = [AdapterCase("fp16", 512, 768, 48), *others, *rows]
    return with_compile(rows, lambda case: case == AdapterCase("fp32", 512, 768, 48))


def full_cases() -> list[AdapterCase]:
    """Every row."""
    rows = quick_cases()
    rows += [
        AdapterCase(dtype, tokens, 768, 48, kind=kind)
        for kind in KINDS[1:]
        for dtype in ("fp32", "bf16")
        for tokens in (512, 8192)
    ]
    rows += [AdapterCase("fp16", tokens, 768, 48) for tokens in TOKENS[1:]]
    rows += [AdapterCase(dtype, 16, 768, 48) for dtype in DTYPES]
    return with_compile(rows, lambda case: case.tokens in (512, 2048))
