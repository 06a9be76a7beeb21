"""Eight users train at once, each on a task of its own, in batches that mix them; and each alone, on the same samples.

No dropout is on, so that losses are comparable step by step. A user whose samples are not in a batch takes no step.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pelt_fast

from ..data import Split
from ..timing import Stat, turns
from .layers import (
    StackedAdamW,
    looped,
    segments_of,
    stacked,
    stacks,
    targets,
    use_segments,
    with_layers,
)
from .tasks import TASKS

USERS = 64
LEARNING_RATE = 2e-3
SEED = 7
NOBODY = -1
KINDS = ("mixed", "loop", "alone", "frozen")
Tell = Callable[[str, float], None]


@dataclass(frozen=True)
class Plan:
    """``present`` of the users send ``samples`` of ``length`` tokens in each step."""

    steps: int
    budget_s: float
    verified: int  # users that train once more, among strangers
    timed: int  # steps in which the loop and the frozen model run too
    present: int = 6
    samples: int = 3
    length: int = 32
    train: int = 300
    held_out: int = 96


@dataclass(frozen=True)
class Batch:
    """Samples in any order; ``users`` says whose each is."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    users: list[int]

    def of(self, user: int) -> Batch:
        """This user's samples alone, in the same order."""
        rows = self.rows(user)
        return Batch(
            self.input_ids[rows],
            self.attention_mask[rows],
            self.labels[rows],
            [user] * len(rows),
        )

    def rows(self, user: int) -> Tensor:
        found = [i for i, u in enumerate(self.users) if u == user]
        return torch.tensor(found, device=self.labels.device)

    @property
    def who(self) -> list[int]:
        return sorted(set(self.users))


def batches(
    splits: Sequence[Split], plan: Plan, device: torch.device, seed: int = SEED
) -> Iterator[Batch]:
    """Each user's samples come in an order of their own; users come and go."""
    chance = random.Random(seed)
    orders = [chance.sample(range(len(split)), len(split)) for split in splits]
    used = [0] * len(splits)
    for _ in range(plan.steps):
        places = []
        for user in chance.sample(range(len(splits)), min(plan.present, len(splits))):
            for _ in range(plan.samples):
                places.append((user, orders[user][used[user] % len(orders[user])]))
                used[user] += 1
        chance.shuffle(places)
        yield gathered(splits, places, device)


def gathered(
    splits: Sequence[Split], places: Sequence[tuple[int, int]], device: torch.device
) -> Batch:
    """Samples by (user, number), of the user's task."""
    chosen = [(splits[user % len(splits)], i) for user, i in places]
    return Batch(
        torch.stack([split.input_ids[i] for split, i in chosen]).to(device),
        torch.stack([split.attention_mask[i] for split, i in chosen]).to(device),
        torch.stack([split.labels[i] for split, i in chosen]).to(device),
        [user for user, _ in places],
    )


def pooled(model: nn.Module, batch: Batch) -> Tensor:
    """The mean over a sample's tokens, as this model was trained."""
    hidden = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    mask = batch.attention_mask.unsqueeze(-1).to(hidden.last_hidden_state.dtype)
    mean: Tensor = (hidden.last_hidden_state * mask).sum(1) / mask.sum(1)
    return mean


def head_of(user: int, features: int, device: torch.device) -> nn.Linear:
    """The same wherever this user trains."""
    generator = torch.Generator().manual_seed(1000 + user)
    head = nn.Linear(features, TASKS[user % len(TASKS)].classes)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * features**-0.5)
        head.bias.zero_()
    return head.to(device)


class Trainee:
    """A model with adapters, heads for some of its users, and their optimizers."""

    def __init__(self, model: nn.Module, adapter_of: dict[int, int], device: torch.device) -> None:
        """``adapter_of``: where a user's adapter stands in the stack; anybody else has none."""
        self.model, self.adapter_of, self._device = model, adapter_of, device
        self.adapters = len(stacks(model)[0].lora_a) if stacks(model) else 1
        features: int = model.config.hidden_size  # type: ignore[union-attr, assignment]
        self.heads = {user: head_of(user, features, device) for user in adapter_of}
        self._heads_steps = {
            user: torch.optim.AdamW(head.parameters(), lr=LEARNING_RATE)
            for user, head in self.heads.items()
        }
        parameters = [p for layer in stacks(model) for p in (layer.lora_a, layer.lora_b)]
        self._steps = StackedAdamW(parameters, LEARNING_RATE) if parameters else None

    def plan(self, batch: Batch) -> pelt_fast.MultiAdapterPlan:
        ids = [self.adapter_of.get(user, NOBODY) for user in batch.users]
        return pelt_fast.MultiAdapterPlan.from_samples(
            ids, batch.input_ids.shape[1], self.adapters, device=self._device
        )

    def forward_backward(self, batch: Batch) -> dict[int, float]:
        """The loss of each user who has a head; gradients stay where they are."""
        with (
            pelt_fast.use_plan(self.plan(batch)),
            use_segments(segments_of(batch.users, self._device)),
        ):
            features = pooled(self.model, batch)
        losses = {}
        for user in batch.who:
            if user in self.heads:
                rows = batch.rows(user)
                losses[user] = F.cross_entropy(self.heads[user](features[rows]), batch.labels[rows])
        torch.stack(list(losses.values())).sum().backward()
        return {user: loss.item() for user, loss in losses.items()}

    def update(self, batch: Batch) -> None:
        """Those who were in the batch take a step."""
        if self._steps is not None:
            self._steps.step(self.plan(batch))
        for user in batch.who:
            if user in self.heads:
                self._heads_steps[user].step()
        self.forget()

    def forget(self) -> None:
        for module in (self.model, *self.heads.values()):
            module.zero_grad(set_to_none=True)

    @torch.no_grad()
    def accuracy(self, splits: Sequence[Split], size: int = 48) -> dict[int, float]:
        """On held-out text, all users' samples mixed."""
        places = [(user, i) for i in range(len(splits[0])) for user in self.heads]
        right = dict.fromkeys(self.heads, 0)
        for start in range(0, len(places), size):
            batch = gathered(splits, places[start : start + size], self._device)
            with pelt_fast.use_plan(self.plan(batch)):
                features = pooled(self.model, batch)
            for user in batch.who:
                rows = batch.rows(user)
                found = self.heads[user](features[rows]).argmax(-1)
                right[user] += int((found == batch.labels[rows]).sum())
        return {user: count / len(splits[user]) for user, count in right.items()}


@dataclass
class Training:
    """What came of it; by user."""

    plan: Plan
    mixed: Trainee
    losses: dict[str, dict[int, list[float]]]
    """Mixed and alone, each step that a user took."""
    accuracy: dict[int, float]
    apart: dict[int, float]
    """How far the adapters of mixed and alone have come apart, relative to how far they have moved."""
    among_strangers: dict[int, bool]
    """Losses and adapters are bitwise those of the mixed run, where the others of the batch have no adapter and no
    loss: the frozen part then computes the same numbers."""
    gradients: tuple[int, int]
    """How many of the adapters' gradients are bitwise those of the same rows alone in their layer; of how many."""
    others_unchanged: bool
    seconds: dict[str, list[float]] = field(default_factory=dict)

    @property
    def largest_difference(self) -> float:
        """Of a loss, between mixed and alone."""
        mixed, alone = self.losses["mixed"], self.losses["alone"]
        return max(abs(a - b) for u in mixed for a, b in zip(mixed[u], alone[u], strict=True))

    def stats(self) -> dict[str, Stat]:
        """Forward and backward of a step."""
        return {kind: Stat.of(taken) for kind, taken in self.seconds.items() if taken}


def train(
    base: nn.Module,
    splits: Sequence[tuple[Split, Split]],
    plan: Plan,
    device: torch.device,
    tell: Tell,
) -> Training:
    users = range(len(splits))
    taught, held_out = [s[0] for s in splits], [s[1] for s in splits]
    torch.manual_seed(SEED)
    model = stacked(base, USERS)
    fill(model, range(len(splits), USERS))
    mixed = Trainee(model, {user: user for user in users}, device)
    alone = {user: Trainee(_only(base, model, user), {user: 0}, device) for user in users}
    strangers = {
        user: Trainee(_only(base, model, user), {user: 0}, device) for user in range(plan.verified)
    }
    rivals = {
        "loop": Trainee(looped(model), mixed.adapter_of, device),
        "frozen": Trainee(_frozen(base), mixed.adapter_of, device),
    }
    before = [p.detach().clone() for p in _stacks_of(model)]
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    losses: dict[str, dict[int, list[float]]] = {
        kind: {user: [] for user in users} for kind in ("mixed", "alone", "strangers")
    }

    def run(kind: str, batch: Batch) -> None:
        parts = [(mixed, batch)] if kind == "mixed" else []
        if kind in rivals:
            parts = [(rivals[kind], batch)]
        if kind == "alone":
            parts = [(alone[user], batch.of(user)) for user in batch.who]
        start = _now(device)
        found: dict[int, float] = {}
        for trainee, part in parts:
            found |= trainee.forward_backward(part)
        seconds[kind].append(_now(device) - start)
        for user, loss in found.items() if kind in losses else ():
            losses[kind][user].append(loss)

    plan = _fitted(
        plan, taught, mixed, [*alone.values()][: plan.present], strangers, rivals, device
    )
    order = turns(KINDS)
    for step, batch in enumerate(batches(taught, plan, device)):
        for kind in next(order):
            if kind in ("mixed", "alone") or step < plan.timed:
                run(kind, batch)
            if kind in rivals:
                rivals[kind].forget()
        for user, trainee in strangers.items():
            if user in batch.who:
                losses["strangers"][user].append(trainee.forward_backward(batch)[user])
                trainee.update(batch)
        mixed.update(batch)
        for user in batch.who:
            alone[user].update(batch.of(user))
        mean = sum(found[-1] for found in losses["mixed"].values() if found) / len(users)
        tell(f"users: step {step + 1}/{plan.steps}, mean loss {mean:.3f}", (step + 1) / plan.steps)
    rest = slice(len(splits), None)
    return Training(
        plan,
        mixed,
        losses,
        mixed.accuracy(held_out),
        {user: _apart(model, alone[user].model, before, user) for user in users},
        {
            user: losses["strangers"][user] == losses["mixed"][user]
            and _apart(model, trainee.model, before, user) == 0
            for user, trainee in strangers.items()
        },
        _same_gradients(mixed, batch),
        all(torch.equal(p[rest], was[rest]) for p, was in zip(_stacks_of(model), before, strict=True)),
        seconds,
    )  # fmt: skip


def fill(model: nn.Module, users: Sequence[int]) -> None:
    """Adapters that other people trained; here drawn at random."""
    with torch.no_grad():
        for layer in stacks(model):
            for user in users:
                layer.lora_b[user].normal_(std=0.02)


def _stacks_of(model: nn.Module) -> list[Tensor]:
    return [p.detach() for layer in stacks(model) for p in (layer.lora_a, layer.lora_b)]


def _only(base: nn.Module, model: nn.Module, user: int) -> nn.Module:
    """A model with this one adapter."""
    own = stacked(base, 1)
    for mine, all_of_them in zip(stacks(own), stacks(model), strict=True):
        mine.load_adapter(0, *all_of_them.state_of(user))
    return own


def _frozen(base: nn.Module) -> nn.Module:
    """Without adapters; the gradient goes back as far as it does with them."""
    model = with_layers(base, lambda linear: linear)

    def require_grad(module: nn.Module, args: object, output: Tensor) -> None:
        if torch.is_grad_enabled() and not output.requires_grad:
            output.requires_grad_(True)

    for module, name in targets(model):
        getattr(module, name).register_forward_hook(require_grad)
    return model


def _fitted(
    plan: Plan,
    taught: Sequence[Split],
    mixed: Trainee,
    alone: Sequence[Trainee],
    strangers: dict[int, Trainee],
    rivals: dict[str, Trainee],
    device: torch.device,
) -> Plan:
    """As many steps as the budget has time for, after a warm-up that changes nothing."""
    batch = next(batches(taught, plan, device, seed=0))
    whole = [mixed, *rivals.values()]
    for _ in range(2):
        took = []
        for trainee in (*whole, *alone):
            user = next(iter(trainee.adapter_of))
            start = _now(device)
            part = (
                batch
                if trainee in whole
                else Batch(*_first(batch, plan.samples), [user] * plan.samples)
            )
            trainee.forward_backward(part)
            took.append(_now(device) - start)
            trainee.forget()
    one_step = took[0] * (1 + len(strangers)) + sum(took[len(whole) :])
    left = plan.budget_s - plan.timed * sum(took[1 : len(whole)])
    steps = max(plan.timed, min(plan.steps, int(left / one_step)))
    return Plan(**{**vars(plan), "steps": steps})


def _first(batch: Batch, count: int) -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.zeros_like(batch.labels[:count])
    return batch.input_ids[:count], batch.attention_mask[:count], labels


def _apart(model: nn.Module, other: nn.Module, before: Sequence[Tensor], user: int) -> float:
    pairs = list(zip(_stacks_of(model), _stacks_of(other), before, strict=True))
    far = sum(float((a[user] - b[0]).double().square().sum()) for a, b, _ in pairs)
    moved = sum(float((a[user] - was[user]).double().square().sum()) for a, _, was in pairs)
    return (far / moved) ** 0.5 if moved else 0.0


def _same_gradients(trainee: Trainee, batch: Batch) -> tuple[int, int]:
    """Of a mixed batch, layer by layer: are an adapter's gradients those of its own rows alone, bit by bit?"""
    seen: dict[nn.Module, list[Tensor]] = {}

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen[module] = [args[0].detach()]
        output.register_hook(lambda dy: seen[module].append(dy.detach()))

    handles = [layer.register_forward_hook(keep) for layer in stacks(trainee.model)]
    trainee.forward_backward(batch)
    for handle in handles:
        handle.remove()
    equal = count = 0
    for layer in stacks(trainee.model):
        x, dy = seen[layer]
        for user in batch.who:
            adapter, rows = trainee.adapter_of[user], batch.rows(user)
            mine, back = x[rows], dy[rows]
            plan = pelt_fast.MultiAdapterPlan.from_samples(
                [adapter] * len(rows), x.shape[1], trainee.adapters, device=x.device
            )
            y = pelt_fast.functional.multi_lora(
                *(mine, layer.lora_a, layer.lora_b, plan, layer.scaling), ranks=layer.ranks
            )
            alone = torch.autograd.grad(y, (layer.lora_a, layer.lora_b), back)
            for parameter, gradient in zip((layer.lora_a, layer.lora_b), alone, strict=True):
                assert parameter.grad is not None
                equal += torch.equal(parameter.grad[adapter], gradient[adapter])
                count += 1
    trainee.forget()
    return equal, count


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
