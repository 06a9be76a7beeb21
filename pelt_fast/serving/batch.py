"""The batch that runs in a thread: which sample has which slot."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from ..segments import MultiAdapterPlan


class Owner:
    """A pool, as its layers know it."""


class Batch:
    """Slots of the samples (-1: no adapter), and the plans that were made of them.

    ``counts`` are the rows of each sample; None: a layer's rows are divided evenly among the samples, whole sequences
    where its input has them.
    """

    def __init__(
        self, owner: Owner, slots: Sequence[int], counts: Sequence[int] | None, num_slots: int
    ) -> None:
        self.owner, self.num_slots = owner, num_slots
        self.slots = torch.tensor(slots, dtype=torch.int64)
        self.counts = None if counts is None else torch.tensor(counts, dtype=torch.int64)
        self.outer = _current.get()
        self._plans: dict[tuple[int, torch.device], MultiAdapterPlan] = {}

    @property
    def rows(self) -> int:
        """Of the batch whose samples have counts."""
        return 0 if self.counts is None else int(self.counts.sum())

    def plan(self, shape: Sequence[int], device: torch.device) -> MultiAdapterPlan:
        """For a layer whose input has this shape without its last dimension: (rows,) or (sequences, ..., rows).

        Raises:
            ValueError: that does not go with the samples.
        """
        rows, samples = math.prod(shape), len(self.slots)
        if self.counts is None and len(shape) > 1 and samples and shape[0] % samples:
            raise ValueError(
                f"a layer is called with {shape[0]} sequences; expected a multiple of the batch's {samples} samples"
            )
        plan = self._plans.get((rows, device))
        if plan is not None:
            return plan
        if self.counts is not None:
            if rows != self.rows:
                raise ValueError(
                    f"a layer is called with {rows} rows; expected the batch's {self.rows} tokens"
                )
            ids = self.slots.repeat_interleave(self.counts)
        else:
            if rows % samples if samples else rows:
                raise ValueError(
                    f"a layer is called with {rows} rows; expected a multiple of the batch's {samples} samples"
                )
            ids = self.slots.repeat_interleave(rows // samples if samples else 0)
        plan = MultiAdapterPlan(ids, self.num_slots, device=device)
        self._plans[rows, device] = plan
        return plan


_current: ContextVar[Batch | None] = ContextVar("pelt_fast_batch", default=None)


@contextmanager
def running(batch: Batch) -> Iterator[None]:
    """Within the block, in this thread, layers of the batch's pool go by it."""
    token = _current.set(batch)
    try:
        yield
    finally:
        _current.reset(token)


def batch_of(owner: Owner) -> Batch | None:
    """The innermost batch of this pool that runs in this thread."""
    batch = _current.get()
    while batch is not None and batch.owner is not owner:
        batch = batch.outer
    return batch
