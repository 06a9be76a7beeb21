"""What both directions know: names of modules, parts of a delta, configs of the libraries."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...functional.checks import DTYPES
from ..source import Checkpoint

LAYER = re.compile(r"(?P<stem>(?:.+\.)?encoder\.layer\.)(?P<index>\d+)\.(?P<place>.+)")
"""Encoders that are named as BERT is."""

MATRICES = {"attention.self.query": "q", "attention.self.key": "k", "attention.self.value": "v"}
"""LoRA's ``attn_matrices`` of `adapters`."""
LINEARS = {"intermediate.dense": "intermediate_lora", "output.dense": "output_lora"}

# the module whose output OpenDelta takes, and the module that `adapters` gives the adapter to
PLACES = {"attention.output.dense": "attention.output", "output.dense": "output"}
PARALLEL_PLACES = {"intermediate.dense": "output"}

DENSE_PARTS = {
    f"modulelist.{ours}_proj.{part}": f"{theirs}.{part}"
    for ours, theirs in (("down", "adapter_down.0"), ("up", "adapter_up"))
    for part in ("weight", "bias")
}
PHM_PARTS = {
    f"{ours}_sampler.{part}": f"{theirs}.{part}"
    for ours, theirs in (("down", "adapter_down.0"), ("up", "adapter_up"))
    for part in ("phm_rule", "W_left", "W_right", "b")
}
NETWORK_PARTS = (
    "wte.weight",
    *(f"control_trans.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")),
)

ACTIVATIONS = {
    "relu": "relu",
    "tanh": "tanh",
    "swish": "swish",
    "gelu_new": "gelu_new",
    "gelu_orig": "gelu",
    "leakyrelu": "leakyrelu",
}
"""OpenDelta's names, all that its layers can be made with, and those of `adapters`."""

BOTTLENECK: Mapping[str, Any] = {
    "adapter_residual_before_ln": False,
    "cross_adapter": False,
    "dropout": 0.0,
    "factorized_phm_W": True,
    "factorized_phm_rule": False,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "init_weights": "bert",
    "init_weights_seed": None,
    "inv_adapter": None,
    "inv_adapter_reduction_factor": None,
    "is_parallel": False,
    "learn_phm": True,
    "leave_out": [],
    "ln_after": False,
    "ln_before": False,
    "mh_adapter": True,
    "original_ln_after": True,
    "original_ln_before": False,
    "output_adapter": True,
    "phm_bias": True,
    "phm_c_init": "normal",
    "phm_dim": 4,
    "phm_init_range": 0.0001,
    "phm_layer": False,
    "phm_rank": 1,
    "residual_before_ln": True,
    "scaling": 1.0,
    "shared_W_phm": False,
    "shared_phm_rule": False,
    "stochastic_depth": 0.0,
    "use_gating": False,
}
"""A ``BnConfig`` that computes what OpenDelta computes: o + U act(D o) before the layernorm."""

FREE = {
    *(
        "init_weights",
        "init_weights_seed",
        "hypercomplex_nonlinearity",
        "phm_c_init",
        "cross_adapter",
    ),
    *("phm_init_range", "learn_phm", "leave_out", "mh_adapter", "output_adapter", "is_parallel"),
    *("phm_dim", "phm_rank", "phm_layer", "shared_phm_rule", "inv_adapter_reduction_factor"),
}
"""Fields of it that change nothing in a trained adapter, or are looked at by themselves."""


def layer_of(checkpoint: Checkpoint, path: str) -> tuple[str, int, str]:
    """Stem, index of the layer, and place in it."""
    match = LAYER.fullmatch(path)
    if match is None:
        raise ValueError(
            f"{checkpoint.origin}: module {path!r}; expected one of an encoder's layers, such as "
            "'encoder.layer.0.output.dense'"
        )
    return match["stem"], int(match["index"]), match["place"]


def expect(checkpoint: Checkpoint, key: str, shape: tuple[int | None, ...]) -> Tensor:
    """The tensor of ``key``, which has this shape; None: any size from 1 on."""
    tensor = checkpoint.tensor(key)
    fits = tensor.dim() == len(shape) and all(
        size == wanted or (wanted is None and size > 0)
        for size, wanted in zip(tensor.shape, shape, strict=True)
    )
    if not fits or tensor.dtype not in DTYPES:
        words = str(tuple("any" if size is None else size for size in shape)).replace("'", "")
        raise ValueError(
            f"{checkpoint.origin}: {key} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}; expected "
            f"{words} of float32, bfloat16, float16 or float64"
        )
    return tensor


def one(checkpoint: Checkpoint, what: str, found: set[Any]) -> Any:
    """The only element of ``found``."""
    if len(found) != 1:
        raise ValueError(
            f"{checkpoint.origin}: {what} is {sorted(found)} in different modules; expected one for all"
        )
    return next(iter(found))


def activation(checkpoint: Checkpoint, config: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """What a config's activation is called in the other library."""
    name = setting(checkpoint, config, "non_linearity", str).lower()
    if name not in names:
        raise ValueError(
            f"{checkpoint.origin}: its config's non_linearity is {name!r}; expected one of {', '.join(names)}"
        )
    return names[name]


def setting(checkpoint: Checkpoint, config: Mapping[str, Any], name: str, kind: Any) -> Any:
    """A field of a config, of a type; an integer is at least 1."""
    value = config.get(name)
    fits = (
        isinstance(value, kind) and not isinstance(value, bool) and (kind is not int or value > 0)
    )
    if not fits:
        words = {int: "an integer from 1 on", str: "a name"}.get(kind, "a number")
        raise ValueError(f"{checkpoint.origin}: its config's {name} is {value!r}; expected {words}")
    return value
