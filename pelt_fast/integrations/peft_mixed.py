"""A PEFT LoRA layer under ``adapter_names``, as arguments of ``multi_lora``.

The parameters stay PEFT's: those of the adapters in the batch are stacked. Where gradients flow this happens at every
call, and they flow back; elsewhere a stack is kept until anything that it was made of changes. A plan is shared by all
layers of a forward.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from peft.tuners.lora import layer as lora
from torch import Tensor, nn
from torch.nn import functional as F

from ..segments import MultiAdapterPlan
from .obstacles import parameter
from .peft_operands import Operands, adapter_operands, is_cast, state_obstacle

BASE = "__base__"
"""What PEFT calls the rows that have no adapter."""

_SAMPLES = 128  # of a parameter, at most


class _Adapter(NamedTuple):
    """One adapter of a layer, as it is at this moment."""

    lora_a: Tensor
    lora_b: Tensor
    lora_bias: Tensor | None
    scaling: float


class _Stack(NamedTuple):
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
    stack: _Stack


_kept: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()


def mixed_operands(
    layer: lora.Linear, x: Tensor, names: Sequence[str]
) -> tuple[Operands, Tensor | None] | str | None:
    """The arguments of ``multi_lora`` after x but for the base's output, and the biases of B, (T, out).

    Args:
        layer: the LoRA layer.
        x: its input, (B, ..., in).
        names: the adapter of each of the B samples.

    Returns:
        The arguments; or None: no sample has an adapter on this layer; or the reason why PEFT's forward must run.
    """
    present = layer._modules["lora_A"]._modules
    used = adapters_of(tuple(names))
    if not any(name in present for name in used):
        return None
    if not isinstance(x, Tensor) or x.dim() < 2:
        return "x has no dimension of samples"
    obstacle = state_obstacle(layer, x)
    if obstacle is not None:
        return obstacle
    weight, autocast = parameter(layer._modules["base_layer"], "weight"), is_cast(x)
    adapters: list[_Adapter | None] = []
    rates = set()
    for name in used:
        if name not in present:
            adapters.append(None)
            continue
        found = adapter_operands(layer, name, weight, autocast)
        if isinstance(found, str):
            return f"adapter {name!r}: {found}"
        adapters.append(_Adapter(*found[:4]))
        rates.add(found[4])
    if len(rates) > 1:
        return "the adapters of the batch have different dropout probabilities"
    tokens = x.numel() // max(len(x) * x.shape[-1], 1)
    plan = _plan(tuple(names), tokens, x.device)
    stack = _stacked(layer, used, adapters, x)
    biases = None
    if stack.bias is not None:
        biases = F.embedding(plan.arrays[0], stack.bias)
    return {
        "lora_a": stack.lora_a,
        "lora_b": stack.lora_b,
        "plan": plan,
        "scaling": stack.scaling,
        "ranks": stack.ranks,
        "dropout_p": rates.pop(),
    }, biases


@functools.lru_cache(maxsize=64)
def adapters_of(names: tuple[str, ...]) -> tuple[str, ...]:
    """The adapters of a batch, each once, in the order of the plan's slots."""
    return tuple(sorted(set(names) - {BASE}))


@functools.lru_cache(maxsize=8)
def _plan(names: tuple[str, ...], tokens: int, device: torch.device) -> MultiAdapterPlan:
    slots = {name: slot for slot, name in enumerate(adapters_of(names))}
    ids = [slots.get(name, -1) for name in names]
    return MultiAdapterPlan.from_samples(ids, tokens, len(slots), device=device)


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


def _stacked(
    layer: nn.Module, used: tuple[str, ...], adapters: Sequence[_Adapter | None], x: Tensor
) -> _Stack:
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


def _make(adapters: Sequence[_Adapter | None], x: Tensor) -> _Stack:
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
    return _Stack(
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


class _Recomputed(NamedTuple):
    """What a checkpoint has to know when it runs a part of a forward again: PEFT's hooks are gone by then."""

    names: Sequence[str]
    layers: frozenset[nn.Module]


_recomputed: ContextVar[_Recomputed | None] = ContextVar("pelt_fast_recomputed", default=None)
# whose last forward in training was of a mixed batch, and may be in a checkpoint that we do not know of
_unremembered: WeakSet[nn.Module] = WeakSet()


def recomputed_names(layer: nn.Module) -> Sequence[str] | None:
    """The ``adapter_names`` of a call without any: those that it had when it was first run, or None.

    Raises:
        RuntimeError: a checkpoint that is not the model's own runs the layer again.
    """
    again = _recomputed.get()
    if again is not None and layer in again.layers:
        return again.names
    if _unremembered and layer.training and layer in _unremembered:
        if torch._C._current_graph_task_id() != -1:  # within a backward
            raise RuntimeError(
                "a checkpoint runs a layer again without the `adapter_names` that it had; "
                "use the model's own gradient_checkpointing_enable()"
            )
        _unremembered.discard(layer)
    return None


@contextlib.contextmanager
def remembered(
    model: nn.Module, names: Sequence[str], layers: frozenset[nn.Module]
) -> Iterator[None]:
    """Within the block, the checkpoints that ``model`` makes remember the names for when they run again."""
    again = _Recomputed(list(names), layers)
    changed = []
    if torch.is_grad_enabled():
        for module in model.modules():
            function = module.__dict__.get("_gradient_checkpointing_func")
            if function is not None and getattr(module, "gradient_checkpointing", False):
                wrapped = functools.partial(_checkpoint, function, again)
                module.__dict__["_gradient_checkpointing_func"] = wrapped
                changed.append((module, function))
        for layer in layers:
            (_unremembered.discard if changed or not layer.training else _unremembered.add)(layer)
    try:
        yield
    finally:
        for module, function in changed:
            module.__dict__["_gradient_checkpointing_func"] = function


def _checkpoint(
    function: Callable[..., Any],
    again: _Recomputed,
    run: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    return function(functools.partial(_run, again, run), *args, **kwargs)


def _run(again: _Recomputed, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    token = _recomputed.set(again)
    try:
        return run(*args, **kwargs)
    finally:
        _recomputed.reset(token)
