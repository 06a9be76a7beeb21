"""Loads model and text, trains, serves, and says it all in plain numbers."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn

from .. import data
from . import tasks
from .layers import RANK
from .serve import Serving, serve
from .train import USERS, Plan, Tell, Training, train

QUICK_S, WHOLE_S = 30.0, 300.0
SERVING = 0.3
"""Of the budget; what is left of the rest is for loading and for checks."""


def plan_of(budget_s: float, whole: bool) -> Plan:
    left = (1 - SERVING) * budget_s * 0.8
    if whole:
        return Plan(200, left, verified=3, timed=30)
    sizes = {"samples": 2, "length": 24, "train": 96, "held_out": 24}
    return Plan(20, left, verified=1, timed=4, **sizes)


def load_model(device: torch.device) -> nn.Module:
    """The encoder, frozen, without dropout."""
    from transformers import AutoModel
    from transformers.utils import logging

    logging.set_verbosity_error()  # says that the pooler is left out, which is wanted
    model: nn.Module = AutoModel.from_pretrained(
        data.model_dir(), local_files_only=True, add_pooling_layer=False
    )
    return model.to(device).eval().requires_grad_(False)


def run(device: torch.device, budget_s: float, whole: bool, tell: Tell) -> dict[str, Any]:
    """The results of one run; raises `data.MissingPackage`."""
    plan = plan_of(budget_s, whole)
    tell("users: loading", 0.0)
    splits = tasks.load(plan.train, plan.held_out, plan.length)
    base = load_model(device)
    trained = train(base, splits, plan, device, tell)
    tell("users: serving", 1.0)
    each = 8 if whole else 1
    held_out = [split for _, split in splits]
    served = serve(base, trained.mixed, held_out, each, SERVING * budget_s, device)
    return recorded(trained, served, whole)


def recorded(trained: Training, served: Serving, whole: bool) -> dict[str, Any]:
    losses = trained.losses
    return {
        "whole": whole,
        "users": USERS,
        "rank": RANK,
        "plan": asdict(trained.plan),
        "wrong": wrong_of(trained, served),
        "tasks": [
            {
                "name": task.name,
                "what": task.what,
                "classes": task.classes,
                "mixed": losses["mixed"][user],
                "alone": losses["alone"][user],
                "accuracy": trained.accuracy[user],
                "apart": trained.apart[user],
                "among_strangers": trained.among_strangers.get(user),
            }
            for user, task in enumerate(tasks.TASKS)
        ],
        "largest_difference": trained.largest_difference,
        "gradients": list(trained.gradients),
        "others_unchanged": trained.others_unchanged,
        "step_ms": {kind: asdict(stat) for kind, stat in trained.stats().items()},
        "serving": {
            "requests": served.requests,
            "batch": served.batch,
            "stream_ms": {name: asdict(stat) for name, stat in served.stats().items()},
            "rounds": len(next(iter(served.seconds.values()), [])),
            "errors": served.errors,
            "adapter_bytes": served.adapter_bytes,
            "merged_bytes": served.merged_bytes,
        },
    }


CLOSE = 0.02
"""Between two losses of the same step; what rounding makes of a few hundred steps of AdamW stays well below it."""


def wrong_of(trained: Training, served: Serving) -> list[str]:
    """What must not be: it makes the run fail."""
    equal, count = trained.gradients
    found = [f"serving, {name}: {why}" for name, why in served.wrong.items()]
    if equal < count:
        found.append(f"{count - equal} of {count} gradients depend on a neighbour in the batch")
    if not trained.others_unchanged:
        found.append("an adapter without a token has changed")
    if not trained.largest_difference <= CLOSE:
        found.append(f"mixed and alone, a loss differs by {trained.largest_difference:.3g}")
    return found
