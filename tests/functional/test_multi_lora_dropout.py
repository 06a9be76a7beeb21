"""Dropout: exact in distribution, the mask of a token's row whatever adapters there are, the same on every backend."""

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from pelt_fast import MultiAdapterPlan
from pelt_fast import functional as PF
from pelt_fast.random import new_seed, philox_mask
from pelt_fast.testing import multi_lora_oracle as oracle
from pelt_fast.testing.multi_lora_workloads import MultiLoRACase


@pytest.fixture
def small(device):
    case = MultiLoRACase("", (33,), 40, (24, 7), row_scale="token", dropout_p=0.3)
    return case.make(torch.float32, device)


def drop_ones(backend, ids, features, p, device, projections=1):
    """drop(1): every A and B is an identity, of adapter g times g + 1."""
    eyes = torch.eye(features, device=device).expand(3, features, features)
    x = torch.ones(len(ids), features, device=device)
    plan = MultiAdapterPlan(ids, 3, device=device)
    scaling = torch.tensor([1.0, 2.0, 3.0], device=device)
    arguments = (x, [eyes] * projections, [eyes] * projections, plan, scaling)
    return PF.multi_lora(*arguments, dropout_p=p, training=True, backend=backend.name)


@pytest.mark.parametrize("features", [1, 30, 64])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_output_shows_the_documented_mask(p, features, small, backend, device):
    """Of each projection its own, of each row the same whatever its adapter and its neighbours'."""
    backend.require(small)
    for ids in ([0] * 37, [2 - t % 3 for t in range(37)], [t % 5 - 1 for t in range(37)]):
        torch.manual_seed(5)
        seed = new_seed(torch.device(device))
        torch.manual_seed(5)
        y = drop_ones(backend, ids, features, p, device, 3)
        factors = [float(g + 1) if 0 <= g < 3 else 0.0 for g in ids]
        factor = torch.tensor(factors, device=device)[:, None]
        for i in range(3):
            keep = philox_mask(seed, (37, features), p, i)
            torch.testing.assert_close(y[i], factor * keep / (1 - p))


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_fraction_and_rows_and_columns_of_the_mask(p, small, backend, device):
    """Binomial bounds at five standard deviations, fixed seed: the whole mask, every row, every column."""
    backend.require(small)
    torch.manual_seed(0)
    (y,) = drop_ones(backend, [t % 3 for t in range(128)], 128, p, device)
    kept = (y != 0).double()
    for part in (kept.flatten()[None], kept, kept.T):
        n = part.shape[1]
        deviation = (part.sum(1) - n * (1 - p)).abs().max().item()
        assert deviation < 5 * (n * p * (1 - p)) ** 0.5


def test_mean_over_draws_is_the_output_without_dropout(small, backend):
    """E[y] = y(p = 0), and so for the gradients, which are linear in the mask too."""
    if backend.name == "reference":
        pytest.skip("the reference goes row by row")
    draws, total = 60, {}
    for seed in range(draws):
        results, _ = backend.run(small, seed=seed)
        for name, value in results.items():
            total.setdefault(name, []).append(value.double())
    expected = oracle.exact(replace(small, dropout_p=0.0), [None, None])
    for name, values in total.items():
        stacked = torch.stack(values)
        deviation = (stacked.mean(0) - expected[name]).abs()
        standard_error = stacked.std(0) / draws**0.5
        # the largest of about 10³ normal numbers; 1e-5 for what no mask touches
        assert (deviation <= 5 * standard_error + 1e-5).all(), name


def test_p_1_leaves_the_base_exactly(backend, device):
    inputs = MultiLoRACase("", (7,), 24, dropout_p=1.0).make(torch.float32, device)
    results, _ = backend.run(inputs)
    assert not any(results[name].any() for name in ("lora_a.0", "lora_b.0", "x"))
    assert torch.equal(results["y"], inputs.base[0])


def test_a_dropped_nan_or_inf_is_gone(backend, device):
    inputs = MultiLoRACase("", (2,), 24, ids="identical", dropout_p=1.0).make(torch.float32, device)
    inputs.x[0, 3], inputs.x[1, 2] = float("inf"), float("nan")
    results, _ = backend.run(inputs)
    assert all(value.isfinite().all() for value in results.values())


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
