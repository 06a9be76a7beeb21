"""Which modules of a model a pool serves, and why the others cannot be."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .config import matches
from .layer import ServedLinear

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Targets:
    """Served layers by name; the other modules' types; what PEFT's "all-linear" means in this model."""

    layers: Mapping[str, ServedLinear]
    others: Mapping[str, str]
    all_linear: frozenset[str]


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is exactly transformers' Conv1D, a linear whose weight is (in, out)."""
    utils = sys.modules.get("transformers.pytorch_utils")  # there is none before it is imported
    return utils is not None and type(module) is utils.Conv1D


def find(model: nn.Module, target_modules: str | Collection[str]) -> dict[str, nn.Module]:
    """The modules that are to be served, by name.

    Raises:
        TypeError: ``model`` or ``target_modules`` is of a wrong type.
        ValueError: a name is nobody's, or a module that is meant cannot be served.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    if isinstance(target_modules, str):
        wanted: str | frozenset[str] = target_modules
    else:
        try:
            wanted = frozenset(target_modules)
        except TypeError:
            wanted = frozenset((None,))  # type: ignore[arg-type]
        if not wanted or not all(isinstance(name, str) for name in wanted):
            raise TypeError(f"target_modules is {target_modules!r}; expected names of modules")
    every = all_linear(model) if wanted == "all-linear" else None
    found: dict[str, nn.Module] = {}
    first: dict[nn.Module, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name in every if every is not None else name and matches(wanted, name):
            if module in first:
                raise ValueError(f"{first[module]} and {name} are the same module; expected two")
            found[name] = module
            first[module] = name
    idle = [] if isinstance(wanted, str) else sorted(wanted - _used(wanted, found))
    if idle or not found:
        raise ValueError(f"target_modules names {idle or wanted}, which the model does not have")
    for name, module in found.items():
        obstacle = _obstacle(module) or _parent_obstacle(model.get_submodule(_parent(name)))
        if obstacle is not None:
            raise ValueError(f"{name} cannot be served: {obstacle}")
    return found


def all_linear(model: nn.Module) -> frozenset[str]:
    """Names of all linear modules but the one that makes the logits."""
    get_head = getattr(model, "get_output_embeddings", None)
    try:
        head = get_head() if callable(get_head) else None
    except NotImplementedError:
        head = None
    return frozenset(
        name
        for name, module in model.named_modules()
        if name and module is not head and (isinstance(module, nn.Linear) or is_conv1d(module))
    )


def others(model: nn.Module, served: Collection[str]) -> dict[str, str]:
    """Types of the modules that are not served, by name."""
    return {
        name: type(module).__name__
        for name, module in model.named_modules(remove_duplicate=False)
        if name and name not in served
    }


def swap(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Puts modules where the names say."""
    for name, module in modules.items():
        setattr(model.get_submodule(_parent(name)), name.rpartition(".")[2], module)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _used(wanted: Collection[str], names: Collection[str]) -> set[str]:
    return {entry for name in names for entry in wanted if matches((entry,), name)}


def _obstacle(module: nn.Module) -> str | None:
    kind: Any = type(module)
    if kind is ServedLinear:
        return "another pool serves it already"
    if kind is not nn.Linear and not is_conv1d(module):
        return f"it is a {kind.__module__}.{kind.__name__}; expected a torch.nn.Linear or Conv1D"
    if "forward" in module.__dict__ or any(getattr(module, hooks) for hooks in _HOOKS):
        return "it has hooks, or another forward"
    weight = module.weight
    if not isinstance(weight, nn.Parameter) or type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}; expected a plain parameter"
    if weight.dtype not in _DTYPES:
        return f"its weight has dtype {weight.dtype}"
    if weight.is_meta:
        return "its weight is on the device meta"
    return "it has no features" if 0 in weight.shape else None


def _parent_obstacle(parent: nn.Module) -> str | None:
    if isinstance(parent, (nn.TransformerEncoderLayer, nn.MultiheadAttention)):
        return f"a {type(parent).__name__} reads its weight, and does not call it"
    return None
