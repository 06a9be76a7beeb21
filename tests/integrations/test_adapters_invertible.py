"""MAD-X's invertible adapters in models of the adapters library, accelerated: there and back."""

from __future__ import annotations

import copy
import pickle

import pytest

pytest.importorskip("adapters")

import adapters
import torch
from adapters.methods.modeling import GLOWCouplingBlock, NICECouplingBlock
from torch import Tensor, nn

import pelt_fast
from pelt_fast.integrations import adapters_invertible

from .adapters_models import LAYERS, adapted
from .conftest import ARCHITECTURES
from .parity import (
    AUTOCAST,
    BF16,
    FP32,
    assert_as_accurate,
    one_step,
    three_steps,
)

MAD_X = adapters.SeqBnInvConfig(reduction_factor=4, non_linearity="gelu")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The signs of the fused calls: 1 behind the embeddings, -1 before the head."""
    found: list[float] = []
    original = adapters_invertible.bottleneck_adapter

    def spy(*args, scaling: float, **kwargs) -> Tensor:
        found.append(scaling)
        return original(*args, scaling=scaling, **kwargs)

    monkeypatch.setattr(adapters_invertible, "bottleneck_adapter", spy)
    return found


def coupling(dtype: torch.dtype = torch.float64, d: int = 32, activation: str = "gelu"):
    torch.manual_seed(0)
    block = NICECouplingBlock([[d]], non_linearity=activation, reduction_factor=2).to(dtype)
    fast = copy.deepcopy(block)
    model = nn.ModuleList([fast])
    model.append(copy.deepcopy(adapted("bert", MAD_X)))  # a layer of the library's
    report = pelt_fast.accelerate(model)
    return block, fast, report


@pytest.mark.parametrize("precision", [FP32, BF16, AUTOCAST], ids=lambda p: p.name)
@pytest.mark.parametrize("name", ["bert", "roberta", "t5", "llama"])
def test_outputs_and_every_gradient(name, precision, calls) -> None:
    batch = ARCHITECTURES[name].batch()
    fast = adapted(name, MAD_X, dtype=precision.weights, adapters_fp32=precision.adapters_fp32)
    exact, plain = copy.deepcopy(fast).double(), copy.deepcopy(fast)
    if not precision.autocast:
        plain.to(precision.weights)
    report = pelt_fast.accelerate(fast)
    assert any("invertible, halves 16 -> 8" in kind for kind in report.kinds)
    exact = one_step(exact, batch)
    with precision():
        theirs, ours = one_step(plain, batch), one_step(fast, batch)
    assert 1.0 in calls
    assert any("invertible_adapters" in key for key in ours)
    ours = {key: value.to(theirs[key].dtype) for key, value in ours.items()}
    assert_as_accurate(ours, theirs, exact, precision.computed, LAYERS[name])


def test_three_optimizer_steps() -> None:
    batches = [ARCHITECTURES["bert"].batch(seed=seed) for seed in range(3)]
    fast = adapted("bert", MAD_X)
    exact, plain = copy.deepcopy(fast).double(), copy.deepcopy(fast)
    pelt_fast.accelerate(fast)
    results = [three_steps(model, batches) for model in (fast, plain, exact)]
    assert_as_accurate(*results, FP32.computed, 3 * LAYERS["bert"])


@pytest.mark.parametrize("rev", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "relu", "swish"])
def test_there_and_back(rev, activation, calls) -> None:
    block, fast, _ = coupling(activation=activation)
    x = torch.randn(2, 5, 32).double().requires_grad_()
    results = []
    for module in (block, fast):
        y = module(x, rev=rev)
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])))
    assert calls == [-1.0 if rev else 1.0] * 2
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fast(fast(x, rev=rev), rev=not rev), x)


def test_what_is_not_served(calls) -> None:
    block, fast, _ = coupling(d=33)  # halves of 16 and 17
    x = torch.randn(2, 5, 33).double()
    assert type(fast) is NICECouplingBlock
    assert torch.equal(fast(x), block(x))
    block, fast, _ = coupling()
    seen = []
    fast.G[0].register_forward_hook(lambda *args: seen.append(1))
    x = torch.randn(2, 5, 32).double()
    torch.testing.assert_close(fast(x), block(x))
    assert seen
    assert not calls


def test_glow_is_left_to_the_library() -> None:
    model = nn.ModuleList([GLOWCouplingBlock([[32]]), adapted("bert", MAD_X)])
    report = pelt_fast.accelerate(model)
    assert report.left["0"].startswith("it is a GLOWCouplingBlock")
    assert type(model[0]) is GLOWCouplingBlock


def test_restored_and_pickled() -> None:
    model = adapted("bert", MAD_X).eval()
    keys = list(model.state_dict())
    pelt_fast.accelerate(model)
    block = model.bert.invertible_adapters["a"]
    assert type(block) is not NICECouplingBlock
    assert list(model.state_dict()) == keys
    again = pickle.loads(pickle.dumps(block))
    x = torch.randn(2, 5, 32)
    assert torch.equal(again(x), block(x))
    pelt_fast.restore(model)
    assert type(block) is NICECouplingBlock
