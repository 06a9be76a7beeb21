"""Every access of an interpreted launch: in bounds, free of races, and counted.

Shadow memory holds, for each piece of an argument's storage (as long as its smallest element), whether the argument's
view covers it, which program stored it and which program read it. Programs of one launch run in no order on a GPU, so
it is an error when two of them touch a byte and one of them stores it, whatever the values turn out to be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

_NOBODY, _SEVERAL = -1, -2


class Violation(AssertionError):
    """An access that a GPU would not forgive."""


@dataclass
class Region:
    """One storage, and the arguments that look into it."""

    start: int
    piece: int  # bytes
    covered: np.ndarray  # bool per piece: some argument's view holds it
    writer: np.ndarray  # program that stored the piece
    reader: np.ndarray  # program that loaded it
    names: list[str] = field(default_factory=list)

    @property
    def loaded(self) -> np.ndarray:
        """Bool per piece: some program loaded it."""
        return self.reader != _NOBODY

    @property
    def stored(self) -> np.ndarray:
        """Bool per piece: some program stored it."""
        return self.writer != _NOBODY


@dataclass
class LaunchTrace:
    """What one launch did."""

    name: str
    programs: int = 0
    flops: int = 0  # of every `tl.dot`, padding included
    loaded: dict[str, int] = field(
        default_factory=dict
    )  # bytes per argument, each distinct byte once per load
    stored: dict[str, int] = field(default_factory=dict)
    regions: list[Region] = field(default_factory=list, repr=False)

    @property
    def footprint(self) -> dict[str, int]:
        """Bytes that each argument's view holds; an element of an expanded view counts once."""
        return {"/".join(r.names): int(r.covered.sum()) * r.piece for r in self.regions}


class Trace:
    """Checks and counts what happens under `interpreting(trace)`.

    Args:
        order: None for Triton's own order of programs, "reverse", or "random".
        seed: of the random order.
        check: whether an access that a GPU would not forgive raises `Violation`.
    """

    def __init__(self, order: str | None = None, seed: int = 0, check: bool = True) -> None:
        if order not in (None, "reverse", "random"):
            raise ValueError(f"order must be None, 'reverse' or 'random', got {order!r}")
        self.order = order
        self.check = check
        self.launches: list[LaunchTrace] = []
        self._random = np.random.default_rng(seed)
        self._program = 0
        self._permutation = np.arange(0)

    def begin(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """A launch with these arguments starts."""
        piece: dict[int, int] = {}
        for tensor in tensors.values():
            at, size = tensor.untyped_storage().data_ptr(), tensor.element_size()
            piece[at] = min(size, piece.get(at, size))
        regions: dict[int, Region] = {}
        for argument, tensor in tensors.items():
            storage, size = tensor.untyped_storage(), tensor.element_size()
            if storage.nbytes() == 0:
                continue
            start = storage.data_ptr()
            if start not in regions:
                pieces = storage.nbytes() // piece[start]
                nobody = np.full(pieces, _NOBODY, np.int32)
                regions[start] = Region(
                    start, piece[start], np.zeros(pieces, bool), nobody, nobody.copy()
                )
            region = regions[start]
            region.names.append(argument)
            elements = torch.zeros(storage.nbytes() // size, dtype=torch.bool)
            elements.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset()).fill_(True)
            ratio = size // region.piece
            region.covered[: elements.numel() * ratio] |= np.repeat(elements.numpy(), ratio)
        self.launches.append(LaunchTrace(name, regions=list(regions.values())))
        self._permutation = np.arange(0)

    def next_program(
        self, index: tuple[int, int, int], grid: tuple[int, int, int]
    ) -> tuple[int, int, int]:
        """The program that runs in place of program ``index``."""
        count = grid[0] * grid[1] * grid[2]
        if len(self._permutation) != count:
            self._permutation = np.arange(count)
            if self.order == "reverse":
                self._permutation = self._permutation[::-1]
            elif self.order == "random":
                self._permutation = self._random.permutation(count)
        place = (index[0] * grid[1] + index[1]) * grid[2] + index[2]
        self._program = int(self._permutation[place])
        self.launches[-1].programs += 1
        x, rest = divmod(self._program, grid[1] * grid[2])
        return x, rest // grid[2], rest % grid[2]

    def dot(self, flops: int) -> None:
        """A `tl.dot` ran."""
        self.launches[-1].flops += flops

    def access(
        self, kind: str, pointers: np.ndarray, mask: np.ndarray, size: int, value: np.ndarray | None
    ) -> None:
        """A load, store or atomic of elements of ``size`` bytes."""
        pointers, mask = np.broadcast_arrays(pointers, mask)
        addresses = pointers[mask].astype(np.int64)
        if addresses.size == 0:
            return
        if (addresses % size).any():
            self._fail(f"{kind}: an address is not a multiple of the element size {size}")
        # Rows of a tile follow one another nearly always: then nothing has to be sorted.
        distinct = addresses if (np.diff(addresses) > 0).all() else np.unique(addresses)
        if kind == "store" and distinct.size != addresses.size and value is not None:
            self._check_same_value(addresses, np.broadcast_to(value, mask.shape)[mask])
        outside = np.ones(distinct.size, bool)
        for region in self.launches[-1].regions:
            end = region.start + region.covered.size * region.piece
            if end <= distinct[0] or region.start > distinct[-1]:
                continue
            inside = (distinct >= region.start) & (distinct < end)
            if inside.any():
                outside &= ~inside
                self._check_region(kind, region, distinct[inside] - region.start, size)
        if outside.any():
            self._fail(f"{kind}: {outside.sum()} addresses outside every argument")

    def _check_same_value(self, addresses: np.ndarray, values: np.ndarray) -> None:
        order = np.argsort(addresses, kind="stable")
        addresses, values = addresses[order], values[order]
        twice = np.diff(addresses) == 0
        if (values[1:][twice] != values[:-1][twice]).any():
            self._fail("store: two lanes store different values to one address")

    def _check_region(self, kind: str, region: Region, first: np.ndarray, size: int) -> None:
        launch, program, names = self.launches[-1], self._program, "/".join(region.names)
        touched = first // region.piece
        if size != region.piece:
            touched = (touched[:, None] + np.arange(size // region.piece)).ravel()
        if not region.covered[touched].all():
            self._fail(f"{kind}: bytes of {names} that are outside the tensor's view")
        counts = launch.loaded if kind == "load" else launch.stored
        counts[names] = counts.get(names, 0) + touched.size * region.piece
        writer, reader = region.writer[touched], region.reader[touched]
        if kind != "atomic" and ((writer != _NOBODY) & (writer != program)).any():
            self._fail(f"{kind}: race, {names} was stored by another program")
        if kind == "load":
            region.reader[touched] = np.where(
                (reader == _NOBODY) | (reader == program), program, _SEVERAL
            )
            return
        if ((reader != _NOBODY) & (reader != program)).any():
            self._fail(f"{kind}: race, {names} was read by another program")
        region.writer[touched] = program

    def _fail(self, what: str) -> None:
        if self.check:
            raise Violation(f"{self.launches[-1].name}, program {self._program}: {what}")
