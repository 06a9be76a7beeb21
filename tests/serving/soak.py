"""Requests from several threads at random: ``python -m tests.serving.soak --requests 100000``.

Batches, loads of new versions, evictions, pins and bad files, all at once. Every row of every batch must be right to
the last bit: that of one version of its adapter, and of the same version in the whole batch. Refusals must be those
that are meant. Memory must not grow.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pelt_fast.serving import PoolFull, UnknownAdapter

from .bad import BAD, spoiled
from .exact import Adapter, Net, inputs, oracle, pool_of

NAMES, VERSIONS, SLOTS, ROWS, INPUTS = 8, 3, 5, 2, 8


@dataclass
class Soak:
    requests: int
    threads: int = 4
    seed: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def run(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.net = Net()
            self.pool = pool_of(self.net, slots=SLOTS)
            self._prepare(Path(folder))
            self._served, self._lock = 0, threading.Lock()
            self.memory: list[tuple[int, int]] = []
            started = time.monotonic()
            workers = [threading.Thread(target=self._work, args=(i,)) for i in range(self.threads)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            self.seconds = time.monotonic() - started
            self.memory.append((self._served, resident_bytes()))
            assert not any(found.in_use for found in self.pool.resident.values())
            self.pool.restore()

    @property
    def growth(self) -> int:
        """Bytes of resident memory from a tenth of the requests on."""
        return self.memory[-1][1] - self.memory[0][1]

    def __str__(self) -> str:
        memory = ", ".join(f"{size / 2**20:.1f} MiB at {served}" for served, size in self.memory)
        return (
            f"{self._served} requests in {self.seconds:.0f} s from {self.threads} threads: {dict(self.counts)}; "
            f"resident {memory}; {len(self.failures)} failures"
        )

    def _prepare(self, folder: Path) -> None:
        """Files, and what each version of each adapter makes of each input."""
        self.bad = []
        for i, name in enumerate(BAD):
            self.bad.append(spoiled(name, folder / f"bad{i}"))
        self.x = [inputs(1, ROWS, seed)[0] for seed in range(INPUTS)]
        self.files: dict[tuple[str, int], Path] = {}
        self.expected: dict[tuple[str | None, int], list[torch.Tensor]] = {
            (None, x): [oracle(self.net, self.x[x], None)] for x in range(INPUTS)
        }
        for n in range(NAMES):
            versions = [Adapter(1000 + n * VERSIONS + v) for v in range(VERSIONS)]
            for v, adapter in enumerate(versions):
                self.files[f"{n}", v] = adapter.save(folder / f"good{n}-{v}")
            for x in range(INPUTS):
                self.expected[f"{n}", x] = [adapter(self.net, self.x[x]) for adapter in versions]

    def _work(self, worker: int) -> None:
        chance = random.Random(self.seed * 1000 + worker)
        kinds = {self.forward: 70, self.load: 15, self.evict: 5, self.load_bad: 6, self.pin: 4}
        while True:
            with self._lock:
                if self._served == self.requests or self.failures:
                    return
                self._served += 1
                if self._served % max(self.requests // 10, 1) == 0:
                    self.memory.append((self._served, resident_bytes()))
            (request,) = chance.choices(list(kinds), list(kinds.values()))
            try:
                outcome = request(chance)
            except BaseException as error:  # nothing but what a request expects may come
                self.failures.append(f"{request.__name__}: {type(error).__name__}: {error}")
                return
            with self._lock:
                self.counts[f"{request.__name__}: {outcome}"] += 1

    def forward(self, chance: random.Random) -> str:
        some = [f"{n}" for n in chance.sample(range(NAMES), chance.randint(0, 3))]
        names = [chance.choice([None, *some]) for _ in range(chance.randint(1, 6))]
        which = [chance.randrange(INPUTS) for _ in names]
        x = torch.stack([self.x[i] for i in which])
        tokens = chance.choice([None, ROWS])
        try:
            with torch.inference_mode(), self.pool.batch(names, tokens):
                y = self.net(x)
                if chance.random() < 0.2:  # others load meanwhile
                    time.sleep(0.003)
                    if not torch.equal(self.net(x), y):
                        raise AssertionError(f"{names} changed within a batch")
        except UnknownAdapter:
            return "not loaded"
        possible: dict[str | None, set[int]] = {}
        for row, name, i in zip(y, names, which, strict=True):
            right = {v for v, e in enumerate(self.expected[name, i]) if torch.equal(row, e)}
            possible[name] = possible.get(name, right) & right
        if not all(possible.values()):
            raise AssertionError(f"a wrong row: {names}, {possible}")
        return "right"

    def load(self, chance: random.Random) -> str:
        name, version = f"{chance.randrange(NAMES)}", chance.randrange(VERSIONS)
        try:
            self.pool.load(name, self.files[name, version], timeout=chance.choice([None, 0.01]))
        except PoolFull:
            return "full"
        return "done"

    def load_bad(self, chance: random.Random) -> str:
        try:
            self.pool.load(f"{chance.randrange(NAMES)}", chance.choice(self.bad))
        except (ValueError, FileNotFoundError):
            return "refused"
        raise AssertionError("a bad file was loaded")

    def evict(self, chance: random.Random) -> str:
        try:
            self.pool.evict(f"{chance.randrange(NAMES)}")
        except UnknownAdapter:
            return "not loaded"
        except ValueError:
            return "pinned"
        return "done"

    def pin(self, chance: random.Random) -> str:
        """Two of the names are pinned at times."""
        name = f"{chance.randrange(2)}"
        try:
            (self.pool.pin if chance.random() < 0.5 else self.pool.unpin)(name)
        except UnknownAdapter:
            return "not loaded"
        return "done"


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    torch.set_num_threads(1)
    soak = Soak(**vars(parser.parse_args()))
    soak.run()
    print(soak)
    print(*soak.failures, sep="\n")
    return int(bool(soak.failures) or soak.growth > 2**25)


if __name__ == "__main__":
    sys.exit(main())
