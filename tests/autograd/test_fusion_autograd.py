"""AdapterFusion: finite differences, patterns of `requires_grad`, and what stays in memory until backward."""

import random

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from pelt_fast import functional as PF
from pelt_fast.testing import fusion_oracle as oracle
from pelt_fast.testing.adapter_workloads import HOULSBY, PFEIFFER, T5
from pelt_fast.testing.fusion_workloads import EVERYTHING, FusionCase

# a finite difference needs a smooth activation and a variance that is no rounding error
EPS = {"pre_eps": 1e-2, "eps": 1e-2}


@pytest.mark.parametrize(
    "case",
    [
        FusionCase("bare", (7,), 3, (2, 2)),
        FusionCase("houlsby_static", (7,), 3, (2, 1), "silu", "qk", **{**HOULSBY, **EPS}),
        FusionCase("everything", (7,), 3, (2, 2), "tanh", **{**EVERYTHING, **EPS}),
        FusionCase("few_tokens", (2,), 3, (2, 2), "tanh", **{**EVERYTHING, **EPS}),
        FusionCase("value_residual", (2,), 3, (2, 1), value_residual=True, **{**EVERYTHING, **EPS}),
    ],
    ids=str,
)
def test_gradcheck(case, backend, device):
    inputs = case.make(torch.float64, device)
    backend.require(inputs)
    names = oracle.trained(inputs)

    def function(*tensors):
        torch.manual_seed(0)  # the same mask at every evaluation
        values = dict(zip(names, tensors, strict=True))
        given = inputs.map(lambda name, t: values.get(name, t))
        return PF.adapter_fusion(*given.args, **given.kwargs, backend=backend.name)

    leaves = [t.detach().requires_grad_() for name, t in inputs.named_tensors() if name in names]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


CASES = {
    "one_gradient": FusionCase("", (3, 13), 24, (8, 3), **EVERYTHING),  # x's is skip's
    "apart": FusionCase("", (3, 13), 24, (8, 3), **{**EVERYTHING, "residual_x": False}),
    "added_last": FusionCase("", (31,), 24, (8, 3), "relu", residual_skip=True),
    "few_tokens": FusionCase("", (5,), 24, (8, 3), **EVERYTHING),
}


@pytest.mark.parametrize("name", CASES)
def test_patterns(name, backend, device):
    """None, each alone, all but one, and a sample of the others: as when everything is wanted."""
    inputs = CASES[name].make(torch.float64, device)
    every, _ = backend.run(inputs)
    names = [other for other in every if other != "y"]
    draw = random.Random(0)
    patterns = [[], *([n] for n in names), *([o for o in names if o != n] for n in names)]
    patterns += [[n for n in names if draw.random() < 0.5] for _ in range(12)]
    for wanted in patterns:
        found, _ = backend.run(inputs, wanted)
        assert set(found) == {"y", *wanted}
        for key, value in found.items():
            torch.testing.assert_close(value, every[key], rtol=1e-9, atol=1e-9, msg=key)


def test_nothing_requires_a_gradient(backend, device):
    assert not backend(CASES["apart"].make(torch.float32, device)).requires_grad


def test_second_derivative_says_so(backend, device):
    inputs = CASES["apart"].make(torch.float64, device)
    leaves = inputs.map(lambda _, t: t.detach().requires_grad_())
    (dx,) = torch.autograd.grad(backend(leaves).square().sum(), leaves.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


TOKENS, D, WIDTHS = 39, 24, (8, 3)


def saved_by(call):
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = call()
    return y, saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("block", [PFEIFFER, T5, EVERYTHING], ids=["pfeiffer", "t5", "everything"])
def test_nothing_as_large_as_x_is_saved(block, layout, dtype, backend, device):
    """Of size T: q, k, p and statistics. The rest is x, skip and query by alias, and thin matrices."""
    inputs = FusionCase("", (3, 13), D, WIDTHS, layout=layout, **block).make(dtype, device)
    leaves = inputs.map(lambda _, t: t.detach().requires_grad_())
    _, saved = saved_by(lambda: backend(leaves))
    arguments = {t.untyped_storage().data_ptr() for _, t in leaves.named_tensors()}
    new = [t for t in saved if t.untyped_storage().data_ptr() not in arguments and t.numel()]
    thin, columns = sum(WIDTHS), sum(WIDTHS) + len(WIDTHS)
    of_tokens = sorted(tuple(t.shape) for t in new if t.shape[0] == TOKENS)
    wanted = [(TOKENS, thin), (TOKENS, columns), (TOKENS, len(WIDTHS))]
    wanted += [(TOKENS, 2)] * (("pre_ln" in block) + ("post_ln" in block))
    assert of_tokens == sorted(wanted)
    # what folding keeps has at most the bottlenecks in one direction, or is a parameter in fp32
    for t in new:
        if t.shape[0] != TOKENS:
            assert min(t.shape) <= columns or set(t.shape) == {D}, t.shape
    assert not any(t.numel() == TOKENS * D for t in new)


def test_saved_tensors_can_be_moved_away_and_back(backend, device):
    inputs = CASES["apart"].make(torch.float32, device)
    leaves = inputs.map(lambda name, t: t.detach().requires_grad_(name != "dy"))
    sources = [t for name, t in leaves.named_tensors() if name != "dy"]
    torch.manual_seed(0)
    expected = torch.autograd.grad(backend(leaves), sources, inputs.dy)
    torch.manual_seed(0)
    with saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        y = backend(leaves)
        moved = torch.autograd.grad(y, sources, inputs.dy)
    assert all(torch.equal(a, b) for a, b in zip(moved, expected, strict=True))


def test_the_same_tensors_are_as_good_as_equal_ones(backend, device):
    """A query or a residual that is x, in the call and in its gradient."""
    inputs = FusionCase("", (31,), 24, (8, 3), **{**PFEIFFER, "query": True}).make(
        torch.float64, device
    )
    backend.require(inputs)
    leaves = inputs.map(lambda _, t: t.detach().requires_grad_())

    def results(x, query, value_residual):
        more = {**leaves.kwargs, "query": query, "value_residual": value_residual}
        y = PF.adapter_fusion(x, *leaves.args[1:], **more, backend=backend.name)
        return [y, *torch.autograd.grad(y, [leaves.x, leaves.down[0], leaves.ln_weight], inputs.dy)]

    x = leaves.x
    for residual in (None, x):
        same = results(x, x, residual)
        apart = results(x, x.clone(), None if residual is None else x.clone())
        for found, wanted in zip(same, apart, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
