"""A PEFT adapter as it is stored: the header is read and judged before the weights are.

A file is read, never mapped: one that another process cuts short while it is mapped kills this one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoints.files import read_config
from ..checkpoints.tensors import dense

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HEADER_BYTES = 2**24
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class Layout(NamedTuple):
    """What is known of a tensor before it is read; ``dtype`` as the file calls it if PyTorch's is not served."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str


class Stored(NamedTuple):
    """An adapter that is stored somewhere; ``origin`` names the place in messages."""

    origin: str
    config: Any
    layouts: Mapping[str, Layout]
    read: Callable[[], Mapping[str, Tensor]]


def find(source: Any, config: Any) -> Stored:
    """A folder of PEFT's, its file of weights, or a mapping of tensors, which needs a ``config``.

    Raises:
        TypeError: ``source`` is none of these.
        FileNotFoundError: a file is missing.
        OSError: a file cannot be read.
        ValueError: a file is not what it should be.
    """
    if isinstance(source, Mapping):
        if config is None:
            raise TypeError(
                "config is None; expected the adapter's config with a mapping of tensors"
            )
        return _of_mapping(source, config)
    if not isinstance(source, (str, os.PathLike)):
        kind = type(source).__name__
        raise TypeError(f"source is a {kind}; expected a path or a mapping of tensors")
    path = Path(source)
    try:
        weights = _weights(path)
        beside = weights.with_name(CONFIG)
        if config is None:
            if not beside.is_file():
                raise FileNotFoundError(f"{beside} does not exist; expected the adapter's config")
            config = read_config(beside)
        return _of_file(weights, config)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise OSError(f"{str(path)[:200]!r} cannot be read: {error.strerror}") from error


def _weights(path: Path) -> Path:
    if path.is_dir():
        if (path / WEIGHTS).is_file():
            return path / WEIGHTS
        pickles = sorted(p.name for p in path.glob("adapter_model.*") if p.suffix in _PICKLES)
        if pickles:
            raise _pickle_error(path / pickles[0])
        raise FileNotFoundError(f"{str(path)!r} is a folder without {WEIGHTS}")
    if path.suffix.lower() in _PICKLES:
        raise _pickle_error(path)
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)[:200]!r} is neither a folder nor a file")
    return path


def _pickle_error(path: Path) -> ValueError:
    return ValueError(
        f"{path} is a pickle, which may run code when it is read; save the adapter with "
        "save_pretrained(..., safe_serialization=True)"
    )


def _of_mapping(values: Mapping[Any, Any], config: Any) -> Stored:
    origin = "the mapping"
    layouts: dict[str, Layout] = {}
    held: dict[str, Tensor] = {}
    for key, value in values.items():
        if not isinstance(key, str):
            raise TypeError(f"{origin} has a key that is a {type(key).__name__}; expected names")
        if not isinstance(value, Tensor):
            raise TypeError(f"{origin}: {key} is a {type(value).__name__}; expected a torch.Tensor")
        held[key] = dense(f"{origin}: {key}", value)
        layouts[key] = Layout(tuple(value.shape), value.dtype)
    return Stored(origin, config, layouts, lambda: held)


def _of_file(path: Path, config: Any) -> Stored:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_BYTES):
            raise ValueError(
                f"{path} is no safetensors file: it has {size} bytes, and a header of {length} at most {_HEADER_BYTES}"
            )
        header = _header(path, file.read(length))
    layouts: dict[str, Layout] = {}
    needed = 8 + length
    for name, entry in header.items():
        if name != "__metadata__":
            layouts[name], held = _entry(path, name, entry)
            needed += held
    if needed != size:
        raise ValueError(f"{path} has {size} bytes; its header says {needed}")
    return Stored(str(path), config, layouts, lambda: _read(path, layouts, size))


def _header(path: Path, data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data.decode(), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no safetensors file: its header is {_why(error)}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no safetensors file: its header is no object")
    return found


def _entry(path: Path, name: str, entry: Any) -> tuple[Layout, int]:
    """What the header says of a tensor, and its bytes."""
    try:
        shape, (start, end), dtype = entry["shape"], entry["data_offsets"], entry["dtype"]
        numbers = [*shape, start, end]
        sane = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers)
        if not sane or not isinstance(dtype, str):
            raise TypeError
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"{path}: {name[:200]} has no sane shape, dtype and place") from None
    known = _DTYPES.get(dtype)
    if known is not None and end - start != math.prod(shape) * known.itemsize:
        raise ValueError(f"{path}: {name[:200]} has other bytes than its shape and dtype")
    return Layout(tuple(shape), known or dtype), end - start


def _read(path: Path, layouts: Mapping[str, Layout], size: int) -> Mapping[str, Tensor]:
    """The tensors, if the file still is what its header was."""
    from safetensors.torch import load

    with path.open("rb") as file:
        data = file.read(size + 1)
    try:
        found: dict[str, Tensor] = load(data)
    except Exception as error:  # whatever a reader makes of bytes that it does not expect
        raise ValueError(
            f"{path} is no safetensors file that can be read: {_why(error)}"
        ) from error
    if {name: Layout(tuple(t.shape), t.dtype) for name, t in found.items()} != layouts:
        raise ValueError(f"{path} changed while it was read")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object that has a name twice")
    return found


def _why(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return " ".join(str(error).split())[:400] or type(error).__name__
