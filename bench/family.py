"""A kernel family as the tables see it: its rows, who runs in them, and what judges them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pelt_fast.testing.tolerance import Deviation

from .case import Case
from .contender import Contender


@dataclass(frozen=True)
class Oracle:
    """The family's yardsticks in `pelt_fast.testing`; results are tensors by name."""

    masks: Callable[[Any, Tensor], Any]
    """The dropout masks that a seed draws for these inputs."""
    exact: Callable[[Any, Any, Iterable[str]], dict[str, Tensor]]
    """In fp64, of inputs and masks; the gradients of those that are named."""
    eager: Callable[[Any, Any, Iterable[str]], dict[str, Tensor]]
    """What eager PyTorch makes of it."""
    deviations: Callable[[dict[str, Tensor], Any, Any], list[Deviation]]
    """Results, inputs, masks: how far each result is off, and how far it may be."""
    exact_key: Callable[[Any], Hashable] = lambda inputs: None
    """Inputs with the same key have the same exact results."""


@dataclass(frozen=True)
class Family:
    """Everything that `measure` needs to know."""

    name: str
    contenders: tuple[str, ...]
    floor: str
    """Costs nothing more than the model without PELT: overhead 0."""
    main: str
    """Ours, as it comes."""
    rivals: Mapping[str, str]
    """Whom each of ours is compared with: overhead 1."""
    unjudged: frozenset[str]
    """Computes something else than the row's inputs say, or with masks that nobody knows."""
    may_fail: str
    """torch.compile needs a C++ compiler, which a machine may lack; of ours, every failure is a failure."""
    trained: Callable[[Any], tuple[str, ...]]
    """Of drawn inputs, the names of what gets a gradient."""
    quick: Callable[[], list[Any]]
    full: Callable[[], list[Any]]
    draw: Callable[[Any, torch.device], Any]
    build: Callable[[str, Any, Any], Contender]
    """By name, for a case, from the numbers drawn; raises `NotHere` with the reason."""
    oracle: Oracle

    def cases(self, full: bool) -> list[Case]:
        return self.full() if full else self.quick()
