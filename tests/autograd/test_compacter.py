"""Autograd of the Compacter adapter: finite differences, patterns of `requires_grad`, what stays in memory."""

import random
from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from pelt_fast import functional as PF
from pelt_fast.testing.compacter_oracle import assert_accurate
from pelt_fast.testing.compacter_workloads import (
    EVERYTHING,
    HOULSBY,
    NAMES,
    PFEIFFER,
    T5_PFEIFFER,
    CompacterCase,
)

# a finite difference needs a smooth activation and a variance that is no rounding error
EPS = {"pre_eps": 1e-2, "eps": 1e-2}
CASE = CompacterCase("", (2, 5), 40, 12, **EVERYTHING)  # x and skip have one gradient
_DRAW = random.Random(0)
PATTERNS = [(), NAMES, *((name,) for name in NAMES)]
PATTERNS += [tuple(name for name in NAMES if _DRAW.random() < 0.5) for _ in range(12)]


def leaves_of(inputs, wanted=NAMES):
    return inputs.map(lambda name, t: t.detach().requires_grad_(name in wanted))


@pytest.mark.parametrize(
    "case",
    [
        CompacterCase("bare", (3,), 6, 4, "tanh", phm_dim=2),
        CompacterCase(
            *("houlsby", (2, 2), 6, 4, "silu"), **HOULSBY, **EPS, gate="sample", phm_dim=2, rank=2
        ),
        CompacterCase("one_dim", (), 9, 6, "gelu_tanh", **T5_PFEIFFER, scale="one", phm_dim=3),
        CompacterCase("everything", (3,), 6, 4, "mish", **{**EVERYTHING, **EPS}, phm_dim=2),
    ],
    ids=str,
)
def test_gradcheck(case, backend, device):
    inputs = case.make(torch.float64, device)
    backend.require(inputs)
    names = [name for name in NAMES if getattr(inputs, name) is not None]

    def function(*tensors):
        torch.manual_seed(0)  # the same mask at every evaluation
        given = replace(inputs, **dict(zip(names, tensors, strict=True)))
        return PF.compacter(*given.args, **given.kwargs, backend=backend.name)

    leaves = [getattr(inputs, name).detach().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=False)


@pytest.mark.parametrize("wanted", PATTERNS, ids=lambda names: "+".join(names) or "none")
def test_pattern(wanted, backend, device):
    inputs = CASE.make(torch.float32, device)
    results, keep = backend.run(inputs, wanted)
    assert set(results) == {"y", *wanted}
    assert_accurate(results, inputs, keep)


def test_no_grad_builds_no_graph(backend, device):
    leaves = leaves_of(CASE.make(torch.float32, device))
    with torch.no_grad():
        assert not backend(leaves).requires_grad


@pytest.mark.parametrize("wanted", [("down_left", "up_right"), NAMES], ids=["factors", "all"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_nothing_new_is_saved_but_q_statistics_and_seed(wanted, layout, backend, device):
    case = replace(CASE, x_layout=layout, skip_layout=layout)
    leaves = leaves_of(case.make(torch.float32, device), wanted)
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        backend(leaves)
    arguments = {t.untyped_storage().data_ptr() for _, t in leaves.named_tensors()}
    new = [t for t in saved if t.untyped_storage().data_ptr() not in arguments and t.numel()]
    assert sorted(tuple(t.shape) for t in new) == [(1,), (10, 2), (10, 2), (10, 12)]


def test_saved_tensors_can_be_moved_away_and_back(backend, device):
    inputs = CASE.make(torch.float32, device)
    leaves = leaves_of(inputs)
    sources = [t for name, t in leaves.named_tensors() if name != "dy"]
    torch.manual_seed(0)
    expected = torch.autograd.grad(backend(leaves), sources, inputs.dy)
    torch.manual_seed(0)
    with saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        moved = torch.autograd.grad(backend(leaves), sources, inputs.dy)
    assert all(torch.equal(a, b) for a, b in zip(moved, expected, strict=True))


@pytest.mark.parametrize("of", ["x", "down_rule", "up_left", "ln_weight"])
@pytest.mark.parametrize("by", ["x", "down_right", "dy"])
def test_second_derivatives_are_refused(of, by, backend, device):
    inputs = CASE.make(torch.float64, device)
    leaves = leaves_of(inputs, (*NAMES, "dy"))
    named = dict(leaves.named_tensors())
    loss = (backend(leaves) * named["dy"]).sum()
    (grad,) = torch.autograd.grad(loss, named[of], create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.grad(loss + grad.square().sum(), named[by])


def test_sparse_gradient_of_the_output(backend, device):
    inputs = CompacterCase("", (2, 5), 40, 12, **PFEIFFER).make(torch.float64, device)
    index = torch.zeros((1,) * inputs.dy.dim(), dtype=torch.long, device=device)
    gradients = []
    for sparse_grad in (False, True):
        leaves = leaves_of(inputs)
        backend(leaves).gather(-1, index, sparse_grad=sparse_grad).sum().backward()
        gradients.append([t.grad for name, t in leaves.named_tensors() if name != "dy"])
    for dense, sparse in zip(*gradients, strict=True):
        torch.testing.assert_close(sparse, dense)
