"""LoRA adapters of one layer, side by side as ``multi_lora`` takes them: what every integration's mixed batches share.

The parameters stay the library's: those of the adapters in the batch are stacked. Where gradients flow this happens at
every call, and they flow back; elsewhere a stack is kept until anything that it was made of changes. A plan is shared
by all layers of a forward.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..segments import MultiAdapterPlan
from .watch import Watch, watch_tensors


class StackedLoRA(NamedTuple):
    """One adapter of a layer, as it is at this moment."""

    lora_a: Tensor
    lora_b: Tensor
    lora_bias: Tensor | None
    scaling: float


class LoRAStack(NamedTuple):
    """The adapters of a batch, one for each slot of the plan; a slot that the layer lacks has rank 0."""

    lora_a: Tensor  # (L, R, in)
    lora_b: Tensor  # (L, out, R)
    bias: Tensor | None  # (L + 1, out), scaled; the last row is of those without an adapter
    ranks: Tensor
    scaling: Tensor


class _Kept(NamedTuple):
    """A stack and what it was made of."""

    used: tuple[str, ...]
    dtype: torch.dtype
    adapters: Sequence[StackedLoRA | None]
    watch: Watch
    stack: LoRAStack

    def is_of(self, adapters: Sequence[StackedLoRA | None]) -> bool:
        """Whether these are the very adapters, with the same scalings."""
        if adapters is self.adapters:
            return True
        return len(adapters) == len(self.adapters) and all(
            _is_same(a, b) for a, b in zip(adapters, self.adapters, strict=True)
        )


_kept: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()


@functools.lru_cache(maxsize=8)
def plan_of(
    slots: tuple[int, ...], adapters: int, tokens: int, device: torch.device
) -> MultiAdapterPlan:
    """The plan of samples of ``tokens`` tokens each, whose adapters are in these slots; -1: none."""
    return MultiAdapterPlan.from_samples(slots, tokens, adapters, device=device)


@functools.lru_cache(maxsize=64)
def _numbers(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def forget(layer: nn.Module) -> None:
    """Drops the layer's stack."""
    _kept.pop(layer, None)


def forget_trained(layer: nn.Module) -> None:
    """Drops the layer's stack where gradients are on.

    An optimizer may write where no version is counted, so that what was stacked before a training is stale after it.
    """
    if _kept and torch.is_grad_enabled():
        forget(layer)


def stacked(
    layer: nn.Module, used: tuple[str, ...], adapters: Sequence[StackedLoRA | None], x: Tensor
) -> LoRAStack:
    """The stack of a call on x.

    Args:
        layer: whose adapters they are; the stack is kept for it.
        used: their names, in the order of the plan's slots.
        adapters: themselves, with None for a slot that the layer lacks; at least one is there.
        x: the layer's input.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in _parameters(adapters)):
        forget(layer)
        return _make(adapters, x)
    dtype = torch.promote_types(x.dtype, torch.float32)
    kept = _kept.get(layer)
    if (
        kept is not None
        and kept.dtype is dtype
        and kept.used == used
        and kept.is_of(adapters)
        and kept.watch.holds()
    ):
        return kept.stack
    sources = _parameters(adapters)
    if any(t.is_inference() for t in sources):  # they count no versions
        with torch.no_grad():
            return _make(adapters, x)
    with torch.inference_mode(False), torch.no_grad():
        kept = _Kept(used, dtype, adapters, watch_tensors(sources), _make(adapters, x))
    _kept[layer] = kept
    return kept.stack


def _parameters(adapters: Sequence[StackedLoRA | None]) -> list[Tensor]:
    return [t for adapter in adapters if adapter for t in adapter[:3] if t is not None]


def _is_same(a: StackedLoRA | None, b: StackedLoRA | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.scaling == b.scaling and all(t is u for t, u in zip(a[:3], b[:3], strict=True))


def _make(adapters: Sequence[StackedLoRA | None], x: Tensor) -> LoRAStack:
    ranks = tuple(0 if adapter is None else adapter.lora_a.shape[0] for adapter in adapters)
    scaling = tuple(0.0 if adapter is None else float(adapter.scaling) for adapter in adapters)
    wide = torch.promote_types(x.dtype, torch.float32)
    lora_a = _blocks([None if a is None else a.lora_a for a in adapters], max(ranks))
    # rank by rank, as kernels like to read it
    lora_b = _blocks([None if a is None else a.lora_b.t() for a in adapters], max(ranks))
    biases = [a.lora_bias * a.scaling if a and a.lora_bias is not None else None for a in adapters]
    bias = None
    if any(b is not None for b in biases):
        rows = [None if b is None else b.to(wide)[None] for b in biases]
        bias = _blocks([*rows, None], 1)[:, 0]
    return LoRAStack(
        *(lora_a, lora_b.transpose(1, 2), bias),
        *(_numbers(ranks, torch.int32, x.device), _numbers(scaling, wide, x.device)),
    )


def _blocks(parts: Sequence[Tensor | None], rows: int) -> Tensor:
    """(L, rows, features), each part beginning in the first row and followed by zeros."""
    like = next(part for part in parts if part is not None)
    return torch.stack(
        [
            like.new_zeros(rows, like.shape[1])
            if part is None
            else F.pad(part, (0, 0, 0, rows - part.shape[0]))
            for part in parts
        ]
    )
