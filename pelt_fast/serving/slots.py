"""Which slot holds which adapter, who uses it, who must go. No tensors here: one lock, held for moments."""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .errors import PoolFull, UnknownAdapter


class Resident(NamedTuple):
    """An adapter that is in a pool; ``in_use`` counts the running batches that have it."""

    slot: int
    pinned: bool
    in_use: int


class Reservation(NamedTuple):
    """A slot that nobody uses, until it is committed or abandoned; ``in_place``: it was the name's own."""

    name: str
    slot: int
    in_place: bool


class Slots:
    """A slot is free, resident under a name, reserved by one writer, or orphaned: nobody's, but still in use."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._changed = threading.Condition()
        self._resident: OrderedDict[str, int] = OrderedDict()  # the least recently used first
        self._pinned: set[str] = set()
        self._uses = [0] * count
        self._free = list(range(count - 1, -1, -1))
        self._orphans: set[int] = set()
        self._reserved = 0
        self._rewritten: Counter[str] = Counter()  # names whose own slot is being written
        self._closed = False

    def residents(self) -> dict[str, Resident]:
        """The least recently used first."""
        with self._changed:
            return {
                name: Resident(slot, name in self._pinned, self._uses[slot])
                for name, slot in self._resident.items()
            }

    def hold(self, names: Iterable[str]) -> dict[str, int]:
        """Slots by name. None of them changes until each is released.

        Raises:
            UnknownAdapter: a name is not there. None is held then.
        """
        with self._changed:
            names = list(dict.fromkeys(names))
            self._settle(names)
            for name in names:
                if name not in self._resident:
                    raise UnknownAdapter(f"adapter {name!r} is not in the pool; load it first")
            for name in names:
                self._resident.move_to_end(name)
                self._uses[self._resident[name]] += 1
            return {name: self._resident[name] for name in names}

    def release(self, slots: Iterable[int]) -> None:
        """Ends a hold."""
        with self._changed:
            for slot in slots:
                self._uses[slot] -= 1
                if not self._uses[slot] and slot in self._orphans:
                    self._orphans.remove(slot)
                    self._free.append(slot)
            self._changed.notify_all()

    def reserve(self, name: str, timeout: float | None) -> Reservation:
        """A slot to write: a free one, the name's own, or that of the adapter that was used least recently.

        Raises:
            PoolFull: there is none, and there was none for ``timeout`` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while True:
                self.check_open()
                found = self._available(name)
                if found is not None:
                    self._reserved += 1
                    return found
                left = 0.0 if deadline is None else deadline - time.monotonic()
                if left <= 0:
                    pinned = len(self._pinned & self._resident.keys())
                    waited = "" if timeout is None else f" for {timeout} s"
                    raise PoolFull(
                        f"no slot for {name!r}{waited}: of {self.count}, {pinned} are pinned and the others in use"
                    )
                self._changed.wait(min(left, threading.TIMEOUT_MAX))

    def commit(self, reservation: Reservation, pin: bool) -> None:
        """The adapter is in its slot; what the name had before is nobody's."""
        name, slot, _ = reservation
        with self._changed:
            self._finish(reservation)
            self._unmap(name)
            self._resident[name] = slot
            if pin:
                self._pinned.add(name)

    def abandon(self, reservation: Reservation) -> None:
        """Writing failed."""
        with self._changed:
            self._finish(reservation)
            self._free.append(reservation.slot)
            if reservation.in_place and reservation.name not in self._resident:
                self._pinned.discard(reservation.name)

    def evict(self, name: str) -> None:
        """New batches do not find it; its slot is free when those that run have ended.

        Raises:
            UnknownAdapter: it is not there.
            ValueError: it is pinned.
        """
        with self._changed:
            self._find(name)
            if name in self._pinned:
                raise ValueError(f"adapter {name!r} is pinned; unpin it first")
            self._unmap(name)
            self._changed.notify_all()

    def pin(self, name: str, pinned: bool) -> None:
        """Says whether it must stay."""
        with self._changed:
            self._find(name)
            if pinned:
                self._pinned.add(name)
            else:
                self._pinned.discard(name)
                self._changed.notify_all()

    def close(self) -> None:
        """Nothing is held or loaded from then on.

        Raises:
            RuntimeError: a batch or a load is running.
        """
        with self._changed:
            if self._reserved or any(self._uses):
                raise RuntimeError("a batch or a load is running in this pool; let it end first")
            self._closed = True

    def _available(self, name: str) -> Reservation | None:
        if self._free:
            return Reservation(name, self._free.pop(), False)
        own = self._resident.get(name)
        if own is not None and not self._uses[own]:
            del self._resident[name]
            self._rewritten[name] += 1
            return Reservation(name, own, True)
        for other, slot in self._resident.items():
            if not self._uses[slot] and other not in self._pinned:
                del self._resident[other]
                return Reservation(name, slot, False)
        return None

    def _finish(self, reservation: Reservation) -> None:
        self._reserved -= 1
        if reservation.in_place:
            self._rewritten[reservation.name] -= 1
            if not self._rewritten[reservation.name]:
                del self._rewritten[reservation.name]
        self._changed.notify_all()

    def _unmap(self, name: str) -> None:
        slot = self._resident.pop(name, None)
        if slot is None:
            return
        if self._uses[slot]:
            self._orphans.add(slot)
        else:
            self._free.append(slot)

    def _find(self, name: str) -> None:
        self._settle([name])
        if name not in self._resident:
            raise UnknownAdapter(f"adapter {name!r} is not in the pool")

    def _settle(self, names: Sequence[str]) -> None:
        """Waits for loads that write over a name's own slot: it is there before them and after them."""
        self.check_open()
        while any(name in self._rewritten for name in names):
            self._changed.wait()
            self.check_open()

    def check_open(self) -> None:
        """Raises RuntimeError once it is closed."""
        if self._closed:
            raise RuntimeError("the pool was restored; make another one")
