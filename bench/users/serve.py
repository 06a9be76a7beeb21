"""A shuffled stream of requests by 64 users: mixed batches, a loop over users, merging for each, no adapters."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import pelt_fast

from ..data import Split
from ..timing import Stat, clock_for, interleave
from .layers import Merged, looped, segments_of, stacks, use_segments
from .train import USERS, Batch, Trainee, gathered, head_of, pooled

BATCH = 32
CLASSES = 3
NAMES = ("none", "ours", "loop", "merged", "merged by user")
"""*merged by user* sees the whole stream before it begins, and merges each adapter once."""


@dataclass
class Serving:
    """By contender."""

    requests: int
    batch: int
    seconds: dict[str, list[float]]
    """Of the whole stream, each round."""
    errors: dict[str, float]
    """Largest distance of a logit from fp64."""
    wrong: dict[str, str] = field(default_factory=dict)
    adapter_bytes: int = 0
    merged_bytes: int = 0
    """What a merged copy of the changed weights for each user would take."""

    def stats(self) -> dict[str, Stat]:
        return {name: Stat.of(taken) for name, taken in self.seconds.items()}


class Heads:
    """Everybody's, side by side; who has fewer classes never chooses the rest."""

    def __init__(self, trainee: Trainee, device: torch.device) -> None:
        features: int = trainee.model.config.hidden_size  # type: ignore[union-attr, assignment]
        self.weight = torch.zeros(USERS, CLASSES, features, device=device)
        self.bias = torch.full((USERS, CLASSES), -1e4, device=device)
        for user in range(USERS):
            head = trainee.heads.get(user) or head_of(user, features, device)
            self.weight[user, : head.out_features] = head.weight.detach()
            self.bias[user, : head.out_features] = head.bias.detach()

    def __call__(self, features: Tensor, users: Sequence[int]) -> Tensor:
        ids = torch.tensor(users, device=features.device)
        weight, bias = self.weight[ids].to(features.dtype), self.bias[ids].to(features.dtype)
        return torch.baddbmm(bias.unsqueeze(2), weight, features.unsqueeze(2)).squeeze(2)


class Service:
    """The ways to answer a stream; each returns the logits in the order of the requests."""

    def __init__(self, base: nn.Module, trainee: Trainee, device: torch.device) -> None:
        self._base, self._ours, self._device = base, trainee.model, device
        self._loop, self._merged = looped(trainee.model), Merged(base, trainee.model)
        self._heads = Heads(trainee, device)
        self.ways: dict[str, Callable[[Sequence[Batch]], Tensor]] = {
            "none": lambda stream: self._each(stream, lambda b: pooled(self._base, b)),
            "ours": lambda stream: self._each(stream, self._mixed),
            "loop": lambda stream: self._each(stream, lambda b: self._looped(self._loop, b)),
            "merged": lambda stream: self._each(stream, lambda b: self._one_by_one(b, len(b.users))),
            "merged by user": lambda stream: self._each([_joined(stream)], lambda b: self._one_by_one(b, BATCH)),
        }  # fmt: skip

    def exact(self, stream: Sequence[Batch]) -> Tensor:
        """In fp64, user by user."""
        model = copy.deepcopy(self._loop).double()
        return self._each(stream, lambda batch: self._looped(model, batch))

    def _each(self, stream: Sequence[Batch], features: Callable[[Batch], Tensor]) -> Tensor:
        with torch.no_grad():
            return torch.cat([self._heads(features(batch), batch.users) for batch in stream])

    def _mixed(self, batch: Batch) -> Tensor:
        length = batch.input_ids.shape[1]
        plan = pelt_fast.MultiAdapterPlan.from_samples(
            batch.users, length, USERS, device=self._device
        )
        with pelt_fast.use_plan(plan):
            return pooled(self._ours, batch)

    def _looped(self, model: nn.Module, batch: Batch) -> Tensor:
        with use_segments(segments_of(batch.users, self._device)):
            return pooled(model, batch)

    def _one_by_one(self, batch: Batch, most: int) -> Tensor:
        parts = []
        segments = segments_of(batch.users, self._device)
        for user, rows in segments:
            with self._merged.use(user):
                for some in rows.split(most):
                    part = _picked(batch, some)
                    parts.append(pooled(self._merged.model, part))
        features = torch.cat(parts)
        found = torch.empty_like(features)
        found[torch.cat([rows for _, rows in segments])] = features
        return found


def _picked(batch: Batch, rows: Tensor) -> Batch:
    tensors = (batch.input_ids[rows], batch.attention_mask[rows], batch.labels[rows])
    return Batch(*tensors, [batch.users[i] for i in rows.tolist()])


def _joined(stream: Sequence[Batch]) -> Batch:
    return Batch(
        torch.cat([b.input_ids for b in stream]),
        torch.cat([b.attention_mask for b in stream]),
        torch.cat([b.labels for b in stream]),
        [user for b in stream for user in b.users],
    )


def stream_of(
    splits: Sequence[Split], each: int, device: torch.device, batch: int = BATCH
) -> list[Batch]:
    """``each`` requests of every user, shuffled; held-out texts of the user's task."""
    places = [(user, i % len(splits[user % len(splits)])) for user in range(USERS) for i in range(each)]  # fmt: skip
    random.Random(1).shuffle(places)
    return [gathered(splits, places[i : i + batch], device) for i in range(0, len(places), batch)]


def populate(trainee: Trainee) -> None:
    """Every second of the others copies an adapter that was trained; the rest stay random."""
    trained = len(trainee.heads)
    for layer in stacks(trainee.model):
        for user in range(trained, USERS, 2):
            layer.load_adapter(user, *layer.state_of(user % trained))


def serve(
    base: nn.Module,
    trainee: Trainee,
    splits: Sequence[Split],
    each: int,
    budget_s: float,
    device: torch.device,
) -> Serving:
    populate(trainee)
    service, stream = Service(base, trainee, device), stream_of(splits, each, device)
    exact = service.exact(stream[:1])
    errors, scale = {}, float(exact[exact > -1e3].abs().max())
    for name, way in service.ways.items():
        if name != "none":
            errors[name] = float((way(stream[:1]).double() - exact).abs().max())
    # as in the kernel tables: twice the error of the eager loop, and a rounding
    most = 2 * errors["loop"] + torch.finfo(torch.float32).eps * scale
    wrong = {
        name: f"{error:.3g} from fp64, allowed {most:.3g}"
        for name, error in errors.items()
        if not error <= most
    }
    steps: dict[str, Any] = {
        name: SimpleNamespace(forward=lambda way=way: way(stream), backward=None)
        for name, way in service.ways.items()
        if name not in wrong
    }
    taken = interleave(steps, clock_for(device), budget_s, min_rounds=3, max_rounds=30)
    layers = stacks(trainee.model)
    return Serving(
        USERS * each,
        BATCH,
        {name: [sample.forward for sample in samples] for name, samples in taken.items()},
        errors,
        wrong,
        sum(4 * (layer.lora_a.numel() + layer.lora_b.numel()) for layer in layers),
        sum(4 * USERS * layer.base_layer.weight.numel() for layer in layers),
    )
