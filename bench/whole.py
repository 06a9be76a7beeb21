"""BERT-base with a method of the `adapters` library, relative to the model without it; in training, to fine-tuning.

Three models take turns on the same batch: without any method, the library's, and ours. Ratios are of their fastest
rounds, since whatever else the machine does can only make a round slower; medians stand beside them.
"""

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

from .mixed import distance
from .tables import LOST, TextTable, number
from .timing import clock_for, interleave

FUSED = ("a", "b", "c")
SHORT, LONG = (1, 32), (8, 128)
METHODS = ("lora", "adapter", "prefix", "compacter", "unipelt", "fusion")
WORDS = {
    "lora": "LoRA",
    "adapter": "adapter (Pfeiffer)",
    "prefix": "prefix",
    "compacter": "Compacter",
    "unipelt": "UniPELT",
    "fusion": "AdapterFusion of 3",
}


@dataclass(frozen=True)
class Plan:
    """What is measured, of which model. A pass is samples, tokens, and whether it trains."""

    layers: int = 12
    hidden: int = 768
    vocabulary: int = 30522
    passes: tuple[tuple[int, int, bool], ...] = ((*SHORT, False),)


QUICK_S, WHOLE_S = 60.0, 480.0
QUICK, WHOLE = Plan(), Plan(passes=((*SHORT, False), (*LONG, False), (*LONG, True)))


def run(
    device: torch.device, budget_s: float, plan: Plan, tell: Callable[[str, float], None]
) -> dict[str, Any]:
    """Rows of times, and what was wrong; the budget is for the timing alone."""
    logging.getLogger("adapters").setLevel(logging.ERROR)  # that none is active is wanted
    rows: list[dict[str, Any]] = []
    wrong: list[str] = []
    for i, method in enumerate(METHODS):
        tell(f"whole models: {WORDS[method]}", i / len(METHODS))
        models = {"none": base_of(plan), "library": tuned(base_of(plan), method)}
        models["ours"] = copy.deepcopy(models["library"])
        models = {name: model.to(device) for name, model in models.items()}
        pelt_fast.accelerate(models["ours"])
        for samples, tokens, trains in plan.passes:
            batch = batch_of(plan, samples, tokens, device)
            errors = errors_of(models, batch)
            # as in the kernel tables: twice the error of the library, and a rounding
            if not errors["ours"] <= 2 * errors["library"] + torch.finfo(torch.float32).eps:
                wrong.append(f"{WORDS[method]}, {samples} × {tokens}: {errors} from fp64")
                continue
            steps = {
                name: SimpleNamespace(forward=step_of(model, batch, trains), backward=None)
                for name, model in models.items()
            }
            for step in steps.values():
                step.forward()
            budget = budget_s / len(METHODS) / len(plan.passes)
            found = interleave(steps, clock_for(device), budget, 3, 60)
            seconds = {name: sorted(s.forward for s in taken) for name, taken in found.items()}
            rows.append(
                {
                    "method": method,
                    "samples": samples,
                    "tokens": tokens,
                    "train": trains,
                    "rounds": len(seconds["ours"]),
                    "fastest_ms": {name: 1e3 * taken[0] for name, taken in seconds.items()},
                    "median_ms": {
                        name: 1e3 * taken[len(taken) // 2] for name, taken in seconds.items()
                    },
                    "errors": errors,
                }
            )
    return {"plan": asdict(plan), "rows": rows, "wrong": wrong}


def base_of(plan: Plan) -> Any:
    """Weights drawn at random: they change no time."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=plan.hidden,
        num_hidden_layers=plan.layers,
        num_attention_heads=plan.hidden // 64,
        intermediate_size=4 * plan.hidden,
        vocab_size=plan.vocabulary,
    )
    return BertForSequenceClassification(config)


def tuned(model: Any, method: str) -> Any:
    """The method added to the model, drawn at random where it would begin with zeros, and what it trains trainable."""
    import adapters
    from adapters.composition import Fuse

    configs = {
        "lora": adapters.LoRAConfig(),
        "adapter": adapters.SeqBnConfig(),
        "fusion": adapters.SeqBnConfig(),
        "prefix": adapters.PrefixTuningConfig(),
        "compacter": adapters.CompacterConfig(),
        "unipelt": adapters.UniPELTConfig(),
    }
    known = {name for name, _ in model.named_parameters()}
    adapters.init(model)
    if method == "fusion":
        for name in FUSED:
            model.add_adapter(name, config=configs[method])
        model.add_adapter_fusion(Fuse(*FUSED))
        model.train_adapter_fusion(Fuse(*FUSED))
    else:
        model.add_adapter("a", config=configs[method])
        model.train_adapter("a")
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name not in known:
            nn.init.normal_(parameter, std=0.02, generator=generator)
    return model


def batch_of(plan: Plan, samples: int, tokens: int, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(plan.vocabulary, (samples, tokens), generator=generator)
    labels = torch.arange(samples) % 2
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


@torch.no_grad()
def errors_of(models: dict[str, Any], batch: dict[str, Tensor]) -> dict[str, float]:
    """How far the logits are from fp64."""
    exact = copy.deepcopy(models["library"]).double().eval()
    right = [exact(**batch).logits]
    return {
        name: distance([models[name].eval()(**batch).logits], right) for name in ("library", "ours")
    }


def step_of(model: Any, batch: dict[str, Tensor], trains: bool) -> Callable[[], Tensor]:
    """Inference without gradients; or a step of training, AdamW's included, of what is trainable."""
    if not trains:

        def infer() -> Tensor:
            model.eval()
            with torch.no_grad():
                logits: Tensor = model(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
                ).logits
            return logits

        return infer
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0)  # so that all rounds are of the same weights

    def train() -> Tensor:
        model.train()
        optimizer.zero_grad()
        loss: Tensor = model(**batch).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    return train


def merged(new: dict[str, Any] | None, old: dict[str, Any] | None) -> dict[str, Any] | None:
    """``new``, with the passes that only ``old`` has."""
    if not new or not old:
        return new or old

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["train"], row["samples"], row["tokens"], METHODS.index(row["method"])

    fresh = {key(row) for row in new["rows"]}
    kept = [row for row in old["rows"] if key(row) not in fresh]
    return {**new, "rows": sorted(new["rows"] + kept, key=key)}


def tables(whole: dict[str, Any] | None) -> list[TextTable]:
    if not whole:
        return []
    plan = whole["plan"]
    text = TextTable(
        f"BERT of {plan['layers']} layers and width {plan['hidden']}, fp32: % of the model without a method, "
        "in training % of full fine-tuning",
        ["", "method", "without, ms", "library", "ours", "library, medians", "ours, medians"]
        + ["error / library", "rounds"],
    )
    for row in whole["rows"]:
        cells = [
            number(row["fastest_ms"]["none"]),
            *(
                f"{100 * row[kind][name] / row[kind]['none']:.0f} %"
                for kind in ("fastest_ms", "median_ms")
                for name in ("library", "ours")
            ),
        ]
        if row["fastest_ms"]["ours"] > 1.01 * row["fastest_ms"]["library"]:
            cells[2] += f" {LOST}"
        text.rows.append(
            [
                _words(row),
                WORDS[row["method"]],
                *cells,
                f"{row['errors']['ours'] / row['errors']['library']:.2f}",
                str(row["rounds"]),
            ]
        )
    text.notes = [
        "Fastest rounds of models that take turns; *training*: forward, backward and AdamW of what the method trains, "
        "relative to a step that trains all. Below 100 %: products with a frozen W of few tokens run packed. "
        "AdapterFusion's training is its second stage, the adapters frozen. *error*: of the logits, from fp64."
    ]
    return [text]


def headlines(whole: dict[str, Any] | None) -> list[str]:
    if not whole:
        return []
    lines = []
    for words in dict.fromkeys(_words(row) for row in whole["rows"]):
        found = [
            f"{WORDS[row['method']]} "
            + " → ".join(
                f"{100 * row['fastest_ms'][name] / row['fastest_ms']['none']:.0f}"
                for name in ("library", "ours")
            )
            for row in whole["rows"]
            if _words(row) == words
        ]
        lines.append(
            f"BERT-base, {words}, % of {'full fine-tuning' if 'training' in words else 'the model without a method'}, "
            f"adapters library → ours: {', '.join(found)}."
        )
    return lines + [f"WRONG {LOST}: {text}." for text in whole["wrong"]]


def _words(row: dict[str, Any]) -> str:
    return f"{row['samples']} × {row['tokens']} {'training' if row['train'] else 'inference'}"
