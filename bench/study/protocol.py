"""The protocol of UniPELT (Mao et al., 2022), and which runs it asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

SAMPLES = (100, 500, 1000)
SEEDS = (111, 222, 333, 444, 555)
"""Of the data: which samples are drawn."""
MODEL_SEED = 42
"""Of the new weights, the order of the samples and the dropout."""
KINDS = ("eager", "accelerated")


@dataclass(frozen=True)
class Protocol:
    """How a run is trained and judged; the defaults are the paper's, but for what it does not say: ``test``."""

    length: int = 128
    """Tokens at most; a batch is as long as its longest text."""
    batch: int = 16
    epochs: int = 50
    patience: int = 10
    """Epochs without a better accuracy on the development samples, after which it stops."""
    dev: int = 1000
    test: int = 1000
    rate_scale: float = 1.0
    """On every method's learning rate."""
    source_samples: int = 1000
    source_epochs: int = 10
    """Of the tasks whose adapters fusion has beside the task's own."""


@dataclass(frozen=True)
class Run:
    """One training."""

    task: str
    samples: int
    seed: int
    method: str
    kind: str

    def __str__(self) -> str:
        return f"{self.task} K={self.samples} seed {self.seed} {self.method} {self.kind}"


COLUMNS = tuple(field.name for field in (*fields(Run), *fields(Protocol)))
"""What names a run with its protocol in the CSV."""


def key(line: dict[str, Any]) -> tuple[str, ...]:
    """Of a line of results, the same whether it was just made or read again."""
    return tuple(str(line[column]) for column in COLUMNS)


def runs(
    tasks: Sequence[str],
    samples: Sequence[int],
    seeds: Sequence[int],
    methods: Sequence[str],
    accelerated_seeds: int,
    servable: Sequence[str],
) -> Iterator[Run]:
    """All methods of a seed, then the next seed: what a budget cuts off is whole seeds and large K.

    The first ``accelerated_seeds`` seeds of each size are also run accelerated, for the methods that can be.
    """
    for size in samples:
        for number, seed in enumerate(seeds):
            for task in tasks:
                for method in methods:
                    yield Run(task, size, seed, method, "eager")
                    if number < accelerated_seeds and method in servable:
                        yield Run(task, size, seed, method, "accelerated")
