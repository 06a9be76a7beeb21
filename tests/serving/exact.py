"""A model and adapters of small integers: every sum is exact in fp32, so that a right row is right to the last bit."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pelt_fast.serving import AdapterPool
from pelt_fast.serving.layer import ServedLinear

IN, MAX_RANK = 8, 4
SIZES = {"block.up": (8, 12), "block.down": (12, 8), "out": (8, 6)}
TARGETS = ["up", "down", "out"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu()).relu()


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.block, self.out = Block(), nn.Linear(8, 6, bias=False)
        self.unserved = nn.Embedding(3, 2)
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            p.data = small(p.shape, generator)
            p.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.block(x))


def small(shape: Any, generator: torch.Generator, most: int = 1) -> Tensor:
    return torch.randint(-most, most + 1, tuple(shape), generator=generator).float()


def inputs(samples: int, rows: int, seed: int) -> Tensor:
    return small((samples, rows, IN), torch.Generator().manual_seed(seed), 2)


@dataclass
class Adapter:
    """Some ranks and scalings, modules without LoRA among them."""

    seed: int
    weights: dict[str, tuple[Tensor, Tensor]] = field(init=False)
    alphas: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        chance, generator = random.Random(self.seed), torch.Generator().manual_seed(self.seed)
        modules = chance.sample(sorted(SIZES), chance.randint(1, 3))
        ranks = {name: chance.randint(1, MAX_RANK) for name in modules}
        self.weights = {
            name: (small((r, SIZES[name][0]), generator), small((SIZES[name][1], r), generator))
            for name, r in ranks.items()
        }
        self.alphas = {name: r * chance.choice([0.5, 1.0, 2.0]) for name, r in ranks.items()}

    @property
    def config(self) -> dict[str, Any]:
        return {
            "peft_type": "LORA",
            "r": MAX_RANK,
            "lora_alpha": 1,
            "target_modules": sorted(self.weights),
            "rank_pattern": {name: len(a) for name, (a, _) in self.weights.items()},
            "alpha_pattern": self.alphas,
            "use_rslora": False,
            "bias": "none",
        }

    @property
    def state(self) -> dict[str, Tensor]:
        return {
            f"base_model.model.{name}.lora_{part}.weight": value
            for name, pair in self.weights.items()
            for part, value in zip("AB", pair, strict=True)
        }

    def save(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(self.config))
        save_file(self.state, folder / "adapter_model.safetensors")
        return folder

    def __call__(self, net: Net, x: Tensor) -> Tensor:
        return oracle(net, x, self)


def oracle(net: Net, x: Tensor, adapter: Adapter | None) -> Tensor:
    """One adapter, merged, in fp64."""

    def linear(name: str, x: Tensor) -> Tensor:
        base = net.get_submodule(name)
        weight = base.weight.double()
        if adapter is not None and name in adapter.weights:
            a, b = adapter.weights[name]
            weight = weight + adapter.alphas[name] / len(a) * b.double() @ a.double()
        return nn.functional.linear(x, weight, None if base.bias is None else base.bias.double())

    hidden = linear("block.down", linear("block.up", x.double()).relu()).relu()
    return linear("out", hidden).to(x.dtype)


def pool_of(net: nn.Module, slots: int = 4, **options: Any) -> AdapterPool:
    return AdapterPool(net, TARGETS, slots=slots, max_rank=MAX_RANK, **options)


def contents(net: nn.Module) -> list[Tensor]:
    """All that the slots hold."""
    layers = [module for module in net.modules() if isinstance(module, ServedLinear)]
    return [
        t.clone()
        for layer in layers
        for t in (layer.lora_a, layer.lora_b, layer.ranks, layer.scaling)
    ]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
