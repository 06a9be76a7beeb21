"""What a method costs: parameters, time of a step and of inference, peak memory; eager and accelerated.

Of each method three models take turns in one process on the same batch: fine-tuning, eager, accelerated. Ratios are
of their fastest rounds, since whatever else the machine does can only make a round slower.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import pelt_fast

from .. import memory
from ..timing import clock_for, interleave
from .material import Texts
from .methods import FINE_TUNING, METHODS, trained
from .train import Study, Trainer, order

SMALL_BATCH, SMALL_LENGTH = 1, 32
AGREE_STEPS = 10
PERTURBED = 0.05
Batch = dict[str, Tensor]


@dataclass
class Timed:
    """For `bench.timing`: one call, without a backward of its own."""

    forward: Callable[[], Any]
    backward: None = None


def cost(
    study: Study, name: str, task: str, seconds: float, tell: Callable[[str, float], None]
) -> dict[str, Any]:
    """Of one method; ``seconds`` for each of the three timings."""
    method, plan, device = METHODS[name], study.protocol, study.device
    classes = study.task(task).classes
    models = {FINE_TUNING: study.tuned(METHODS[FINE_TUNING], classes)}
    report = ""
    if name != FINE_TUNING:
        models["eager"] = study.tuned(method, classes)
    if method.in_library:
        models["accelerated"] = study.tuned(method, classes)
        report = str(pelt_fast.accelerate(models["accelerated"]))
    mine = models.get("eager", models[FINE_TUNING])
    counted = asdict(trained(mine))
    long = study.material.long(plan.batch, plan.length)
    batch = long.batch(range(len(long)), device)
    short = Texts([long.ids[0][:SMALL_LENGTH]], [0]).batch(range(SMALL_BATCH), device)
    trainers = {kind: Trainer(model, 0.0, 1 << 20) for kind, model in models.items()}
    times: dict[str, Any] = {}
    tell(f"{name}: training steps", 0.0)
    times["train"] = _times(
        {k: Timed(_step(t, batch)) for k, t in trainers.items()}, study, seconds
    )
    tell(f"{name}: memory", 0.4)
    peak = {kind: _peak(trainer, batch, device) for kind, trainer in trainers.items()}
    for model in models.values():
        model.eval()
    tell(f"{name}: inference", 0.5)
    times["infer"] = _times({k: Timed(_infer(m, batch)) for k, m in models.items()}, study, seconds)
    times["infer_small"] = _times(
        {k: Timed(_infer(m, short)) for k, m in models.items()}, study, seconds
    )
    tell(f"{name}: agreement", 0.9)
    apart = agreement(study, name, task) if method.in_library else None
    return {**counted, "report": report, "times_ms": times, "peak_bytes": peak, "apart": apart}


def agreement(study: Study, name: str, task: str) -> float:
    """Largest relative difference of two losses, eager and accelerated, in the same steps without dropout.

    What is new in the model is drawn at random first: where it begins with zeros, it would hide an error.
    """
    method, plan, device = METHODS[name], study.protocol, study.device
    found = study.task(task)
    train, _ = found.draw(min(AGREE_STEPS * plan.batch, len(found.pool) // 2), 1, 111)
    losses = []
    for kind in ("eager", "accelerated"):
        model = study.tuned(method, found.classes, dropout=0.0)
        _perturb(model, study.material.model(found.classes))
        if kind == "accelerated":
            pelt_fast.accelerate(model)
        trainer = Trainer(model, plan.rate_scale * method.rate, 1 << 20)
        steps = order(len(train), plan.batch, 0)
        losses.append([trainer.step(train.batch(index, device)).item() for index in steps])
    return max(abs(a - b) / abs(a) for a, b in zip(*losses, strict=True))


@torch.no_grad()
def _perturb(model: nn.Module, base: nn.Module) -> None:
    known = {name for name, _ in base.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name not in known:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter.device), alpha=PERTURBED)


def _step(trainer: Trainer, batch: Batch) -> Callable[[], Tensor]:
    return lambda: trainer.step(batch)


def _infer(model: nn.Module, batch: Batch) -> Callable[[], Tensor]:
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}

    def infer() -> Tensor:
        with torch.inference_mode():
            logits: Tensor = model(**inputs).logits
        return logits

    return infer


def _times(steps: dict[str, Timed], study: Study, seconds: float) -> dict[str, dict[str, float]]:
    """Milliseconds by kind: the fastest round, and the median."""
    for step in steps.values():
        step.forward()  # warm
    samples = interleave(steps, clock_for(study.device), seconds)
    found = {}
    for kind, of_kind in samples.items():
        ms = sorted(1e3 * sample.forward for sample in of_kind)
        found[kind] = {
            "fastest": _round(ms[0]),
            "median": _round(ms[len(ms) // 2]),
            "rounds": len(ms),
        }
    return found


def _round(value: float) -> float:
    return float(f"{value:.5g}")


def _peak(trainer: Trainer, batch: Batch, device: torch.device) -> int | None:
    """Weights, the optimizer's state and what a step adds to them at its peak: activations and gradients."""
    grown = memory.peak_bytes(lambda: trainer.step(batch), device)
    if grown is None:
        return None
    held = [*trainer.model.parameters(), *trainer.model.buffers()]
    held += [t for state in trainer.optimizer.state.values() for t in state.values()]
    return grown + sum(tensor.nbytes for tensor in held)
