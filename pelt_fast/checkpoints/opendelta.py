"""OpenDelta 0.3.2: ``save_finetuned`` writes ``config.json`` and ``pytorch_model.bin``, the trained part of a model.

    {path}.adapter.modulelist.{down_proj,up_proj}.{weight,bias}             y = o + U act(D o), o the output of {path}
    {path}.parallel_adapter.modulelist.{down_proj,up_proj}.{weight,bias}    y = o + U act(D x), x the input of {path}
    {path}.low_rank_adapter.{down,up}_sampler.{W_left,W_right,b}            as the first, with Dᵀ = W_left · W_right

The factor ``scaled`` of parallel adapters never reaches the layer there: it is 1. W_left (in, rank) is multiplied with
W_right (rank, out) element by element there, which is their matrix product for rank 1 and fails for other ranks.
"""

from __future__ import annotations

import re

from torch import Tensor

from ..nn import BottleneckAdapter
from .build import build
from .source import Checkpoint

_DELTA = re.compile(
    r"(?:(?P<path>.*)\.)?(?P<kind>adapter|parallel_adapter|low_rank_adapter)\.(?P<part>.*)"
)
_LINEAR = {"down": "adapter_down.0", "up": "adapter_up"}
_PARTS = {
    f"modulelist.{ours}_proj.{part}": f"{linear}.{part}"
    for ours, linear in _LINEAR.items()
    for part in ("weight", "bias")
}
_LOW_RANK_PARTS = {
    f"{ours}_sampler.{part}": f"{linear}.{'bias' if part == 'b' else part}"
    for ours, linear in _LINEAR.items()
    for part in ("W_left", "W_right", "b")
}
_ACTIVATIONS = {"gelu_orig": "gelu"}  # what transformers calls otherwise
_DEFAULT = "gelu_new"


def holds_adapters(checkpoint: Checkpoint) -> bool:
    """Whether keys are OpenDelta's."""
    return any(match["part"] in _parts(match["kind"]) for match in _deltas(checkpoint).values())


def adapters(checkpoint: Checkpoint, name: str | None) -> dict[str, BottleneckAdapter]:
    """As ``load_bottleneck_adapters``."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for key, match in _deltas(checkpoint).items():
        keys = found.setdefault((match["path"] or "", match["kind"]), {})
        checkpoint.claim(keys, _parts(match["kind"]).get(match["part"], match["part"]), key)
    activation = _activation(checkpoint)
    layers: dict[str, BottleneckAdapter] = {}
    for (path, kind), keys in found.items():
        if keys.keys().isdisjoint(_parts(kind).values()):
            continue  # a module of the model's own that has such a name
        if path in layers:
            raise ValueError(
                f"{checkpoint.origin}: two adapters at {path!r}; expected one, several deltas of one model are not read"
            )
        layers[path] = build(
            checkpoint,
            path,
            _dense(checkpoint, path, {name: checkpoint.tensor(key) for name, key in keys.items()}),
            {
                "activation": activation,
                "is_parallel": kind == "parallel_adapter",
                "original_ln_after": False,
            },
        )
    return layers


def others(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """What else was left unfrozen, under its own names."""
    deltas = _deltas(checkpoint)
    return {key: checkpoint.tensor(key) for key in checkpoint.values if key not in deltas}


def _deltas(checkpoint: Checkpoint) -> dict[str, re.Match[str]]:
    matches = ((key, _DELTA.fullmatch(key)) for key in checkpoint.values)
    return {key: match for key, match in matches if match}


def _parts(kind: str) -> dict[str, str]:
    return _LOW_RANK_PARTS if kind == "low_rank_adapter" else _PARTS


def _activation(checkpoint: Checkpoint) -> str:
    config = {} if checkpoint.config is None else checkpoint.config
    if isinstance(config, str):
        raise TypeError("config is a str; expected OpenDelta's as a mapping")
    found = config.get("non_linearity")
    if found is None:
        return _DEFAULT
    if not isinstance(found, str):
        kind = type(found).__name__
        raise ValueError(f"{checkpoint.origin}: non_linearity is a {kind}; expected a name")
    return _ACTIVATIONS.get(found.lower(), found.lower())


def _dense(checkpoint: Checkpoint, path: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state`` with matrices in place of low-rank factors."""
    dense = {key: t for key, t in state.items() if not key.endswith(("W_left", "W_right"))}
    for linear in _LINEAR.values():
        left, right = state.get(f"{linear}.W_left"), state.get(f"{linear}.W_right")
        if left is None or right is None:
            continue
        if left.dim() != 2 or right.dim() != 2 or left.shape[1] != 1 or right.shape[0] != 1:
            raise ValueError(
                f"{checkpoint.origin}: adapter at {path!r}: {linear} has factors of shapes {tuple(left.shape)} and "
                f"{tuple(right.shape)}; expected (in, 1) and (1, out), low-rank adapters of rank 1"
            )
        if left.dtype != right.dtype:
            raise ValueError(
                f"{checkpoint.origin}: adapter at {path!r}: {linear} has factors of dtypes {left.dtype} and "
                f"{right.dtype}; expected one"
            )
        checkpoint.reserve(f"adapter at {path!r}", left.nbytes * right.numel())
        dense[f"{linear}.weight"] = (left * right).T
    return dense
