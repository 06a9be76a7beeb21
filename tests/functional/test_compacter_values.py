"""Every case, backend and dtype of the Compacter adapter against the fp64 oracle: the output and every gradient."""

import functools
from itertools import product

import pytest
import torch

from pelt_fast import functional as PF
from pelt_fast.random import new_seed
from pelt_fast.reference import phm_matrix
from pelt_fast.testing import compacter_oracle as oracle
from pelt_fast.testing.compacter_workloads import (
    BLOCKS,
    CASES,
    EVERYTHING,
    HOULSBY,
    MIXED_DTYPE,
    CompacterCase,
)
from pelt_fast.testing.tolerance import assert_all_ok, assert_forms, compare

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
_SLOW = {
    (case, dtype)
    for i, case in enumerate(CASES)
    for dtype in DTYPES
    if dtype != DTYPES[i % 4] and (case not in BLOCKS or dtype != DTYPES[(i + 1) % 4])
}


@functools.cache
def expected(case, dtype, device):
    """The yardsticks are the same for every backend, and slow."""
    inputs = case.make(dtype, device)
    torch.manual_seed(0)
    return oracle.yardsticks(inputs, oracle.mask(inputs, new_seed(inputs.x.device)))


def check(case, dtype, backend, device):
    inputs = case.make(dtype, device)
    results, _ = backend.run(inputs)
    assert set(results) == {"y", *(name for name, _ in inputs.named_tensors())} - {"dy"}
    assert_forms(results, inputs)
    assert_all_ok(compare(results, *expected(case, dtype, device)))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(
            *pair,
            id="-".join(map(str, pair)),
            marks=[pytest.mark.slow] if pair in _SLOW else [],
        )
        for pair in product(CASES, DTYPES)
    ],
)
def test_matches_the_oracle(case, dtype, backend, device):
    check(case, dtype, backend, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", MIXED_DTYPE, ids=str)
def test_fp32_parameters_over_half_precision(case, dtype, backend, device):
    check(case, dtype, backend, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_are_bitwise_equal(dtype, backend, device):
    inputs = CompacterCase("", (3, 67), 132, 28, **EVERYTHING).make(dtype, device)
    first, _ = backend.run(inputs)
    again, _ = backend.run(inputs)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_results_do_not_depend_on_the_number_of_threads(device):
    inputs = CompacterCase("", (333,), 128, 24, **EVERYTHING).make(torch.float32, device)

    def run(threads):
        torch.set_num_threads(threads)
        try:
            return oracle.adapter_oracle.run_with_mask(
                lambda i: PF.compacter(*i.args, **i.kwargs, backend="cpp"), inputs
            )[0]
        finally:
            torch.set_num_threads(1)

    if device != "cpu":
        pytest.skip("threads are the CPU's")
    alone, together = run(1), run(3)
    assert all(torch.equal(alone[name], together[name]) for name in alone)


def test_one_rule_for_both_projections_gets_both_gradients(backend, device):
    inputs = CompacterCase("", (2, 5), 40, 12, **HOULSBY).make(torch.float64, device)
    backend.require(inputs)
    rule = inputs.down_rule.clone().requires_grad_()
    x, down, down_bias, up, up_bias = inputs.args

    def call(first, second):
        weights = (down._replace(rule=first), down_bias, up._replace(rule=second), up_bias)
        return PF.compacter(x, *weights, **inputs.kwargs, backend=backend.name)

    (together,) = torch.autograd.grad(call(rule, rule), rule, inputs.dy)
    first, second = (rule.detach().clone().requires_grad_() for _ in range(2))
    apart = torch.autograd.grad(call(first, second), (first, second), inputs.dy)
    torch.testing.assert_close(together, apart[0] + apart[1])


def test_activation_that_no_kernel_has(device):
    inputs = CompacterCase("", (2, 5), 40, 12, "silu", **EVERYTHING).make(torch.float64, device)
    gradients = []
    for activation in ("silu", torch.nn.functional.silu):

        def function(leaves, activation=activation):
            return PF.compacter(*leaves.args, **{**leaves.kwargs, "activation": activation})

        gradients.append(oracle.adapter_oracle.run_with_mask(function, inputs)[0])
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value)


@pytest.mark.parametrize(
    ("n", "sizes", "rank"),
    [(4, (40, 12), 1), (4, (12, 40), 2), (3, (9, 9), None), (2, (6, 8), 9)],
    ids=str,
)
def test_phm_linear(n, sizes, rank, device):
    torch.manual_seed(0)
    (d, m), options = sizes, {"dtype": torch.float64, "device": device}
    rule = torch.randn(n, n, n, **options)
    left = torch.randn(n, d // n, rank or m // n, **options)
    right = None if rank is None else torch.randn(n, rank, m // n, **options)
    x, bias = torch.randn(2, 3, d, **options), torch.randn(m, **options)
    y = PF.phm_linear(x, PF.PHM(rule, left, right), bias)
    torch.testing.assert_close(y, x @ phm_matrix(rule, left, right) + bias)
    leaves = [t.requires_grad_() for t in (x, rule, left, bias)]
    assert torch.autograd.gradgradcheck(
        lambda x, rule, left, bias: PF.phm_linear(x, PF.PHM(rule, left, right), bias).square(),
        leaves,
        fast_mode=True,
    )
