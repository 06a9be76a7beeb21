"""Who runs in a row: the layernorm alone, the loop over adapters, ours per backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

import pelt_fast
from pelt_fast import functional as PF
from pelt_fast.testing.inputs import draw as draw_tensor

from ..case import DTYPES
from ..contender import (
    BACKENDS,
    Contender,
    backend_in,
    differentiable,
    leaves_of,
    recorded,
    what_runs,
)
from .cases import MultiBottleneckCase
from .oracle import EPS, Inputs, layernorm

NAMES = ("ln", "loop", "ours", *(f"ours[{name}]" for name in BACKENDS))
STACKS = ("down", "down_bias", "up", "up_bias")


def draw(case: MultiBottleneckCase, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    rows, d, m, n = case.tokens, case.features, case.bottleneck, case.adapters

    def of(*shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return draw_tensor(
            shape, std, "contiguous", DTYPES[case.dtype], device, generator, mean=mean
        )

    return Inputs(
        x=of(rows, d),
        dy=of(rows, d),
        skip=of(rows, d),
        down=of(n, m, d, std=d**-0.5),
        down_bias=of(n, m, std=0.5),
        up=of(n, d, m, std=m**-0.5),
        up_bias=of(n, d, std=0.5),
        ln_weight=of(d, std=0.25, mean=1.0),
        ln_bias=of(d, std=0.5),
        ids=case.token_adapters,
    )


def trained(inputs: Inputs) -> tuple[str, ...]:
    """Everything."""
    return tuple(name for name, _ in inputs.named_tensors() if name != "dy")


def build(name: str, case: MultiBottleneckCase, drawn: Inputs) -> Contender:
    """Raises `NotHere` with the reason when this contender has no place in this row."""
    wanted = trained(drawn) if case.train else ()
    if name == "ln":
        names = tuple(n for n in wanted if n in ("x", "skip", "ln_weight", "ln_bias"))
        return differentiable(name, case, drawn, names, _alone, "torch")
    if name == "loop":
        return _loop(name, case, drawn, wanted)
    backend = backend_in(name)
    plan = pelt_fast.MultiAdapterPlan(drawn.ids, case.adapters, device=drawn.x.device)

    def arguments(i: Inputs) -> tuple[Tensor, ...]:
        return (i.x, i.down, i.down_bias, i.up, i.up_bias)

    def ours(i: Inputs) -> Tensor:
        return PF.multi_bottleneck(
            *(*arguments(i), plan),
            activation="gelu",
            residual=(i.x, i.skip),
            ln_weight=i.ln_weight,
            ln_bias=i.ln_bias,
            eps=EPS,
            backend=backend,
        )

    explanation = pelt_fast.explain(
        *("multi_bottleneck", *arguments(drawn), plan),
        activation="gelu",
        ln_weight=drawn.ln_weight,
        backend=backend,
    )
    return differentiable(name, case, drawn, wanted, ours, what_runs(explanation, case))


def _alone(leaves: Inputs) -> Tensor:
    """What stands there without an adapter."""
    return layernorm(leaves, leaves.x + leaves.skip)


@dataclass
class PerAdapter(Contender):
    """The adapters are tensors of their own, as modules keep them; only `run` makes stacks of their gradients."""

    lists: dict[str, list[Tensor]] = field(default_factory=dict)

    @property
    def tensors(self) -> list[Tensor]:
        return super().tensors + [t for tensors in self.lists.values() for t in tensors]

    @property
    def backward(self) -> Callable[[Tensor], tuple[Tensor, ...]] | None:
        if not self.wrt:
            return None
        sources = [*self.wrt.values(), *(t for tensors in self.lists.values() for t in tensors)]
        dy = self.inputs.dy
        return lambda y: torch.autograd.grad(y, sources, dy)

    def run(self) -> dict[str, Tensor]:
        y = self.forward()
        if self.backward is None:
            return {"y": y.detach()}
        grads = list(self.backward(y))
        found = {"y": y.detach(), **dict(zip(self.wrt, grads, strict=False))}
        grads = grads[len(self.wrt) :]
        for name, tensors in self.lists.items():
            found[name] = torch.stack(grads[: len(tensors)])
            grads = grads[len(tensors) :]
        return found


def _loop(
    name: str, case: MultiBottleneckCase, inputs: Inputs, wanted: tuple[str, ...]
) -> Contender:
    """Adapter after adapter on its rows, as the library goes through a split batch; rows found beforehand."""
    names = tuple(n for n in wanted if n not in STACKS)
    leaves, segments = leaves_of(inputs, names), inputs.segments
    lists = {
        stack: [t.detach().clone().requires_grad_(case.train) for t in getattr(inputs, stack)]
        for stack in STACKS
    }

    def forward() -> Tensor:
        y = leaves.x + leaves.skip
        for g, rows in segments:
            down, down_bias, up, up_bias = (lists[stack][g] for stack in STACKS)
            hidden = F.gelu(F.linear(leaves.x.index_select(0, rows), down, down_bias))
            u = F.linear(hidden, up, up_bias)
            y = y.index_add(0, rows, u) if case.train else y.index_add_(0, rows, u)
        return layernorm(leaves, y)

    wrt = {n: t for n, t in leaves.named_tensors() if n in names}
    return PerAdapter(name, leaves, recorded(case, forward), wrt, "torch", lists=lists)
