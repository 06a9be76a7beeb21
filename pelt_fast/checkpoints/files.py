"""What files hold. Nothing in them is run, and nothing is unpacked to far more than their size."""

from __future__ import annotations

import json
import pickletools
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch

from .tensors import held_bytes

_CONFIG_BYTES = 2**24
_SAFETENSORS_HEADER_BYTES = 10**8  # the format's own limit
# An archive may unpack to so many bytes, or to so many times its size: weights hardly shrink.
_UNPACKED_BYTES, _UNPACKED_FACTOR = 2**26, 16
_ZIP = b"PK\x03\x04"
_TUPLES = 1000  # a tensor has three
_LEGACY_PICKLES = 5  # magic number, version, system, objects, keys of storages

# What pickles of dense tensors name. torch.load itself lets more through: bytearray, torch.Tensor and conversions of
# devices and dtypes make as much memory as a pickle asks for.
_PLAIN = re.compile(
    r"collections OrderedDict"
    r"|torch\._utils _rebuild_(?:tensor|tensor_v2|tensor_v3|parameter|parameter_with_state)"
    r"|torch\.nn\.parameter Parameter"
    r"|torch(?:\.storage)? \w+Storage"
    r"|torch (?:Size|device|(?:bfloat|float|int|uint|bool|complex)\w*)"
)


def read_weights(path: Path) -> Mapping[Any, Any]:
    """What a file holds by name."""
    load = {".npz": _load_arrays, ".safetensors": _load_safetensors}.get(path.suffix, _load_pickle)
    try:
        found = load(path)
    except Exception as error:  # whatever a reader makes of bytes that it does not expect
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        raise ValueError(f"{path} is no file of tensors that can be read: {reason}") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} holds a {type(found).__name__}; expected tensors by name")
    return found


def read_config(path: Path) -> Mapping[str, Any]:
    """The object in a JSON file."""
    try:
        with path.open("rb") as file:
            data = file.read(_CONFIG_BYTES + 1)
        if len(data) > _CONFIG_BYTES:
            raise ValueError(f"it has more than {_CONFIG_BYTES} bytes")
        found = _parse(data)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no JSON file that can be read: {error}") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} holds a {type(found).__name__}; expected an object")
    return found


def _load_arrays(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        _check_archive(path, archive)
        _check_names(name.removesuffix(".npy") for name in archive.namelist())
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def _load_safetensors(path: Path) -> Any:
    from safetensors.torch import load_file

    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        _parse(file.read(min(size, _SAFETENSORS_HEADER_BYTES)))  # names that are there twice
    return load_file(path)


def _load_pickle(path: Path) -> Any:
    with path.open("rb") as file:
        available = _check_pickles(path, file)
    found = torch.load(path, map_location="cpu", weights_only=True)
    needed = held_bytes(found.values()) if isinstance(found, Mapping) else 0
    if needed > available:
        raise ValueError(f"it has {available} bytes of tensors; expected {needed}")
    return found


def _check_pickles(path: Path, file: IO[bytes]) -> int:
    """Raises for pickles of more than dense tensors; how many bytes there are beside them."""
    if file.read(len(_ZIP)) == _ZIP:
        with zipfile.ZipFile(file) as archive:
            _check_archive(path, archive)
            beside = 0
            for info in archive.infolist():
                if info.filename.lower().endswith(".pkl"):
                    _check_pickle(archive.read(info))
                else:
                    beside += info.file_size
            return beside
    file.seek(0)
    for _ in range(_LEGACY_PICKLES):
        _check_pickle(file)
    return path.stat().st_size - file.tell()


def _check_pickle(pickle: bytes | IO[bytes]) -> None:
    """Follows the tuples on the stack: one that is nested without end crashes Python when it becomes a key."""
    # of what is on the stack: how many tuples are in it, each counted as often as it is met
    stack: list[int] = []
    below, memo = [], {}
    for opcode, argument, _ in pickletools.genops(pickle):
        argument, taken = cast(Any, argument), list(opcode.stack_before)
        # other opcodes that find names are none of those that torch.load knows
        if opcode.name == "GLOBAL" and not _PLAIN.fullmatch(argument):
            raise ValueError(f"it needs {argument.replace(' ', '.')}; expected tensors alone")
        if opcode.name == "MARK":
            below.append(stack)
            stack = []
            continue
        if opcode.name.endswith("BINPUT"):
            memo[argument] = stack[-1]
        inner: list[int] = []
        if pickletools.markobject in taken:
            inner, stack = stack, below.pop()
            taken = taken[: taken.index(pickletools.markobject)]
        for _ in taken:
            inner.append(stack.pop())
        tuples = 1 + sum(inner) if opcode.name.startswith("TUPLE") else 0
        if opcode.name.endswith("BINGET"):
            tuples = memo[argument]
        if tuples > _TUPLES:
            raise ValueError("it has tuples in tuples without end")
        stack += [tuples] * len(opcode.stack_after)


def _check_archive(path: Path, archive: zipfile.ZipFile) -> None:
    _check_names(archive.namelist())
    unpacked = sum(info.file_size for info in archive.infolist())
    limit = max(_UNPACKED_BYTES, _UNPACKED_FACTOR * path.stat().st_size)
    if unpacked > limit:
        raise ValueError(f"it unpacks to {unpacked} bytes; expected {limit} at most")


def _parse(data: bytes) -> Any:
    try:
        return json.loads(data.decode(), object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _check_names(name for name, _ in pairs)
    return dict(pairs)


def _check_names(names: Iterable[str]) -> None:
    seen = set()
    for name in names:
        if name in seen:
            raise ValueError(f"it has {name!r} twice")
        seen.add(name)
