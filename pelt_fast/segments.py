"""Which token goes to which adapter: built once per batch, shared by every layer.

Everything that a kernel asks is answered by int32 arrays of fixed sizes, views of one buffer on the device, so that a
grid never depends on the ids, nothing is synchronised, and ``update_`` under a CUDA graph is one write.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy
import torch
from torch import Tensor

TILES = (16, 64, 512)
"""Rows of a tile in decode, of a tile in prefill and training, and of a chunk of a sum over rows."""
_INT32_MAX = 2**31 - 1
_current: ContextVar[MultiAdapterPlan | None] = ContextVar("pelt_fast_plan", default=None)


class MultiAdapterPlan:
    """A batch in which every token names its own adapter.

    An id in [0, L) names an adapter. Every other one (-1 by convention) is in the null bucket, number L: no adapter.
    Tokens of a bucket keep their order, and tiles begin where buckets begin, so that what is computed for an adapter
    does not depend on who else is in the batch.

    Args:
        token_adapter: (T,) integers: a list, a NumPy array or a tensor on any device, in any order. For a batch whose
            samples name adapters see ``from_samples``.
        num_adapters: L, the number of adapters that are stacked in a layer; at least 1.
        max_tokens: capacity for later ``update_``; default T.
        device: where the layers are; default: the ids' device, CPU for lists. Ids on the device are sorted there,
            without a synchronisation.
        check: ids outside [-1, L) raise ValueError instead of meaning "no adapter". It reads the ids on the host.

    Raises:
        TypeError: ids that are no integers.
        ValueError: ids of a wrong shape, too many of them, or, with ``check``, out of range.
    """

    def __init__(
        self,
        token_adapter: Any,
        num_adapters: int,
        *,
        max_tokens: int | None = None,
        device: torch.device | str | None = None,
        check: bool = False,
    ) -> None:
        self.num_adapters = _count("num_adapters", num_adapters, 1)
        self.check = bool(check)
        ids = _ids(token_adapter)
        capacity = len(ids) if max_tokens is None else _count("max_tokens", max_tokens, 0)
        where = ids.device if device is None else torch.device(device)
        self._sizes = _sizes(capacity, self.num_adapters)
        self.max_tokens = capacity
        with torch.inference_mode(False):
            self._buffer = torch.zeros(sum(self._sizes), dtype=torch.int32, device=where)
        self._cut()
        self.tokens = 0
        self._set(ids)

    @classmethod
    def from_samples(
        cls, sample_adapter: Any, tokens_per_sample: int, num_adapters: int, **options: Any
    ) -> MultiAdapterPlan:
        """The plan of a (B, S, ...) batch: every one of the S tokens of a sample goes to the sample's adapter."""
        repeats = _count("tokens_per_sample", tokens_per_sample, 0)
        return cls(_ids(sample_adapter).repeat_interleave(repeats), num_adapters, **options)

    def update_(self, token_adapter: Any) -> MultiAdapterPlan:
        """Another batch, of at most ``max_tokens`` tokens, in the same buffers; returns self.

        A backward of a forward that used the plan must have run by then; it raises otherwise. It cannot where
        activation checkpointing runs that forward again: it would run with the new batch.
        """
        self._set(_ids(token_adapter))
        return self

    def __copy__(self) -> MultiAdapterPlan:
        """A plan of its own: one that shared the buffer would be changed with the other's ``update_``."""
        return copy.deepcopy(self)

    @property
    def device(self) -> torch.device:
        """Where the arrays are."""
        return self._buffer.device

    @property
    def arrays(self) -> list[Tensor]:
        """What kernels read, int32, C = max_tokens, L = num_adapters, null tiles last and with adapter -1.

        0. (C,): bucket of each token
        1. (C,): tokens by bucket, in order
        2. (L + 2,): bucket g holds [1][[2][g] : [2][g + 1]]
        3. (n, 4): tiles of up to 16 rows: adapter, first position in [1], rows (0: unused), 0
        4. (n, 4): the same of up to 64 rows
        5. (n, 4): the same of up to 512 rows
        6. (L + 1,): tiles [6][g] .. [6][g + 1] - 1 of array 5 are adapter g's
        """
        return list(self._arrays)

    @property
    def counts(self) -> Tensor:
        """(L,) int32 on the device: tokens of each adapter."""
        return self.arrays[2].diff()[: self.num_adapters]

    @property
    def active(self) -> Tensor:
        """(L,) bool on the device: adapters that have a token. The others' gradients are zeros.

        Adam moves a parameter whose gradient is zero (moments, decay): an optimizer should skip those.
        """
        return self.counts > 0

    def active_adapters(self) -> list[int]:
        """The adapters that have a token, as a list; waits for the device."""
        found: list[int] = self.active.nonzero().flatten().tolist()
        return found

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_arrays"]  # a copy's would not be views of its buffer to autograd
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._cut()

    def __repr__(self) -> str:
        return (
            f"MultiAdapterPlan(tokens={self.tokens}, num_adapters={self.num_adapters}, "
            f"max_tokens={self.max_tokens}, device='{self.device}')"
        )

    def _cut(self) -> None:
        """The arrays as views of the buffer: they count its versions."""
        with torch.inference_mode(False):
            parts = self._buffer.split(self._sizes)
            self._arrays = (*parts[:3], *[part.view(-1, 4) for part in parts[3:6]], parts[6])

    def _set(self, ids: Tensor) -> None:
        if len(ids) > self.max_tokens:
            raise ValueError(
                f"token_adapter has {len(ids)} entries; expected at most max_tokens = {self.max_tokens}"
            )
        if self.check:
            outside = ((ids < -1) | (ids >= self.num_adapters)).nonzero().flatten().tolist()
            if outside:
                first = outside[0]
                raise ValueError(
                    f"token_adapter[{first}] is {int(ids[first])}; expected -1 or an adapter below {self.num_adapters}"
                )
        built = torch.cat(_arrays(ids, self.max_tokens, self.num_adapters))
        if built.device.type == "cpu" and self.device.type == "cuda":
            built = built.pin_memory()
        with torch.no_grad():
            self._buffer.copy_(built, non_blocking=True)
        self.tokens = len(ids)


@contextmanager
def use_plan(plan: MultiAdapterPlan | None) -> Iterator[None]:
    """Within the block, in this thread, multi-adapter layers that are given no plan go by this one; None: by none.

    Activation checkpointing runs a forward again in the backward: the backward belongs into the block too. On a GPU
    it runs in a thread of its own, which no block reaches: give the layers the plan as an argument there, and in a
    ``torch.compile`` of a full graph, which cannot read a block's.
    """
    if plan is not None and not isinstance(plan, MultiAdapterPlan):
        raise TypeError(f"plan is a {type(plan).__name__}; expected a pelt_fast.MultiAdapterPlan")
    token = _current.set(plan)
    try:
        yield
    finally:
        _current.reset(token)


def current_plan() -> MultiAdapterPlan | None:
    """The plan of the surrounding ``use_plan``, or None."""
    return _current.get()


def _sizes(capacity: int, adapters: int) -> list[int]:
    tiles = [4 * (-(-capacity // size) + min(adapters + 1, capacity)) for size in TILES]
    return [capacity, capacity, adapters + 2, *tiles, adapters + 1]


def _arrays(ids: Tensor, capacity: int, adapters: int) -> list[Tensor]:
    """The arrays of ``MultiAdapterPlan.arrays``, flat, on the ids' device. Shapes depend on no value: no sync."""
    tokens, device = len(ids), ids.device
    null = (ids < 0) | (ids >= adapters)
    bucket = ids.masked_fill(null, adapters)
    perm = bucket.sort(stable=True).indices
    counts = torch.zeros(adapters + 1, dtype=torch.int64, device=device)
    counts.scatter_add_(0, bucket, torch.ones_like(bucket))
    indptr = torch.zeros(adapters + 2, dtype=torch.int64, device=device)
    torch.cumsum(counts, 0, out=indptr[1:])
    tail = (0, capacity - tokens)
    padded = [torch.nn.functional.pad(t, tail) for t in (bucket, perm)]
    found = [*padded, indptr]
    chunk_indptr = indptr
    for size, numbers in zip(TILES, _sizes(capacity, adapters)[3:6], strict=True):
        first = torch.zeros(adapters + 2, dtype=torch.int64, device=device)
        torch.cumsum((counts + size - 1).div(size, rounding_mode="floor"), 0, out=first[1:])
        index = torch.arange(numbers // 4, device=device)
        owner = torch.searchsorted(first[1:], index, right=True)  # adapters + 1: beyond the last
        used = owner <= adapters
        owner = owner.clamp(max=adapters)
        start = indptr[owner] + (index - first[owner]) * size
        rows = (indptr[owner + 1] - start).clamp(max=size)
        adapter = owner.masked_fill(owner == adapters, -1)
        columns = torch.stack((adapter, start, rows, torch.zeros_like(rows)), 1)
        found.append(torch.where(used[:, None], columns, 0).flatten())
        chunk_indptr = first[: adapters + 1]
    return [t.to(torch.int32) for t in (*found, chunk_indptr)]


def _ids(values: Any) -> Tensor:
    """int64 (T,)."""
    try:
        if not isinstance(values, (Tensor, list, tuple)):
            values = numpy.array(values)  # a copy: torch takes none that is read-only or backwards
        ids = values if isinstance(values, Tensor) else torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(
            f"token_adapter cannot be made a tensor ({error}); expected (T,) integers"
        ) from None
    if ids.layout is not torch.strided or ids.is_nested:
        raise TypeError("token_adapter is no dense tensor; expected (T,) integers")
    if ids.dim() != 1:
        raise ValueError(f"token_adapter has shape {tuple(ids.shape)}; expected (T,)")
    if ids.numel() == 0:
        return ids.new_zeros(0, dtype=torch.int64)
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise TypeError(f"token_adapter has dtype {ids.dtype}; expected integers")
    if ids.numel() > _INT32_MAX:
        raise ValueError(f"token_adapter has {ids.numel()} entries; expected at most {_INT32_MAX}")
    ids = ids.detach()
    if ids.dtype == torch.uint64:  # what int64 lacks is an adapter that no layer has
        ids = ids.view(torch.int64)
        return ids.masked_fill(ids < 0, _INT32_MAX)
    return ids.to(torch.int64)


def _count(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is a {type(value).__name__}; expected an integer")
    if not least <= value < _INT32_MAX:
        raise ValueError(f"{name} is {value}; expected at least {least} and below {_INT32_MAX}")
    return value
