"""Who runs in a row, each with the frozen linear in it: the loop over adapters, gathered bmm, merging, PEFT, ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pelt_fast
from pelt_fast import functional as PF
from pelt_fast.testing.inputs import draw as draw_tensor

from ..case import DTYPES
from ..contender import (
    BACKENDS,
    Contender,
    NotHere,
    backend_in,
    differentiable,
    leaves_of,
    recorded,
    what_runs,
)
from .cases import MultiLoRACase
from .oracle import Inputs, by_rows

MOST_OF_PEFT = 64
MOST_GATHERED = 512
"""Tokens; each has a copy of its A and B there."""
NAMES = (
    *("frozen", "peft", "loop", "gather", "merged", "ours", "ours_linear", "ours_rows"),
    *(f"ours[{backend}]" for backend in (*BACKENDS, "cuda")),
    "plan",
)
"""*ours* is what `MultiLoRALinear` computes, `multi_lora_linear`: W is packed once since it is frozen. *ours_linear*
adds `multi_lora` to `F.linear`: the adapters' own cost, without what the packed product gains. *ours* has B as the
layer keeps it, rank by rank; *ours_rows* as (L, out, R) without a gap."""


def draw(case: MultiLoRACase, device: torch.device) -> Inputs:
    dtype = DTYPES[case.dtype]
    drawn = case.workload.make(dtype, device)
    generator = torch.Generator().manual_seed(1)
    shape, std = (case.out_features, case.in_features), case.in_features**-0.5
    inputs = Inputs(
        **{f.name: getattr(drawn, f.name) for f in fields(drawn)},
        weight=draw_tensor(shape, std, "contiguous", dtype, device, generator),
        bias=draw_tensor(shape[:1], 1.0, "contiguous", dtype, device, generator),
    )
    return inputs.with_ids(case.token_adapters)  # type: ignore[return-value]


def build(name: str, case: MultiLoRACase, drawn: Inputs) -> Contender:
    """Raises `NotHere` with the reason when this contender has no place in this row."""
    if name == "frozen":
        names = ("x",) if case.train else ()
        return differentiable(name, case, drawn, names, _frozen, "torch")
    if name == "plan":
        return _plan(name, case, drawn)
    if name == "gather":
        if case.tokens > MOST_GATHERED:
            raise NotHere("a copy of A and B for each of so many tokens fills the memory")
        inputs = by_rows(drawn)
        return differentiable(name, case, inputs, _wanted(case), _gather(inputs), "torch")
    if name == "loop":
        return _loop(name, case, drawn)
    if name == "merged":
        return _merged(name, case, drawn)
    if name == "peft":
        return _peft(name, case, drawn)
    return _ours(name, case, drawn)


def trained(inputs: Inputs) -> tuple[str, ...]:
    return ("x", "lora_a.0", "lora_b.0")


def _wanted(case: MultiLoRACase) -> tuple[str, ...]:
    return ("x", "lora_a.0", "lora_b.0") if case.train else ()


def _frozen(leaves: Inputs) -> Tensor:
    return F.linear(leaves.x, leaves.weight, leaves.bias)


def _plan(name: str, case: MultiLoRACase, inputs: Inputs) -> Contender:
    """What is built once for a batch and shared by all layers."""
    ids = torch.tensor(inputs.ids, device=inputs.x.device)

    def forward() -> Tensor:
        return pelt_fast.MultiAdapterPlan(ids, case.adapters).arrays[0]

    return Contender(name, inputs, forward, {}, "torch")


def _gather(inputs: Inputs) -> Callable[[Inputs], Tensor]:
    ids = torch.tensor(inputs.ids, device=inputs.x.device)
    scales = torch.tensor(inputs.scaling[0], dtype=inputs.x.dtype, device=inputs.x.device)[ids]

    def function(leaves: Inputs) -> Tensor:
        """Each token's A and B are copied out of the stack."""
        a, b = leaves.lora_a[0].index_select(0, ids), leaves.lora_b[0].index_select(0, ids)
        delta = torch.bmm(b, torch.bmm(a, leaves.x.unsqueeze(2))).squeeze(2)
        return torch.addcmul(_frozen(leaves), delta, scales[:, None])

    return function


# --- adapters that are no stack


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
        sources, dy = (
            [self.wrt["x"], *self.lists["lora_a.0"], *self.lists["lora_b.0"]],
            self.inputs.dy,
        )
        return lambda y: torch.autograd.grad(y, sources, dy, allow_unused=True)

    def run(self) -> dict[str, Tensor]:
        y = self.forward()
        if self.backward is None:
            return {"y": y.detach()}
        dx, *rest = self.backward(y)
        found = {"y": y.detach(), "x": dx}
        for name, tensors in self.lists.items():
            taken, rest = rest[: len(tensors)], rest[len(tensors) :]
            pairs = zip(taken, tensors, strict=True)
            found[name] = torch.stack([torch.zeros_like(t) if g is None else g for g, t in pairs])
        return found


def _lists(inputs: Inputs, train: bool) -> dict[str, list[Tensor]]:
    return {
        name: [t.detach().clone(memory_format=torch.contiguous_format).requires_grad_(train) for t in stack]
        for name, stack in (("lora_a.0", inputs.lora_a[0]), ("lora_b.0", inputs.lora_b[0]))
    }  # fmt: skip


def _loop(name: str, case: MultiLoRACase, inputs: Inputs) -> Contender:
    """PEFT's `_mixed_batch_forward` with what it looks for in each call, the rows of an adapter, found beforehand."""
    leaves = leaves_of(inputs, _wanted(case)[:1])
    lists, segments, scaling = _lists(inputs, case.train), inputs.segments, inputs.scaling[0]
    a, b = lists["lora_a.0"], lists["lora_b.0"]

    def forward() -> Tensor:
        y = _frozen(leaves)
        for g, rows in segments:
            delta = F.linear(F.linear(leaves.x.index_select(0, rows), a[g]), b[g]) * scaling[g]
            y.index_add_(0, rows, delta)
        return y

    wrt = {"x": leaves.x, **dict.fromkeys(lists, leaves.x)} if case.train else {}
    return PerAdapter(name, leaves, recorded(case, forward), wrt, "torch", lists=lists)


def _merged(name: str, case: MultiLoRACase, inputs: Inputs) -> Contender:
    """W + BA made for each adapter of the batch."""
    if case.train:
        raise NotHere("a merged adapter cannot be trained")
    if not case.merging:
        raise NotHere("W + BA for each adapter takes part in a few rows only")
    leaves = leaves_of(inputs, ())
    lists, segments, scaling = _lists(inputs, False), inputs.segments, inputs.scaling[0]
    a, b = lists["lora_a.0"], lists["lora_b.0"]

    def forward() -> Tensor:
        y = leaves.x.new_empty(case.tokens, case.out_features)
        for g, rows in segments:
            weight = torch.addmm(leaves.weight, b[g], a[g], alpha=scaling[g])
            y[rows] = F.linear(leaves.x[rows], weight, leaves.bias)
        return y

    return PerAdapter(name, leaves, recorded(case, forward), {}, "torch", lists=lists)


def peft_layer(case: MultiLoRACase, inputs: Inputs) -> nn.Module:
    """PEFT's own layer with all adapters, holding the numbers of ``inputs``."""
    from peft import LoraConfig, get_peft_model

    model = nn.Module()
    weight = inputs.weight
    model.proj = nn.Linear(
        case.in_features, case.out_features, dtype=weight.dtype, device=weight.device
    )
    config = LoraConfig(r=case.rank, lora_alpha=case.rank, target_modules=["proj"])
    wrapped: Any = get_peft_model(model, config, adapter_name="0", autocast_adapter_dtype=False)
    layer: Any = wrapped.base_model.model.proj
    for g in range(1, case.adapters):
        wrapped.add_adapter(str(g), config, autocast_adapter_dtype=False)
    with torch.no_grad():
        layer.base_layer.weight.copy_(inputs.weight)
        layer.base_layer.bias.copy_(inputs.bias)
        for g, scaling in enumerate(inputs.scaling[0]):
            layer.lora_A[str(g)].weight.copy_(inputs.lora_a[0][g])
            layer.lora_B[str(g)].weight.copy_(inputs.lora_b[0][g])
            layer.scaling[str(g)] = scaling
    found: nn.Module = layer.eval()
    return found


def _peft(name: str, case: MultiLoRACase, inputs: Inputs) -> Contender:
    if case.train:
        raise NotHere("PEFT trains no mixed batches")
    if case.adapters > MOST_OF_PEFT:
        raise NotHere("PEFT's modules for so many adapters take too long to make")
    layer: Any = peft_layer(case, inputs)
    leaves, names = leaves_of(inputs, ()), [str(g) for g in inputs.ids]
    forward = recorded(case, lambda: layer(leaves.x, adapter_names=names))
    return Contender(name, leaves, forward, {}, "torch", layer)


# --- ours


def _ours(name: str, case: MultiLoRACase, inputs: Inputs) -> Contender:
    if name == "ours_rows":
        inputs = by_rows(inputs)
    backend = backend_in(name)
    (a,), (b,) = inputs.lora_a, inputs.lora_b
    scaling = inputs.args[-1][0]
    explanation = pelt_fast.explain(
        "multi_lora", inputs.x, a, b, inputs.plan, scaling, backend=backend
    )

    def function(leaves: Inputs) -> Tensor:
        (a,), (b,) = leaves.lora_a, leaves.lora_b
        rest = (a, b, leaves.plan, scaling)
        if name == "ours_linear":
            found: Tensor = PF.multi_lora(leaves.x, *rest, base_out=_frozen(leaves))
            return found
        return PF.multi_lora_linear(leaves.x, leaves.weight, leaves.bias, *rest, backend=backend)

    ran = what_runs(explanation, case)
    return differentiable(name, case, inputs, _wanted(case), function, ran)
