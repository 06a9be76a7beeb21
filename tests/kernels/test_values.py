"""Values of every kernel against the fp64 oracle, every access checked, programs in random order."""

import pytest
import torch

from pelt_fast.testing import oracle
from pelt_fast.testing.tolerance import assert_accurate
from pelt_fast.testing.workloads import CASES, FP16_OVERFLOW, MIXED_DTYPE, Adapter, Case

pytest.importorskip("triton")
from pelt_fast.testing.gpu_free import Trace

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Minutes, interpreted; the same paths run in smaller cases.
HEAVY = (
    "many_tokens",
    "past_one_tile",
    "rank_129",
    "rank_256",
    "wide_in",
    "wide_out",
    "whole_tiles",
)
# What depends on the dtype; strides and ranks do not.
EVERY_DTYPE = (
    "odd",
    "one_token",
    "three_adapters",
    "dropout_each_its_own",
    "dropout_all",
    "rank_16",
)
CASES_WITH_TOKENS = tuple(case for case in (*CASES, *MIXED_DTYPE) if case.tokens)


def _slow(case, dtype):
    # an fp32 adapter over fp32 is no mixture
    if any(name in case.name for name in HEAVY) or dtype == case.adapter_dtype:
        return True
    names = {torch.float32: EVERY_DTYPE, torch.float16: EVERY_DTYPE[:3]}.get(dtype)
    return names is not None and not any(name in case.name for name in names)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(
            case,
            dtype,
            id=f"{case}-{str(dtype).removeprefix('torch.')}",
            marks=[pytest.mark.slow] if _slow(case, dtype) else [],
        )
        for dtype in DTYPES
        for case in CASES_WITH_TOKENS
    ],
)
def test_every_case(case, dtype, kernels):
    inputs = case.make(dtype, kernels.device)
    results = kernels.run(inputs, Trace("random"))
    assert_accurate(_shaped(results, inputs), inputs, kernels.masks(inputs))


def test_several_programs_in_every_dimension(several_programs, kernels):
    inputs = several_programs.make(torch.bfloat16, kernels.device)
    results = kernels.run(inputs, Trace("random"), capability=90)
    assert_accurate(_shaped(results, inputs), inputs, kernels.masks(inputs))


def test_total_rank_above_one_tile(kernels):
    case = Case("wide_rank", (20,), 40, 24, (Adapter(129, 0.5, 0.25), Adapter(256, 0.25)))
    inputs = case.make(torch.bfloat16, kernels.device)
    results = kernels.run(inputs, Trace("random"))
    assert_accurate(_shaped(results, inputs), inputs, kernels.masks(inputs))


def test_fp16_near_overflow(kernels):
    inputs = FP16_OVERFLOW.make(torch.float16, kernels.device)
    results = _shaped(kernels.run(inputs, Trace()), inputs)
    assert results["y"].isfinite().all()
    assert_accurate(results, inputs, kernels.masks(inputs))


def test_fp32_products_are_tf32_where_torch_allows_it(kernels, tf32):
    inputs = Case("tf32", (16,), 64, 32).make(torch.float32, kernels.device)
    exact = oracle.exact(inputs, kernels.masks(inputs), ["x"])
    for name, value in exact.items():
        error = (kernels.run(inputs)[name] - value).abs().max() / value.abs().max()
        assert 1e-5 < error < 1e-2, name


def test_rows_past_two_to_the_31(kernels, far_rows):
    """Strides of 2**30 elements: the third row begins where a 32-bit offset has turned negative."""
    case = Case("far_rows", (3,), 40, 40)
    inputs = case.make(torch.float16, kernels.device)
    far = inputs.map(lambda name, t: far_rows(t, name) if name in ("x", "dy") else t)
    near = kernels.run(inputs)
    for name, value in kernels.run(far).items():
        assert torch.equal(value, near[name]), name


def _shaped(results, inputs):
    """Rows back in the shapes of x and dy."""
    return {
        name: value.reshape({"y": inputs.dy, "x": inputs.x}[name].shape)
        if name in ("y", "x")
        else value
        for name, value in results.items()
    }
