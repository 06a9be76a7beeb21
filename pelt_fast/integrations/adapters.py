"""`adapters`: its layers get fast classes; which methods of the library have one, and what is left to it."""

from __future__ import annotations

from types import ModuleType

import torch
from adapters.methods.adapter_layer_base import AdapterLayerBase
from adapters.methods.invertible import InvertibleAdapterLayer
from torch import nn

from . import (
    adapters_bottleneck,
    adapters_invertible,
    adapters_lora,
    adapters_paper,
    adapters_prefix,
)
from .adapters_class import Accelerated, is_fast, is_served
from .adapters_grouped import group
from .obstacles import type_name
from .report import Report
from .stacked_lora import forget

FAMILIES: tuple[ModuleType, ...] = (
    adapters_bottleneck,
    adapters_invertible,
    adapters_lora,
    adapters_prefix,
)
"""Modules with ``LIBRARY``, ``concerns``, ``why_left``, ``accelerated_class`` and ``describe``, one for each of the
library's methods."""


def has_layers(model: nn.Module) -> bool:
    """Whether there is any layer of the library's in the model."""
    return any(isinstance(module, AdapterLayerBase) for module in model.modules())


class _Accelerated(list[nn.Module]):
    """Accelerated layers of a model; those that are so in mixed batches alone do not count."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.grouped: list[nn.Module] = []


def accelerate(model: nn.Module, compat: str | None = None) -> Report:
    """Gives every layer that can be served the fast class; see ``pelt_fast.accelerate``."""
    compat = compat or ("paper" if adapters_paper.is_on(model) else "adapters")
    if compat == "paper":
        adapters_paper.check(model)
    report = Report(library="adapters", compat=compat)
    base_dtype = _base_dtype(model)
    grouped: list[nn.Module] = []
    for name, module in model.named_modules():
        if group(module):
            grouped.append(module)
        family = _family(module)
        if family is None:
            reason = _other_method(module)
        elif not family.concerns(module):
            continue
        elif is_served(module):
            reason = None
            report.already.append(name)
        else:
            reason = family.why_left(module)
            if reason is None:
                module.__class__ = family.accelerated_class(type(module))
                report.replaced.append(name)
        if reason is not None:
            report.left[name] = reason
        if family is None or reason is not None:
            continue
        state = family.describe(module, base_dtype)
        if isinstance(state, str):
            report.waiting[name] = state
        for kind in () if isinstance(state, str) else state:
            report.kinds[kind] = report.kinds.get(kind, 0) + 1
    if compat == "adapters":
        adapters_paper.turn_off(model)
        return report
    try:
        adapters_paper.check_gates(model)
    except ValueError:
        _give_back([*grouped, *(model.get_submodule(name) for name in report.replaced)])
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
            if not is_fast(module):
                raise RuntimeError(
                    f"cannot restore {name!r}: another library has since made it a "
                    f"{type_name(module)}; undo that first"
                )
            (layers if is_served(module) else layers.grouped).append(module)
    return layers


def restore(layers: _Accelerated) -> None:
    """Gives accelerated layers the library's class back; see ``pelt_fast.restore``."""
    adapters_paper.turn_off(layers.model)
    _give_back([*layers, *layers.grouped])


def _give_back(layers: list[nn.Module]) -> None:
    for module in layers:
        assert isinstance(module, Accelerated)
        forget(module)
        module.__class__ = module.library_class


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
