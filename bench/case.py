"""What every row of the kernel tables is, whatever it computes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case(ABC):
    """One row: a training step (forward, backward), or a decoding step (forward, no gradient)."""

    family: ClassVar[str]

    dtype: str
    tokens: int
    mode: str = field(default="train", kw_only=True)  # | "decode"
    compiled: bool = field(default=False, kw_only=True)  # torch.compile is a contender here

    def __str__(self) -> str:
        """Without blanks: a name for pytest."""
        shape = self.label.replace(" → ", "-").replace(" × ", "x").replace(" ", "-")
        return f"{self.family}-{self.dtype}-{self.mode}-T{shape}"

    @property
    @abstractmethod
    def label(self) -> str:
        """Its shape, as tables and pictures show it."""

    @property
    @abstractmethod
    def flops(self) -> int:
        """Of the whole step."""

    @property
    @abstractmethod
    def bytes(self) -> int:
        """Compulsory traffic of the whole step."""

    @property
    @abstractmethod
    def work(self) -> tuple[int, int]:
        """Flops and bytes of one eager step, roughly: what a round is estimated by."""

    @property
    @abstractmethod
    def order(self) -> tuple[Any, ...]:
        """Where it stands among the rows of its family."""

    @property
    def train(self) -> bool:
        return self.mode == "train"

    @property
    def passes(self) -> tuple[str, ...]:
        return ("forward", "backward", "both") if self.train else ("forward",)

    @property
    def main_pass(self) -> str:
        """What is compared first."""
        return self.passes[-1]

    @property
    def record(self) -> dict[str, Any]:
        """What the results say about it."""
        fields = {key: value for key, value in asdict(self).items() if key != "compiled"}
        return {"family": self.family, "label": self.label, **fields}


AnyCase = TypeVar("AnyCase", bound=Case)


def with_compile(rows: Sequence[AnyCase], wanted: Callable[[AnyCase], bool]) -> list[AnyCase]:
    """The rows, with torch.compile in those that are wanted."""
    return [replace(case, compiled=case.train and wanted(case)) for case in rows]
