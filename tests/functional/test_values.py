"""Every case, backend and dtype against the fp64 oracle: the output and every gradient."""

from dataclasses import replace

import pytest
import torch

from pelt_fast import functional as PF
from pelt_fast.testing import oracle
from pelt_fast.testing.tolerance import assert_accurate
from pelt_fast.testing.workloads import CASES, FP16_OVERFLOW, MIXED_DTYPE, Adapter, Case

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_oracle(case, dtype, backend, device):
    inputs = case.make(dtype, device)
    results, keep = backend.run(inputs)
    assert_accurate(results, inputs, keep)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", MIXED_DTYPE, ids=str)
def test_fp32_adapters_over_a_half_precision_base(case, dtype, backend, device):
    inputs = case.make(dtype, device)
    results, keep = backend.run(inputs)
    assert results["y"].dtype == dtype
    assert results["lora_a.0"].dtype == results["lora_b.0"].dtype == torch.float32
    assert_accurate(results, inputs, keep)


def test_fp16_shrink_that_overflows_before_it_is_scaled(backend, device):
    if backend.name == "reference":
        pytest.skip("the reference rounds after every operation")
    inputs = FP16_OVERFLOW.make(torch.float16, device)
    unscaled = inputs.x.double() @ inputs.lora_a[0].double().T
    assert unscaled.abs().max() > torch.finfo(torch.float16).max
    results, keep = backend.run(inputs)
    assert all(value.isfinite().all() for value in results.values())
    assert_accurate(results, inputs, keep)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_matches_the_oracle_at_the_size_of_a_model(dtype, dropout_p, backend, device):
    inputs = Case("", (1025,), 768, 1032, (Adapter(8, dropout_p=dropout_p),)).make(dtype, device)
    results, keep = backend.run(inputs)
    assert_accurate(results, inputs, keep)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lone_adapter_may_come_without_a_sequence(dtype, backend, device):
    inputs = Case("", (5,), 24, 40, (Adapter(8, bias=True),)).make(dtype, device)
    expected = backend(inputs)
    x, weight, bias, (a,), (b,), (scaling,) = inputs.args
    for extra in (inputs.lora_bias[0], [inputs.lora_bias[0]]):
        y = PF.lora_linear(
            x, weight, bias, a, b, scaling, lora_bias=extra, dropout_p=0.0, backend=backend.name
        )
        assert torch.equal(y, expected)


def test_scaling_may_be_an_int_and_dropout_one_number_for_all(backend, device):
    inputs = Case("", (5,), 24, 40, (Adapter(8, 2.0), Adapter(3, 2.0))).make(torch.float32, device)
    inputs = replace(inputs, dropout_p=(0.5, 0.5))
    torch.manual_seed(1)
    expected = backend(inputs)
    torch.manual_seed(1)
    y = PF.lora_linear(*inputs.args[:5], 2, dropout_p=0.5, training=True, backend=backend.name)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("past_one_tile", "dropout", "three_adapters")], ids=str
)
def test_two_runs_are_bitwise_equal(case, dtype, backend, device):
    inputs = case.make(dtype, device)
    first, _ = backend.run(inputs)
    second, _ = backend.run(inputs)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("odd", "dropout", "lora_bias", "x_sliced")], ids=str
)
def test_arguments_are_never_written_to(case, dtype, backend, device):
    inputs = case.make(dtype, device)
    before = {name: (t.clone(), t._version) for name, t in inputs.named_tensors()}
    backend.run(inputs)
    for name, tensor in inputs.named_tensors():
        value, version = before[name]
        assert torch.equal(tensor, value), name
        assert tensor._version == version, name


def test_result_is_fresh_memory_that_may_be_written_to(backend, device):
    inputs = Case("", (2, 3), 24, 24).make(torch.float32, device)
    leaves = inputs.map(lambda name, t: t.detach().requires_grad_(name == "lora_b.0"))
    y = backend(leaves)
    y.add_(1.0)
    torch.autograd.grad(y, leaves.lora_b, inputs.dy)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_any_number_of_threads_is_accurate(threads, dtype, backend, device):
    inputs = Case("", (131,), 72, 136, (Adapter(8, dropout_p=0.2),)).make(dtype, device)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results, keep = backend.run(inputs)
    finally:
        torch.set_num_threads(before)
    assert_accurate(results, inputs, keep)


def test_without_dropout_eval_draws_no_random_number(backend, device):
    inputs = Case("", (5,), 24, 40, (Adapter(8, dropout_p=0.5),)).make(torch.float32, device)
    torch.manual_seed(0)
    expected = torch.rand(1, device=device)
    torch.manual_seed(0)
    backend.require(inputs)
    y = PF.lora_linear(*inputs.args, dropout_p=0.5, training=False, backend=backend.name)
    assert torch.equal(torch.rand(1, device=device), expected)
    assert_accurate({"y": y}, replace(inputs, dropout_p=(0.0,)), [None])


def test_nan_and_inf_of_the_input_arrive(backend, device):
    inputs = Case("", (3,), 24, 40).make(torch.float32, device)
    inputs.x[1, 5] = float("nan")
    inputs.x[2, 0] = float("inf")
    y = backend(inputs)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()
    assert not y[2].isfinite().any()


def test_exact_results_stay_exact(backend, device):
    """Small integers leave no room for rounding: any difference is a wrong formula."""
    inputs = Case("", (5,), 24, 40, (Adapter(3, 2.0, bias=True), Adapter(2, -1.0))).make(
        torch.float32, device
    )
    inputs = inputs.map(lambda _, t: (t * 8).round().clamp(-3, 3))
    results, keep = backend.run(inputs)
    for name, value in oracle.exact(inputs, keep).items():
        assert torch.equal(results[name].double(), value), name


def test_meta_tensors_give_shapes_and_dtypes():
    """As models built without memory need it."""
    inputs = Case("", (2, 5), 24, 40, (Adapter(8, bias=True),)).make(torch.bfloat16)
    y = PF.lora_linear(*inputs.map(lambda _, t: t.to("meta")).args)
    assert (y.device.type, y.dtype, y.shape) == ("meta", torch.bfloat16, (2, 5, 40))
