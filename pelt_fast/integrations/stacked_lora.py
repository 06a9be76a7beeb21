"""LoRA adapters of one layer, side by side as ``multi_lora`` takes them: what every integration's mixed batches share.

The parameters stay the library's: those of the adapters in the batch are stacked. Where gradients flow this happens at
every call, and they flow back; elsewhere a stack is kept until anything that it was made of changes. A plan is shared
by all layers of a forward.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..segments import MultiAdapterPlan

_SAMPLES = 128  # of a parameter, at most


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
    """A stack and what it was made of.

    ``samples`` are elements of the parameters in their own memory: as long as they live, no other tensor can have its
    address. ``contents`` is what they were. It shows what no version counts, such as a write through ``.data``.
    """

    key: Any
    sources: list[Tensor]
    samples: list[Tensor]
    contents: Tensor | None
    stack: LoRAStack


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
    sources = [t for adapter in adapters if adapter for t in adapter[:3] if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in sources):
        forget(layer)
        return _make(adapters, x)
    if any(t.is_inference() for t in sources):  # they count no versions
        with torch.no_grad():
            return _make(adapters, x)
    wide = torch.promote_types(x.dtype, torch.float32)
    key = (
        *(used, wide),
        [None if adapter is None else adapter.scaling for adapter in adapters],
        [(t.data_ptr(), t._version, t.shape, t.stride(), t.dtype, t.device) for t in sources],
    )
    kept = _kept.get(layer)
    if (
        kept is not None
        and kept.key == key
        and all(a is b for a, b in zip(kept.sources, sources, strict=True))
        and (kept.contents is None or torch.equal(torch.cat(kept.samples), kept.contents))
    ):
        return kept.stack
    with torch.inference_mode(False), torch.no_grad():
        samples = [_sampled(t.detach()) for t in sources]
        # to compare is to wait for a GPU
        contents = torch.cat(samples) if x.device.type == "cpu" else None
        kept = _Kept(key, sources, samples, contents, _make(adapters, x))
    _kept[layer] = kept
    return kept.stack


def _sampled(t: Tensor) -> Tensor:
    """A view of elements at equal distances in memory."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    step = extent // _SAMPLES + 1
    return t.as_strided((-(-extent // step),), (step,))


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
