"""The bottleneck adapter under every instruction set that this machine has, and what only C++ can get wrong."""

import functools

import pytest
import torch

from pelt_fast import functional as PF
from pelt_fast.activations import ACTIVATIONS, activate, derivative
from pelt_fast.random import new_seed
from pelt_fast.testing import adapter_workloads as workloads
from pelt_fast.testing.adapter_oracle import mask, run_with_mask
from pelt_fast.testing.adapter_tolerance import assert_accurate, yardsticks
from pelt_fast.testing.adapter_workloads import HOULSBY, PFEIFFER, AdapterCase
from pelt_fast.testing.tolerance import assert_all_ok, assert_forms, compare

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FACTORS = {**PFEIFFER, "dropout_p": 0.2, "gate": "token", "scale": "channel"}
# Sizes at, just below and just past what vectors, tiles and blocks hold.
EDGES = [
    AdapterCase(f"edge_{tokens}x{d}x{m}", (tokens,), d, m, **block)
    for tokens, d, m, block in [
        (95, 63, 15, HOULSBY),
        (97, 65, 17, FACTORS),
        (193, 33, 31, PFEIFFER),
        (6, 32, 16, HOULSBY),
        (257, 16, 64, FACTORS),
        (2, 515, 80, PFEIFFER),
    ]
]
NAMED = ("pfeiffer", "parallel", "everything", "odd", "past_one_tile", "one_feature", "gate_alone")
CASES = [c for c in workloads.CASES if c.name in NAMED] + EDGES


def run(inputs):
    def call(leaves):
        return PF.bottleneck_adapter(*leaves.args, **leaves.kwargs, backend="cpp")

    return run_with_mask(call, inputs)


@functools.cache
def expected(case, dtype):
    """The yardsticks are the same for every instruction set, and slow."""
    inputs = case.make(dtype)
    torch.manual_seed(0)
    return yardsticks(inputs, mask(inputs, new_seed(inputs.x.device)))


def check(case, dtype):
    inputs = case.make(dtype)
    results, _ = run(inputs)
    assert_forms(results, inputs)
    assert_all_ok(compare(results, *expected(case, dtype)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_oracle(case, dtype, run_on):
    run_on(dtype)
    check(case, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fp32_parameters_and_sums_that_overflow(dtype, run_on):
    run_on(dtype)
    cases = [workloads.MIXED_DTYPE[3]]
    if dtype == torch.float16:
        cases += [workloads.FP16_LARGE, workloads.FP16_OVERFLOW]
    for case in cases:
        inputs = case.make(dtype)
        results, keep = run(inputs)
        assert results["y"].isfinite().all()
        assert_accurate(results, inputs, keep)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_memory_kept_between_calls_leaks_nothing(dtype, run_on):
    """Tiles live in memory that a thread keeps; here it holds NaN when the next call begins."""
    run_on(dtype)
    for block in (PFEIFFER, FACTORS):
        inputs = AdapterCase("", (200,), 600, 512, **block).make(dtype)
        run(inputs.map(lambda _, t: torch.full_like(t, float("nan"))))
    for case in EDGES:
        check(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_rows_that_overlap(dtype, isa):
    row = torch.randn(96 + 69).to(dtype)
    unfolded, expanded = row.unfold(0, 96, 1), row[:96].expand(70, 96)
    weights = [torch.randn(s).to(dtype) for s in ((7, 96), (96, 7))]
    outcomes = []
    for x, skip in ((unfolded, expanded), (unfolded.contiguous(), expanded.contiguous())):
        leaves = [t.clone().requires_grad_() for t in weights]
        y = PF.bottleneck_adapter(x, leaves[0], None, leaves[1], None, residual=skip, backend="cpp")
        outcomes.append((y, *torch.autograd.grad(y, leaves, expanded)))
    for overlapping, contiguous in zip(*outcomes, strict=True):
        torch.testing.assert_close(overlapping, contiguous)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_two_runs_are_bitwise_equal_whatever_the_threads(threads, cpp):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        inputs = AdapterCase("", (1000,), 96, 24, **FACTORS).make(torch.float32)
        first, second = run(inputs)[0], run(inputs)[0]
    finally:
        torch.set_num_threads(before)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


# the values where approximations change, where exponentials over- and underflow, and the special ones
POINTS = torch.cat(
    (
        torch.linspace(-12, 12, 4801),
        torch.logspace(-30, 2.3, 400),
        -torch.logspace(-30, 2.3, 400),
        torch.tensor([0.0, -0.0, 0.625, -0.625, 1.0, -1.0, 1.41421356, 6.0, 88.37, -87.3]),
    )
)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_torch(name, isa):
    """Value and derivative in fp32, within a few units in the last place of the largest term in their formulas."""
    one = torch.ones(1, 1)
    q = POINTS[:, None].clone().requires_grad_()
    y = PF.bottleneck_adapter(q, one, None, one, None, activation=name, backend="cpp")
    (slope,) = torch.autograd.grad(y.sum(), q)
    wide, ulp = POINTS.double(), torch.finfo(torch.float32).eps
    value, exact_slope = activate(wide, name), derivative(wide, name)
    assert ((y.detach()[:, 0] - value).abs() <= 4 * ulp * (value.abs() + wide.abs())).all()
    # the slope's formulas hold terms as large as q · act'(q) near zero and q² e^(-q²) away from it
    assert ((slope[:, 0] - exact_slope).abs() <= 16 * ulp * (1 + exact_slope.abs())).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_what_is_not_finite_goes_through_activations_as_in_torch(name, isa):
    one = torch.ones(1, 1)
    q = torch.tensor([[float("nan")], [float("inf")], [-float("inf")]])
    y = PF.bottleneck_adapter(q, one, None, one, None, activation=name, backend="cpp")
    assert torch.equal(y.nan_to_num(7, 8, 9), activate(q, name).nan_to_num(7, 8, 9))
