"""Deltas combined, as in delta tuning: all at once, and one after the other with the former ones frozen."""

import copy
import math

import adapters
import pytest
import torch
from adapters.composition import Stack

import pelt_fast

from .adapters_models import plain_model
from .conftest import ARCHITECTURES
from .parity import three_steps

DELTAS = {
    "prefix": adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=8),
    "lora": adapters.LoRAConfig(r=4, alpha=16),
    "bottleneck": adapters.SeqBnConfig(reduction_factor=4, non_linearity="gelu"),
}
ORDERS = [
    ("prefix", "lora", "bottleneck"),
    ("bottleneck", "prefix", "lora"),
    ("lora", "bottleneck", "prefix"),
]


def delta_of(parameter):
    """The adapter whose parameter this is."""
    return next((name for name in DELTAS if f".{name}." in parameter), None)


@pytest.fixture
def asked(monkeypatch):
    """Whether a backward was asked for gradients of its delta's parameters, call by call (a prefix has no kernel)."""
    found = {"lora": [], "bottleneck": []}

    def spy(module, name, delta, wanted):
        operator = getattr(module, name)

        def call(*args):
            needs = [need for each in wanted(args) for need in each]
            if needs:  # none: a frozen linear without a LoRA
                found[delta].append(any(needs))
            return operator(*args)

        monkeypatch.setattr(module, name, call)

    from pelt_fast.autograd import adapter, lora

    spy(lora, "lora_linear_bwd", "lora", lambda args: args[11:13])  # need_da, need_db
    spy(adapter, "bottleneck_adapter_bwd", "bottleneck", lambda args: [args[-2][2:6]])
    return found


def model_of(names):
    """Deltas with these names, none of whose parameters is zero, in fp64."""
    model = plain_model("bert")
    for name in names:
        model.add_adapter(name, config=DELTAS[name])
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if delta_of(name):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = noise / math.sqrt(parameter.shape[-1])
    return model.double()


def train(model, names, trained):
    """These deltas act, and those train."""
    model.train_adapter(Stack(*names) if len(names) > 1 else names[0])
    for name, parameter in model.named_parameters():
        if delta_of(name):
            parameter.requires_grad_(delta_of(name) in trained)


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_in_turn(order, asked):
    """Each stage trains one more delta as the library does, and asks for no gradient of the frozen ones."""
    plain = model_of(order)
    fast = copy.deepcopy(plain)
    pelt_fast.accelerate(fast)
    batches = [ARCHITECTURES["bert"].batch(seed=seed) for seed in range(3)]
    for stage in range(len(order)):
        before = {n: p.detach().clone() for n, p in fast.named_parameters() if delta_of(n)}
        for model in (plain, fast):
            train(model, order[: stage + 1], order[stage])
        for calls in asked.values():
            calls.clear()
        ours, theirs = three_steps(fast, batches), three_steps(plain, batches)
        assert ours.keys() == theirs.keys()
        for name, result in theirs.items():
            torch.testing.assert_close(ours[name], result, rtol=1e-8, atol=1e-10, msg=name)
        for delta, calls in asked.items():
            assert any(calls) == (delta == order[stage]), delta
        for name, parameter in fast.named_parameters():
            if delta_of(name):
                changed = not torch.equal(parameter, before[name])
                assert changed == (delta_of(name) == order[stage]), name


def test_at_once(asked):
    plain = model_of(DELTAS)
    fast = copy.deepcopy(plain)
    pelt_fast.accelerate(fast)
    batches = [ARCHITECTURES["bert"].batch(seed=seed) for seed in range(3)]
    for model in (plain, fast):
        train(model, list(DELTAS), list(DELTAS))
    ours, theirs = three_steps(fast, batches), three_steps(plain, batches)
    for name, result in theirs.items():
        torch.testing.assert_close(ours[name], result, rtol=1e-8, atol=1e-10, msg=name)
    for calls in asked.values():
        assert calls
        assert all(calls)
