"""OpenDelta's ``save_finetuned`` as a checkpoint of `adapters` or PEFT."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
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
    LINEARS,
    MATRICES,
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

_PARTS: dict[str, tuple[str, ...]] = {
    "lora": ("lora_A", "lora_B"),
    "adapter": tuple(DENSE_PARTS),
    "parallel_adapter": tuple(DENSE_PARTS),
    "low_rank_adapter": tuple(k for k in PHM_PARTS if not k.endswith("phm_rule")),
    "compactor": tuple(PHM_PARTS),
    "prefix": ("past_key", "past_value"),
    "reparams": NETWORK_PARTS,
    "soft_prompt_layer": ("soft_embeds",),
}
_TYPES = {"compactor": "compacter", "reparams": "prefix", "soft_prompt_layer": "soft_prompt"}
_TARGETS = {
    "lora": ("adapters", "peft"),
    "soft_prompt": ("peft",),
    **dict.fromkeys(
        ("adapter", "parallel_adapter", "low_rank_adapter", "compacter", "prefix"), ("adapters",)
    ),
}
_KEY = re.compile(
    rf"(?:(?P<path>.+)\.)?(?P<kind>{'|'.join(_PARTS)})\.(?P<part>"
    + "|".join(sorted({re.escape(part) for parts in _PARTS.values() for part in parts}))
    + ")"
)
_CLASS = re.compile(r"(?P<kind>[A-Z][A-Za-z0-9]*?)(?:LMHead)?(?:Model|For[A-Z]\w*)")

Modules = dict[str, dict[str, str]]  # keys by part, by path
Made = tuple[dict[str, Tensor], dict[str, Any]]


def from_opendelta(
    source: str | os.PathLike[str] | Mapping[str, Array],
    to: str,
    *,
    config: Mapping[str, Any] | None = None,
    name: str = "default",
    hidden_size: int | None = None,
) -> Converted:
    """The checkpoint of an OpenDelta model as one of another library that computes the same.

    Args:
        source: a folder of ``save_finetuned``, its weights, or tensors by name.
        to: "adapters" or "peft".
        config: OpenDelta's, for a source without one.
        name: what the adapter is called in `adapters`; PEFT's files hold no name.
        hidden_size: of the model, for a prefix whose embeddings have another size: then the prefixes that the network
            makes are stored, and not the network.

    Returns:
        Its tensors share memory with the source's where they are tensors already.

    Raises:
        FileNotFoundError, OSError, TypeError: as ``load_bottleneck_adapters``.
        ValueError: the source cannot be read, is not OpenDelta's or incomplete, or computes something that the other
            library has no name for; says what, and what was expected.
    """
    if to not in ("adapters", "peft"):
        raise ValueError(f"to is {to!r}; expected 'adapters' or 'peft'")
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"name is {name!r}; expected a name without dots")
    checkpoint = read(source, config)
    kind, modules, others = _modules(checkpoint)
    found = _config(checkpoint)
    delta_type = _TYPES.get(kind, kind)
    if found.get("delta_type", delta_type) != delta_type:
        raise ValueError(
            f"{checkpoint.origin}: its config's delta_type is {found['delta_type']!r}; expected {delta_type!r}, as its "
            "keys say"
        )
    if to not in _TARGETS[delta_type]:
        raise ValueError(
            f"to is {to!r}; expected {' or '.join(map(repr, _TARGETS[delta_type]))} for OpenDelta's {delta_type}: the "
            "other library computes something else"
        )
    if to == "peft":
        state, made = _PEFT[delta_type](checkpoint, modules, found)
    else:
        if kind in ("prefix", "reparams"):
            state, inner = _prefix(checkpoint, modules, name, kind, hidden_size)
        else:
            state, inner = _ADAPTERS[kind](checkpoint, modules, found, name)
        made = _adapters_config(found, inner, name)
    return Converted(to, state, made, {key: checkpoint.tensor(key) for key in others})


def _modules(checkpoint: Checkpoint) -> tuple[str, Modules, list[str]]:
    """The kind of the deltas, their keys, and the keys of everything else."""
    modules: dict[str, Modules] = {}
    others = []
    for key in checkpoint.values:
        match = _KEY.fullmatch(key)
        if match is None or match["part"] not in _PARTS[match["kind"]]:
            others.append(key)
            continue
        keys = modules.setdefault(match["kind"], {}).setdefault(match["path"] or "", {})
        checkpoint.claim(keys, match["part"], key)
    if len(modules) != 1:
        seen = f"deltas of {' and '.join(modules)}" if modules else "no deltas of OpenDelta"
        raise ValueError(f"{checkpoint.origin} holds {seen}; expected those of one method")
    kind, found = next(iter(modules.items()))
    for path, keys in found.items():
        missing = [part for part in _PARTS[kind] if part not in keys]
        if missing:
            raise ValueError(
                f"{checkpoint.origin}: the {kind} at {path!r} has no {', '.join(missing)}; expected all of "
                f"{', '.join(_PARTS[kind])}"
            )
    return kind, found, others


def _config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    config = checkpoint.config
    if not isinstance(config, Mapping):
        raise ValueError(
            f"{checkpoint.origin} has no config beside it; expected OpenDelta's as config"
        )
    return config


def _adapters_config(found: Mapping[str, Any], inner: dict[str, Any], name: str) -> dict[str, Any]:
    model_class = str(found.get("backbone_class", "BertModel"))
    match = _CLASS.fullmatch(model_class)
    hidden_size = inner.pop("hidden_size")
    return {
        "config": inner,
        "hidden_size": hidden_size,
        "model_class": model_class,
        "model_name": str(found.get("backbone_checkpoint_name", "")),
        "model_type": match["kind"].lower() if match else "bert",
        "name": name,
        "version": "adapters.1.3.0",
    }


# ---- LoRA ----


def _lora_tensors(
    checkpoint: Checkpoint, modules: Modules
) -> tuple[int, dict[str, tuple[Tensor, Tensor]]]:
    found, ranks = {}, set()
    for path, keys in modules.items():
        a = expect(checkpoint, keys["lora_A"], (None, None))
        b = expect(checkpoint, keys["lora_B"], (None, a.shape[0]))
        ranks.add(a.shape[0])
        found[path] = (a, b)
    return one(checkpoint, "the rank", ranks), found


def _lora_to_peft(checkpoint: Checkpoint, modules: Modules, config: Mapping[str, Any]) -> Made:
    rank, tensors = _lora_tensors(checkpoint, modules)
    state = {}
    for path, (a, b) in tensors.items():
        state[f"base_model.model.{path}.lora_A.weight"] = a
        state[f"base_model.model.{path}.lora_B.weight"] = b
    return state, {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": setting(checkpoint, config, "lora_alpha", (int, float)),
        "lora_dropout": setting(checkpoint, config, "lora_dropout", (int, float)),
        "target_modules": sorted(modules),
        "bias": "none",
        "inference_mode": True,
        "base_model_name_or_path": str(config.get("backbone_checkpoint_name", "")),
        "task_type": None,
    }


def _lora_to_adapters(
    checkpoint: Checkpoint, modules: Modules, config: Mapping[str, Any], name: str
) -> Made:
    rank, tensors = _lora_tensors(checkpoint, modules)
    state, widths = {}, set()
    places: dict[int, set[str]] = {}
    for path, (a, b) in tensors.items():
        _, index, place = layer_of(checkpoint, path)
        if place not in MATRICES and place not in LINEARS:
            known = ", ".join((*MATRICES, *LINEARS))
            raise ValueError(
                f"{checkpoint.origin}: LoRA at {path!r}; expected {known}, the modules that `adapters` serves"
            )
        places.setdefault(index, set()).add(place)
        widths.add(b.shape[0] if place == "output.dense" else a.shape[1])
        state[f"{path}.loras.{name}.lora_A"] = a
        state[f"{path}.loras.{name}.lora_B"] = b
    used = one(
        checkpoint, "the set of modules", {tuple(sorted(found)) for found in places.values()}
    )
    return state, {
        "architecture": "lora",
        "alpha": setting(checkpoint, config, "lora_alpha", (int, float)),
        "attn_matrices": [MATRICES[place] for place in MATRICES if place in used],
        "composition_mode": "add",
        "dropout": setting(checkpoint, config, "lora_dropout", (int, float)),
        "dtype": None,
        "init_weights": "lora",
        "init_weights_seed": None,
        "leave_out": [i for i in range(max(places)) if i not in places],
        "r": rank,
        "selfattn_lora": any(place in used for place in MATRICES),
        "use_dora": False,
        "use_gating": False,
        "vera_b": None,
        "vera_d": None,
        "hidden_size": one(checkpoint, "the hidden size", widths),
        **{field: place in used for place, field in LINEARS.items()},
    }


def _soft_prompt_to_peft(
    checkpoint: Checkpoint, modules: Modules, config: Mapping[str, Any]
) -> Made:
    (keys,) = modules.values()
    prompt = expect(checkpoint, keys["soft_embeds"], (None, None))
    return {"prompt_embeddings": prompt}, {
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": prompt.shape[0],
        "token_dim": prompt.shape[1],
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",
        "inference_mode": True,
        "base_model_name_or_path": str(config.get("backbone_checkpoint_name", "")),
        "task_type": "FEATURE_EXTRACTION",
    }


# ---- bottlenecks ----


def _bottleneck(
    checkpoint: Checkpoint,
    modules: Modules,
    config: Mapping[str, Any],
    name: str,
    parts: Mapping[str, str],
    places: Mapping[str, str],
    sizes: Callable[[dict[str, str]], tuple[int, int]],
    **fields: Any,
) -> Made:
    """Renames; ``sizes`` gives hidden size and width of the module with these keys, having checked its tensors."""
    state, shapes = {}, set()
    used: dict[int, set[str]] = {}
    for path, keys in modules.items():
        stem, index, place = layer_of(checkpoint, path)
        if place not in places:
            raise ValueError(
                f"{checkpoint.origin}: an adapter at {path!r}; expected {' or '.join(places)}, where `adapters` "
                "computes the same"
            )
        shapes.add(sizes(keys))
        used.setdefault(index, set()).add(places[place])
        for part, key in keys.items():
            state[f"{stem}{index}.{places[place]}.adapters.{name}.{parts[part]}"] = (
                checkpoint.tensor(key)
            )
    where = one(checkpoint, "the set of places", {tuple(sorted(p)) for p in used.values()})
    hidden, width = one(checkpoint, "the size (hidden, bottleneck)", shapes)
    return state, {
        **BOTTLENECK,
        "leave_out": [i for i in range(max(used)) if i not in used],
        "mh_adapter": "attention.output" in where,
        "output_adapter": "output" in where,
        "non_linearity": activation(checkpoint, config, ACTIVATIONS),
        "reduction_factor": reduction_factor(hidden, width),
        "hidden_size": hidden,
        **fields,
    }


def reduction_factor(hidden: int, width: int) -> float:
    """One that the library makes ``width`` of, by int(hidden // factor)."""
    if hidden % width == 0:
        return hidden // width
    return hidden / (width + 0.5)


def _adapter(
    checkpoint: Checkpoint, modules: Modules, config: Mapping[str, Any], name: str
) -> Made:
    sizes = _dense_sizes(checkpoint)
    return _bottleneck(checkpoint, modules, config, name, DENSE_PARTS, PLACES, sizes)


def _parallel(
    checkpoint: Checkpoint, modules: Modules, config: Mapping[str, Any], name: str
) -> Made:
    sizes = _dense_sizes(checkpoint)
    return _bottleneck(
        *(checkpoint, modules, config, name, DENSE_PARTS, PARALLEL_PLACES, sizes), is_parallel=True
    )


def _dense_sizes(checkpoint: Checkpoint) -> Callable[[dict[str, str]], tuple[int, int]]:
    def sizes(keys: dict[str, str]) -> tuple[int, int]:
        width, hidden = expect(checkpoint, keys["modulelist.down_proj.weight"], (None, None)).shape
        expect(checkpoint, keys["modulelist.down_proj.bias"], (width,))
        expect(checkpoint, keys["modulelist.up_proj.weight"], (hidden, width))
        expect(checkpoint, keys["modulelist.up_proj.bias"], (hidden,))
        return hidden, width

    return sizes


def _compacter(
    checkpoint: Checkpoint, modules: Modules, config: Mapping[str, Any], name: str
) -> Made:
    kinds = set()

    def sizes(keys: dict[str, str]) -> tuple[int, int]:
        features = []
        for side in ("down_sampler", "up_sampler"):
            n, rows, rank = expect(checkpoint, keys[f"{side}.W_left"], (None, None, None)).shape
            columns = expect(checkpoint, keys[f"{side}.W_right"], (n, rank, None)).shape[2]
            expect(checkpoint, keys[f"{side}.phm_rule"], (n, n, n))
            expect(checkpoint, keys[f"{side}.b"], (n * columns,))
            features += [n * rows, n * columns]
            kinds.add((n, rank))
        if features[:2] != features[:1:-1]:
            raise ValueError(
                f"{checkpoint.origin}: {keys['up_sampler.W_left']} and its like make projections of {features}; "
                "expected down and up of one pair of sizes"
            )
        return features[0], features[1]

    state, made = _bottleneck(
        checkpoint, modules, config, name, PHM_PARTS, PLACES, sizes, phm_layer=True
    )
    n, rank = one(checkpoint, "(division, rank)", kinds)
    return state, {**made, "phm_dim": n, "phm_rank": rank}


def _low_rank(
    checkpoint: Checkpoint, modules: Modules, config: Mapping[str, Any], name: str
) -> Made:
    def sizes(keys: dict[str, str]) -> tuple[int, int]:
        hidden = expect(checkpoint, keys["down_sampler.W_left"], (None, 1)).shape[0]
        width = expect(checkpoint, keys["down_sampler.W_right"], (1, None)).shape[1]
        expect(checkpoint, keys["down_sampler.b"], (width,))
        expect(checkpoint, keys["up_sampler.W_left"], (width, 1))
        expect(checkpoint, keys["up_sampler.W_right"], (1, hidden))
        expect(checkpoint, keys["up_sampler.b"], (hidden,))
        return hidden, width

    fields = {"phm_layer": True, "phm_dim": 1, "phm_rank": 1}
    state, made = _bottleneck(checkpoint, modules, config, name, PHM_PARTS, PLACES, sizes, **fields)
    grown = {}
    for key, t in state.items():
        if key.endswith((".W_left", ".W_right")):
            t = t[None]
        if key.endswith(".W_left"):
            grown[key.removesuffix("W_left") + "phm_rule"] = torch.ones((1, 1, 1), dtype=t.dtype)
        grown[key] = t
    return grown, made


# ---- prefixes ----


def _prefix(
    checkpoint: Checkpoint, modules: Modules, name: str, kind: str, hidden_size: int | None
) -> Made:
    if kind == "reparams":
        stem, tensors, layers, hidden = _network(checkpoint, modules, hidden_size)
    else:
        stem, tensors, layers, hidden = _flat(checkpoint, modules)
    state = {}
    root = stem.removesuffix("encoder.layer.")
    pools = [f"{stem}{i}.attention.self.prefix_tuning.pool." for i in range(layers)]
    for place in (*pools, f"{root}prefix_tuning."):
        for part, t in tensors.items():
            state[f"{place}prefix_tunings.{name}.self_prefix.{part}"] = t
    flat = "wte.weight" not in tensors
    length = (
        tensors["control_trans"].numel() // (2 * layers * hidden)
        if flat
        else len(tensors["wte.weight"])
    )
    return state, {
        "architecture": "prefix_tuning",
        "bottleneck_size": 512 if flat else tensors["control_trans.0.weight"].shape[0],
        "cross_prefix": True,
        "dropout": 0.0,
        "encoder_prefix": True,
        "flat": flat,
        "init_weights_seed": None,
        "leave_out": [],
        "non_linearity": "tanh",
        "prefix_length": length,
        "shared_gating": True,
        "use_gating": False,
        "hidden_size": hidden,
    }


def _network(
    checkpoint: Checkpoint, modules: Modules, hidden_size: int | None
) -> tuple[str, dict[str, Tensor], int, int]:
    """All layers' prefixes come out of one network, which is kept where the library's has the same sizes."""
    path, keys = next(iter(modules.items()))
    stem, index, place = layer_of(checkpoint, path)
    if len(modules) != 1 or index != 0 or place != "attention":
        raise ValueError(
            f"{checkpoint.origin}: networks of prefixes at {', '.join(map(repr, modules))}; expected one, at layer 0's "
            "attention"
        )
    wte = expect(checkpoint, keys["wte.weight"], (None, None))
    embed = wte.shape[1]
    first = expect(checkpoint, keys["control_trans.0.weight"], (None, embed))
    mid = first.shape[0]
    expect(checkpoint, keys["control_trans.0.bias"], (mid,))
    last = expect(checkpoint, keys["control_trans.2.weight"], (None, mid))
    expect(checkpoint, keys["control_trans.2.bias"], (last.shape[0],))
    hidden = embed if hidden_size is None else hidden_size
    if isinstance(hidden, bool) or not isinstance(hidden, int) or hidden < 1:
        raise ValueError(f"hidden_size is {hidden!r}; expected the model's")
    if last.shape[0] % (2 * hidden):
        raise ValueError(
            f"{checkpoint.origin}: its network makes {last.shape[0]} numbers for a token, no multiple of "
            f"keys and values of size {hidden}; expected the model's hidden size as hidden_size"
        )
    tensors = {part: checkpoint.tensor(keys[part]) for part in NETWORK_PARTS}
    one(checkpoint, "the dtype", {str(t.dtype) for t in tensors.values()})
    if hidden != embed:
        made_bytes = (mid + last.shape[0]) * wte.shape[0] * wte.element_size()
        checkpoint.reserve("what the network makes", made_bytes)
        inner = torch.tanh(wte @ first.T + tensors["control_trans.0.bias"])
        made = inner @ last.T + tensors["control_trans.2.bias"]
        tensors = {"control_trans": made.reshape(-1)}
    return stem, tensors, last.shape[0] // (2 * hidden), hidden


def _flat(checkpoint: Checkpoint, modules: Modules) -> tuple[str, dict[str, Tensor], int, int]:
    """Keys and values of each layer, as (length, layers · 2, hidden) in one vector."""
    found: dict[int, list[Tensor]] = {}
    stems, shape = set(), None
    for path, keys in modules.items():
        stem, index, place = layer_of(checkpoint, path)
        if place != "attention":
            raise ValueError(
                f"{checkpoint.origin}: a prefix at {path!r}; expected a layer's attention"
            )
        stems.add(stem)
        key = expect(checkpoint, keys["past_key"], shape or (None, None))
        shape = (key.shape[0], key.shape[1])
        found[index] = [key, expect(checkpoint, keys["past_value"], shape)]
    if sorted(found) != list(range(len(found))):
        raise ValueError(
            f"{checkpoint.origin}: prefixes of layers {sorted(found)}; expected those of all layers from 0 on"
        )
    assert shape is not None
    one(checkpoint, "the dtype", {str(t.dtype) for pair in found.values() for t in pair})
    stacked = torch.stack([t for i in sorted(found) for t in found[i]], dim=1)
    stem = one(checkpoint, "the path before the layer", stems)
    return stem, {"control_trans": stacked.reshape(-1)}, len(found), shape[1]


_PEFT = {"lora": _lora_to_peft, "soft_prompt": _soft_prompt_to_peft}
_ADAPTERS = {
    "lora": _lora_to_adapters,
    "adapter": _adapter,
    "parallel_adapter": _parallel,
    "compactor": _compacter,
    "low_rank_adapter": _low_rank,
}
