"""Every `requires_grad` pattern: the right gradients, nothing computed or saved beside them."""

from itertools import product

import pytest
import torch

from pelt_fast import functional as PF
from pelt_fast.testing import oracle
from pelt_fast.testing.tolerance import assert_accurate
from pelt_fast.testing.workloads import Adapter, Case

NAMES = ("x", "bias", "lora_a.0", "lora_b.0", "lora_bias.0")
PATTERNS = [
    tuple(name for name, wanted in zip(NAMES, bits, strict=True) if wanted)
    for bits in product((False, True), repeat=len(NAMES))
]
CASE = Case("", (2, 5), 24, 40, (Adapter(3, bias=True),))
TWO = Case("", (7,), 24, 40, (Adapter(3, 2.0, 0.5, bias=True), Adapter(5, -1.0)))


@pytest.mark.parametrize("wanted", PATTERNS, ids=lambda names: "+".join(names) or "none")
def test_every_pattern(wanted, backend, device):
    inputs = CASE.make(torch.float32, device)
    results, keep = backend.run(inputs, wanted)
    assert set(results) == {"y", *wanted}
    assert_accurate(results, inputs, keep)


@pytest.mark.parametrize(
    "wanted",
    [
        ("lora_a.0",),
        ("lora_a.1",),
        ("lora_b.1",),
        ("lora_a.0", "lora_b.1"),
        ("lora_a.1", "lora_b.0", "lora_bias.0"),
        ("x", "lora_b.0"),
    ],
    ids="+".join,
)
def test_adapters_frozen_one_by_one(wanted, backend, device):
    inputs = TWO.make(torch.float32, device)
    results, keep = backend.run(inputs, wanted)
    assert_accurate(results, inputs, keep)


def test_nothing_requires_a_gradient(backend, device):
    assert not backend(CASE.make(torch.float32, device)).requires_grad


def test_no_grad_builds_no_graph(backend, device):
    inputs = CASE.make(torch.float32, device)
    leaves = inputs.map(lambda name, t: t.detach().requires_grad_(name in NAMES))
    with torch.no_grad():
        assert not backend(leaves).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_trainable_weight_falls_back_and_gets_its_gradient(dtype, device):
    inputs = TWO.make(dtype, device)
    leaves = inputs.map(lambda _, t: t.detach().requires_grad_())
    explanation = PF.explain("lora_linear", *leaves.args, **leaves.kwargs)
    assert explanation.backends == ("torch", "torch")

    def automatic(leaves):
        return PF.lora_linear(*leaves.args, **leaves.kwargs)

    results, keep = oracle.run_with_masks(automatic, inputs, ["weight", *oracle.trained(inputs)])
    assert_accurate(results, inputs, keep)


@pytest.mark.parametrize(
    "wanted", [("weight",), ("weight", "x"), ("weight", "lora_b.0")], ids="+".join
)
def test_trainable_weight_among_frozen_adapters(wanted, device):
    inputs = CASE.make(torch.float32, device)
    results = oracle.run(
        lambda leaves: PF.lora_linear(*leaves.args, **leaves.kwargs), inputs, wanted
    )
    assert_accurate(results, inputs, [None])


def test_parameters_accumulate_over_two_backwards(backend, device):
    inputs = CASE.make(torch.float64, device)
    leaves = inputs.map(lambda name, t: t.detach().requires_grad_(name in NAMES))
    for _ in range(2):
        backend(leaves).backward(inputs.dy)
    expected = oracle.exact(inputs, [None])
    for name, tensor in leaves.named_tensors():
        if name in NAMES:
            torch.testing.assert_close(
                tensor.grad.reshape(expected[name].shape), 2 * expected[name]
            )


def test_sparse_gradient_of_the_output(backend, device):
    inputs = CASE.make(torch.float64, device)
    index = torch.zeros((1,) * inputs.dy.dim(), dtype=torch.long, device=device)
    gradients = []
    for sparse_grad in (False, True):
        leaves = inputs.map(lambda name, t: t.detach().requires_grad_(name in NAMES))
        backend(leaves).gather(-1, index, sparse_grad=sparse_grad).sum().backward()
        gradients.append([t.grad for name, t in leaves.named_tensors() if name in NAMES])
    for dense, sparse in zip(*gradients, strict=True):
        torch.testing.assert_close(sparse, dense)


def test_backward_twice_through_one_graph(backend, device):
    inputs = TWO.make(torch.float32, device)
    leaves = inputs.map(lambda name, t: t.detach().requires_grad_(name.startswith("lora")))
    y = backend(leaves)
    sources = (*leaves.lora_a, *leaves.lora_b)
    first = torch.autograd.grad(y, sources, inputs.dy, retain_graph=True)
    second = torch.autograd.grad(y, sources, inputs.dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_double_backward_is_refused_with_a_reason(backend, device):
    inputs = CASE.make(torch.float64, device)
    leaves = inputs.map(lambda name, t: t.detach().requires_grad_(name in NAMES))
    (da,) = torch.autograd.grad(backend(leaves).square().sum(), leaves.lora_a, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|twice|second"):
        da.sum().backward()


@pytest.mark.parametrize("of", ["x", "lora_a", "lora_b", "dy"])
@pytest.mark.parametrize("by", ["x", "lora_a", "lora_b", "dy"])
def test_every_second_derivative_is_refused(of, by, backend, device):
    inputs = CASE.make(torch.float64, device)
    leaves = inputs.map(lambda name, t: t.detach().requires_grad_(name in NAMES))
    named = {"x": leaves.x, "lora_a": leaves.lora_a[0], "lora_b": leaves.lora_b[0]}
    named["dy"] = leaves.dy.detach().requires_grad_()
    y = backend(leaves)
    loss = (y * named["dy"]).sum()
    (grad,) = torch.autograd.grad(loss, named[of], create_graph=True)
    if of == "dy":  # that is y
        assert torch.equal(grad, y)
        return
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.grad(loss + grad.square().sum(), named[by])


def test_second_derivative_by_an_x_that_is_not_kept(backend, device):
    inputs = CASE.make(torch.float64, device)
    leaves = inputs.map(lambda name, t: t.detach().requires_grad_(name in ("x", "lora_b.0")))
    y = backend(leaves)
    with pytest.raises(RuntimeError, match=r"x was not kept .* create_graph=True"):
        torch.autograd.grad(y.sum(), leaves.lora_b, create_graph=True)


@pytest.mark.parametrize("changed", ["x", "lora_a.0", "lora_b.0", "weight"])
def test_saved_tensor_changed_in_place_is_refused(changed, backend, device):
    inputs = CASE.make(torch.float32, device)
    wanted = ("lora_a.0", "lora_b.0", "x") if changed != "x" else ("lora_a.0",)
    leaves = inputs.map(lambda name, t: t.detach().clone().requires_grad_(name in wanted))
    y = backend(leaves)
    with torch.no_grad():
        dict(leaves.named_tensors())[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(inputs.dy)


def test_unused_x_may_change_when_no_a_trains(backend, device):
    """x is not saved for B, so an in-place operation after the layer is legal, as it is after a frozen linear."""
    inputs = CASE.make(torch.float32, device)
    leaves = inputs.map(lambda name, t: t.detach().clone().requires_grad_(name == "lora_b.0"))
    y = backend(leaves)
    leaves.x.zero_()
    (db,) = torch.autograd.grad(y, leaves.lora_b, inputs.dy)
    assert_accurate({"lora_b.0": db}, inputs, [None])
