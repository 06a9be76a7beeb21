"""One run: training with early stopping, and the accuracy on texts that no run has trained on."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pelt_fast

from .material import SOURCES, Material, Task, Texts
from .methods import METHODS, OWN, Method, regularizer
from .protocol import MODEL_SEED, Protocol, Run

Tell = Callable[[str, float], None]
"""Told what goes on and which fraction of the run is done."""
State = dict[str, Tensor]
SOURCE_SEED = 0


@dataclass(frozen=True)
class Fitted:
    """What training did. ``losses`` are means over an epoch; the model has the weights of ``best_epoch``."""

    losses: list[float]
    dev: list[float]
    """Accuracy after each epoch."""
    best_epoch: int
    steps: int


@dataclass(frozen=True)
class Outcome:
    """What a run leaves: ``test`` is the accuracy of the best epoch's weights."""

    test: float
    fitted: Fitted
    seconds: float


class Study:
    """Runs on one material by one protocol; adapters that fusion needs are kept in ``folder``."""

    def __init__(
        self, material: Material, protocol: Protocol, folder: Path, device: torch.device
    ) -> None:
        self.material, self.protocol, self.device = material, protocol, device
        self._folder = folder
        self.task = cache(self._task)

    def run(self, run: Run, tell: Tell) -> Outcome:
        started = time.monotonic()
        task, method = self.task(run.task), METHODS[run.method]
        states = self._adapters(run, tell) if run.method == "fusion" else {}
        model = self.tuned(method, task.classes)
        fill(model, states)
        if run.kind == "accelerated":
            pelt_fast.accelerate(model)
        fitted = self._fit(model, method, task, run, self.protocol, tell)
        if run.method == "adapter" and run.kind == "eager":
            self._keep(run, trained_state(model))
        right = accuracy(model, task.test, self.protocol, self.device)
        return Outcome(right, fitted, time.monotonic() - started)

    def tuned(self, method: Method, classes: int, dropout: float | None = None) -> nn.Module:
        """The same new weights each time."""
        torch.manual_seed(MODEL_SEED)
        model = self.material.model(classes, dropout)
        method.tune(model)
        return model.to(self.device)

    def _task(self, name: str) -> Task:
        return self.material.task(name, self.protocol.length, self.protocol.test)

    def _fit(
        self, model: nn.Module, method: Method, task: Task, run: Run, plan: Protocol, tell: Tell
    ) -> Fitted:
        train, dev = task.draw(run.samples, plan.dev, run.seed)
        return fit(
            model, train, dev, plan.rate_scale * method.rate, plan, self.device,
            lambda text, done: tell(f"{run}: {text}", done),
        )  # fmt: skip

    def _adapters(self, run: Run, tell: Tell) -> dict[str, State]:
        """Of fusion's first stage (ST-A): the task's own adapter of the same samples, and those of the sources."""
        alone = replace(run, method="adapter", kind="eager")
        found = {OWN: self._adapter(alone, self.protocol, tell)}
        # what a source does not need of the protocol is not in its file's name
        plan = replace(self.protocol, epochs=self.protocol.source_epochs)
        for source in SOURCES:
            of_source = Run(source, plan.source_samples, SOURCE_SEED, "adapter", "eager")
            found[source] = self._adapter(of_source, plan, tell)
        return found

    def _adapter(self, run: Run, plan: Protocol, tell: Tell) -> State:
        path = self._path(run)
        if not path.exists():
            task, method = self.task(run.task), METHODS["adapter"]
            model = self.tuned(method, task.classes)
            self._fit(model, method, task, run, plan, tell)
            self._keep(run, trained_state(model))
        state: State = torch.load(path, map_location=self.device)
        return state

    def _keep(self, run: Run, state: State) -> None:
        path = self._path(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path)

    def _path(self, run: Run) -> Path:
        plan = vars(self.protocol)
        setting = "-".join(str(value) for value in plan.values())
        return self._folder / setting / f"{run.task}-{run.samples}-{run.seed}.pt"


def fit(
    model: nn.Module,
    train: Texts,
    dev: Texts,
    rate: float,
    plan: Protocol,
    device: torch.device,
    tell: Tell,
) -> Fitted:
    """AdamW without weight decay, its rate falling linearly to 0 at the last epoch; early stopping by accuracy."""
    trainer = Trainer(model, rate, plan.epochs * -(-len(train) // plan.batch))
    losses: list[float] = []
    right: list[float] = []
    best: State = {}
    for epoch in range(plan.epochs):
        total = 0.0
        for index in order(len(train), plan.batch, epoch):
            total += len(index) * trainer.step(train.batch(index, device)).item()
        losses.append(total / len(train))
        right.append(accuracy(model, dev, plan, device))
        if right[-1] > max(right[:-1], default=-1.0):
            best = trained_state(model)
        best_epoch = right.index(max(right))
        text = (
            f"epoch {epoch + 1}/{plan.epochs} loss {losses[-1]:.3f}, {100 * right[-1]:.1f} % of dev"
        )
        tell(text, (epoch + 1) / plan.epochs)
        if epoch - best_epoch >= plan.patience:
            break
    model.load_state_dict(best, strict=False)
    return Fitted(losses, right, best_epoch, trainer.steps)


class Trainer:
    """A model's steps; the n-th has the same dropout in every model that draws alike."""

    def __init__(self, model: Any, rate: float, planned: int) -> None:
        self.model, self.steps = model.train(), 0
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=rate, weight_decay=0.0, fused=True)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: max(0.0, 1 - step / planned)
        )

    def step(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss, without what regularizes fusion."""
        torch.manual_seed(MODEL_SEED * 100_003 + self.steps)
        loss: Tensor = self.model(**batch).loss
        regular = regularizer(self.model)
        (loss if regular is None else loss + regular).backward()
        self.optimizer.step()
        self._schedule.step()
        self.optimizer.zero_grad()
        self.steps += 1
        return loss.detach()


def order(samples: int, batch: int, epoch: int) -> Iterator[list[int]]:
    found = list(range(samples))
    random.Random(MODEL_SEED * 100_003 + epoch).shuffle(found)
    yield from (found[start : start + batch] for start in range(0, samples, batch))


@torch.no_grad()
def accuracy(model: nn.Module, texts: Texts, plan: Protocol, device: torch.device) -> float:
    """In batches of texts that are about as long, so that little is padded."""
    was = model.training
    model.eval()
    by_length = sorted(range(len(texts)), key=lambda i: len(texts.ids[i]))
    right = 0
    for start in range(0, len(texts), 2 * plan.batch):
        batch = texts.batch(by_length[start : start + 2 * plan.batch], device)
        labels = batch.pop("labels")
        right += int((model(**batch).logits.argmax(-1) == labels).sum())
    model.train(was)
    return right / len(texts)


def trained_state(model: nn.Module) -> State:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def fill(model: nn.Module, states: dict[str, State]) -> None:
    """Each adapter of a fused model gets the weights of one that was trained alone; heads are left where they were."""
    for adapter, state in states.items():
        renamed = {
            name.replace(f".adapters.{OWN}.", f".adapters.{adapter}."): tensor
            for name, tensor in state.items()
            if f".adapters.{OWN}." in name
        }
        unexpected = model.load_state_dict(renamed, strict=False).unexpected_keys
        assert not unexpected, unexpected
