"""Checkpoints of `adapters` and PEFT as OpenDelta's."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..source import Checkpoint, read
from ..tensors import Array
from .converted import Converted
from .layout import (
    ACTIVATIONS,
    BOTTLENECK,
    DENSE_PARTS,
    FREE,
    NETWORK_PARTS,
    PARALLEL_PLACES,
    PHM_PARTS,
    PLACES,
    activation,
    expect,
    layer_of,
    one,
    setting,
)

_PEFT_LORA = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<part>[AB])\.weight")
_LORA = re.compile(r"(?P<path>.+)\.loras\.(?P<name>[^.]+)\.lora_(?P<part>[AB])")
_ADAPTER = re.compile(r"(?P<path>.+)\.adapters\.(?P<name>[^.]+)\.(?P<part>.+)")
_PREFIX = re.compile(
    r"(?:(?P<path>.+)\.self\.prefix_tuning\.pool|(?:.+\.)?prefix_tuning)\.prefix_tunings\.(?P<name>[^.]+)\.self_prefix\."
    r"(?P<part>.+)"
)
_ACTIVATIONS = {ours: theirs for theirs, ours in ACTIVATIONS.items()} | {
    "silu": "swish",
    "leaky_relu": "leakyrelu",
}

Made = tuple[dict[str, Tensor], dict[str, Any]]


def to_opendelta(
    source: str | os.PathLike[str] | Mapping[str, Array],
    *,
    config: Mapping[str, Any] | None = None,
    others: Mapping[str, Tensor] | None = None,
) -> Converted:
    """A checkpoint of `adapters` or PEFT as one of OpenDelta 0.3.2 that computes the same.

    Args:
        source: a folder of ``save_adapter`` or of PEFT's ``save_pretrained``, its weights, or tensors by name.
        config: the library's JSON object, for a source without one.
        others: what is stored beside, under the names of the model's ``state_dict``, as ``Converted.others``.

    Returns:
        Modules are named by their full paths in its config (``common_structure`` false).

    Raises:
        FileNotFoundError, OSError, TypeError: as ``load_bottleneck_adapters``.
        ValueError: the source cannot be read, is incomplete, or computes something that OpenDelta has no name for
            (gates, DoRA, other places of the layernorm); says what, and what was expected.
    """
    checkpoint = read(source, config)
    found = checkpoint.config
    if not isinstance(found, Mapping):
        raise ValueError(
            f"{checkpoint.origin} has no config beside it; expected the library's as config"
        )
    if "peft_type" in found:
        model_class = ""
        state, made = _from_peft(checkpoint, found)
    else:
        inner = found.get("config")
        if not isinstance(inner, Mapping):
            raise ValueError(
                f"{checkpoint.origin}: its config is neither PEFT's, with a peft_type, nor that of `adapters`, with an "
                "object as config"
            )
        model_class = str(found.get("model_class", ""))
        state, made = _from_adapters(checkpoint, inner)
    others = {} if others is None else dict(others)
    taken = [key for key in others if key in state]
    if taken:
        raise ValueError(f"others holds {taken[0]}, which a delta has; expected other names")
    return Converted(
        "opendelta",
        {**others, **state},
        {
            "backbone_checkpoint_name": "",
            "backbone_class": model_class,
            "common_structure": False,
            "exclude_modules": None,
            "opendelta_version": "0.3.0",
            "unfrozen_modules": ["deltas", *others],
            **made,
        },
    )


def _refuse(checkpoint: Checkpoint, config: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises where a field that is there differs."""
    for name, value in expected.items():
        found = config.get(name, value)
        if found != value and not (not found and not value):
            raise ValueError(
                f"{checkpoint.origin}: its config's {name} is {found!r}; expected {value!r}, OpenDelta has nothing else"
            )


# ---- PEFT ----


def _from_peft(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Made:
    kind = config["peft_type"]
    if kind == "PROMPT_TUNING":
        _refuse(checkpoint, config, {"num_transformer_submodules": 1})
        prompt = (
            expect(checkpoint, "prompt_embeddings", (None, None))
            if (set(checkpoint.values) == {"prompt_embeddings"})
            else _unknown(checkpoint)
        )
        return {"soft_prompt_layer.soft_embeds": prompt}, {
            "delta_type": "soft_prompt",
            "soft_token_num": prompt.shape[0],
            "init_range": 0.5,
            "token_init": False,
            "modified_modules": ["root"],
        }
    if kind != "LORA":
        raise ValueError(
            f"{checkpoint.origin}: its peft_type is {kind!r}; expected 'LORA' or 'PROMPT_TUNING'"
        )
    _refuse(
        checkpoint,
        config,
        {
            "bias": "none",
            "lora_bias": False,
            "use_dora": False,
            "fan_in_fan_out": False,
            **dict.fromkeys(
                ("rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication")
            ),
        },
    )
    modules: dict[str, dict[str, str]] = {}
    for key in checkpoint.values:
        match = _PEFT_LORA.fullmatch(key) or _unknown(checkpoint, key)
        checkpoint.claim(modules.setdefault(match["path"], {}), match["part"], key)
    return _lora(
        checkpoint,
        modules,
        setting(checkpoint, config, "r", int),
        setting(checkpoint, config, "lora_alpha", (int, float)),
        setting(checkpoint, config, "lora_dropout", (int, float)),
        rslora=config.get("use_rslora") is True,
    )


def _unknown(checkpoint: Checkpoint, key: str = "") -> Any:
    seen = key or ", ".join(list(checkpoint.values)[:3])
    raise ValueError(f"{checkpoint.origin} holds {seen}; expected the keys of its method alone")


def _lora(
    checkpoint: Checkpoint,
    modules: dict[str, dict[str, str]],
    rank: int,
    alpha: float,
    dropout: float,
    *,
    rslora: bool = False,
) -> Made:
    state = {}
    if not modules:
        _unknown(checkpoint)
    for path, keys in modules.items():
        missing = [part for part in "AB" if part not in keys]
        if missing:
            raise ValueError(
                f"{checkpoint.origin}: LoRA at {path!r} has no {missing[0]}; expected A and B"
            )
        state[f"{path}.lora.lora_A"] = expect(checkpoint, keys["A"], (rank, None))
        state[f"{path}.lora.lora_B"] = expect(checkpoint, keys["B"], (None, rank))
    return state, {
        "delta_type": "lora",
        "lora_r": rank,
        "lora_alpha": alpha * math.sqrt(rank) if rslora else alpha,  # OpenDelta divides by r
        "lora_dropout": dropout,
        "modified_modules": list(modules),
    }


# ---- adapters ----


def _from_adapters(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Made:
    architecture = config.get("architecture")
    if architecture == "lora":
        return _lora_of(checkpoint, config)
    if architecture == "prefix_tuning":
        return _prefix(checkpoint, config)
    if architecture is None:
        return _bottleneck(checkpoint, config)
    raise ValueError(
        f"{checkpoint.origin}: its config's architecture is {architecture!r}; expected 'lora', 'prefix_tuning' or that "
        "of a bottleneck"
    )


def _named(checkpoint: Checkpoint, pattern: re.Pattern[str]) -> dict[str, dict[str, str]]:
    """Keys by part, by path; of one adapter."""
    modules: dict[str, dict[str, str]] = {}
    names = set()
    for key in checkpoint.values:
        match = pattern.fullmatch(key) or _unknown(checkpoint, key)
        names.add(match["name"])
        checkpoint.claim(modules.setdefault(match["path"] or "", {}), match["part"], key)
    if not modules:
        _unknown(checkpoint)
    one(checkpoint, "the adapter's name", names)
    return modules


def _lora_of(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Made:
    _refuse(
        checkpoint,
        config,
        {
            "composition_mode": "add",
            **dict.fromkeys(("use_gating", "use_dora"), False),
            **dict.fromkeys(("vera_b", "vera_d")),
        },
    )
    return _lora(
        checkpoint,
        _named(checkpoint, _LORA),
        setting(checkpoint, config, "r", int),
        setting(checkpoint, config, "alpha", (int, float)),
        setting(checkpoint, config, "dropout", (int, float)),
    )


def _bottleneck(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Made:
    phm = config.get("phm_layer") is True
    wanted = {k: v for k, v in BOTTLENECK.items() if k not in FREE}
    _refuse(checkpoint, config, {**wanted, **({"shared_phm_rule": False} if phm else {})})
    parallel = config.get("is_parallel") is True
    if phm and parallel:
        raise ValueError(f"{checkpoint.origin} is a parallel Compacter; expected one in sequence")
    theirs = {v: k for k, v in (PHM_PARTS if phm else DENSE_PARTS).items()}
    places = {v: k for k, v in (PARALLEL_PLACES if parallel else PLACES).items()}
    n = setting(checkpoint, config, "phm_dim", int) if phm else 0
    rank = setting(checkpoint, config, "phm_rank", int) if phm else 0
    kind = "parallel_adapter" if parallel else ("compactor" if phm else "adapter")
    if n == 1 and rank == 1:
        kind = "low_rank_adapter"
    state, used, widths = {}, [], set()
    for path, keys in _named(checkpoint, _ADAPTER).items():
        stem, index, place = layer_of(checkpoint, path)
        if place not in places:
            raise ValueError(
                f"{checkpoint.origin}: an adapter at {path!r}; expected {' or '.join(places)} of a layer"
            )
        if set(keys) != set(theirs):
            raise ValueError(
                f"{checkpoint.origin}: the adapter at {path!r} has {', '.join(sorted(keys))}; expected "
                f"{', '.join(sorted(theirs))}"
            )
        widths.add(_width(checkpoint, keys, phm, n, rank))
        used.append(f"{stem}{index}.{places[place]}")
        for part, key in keys.items():
            t = checkpoint.tensor(key)
            if kind == "low_rank_adapter":
                if part.endswith("phm_rule"):
                    if t.item() != 1.0:
                        raise ValueError(
                            f"{checkpoint.origin}: {key} is {t.item()}; expected 1, the rule of a low-rank adapter"
                        )
                    continue
                t = t[0] if part.endswith(("W_left", "W_right")) else t
            state[f"{used[-1]}.{kind}.{theirs[part]}"] = t
    width, hidden = one(checkpoint, "the size (bottleneck, hidden)", widths)
    fields: dict[str, Any] = {"bottleneck_dim": width}
    if kind == "parallel_adapter":
        # it reads the first module of a pair and adds to the second
        fields["scaled"] = None
        used = [p for path in used for p in (path, path.replace("intermediate.", "output."))]
    if phm:
        if hidden % width:
            raise ValueError(
                f"{checkpoint.origin}: bottleneck {width} of {hidden}; expected a divisor, OpenDelta has factors alone"
            )
        fields = {"reduction_factor": hidden // width}
    if kind == "compactor":
        fields |= {"hypercomplex_division": n, "phm_rank": rank, "shared_phm_rule": False}
    if kind == "low_rank_adapter":
        fields |= {"low_rank_rank": 1, "low_rank_w_init": "glorot-uniform"}
    return state, {
        "delta_type": "compacter" if kind == "compactor" else kind,
        "non_linearity": activation(checkpoint, config, _ACTIVATIONS),
        "modified_modules": used,
        **fields,
    }


def _width(
    checkpoint: Checkpoint, keys: dict[str, str], phm: bool, n: int, rank: int
) -> tuple[int, int]:
    """Bottleneck and hidden size, with every shape checked."""
    if not phm:
        width, hidden = expect(checkpoint, keys["adapter_down.0.weight"], (None, None)).shape
        expect(checkpoint, keys["adapter_down.0.bias"], (width,))
        expect(checkpoint, keys["adapter_up.weight"], (hidden, width))
        expect(checkpoint, keys["adapter_up.bias"], (hidden,))
        return width, hidden
    hidden = n * expect(checkpoint, keys["adapter_down.0.W_left"], (n, None, rank)).shape[1]
    width = n * expect(checkpoint, keys["adapter_down.0.W_right"], (n, rank, None)).shape[2]
    expect(checkpoint, keys["adapter_up.W_left"], (n, width // n, rank))
    expect(checkpoint, keys["adapter_up.W_right"], (n, rank, hidden // n))
    for side, size in (("adapter_down.0", width), ("adapter_up", hidden)):
        expect(checkpoint, keys[f"{side}.phm_rule"], (n, n, n))
        expect(checkpoint, keys[f"{side}.b"], (size,))
    return width, hidden


def _prefix(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Made:
    _refuse(checkpoint, config, {"non_linearity": "tanh", "use_gating": False, "dropout": 0.0})
    modules = _named(checkpoint, _PREFIX)
    found = {path: keys for path, keys in modules.items() if path}
    layers: dict[int, str] = {}
    for path, keys in found.items():
        stem, index, place = layer_of(checkpoint, path)
        if place != "attention":
            raise ValueError(
                f"{checkpoint.origin}: a prefix at {path!r}; expected a layer's attention"
            )
        layers[index] = f"{stem}{index}.attention"
        for part, key in keys.items():  # every layer stores the whole of it again
            other = next(iter(found.values())).get(part)
            if other is None or not torch.equal(checkpoint.tensor(key), checkpoint.tensor(other)):
                raise ValueError(
                    f"{checkpoint.origin}: {key} differs from another layer's copy; expected one prefix"
                )
    if not layers or sorted(layers) != list(range(len(layers))):
        raise ValueError(
            f"{checkpoint.origin}: prefixes of layers {sorted(layers)}; expected those of all layers from 0 on"
        )
    keys = next(iter(found.values()))
    length = setting(checkpoint, config, "prefix_length", int)
    common = {
        "delta_type": "prefix",
        "prefix_token_num": length,
        "modified_modules": [layers[i] for i in sorted(layers)],
    }
    if set(keys) == set(NETWORK_PARTS):
        hidden = expect(checkpoint, keys["wte.weight"], (length, None)).shape[1]
        mid = expect(checkpoint, keys["control_trans.0.weight"], (None, hidden)).shape[0]
        expect(checkpoint, keys["control_trans.0.bias"], (mid,))
        expect(checkpoint, keys["control_trans.2.weight"], (2 * len(layers) * hidden, mid))
        expect(checkpoint, keys["control_trans.2.bias"], (2 * len(layers) * hidden,))
        state = {
            f"{layers[0]}.reparams.{part}": checkpoint.tensor(keys[part]) for part in NETWORK_PARTS
        }
        return state, {**common, "reparameterize": True, "embed_dim": hidden, "mid_dim": mid}
    if set(keys) != {"control_trans"}:
        _unknown(checkpoint, ", ".join(sorted(keys)))
    vector = expect(checkpoint, keys["control_trans"], (None,))
    if length < 1 or vector.numel() % (length * 2 * len(layers)):
        raise ValueError(
            f"{checkpoint.origin}: {keys['control_trans']} has {vector.numel()} elements; expected a multiple of "
            f"{length} tokens of {len(layers)} layers' keys and values"
        )
    parts = vector.reshape(length, 2 * len(layers), -1).unbind(1)
    state = {}
    for i in range(len(layers)):
        state[f"{layers[i]}.prefix.past_key"] = parts[2 * i].contiguous()
        state[f"{layers[i]}.prefix.past_value"] = parts[2 * i + 1].contiguous()
    return state, {**common, "reparameterize": False}
