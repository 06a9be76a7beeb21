"""An accelerated PEFT model computes what PEFT computes, as accurately: see parity.py."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from .parity import (
    AUTOCAST,
    BF16,
    FP32,
    PRECISIONS,
    Precision,
    assert_as_accurate,
    one_step,
    pairs,
    three_steps,
)

ARCHITECTURES = ["bert", "roberta", "t5", "gpt2", "llama"]

Accelerated = Callable[[nn.Module], nn.Module]


@pairs(ARCHITECTURES, PRECISIONS, always=[FP32])
def test_outputs_and_every_gradient(
    name: str,
    precision: Precision,
    make,
    architectures,
    accelerated: Accelerated,
    served,
) -> None:
    arch = architectures[name]
    plain = make(name, precision.weights, precision.adapters_fp32)
    fast = accelerated(plain)
    exact = one_step(copy.deepcopy(plain).double(), arch.batch())
    with precision():
        theirs = one_step(plain, arch.batch())
        ours = one_step(fast, arch.batch())
    assert len(served) == arch.layers
    assert sum(".lora_" in key for key in ours) == 2 * arch.layers
    assert_as_accurate(ours, theirs, exact, precision.computed, arch.layers)


@pairs(ARCHITECTURES, [FP32, BF16, AUTOCAST], always=[])
def test_three_optimizer_steps(
    name: str,
    precision: Precision,
    make,
    architectures,
    accelerated: Accelerated,
) -> None:
    arch = architectures[name]
    plain = make(name, precision.weights, precision.adapters_fp32)
    fast = accelerated(plain)
    batches = [arch.batch(seed=seed) for seed in range(3)]
    exact = three_steps(copy.deepcopy(plain).double(), batches)
    with precision():
        theirs = three_steps(plain, batches)
        ours = three_steps(fast, batches)
    # each of the three steps brings in the roundings of a whole pass
    assert_as_accurate(ours, theirs, exact, precision.computed, 3 * arch.layers)


@pytest.mark.parametrize(
    "options",
    [
        # the softmax ignores a key's bias: its gradient is all cancellation, and no bound holds
        {"bias": "lora_only", "target_modules": ["query", "value", "dense"]},
        {"lora_bias": True, "target_modules": ["query", "intermediate.dense"]},
        {"use_rslora": True},
        {"r": 1},
        {"r": 3, "rank_pattern": {"query": 16, "value": 33}, "alpha_pattern": {"key": 1}},
        {"modules_to_save": ["classifier"]},
        {"target_modules": ["query"], "layers_to_transform": [1]},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("precision", [FP32, BF16], ids=lambda p: p.name)
def test_configurations(
    options,
    precision: Precision,
    make,
    architectures,
    accelerated: Accelerated,
    served,
) -> None:
    arch = architectures["bert"]
    plain = make("bert", precision.weights, **options)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if ".lora_B." in name and name.endswith("bias"):
                parameter.uniform_(-1, 1)
    fast = accelerated(plain)
    exact = one_step(copy.deepcopy(plain).double(), arch.batch())
    theirs, ours = one_step(plain, arch.batch()), one_step(fast, arch.batch())
    assert served
    assert_as_accurate(ours, theirs, exact, precision.computed, arch.layers)


@pytest.mark.parametrize("precision", [FP32, BF16], ids=lambda p: p.name)
def test_two_active_adapters_are_summed(
    precision: Precision,
    make,
    randomize,
    architectures,
    accelerated: Accelerated,
    served,
) -> None:
    import peft

    arch = architectures["llama"]
    plain = make("llama", precision.weights)
    second = peft.LoraConfig(r=7, lora_alpha=3, target_modules=["q_proj", "down_proj"])
    plain.add_adapter("second", second)
    randomize(plain)
    plain.base_model.set_adapter(["default", "second"])
    fast = accelerated(plain)
    exact = one_step(copy.deepcopy(plain).double(), arch.batch())
    theirs, ours = one_step(plain, arch.batch()), one_step(fast, arch.batch())
    assert len(served) == arch.layers
    assert sum(".second." in key for key in ours) == 2 * 4
    assert_as_accurate(ours, theirs, exact, precision.computed, arch.layers)


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.4])
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradient_checkpointing_changes_nothing(
    name: str,
    use_reentrant: bool,
    dropout: float,
    make,
    architectures,
    accelerated,
    served,
    assert_same,
) -> None:
    arch = architectures[name]
    fast = accelerated(make(name, lora_dropout=dropout)).train()
    torch.manual_seed(3)
    direct = one_step(fast, arch.batch())
    calls = len(served)
    fast.enable_input_require_grads()  # a reentrant checkpoint wants an input with a gradient
    fast.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    torch.manual_seed(3)
    recomputed = one_step(fast, arch.batch())
    assert len(served) - calls > calls, "nothing was recomputed"
    assert direct.keys() == recomputed.keys()
    for key, value in direct.items():
        assert_same(recomputed[key], value, key, arch.layers)


def test_checkpointing_under_autocast(make, architectures, accelerated: Accelerated) -> None:
    arch, precision = architectures["bert"], AUTOCAST
    plain = make("bert")
    fast = accelerated(plain)
    exact = one_step(copy.deepcopy(plain).double(), arch.batch())
    for model in (plain, fast):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with precision():
        theirs, ours = one_step(plain, arch.batch()), one_step(fast, arch.batch())
    assert_as_accurate(ours, theirs, exact, precision.computed, arch.layers)


def test_dropout_acts_in_training_alone(
    make, architectures, accelerated: Accelerated, assert_same
) -> None:
    batch = architectures["bert"].batch()
    plain = make("bert", lora_dropout=0.5)
    fast = accelerated(plain)
    with torch.no_grad():
        for model in (plain, fast):
            model.eval()
        logits, expected = fast(**batch).logits, plain(**batch).logits
        assert_same(logits, expected)
        fast.train()
        torch.manual_seed(0)
        first, second = fast(**batch).logits, fast(**batch).logits
        torch.manual_seed(0)
        again = fast(**batch).logits
    assert not torch.equal(first, second)
    assert torch.equal(first, again)


def test_dropout_of_probability_one_leaves_the_base(
    make, architectures, accelerated, assert_same
) -> None:
    batch = architectures["bert"].batch()
    fast = accelerated(make("bert", lora_dropout=1.0)).train()
    with torch.no_grad():
        dropped = fast(**batch).logits
        with fast.disable_adapter():
            base = fast(**batch).logits
    assert_same(dropped, base)


def test_mean_over_dropout_masks_is_peft_without_dropout(make, accelerated: Accelerated) -> None:
    # one layer is linear in the mask, so its outputs average to those without dropout
    fast = accelerated(make("bert", lora_dropout=0.5)).train()
    layer = fast.base_model.model.bert.encoder.layer[0].attention.self.query
    x, draws = torch.randn(1, 32), 4000
    with torch.no_grad():
        torch.manual_seed(0)
        samples = layer(x.expand(draws, 32))
        expected = layer.eval()(x)[0]
    deviation = samples.std(0) / math.sqrt(draws)
    # 32 numbers, each within five standard deviations of its mean
    assert ((samples.mean(0) - expected).abs() <= 5 * deviation).all()
