"""An adapter out of a checkpoint against the modules that a pool serves: it fits them as a whole, or it is refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from . import patterns
from .config import AdapterConfig, parse
from .files import Layout, Stored
from .layer import ServedLinear
from .targets import Targets

_PREFIX = "base_model.model."
_PARTS = {".lora_A.weight": "a", ".lora_B.weight": "b"}
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Piece(NamedTuple):
    """One module's part of an adapter, on its device in its dtype."""

    lora_a: Tensor
    lora_b: Tensor
    scaling: float


def check(stored: Stored, targets: Targets, max_rank: int) -> dict[str, Piece]:
    """By module; those without LoRA in this adapter are left out.

    Raises:
        ValueError: something in the adapter does not fit.
    """
    scalings = {}
    try:
        with patterns.limited():
            config = parse(stored.config)
            keys = _keys(stored.layouts, targets)
            _check_modules(config, keys, targets)
            for module, (a, b) in keys.items():
                layer = targets.layers[module]
                _check_layout(module, layer, stored.layouts[a], stored.layouts[b], config, max_rank)
                scalings[module] = config.scaling_of(module)
    except ValueError as error:
        raise ValueError(f"{stored.origin}: {error}") from None
    values = stored.read()
    with torch.inference_mode(False), torch.no_grad():
        return {
            module: Piece(
                _cast(stored, a, values[a], targets.layers[module].lora_a),
                _cast(stored, b, values[b], targets.layers[module].lora_b),
                scalings[module],
            )
            for module, (a, b) in keys.items()
        }


def _keys(names: Iterable[str], targets: Targets) -> dict[str, tuple[str, str]]:
    """Names of A and B by module."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        module, part = _split(name)
        if module not in targets.layers:
            kind = targets.others.get(module)
            raise ValueError(
                f"{name[:200]} is for a {kind} that the pool does not serve"
                if kind
                else f"{name[:200]} is for no module of this model: was it trained on another one?"
            )
        found.setdefault(module, {})[part] = name
    for parts in found.values():
        if len(parts) < 2:
            there = next(iter(parts.values()))
            raise ValueError(f"{there} is there without its other half")
    if not found:
        raise ValueError("there is no LoRA weight in it")
    return {module: (parts["a"], parts["b"]) for module, parts in found.items()}


def _split(name: str) -> tuple[str, str]:
    if name.startswith(_PREFIX):
        for ending, part in _PARTS.items():
            if name.endswith(ending):
                return name[len(_PREFIX) : -len(ending)], part
    if "lora_magnitude_vector" in name:
        reason = "DoRA's, which the pool does not serve"
    elif "lora_embedding_" in name:
        reason = "an embedding's, and the pool serves linear modules alone"
    elif ".lora_A." in name or ".lora_B." in name:
        reason = f"not called as PEFT saves it, {_PREFIX}<module>.lora_A.weight and .lora_B.weight"
    else:
        reason = (
            "no LoRA weight: a bias, a saved module, or an embedding, which the pool does not serve "
            "(save_pretrained(..., save_embedding_layers=False) leaves the base's embeddings out)"
        )
    raise ValueError(f"{name[:200]} is {reason}")


def _check_modules(config: AdapterConfig, keys: Mapping[str, object], targets: Targets) -> None:
    """What the config adapts is there, and nothing else is."""
    for module in targets.layers:
        wanted = config.is_target(module, targets.all_linear)
        if wanted and module not in keys:
            raise ValueError(f"target_modules names {module}, which has no weights in it")
        if module in keys and not wanted:
            raise ValueError(f"{module} has weights in it, but target_modules does not name it")
    for module, kind in targets.others.items():
        if config.is_target(module, targets.all_linear):
            raise ValueError(f"target_modules names {module}, a {kind} the pool does not serve")


def _check_layout(
    module: str, layer: ServedLinear, a: Layout, b: Layout, config: AdapterConfig, max_rank: int
) -> None:
    for part, layout in (("A", a), ("B", b)):
        if layout.dtype not in _DTYPES:
            raise ValueError(
                f"lora_{part} of {module} has dtype {layout.dtype}; "
                "expected float32, bfloat16, float16 or float64"
            )
        if len(layout.shape) != 2:
            raise ValueError(
                f"lora_{part} of {module} has shape {layout.shape}; expected two dimensions"
            )
    rank = config.rank_of(module)
    expected = (rank, layer.in_features), (layer.out_features, rank)
    if (a.shape, b.shape) != expected:
        raise ValueError(
            f"lora_A and lora_B of {module} have shapes {a.shape} and {b.shape}; expected {expected[0]} and "
            f"{expected[1]}, of rank {rank} by the config, for a module of {layer.in_features} to "
            f"{layer.out_features} features"
        )
    if rank > max_rank:
        raise ValueError(
            f"{module} has rank {rank}; expected at most the pool's max_rank, {max_rank}"
        )


def _cast(stored: Stored, name: str, value: Tensor, like: Tensor) -> Tensor:
    cast = value.to(like.device, like.dtype, copy=True)
    if not cast.isfinite().all():
        raise ValueError(
            f"{stored.origin}: {name} holds NaN or infinity in {like.dtype}; expected finite numbers"
        )
    return cast
