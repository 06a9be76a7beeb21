"""Under autocast the adapter is computed in the autocast dtype, or in the wider one of what is added.

Parameters keep their dtypes, and gradients come back in them.
"""

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from pelt_fast import functional as PF
from pelt_fast.testing.adapter_tolerance import assert_accurate
from pelt_fast.testing.adapter_workloads import EVERYTHING, PFEIFFER, AdapterCase

HALVES = [torch.bfloat16, torch.float16]
CASE = AdapterCase("", (2, 5), 24, 8, **EVERYTHING)
ADDS_NOTHING = AdapterCase("", (2, 5), 24, 8, pre_ln=True, gate="token", scale="one")


def cast(inputs, dtype):
    return inputs.map(lambda _, t: t.to(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_alone_it_computes_in_the_autocast_dtype(of, dtype, backend, device):
    """As a linear does."""
    inputs = replace(ADDS_NOTHING.make(of, device), dy=ADDS_NOTHING.make(dtype, device).dy)
    with torch.autocast(device, dtype):
        results, keep = backend.run(inputs)
    for name, tensor in inputs.named_tensors():
        if name in results:
            assert results[name].dtype == tensor.dtype, name
    if of == torch.float32:
        rounded = {name: value.to(dtype) for name, value in results.items()}
        assert_accurate(rounded, cast(inputs, dtype), keep)
    assert results["y"].dtype == torch.promote_types(dtype, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_what_is_added_keeps_its_precision(dtype, backend, device):
    """As PyTorch adds a bf16 product to an fp32 residual: the sum is fp32."""
    inputs = CASE.make(torch.float32, device)
    with torch.autocast(device, dtype):
        results, keep = backend.run(inputs)
    assert results["y"].dtype == torch.float32
    assert_accurate(results, inputs, keep)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_tensors_that_are_added(dtype, backend, device):
    inputs = CASE.make(dtype, device)
    parameters = CASE.make(torch.float32, device)
    mixed = replace(parameters, x=inputs.x, skip=inputs.skip, dy=inputs.dy)
    with torch.autocast(device, dtype):
        results, keep = backend.run(mixed)
    assert results["y"].dtype == dtype
    assert results["up"].dtype == torch.float32
    assert_accurate(results, mixed, keep)


def test_tensors_of_two_dtypes_are_added_in_the_wider(backend, device):
    inputs = CASE.make(torch.float32, device)
    mixed = replace(inputs, skip=inputs.skip.bfloat16())
    with torch.autocast(device, torch.bfloat16):
        results, keep = backend.run(mixed)
    assert results["skip"].dtype == torch.bfloat16
    assert results.pop("skip").isfinite().all()
    assert_accurate(results, replace(mixed, skip=mixed.skip.float()), keep)


def test_fp64_is_left_alone_as_torch_leaves_it(backend, device):
    inputs = CASE.make(torch.float64, device)
    with torch.autocast(device, torch.bfloat16):
        results, keep = backend.run(inputs)
    assert_accurate(results, inputs, keep)


def test_disabled_autocast_changes_nothing(backend, device):
    inputs = CASE.make(torch.float32, device)
    with torch.autocast(device, torch.bfloat16, enabled=False):
        results, keep = backend.run(inputs)
    assert_accurate(results, inputs, keep)


def test_identity_of_what_is_added_survives_the_cast(device):
    """A cast of x and a cast of the residual x would be two tensors, and two gradients of T × d."""
    inputs = AdapterCase("", (2, 5), 24, 8, **PFEIFFER).make(torch.float32, device)
    leaves = inputs.map(lambda name, t: t.detach().requires_grad_(name in ("x", "skip")))
    with torch.autocast(device, torch.bfloat16):
        y = PF.bottleneck_adapter(
            *leaves.args, **{**leaves.kwargs, "residual": [leaves.x.bfloat16(), leaves.skip]}
        )
        fused = PF.bottleneck_adapter(*leaves.args, **leaves.kwargs)
    assert y.dtype == fused.dtype == torch.float32
    assert len(fused.grad_fn.next_functions) <= len(y.grad_fn.next_functions)


def test_backward_outside_of_the_autocast_block(backend, device):
    """As a training loop does it."""
    inputs = CASE.make(torch.float32, device)
    leaves = inputs.map(lambda name, t: t.detach().requires_grad_(name != "dy"))
    with torch.autocast(device, torch.bfloat16):
        y = backend(leaves)
    y.float().square().sum().backward()
    for name, leaf in leaves.named_tensors():
        if name != "dy":
            assert leaf.grad.dtype == torch.float32
            assert leaf.grad.isfinite().all(), name


def test_checkpoint_under_autocast(backend, device):
    inputs = CASE.make(torch.float32, device)
    leaves = inputs.map(lambda name, t: t.detach().requires_grad_(name != "dy"))
    sources = [t for name, t in leaves.named_tensors() if name != "dy"]
    gradients = []
    for wrap in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=False)):
        torch.manual_seed(4)
        with torch.autocast(device, torch.bfloat16):
            y = wrap(lambda x: backend(replace(leaves, x=x)), leaves.x)
        gradients.append(torch.autograd.grad(y.float().sum(), sources))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_callable_activation_computes_in_the_same_dtypes(device):
    for case, expected in ((CASE, torch.float32), (ADDS_NOTHING, torch.bfloat16)):
        inputs = case.make(torch.float32, device)
        for activation in ("silu", torch.nn.functional.silu):
            with torch.autocast(device, torch.bfloat16):
                y = PF.bottleneck_adapter(
                    *inputs.args, **{**inputs.kwargs, "activation": activation}
                )
            assert y.dtype == expected


def test_wrong_dtype_outside_is_right_inside(device):
    inputs = ADDS_NOTHING.make(torch.float32, device)
    wrong = replace(inputs, up=inputs.up.to(torch.bfloat16))
    with pytest.raises(
        TypeError, match=r"up_weight has dtype torch\.bfloat16; expected torch\.float32"
    ):
        PF.bottleneck_adapter(*wrong.args)
    with torch.autocast(device, torch.bfloat16):
        assert PF.bottleneck_adapter(*wrong.args).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["residual", "skip"])
@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str
)
def test_what_is_added_has_a_floating_dtype(name, dtype):
    x, down, up = torch.randn(5, 16), torch.randn(4, 16), torch.randn(16, 4)
    added = torch.ones(5, 16).to(dtype)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(TypeError, match=rf"{name} has dtype {dtype}; expected a floating dtype"),
    ):
        PF.bottleneck_adapter(x, down, None, up, None, **{name: added})
