"""Dropout: exact in distribution, the same mask on every backend and in every recomputation."""

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from pelt_fast import functional as PF
from pelt_fast.random import new_seed, philox_mask
from pelt_fast.testing import oracle
from pelt_fast.testing.workloads import Adapter, Case


def drop_ones(backend, tokens, features, p, device):
    """drop(1): A and B are identities, the base is zero."""
    eye = torch.eye(features, device=device)
    x = torch.ones(tokens, features, device=device)
    return PF.lora_linear(
        x,
        torch.zeros_like(eye),
        None,
        eye,
        eye,
        1.0,
        dropout_p=p,
        training=True,
        backend=backend.name,
    )


@pytest.fixture
def small(device):
    return Case("", (33,), 40, 24, (Adapter(8, dropout_p=0.3),)).make(torch.float32, device)


@pytest.mark.parametrize("features", [1, 30, 64])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_output_shows_the_documented_mask(p, features, small, backend, device):
    backend.require(small)
    torch.manual_seed(5)
    seed = new_seed(torch.device(device))
    torch.manual_seed(5)
    y = drop_ones(backend, 37, features, p, device)
    keep = PF.philox_mask(seed, (37, features), p, 0)
    assert torch.equal(y != 0, keep)
    torch.testing.assert_close(y, keep / (1 - p))


def test_each_adapter_draws_its_own_mask(small, backend, device):
    backend.require(small)
    features, p = 32, 0.5
    eye = torch.eye(features, device=device)
    x = torch.ones(16, features, device=device)
    inputs = (x, torch.zeros_like(eye), None, [eye, eye], [eye, 3 * eye], [1.0, 1.0])
    torch.manual_seed(5)
    seed = new_seed(x.device)
    torch.manual_seed(5)
    y = PF.lora_linear(*inputs, dropout_p=[p, p], training=True, backend=backend.name)
    first, second = (philox_mask(seed, (16, features), p, index) for index in (0, 1))
    torch.testing.assert_close(y, 2.0 * first + 6.0 * second)


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_fraction_and_rows_and_columns_of_the_mask(p, small, backend, device):
    """Binomial bounds at five standard deviations, fixed seed: the whole mask, every row, every column."""
    backend.require(small)
    torch.manual_seed(0)
    kept = (drop_ones(backend, 128, 128, p, device) != 0).double()
    for part in (kept.flatten()[None], kept, kept.T):
        n = part.shape[1]
        deviation = (part.sum(1) - n * (1 - p)).abs().max().item()
        assert deviation < 5 * (n * p * (1 - p)) ** 0.5


def test_mean_over_draws_is_the_output_without_dropout(small, backend, device):
    """E[y] = y(p = 0), and so for the gradients, which are linear in the mask too."""
    draws, total = 60, {}
    for seed in range(draws):
        results, _ = backend.run(small, seed=seed)
        for name, value in results.items():
            total.setdefault(name, []).append(value.double().reshape(-1))
    expected = oracle.exact(small, [None])
    for name, values in total.items():
        stacked = torch.stack(values)
        deviation = (stacked.mean(0) - expected[name].reshape(-1)).abs()
        standard_error = stacked.std(0) / draws**0.5
        # the largest of about 10³ normal numbers; 1e-5 for what no mask touches (dbias)
        assert (deviation <= 5 * standard_error + 1e-5).all(), name


def test_p_1_leaves_the_frozen_linear_exactly(backend, device):
    inputs = Case("", (7,), 24, 40, (Adapter(8, dropout_p=1.0, bias=False),)).make(
        torch.float32, device
    )
    results, _ = backend.run(inputs)
    assert not results["lora_a.0"].any()
    assert not results["lora_b.0"].any()
    without = torch.nn.functional.linear(inputs.x, inputs.weight, inputs.bias)
    torch.testing.assert_close(results["y"], without, rtol=1e-6, atol=1e-6)


def test_a_dropped_nan_or_inf_is_gone_from_the_adapter(backend, device):
    """Zero times infinity would bring it back; the base product sees it all the same."""
    inputs = Case("", (2,), 24, 40, (Adapter(8, dropout_p=1.0),)).make(torch.float32, device)
    inputs.x[0, 3] = float("inf")
    results, _ = backend.run(inputs, ["lora_a.0", "lora_b.0"])
    assert not results["lora_a.0"].any()
    assert not results["lora_b.0"].any()


def test_calls_differ_and_a_torch_seed_repeats_them(small, backend):
    torch.manual_seed(1)
    first, second = backend(small), backend(small)
    torch.manual_seed(1)
    assert torch.equal(first, backend(small))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non_reentrant"])
def test_checkpointing_restores_the_mask(use_reentrant, small, backend):
    leaves = small.map(lambda name, t: t.detach().requires_grad_(name.startswith(("x", "lora"))))
    sources = (leaves.x, *leaves.lora_a, *leaves.lora_b)
    torch.manual_seed(2)
    expected = torch.autograd.grad(backend(leaves), sources, small.dy)
    torch.manual_seed(2)
    y = checkpoint(lambda x: backend(replace(leaves, x=x)), leaves.x, use_reentrant=use_reentrant)
    torch.rand(3)  # other draws between forward and backward
    y.backward(small.dy)
    assert all(torch.equal(s.grad, e) for s, e in zip(sources, expected, strict=True))
