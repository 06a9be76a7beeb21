"""`adapters` (AdapterHub): ``save_adapter`` writes ``adapter_config.json`` and ``pytorch_adapter.bin`` or safetensors.

    {path}.adapters.{name}.{key of the Adapter module}

``adapter_config.json`` has the ``BnConfig`` under "config", or a union of configs of which a location (attention,
cross-attention, output) has one. Files without "version" come from before 1.0 and are renamed as the library does it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..nn import BottleneckAdapter
from ..nn.adapter import arguments_of
from .build import build
from .source import Checkpoint

_LEGACY = "attention_text_task_adapters|attention_text_lang_adapters|layer_text_task_adapters|layer_text_lang_adapters"
_PLACE = rf"(?:(?P<path>.*)\.)?(?:adapters|{_LEGACY})\.(?P<name>[^.]+)\."
_KEY = re.compile(
    _PLACE
    + r"(?P<key>(?:adapter_down|adapter_up|gate|non_linearity|adapter_norm_before|adapter_norm_after)\..+|scaling)"
)
_STRAY = re.compile(_PLACE + "(?P<key>.+)")
_PHM = re.compile(r"adapter_(?:down\.\d+|up)\.(?:W|W_left|W_right|b|phm_rule.*)")
_OLD_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}
_T5 = re.compile(r"(?:.*\.)?(?P<stack>encoder|decoder)\.block\.\d+\.layer\.(?P<layer>\d)")


def holds_adapters(checkpoint: Checkpoint) -> bool:
    """Whether keys are the library's."""
    return any(_KEY.fullmatch(key) for key in checkpoint.values)


def adapters(checkpoint: Checkpoint, name: str | None) -> dict[str, BottleneckAdapter]:
    """As ``load_bottleneck_adapters``."""
    found: dict[str, dict[str, dict[str, str]]] = {}  # by name, by path
    others = []
    for key in checkpoint.values:
        match = _KEY.fullmatch(key)
        if match:
            keys = found.setdefault(match["name"], {}).setdefault(match["path"] or "", {})
            checkpoint.claim(keys, match["key"], key)
        elif match := _STRAY.fullmatch(key):
            others.append((key, match))
    for key, match in others:
        if keys := found.get(match["name"], {}).get(match["path"] or "", {}):
            checkpoint.claim(keys, match["key"], key)
    names = ", ".join(map(repr, found))
    if name is None and len(found) > 1:
        raise ValueError(
            f"{checkpoint.origin} holds adapters {names}; expected one of them as name"
        )
    if name is not None and name not in found:
        raise ValueError(
            f"{checkpoint.origin} holds adapters {names}; expected one of them, not {name!r}"
        )
    paths = found[name if name is not None else next(iter(found))]
    configs = _configs(checkpoint)
    layers = {}
    for path, keys in paths.items():
        if any(map(_PHM.fullmatch, keys)):
            raise ValueError(
                f"{checkpoint.origin}: adapter at {path!r} is Compacter's; expected plain linear projections"
            )
        config = _config_at(checkpoint.origin, configs, path)
        try:
            arguments = arguments_of(config)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{checkpoint.origin}: {error}") from error
        state = {part: checkpoint.tensor(key) for part, key in keys.items()}
        layers[path] = build(checkpoint, path, state, arguments)
    return layers


def others(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Nothing: heads are in files of their own, and an adapter's folder has no other parameters to hand out."""
    return {}


def _configs(checkpoint: Checkpoint) -> list[Mapping[str, Any] | str]:
    """The bottleneck configs that a checkpoint's config is made of."""
    config = checkpoint.config
    if config is None:
        raise ValueError(
            f"{checkpoint.origin} has no config beside it; expected the library's config as config"
        )
    if isinstance(config, Mapping) and "config" in config:
        old = "version" not in config
        config = config["config"]
        if old and isinstance(config, Mapping):
            name = config.get("non_linearity")
            if isinstance(name, str) and name in _OLD_ACTIVATIONS:
                config = {**config, "non_linearity": _OLD_ACTIVATIONS[name]}
    union = config.get("configs") if isinstance(config, Mapping) else None
    if union is not None and not isinstance(union, (list, tuple)):
        kind = type(union).__name__
        raise ValueError(f"{checkpoint.origin}: configs is a {kind}; expected a list")
    parts = [config] if union is None else union
    for part in parts:
        if not isinstance(part, (str, Mapping)):
            kind = type(part).__name__
            raise ValueError(
                f"{checkpoint.origin}: its config holds a {kind}; expected configs as objects or names"
            )
    return [part for part in parts if isinstance(part, str) or _architecture(part) is None]


def _architecture(config: Mapping[str, Any]) -> str | None:
    found: str | None = config.get("architecture", getattr(config, "architecture", None))
    return found


def _config_at(
    origin: str, configs: list[Mapping[str, Any] | str], path: str
) -> Mapping[str, Any] | str:
    if len(configs) > 1:
        location = _location(path)
        configs = [c for c in configs if isinstance(c, Mapping) and c.get(location)]
    if len(configs) != 1:
        raise ValueError(
            f"{origin}: {len(configs)} bottleneck configs are for the adapter at {path!r}; expected one"
        )
    return configs[0]


def _location(path: str) -> str:
    """``BnConfig``'s name for a place in a layer, from the library's own names of modules."""
    if match := _T5.fullmatch(path):
        if match["layer"] == "0":
            return "mh_adapter"
        cross = match["stack"] == "decoder" and match["layer"] == "1"
        return "cross_adapter" if cross else "output_adapter"
    place = ".".join(path.split(".")[-2:])
    if "cross" in place:
        return "cross_adapter"
    return "mh_adapter" if "attention" in place else "output_adapter"
