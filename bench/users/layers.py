"""What stands in the place of a linear, per way of serving; and the optimizer, which skips who is not in the batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pelt_fast

RANK, ALPHA = 8, 16.0
TARGETS = ("query", "value")
Segments = list[tuple[int, Tensor]]
"""Users, and their samples in the batch."""


def targets(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """The attention's query and value: the module that has one, and its name there."""
    return [
        (module, name)
        for module in model.modules()
        for name in TARGETS
        if isinstance(getattr(module, name, None), nn.Module)
    ]


def with_layers(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """A copy of the model with the same frozen parameters and other layers in its query and value."""
    shared = {id(p): p for p in [*model.parameters(), *model.buffers()]}
    copied = copy.deepcopy(model, shared)
    for module, name in targets(copied):
        setattr(module, name, make(getattr(module, name)))
    return copied


def stacked(model: nn.Module, adapters: int) -> nn.Module:
    """Ours. A plan says which rows are whose."""
    return with_layers(
        model,
        lambda linear: pelt_fast.nn.MultiLoRALinear.from_linear(
            linear, adapters, RANK, lora_alpha=ALPHA
        ),
    )


def stacks(model: nn.Module) -> list[pelt_fast.nn.MultiLoRALinear]:
    return [m for m in model.modules() if isinstance(m, pelt_fast.nn.MultiLoRALinear)]


class LoopLinear(nn.Module):
    """A module of parameters for each user, and a loop over the users of the batch, as in PEFT."""

    segments: ClassVar[Segments] = []
    """Of the batch that runs, for all layers: found once."""

    def __init__(self, like: pelt_fast.nn.MultiLoRALinear) -> None:
        super().__init__()
        self.base_layer = like.base_layer
        states = [like.state_of(g) for g in range(like.num_adapters)]
        self.lora_a = nn.ParameterList([state.lora_a for state in states])
        self.lora_b = nn.ParameterList([state.lora_b for state in states])
        self.scaling = [state.scaling for state in states]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        for g, rows in LoopLinear.segments:
            delta = F.linear(F.linear(x.index_select(0, rows), self.lora_a[g]), self.lora_b[g])
            y.index_add_(0, rows, delta * self.scaling[g])
        return y


def looped(model: nn.Module) -> nn.Module:
    """The adapters of ``model``, which is `stacked`, one by one."""
    copied = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    for module, name in targets(copied):
        setattr(module, name, LoopLinear(getattr(module, name)))
    return copied


@contextmanager
def use_segments(segments: Segments) -> Iterator[None]:
    LoopLinear.segments = segments
    try:
        yield
    finally:
        LoopLinear.segments = []


def segments_of(users: Sequence[int], device: torch.device) -> Segments:
    rows: dict[int, list[int]] = {}
    for sample, user in enumerate(users):
        rows.setdefault(user, []).append(sample)
    return [(user, torch.tensor(rows[user], device=device)) for user in sorted(rows)]


class Merged:
    """One user's adapter at a time is added to the weights, and taken out again."""

    def __init__(self, model: nn.Module, adapters: nn.Module) -> None:
        self.model = copy.deepcopy(model)  # with weights of its own
        self._layers = [
            (getattr(module, name).weight, layer)
            for (module, name), layer in zip(targets(self.model), stacks(adapters), strict=True)
        ]
        self._frozen = [weight.detach().clone() for weight, _ in self._layers]

    @contextmanager
    def use(self, user: int) -> Iterator[None]:
        with torch.no_grad():
            for weight, layer in self._layers:
                rank = RANK
                b, a = layer.lora_b[user, :, :rank], layer.lora_a[user, :rank]
                weight.addmm_(b, a, alpha=ALPHA / rank)
            yield
            for (weight, _), frozen in zip(self._layers, self._frozen, strict=True):
                weight.copy_(frozen)


class StackedAdamW:
    """`torch.optim.AdamW` over stacks of adapters, each with its own number of steps.

    Adam moves a parameter whose gradient is zero, by its moments and by weight decay: an adapter that has no token in
    the batch (``plan.active``) is left as it is, and its moments too.
    """

    def __init__(
        self,
        stacks: Sequence[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        self._stacks, self._lr, self._betas, self._eps = list(stacks), lr, betas, eps
        self._decay = weight_decay
        self._mean = [torch.zeros_like(p) for p in self._stacks]
        self._square = [torch.zeros_like(p) for p in self._stacks]
        self._steps = torch.zeros(len(self._stacks[0]), dtype=torch.int64)

    @torch.no_grad()
    def step(self, plan: pelt_fast.MultiAdapterPlan) -> None:
        active = plan.active_adapters()
        self._steps[active] += 1
        rates = []
        for beta in self._betas:
            left = [1 - beta**n for n in self._steps[active].tolist()]
            rates.append(torch.tensor(left, device=self._stacks[0].device)[:, None, None])
        first, second = self._betas
        for p, mean, square in zip(self._stacks, self._mean, self._square, strict=True):
            assert p.grad is not None
            grad = p.grad[active]
            mean[active] = mean[active].lerp(grad, 1 - first)
            square[active] = square[active].mul(second).addcmul(grad, grad, value=1 - second)
            size = (square[active] / rates[1]).sqrt().add(self._eps)
            moved = p[active] * (1 - self._lr * self._decay)
            p[active] = moved - self._lr * (mean[active] / rates[0]) / size
            p.grad = None
