"""The tensors of one call, by name, and how they are drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "sliced", "strided_rows", "transposed", "permuted", "expanded", "constant")
Self = TypeVar("Self", bound="Inputs")  # typing.Self is of Python 3.11


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call, tensors and the rest, and ``dy``, the gradient that comes back to it."""

    operation: ClassVar[str]  # its name in `pelt_fast.functional`
    x: Tensor
    dy: Tensor

    @property
    def args(self) -> tuple[Any, ...]:
        """Positional arguments of the function."""
        raise NotImplementedError

    @property
    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments of the function."""
        raise NotImplementedError

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor as (name, tensor); members of a sequence are called ``lora_a.0``."""
        for field in fields(self):
            value = getattr(self, field.name)
            members = (
                [(f"{field.name}.{i}", v) for i, v in enumerate(value)]
                if isinstance(value, tuple)
                else [(field.name, value)]
            )
            yield from ((name, member) for name, member in members if isinstance(member, Tensor))

    def map(self: Self, function: Callable[[str, Tensor], Tensor]) -> Self:
        """A copy in which every tensor is ``function(name, tensor)``."""
        new: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                new[field.name] = function(field.name, value)
            elif isinstance(value, tuple):
                new[field.name] = tuple(
                    function(f"{field.name}.{i}", v) if isinstance(v, Tensor) else v
                    for i, v in enumerate(value)
                )
        return replace(self, **new)


def draw(
    shape: tuple[int, ...],
    std: float,
    layout: str,
    dtype: torch.dtype,
    device: str | torch.device,
    generator: torch.Generator,
    mean: float = 0.0,
) -> Tensor:
    """Normal numbers of this shape behind the strides that ``layout`` names."""

    def randn(*size: int) -> Tensor:
        # Moved before it is viewed: a move does not keep strides.
        return (torch.randn(size, dtype=dtype, generator=generator) * std + mean).to(device)

    *rows, columns = shape
    if layout == "contiguous":
        return randn(*shape)
    if layout == "sliced":  # rows further apart than they are long, first element off any alignment
        return randn(*rows, columns + 5)[..., 1 : columns + 1]
    if layout == "strided_rows":
        return randn(*rows[:-1], 2 * rows[-1], columns)[..., ::2, :]
    if layout == "transposed":  # last stride is not 1
        return randn(columns, *rows).movedim(0, -1)
    if layout == "permuted":  # leading dimensions that no single stride describes
        return randn(*rows[::-1], columns).permute(*range(len(rows))[::-1], len(rows))
    if layout == "expanded":  # every row is the same memory
        return randn(columns).expand(shape)
    if layout == "constant":  # what ``y.sum().backward()`` sends: one number, all strides 0
        return randn(1).expand(shape)
    raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
