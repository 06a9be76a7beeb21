"""Folded and stacked matrices of AdapterFusion, kept between calls that need no gradient of what they are made of.

An entry is given again only for the very same tensors, at the same addresses and versions and with the same contents:
by hash, all of a small one and a walk through every row and column of a large one, for what the version counter does
not see (``.data``, memory shared with NumPy). A call that wants gradients of these tensors drops their entry, because
a step of an optimizer will follow; an entry goes with the first tensor that it is made of. Where contents cannot be
read cheaply (another device than the CPU, no C++ extension, large tensors that count no versions) nothing is kept.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..dispatch import backend
from ..env import env
from .fusion_fold import Adapters, Attention, Folded, Stacked

Kept = TypeVar("Kept", Folded, Stacked)


class _Entry(NamedTuple):
    sources: tuple[weakref.ref[Tensor], ...]
    fingerprint: int
    kept: Folded | Stacked
    bytes: int


class FoldCache:
    """What is kept, by what it is made of and a tag; the least recently used go first past ``limit`` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._entries: OrderedDict[Any, _Entry] = OrderedDict()
        self._lock = threading.RLock()  # a tensor may die, and its callback run, while it is held

    def find(self, adapters: Adapters, attention: Attention, tag: Any) -> Any:
        """What was made of these very tensors as they are now, under this tag; None where there is nothing.

        What an entry was made of had been checked, so that what is found here need not be: its key names every
        argument by identity (numbers by value), and ``tag`` what else a check asks about.
        """
        key = _key(adapters, attention, tag)
        entry = self._entries.get(key)
        if entry is None:
            return None
        # who lives at the key's addresses is who was there, if they live still
        sources = [t for ref in entry.sources if (t := ref()) is not None]
        if len(sources) != len(entry.sources) or _fingerprint(sources) != entry.fingerprint:
            return None
        with self._lock, contextlib.suppress(KeyError):
            self._entries.move_to_end(key)
        return entry.kept

    def make(
        self,
        adapters: Adapters,
        attention: Attention,
        tag: Any,
        make: Callable[[], Kept],
    ) -> Kept | None:
        """What ``make`` gives, kept; None where nothing can be."""
        sources = _sources(adapters, attention)
        fingerprint = _fingerprint(sources) if self.limit > 0 else None
        if fingerprint is None:
            return None
        # tensors of inference mode could not take part in a later call that is differentiated
        with torch.inference_mode(False), torch.no_grad():
            made = make()
            tensors = zip(made._fields, made, strict=True)
            kept: Kept = made._replace(**{k: t.clone() for k, t in tensors if t is not None})
        size = sum(t.untyped_storage().nbytes() for t in kept if t is not None)
        key = _key(adapters, attention, tag)
        with self._lock:
            self._drop(key)
            if size <= self.limit:
                while self.bytes + size > self.limit:
                    self._drop(next(iter(self._entries)))
                refs = tuple(weakref.ref(t, lambda _: self._drop(key)) for t in sources)
                self._entries[key] = _Entry(refs, fingerprint, kept, size)
                self.bytes += size
        return kept

    def forget(self, adapters: Adapters, attention: Attention) -> None:
        """Drops what is made of these tensors: they are about to change."""
        if not self._entries:
            return
        with self._lock:
            names = _names(adapters, attention)
            for key in [key for key in self._entries if key[0] == names]:
                self._drop(key)

    def clear(self) -> None:
        """Drops everything."""
        with self._lock:
            for key in list(self._entries):
                self._drop(key)

    def _drop(self, key: Any) -> None:
        with self._lock:
            entry = self._entries.pop(key, None)
            if entry is not None:
                self.bytes -= entry.bytes


folds = FoldCache(env.pack_limit_mb << 20)


def folded_bytes() -> int:
    """Memory that folded matrices of AdapterFusion take; ``PELT_FAST_PACK_LIMIT_MB`` bounds it."""
    return folds.bytes


def clear_folded() -> None:
    """Forgets every folded matrix of AdapterFusion."""
    folds.clear()


def _sources(adapters: Adapters, attention: Attention) -> list[Tensor]:
    members = (*adapters.down, *adapters.down_bias, *adapters.up, *adapters.up_bias)
    return [t for t in (*members, *adapters.scaling, *attention) if isinstance(t, Tensor)]


def _names(adapters: Adapters, attention: Attention) -> tuple[int, ...]:
    members = (adapters.down, adapters.down_bias, adapters.up, adapters.up_bias, attention)
    return tuple([id(t) for group in members for t in group])


def _key(adapters: Adapters, attention: Attention, tag: Any) -> Any:
    factors = tuple([s if isinstance(s, float) else id(s) for s in adapters.scaling])
    return (_names(adapters, attention), factors, tag)


def _fingerprint(sources: Sequence[Tensor]) -> int | None:
    """Of addresses, versions and contents; None where that cannot be had: not of another device than the CPU."""
    module = backend("cpp", "fusion").module
    if module is None:
        return None
    found: int | None = module.fingerprint(sources)
    return found
