"""A PEFT LoRA layer under ``adapter_names``, as arguments of ``multi_lora_linear``.

The parameters stay PEFT's: those of the adapters in the batch are stacked (``stacked_lora``).
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

from .obstacles import parameter
from .peft_operands import Operands, adapter_operands, is_cast, state_obstacle
from .stacked_lora import StackedLoRA, forget, plan_of, stacked
from .watch import Watch, watch_modules

BASE = "__base__"
"""What PEFT calls the rows that have no adapter."""


class MixedOperands(NamedTuple):
    """What ``multi_lora_linear`` takes besides x, and what is added to its result."""

    weight: Tensor  # (out, in)
    bias: Tensor | None
    arguments: Operands  # the rest
    lora_biases: Tensor | None  # of B, for each row: (T, out)


def mixed_operands(
    layer: lora.Linear, x: Tensor, names: Sequence[str]
) -> MixedOperands | str | None:
    """What the layer computes with for a batch whose samples name their adapters.

    Args:
        layer: the LoRA layer.
        x: its input, (B, ..., in).
        names: the adapter of each of the B samples.

    Returns:
        The operands; or None: no sample has an adapter on this layer; or the reason why PEFT's forward must run.
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
    base = layer._modules["base_layer"]
    weight = parameter(base, "weight")
    found = _reading(layer, used, weight, is_cast(x))
    if isinstance(found, str):
        return found
    tokens = x.numel() // max(len(x) * x.shape[-1], 1)
    plan = plan_of(_slots(tuple(names)), len(used), tokens, x.device)
    stack = stacked(layer, used, found.adapters, x)
    biases = None
    if stack.bias is not None:
        biases = F.embedding(plan.arrays[0], stack.bias)
    arguments = {
        "lora_a": stack.lora_a,
        "lora_b": stack.lora_b,
        "plan": plan,
        "scaling": stack.scaling,
        "ranks": stack.ranks,
        "dropout_p": found.dropout_p,
    }
    # Conv1D keeps its weight as (in, out)
    matrix = weight if isinstance(base, nn.Linear) else weight.t()
    return MixedOperands(matrix, parameter(base, "bias"), arguments, biases)


class _Reading(NamedTuple):
    """What a layer was found to compute with, and what that holds for."""

    key: tuple[Any, ...]
    places: tuple[Any, ...]
    watch: Watch
    adapters: list[StackedLoRA | None]
    dropout_p: float


_readings: WeakKeyDictionary[nn.Module, _Reading] = WeakKeyDictionary()


def forget_layer(layer: nn.Module) -> None:
    """Drops all that is kept of a layer."""
    forget(layer)
    _readings.pop(layer, None)


def _reading(
    layer: lora.Linear, used: tuple[str, ...], weight: Tensor, autocast: bool
) -> _Reading | str:
    """The adapters on the layer, read anew where anything about them has changed; or why PEFT's forward must run."""
    key = (used, autocast, weight.dtype, weight.device)
    places = _places(layer)
    kept = _readings.get(layer)
    if (
        kept is not None
        and kept.key == key
        and all(a is b for a, b in zip(kept.places, places, strict=True))
        and kept.watch.holds()
    ):
        return kept
    watch = _watch(layer, used)  # before reading: what changes meanwhile is found at the next call
    adapters: list[StackedLoRA | None] = []
    rates = set()
    for name in used:
        if name not in places[0]:
            adapters.append(None)
            continue
        found = adapter_operands(layer, name, weight, autocast)
        if isinstance(found, str):
            return f"adapter {name!r}: {found}"
        adapters.append(StackedLoRA(*found[:4]))
        rates.add(found[4])
    if len(rates) > 1:
        return "the adapters of the batch have different dropout probabilities"
    kept = _Reading(key, places, watch, adapters, rates.pop())
    _readings[layer] = kept
    return kept


def _places(layer: lora.Linear) -> tuple[Any, ...]:
    """Where the adapters are."""
    modules = layer._modules
    return (
        modules["lora_A"]._modules,
        modules["lora_B"]._modules,
        modules["lora_dropout"]._modules,
        layer.scaling,
        layer.lora_variant,
        # what the forwards of all of them are compared with
        nn.Linear.forward,
        nn.Dropout.forward,
    )


def _watch(layer: lora.Linear, used: tuple[str, ...]) -> Watch:
    dictionaries = _places(layer)[:5]
    modules = [place[name] for place in dictionaries[:3] for name in used if name in place]
    entries = [(place, name) for place in dictionaries for name in used]
    return watch_modules(modules, ("p", "inplace", "training"), entries)


@functools.lru_cache(maxsize=64)
def adapters_of(names: tuple[str, ...]) -> tuple[str, ...]:
    """The adapters of a batch, each once, in the order of the plan's slots."""
    return tuple(sorted(set(names) - {BASE}))


@functools.lru_cache(maxsize=8)
def _slots(names: tuple[str, ...]) -> tuple[int, ...]:
    slots = {name: slot for slot, name in enumerate(adapters_of(names))}
    return tuple(slots.get(name, -1) for name in names)


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
