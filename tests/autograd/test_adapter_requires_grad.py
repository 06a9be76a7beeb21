"""Patterns of `requires_grad`: the right gradients, nothing computed beside them."""

import random

import pytest
import torch

from pelt_fast import functional as PF
from pelt_fast.testing import adapter_oracle as oracle
from pelt_fast.testing.adapter_tolerance import assert_accurate
from pelt_fast.testing.adapter_workloads import EVERYTHING, HOULSBY, NAMES, PFEIFFER, AdapterCase

CASE = AdapterCase("", (2, 5), 24, 8, **EVERYTHING)  # x and skip have one gradient
APART = AdapterCase("", (2, 5), 24, 8, **{**EVERYTHING, "residual_x": False})  # and here two
ADDED_LAST = AdapterCase("", (2, 5), 24, 8, "relu", residual_skip=True)  # skip's gradient is dy
# each alone, all but one, and a sample of the 2**12
PATTERNS = [
    (),
    NAMES,
    *((name,) for name in NAMES),
    *(tuple(other for other in NAMES if other != name) for name in NAMES),
]
_DRAW = random.Random(0)
PATTERNS += [tuple(name for name in NAMES if _DRAW.random() < 0.5) for _ in range(24)]


def label(names):
    return "+".join(names) or "none"


@pytest.mark.parametrize(
    "wanted",
    [*PATTERNS[:-16], *(pytest.param(wanted, marks=pytest.mark.slow) for wanted in PATTERNS[-16:])],
    ids=label,
)
def test_pattern(wanted, backend, device):
    inputs = CASE.make(torch.float32, device)
    results, keep = backend.run(inputs, wanted)
    assert set(results) == {"y", *wanted}
    assert_accurate(results, inputs, keep)


@pytest.mark.parametrize("wanted", [("x",), ("skip",), ("x", "skip"), ("up", "skip")], ids=label)
@pytest.mark.parametrize("case", [APART, ADDED_LAST], ids=["apart", "added_last"])
def test_x_and_skip(case, wanted, backend, device):
    inputs = case.make(torch.float32, device)
    results, keep = backend.run(inputs, wanted)
    assert set(results) == {"y", *wanted}
    assert_accurate(results, inputs, keep)


def test_adapter_alone_is_trained(backend, device):
    """As it is used: the layernorms and what comes before are frozen in the first layer."""
    inputs = AdapterCase("", (2, 5), 24, 8, **PFEIFFER).make(torch.bfloat16, device)
    results, keep = backend.run(inputs, ["down", "down_bias", "up", "up_bias"])
    assert_accurate(results, inputs, keep)


def test_nothing_requires_a_gradient(backend, device):
    assert not backend(CASE.make(torch.float32, device)).requires_grad


def test_no_grad_builds_no_graph(backend, device):
    inputs = CASE.make(torch.float32, device)
    leaves = inputs.map(lambda name, t: t.detach().requires_grad_(name != "dy"))
    with torch.no_grad():
        assert not backend(leaves).requires_grad


def test_parameters_accumulate_over_two_backwards(backend, device):
    inputs = AdapterCase("", (2, 5), 24, 8, **PFEIFFER).make(torch.float64, device)
    leaves = inputs.map(lambda name, t: t.detach().requires_grad_(name != "dy"))
    for _ in range(2):
        backend(leaves).backward(inputs.dy)
    expected = oracle.exact(inputs, None)
    for name, tensor in leaves.named_tensors():
        if name != "dy":
            torch.testing.assert_close(tensor.grad, 2 * expected[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", [CASE, APART, ADDED_LAST], ids=["alike", "apart", "added_last"])
def test_gradients_of_x_and_skip_are_not_one_memory(case, backend, device):
    """`backward` hands a gradient over as `.grad`: what is added to one must not show in the other, or in dy."""
    inputs = case.make(torch.float32, device)
    leaves = inputs.map(lambda name, t: t.detach().requires_grad_(name in ("x", "skip")))
    dy = inputs.dy.clone()
    backend(leaves).backward(dy)
    expected = leaves.skip.grad.clone()
    leaves.x.grad.zero_()
    assert torch.equal(leaves.skip.grad, expected)
    leaves.skip.grad.zero_()
    assert torch.equal(dy, inputs.dy)


def test_sparse_gradient_of_the_output(backend, device):
    inputs = AdapterCase("", (2, 5), 24, 8, **HOULSBY).make(torch.float64, device)
    index = torch.zeros((1,) * inputs.dy.dim(), dtype=torch.long, device=device)
    gradients = []
    for sparse_grad in (False, True):
        leaves = inputs.map(lambda name, t: t.detach().requires_grad_(name != "dy"))
        backend(leaves).gather(-1, index, sparse_grad=sparse_grad).sum().backward()
        gradients.append([t.grad for name, t in leaves.named_tensors() if name != "dy"])
    for dense, sparse in zip(*gradients, strict=True):
        torch.testing.assert_close(sparse, dense)


def test_backward_twice_through_one_graph(backend, device):
    inputs = CASE.make(torch.float32, device)
    leaves = inputs.map(lambda name, t: t.detach().requires_grad_(name != "dy"))
    sources = [t for name, t in leaves.named_tensors() if name != "dy"]
    y = backend(leaves)
    first = torch.autograd.grad(y, sources, inputs.dy, retain_graph=True)
    second = torch.autograd.grad(y, sources, inputs.dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_double_backward_is_refused_with_a_reason(backend, device):
    inputs = CASE.make(torch.float64, device)
    leaves = inputs.map(lambda name, t: t.detach().requires_grad_(name != "dy"))
    (da,) = torch.autograd.grad(backend(leaves).square().sum(), leaves.down, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|twice|second"):
        da.sum().backward()


@pytest.mark.parametrize("of", ["x", "down", "up", "ln_weight"])
@pytest.mark.parametrize("by", ["x", "skip", "down", "up", "ln_weight", "dy"])
def test_every_second_derivative_is_refused(of, by, backend, device):
    inputs = CASE.make(torch.float64, device)
    leaves = inputs.map(lambda name, t: t.detach().requires_grad_())
    named = dict(leaves.named_tensors())
    loss = (backend(leaves) * named["dy"]).sum()
    (grad,) = torch.autograd.grad(loss, named[of], create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.grad(loss + grad.square().sum(), named[by])


@pytest.mark.parametrize("changed", ["x", "skip", "down", "up", "ln_weight", "pre_bias"])
def test_saved_tensor_changed_in_place_is_refused(changed, backend, device):
    inputs = CASE.make(torch.float32, device)
    leaves = inputs.map(
        lambda name, t: t.detach().clone().requires_grad_(name not in ("dy", changed))
    )
    y = backend(leaves)
    dict(leaves.named_tensors())[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(inputs.dy)


def test_a_callable_activation_differentiates_twice(device):
    """It is composed of PyTorch's own operators."""
    inputs = AdapterCase("", (2, 3), 6, 4, **PFEIFFER).make(torch.float64, device)
    leaves = inputs.map(lambda name, t: t.detach().requires_grad_(name == "down"))
    more = {**leaves.kwargs, "activation": torch.sin}
    y = PF.bottleneck_adapter(*leaves.args, **more)
    (da,) = torch.autograd.grad(y.square().sum(), leaves.down, create_graph=True)
    da.sum().backward()
    assert leaves.down.grad.isfinite().all()
