"""A ``BottleneckAdapter`` out of its tensors, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..nn import BottleneckAdapter


def build(
    origin: str, path: str, state: Mapping[str, Tensor], arguments: Mapping[str, Any]
) -> BottleneckAdapter:
    """The adapter whose ``state_dict`` is ``state``; sizes and biases are its own, ``arguments`` are the rest."""
    where = f"{origin}: adapter at {path!r}"
    down_key = f"adapter_down.{1 if arguments.get('ln_before') else 0}."
    down = state.get(f"{down_key}weight")
    if down is None or down.dim() != 2 or 0 in down.shape:
        shape = "missing" if down is None else tuple(down.shape)
        raise ValueError(f"{where}: {down_key}weight is {shape}; expected a matrix")
    try:
        layer = BottleneckAdapter(
            down.shape[1],
            down.shape[0],
            bias=f"{down_key}bias" in state or "adapter_up.bias" in state,
            device="meta",  # what is drawn there leaves torch's generator alone
            **arguments,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    expected = layer.state_dict()
    for key, value in expected.items():
        if key not in state:
            raise ValueError(f"{where}: {key} is missing; present: {', '.join(state)}")
        if state[key].shape != value.shape:
            raise ValueError(
                f"{where}: {key} has shape {tuple(state[key].shape)}; expected {tuple(value.shape)}"
            )
        if not state[key].is_floating_point():
            raise ValueError(
                f"{where}: {key} has dtype {state[key].dtype}; expected floating point"
            )
    unexpected = [key for key in state if key not in expected]
    if unexpected:
        raise ValueError(f"{where}: {unexpected[0]} does not belong to its config")
    copies = {key: value.detach().clone() for key, value in state.items()}
    layer.load_state_dict(copies, assign=True)
    return layer
