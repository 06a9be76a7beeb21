"""A batch whose samples use different methods: in one forward, and setup by setup, as the library does it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import pelt_fast

from .tables import LOST, TextTable, number
from .timing import Stat, clock_for, interleave

QUICK_S, WHOLE_S = 12.0, 60.0
FUSED = ("adapter", "other adapter")
SETUPS = ["lora", "unipelt", None, "adapter", "other lora", "fusion", "unipelt", "prefix"]
"""Of the samples of a batch; *fusion* is that of the two adapters."""
NAMES = {
    "none": "no adapters",
    "mixed": "ours, one mixed batch",
    "ours": "ours, setup by setup",
    "library": "adapters library, setup by setup",
}


@dataclass(frozen=True)
class Plan:
    """BERT-base's width, with fewer layers."""

    layers: int = 2
    hidden: int = 768
    heads: int = 12
    lengths: tuple[int, ...] = (32, 128)


def run(device: torch.device, budget_s: float, plan: Plan = Plan()) -> dict[str, Any]:
    """Rows of times, and what was wrong."""
    model = model_of(plan, device)
    fast = copy.deepcopy(model)
    pelt_fast.accelerate(fast)
    exact = copy.deepcopy(model).double()
    right = {
        length: ways_of(exact, exact, length, True, device)["library"]() for length in plan.lengths
    }
    passes = [(length, train) for length in plan.lengths for train in (False, True)]
    found: dict[str, Any] = {"plan": asdict(plan), "rows": [], "wrong": []}
    for length, train in passes:
        ways = ways_of(model, fast, length, train, device)
        expected = right[length] if train else right[length][:1]
        errors = {name: distance(way(), expected) for name, way in ways.items() if name != "none"}
        # as in the kernel tables: twice the error of the library, and a rounding
        most = 2 * errors["library"] + torch.finfo(torch.float32).eps
        wrong = {name for name, error in errors.items() if not error <= most}
        found["wrong"] += [
            f"{name}, {length} tokens: {errors[name]:.3g} from fp64, allowed {most:.3g}"
            for name in sorted(wrong)
        ]
        steps: dict[str, Any] = {
            name: SimpleNamespace(forward=way, backward=None)
            for name, way in ways.items()
            if name not in wrong
        }
        taken = interleave(steps, clock_for(device), budget_s / len(passes), 3, 60)
        found["rows"].append(
            {
                "tokens": length,
                "train": train,
                "rounds": len(next(iter(taken.values()))),
                "ms": {
                    name: asdict(Stat.of([s.forward for s in samples]))
                    for name, samples in taken.items()
                },
                "errors": errors,
            }
        )
    return found


def model_of(plan: Plan, device: torch.device) -> Any:
    """With an adapter of each method, all drawn at random and trained, and the rest frozen."""
    import adapters
    from adapters.composition import Fuse
    from transformers import BertConfig, BertForSequenceClassification

    logging.getLogger("adapters").setLevel(logging.ERROR)  # that none is active is wanted
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=plan.hidden,
        num_hidden_layers=plan.layers,
        num_attention_heads=plan.heads,
        intermediate_size=4 * plan.hidden,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        vocab_size=1000,
    )
    model: Any = BertForSequenceClassification(config)
    adapters.init(model)
    for name, method in {
        "lora": adapters.LoRAConfig(r=8),
        "other lora": adapters.LoRAConfig(r=16, attn_matrices=["q", "v"]),
        # no relu: its gradient jumps where rounding changes a sign
        "adapter": adapters.SeqBnConfig(non_linearity="gelu"),
        "other adapter": adapters.SeqBnConfig(non_linearity="gelu"),
        "prefix": adapters.PrefixTuningConfig(),
        "unipelt": adapters.ConfigUnion(
            adapters.LoRAConfig(r=8, use_gating=True),
            adapters.PrefixTuningConfig(prefix_length=10, use_gating=True),
            adapters.SeqBnConfig(non_linearity="gelu", use_gating=True),
        ),
    }.items():
        model.add_adapter(name, config=method)
    model.add_adapter_fusion(Fuse(*FUSED))
    for name, parameter in model.named_parameters():
        added = any(part in name for part in ("lora", "adapter", "prefix"))
        parameter.requires_grad_(added)
        if added and parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model.to(device).eval()


def ways_of(
    model: Any, fast: Any, length: int, train: bool, device: torch.device
) -> dict[str, Callable[[], list[Tensor]]]:
    """By contender, a step: the logits in the samples' order, and in training all gradients."""
    from adapters.composition import Fuse

    setups = [Fuse(*FUSED) if setup == "fusion" else setup for setup in SETUPS]
    ids = torch.randint(
        1000, (len(setups), length), generator=torch.Generator().manual_seed(length)
    )
    ids = ids.to(device)
    groups: dict[str, tuple[Any, list[int]]] = {}
    for row, setup in enumerate(setups):
        groups.setdefault(str(setup), (setup, []))[1].append(row)

    def alone(which: Any) -> Tensor:
        found = []
        for setup, rows in groups.values():
            which.set_active_adapters(setup)
            found.append(which(ids[rows]).logits)
        which.set_active_adapters(None)
        order = torch.tensor([row for _, rows in groups.values() for row in rows], device=device)
        return torch.cat(found)[order.argsort()]

    def mixed() -> Tensor:
        with pelt_fast.mixed_batch(fast, setups):
            logits: Tensor = fast(ids).logits
        return logits

    def step(which: Any, forward: Callable[[], Tensor]) -> Callable[[], list[Tensor]]:
        trained = [p for p in which.parameters() if p.requires_grad]

        def run() -> list[Tensor]:
            if not train:
                with torch.no_grad():
                    return [forward()]
            logits = forward()
            grads = torch.autograd.grad(logits.square().sum(), trained, allow_unused=True)
            return [logits.detach(), *(g for g in grads if g is not None)]

        return run

    ways = {
        "mixed": step(fast, mixed),
        "ours": step(fast, lambda: alone(fast)),
        "library": step(model, lambda: alone(model)),
    }
    if not train:  # nothing would train
        ways["none"] = step(model, lambda: model(ids).logits)
    return ways


def distance(found: list[Tensor], right: list[Tensor]) -> float:
    """Of all tensors as one vector, relative to its length; where they are not as many, infinite."""
    if len(found) != len(right):
        return float("inf")
    pairs = [(a.double(), b.double()) for a, b in zip(found, right, strict=True)]
    error = sum(float((a - b).square().sum()) for a, b in pairs)
    return (error / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5


def tables(mixed: dict[str, Any] | None) -> list[TextTable]:
    if not mixed:
        return []
    plan = mixed["plan"]
    text = TextTable(
        f"One batch of different methods, BERT of {plan['layers']} layers and width {plan['hidden']} (ms, medians)",
        ["", *NAMES.values(), "ours mixed / library", "error / library", "rounds"],
    )
    for row in mixed["rows"]:
        ms, errors = {name: stat["median"] for name, stat in row["ms"].items()}, row["errors"]
        ratio = ms["mixed"] / ms["library"] if "mixed" in ms else None
        text.rows.append(
            [
                f"{len(SETUPS)} × {row['tokens']}, {'forward + backward' if row['train'] else 'forward'}",
                *(number(ms[name]) if name in ms else "–" for name in NAMES),
                "–" if ratio is None else f"{ratio:.2f}" + (f" {LOST}" if ratio > 1.01 else ""),
                f"{errors['mixed'] / errors['library']:.2f}",
                str(row["rounds"]),
            ]
        )
    text.notes = [
        f"The samples' setups: {', '.join(setup or 'none' for setup in SETUPS)}; LoRA r = 8 and 16, adapters of "
        "m = 48, fusion of two. *Setup by setup*: the samples of a setup in a forward of their own, after "
        "`set_active_adapters`. All adapters train. *error*: distance from fp64 of logits and gradients, over that of "
        "the library."
    ]
    return [text]


def headlines(mixed: dict[str, Any] | None) -> list[str]:
    if not mixed:
        return []
    ratios = [
        (row, row["ms"]["library"]["median"] / row["ms"]["mixed"]["median"])
        for row in mixed["rows"]
        if "mixed" in row["ms"]
    ]
    words = ", ".join(
        f"{ratio:.2f} at {row['tokens']} tokens {'in training' if row['train'] else 'in inference'}"
        for row, ratio in ratios
    )
    lines = [
        f"{len(SETUPS)} samples of LoRA, adapter, fusion, prefix, UniPELT and no method in one batch: the speed of the "
        f"adapters library, setup by setup, times {words}."
    ]
    return lines + [f"WRONG {LOST}: {text}." for text in mixed["wrong"]]
