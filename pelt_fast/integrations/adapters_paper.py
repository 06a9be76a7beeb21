"""``compat="paper"``: UniPELT's gates as its paper has them, in models of the `adapters` library.

There a gate is the mean over the real tokens of a sample, and a gated LoRA keeps alpha / r; the library takes the mean
over all tokens, padding included, and drops the factor. The layers ask ``current()`` at each call. What answers is left
by a hook in front of the base model's forward, on the library's own ``ForwardContext``, which it enters again where
activation checkpointing runs a part of the forward once more.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
from adapters.context import ForwardContext
from adapters.methods.adapter_layer_base import AdapterLayerBase
from adapters.model_mixin import ModelBaseAdaptersMixin, ModelUsingSubmodelsAdaptersMixin
from torch import Tensor, nn

from .fast_class import is_served
from .obstacles import type_name

_ATTRIBUTE = "pelt_fast_tokens"  # of the library's context


class Tokens:
    """Which tokens of the batch are real, through one forward of a base model."""

    def __init__(self, owner: nn.Module, mask: Any, outer: Tokens | None) -> None:
        self.owner, self.mask, self.outer = owner, mask, outer
        self._weights: dict[tuple[int, int, torch.dtype, torch.device], Tensor] = {}
        self._parts: dict[tuple[int, ...], Tokens] = {}

    def part(self, samples: tuple[int, ...]) -> Tokens:
        """Of some samples of the batch."""
        if not isinstance(self.mask, Tensor):
            return self
        if samples not in self._parts:
            self._parts[samples] = Tokens(self.owner, self.mask[list(samples)], None)
        return self._parts[samples]

    def weights(self, x: Tensor) -> Tensor | None:
        """(rows, T): what each token of x (rows, T, d) counts in its sample's mean; None: all the same.

        Raises:
            ValueError: the mask is not one of x's tokens.
        """
        if self.mask is None:
            return None
        rows, tokens = x.shape[:2]
        key = (rows, tokens, torch.promote_types(x.dtype, torch.float32), x.device)
        if key not in self._weights:
            self._weights[key] = self._of(*key)
        return self._weights[key]

    def _of(self, rows: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        mask = self.mask
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            came = tuple(mask.shape) if isinstance(mask, Tensor) else type_name(mask)
            raise ValueError(
                f"attention_mask is {came}; expected a tensor (B, T) under compat='paper', whose gates take the mean "
                "over the real tokens"
            )
        samples, known = mask.shape
        # Parallel repeats the batch for each of its adapters; a cache holds the tokens before these
        if tokens > known or (samples == 0) != (rows == 0) or (samples and rows % samples):
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}, a gate's input {rows} rows of {tokens} tokens; "
                "expected the same under compat='paper', which has no BatchSplit of gated adapters, and no prompt "
                "beside a gate"
            )
        real = (mask[:, known - tokens :] != 0).to(device, dtype)
        weights = real / real.sum(-1, keepdim=True).clamp_min(1)
        return weights if rows == samples else weights.repeat(rows // samples, 1)


_entered: ContextVar[Tokens | None] = ContextVar("pelt_fast_tokens", default=None)
# base models, and the adapters that they had when all of their gates were found to be ours
_checked: WeakKeyDictionary[nn.Module, tuple[Any, ...]] = WeakKeyDictionary()


def current() -> Tokens | None:
    """The tokens of this forward under ``compat="paper"``; None under ``compat="adapters"``."""
    context = ForwardContext.get_context()
    found: Tokens | None = getattr(context, _ATTRIBUTE, None)
    if found is None and _checked:  # a compiler does not know a ContextVar
        found = _entered.get()
        if found is not None and context is not None:
            setattr(context, _ATTRIBUTE, found)
    return found


@contextlib.contextmanager
def tokens_of(samples: tuple[int, ...]) -> Iterator[None]:
    """Within the block the batch is these samples of it: a group of a mixed batch."""
    context, tokens = ForwardContext.get_context(), current()
    if context is None or tokens is None:
        yield
        return
    setattr(context, _ATTRIBUTE, tokens.part(samples))
    try:
        yield
    finally:
        setattr(context, _ATTRIBUTE, tokens)


def gate_of(logits: Tensor) -> Tensor:
    """The mean of their sigmoid over the tokens that count: logits (rows, T, g) -> (rows, g)."""
    tokens = current()
    weights = None if tokens is None else tokens.weights(logits)
    if weights is None:
        return torch.sigmoid(logits).mean(1)
    weights = weights.unsqueeze(-1)
    scores = torch.sigmoid(logits.masked_fill(weights == 0, 0.0))  # whatever the others hold
    return (scores * weights).sum(1).to(logits.dtype)


def refuse(reason: str, adapters: Any, names: Iterable[str]) -> None:
    """Raises where the library's forward is about to run a gate whose semantics are not those that were asked for."""
    if current() is not None and any(
        getattr(adapters[name], "use_gating", False) for name in names if name in adapters
    ):
        raise RuntimeError(
            f"a gated adapter is left to the library ({reason}), whose gates are not those of compat='paper'; expected "
            "a call that pelt_fast serves, or pelt_fast.accelerate(model, compat='adapters')"
        )


def is_on(model: nn.Module) -> bool:
    """Whether ``compat="paper"`` is on in the model."""
    return any(_has_hook(module) for module in model.modules())


def check(model: nn.Module) -> None:
    """Whether ``compat="paper"`` can be had.

    Raises:
        ValueError: the attention mask of the gates cannot be found.
    """
    bases = list(_bases(model))
    if not bases:
        raise ValueError(
            f"compat is 'paper', and model ({type_name(model)}) has no base model of the adapters library in it, whose "
            "attention mask the gates need; expected the model itself, or compat='adapters'"
        )
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        kind = None
        if isinstance(module, ModelUsingSubmodelsAdaptersMixin) or hasattr(config, "vision_config"):
            kind = "has several models in it"
        elif getattr(config, "is_encoder_decoder", False) or getattr(
            config, "add_cross_attention", False
        ):
            kind = "has attention between two sequences"
        if kind is not None:
            raise ValueError(
                f"compat is 'paper', and {type_name(module)} {kind}, each with a mask of its own, so that a gate does "
                "not know its own; expected a model of one sequence, or compat='adapters'"
            )
    for base in bases:
        if _position(base) is None:
            raise ValueError(
                f"compat is 'paper', and the forward of {type_name(base)} takes no attention_mask; expected a model "
                "that does, or compat='adapters'"
            )


def check_gates(model: nn.Module) -> None:
    """Whether every gate in the model is computed here.

    Raises:
        ValueError: layers with gates are the library's.
    """
    names = [
        f"{name} ({type_name(module)})"
        for name, module in model.named_modules()
        if isinstance(module, AdapterLayerBase) and not is_served(module) and _gated(module)
    ]
    if names:
        raise ValueError(
            f"compat is 'paper', and the gates of {len(names)} layers are the library's: {', '.join(names[:3])}; "
            "expected layers that pelt_fast.accelerate can serve (call it after adding adapters), or compat='adapters'"
        )


def turn_on(model: nn.Module) -> None:
    """Every forward of a base model in ``model`` tells its layers which tokens are real."""
    for base in _bases(model):
        _checked.pop(base, None)
        if not _has_hook(base):
            base.register_forward_pre_hook(_enter, prepend=True, with_kwargs=True)
            base.register_forward_hook(_leave, always_call=True)


def turn_off(model: nn.Module) -> None:
    """As before ``turn_on``."""
    for module in model.modules():
        _remove(_enter, module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)
        _remove(_leave, module._forward_hooks, module._forward_hooks_always_called)


def _enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    mask = kwargs.get("attention_mask")
    if mask is None:
        position = _position(module)
        mask = args[position] if position is not None and position < len(args) else None
    _entered.set(Tokens(module, mask, _entered.get()))
    config: Any = module.adapters_config
    adapters = () if config is None else tuple(config.adapters.items())
    if (
        _checked.get(module) != adapters
    ):  # one that was added since may be on layers of the library's
        check_gates(module)
        _checked[module] = adapters


def _leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    tokens = _entered.get()
    if tokens is not None and tokens.owner is module:
        _entered.set(tokens.outer)


def _has_hook(module: nn.Module) -> bool:
    return any(hook is _enter for hook in module._forward_pre_hooks.values())


def _remove(hook: Any, hooks: dict[int, Any], companion: dict[int, Any]) -> None:
    for key in [key for key, found in hooks.items() if found is hook]:
        del hooks[key]
        companion.pop(key, None)


def _bases(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if isinstance(module, ModelBaseAdaptersMixin))


def _position(base: nn.Module) -> int | None:
    """Where ``attention_mask`` stands among the arguments of the forward; the library's wrappers do not say."""
    for cls in type(base).__mro__:
        forward = cls.__dict__.get("forward")
        names = [] if forward is None else list(inspect.signature(forward).parameters)[1:]
        if "attention_mask" in names:
            return names.index("attention_mask")
    return None


def _gated(layer: Any) -> bool:
    if len(getattr(layer, "prefix_gates", ())):
        return True
    adapters = getattr(layer, layer.adapter_modules_name, None)
    return isinstance(adapters, nn.ModuleDict) and any(
        getattr(adapter, "use_gating", False) for adapter in adapters.values()
    )
