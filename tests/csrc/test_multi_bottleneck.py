"""Batched bottleneck adapters under every instruction set of this machine, and what only C++ can get wrong."""

import functools

import pytest
import torch

from pelt_fast import MultiAdapterPlan
from pelt_fast import functional as PF
from pelt_fast.backends.cpp import _C

# Sizes at, just below and just past what vectors, blocks and tiles hold: tokens, features, widths, turned.
SHAPES = {
    "past_a_block": (19, 1030, (33, 5), False),
    "turned": (70, 136, (17, 40), True),
    "whole_vectors": (131, 64, (16, 8), False),
    "one_feature": (9, 1, (1, 3), False),
    "one_unit": (9, 31, (1, 1), True),
}


def call(shape, dtype, backend):
    tokens, d, widths, turned = SHAPES[shape]
    g, m = torch.Generator().manual_seed(0), max(widths)

    def draw(*size, std=1.0):
        return torch.randn(*size, generator=g, dtype=torch.float64).mul(std).to(dtype)

    def stack(*size, std):
        found = draw(*size, std=std)
        return found.mT.contiguous().mT if turned else found

    leaves = [draw(tokens, d), draw(tokens, d), stack(2, m, d, std=d**-0.5), draw(2, m)]
    leaves += [stack(2, d, m, std=m**-0.5), draw(2, d), draw(2), draw(tokens, 1), draw(d), draw(d)]
    dy = draw(tokens, d)
    for t in leaves:
        t.requires_grad_()
    x, other, down, down_bias, up, up_bias, scale, gate, ln_weight, ln_bias = leaves
    ids = [(t * t) % 4 - 1 + t % 2 for t in range(tokens)]
    y = PF.multi_bottleneck(
        *(x, down, down_bias, up, up_bias, MultiAdapterPlan(ids, 2)),
        activation="silu",
        scaling=scale,
        widths=widths,
        gate=gate,
        residual=other,
        ln_weight=ln_weight,
        ln_bias=ln_bias,
        backend=backend,
    )
    return leaves, [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@functools.cache
def expected(shape):
    return call(shape, torch.float64, "torch")[1]


@pytest.mark.parametrize("shape", SHAPES)
def test_fp64_is_torchs(shape, isa, run_on):
    run_on(torch.float64)
    leaves, found = call(shape, torch.float64, "cpp")
    for ours, theirs in zip(found, expected(shape), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)
    for gradient, leaf in zip(found[1:], leaves, strict=True):
        assert gradient.stride() == leaf.stride() or 1 in leaf.shape


def _arguments(**changed):
    plan = MultiAdapterPlan([0, 1, -1], 2).arrays
    given = {
        "x": torch.randn(3, 8),
        "residual": torch.randn(3, 8),
        "down": torch.randn(2, 2, 8),
        "down_bias": torch.randn(2, 2),
        "up": torch.randn(2, 8, 2),
        "up_bias": torch.randn(2, 8),
        "scale": torch.randn(2),
        "gate": torch.randn(3),
        "ln_weight": torch.randn(8),
        "ln_bias": torch.randn(8),
        "plan": plan,
        "widths": torch.tensor([2, 1], dtype=torch.int32),
    }
    for i, name in ((1, "perm"), (2, "indptr")):
        if name in changed:
            plan[i] = changed.pop(name)
    return [*{**given, **changed}.values(), None, "relu", 1.0, 1e-5, 0.0, True]


@pytest.mark.parametrize(
    "changed",
    [
        {"perm": torch.tensor([0, 1, 3], dtype=torch.int32)},
        {"perm": torch.tensor([0, 1, 1], dtype=torch.int32)},
        {"indptr": torch.tensor([0, 1, 2, 4], dtype=torch.int32)},
        {"indptr": torch.tensor([0, -5, 2, 3], dtype=torch.int32)},
    ],
    ids=["row_past_the_end", "row_twice", "segment_past_the_end", "segment_before_the_start"],
)
def test_plan_that_was_written_over_leads_out_of_no_tensor(changed, cpp):
    with pytest.raises(ValueError, match="plan does not hold each of x's 3 rows once"):
        _C.multi_bottleneck_fwd(*_arguments(**changed))


@pytest.mark.parametrize("position", range(12))
def test_freed_memory_is_an_error(position, cpp):
    arguments = _arguments()
    value = arguments[position]
    (value if isinstance(value, torch.Tensor) else value[0]).untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="its storage has 0"):
        _C.multi_bottleneck_fwd(*arguments)


def test_widths_that_are_out_of_range_lead_out_of_no_tensor(cpp):
    for widths in ([99, -7], [2**31 - 1, -(2**31)]):
        given = torch.tensor(widths, dtype=torch.int32)
        arguments = _arguments()
        arguments[11] = torch.tensor([2, 0], dtype=torch.int32)
        expected = _C.multi_bottleneck_fwd(*arguments)[0]
        arguments[11] = given
        assert torch.equal(_C.multi_bottleneck_fwd(*arguments)[0], expected)
