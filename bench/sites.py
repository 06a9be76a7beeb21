"""`python -m bench.sites`: what IA³, BitFit, diff pruning and masking cost at one linear.

The figures of docs/delta_tuning.md. One thread, processor time, contenders in turns, the least of many rounds: a busy
machine disturbs these least. IA³ is PEFT's layer, BitFit a linear whose bias trains. Times are of a forward and a
backward into x and what is tuned; *infer* of a forward without gradients. Needs `.[bench,hf]`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .delta.cases import KINDS, DeltaCase
from .delta.contenders import build, draw

SHAPES = ((1024, 768, 768), (1024, 3072, 768), (32, 768, 768), (32, 3072, 768))
"""BERT-base's linears at B = 8, L = 128 and at B = 1, L = 32."""
Step = Callable[[], Any]


def least(steps: dict[str, Step], seconds: float) -> dict[str, float]:
    """Milliseconds of each, the least of as many rounds as fit."""
    found = dict.fromkeys(steps, float("inf"))
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < 5 or time.perf_counter() < end:
        turn = list(steps.items())
        for name, step in turn if rounds % 2 else reversed(turn):
            start = time.process_time_ns()
            step()
            found[name] = min(found[name], (time.process_time_ns() - start) / 1e6)
        rounds += 1
    return found


def layers(n_in: int, n_out: int) -> dict[str, tuple[nn.Module, list[Tensor]]]:
    """By method, a layer and what it trains."""
    from peft import IA3Config
    from peft.tuners.ia3.layer import Linear

    def linear() -> nn.Linear:
        return nn.Linear(n_in, n_out).requires_grad_(False)

    found: dict[str, tuple[nn.Module, list[Tensor]]] = {"frozen": (linear(), [])}
    for name, feedforward in (("IA³, l ⊙ y", False), ("IA³, l ⊙ x", True)):
        config = IA3Config(target_modules=["x"], feedforward_modules=["x"])
        layer: Any = Linear(linear(), "a", is_feedforward=feedforward, config=config)
        layer.requires_grad_(False)
        scale = layer.ia3_l["a"]
        nn.init.normal_(scale.requires_grad_(), 1.0, 0.1)
        found[name] = (layer, [scale])
    bitfit = linear()
    found["BitFit"] = (bitfit, [bitfit.bias.requires_grad_()])
    return found


def steps_of(tokens: int, n_in: int, n_out: int, train: bool) -> dict[str, Step]:
    x, dy = torch.randn(tokens, n_in, requires_grad=True), torch.randn(tokens, n_out)

    def step(layer: nn.Module, trained: list[Tensor]) -> Step:
        if train:
            return lambda: torch.autograd.grad(layer(x), [x, *trained], dy)
        return lambda: torch.no_grad()(layer)(x)

    return {name: step(*found) for name, found in layers(n_in, n_out).items()}


def delta_steps(tokens: int, n_in: int, n_out: int, kind: str) -> dict[str, Step]:
    case = DeltaCase("fp32", tokens, n_in, n_out, kind=kind)
    inputs = draw(case, torch.device("cpu"))
    contenders = {name: build(name, case, inputs) for name in ("full", "eager", "ours")}
    return {name: contender.run for name, contender in contenders.items()}


def line(title: str, found: dict[str, float], floor: str) -> str:
    cells = [f"{name} {t:.2f} ms ({t / found[floor]:.2f} ×)" for name, t in found.items()]
    return f"{title}: " + ", ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each line")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    for shape in SHAPES:
        name = "{} × {} → {}".format(*shape)
        for train in (False, True):
            found = least(steps_of(*shape, train), seconds)
            if not train:
                del found["BitFit"]  # nothing is added
            print(line(f"{name} {'train' if train else 'infer'}", found, "frozen"), flush=True)
        for kind in KINDS:
            found = least(delta_steps(*shape, kind), seconds)
            print(line(f"{name} {kind}", found, "full"), flush=True)


if __name__ == "__main__":
    main()
