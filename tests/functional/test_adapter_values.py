"""Every case, backend and dtype against the fp64 oracle: the output and every gradient."""

import functools
from dataclasses import replace
from itertools import product

import pytest
import torch

from pelt_fast import functional as PF
from pelt_fast.random import new_seed
from pelt_fast.testing import adapter_oracle as oracle
from pelt_fast.testing.adapter_tolerance import assert_accurate, yardsticks
from pelt_fast.testing.adapter_workloads import (
    ACTIVATIONS,
    BIASES,
    BLOCKS,
    CASES,
    EVERYTHING,
    FP16_LARGE,
    FP16_OVERFLOW,
    HOULSBY,
    MIXED_DTYPE,
    PFEIFFER,
    STRIDES,
    T5,
    T5_PFEIFFER,
    TERMS,
    AdapterCase,
)
from pelt_fast.testing.tolerance import assert_all_ok, assert_forms, compare

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
HALVES = [torch.bfloat16, torch.float16]


@functools.cache
def expected(case, dtype, device):
    """The yardsticks are the same for every backend, and slow."""
    inputs = case.make(dtype, device)
    torch.manual_seed(0)
    return yardsticks(inputs, oracle.mask(inputs, new_seed(inputs.x.device)))


def check(case, dtype, backend, device):
    inputs = case.make(dtype, device)
    results, _ = backend.run(inputs)
    assert set(results) == {"y", *(name for name, _ in inputs.named_tensors())} - {"dy"}
    assert_forms(results, inputs)
    assert_all_ok(compare(results, *expected(case, dtype, device)))
    return results


def named(*names):
    return [case for case in CASES if case.name in names]


# what is added where, in which layout, is a matter of no dtype: the dtypes take turns
_SLOW = {
    (case, dtype)
    for i, case in enumerate((*TERMS, *BIASES, *STRIDES))
    for dtype in DTYPES
    if dtype != DTYPES[i % len(DTYPES)]
}
# in every dtype activations meet special values, below
_SLOW |= {(case, dtype) for case in ACTIVATIONS for dtype in DTYPES[2:]}


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


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", MIXED_DTYPE, ids=str)
def test_fp32_parameters_over_half_precision(case, dtype, backend, device):
    results = check(case, dtype, backend, device)
    assert results["y"].dtype == results["x"].dtype == dtype
    assert results["down"].dtype == results["up_bias"].dtype == torch.float32


def test_fp16_rows_whose_squares_overflow(backend, device):
    results = check(FP16_LARGE, torch.float16, backend, device)
    assert all(value.isfinite().all() for value in results.values())


def test_fp16_product_that_overflows_before_it_is_scaled(backend, device):
    if backend.name == "torch":
        pytest.skip("PyTorch's own operators round every product, as eager does")
    inputs = FP16_OVERFLOW.make(torch.float16, device)
    assert oracle.eager(inputs, None)["y"].isnan().any()
    results, _ = backend.run(inputs)
    assert all(value.isfinite().all() for value in results.values())
    assert_accurate(results, inputs, None)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("block", [PFEIFFER, EVERYTHING, T5], ids=["pfeiffer", "everything", "t5"])
def test_matches_the_oracle_at_the_size_of_a_model(block, dtype, backend, device):
    inputs = AdapterCase("", (1025,), 768, 64, **block).make(dtype, device)
    results, keep = backend.run(inputs)
    assert_accurate(results, inputs, keep)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", named("past_one_tile", "everything", "gate_sample"), ids=str)
def test_two_runs_are_bitwise_equal(case, dtype, backend, device):
    inputs = case.make(dtype, device)
    first, _ = backend.run(inputs)
    second, _ = backend.run(inputs)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", named("odd", "houlsby", "t5_pfeiffer", "bare", "everything", "x_sliced"), ids=str
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
    inputs = AdapterCase("", (2, 3), 24, 8, **PFEIFFER).make(torch.float32, device)
    leaves = inputs.map(lambda name, t: t.detach().requires_grad_(name == "up"))
    y = backend(leaves)
    y.add_(1.0)
    torch.autograd.grad(y, leaves.up, inputs.dy)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_any_number_of_threads_is_accurate(threads, dtype, backend, device):
    case = AdapterCase("", (131,), 72, 24, **EVERYTHING)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(case, dtype, backend, device)
    finally:
        torch.set_num_threads(before)


def test_without_dropout_eval_draws_no_random_number(backend, device):
    inputs = AdapterCase("", (5,), 24, 8, **HOULSBY).make(torch.float32, device)
    torch.manual_seed(0)
    drawn = torch.rand(1, device=device)
    torch.manual_seed(0)
    backend.require(inputs)
    more = {**inputs.kwargs, "dropout_p": 0.5, "training": False}
    y = PF.bottleneck_adapter(*inputs.args, **more, backend=backend.name)
    assert torch.equal(torch.rand(1, device=device), drawn)
    assert_accurate({"y": y}, inputs, None)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "relu2", "linear"])
def test_exact_results_stay_exact(activation, backend, device):
    """Small integers leave no room for rounding: any difference is a wrong formula."""
    case = AdapterCase("", (5,), 24, 8, activation, **T5_PFEIFFER, scaling=2.0)
    inputs = case.make(torch.float32, device).map(lambda _, t: (t * 4).round().clamp(-3, 3))
    if activation == "leaky_relu":  # 0.01 is no number of fp32: keep what is above zero
        inputs = inputs.map(lambda _, t: t.abs())
    results, keep = backend.run(inputs)
    for name, value in oracle.exact(inputs, keep).items():
        assert torch.equal(results[name].double(), value), name


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "skip", "dy", "up_bias"])
@pytest.mark.parametrize("case", BLOCKS[:-1], ids=str)
def test_nan_and_inf_arrive_where_they_arrive_in_eager(case, where, poison, backend, device):
    """And reach no other token; in a gradient of its row a product by zero may leave NaN where eager selects."""
    inputs = case.make(torch.float32, device)
    value = getattr(inputs, where)
    if value is None:
        pytest.skip("the block has no such tensor")
    value[(0,) * value.dim()] = poison
    eager = oracle.eager(inputs, None)
    results, _ = backend.run(inputs)
    assert torch.equal(results["y"].isfinite(), eager["y"].isfinite())
    for name, wanted in eager.items():
        found, wanted = results[name].isfinite(), wanted.isfinite()
        assert not (found & ~wanted).any(), name
        if name in ("x", "skip"):
            assert found[wanted.all(-1)].all(), name


SPECIAL = [0.0, -0.0, 1e-4, -1e-4, 0.75, -0.75, 6.0, 6.5, 20.0, -20.0, 100.0, -100.0, 3e4, -3e4]
SPECIAL += [float("inf"), float("-inf"), float("nan")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", PF.ACTIVATIONS)
def test_special_values_of_activations(activation, dtype, backend, device):
    """Alone in their rows, through a bottleneck of one: y is the activation itself, and dx its derivative."""
    one = torch.ones(1, 1, dtype=dtype, device=device)
    inputs = AdapterCase("", (len(SPECIAL),), 1, 1, activation, down_bias=False, up_bias=False)
    inputs = inputs.make(dtype, device)
    x = torch.tensor(SPECIAL, device=device)[:, None].to(dtype)
    inputs = replace(inputs, x=x, down=one, up=one, dy=one.expand(x.shape))
    results, _ = backend.run(inputs, ["x"])
    eager, exact = oracle.eager(inputs, None, ["x"]), oracle.exact(inputs, None, ["x"])
    for name in ("y", "x"):
        finite = eager[name].isfinite()
        assert torch.equal(results[name].isfinite(), finite), (name, results[name].flatten())
        values = [side[name][finite].double() for side in (results, exact)]
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(*values, rtol=4 * eps, atol=4 * eps)
    assert torch.equal(results["y"].isnan(), eager["y"].isnan())


def results_of(call, leaves):
    """y and the gradient of each leaf that got one."""
    y = call()
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    return [y, *torch.autograd.grad((y * weights).sum(), leaves, allow_unused=True)]


@pytest.fixture
def call(backend, device):
    """`bottleneck_adapter` of a fixed fp64 adapter with layernorms, and three tensors to add."""
    inputs = AdapterCase("", (2, 5), 24, 8, **PFEIFFER).make(torch.float64, device)
    backend.require(inputs)
    parameters = {name: inputs.kwargs[name] for name in ("ln_weight", "ln_bias", "pre_ln_weight")}

    def function(x, **changed):
        return PF.bottleneck_adapter(
            x, *inputs.args[1:], **{**parameters, **changed}, backend=backend.name
        )

    function.inputs = inputs
    return function


def three(call):
    x = call.inputs.x
    return [(x * factor + shift).requires_grad_() for factor, shift in ((1, 0), (-2, 1), (0.5, 2))]


@pytest.mark.parametrize(
    ("skip", "residual"),
    [
        ("", "x"),
        ("", "s"),
        ("", "sx"),
        ("", "xx"),
        ("", "sr"),
        ("", "xsr"),
        ("s", ""),
        ("s", "s"),
        ("s", "x"),
        ("s", "xs"),
        ("s", "sx"),
        ("s", "r"),
        ("s", "rs"),
        ("s", "xsr"),
        ("s", "xxs"),
        ("s", "ss"),
        ("x", ""),
        ("x", "x"),
        ("x", "xx"),
        ("x", "s"),
    ],
)
def test_the_same_tensors_are_as_good_as_equal_ones(skip, residual, call):
    """Whatever is added where: against a call that knows no identity, and so no short cut."""
    leaves = dict(zip("xsr", three(call), strict=True))
    x, s, r = leaves.values()
    copy = {name: leaf.clone() for name, leaf in leaves.items()}

    def fused():
        added = [leaves[name] for name in residual]
        return call(x, skip=leaves[skip] if skip else None, residual=added or None)

    def apart():
        total = x + leaves[skip] if skip else x.clone()
        added = sum(copy[name] for name in residual) if residual else None
        return call(total, residual=added)

    for found, wanted in zip(
        results_of(fused, [x, s, r]), results_of(apart, [x, s, r]), strict=True
    ):
        found, wanted = (torch.zeros_like(x) if t is None else t for t in (found, wanted))
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_one_residual_may_come_without_a_sequence(call):
    x, s, _ = three(call)
    assert torch.equal(call(x, residual=s), call(x, residual=[s]))
    assert torch.equal(call(x, residual=x), call(x, residual=(x,)))
    assert torch.equal(call(x, residual=()), call(x, residual=None))


def test_gradient_of_a_layernorm_used_twice_is_the_sum(call):
    """As Pfeiffer adapters use the model's layernorm."""
    x, s, _ = three(call)
    shared = call.inputs.ln_weight.clone().requires_grad_()
    first, second = (
        shared.detach().clone().requires_grad_(),
        shared.detach().clone().requires_grad_(),
    )
    y = call(x, skip=s, residual=(x, s), pre_ln_weight=shared, ln_weight=shared)
    apart = call(x, skip=s, residual=(x, s), pre_ln_weight=first, ln_weight=second)
    assert torch.equal(y, apart)
    (total,) = torch.autograd.grad(y.square().sum(), shared)
    torch.testing.assert_close(
        total, sum(torch.autograd.grad(apart.square().sum(), (first, second)))
    )


@pytest.mark.parametrize(
    "shape", [(1,), (5, 1), (1, 5, 1), (2, 1, 1), (2, 5, 1), (1, 1, 1)], ids=str
)
def test_gate_broadcasts_over_tokens(shape, call):
    x, s, _ = three(call)
    gate = torch.rand(shape, dtype=x.dtype, device=x.device).requires_grad_()
    full = gate.detach().expand(2, 5, 1).clone().requires_grad_()
    y, dgate = results_of(lambda: call(x, residual=s, gate=gate), [gate])
    wanted, dfull = results_of(lambda: call(x, residual=s, gate=full), [full])
    assert torch.equal(y, wanted)
    assert dgate.shape == shape
    torch.testing.assert_close(dgate, dfull.sum_to_size(dgate.shape))


@pytest.mark.parametrize("shape", [(), (1,), (24,)], ids=str)
def test_scaling_that_is_learned(shape, call):
    x, *_ = three(call)
    scaling = torch.full(shape, -2.0, dtype=x.dtype, device=x.device).requires_grad_()
    y, dscaling = results_of(lambda: call(x, scaling=scaling), [scaling])
    torch.testing.assert_close(y, call(x, scaling=-2))
    assert dscaling.shape == shape
    assert dscaling.count_nonzero() == dscaling.numel()


def test_activation_that_no_kernel_has(device):
    inputs = AdapterCase("", (2, 5), 24, 8, "silu", **EVERYTHING).make(torch.float64, device)
    gradients = []
    for activation in ("silu", torch.nn.functional.silu):

        def function(leaves, activation=activation):
            return PF.bottleneck_adapter(
                *leaves.args, **{**leaves.kwargs, "activation": activation}
            )

        gradients.append(oracle.run_with_mask(function, inputs)[0])
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value)


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("GELU", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu_fast", "gelu_tanh"),
        ("gelu_python", "gelu"),
        ("swish", "silu"),
        ("leakyrelu", "leaky_relu"),
        ("identity", "linear"),
    ],
)
def test_aliases_of_activations(alias, name, call):
    x, *_ = three(call)
    assert torch.equal(call(x, activation=alias), call(x, activation=name))


@pytest.mark.parametrize("case", named("everything", "gate_sample", "bare", "no_tokens"), ids=str)
def test_meta_tensors_give_shapes_and_dtypes(case):
    """As models built without memory need it."""
    inputs = case.make(torch.bfloat16)
    y = PF.bottleneck_adapter(
        *inputs.map(lambda _, t: t.to("meta")).args, **inputs.map(lambda _, t: t.to("meta")).kwargs
    )
    assert (y.device.type, y.dtype, y.shape) == ("meta", torch.bfloat16, inputs.x.shape)
