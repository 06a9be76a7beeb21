"""OpenDelta 0.3.2: ``save_finetuned`` writes ``config.json`` and ``pytorch_model.bin``, the trained part of a model.

    {path}.adapter.modulelist.{down_proj,up_proj}.{weight,bias}             y = o + U act(D o), o the output of {path}
    {path}.parallel_adapter.modulelist.{down_proj,up_proj}.{weight,bias}    y = o + U act(D x), x the input of {path}
    {path}.low_rank_adapter.{down,up}_sampler.{W_left,W_right,b}            as the first, with Dᵀ = W_left · W_right

The factor ``scaled`` of parallel adapters never reaches the layer there: it is 1. W_left (in, rank) is multiplied with
W_right (rank, out) element by element there, which is their matrix product for rank 1 and fails for other ranks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from ..nn import BottleneckAdapter
from .build import build
from .source import Checkpoint

_KEY = re.compile(
    r"(?:(?P<path>.*)\.)?"
    r"(?:(?P<kind>adapter|parallel_adapter)\.modulelist\.(?P<proj>down|up)_proj\.(?P<part>weight|bias)"
    r"|low_rank_adapter\.(?P<sampler>down|up)_sampler\.(?P<factor>W_left|W_right|b))"
)
_DELTAS = re.compile(r"(?:.*\.)?(?:adapter|parallel_adapter|low_rank_adapter)\..*")
_LINEAR = {"down": "adapter_down.0", "up": "adapter_up"}
_ACTIVATIONS = {"gelu_orig": "gelu"}  # what transformers calls otherwise
_DEFAULT = "gelu_new"


def holds_adapters(checkpoint: Checkpoint) -> bool:
    """Whether keys are OpenDelta's."""
    return any(_KEY.fullmatch(key) for key in checkpoint.tensors)


def adapters(checkpoint: Checkpoint, name: str | None) -> dict[str, BottleneckAdapter]:
    """As ``load_bottleneck_adapters``."""
    found: dict[tuple[str, bool], dict[str, Tensor]] = {}
    for key, tensor in checkpoint.tensors.items():
        match = _KEY.fullmatch(key)
        if match:
            place = match["path"] or "", match["kind"] == "parallel_adapter"
            state = found.setdefault(place, {})
            state[_name_of(match)] = tensor
    config = checkpoint.config if isinstance(checkpoint.config, Mapping) else {}
    activation = str(config.get("non_linearity") or _DEFAULT).lower()
    layers = {}
    for (path, parallel), state in found.items():
        if path in layers:
            raise ValueError(
                f"{checkpoint.origin}: two adapters at {path!r}; expected one, several deltas of one model are not read"
            )
        layers[path] = build(
            checkpoint.origin,
            path,
            _dense(checkpoint.origin, path, state),
            {
                "activation": _ACTIVATIONS.get(activation, activation),
                "is_parallel": parallel,
                "original_ln_after": False,
            },
        )
    return layers


def others(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """What else was left unfrozen, under its own names."""
    return {key: t for key, t in checkpoint.tensors.items() if not _DELTAS.fullmatch(key)}


def _name_of(match: re.Match[str]) -> str:
    if match["kind"]:
        return f"{_LINEAR[match['proj']]}.{match['part']}"
    part = "bias" if match["factor"] == "b" else match["factor"]
    return f"{_LINEAR[match['sampler']]}.{part}"


def _dense(origin: str, path: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state`` with matrices in place of low-rank factors."""
    dense = {key: t for key, t in state.items() if not key.endswith(("W_left", "W_right"))}
    for linear in _LINEAR.values():
        left, right = state.get(f"{linear}.W_left"), state.get(f"{linear}.W_right")
        if left is None or right is None:
            continue
        if left.dim() != 2 or right.dim() != 2 or left.shape[1] != 1 or right.shape[0] != 1:
            raise ValueError(
                f"{origin}: adapter at {path!r}: {linear} has factors of shapes {tuple(left.shape)} and "
                f"{tuple(right.shape)}; expected (in, 1) and (1, out), low-rank adapters of rank 1"
            )
        dense[f"{linear}.weight"] = (left * right).T.contiguous()
    return dense
