"""`adapters`: its layers get fast classes; which methods of the library have one, and what is left to it."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from adapters.methods.adapter_layer_base import AdapterLayerBase
from adapters.methods.invertible import InvertibleAdapterLayer
from torch import nn

from . import (
    adapters_attention,
    adapters_bottleneck,
    adapters_invertible,
    adapters_lora,
    adapters_paper,
    adapters_prefix,
)
from .adapters_grouped import grouped_class
from .base_layers import base_classes
from .fast_class import (
    Accelerated,
    check_on_top,
    give_back,
    is_served,
    library_type,
    sorts_of,
)
from .obstacles import type_name
from .report import Report

FAMILIES: tuple[ModuleType, ...] = (
    adapters_bottleneck,
    adapters_invertible,
    adapters_lora,
    adapters_prefix,
)
"""Modules with ``LIBRARY``, ``SORT``, ``concerns``, ``why_left``, ``accelerated_class`` and ``describe``, one for each
of the library's methods."""

_MODELS = ("transformers.", "adapters.models.", "adapters.heads.")


def has_layers(model: nn.Module) -> bool:
    """Whether there is any layer of the library's in the model."""
    return any(isinstance(module, AdapterLayerBase) for module in model.modules())


class _Accelerated(list[nn.Module]):
    """Accelerated layers of a model; those that a report does not speak of do not count."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.uncounted: list[nn.Module] = []


def accelerate(model: nn.Module, compat: str | None = None) -> Report:
    """Gives every layer that can be served the fast class; see ``pelt_fast.accelerate``."""
    compat = compat or ("paper" if adapters_paper.is_on(model) else "adapters")
    if compat == "paper":
        adapters_paper.check(model)
    report = Report(library="adapters", compat=compat)
    base = base_classes(_base_layers(model))
    base_dtype = _base_dtype(model)
    changed: list[nn.Module] = []
    for name, module in model.named_modules():
        already = is_served(module)
        fast, reason = (type(module), None) if already else _fast_class(module)
        fast = fast or base.get(module)
        if fast is not None and not already:
            module.__class__ = fast
            changed.append(module)
        family = _family(module)
        if family is None or not family.concerns(module):
            if family is None and reason is not None:
                report.left[name] = reason
            continue
        if reason is not None:
            report.left[name] = reason
            continue
        report.add(name, family.SORT, family.describe(module, base_dtype), already)
    report.base.update(sorts_of(model.modules()))
    if compat == "adapters":
        adapters_paper.turn_off(model)
        return report
    try:
        adapters_paper.check_gates(model)
    except ValueError:
        give_back(changed)
        raise
    adapters_paper.turn_on(model)
    return report


def accelerated_layers(model: nn.Module) -> _Accelerated:
    """What ``restore`` will restore.

    Raises:
        RuntimeError: another library has put its own class over one of them.
    """
    layers = _Accelerated(model)
    for name, module in model.named_modules():
        if isinstance(module, Accelerated):
            check_on_top(name, module)
            family = _family(module)
            counts = is_served(module) and family is not None and family.concerns(module)
            (layers if counts else layers.uncounted).append(module)
    return layers


def restore(layers: _Accelerated) -> None:
    """Gives accelerated layers the library's class back; see ``pelt_fast.restore``."""
    adapters_paper.turn_off(layers.model)
    give_back([*layers, *layers.uncounted])


def _base_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Layers of the base model; those inside of adapters are the adapters' own affair."""
    for parent in model.modules():
        if library_type(parent).__module__.startswith(_MODELS):
            yield from parent.children()


def _fast_class(module: nn.Module) -> tuple[type | None, str | None]:
    """The class that the module gets, if any, and why it is left to the library, if it is."""
    grouped = grouped_class(module)
    family = _family(module)
    if family is None:
        attention = adapters_attention.serves(module)
        served = adapters_attention.accelerated_class(type(module)) if attention else None
        return grouped or served, _other_method(module)
    reason = family.why_left(module)
    return (family.accelerated_class(type(module)) if reason is None else grouped), reason


def _family(module: nn.Module) -> ModuleType | None:
    return next((f for f in FAMILIES if isinstance(module, f.LIBRARY)), None)


def _other_method(module: nn.Module) -> str | None:
    """Why a module of another of the library's methods is left; None where there is nothing in it."""
    if not isinstance(module, AdapterLayerBase) or isinstance(module, InvertibleAdapterLayer):
        return None
    # every linear layer is wrapped for LoRA, whether it has one or not
    if not len(getattr(module, module.adapter_modules_name, ())):
        return None
    return f"it is a {type_name(module)}"


def _base_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype that hidden states will have: that of the first parameter, an embedding in all models."""
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next(dtypes, None)
