"""A real fine-tune: MiniLM on movie reviews, LoRA by PEFT or adapters by AdapterHub, eager and accelerated in turns.

Three models take turns, step by step, on the same batches with the same random numbers:

- *eager*: the library's model, see `methods`, with a trained head;
- *accelerated*: the same after `pelt_fast.accelerate(model)`;
- *frozen*: only the head is trained, but the gradient goes back exactly as far as in the other two.
  Its time is the floor, and its accuracy is what the head alone can do.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn

import pelt_fast

from . import data, memory
from .case import DTYPES
from .methods import METHODS, freeze
from .probe import has_fast_bf16
from .timing import Overhead, Stat, overhead

KINDS = ("eager", "accelerated", "frozen")
WARM_UP_STEPS = 3
MIN_STEPS = 50
"""Fewer teach nothing; a plan with fewer is there for its step times."""


@dataclass(frozen=True)
class Plan:
    """One method's runs in one dtype: each seed trains ``steps`` steps of ``batch`` x ``length`` tokens."""

    method: str
    dtype: str
    budget_s: float
    steps: int
    batch: int = 16
    length: int = 32
    max_seeds: int = 5
    held_out: int = 512
    note: str = ""

    @property
    def trains(self) -> bool:
        """Whether it runs long enough to learn; else only its step times mean something."""
        return self.steps >= MIN_STEPS


@dataclass
class Run:
    """One kind of model over all seeds."""

    losses: list[list[float]] = field(default_factory=list)
    """Per seed, the training loss of each step."""
    accuracy: list[float] = field(default_factory=list)
    """Per seed, on held-out text after the last step."""
    step_s: list[float] = field(default_factory=list)
    """First seed: forward, backward and optimizer, after the warm-up."""
    model_s: list[float] = field(default_factory=list)
    """First seed: forward and backward."""
    saved_bytes: int | None = None
    peak_bytes: int | None = None

    @property
    def step_ms(self) -> Stat:
        return Stat.of(self.step_s)

    @property
    def model_ms(self) -> Stat:
        return Stat.of(self.model_s)


@dataclass
class FineTune:
    """What one plan gave."""

    plan: Plan
    runs: dict[str, Run]
    replaced: str
    """What `accelerate` said."""

    @property
    def overhead(self) -> Overhead | None:
        """Of forward and backward."""
        return overhead(*(self.runs[kind].model_s for kind in ("frozen", "eager", "accelerated")))

    @property
    def step_overhead(self) -> Overhead | None:
        """Of the whole step: with the optimizer's work on the LoRA weights, the same for both."""
        return overhead(*(self.runs[kind].step_s for kind in ("frozen", "eager", "accelerated")))


Tell = Callable[[str, float], None]
"""Told what goes on and which fraction of the plan is done."""


def plans(method: str, device: torch.device, budget_s: float, full: bool) -> list[Plan]:
    """fp32 everywhere; bf16 trained where the machine has it, else timed in a few tiny steps."""
    size = {"steps": 400, "held_out": 2000} if full else {"steps": 100, "held_out": 512}
    size["max_seeds"] = 5 if full else 1  # in a short run one seed, with steps enough to learn
    size["batch"], size["length"] = (64, 64) if device.type == "cuda" else (16, 32)
    if has_fast_bf16(device):
        shares = {"bf16": 0.6, "fp32": 0.4}
        return [Plan(method, dtype, share * budget_s, **size) for dtype, share in shares.items()]
    slow = "this CPU has no fast bf16: a few tiny steps, timed but not trained"
    tiny = {"steps": 8, "batch": 1, "length": 16, "max_seeds": 1, "note": slow}
    return [
        Plan(method, "fp32", 0.88 * budget_s, **size),
        Plan(method, "bf16", 0.12 * budget_s, **tiny),
    ]


def finetune(plan: Plan, device: torch.device, tell: Tell = lambda text, done: None) -> FineTune:
    """Runs a plan: the first seed timed, with all kinds; further seeds while the budget lasts."""
    started = time.monotonic()
    train, held_out = data.load_reviews(train=6000, held_out=plan.held_out, length=plan.length)
    runs = {kind: Run() for kind in KINDS}
    what = f"{plan.method} {plan.dtype}"
    tell(f"{what}: loading, warming up", 0.0)
    plan = _prepare(plan, train, runs, device)
    replaced = ""
    longest = 0.0
    for seed in range(plan.max_seeds):
        begun = time.monotonic()
        if seed > 0 and begun - started + longest > plan.budget_s:
            break
        kinds = KINDS if seed == 0 else KINDS[:2]
        trainees = {kind: Trainee(kind, plan, seed, device) for kind in kinds}
        replaced = replaced or trainees["accelerated"].report
        for kind in kinds:
            runs[kind].losses.append([])
        for step, batch in enumerate(_batches(train, plan, seed, device)):
            for kind in kinds if step % 2 == 0 else kinds[::-1]:
                seconds = trainees[kind].step(batch, random_seed=seed * 100_003 + step)
                runs[kind].losses[-1].append(seconds.loss)
                if seed == 0 and step >= WARM_UP_STEPS:
                    runs[kind].model_s.append(seconds.model)
                    runs[kind].step_s.append(seconds.step)
            now = ", ".join(f"{kind} {runs[kind].losses[-1][-1]:.3f}" for kind in kinds)
            late = time.monotonic() - started > 2 * plan.budget_s
            if late and 2 * WARM_UP_STEPS < step + 1 < plan.steps:
                break  # a machine that has become busy must not take for ever
            done = (step + 1) / plan.steps
            tell(f"{what} seed {seed} step {step + 1}/{plan.steps}: loss {now}", done)
        if len(runs["eager"].losses[-1]) < plan.steps:
            if seed == 0:
                plan = _cut(plan, len(runs["eager"].losses[-1]))
            else:
                for kind in kinds:
                    runs[kind].losses.pop()  # the seeds before it are whole
            break
        if plan.trains:
            for kind in kinds:
                tell(f"{what} seed {seed}: held-out accuracy, {kind}", 1.0)
                runs[kind].accuracy.append(trainees[kind].accuracy(held_out))
        longest = max(longest, time.monotonic() - begun)
    return FineTune(plan, runs, replaced)


def _prepare(plan: Plan, train: data.Split, runs: dict[str, Run], device: torch.device) -> Plan:
    """Watches memory, which also warms up, and fits the number of steps to the budget."""
    trainees = {kind: Trainee(kind, plan, 0, device) for kind in KINDS}
    batch = train.batch(torch.arange(plan.batch), device)
    for kind, trainee in trainees.items():
        trainee.forward_backward(batch)
        known = [*trainee.model.parameters(), *trainee.model.buffers(), *batch.values()]
        run = runs[kind]
        run.saved_bytes = memory.saved_bytes(partial(trainee.loss, batch, 0), known)
        run.peak_bytes = memory.peak_bytes(partial(trainee.forward_backward, batch), device)
    if not plan.trains:
        return plan
    started = time.monotonic()
    for trainee in trainees.values():
        trainee.forward_backward(batch)
    one_round = time.monotonic() - started
    fits = plan.budget_s / one_round
    # of several seeds the first may take 60 %: a second one, without the frozen model, takes the rest
    share = 0.6 if plan.max_seeds > 1 else 0.85
    steps = min(plan.steps, max(MIN_STEPS, int(share * fits)))
    if steps <= 2 * fits:
        return replace(plan, steps=steps)
    return _cut(plan, max(2 * WARM_UP_STEPS, int(fits)))


def _cut(plan: Plan, steps: int) -> Plan:
    """Too slow to train here: what was done is there for its step times."""
    kept = [part for part in plan.note.split("; ") if part and not part.startswith("cut to ")]
    note = "; ".join([*kept, f"cut to {steps} steps to keep to the time budget"])
    return replace(plan, steps=min(steps, MIN_STEPS - 1), note=note)


class Seconds(NamedTuple):
    """One step: forward and backward; with the optimizer; and the loss that it had."""

    model: float
    step: float
    loss: float


class Trainee:
    """A model with its optimizer. The same seed gives each kind the same head and adapters."""

    def __init__(self, kind: str, plan: Plan, seed: int, device: torch.device) -> None:
        torch.manual_seed(seed)
        self.kind, self._device = kind, device
        self.report = ""
        self.model = _classifier(DTYPES[plan.dtype]).to(device)
        method = METHODS[plan.method]
        self.model = freeze(self.model, method) if kind == "frozen" else method.tune(self.model)
        if kind == "accelerated":
            self.report = str(pelt_fast.accelerate(self.model))
        self.model.train()
        self._trained = [p for p in self.model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=method.learning_rate, fused=True)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer,
            lambda step: min(1.0, (step + 1) / 10) * max(0.0, 1 - step / plan.steps),
        )

    def loss(self, batch: dict[str, Tensor], random_seed: int) -> Tensor:
        torch.manual_seed(random_seed)  # the same dropout in every kind
        return self.model(**batch).loss

    def step(self, batch: dict[str, Tensor], random_seed: int) -> Seconds:
        start = self._now()
        loss = self.loss(batch, random_seed)
        loss.backward()
        middle = self._now()
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()
        return Seconds(middle - start, self._now() - start, loss.item())

    @torch.no_grad()
    def accuracy(self, split: data.Split, batch: int = 64) -> float:
        self.model.eval()
        right = 0
        for index in torch.arange(len(split)).split(batch):
            inputs = split.batch(index, self._device)
            labels = inputs.pop("labels")
            right += int((self.model(**inputs).logits.argmax(-1) == labels).sum())
        self.model.train()
        return right / len(split)

    def forward_backward(self, batch: dict[str, Tensor]) -> None:
        """Leaves no trace in the training."""
        self.loss(batch, random_seed=0).backward()
        self._optimizer.zero_grad()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _classifier(dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.set_verbosity_error()  # says that the head is new, three times per seed
    model: nn.Module = AutoModelForSequenceClassification.from_pretrained(
        data.model_dir(), num_labels=2, local_files_only=True
    )
    return model.to(dtype)


def _batches(
    split: data.Split, plan: Plan, seed: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(split), generator=generator)
    for step in range(plan.steps):
        start = step * plan.batch % (len(split) - plan.batch + 1)
        yield split.batch(order[start : start + plan.batch], device)


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Mean, and standard deviation over seeds (0 for one seed)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
