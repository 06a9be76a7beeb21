"""A checkpoint, out of a folder, a file or a mapping: its tensors by name, and the config beside them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .files import read_config, read_weights
from .tensors import Array, dense, held_bytes

# (config, weights): the first weights that are there are read
_FOLDERS = (
    ("adapter_config.json", ("adapter.safetensors", "pytorch_adapter.bin")),  # adapters
    ("adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")),  # PEFT
    ("config.json", ("pytorch_model.bin", "model.safetensors")),  # OpenDelta
    ("adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")),  # PEFT
)
# Copies may take so many bytes and so many times what the checkpoint itself takes: names may share a tensor, low-rank
# adapters are made dense.
SPARE = 2**30
_COPIES = 4


@dataclass
class Checkpoint:
    """``origin`` names it in messages; ``values`` are looked at when they are needed, as ``tensor(key)``."""

    origin: str
    values: dict[str, Array]
    config: Mapping[str, Any] | str | None
    held: int = field(init=False)
    room: int = field(init=False)

    def __post_init__(self) -> None:
        self.held = held_bytes(self.values.values())
        self.room = SPARE + _COPIES * self.held

    def tensor(self, key: str) -> Tensor:
        """The value of ``key`` as a dense tensor."""
        value = self.values[key]
        found = dense(f"{self.origin}: {key}", value)
        if not isinstance(value, Tensor):
            self.reserve(key, found.nbytes)
        return found

    def claim(self, keys: dict[str, str], name: str, key: str) -> None:
        """Notes in ``keys`` that ``key`` holds what is called ``name``."""
        if name in keys:
            raise ValueError(f"{self.origin}: {keys[name]} and {key} are both there; expected one")
        keys[name] = key

    def reserve(self, what: str, size: int) -> None:
        """Raises if copies come to far more than what the checkpoint holds."""
        if size > self.room:
            raise ValueError(
                f"{self.origin}: {what} takes {size} bytes; expected {self.room} at most for what is still to be "
                f"copied out of the {self.held} bytes that it holds"
            )
        self.room -= size


def read(source: Any, config: Mapping[str, Any] | str | None) -> Checkpoint:
    """Reads a folder, a file or a mapping; a ``config`` given here comes before a folder's own."""
    if config is not None and not isinstance(config, (Mapping, str)):
        raise TypeError(f"config is a {type(config).__name__}; expected a mapping or a name")
    if isinstance(source, Mapping):
        return Checkpoint("the mapping", _values("the mapping", source), config)
    if not isinstance(source, (str, os.PathLike)):
        kind = type(source).__name__
        raise TypeError(f"source is a {kind}; expected a path or a mapping of tensors or arrays")
    path = Path(source)
    try:
        weights, config_path = _files(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise OSError(
            f"source is {str(path)[:200]!r}, which cannot be read: {error.strerror}"
        ) from error
    values = _values(str(path), read_weights(weights))
    if config is None and config_path is not None:
        config = read_config(config_path)
    return Checkpoint(str(path), values, config)


def _files(path: Path) -> tuple[Path, Path | None]:
    """Weights and config."""
    if path.is_file():
        return path, None
    if not path.is_dir():
        raise FileNotFoundError(f"source is {str(path)!r}; expected a folder or a file that exists")
    for config, weights in _FOLDERS:
        found = [path / name for name in weights if (path / name).is_file()]
        if found and (path / config).is_file():
            return found[0], path / config
    expected = ", or ".join(f"{name} with {' or '.join(files)}" for name, files in _FOLDERS)
    raise FileNotFoundError(f"source is the folder {str(path)!r}; expected {expected} in it")


def _values(origin: str, found: Mapping[Any, Any]) -> dict[str, Array]:
    values = {}
    for key, value in found.items():
        if not isinstance(key, str):
            raise TypeError(f"{origin} has a key that is a {type(key).__name__}; expected names")
        if isinstance(value, (bytes, str)):
            continue  # TensorFlow's strings
        if not isinstance(value, (Tensor, np.ndarray, np.generic)):
            kind = type(value).__name__
            raise TypeError(f"{origin}: {key} is a {kind}; expected a tensor or an array")
        values[key] = value
    return values
