"""A value of a checkpoint as a dense tensor, or the reason why it is none."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Array = Tensor | np.ndarray | np.generic


def dense(where: str, value: Array) -> Tensor:
    """``value`` as a tensor on the CPU, which shares its memory if it is one already.

    Raises:
        ValueError: it is no plain dense tensor of a dtype of PyTorch's, or some of its elements share memory, so that
            a copy would be larger than what is there, or it has no memory.
    """
    if isinstance(value, Tensor):
        obstacle = _obstacle(value)
        if obstacle is not None:
            raise ValueError(f"{where} is {obstacle}; expected a plain dense tensor")
        size = value.element_size()
        span = _span(value.shape, [size * stride for stride in value.stride()], size)
    else:
        size = value.itemsize
        span = _span(value.shape, value.strides, size)
    elements = math.prod(value.shape)
    if elements * size > span:
        raise ValueError(
            f"{where} is expanded: {elements} elements out of {span // size} in memory; expected each in its own"
        )
    if not isinstance(value, Tensor):
        return _from_array(where, value)
    if elements and value.storage_offset() * size + span > value.untyped_storage().nbytes():
        raise ValueError(f"{where} is without its data in memory; expected a plain dense tensor")
    return value.detach().cpu()


def held_bytes(values: Iterable[Any]) -> int:
    """The size of the memory behind arrays and dense tensors, each piece counted once."""
    arrays, storages = 0, {}
    for value in values:
        if isinstance(value, (np.ndarray, np.generic)):
            arrays += value.nbytes
        elif isinstance(value, Tensor) and _obstacle(value) is None:
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return arrays + sum(storages.values())


def _obstacle(value: Tensor) -> str | None:
    """Why ``value`` is no plain dense tensor."""
    if type(value) not in (Tensor, nn.Parameter):
        return f"a {type(value).__name__}"
    if value.is_nested:
        return "nested"
    if value.layout is not torch.strided:
        return f"of layout {value.layout}"
    if value.is_quantized:
        return "quantized"
    return "on the device meta" if value.is_meta else None


def _span(shape: Sequence[int], strides: Sequence[int], size: int) -> int:
    """Bytes from the first element to the last, elements of ``size`` bytes included."""
    return size + sum((n - 1) * abs(stride) for n, stride in zip(shape, strides, strict=True))


def _from_array(where: str, value: np.ndarray | np.generic) -> Tensor:
    error = ValueError(f"{where} has dtype {value.dtype}; expected one of PyTorch's")
    if value.dtype.kind not in "fiubc":
        raise error  # before it is copied: elements may have no size, and be many
    try:
        return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("=")))
    except TypeError:
        raise error from None
