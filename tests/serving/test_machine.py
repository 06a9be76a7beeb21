"""Any sequence of calls against a dictionary: names, order, slots in use, and every row of every batch."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pelt_fast.serving import PoolFull, UnknownAdapter

from .bad import GOOD, KEY
from .exact import Adapter, Net, contents, inputs, oracle, pool_of, same

SLOTS = 3
NAMES = st.sampled_from("abcde")
ADAPTERS = [Adapter(seed) for seed in range(12)]


class Pools(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.pool = pool_of(self.net, slots=SLOTS)
        self.loaded: dict[str, Adapter] = {}  # the least recently used first
        self.pinned: set[str] = set()
        # batches that run: their names, what these were when they began, and how they end
        self.running: list[tuple[list[str | None], dict[str, Adapter], ExitStack]] = []

    def in_use(self, name: str) -> int:
        return sum(found.get(name) is self.loaded[name] for _, found, _ in self.running)

    def taken(self) -> int:
        """Slots of adapters that are loaded, or were when a batch began that runs still."""
        used = {id(adapter) for _, found, _ in self.running for adapter in found.values()}
        return len(used | {id(adapter) for adapter in self.loaded.values()})

    @rule(name=NAMES, which=st.sampled_from(range(12)), pin=st.booleans())
    def load(self, name: str, which: int, pin: bool) -> None:
        adapter = Adapter(which)  # an object of its own, as a slot is
        victim = None
        if self.taken() == SLOTS and not (name in self.loaded and not self.in_use(name)):
            free = [n for n in self.loaded if n not in self.pinned and not self.in_use(n)]
            if not free:
                before = contents(self.net)
                with pytest.raises(PoolFull):
                    self.pool.load(name, adapter.state, adapter.config, pin=pin)
                assert same(contents(self.net), before)
                return
            victim = free[0]
        self.pool.load(name, adapter.state, adapter.config, pin=pin)
        if victim is not None:
            del self.loaded[victim]
        self.loaded.pop(name, None)
        self.loaded[name] = adapter
        if pin:
            self.pinned.add(name)

    @rule(name=NAMES)
    def load_bad(self, name: str) -> None:
        before = contents(self.net)
        bad = GOOD.state[KEY.format("A")] * float("nan")
        with pytest.raises(ValueError, match="NaN"):
            self.pool.load(name, {**GOOD.state, KEY.format("A"): bad}, GOOD.config)
        assert same(contents(self.net), before)

    @rule(name=NAMES)
    def evict(self, name: str) -> None:
        if name not in self.loaded:
            with pytest.raises(UnknownAdapter):
                self.pool.evict(name)
        elif name in self.pinned:
            with pytest.raises(ValueError, match="pinned"):
                self.pool.evict(name)
        else:
            self.pool.evict(name)
            del self.loaded[name]

    @rule(name=NAMES, pinned=st.booleans())
    def pin(self, name: str, pinned: bool) -> None:
        call = self.pool.pin if pinned else self.pool.unpin
        if name not in self.loaded:
            with pytest.raises(UnknownAdapter):
                call(name)
            return
        call(name)
        (self.pinned.add if pinned else self.pinned.discard)(name)

    @rule(names=st.lists(st.none() | NAMES, max_size=5))
    def begin(self, names: list[str | None]) -> None:
        wanted = dict.fromkeys(name for name in names if name is not None)
        stack = ExitStack()
        if wanted.keys() - self.loaded.keys():
            with pytest.raises(UnknownAdapter):
                stack.enter_context(self.pool.batch(names))
            return
        stack.enter_context(self.pool.batch(names))
        for name in wanted:
            self.loaded[name] = self.loaded.pop(name)
        self.running.append((names, {name: self.loaded[name] for name in wanted}, stack))

    @precondition(lambda self: self.running)
    @rule(seed=st.integers(0, 100))
    def forward(self, seed: int) -> None:
        """The innermost batch: what it began with, whatever was loaded since."""
        names, found, _ = self.running[-1]
        x = inputs(len(names), 2, seed)
        with torch.inference_mode():
            y = self.net(x)
        for row, value, name in zip(y, x, names, strict=True):
            assert torch.equal(row, oracle(self.net, value, found.get(name)))

    @precondition(lambda self: self.running)
    @rule()
    def end(self) -> None:
        self.running.pop()[2].close()

    @invariant()
    def names_and_uses(self) -> None:
        resident = self.pool.resident
        assert list(resident) == list(self.loaded)
        for name, found in resident.items():
            assert found.pinned == (name in self.pinned)
            assert found.in_use == self.in_use(name)
        assert len({found.slot for found in resident.values()}) == len(resident)

    def teardown(self) -> None:
        while self.running:
            self.end()
        self.names_and_uses()
        self.pool.restore()


Pools.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
test_any_sequence_of_calls = Pools.TestCase
