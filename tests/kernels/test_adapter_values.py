"""Values of the adapter's kernels against the fp64 oracle, every access checked, programs in random order."""

from dataclasses import replace

import pytest
import torch

from pelt_fast.testing import adapter_oracle, adapter_workloads
from pelt_fast.testing.adapter_tolerance import assert_accurate, yardsticks
from pelt_fast.testing.adapter_workloads import (
    ACTIVATIONS,
    CASES,
    EVERYTHING,
    FP16_LARGE,
    FP16_OVERFLOW,
    HOULSBY,
    MIXED_DTYPE,
    PFEIFFER,
    AdapterCase,
)

pytest.importorskip("triton")
from pelt_fast.kernels.adapter import forward
from pelt_fast.testing.gpu_free import Trace

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# What is quick and stands for its kind; the rest takes minutes, interpreted.
QUICK = (
    *("pfeiffer", "houlsby", "t5", "t5_pfeiffer", "pre_ln_only", "bare", "everything"),
    *(f"activation_{name}" for name in ("relu", "gelu_tanh", "silu", "sigmoid", "relu6", "mish")),
    *("one_token", "odd", "all_ones_normalised", "bottleneck_1", "no_bias", "scale_one"),
    *("x_sliced", "dy_expanded", "weight_transposed", "dropout_odd", "dropout_all"),
    *("far_from_zero", "small_rows", "fp32_parameters_odd"),
)
EVERY_DTYPE = ("odd", "everything", "activation_gelu", "activation_tanh")


def _slow(case, dtype):
    if dtype == torch.bfloat16:
        return case.name not in QUICK
    return case.name not in EVERY_DTYPE


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
        for case in (*CASES, *MIXED_DTYPE)
        if case.tokens and case.param_dtype != dtype
    ],
)
def test_every_case(case, dtype, adapter_kernels):
    _check(adapter_kernels, case.make(dtype, adapter_kernels.device))


def _check(kernels, inputs, capability=90):
    results = kernels.run(inputs, Trace("random"), capability)
    assert_accurate(results, adapter_oracle.as_rows(inputs), kernels.mask(inputs))


@pytest.mark.parametrize(
    "case", [FP16_OVERFLOW, pytest.param(FP16_LARGE, marks=pytest.mark.slow)], ids=str
)
def test_fp16_near_overflow(case, adapter_kernels):
    _check(adapter_kernels, case.make(torch.float16, adapter_kernels.device))


@pytest.mark.parametrize("block", [HOULSBY, EVERYTHING], ids=["houlsby", "everything"])
def test_several_blocks_of_everything(block, several_blocks, adapter_kernels):
    case = AdapterCase("blocks", (36,), 40, 20, **block)
    _check(adapter_kernels, case.make(torch.bfloat16, adapter_kernels.device))


PATTERNS = [
    *((name,) for name in adapter_workloads.NAMES),
    ("x", "up"),
    ("skip", "gate"),
    ("down", "ln_weight"),
    ("up_bias", "ln_bias"),
    ("pre_bias", "scale"),
]


@pytest.mark.parametrize("form", ["all one", "each its own"])
def test_gradients_that_are_asked_for_alone(form, adapter_kernels):
    """The same bits as all together: whatever is left out, nothing else changes."""
    more = {"residual_skip": False} if form == "each its own" else {}
    case = AdapterCase("alone", (9,), 40, 12, **{**EVERYTHING, **more})
    inputs = case.make(torch.bfloat16, adapter_kernels.device)
    together = adapter_kernels.run(inputs)
    for wanted in PATTERNS if more else PATTERNS[::3]:
        results = adapter_kernels.run_wanted(inputs, wanted)
        assert set(results) == {"y", *wanted}
        for name, value in results.items():
            assert torch.equal(value, together[name]), (name, wanted)


@pytest.mark.parametrize("post_ln", [False, True])
def test_gradients_without_layernorms(post_ln, adapter_kernels):
    """Without a layernorm dw needs no w, and dx alone no dq where there is nothing but the residual."""
    case = AdapterCase("plain", (9,), 40, 12, residual_x=True, residual_skip=True, post_ln=post_ln)
    inputs = case.make(torch.float32, adapter_kernels.device)
    together = adapter_kernels.run(inputs)
    for wanted in (("skip",), ("up",), ("up_bias",), ("down_bias",), ("x",)):
        results = adapter_kernels.run_wanted(inputs, wanted)
        assert all(torch.equal(value, together[name]) for name, value in results.items())


@pytest.mark.parametrize("activation", [case.activation for case in ACTIVATIONS])
def test_nan_stays_in_its_row(activation, adapter_kernels):
    case = AdapterCase("nan", (5,), 24, 8, activation, **{**HOULSBY, "post_ln": False})
    inputs = case.make(torch.float32, adapter_kernels.device)
    x = inputs.x.clone()
    x[2, 3] = float("nan")
    y = adapter_kernels.run(replace(inputs, x=x))["y"]
    assert y[2].isnan().all()
    assert y[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # by the interpreter
@pytest.mark.parametrize("bottleneck", [1, 12])  # infinity times padding would be NaN
@pytest.mark.parametrize("infinite", ["x", "dy"])
@pytest.mark.parametrize("activation", [case.activation for case in ACTIVATIONS])
def test_infinity_ends_where_eager_ends_it(activation, infinite, bottleneck, adapter_kernels):
    """Torch selects 0 where relu, relu2 and relu6 are flat, and multiplies by every other slope."""
    case = AdapterCase("infinite", (6,), 24, bottleneck, activation, down_bias=False)
    inputs = case.make(torch.float32, adapter_kernels.device)
    x, down, dy = inputs.x.clone(), inputs.down.abs(), inputs.dy.clone()
    # q below zero, and above six; the others have some of each
    x[0] = -x[0].abs()
    x[1] = 32 * x[1].abs()
    if infinite == "x":
        x[:2] *= float("inf")
    else:
        dy[:3] = float("inf")
    inputs = replace(inputs, x=x, down=down, dy=dy)
    results = adapter_kernels.run(inputs, Trace("random"))
    for name, eager in adapter_oracle.eager(adapter_oracle.as_rows(inputs), None).items():
        assert torch.equal(results[name].isfinite(), eager.isfinite()), name
        if name == "y":
            assert torch.equal(results[name].isnan(), eager.isnan())


def test_far_from_zero_does_not_cancel(adapter_kernels):
    """E[x²] - E[x]² would lose every digit of these variances."""
    case = AdapterCase("far", (9,), 300, 8, **{**PFEIFFER, "pre_eps": 1e-5}, x_mean=1e4)
    _check(adapter_kernels, case.make(torch.float32, adapter_kernels.device))


@pytest.mark.parametrize("config", ["default", "held"])
def test_held_and_recomputed_rows_agree(config, adapter_kernels, monkeypatch):
    default = forward.default_config

    def configured(problem):
        return replace(default(problem), held=config == "held", block_d=32)

    monkeypatch.setattr(forward, "default_config", configured)
    case = AdapterCase("held", (20,), 72, 12, **HOULSBY, dropout_p=0.25)
    _check(adapter_kernels, case.make(torch.bfloat16, adapter_kernels.device))


def test_fp32_products_are_tf32_where_torch_allows_it(adapter_kernels, tf32):
    inputs = AdapterCase("tf32", (16,), 64, 32, **HOULSBY).make(
        torch.float32, adapter_kernels.device
    )
    rows = adapter_oracle.as_rows(inputs)
    results = adapter_kernels.run(inputs)
    exact, *_ = yardsticks(rows, None)
    for name in ("y", "up", "down"):
        error = (results[name] - exact[name]).abs().max() / exact[name].abs().max()
        assert 1e-5 < error < 1e-2, name


def test_rows_past_two_to_the_31(adapter_kernels, far_rows):
    """Strides of 2**30 elements: the third row begins where a 32-bit offset has turned negative."""
    inputs = AdapterCase("far_rows", (3,), 40, 12, **PFEIFFER).make(
        torch.float16, adapter_kernels.device
    )
    far = inputs.map(lambda name, t: far_rows(t, name) if name in ("x", "skip", "dy") else t)
    near = adapter_kernels.run(inputs)
    for name, value in adapter_kernels.run(far).items():
        assert torch.equal(value, near[name]), name
