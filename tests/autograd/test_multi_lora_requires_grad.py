"""Every `requires_grad` pattern: the right gradients, nothing computed beside them."""

import importlib
from dataclasses import replace
from itertools import product

import pytest
import torch

from pelt_fast import MultiAdapterPlan
from pelt_fast import functional as PF
from pelt_fast.testing import multi_lora_oracle as oracle
from pelt_fast.testing.multi_lora_tolerance import assert_accurate
from pelt_fast.testing.multi_lora_workloads import EVERYTHING, MultiLoRACase

NAMES = ("x", "lora_a", "lora_b", "base", "row_scale")
PATTERNS = [
    tuple(name for name, wanted in zip(NAMES, bits, strict=True) if wanted)
    for bits in product((False, True), repeat=len(NAMES))
]
CASE = MultiLoRACase("", (3, 5), 24, (40, 7), 4, (6, 3), mixed_ranks=True, row_scale="sample")
DROPPED = MultiLoRACase("", (11,), 24, **EVERYTHING)
NONE = MultiLoRACase("", (5,), 24, (40, 7), ids="none", row_scale="token")


def label(names):
    return "+".join(names) or "none"


def all_of(inputs, heads):
    return [name for name, _ in inputs.named_tensors() if name.partition(".")[0] in heads]


def leaves_of(inputs, heads=NAMES):
    names = all_of(inputs, heads)
    leaves = inputs.map(lambda name, t: t.detach().clone().requires_grad_(name in names))
    return leaves, [t for name, t in leaves.named_tensors() if name in names]


@pytest.mark.parametrize("wanted", PATTERNS, ids=label)
@pytest.mark.parametrize(
    "case",
    [pytest.param(CASE, id="mixed"), pytest.param(NONE, id="none", marks=pytest.mark.slow)],
)
def test_every_pattern(case, wanted, backend, device):
    inputs = case.make(torch.float32, device)
    names = all_of(inputs, wanted)
    results, keep = backend.run(inputs, names)
    assert set(results) == {"y", *names}
    assert_accurate(results, inputs, keep)


@pytest.mark.parametrize(
    "wanted",
    [
        *(("lora_a.0",), ("lora_a.1",), ("lora_b.2",), ("base.1",), ("lora_a.0", "lora_b.1")),
        *(("lora_a.2", "lora_b.0", "base.0"), ("x", "lora_b.0"), ("row_scale", "lora_a.1")),
    ],
    ids=label,
)
def test_projections_frozen_one_by_one(wanted, backend, device):
    inputs = DROPPED.make(torch.float32, device)
    results, keep = backend.run(inputs, wanted)
    assert set(results) == {"y", *wanted}
    assert_accurate(results, inputs, keep)


@pytest.mark.parametrize("wanted", PATTERNS[-1:], ids=label)
def test_no_token_has_an_adapter(wanted, backend, device):
    test_every_pattern(NONE, wanted, backend, device)


@pytest.mark.parametrize("wanted", PATTERNS, ids=label)
def test_a_backend_is_asked_for_what_is_needed(wanted, device, monkeypatch):
    module = importlib.import_module("pelt_fast.backends.torch_.multi_lora")
    asked, run = [], module.multi_lora_bwd
    monkeypatch.setattr(module, "multi_lora_bwd", lambda *a: asked.append(a[-4:]) or run(*a))
    leaves, sources = leaves_of(CASE.make(torch.float32, device), wanted)
    y = oracle.joined(PF.multi_lora(*leaves.args, **leaves.kwargs, backend="torch"))
    if sources:
        torch.autograd.grad(y, sources, leaves.dy)
    needs = tuple(name in wanted for name in ("x", "lora_a", "lora_b", "row_scale"))
    assert asked == ([needs] if any(needs) else [])


def test_nothing_requires_a_gradient(backend, device):
    assert not backend(CASE.make(torch.float32, device)).requires_grad


def test_no_grad_builds_no_graph(backend, device):
    leaves, _ = leaves_of(replace(CASE, base=False).make(torch.float32, device))
    with torch.no_grad():
        assert not backend(leaves).requires_grad


def test_scaling_gets_no_gradient_and_says_so(device):
    inputs = CASE.make(torch.float32, device)
    scaling = torch.ones(4, device=device, requires_grad=True)
    with pytest.raises(ValueError, match=r"scaling requires a gradient.*row_scale"):
        PF.multi_lora(*inputs.args[:4], scaling, **inputs.kwargs)
    with torch.no_grad():
        PF.multi_lora(*inputs.args[:4], scaling, **inputs.kwargs)


def test_adapters_without_tokens_get_zeros_and_the_plan_names_the_others(backend, device):
    inputs = MultiLoRACase("", (6,), 24, adapters=6).make(torch.float32, device)
    inputs = inputs.with_ids((4, 1, 4, -1, 1, 9))
    results, _ = backend.run(inputs, ["lora_a.0", "lora_b.0"])
    active = inputs.plan.active.tolist()
    assert active == [False, True, False, False, True, False]
    for name in ("lora_a.0", "lora_b.0"):
        assert [bool(g.any()) for g in results[name]] == active


def test_gradients_beyond_a_rank_are_zeros(backend, device):
    inputs = CASE.make(torch.float32, device)
    results, _ = backend.run(inputs)
    for i, ranks in enumerate(inputs.used_ranks):
        for g, rank in enumerate(ranks):
            assert not results[f"lora_a.{i}"][g, rank:].any()
            assert not results[f"lora_b.{i}"][g, :, rank:].any()


def test_parameters_accumulate_over_two_backwards(backend, device):
    inputs = CASE.make(torch.float64, device)
    leaves, _ = leaves_of(inputs)
    for _ in range(2):
        backend(leaves).backward(inputs.dy)
    expected = oracle.exact(inputs, [None, None])
    for name, tensor in leaves.named_tensors():
        if name != "dy":
            torch.testing.assert_close(tensor.grad, 2 * expected[name], rtol=1e-9, atol=1e-9)


def test_micro_batches_of_one_adapter_each_are_the_mixed_batch(backend, device):
    """What is trained at once is what would be trained one adapter after the other: to the last bit."""
    if backend.name == "reference":
        pytest.skip("the reference multiplies vectors, and BLAS adds as they are aligned")
    inputs = replace(CASE, shape=(40,), row_scale="token").make(torch.float32, device)
    mixed, _ = leaves_of(inputs)
    backend(mixed).backward(inputs.dy)
    apart, _ = leaves_of(inputs, ("lora_a", "lora_b"))
    for g in range(4):
        rows = [t for t, adapter in enumerate(inputs.ids) if adapter == g]
        part = inputs.rows(rows)
        part = replace(part, lora_a=apart.lora_a, lora_b=apart.lora_b)
        backend(part).backward(part.dy)
    for name in ("lora_a", "lora_b"):
        for one, other in zip(getattr(mixed, name), getattr(apart, name), strict=True):
            assert torch.equal(one.grad, other.grad)


def test_gradients_are_memory_of_their_own(backend, device):
    """`backward` hands a gradient over as `.grad`: what is added to one must not show in another, or in dy."""
    inputs = CASE.make(torch.float32, device)
    backend.require(inputs)
    leaves, sources = leaves_of(inputs)
    dy = [t.clone() for t in inputs.dy.split(inputs.outs, -1)]
    y = PF.multi_lora(*leaves.args, **leaves.kwargs, backend=backend.name)
    torch.autograd.backward(y, dy)
    expected = [t.grad.clone() for t in sources]
    for i, source in enumerate(sources):
        source.grad.zero_()
        for other, value in zip(sources[i + 1 :], expected[i + 1 :], strict=True):
            assert torch.equal(other.grad, value)
    assert torch.equal(torch.cat(dy, -1), inputs.dy)


def test_x_that_is_the_base_gets_both_gradients(backend, device):
    inputs = MultiLoRACase("", (9,), 24, (24,)).make(torch.float64, device)
    leaves, _ = leaves_of(inputs)
    (dx,) = torch.autograd.grad(backend(replace(leaves, base=(leaves.x,))), leaves.x, inputs.dy)
    expected = oracle.exact(inputs, [None])["x"] + inputs.dy
    torch.testing.assert_close(dx, expected)


def test_one_output_of_several_is_used(backend, device):
    inputs = CASE.make(torch.float64, device)
    backend.require(inputs)
    leaves, sources = leaves_of(inputs)
    y = PF.multi_lora(*leaves.args, **leaves.kwargs, backend=backend.name)
    found = torch.autograd.grad(y[1], sources, inputs.dy[..., 40:], allow_unused=True)
    half = replace(inputs, dy=torch.cat([0 * inputs.dy[..., :40], inputs.dy[..., 40:]], -1))
    expected = oracle.exact(half, [None, None])
    for (name, _), value in zip(
        (pair for pair in leaves.named_tensors() if pair[0] != "dy"), found, strict=True
    ):
        zeros = torch.zeros_like(expected[name]) if value is None else value
        torch.testing.assert_close(zeros, expected[name], rtol=1e-9, atol=1e-9)


def test_sparse_gradient_of_the_output(backend, device):
    inputs = CASE.make(torch.float64, device)
    backend.require(inputs)
    index = torch.zeros((1, 1, 1), dtype=torch.long, device=device)
    gradients = []
    for sparse_grad in (False, True):
        leaves, sources = leaves_of(inputs)
        for y in PF.multi_lora(*leaves.args, **leaves.kwargs, backend=backend.name):
            y.gather(-1, index, sparse_grad=sparse_grad).sum().backward(retain_graph=True)
        gradients.append([t.grad for t in sources])
    for dense, sparse in zip(*gradients, strict=True):
        torch.testing.assert_close(sparse, dense)


def test_backward_twice_through_one_graph(backend, device):
    leaves, sources = leaves_of(DROPPED.make(torch.float32, device))
    y = backend(leaves)
    first = torch.autograd.grad(y, sources, leaves.dy, retain_graph=True)
    second = torch.autograd.grad(y, sources, leaves.dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "of", ["x", "lora_a.0", "lora_a.1", "lora_b.0", "row_scale", "base.0", "dy"]
)
@pytest.mark.parametrize(
    "by", ["x", "lora_a.0", "lora_b.0", "lora_b.1", "row_scale", "base.0", "dy"]
)
def test_every_second_derivative_is_refused(of, by, backend, device):
    inputs = CASE.make(torch.float64, device)
    leaves = inputs.map(lambda _, t: t.detach().requires_grad_())
    named = dict(leaves.named_tensors())
    y = backend(leaves)
    loss = (y * named["dy"]).sum()
    (grad,) = torch.autograd.grad(loss, named[of], create_graph=True)
    if of == "dy":  # that is y
        assert torch.equal(grad, y)
    elif of == "base.0":  # that is dy
        assert torch.equal(grad, named["dy"][..., :40])
    elif by == "base.0":  # of which no other gradient is a function
        (found,) = torch.autograd.grad(loss + grad.square().sum(), named[by])
        assert torch.equal(found, named["dy"][..., :40])
    else:
        with pytest.raises(RuntimeError, match="twice"):
            torch.autograd.grad(loss + grad.square().sum(), named[by])


@pytest.mark.parametrize("changed", ["x", "lora_a.0", "lora_b.1", "row_scale"])
def test_saved_tensor_changed_in_place_is_refused(changed, backend, device):
    inputs = replace(CASE, row_scale="token").make(torch.float32, device)
    leaves = inputs.map(
        lambda name, t: t.detach().clone().requires_grad_(name not in ("dy", changed))
    )
    y = backend(leaves)
    dict(leaves.named_tensors())[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(inputs.dy)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_plan_that_was_changed_since_is_refused(mode, backend, device):
    """Its arrays are one buffer, and what is saved of them counts its versions."""
    leaves, _ = leaves_of(CASE.make(torch.float32, device))
    y = backend(leaves)
    with mode():
        leaves.plan.update_([0] * 15)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(leaves.dy)


def test_a_plan_changed_after_backward_serves_the_next_step(backend, device):
    inputs = CASE.make(torch.float32, device)
    plan = MultiAdapterPlan([-1] * 15, 4, device=device)
    for step in range(3):
        ids = tuple((t * (step + 1)) % 5 - 1 for t in range(15))
        plan.update_(ids)
        given = replace(inputs.with_ids(ids), plan=plan)
        results, keep = backend.run(given)
        assert_accurate(results, given, keep)
