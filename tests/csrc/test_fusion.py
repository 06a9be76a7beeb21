"""AdapterFusion under every instruction set that this machine has, and what only C++ can get wrong."""

import functools

import pytest
import torch

from pelt_fast import functional as PF
from pelt_fast.random import new_seed
from pelt_fast.testing.adapter_workloads import HOULSBY, PFEIFFER
from pelt_fast.testing.fusion_oracle import mask, run_with_mask
from pelt_fast.testing.fusion_tolerance import yardsticks
from pelt_fast.testing.fusion_workloads import EVERYTHING, FusionCase
from pelt_fast.testing.tolerance import assert_all_ok, assert_forms, compare

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Sizes at, just below and just past what vectors, tiles and blocks hold.
EDGES = [
    FusionCase(f"edge_{tokens}x{d}x{sum(widths)}", (tokens,), d, widths, **block)
    for tokens, d, widths, block in [
        (97, 65, (17, 15), EVERYTHING),
        (95, 33, (1, 14), HOULSBY),
        (6, 32, (3, 1), PFEIFFER),
    ]
]


@functools.cache
def expected(case, dtype):
    inputs = case.make(dtype)
    torch.manual_seed(0)
    return yardsticks(inputs, mask(inputs, new_seed(inputs.x.device)))


def run(inputs):
    def call(leaves):
        return PF.adapter_fusion(*leaves.args, **leaves.kwargs, backend="cpp")

    return run_with_mask(call, inputs)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_oracle_in_memory_that_held_nan(dtype, run_on):
    """Tiles live in memory that a thread keeps; here it holds NaN when the next call begins."""
    run_on(dtype)
    inputs = FusionCase("", (200,), 120, (96, 40), **EVERYTHING).make(dtype)
    run(inputs.map(lambda _, t: torch.full_like(t, float("nan"))))
    for case in EDGES:
        inputs = case.make(dtype)
        results = run(inputs)
        assert_forms(results, inputs)
        assert_all_ok(compare(results, *expected(case, dtype)))


def test_fingerprint_sees_what_the_version_does_not(cpp):
    from pelt_fast.backends.cpp.fusion import fingerprint

    large, small = torch.randn(600, 600), torch.randn(40)
    seen = {fingerprint([large, small])}
    assert fingerprint([large, small]) in seen
    for change in (
        lambda: large.data.mul_(1.5),  # by a walk: of a large tensor one element may escape
        lambda: small.data[7:8].add_(1),
        lambda: small.numpy().__setitem__(3, 0.0),
        lambda: large.add_(1),
        lambda: small.requires_grad_().detach().zero_(),
    ):
        change()
        found = fingerprint([large, small])
        assert found not in seen
        seen.add(found)
    assert fingerprint([small, large]) not in seen
    assert fingerprint([large.t(), small]) not in seen
    with torch.inference_mode():
        uncounted = torch.randn(600, 600)
    assert fingerprint([uncounted]) is None
    assert fingerprint([uncounted[0]]) is not None
