"""A ``BottleneckAdapter`` out of its tensors, checked."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..functional.checks import DTYPES, HALVES
from ..nn import BottleneckAdapter
from .source import Checkpoint


def build(
    checkpoint: Checkpoint, path: str, state: Mapping[str, Tensor], arguments: Mapping[str, Any]
) -> BottleneckAdapter:
    """The adapter whose ``state_dict`` is ``state``; sizes and biases are its own, ``arguments`` are the rest."""
    where = f"{checkpoint.origin}: adapter at {path!r}"
    down_key = f"adapter_down.{1 if arguments.get('ln_before') is True else 0}."
    down = state.get(f"{down_key}weight")
    if down is None or down.dim() != 2 or 0 in down.shape:
        shape = "missing" if down is None else tuple(down.shape)
        raise ValueError(f"{where}: {down_key}weight is {shape}; expected a matrix")
    try:
        layer = BottleneckAdapter(
            down.shape[1],
            down.shape[0],
            bias=f"{down_key}bias" in state or "adapter_up.bias" in state,
            device="meta",  # no memory is needed there, and nothing is drawn from torch's generator
            **arguments,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    _check_keys_and_shapes(where, state, layer.state_dict())
    _check_dtypes(where, state, f"{down_key}weight")
    checkpoint.reserve(f"adapter at {path!r}", sum(value.nbytes for value in state.values()))
    copies = {
        key: value.clone(memory_format=torch.contiguous_format).resolve_neg()
        for key, value in state.items()
    }
    if layer.adapter_norm_before is not None:
        _check_layernorm(where, copies)
    layer.load_state_dict(copies, assign=True)
    return layer


def _check_keys_and_shapes(
    where: str, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    for key, value in expected.items():
        if key not in state:
            raise ValueError(f"{where}: {key} is missing; present: {', '.join(state)}")
        if state[key].shape != value.shape:
            raise ValueError(
                f"{where}: {key} has shape {tuple(state[key].shape)}; expected {tuple(value.shape)}"
            )
    unexpected = [key for key in state if key not in expected]
    if unexpected:
        raise ValueError(f"{where}: {unexpected[0]} does not belong to its config")


def _check_dtypes(where: str, state: Mapping[str, Tensor], first: str) -> None:
    """Each is one that is computed in, and there are hidden states that they all go with."""
    for key, value in state.items():
        if value.dtype not in DTYPES:
            raise ValueError(
                f"{where}: {key} has dtype {value.dtype}; expected float32, bfloat16, float16 or float64"
            )
    for (one, a), (other, b) in itertools.combinations(state.items(), 2):
        widened = torch.float32 in (a.dtype, b.dtype) and (a.dtype in HALVES or b.dtype in HALVES)
        if a.dtype != b.dtype and not widened:
            raise ValueError(
                f"{where}: {other} has dtype {b.dtype} beside {one}'s {a.dtype}; expected one dtype, or float32 beside "
                "one of half precision"
            )


def _check_layernorm(where: str, state: Mapping[str, Tensor]) -> None:
    """One module of the library's has two names."""
    for part in ("weight", "bias"):
        one, other = f"adapter_norm_before.{part}", f"adapter_down.0.{part}"
        a, b = state[one].double(), state[other].double()
        if not torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True):
            raise ValueError(f"{where}: {one} differs from {other}; expected one layernorm")
