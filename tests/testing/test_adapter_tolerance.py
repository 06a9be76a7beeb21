"""The adapter's tolerance passes what is right and catches what is wrong by little: made wrong here on purpose."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from pelt_fast import reference
from pelt_fast.backends.torch_ import adapter as torch_backend
from pelt_fast.testing import adapter_oracle as oracle
from pelt_fast.testing.adapter_tolerance import Model, _copies, assert_accurate, deviations
from pelt_fast.testing.adapter_workloads import (
    ACTIVATIONS,
    CASES,
    EVERYTHING,
    MIXED_DTYPE,
    NAMES,
    NUMBERS,
    PFEIFFER,
    AdapterCase,
)
from pelt_fast.testing.oracle import run
from pelt_fast.testing.perturbation import Perturbation

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CASE = AdapterCase("", (33,), 24, 16, **{**EVERYTHING, "pre_eps": 1e-5, "eps": 1e-5})
SEED = torch.tensor([3])


def drawn(case, dtype):
    inputs = oracle.as_rows(case.make(dtype))
    return inputs, oracle.mask(inputs, SEED)


def reference_rounded_once(inputs, keep):
    """The best result there is: computed in fp64, rounded once."""
    dtypes = {"y": inputs.x.dtype, **{name: t.dtype for name, t in inputs.named_tensors()}}
    return {name: value.to(dtypes[name]) for name, value in oracle.exact(inputs, keep).items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [CASE, *ACTIVATIONS, *NUMBERS, *MIXED_DTYPE], ids=str)
def test_best_and_eager_pass(case, dtype):
    if case.param_dtype == torch.float32 and dtype == torch.float64:
        pytest.skip("parameters narrower than x")
    inputs, keep = drawn(case, dtype)
    assert_accurate(reference_rounded_once(inputs, keep), inputs, keep)
    assert_accurate(oracle.eager(inputs, keep), inputs, keep)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_oracle_eager_and_model_are_one_formula(case):
    """In fp64, where they differ by rounding alone."""
    inputs = case.make(torch.float64)
    keep = oracle.mask(inputs, SEED)
    exact, eager = oracle.exact(inputs, keep), oracle.eager(inputs, keep)
    model = run(Model(Perturbation(), keep), _copies(inputs, 1))
    assert set(exact) == set(eager) == set(model)
    for name, value in exact.items():
        torch.testing.assert_close(eager[name], value, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(model[name][0], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_allowed_is_close_to_what_is_unavoidable(dtype):
    """Else a real error would hide below it: some roundings of the largest result, whatever the dtype."""
    inputs, keep = drawn(CASE, dtype)
    exact = oracle.exact(inputs, keep)
    for deviation in deviations(reference_rounded_once(inputs, keep), inputs, keep):
        scale = exact[deviation.name].abs().max().item()
        assert deviation.allowed_max < 40 * torch.finfo(dtype).eps * scale, deviation


def one_percent_of_scaling(inputs, keep):
    return replace(inputs, scale=1.01 * inputs.scale), keep


def eps_ten_times(inputs, keep):
    return replace(inputs, eps=10 * inputs.eps), keep


def pre_eps_of_the_other(inputs, keep):
    return replace(inputs, pre_eps=inputs.eps), keep


def one_element_of_the_mask(inputs, keep):
    changed = keep.clone()
    changed[5, 7] = ~changed[5, 7]
    return inputs, changed


def mask_one_element_off(inputs, keep):
    return inputs, keep.flatten().roll(1).view_as(keep)


def without_rescaling_of_what_is_kept(inputs, keep):
    return replace(inputs, scale=(1 - inputs.dropout_p) * inputs.scale), keep


def gate_of_the_next_token(inputs, keep):
    return replace(inputs, gate=inputs.gate.roll(-1, 0)), keep


def last_token_lost(inputs, keep):
    dy = inputs.dy.clone()
    dy[-1] = 0
    return replace(inputs, dy=dy), keep


def last_feature_lost(inputs, keep):
    down = inputs.down.clone()
    down[:, -1] = 0
    return replace(inputs, down=down), keep


def last_of_the_bottleneck_lost(inputs, keep):
    up = inputs.up.clone()
    up[:, -1] = 0
    return replace(inputs, up=up), keep


def without(name):
    def change(inputs, keep):
        value = getattr(inputs, name)
        return replace(inputs, **{name: False if value is True else torch.zeros_like(value)}), keep

    change.__name__ = f"without_{name}"
    return change


WRONG = [
    one_percent_of_scaling,
    one_element_of_the_mask,
    mask_one_element_off,
    without_rescaling_of_what_is_kept,
    gate_of_the_next_token,
    last_token_lost,
    last_feature_lost,
    last_of_the_bottleneck_lost,
    *map(without, ("down_bias", "up_bias", "pre_bias", "ln_bias")),
    *map(without, ("skip_in", "residual_x", "residual_skip")),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_wrong_is_caught(wrong, dtype):
    if wrong is one_percent_of_scaling and dtype == torch.bfloat16:
        pytest.skip("1 % is 2.6 roundings of a bf16 number: fp32 catches it")
    inputs, keep = drawn(CASE, dtype)
    results = reference_rounded_once(*wrong(inputs, keep))
    with pytest.raises(AssertionError, match="allowed"):
        assert_accurate(results, inputs, keep)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wrong", [eps_ten_times, pre_eps_of_the_other])
def test_wrong_epsilon_is_caught(wrong, dtype):
    (small,) = (case for case in NUMBERS if case.name == "small_rows")
    inputs, keep = drawn(small, dtype)
    results = reference_rounded_once(*wrong(inputs, keep))
    with pytest.raises(AssertionError, match="allowed"):
        assert_accurate(results, inputs, keep)


def variance_of_n_minus_1(x, weight, bias, eps):
    normal = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True) + eps) * weight
    return normal if bias is None else normal + bias


def mean_without_the_last_feature(x, weight, bias, eps):
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps) - x[..., -1:] / x.shape[-1]


def eps_outside_of_the_root(x, weight, bias, eps):
    deviation = x.var(-1, correction=0, keepdim=True).sqrt() + eps
    normal = (x - x.mean(-1, keepdim=True)) / deviation * weight
    return normal if bias is None else normal + bias


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "wrong", [variance_of_n_minus_1, mean_without_the_last_feature, eps_outside_of_the_root]
)
def test_wrong_layernorm_is_caught(wrong, dtype, monkeypatch):
    case = CASE
    if wrong is eps_outside_of_the_root:
        (case,) = (case for case in NUMBERS if case.name == "small_rows")
    inputs, keep = drawn(case, dtype)
    with monkeypatch.context() as patched:
        patched.setattr(reference.adapter, "layernorm", wrong)
        results = reference_rounded_once(inputs, keep)
    with pytest.raises(AssertionError, match="allowed"):
        assert_accurate(results, inputs, keep)


class StaleStatistics:
    """The torch backend, whose backward meets the statistics of the rows before."""

    def __init__(self, which):
        self.which = which

    def bottleneck_adapter_fwd(self, *arguments):
        y, q, *stats = torch_backend.bottleneck_adapter_fwd(*arguments)
        stats[self.which] = stats[self.which].roll(1, 0)
        return y, q, *stats

    def bottleneck_adapter_bwd(self, *arguments):
        return torch_backend.bottleneck_adapter_bwd(*arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", [0, 1], ids=["pre", "post"])
def test_stale_statistics_are_caught(which, dtype):
    inputs, keep = drawn(CASE, dtype)
    assert_accurate(oracle.run_backend(torch_backend, inputs, SEED), inputs, keep)
    results = oracle.run_backend(StaleStatistics(which), inputs, SEED)
    with pytest.raises(AssertionError, match="allowed"):
        assert_accurate(results, inputs, keep)


@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
@pytest.mark.parametrize("which", ["down", "up"])
def test_accumulation_in_half_precision_is_caught(which, dtype):
    """One rounding for each term of a sum instead of one for the sum."""

    def half_sums(a, weight, bias):
        total = torch.zeros(a.shape[0], weight.shape[0], dtype=dtype)
        for k in range(a.shape[1]):
            total += a[:, k, None] * weight[None, :, k]
        return total + bias

    size = (768, 16) if which == "down" else (32, 768)
    inputs, keep = drawn(AdapterCase("", (9,), *size, **PFEIFFER), dtype)
    d = (size[0],)
    h = F.layer_norm(inputs.x + inputs.skip, d, inputs.pre_weight, inputs.pre_bias, 1e-12)
    q = (half_sums if which == "down" else F.linear)(h, inputs.down, inputs.down_bias)
    w = (half_sums if which == "up" else F.linear)(F.gelu(q), inputs.up, inputs.up_bias)
    y = F.layer_norm(w + inputs.x + inputs.skip, d, inputs.ln_weight, inputs.ln_bias, 1e-12)
    with pytest.raises(AssertionError, match="y: max"):
        assert_accurate({"y": y}, inputs, keep)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gelu_of_the_other_form_is_caught(dtype):
    inputs, keep = drawn(CASE, dtype)
    results = reference_rounded_once(replace(inputs, activation="gelu_tanh"), keep)
    with pytest.raises(AssertionError, match="allowed"):
        assert_accurate(results, inputs, keep)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gradient_may_jump_where_rounding_crosses_a_kink_and_only_there(dtype):
    """q = x - 1, relu' is 0 at 0 and 1 a rounding away."""
    inputs = AdapterCase("", (1,), 1, 1, "relu", up_bias=False).make(dtype)
    one = torch.ones(1, 1, dtype=dtype)
    inputs = replace(inputs, down=one, up=one, down_bias=-one[0], dy=one)
    for x, dx, passes in (
        (1, 0, True),
        (1, 1, True),
        (1, 6, False),
        (1.5, 0, False),
        (1.5, 1, True),
    ):
        (deviation,) = deviations({"x": dx * one}, replace(inputs, x=x * one), None)
        assert deviation.ok == passes, (x, deviation)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_are_caught(value):
    inputs, keep = drawn(CASE, torch.float32)
    results = reference_rounded_once(inputs, keep)
    results["down"][1, 2] = value
    with pytest.raises(AssertionError, match="down: max"):
        assert_accurate(results, inputs, keep)


def test_wrong_shape_and_dtype_are_caught():
    inputs, keep = drawn(CASE, torch.float32)
    results = reference_rounded_once(inputs, keep)
    with pytest.raises(AssertionError, match="shape"):
        assert_accurate({**results, "gate": results["gate"][:, 0]}, inputs, keep)
    with pytest.raises(AssertionError, match="float64"):
        assert_accurate({**results, "y": results["y"].double()}, inputs, keep)


@pytest.mark.parametrize("case", [*CASES, *MIXED_DTYPE], ids=str)
def test_up_is_never_zero_and_everything_gets_a_gradient(case):
    inputs = case.make(torch.bfloat16)
    assert inputs.up.count_nonzero() == inputs.up.numel()
    given = {name for name in NAMES if getattr(inputs, name) is not None}
    assert set(oracle.exact(inputs, oracle.mask(inputs, SEED))) == {"y", *given}


def test_same_seed_draws_the_same_inputs():
    first, second, other = (CASE.make(torch.bfloat16, seed=seed) for seed in (1, 1, 2))
    for (name, a), (_, b) in zip(first.named_tensors(), second.named_tensors(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(first.x, other.x)


def test_names_of_cases_are_unique():
    names = [case.name for case in (*CASES, *MIXED_DTYPE)]
    assert len(set(names)) == len(names)
