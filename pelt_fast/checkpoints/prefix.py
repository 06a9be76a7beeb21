"""Prefixes of `adapters` and PEFT, in one form: (P, layers · 2 · H · D), as PEFT keeps them.

    adapters   {path}.prefix_tunings.{name}.{location}.control_trans                      flat, one dimension
               {path}.prefix_tunings.{name}.{location}.{wte.weight, control_trans.{0,2}.{weight,bias}}
    PEFT       prompt_embeddings

`adapters` repeats the keys of its one pool under every layer that has a prefix (``….prefix_tuning.pool.…``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import activate, activation_name
from .source import Checkpoint, read
from .tensors import Array

_KEY = re.compile(
    r"(?:.*\.)?prefix_tunings\.(?P<name>[^.]+)\.(?P<location>[^.]+)\."
    r"(?P<key>wte\.weight|control_trans(?:\.[02]\.(?:weight|bias))?)"
)
_PEFT = "prompt_embeddings"
_MLP = ("wte.weight", *(f"control_trans.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")))


def load_prefixes(
    source: str | os.PathLike[str] | Mapping[str, Array],
    *,
    config: Mapping[str, Any] | str | None = None,
    name: str | None = None,
) -> dict[str, Tensor]:
    """The prefixes of a checkpoint of `adapters` or PEFT; one that an MLP makes is computed, as ``eject`` does.

    Args:
        source: a folder of ``save_adapter``; a file (``.bin``, ``.safetensors``); or tensors by name.
        config: the library's config, for a source without one. Read in it: ``prefix_length`` of a flat prefix,
            ``non_linearity`` of an MLP's.
        name: the adapter's name, where weights of the library hold several.

    Returns:
        location to prefix (P, layers · 2 · H · D), on the CPU, in the checkpoint's dtype. Locations are the library's
        ("self_prefix", "encoder_prefix", "cross_prefix"); PEFT's one prefix is "self_prefix". ``prefix.reshape(-1)`` is
        the library's flat ``control_trans``, ``prefix`` itself PEFT's ``prompt_embeddings``.

    Raises:
        FileNotFoundError: there is no such file or folder, or a folder lacks its weights.
        TypeError: an argument or one of source's values has a wrong type.
        ValueError: it cannot be read, or holds no prefixes, or one that is incomplete or does not fit its config.
    """
    if name is not None and not isinstance(name, str):
        raise TypeError(f"name is a {type(name).__name__}; expected a str or None")
    checkpoint = read(source, config)
    if _PEFT in checkpoint.values:
        return {"self_prefix": _matrix(checkpoint, _PEFT)}
    found = _prefixes(checkpoint)
    if not found:
        raise ValueError(
            f"{checkpoint.origin} holds no prefixes; expected keys of prefix_tunings or {_PEFT!r}"
        )
    if name is None and len(found) == 1:
        name = next(iter(found))
    if name not in found:
        names = ", ".join(map(repr, found))
        raise ValueError(
            f"{checkpoint.origin} holds prefixes {names}; expected one of them as name"
        )
    settings = _settings(checkpoint)
    return {
        location: _prefix(checkpoint, location, keys, settings)
        for location, keys in found[name].items()
    }


def _prefixes(checkpoint: Checkpoint) -> dict[str, dict[str, dict[str, str]]]:
    """Keys by name, location and parameter; of those that are repeated the first."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for key in checkpoint.values:
        match = _KEY.fullmatch(key)
        if match:
            keys = found.setdefault(match["name"], {}).setdefault(match["location"], {})
            keys.setdefault(match["key"], key)
    return found


def _settings(checkpoint: Checkpoint) -> Mapping[str, Any]:
    config = checkpoint.config
    if isinstance(config, Mapping) and isinstance(config.get("config"), Mapping):
        config = config["config"]
    if not isinstance(config, Mapping):
        return {}
    parts = config.get("configs")
    for part in parts if isinstance(parts, (list, tuple)) else [config]:
        if isinstance(part, Mapping) and part.get("architecture") == "prefix_tuning":
            return part
    return config


def _prefix(
    checkpoint: Checkpoint, location: str, keys: Mapping[str, str], settings: Mapping[str, Any]
) -> Tensor:
    if list(keys) == ["control_trans"]:
        flat = checkpoint.tensor(keys["control_trans"])
        length = settings.get("prefix_length")
        if not isinstance(length, int) or length < 1 or flat.dim() != 1 or len(flat) % length:
            raise ValueError(
                f"{checkpoint.origin}: {location} is flat, of shape {tuple(flat.shape)}, and prefix_length is "
                f"{length!r}; expected one dimension and a config with a length that divides it"
            )
        return flat.view(length, -1)
    missing = [key for key in _MLP if key not in keys]
    if missing:
        raise ValueError(f"{checkpoint.origin}: {location} lacks {', '.join(missing)}")
    tokens, first, first_bias, last, last_bias = (checkpoint.tensor(keys[key]) for key in _MLP)
    activation = settings.get("non_linearity", "tanh")
    if not isinstance(activation, str):
        raise ValueError(
            f"{checkpoint.origin}: non_linearity is {activation!r}; expected the name of an activation"
        )
    fits = (
        all(t.dim() == 2 for t in (tokens, first, last))
        and first.shape[1] == tokens.shape[1]
        and last.shape[1] == first.shape[0]
        and first_bias.shape == first.shape[:1]
        and last_bias.shape == last.shape[:1]
        and len({t.dtype for t in (tokens, first, first_bias, last, last_bias)}) == 1
    )
    if not fits:
        shapes = ", ".join(f"{key} {tuple(checkpoint.values[keys[key]].shape)}" for key in _MLP)
        raise ValueError(f"{checkpoint.origin}: {location} does not go together: {shapes}")
    with torch.no_grad():
        hidden = activate(F.linear(tokens, first, first_bias), activation_name(activation))
        checkpoint.reserve(location, len(tokens) * len(last) * last.itemsize)
        return F.linear(hidden, last, last_bias)


def _matrix(checkpoint: Checkpoint, key: str) -> Tensor:
    found = checkpoint.tensor(key)
    if found.dim() != 2:
        raise ValueError(
            f"{checkpoint.origin}: {key} has shape {tuple(found.shape)}; expected two dimensions"
        )
    return found
