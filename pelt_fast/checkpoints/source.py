"""Files and mappings as tensors by name, and the config beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Array = Tensor | np.ndarray

# (config, weights): the first weights that are there are read
_FOLDERS = (
    ("adapter_config.json", ("adapter.safetensors", "pytorch_adapter.bin")),  # adapters
    ("config.json", ("pytorch_model.bin", "model.safetensors")),  # OpenDelta
)


class Checkpoint(NamedTuple):
    """``origin`` names it in messages."""

    origin: str
    tensors: dict[str, Tensor]
    config: Mapping[str, Any] | str | None


def read(source: Any, config: Mapping[str, Any] | str | None) -> Checkpoint:
    """Reads a folder, a file or a mapping; a ``config`` given here comes before a folder's own."""
    if isinstance(source, Mapping):
        return Checkpoint("the mapping", _tensors("the mapping", source), config)
    if not isinstance(source, (str, os.PathLike)):
        kind = type(source).__name__
        raise TypeError(f"source is a {kind}; expected a path or a mapping of tensors or arrays")
    path = Path(source)
    if path.is_file():
        return Checkpoint(str(path), _tensors(str(path), _weights(path)), config)
    if not path.is_dir():
        raise FileNotFoundError(f"source is {str(path)!r}; expected a folder or a file that exists")
    for config_name, weights in _FOLDERS:
        found = [path / name for name in weights if (path / name).is_file()]
        if found and (path / config_name).is_file():
            own = _json(path / config_name) if config is None else config
            return Checkpoint(str(path), _tensors(str(found[0]), _weights(found[0])), own)
    expected = ", or ".join(f"{name} with {' or '.join(files)}" for name, files in _FOLDERS)
    raise FileNotFoundError(f"source is the folder {str(path)!r}; expected {expected} in it")


def _weights(path: Path) -> Mapping[str, Any]:
    """What a file holds by name; nothing in it is run."""
    load = {".npz": _load_arrays, ".safetensors": _load_safetensors}.get(path.suffix, _load_pickle)
    try:
        found = load(path)
    except Exception as error:  # whatever a reader makes of bytes that it does not expect
        raise ValueError(f"{path} is no file of tensors that can be read: {error}") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} holds a {type(found).__name__}; expected tensors by name")
    return found


def _load_arrays(path: Path) -> Any:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def _load_safetensors(path: Path) -> Any:
    from safetensors.torch import load_file

    return load_file(path)


def _load_pickle(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _json(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no JSON file that can be read: {error}") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} holds a {type(found).__name__}; expected an object")
    return found


def _tensors(origin: str, values: Mapping[Any, Any]) -> dict[str, Tensor]:
    tensors = {}
    for key, value in values.items():
        if not isinstance(key, str):
            raise TypeError(f"{origin} has the key {key!r}; expected names")
        tensor = value if isinstance(value, Tensor) else _from_array(value)
        if tensor is not None:
            tensors[key] = tensor
        elif not isinstance(value, (bytes, str)):
            kind = type(value).__name__
            raise TypeError(f"{origin}: {key} is a {kind}; expected a tensor or an array")
    return tensors


def _from_array(value: Any) -> Tensor | None:
    """None for what is no array of numbers."""
    if not isinstance(value, (np.ndarray, np.generic)) or value.dtype.kind not in "fiub":
        return None
    return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("=")))
