"""Dropout of the adapter's result: the documented mask, the same in backward and in every recomputation."""

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from pelt_fast import functional as PF
from pelt_fast.random import new_seed
from pelt_fast.testing import adapter_oracle as oracle
from pelt_fast.testing.adapter_workloads import EVERYTHING, HOULSBY, PFEIFFER, AdapterCase


def drop_ones(backend, tokens, features, p, device):
    """drop(1): the bias of a zero up projection."""
    zeros = torch.zeros(features, 3, device=device)
    return PF.bottleneck_adapter(
        zeros.new_ones(tokens, features),
        zeros.T,
        None,
        zeros,
        zeros.new_ones(features),
        dropout_p=p,
        training=True,
        backend=backend.name,
    )


@pytest.fixture
def small(device):
    return AdapterCase("", (33,), 40, 12, **HOULSBY, dropout_p=0.3).make(torch.float32, device)


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


@pytest.mark.parametrize(
    "block", [{}, PFEIFFER, EVERYTHING], ids=["bare", "pfeiffer", "everything"]
)
def test_backward_meets_the_mask_of_forward(block, backend, device):
    """d(Σ y) / d(up_bias) without layernorm is the mask's column sums; else the oracle has the same mask."""
    case = AdapterCase("", (33,), 40, 12, **{**block, "dropout_p": 0.4, "post_ln": False})
    inputs = case.make(torch.float64, device)
    inputs = replace(inputs, scale=None, gate=None, dy=torch.ones_like(inputs.dy))
    results, keep = backend.run(inputs, ["up_bias"])
    torch.testing.assert_close(results["up_bias"], keep.double().sum(0) / 0.6)


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


@pytest.mark.slow
def test_mean_over_draws_is_the_output_without_dropout(backend, device):
    """E[y] = y(p = 0) where no layernorm follows, and so for the gradients, which are linear in the mask too."""
    case = AdapterCase("", (9,), 24, 8, residual_x=True, pre_ln=True, dropout_p=0.3, gate="token")
    inputs = case.make(torch.float32, device)
    draws, total = 200, {}
    for seed in range(draws):
        results, _ = backend.run(inputs, seed=seed)
        for name, value in results.items():
            total.setdefault(name, []).append(value.double())
    expected = oracle.exact(inputs, None)
    for name, values in total.items():
        stacked = torch.stack(values)
        deviation = (stacked.mean(0) - expected[name]).abs()
        standard_error = stacked.std(0) / draws**0.5
        assert (deviation <= 5 * standard_error + 1e-5).all(), name


def test_p_1_leaves_the_residuals_exactly(backend, device):
    case = AdapterCase("", (7,), 24, 8, residual_x=True, residual_skip=True, dropout_p=1.0)
    inputs = case.make(torch.float32, device)
    results, _ = backend.run(inputs)
    assert torch.equal(results["y"], inputs.x + inputs.skip)
    for name in ("x", "skip"):
        assert torch.equal(results[name], inputs.dy)
    for name in ("down", "down_bias", "up", "up_bias"):
        assert not results[name].any()


def test_a_dropped_nan_or_inf_is_gone(backend, device):
    """Zero times infinity would bring it back."""
    case = AdapterCase(
        "", (2,), 24, 8, residual_skip=True, dropout_p=1.0, gate="token", scale="one"
    )
    inputs = case.make(torch.float32, device)
    inputs.x[0, 3], inputs.up_bias[2] = float("inf"), float("nan")
    assert torch.equal(backend(inputs), inputs.skip)


def test_calls_differ_and_a_torch_seed_repeats_them(small, backend):
    torch.manual_seed(1)
    first, second = backend(small), backend(small)
    torch.manual_seed(1)
    assert torch.equal(first, backend(small))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non_reentrant"])
def test_checkpointing_restores_the_mask(use_reentrant, small, backend):
    leaves = small.map(lambda name, t: t.detach().requires_grad_(name != "dy"))
    sources = [t for name, t in leaves.named_tensors() if name != "dy"]
    torch.manual_seed(2)
    expected = torch.autograd.grad(backend(leaves), sources, small.dy)
    torch.manual_seed(2)
    y = checkpoint(lambda x: backend(replace(leaves, x=x)), leaves.x, use_reentrant=use_reentrant)
    torch.rand(3)  # other draws between forward and backward
    y.backward(small.dy)
    assert all(torch.equal(s.grad, e) for s, e in zip(sources, expected, strict=True))
