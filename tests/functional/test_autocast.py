"""Under autocast x is cast to its dtype, parameters keep theirs, and gradients come back in the parameters' dtypes."""

from dataclasses import replace

import pytest
import torch

from pelt_fast import functional as PF
from pelt_fast.testing.tolerance import assert_accurate
from pelt_fast.testing.workloads import Adapter, Case

HALVES = [torch.bfloat16, torch.float16]
CASE = Case("", (2, 5), 24, 40, (Adapter(8, 0.5, 0.2, bias=True), Adapter(3, 2.0)))


def cast(inputs, dtype):
    """What autocast hands to a linear: every operand in the autocast dtype."""
    return inputs.map(lambda _, t: t.to(dtype))


@pytest.mark.parametrize(
    ("of", "dtype"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
def test_matches_the_oracle_on_operands_cast(of, dtype, backend, device):
    inputs = replace(CASE.make(of, device), dy=CASE.make(dtype, device).dy)
    with torch.autocast(device, dtype):
        results, keep = backend.run(inputs)
    assert results["y"].dtype == dtype
    for name, tensor in inputs.named_tensors():
        if name in results:
            assert results[name].dtype == tensor.dtype, name
    assert_accurate({k: v.to(dtype) for k, v in results.items()}, cast(inputs, dtype), keep)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_parameters_of_mixed_dtypes(dtype, backend, device):
    inputs = CASE.make(torch.float32, device)
    mixed = replace(
        inputs,
        weight=inputs.weight.to(dtype),
        lora_b=tuple(b.to(dtype) for b in inputs.lora_b),
        dy=inputs.dy.to(dtype),
    )
    with torch.autocast(device, dtype):
        results, keep = backend.run(mixed)
    assert results["lora_a.0"].dtype == torch.float32
    assert results["lora_b.0"].dtype == dtype
    assert_accurate({k: v.to(dtype) for k, v in results.items()}, cast(mixed, dtype), keep)


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


def test_backward_outside_of_the_autocast_block(backend, device):
    """As a training loop does it."""
    inputs = CASE.make(torch.float32, device)
    leaves = inputs.map(lambda name, t: t.detach().requires_grad_(name.startswith(("x", "lora"))))
    with torch.autocast(device, torch.bfloat16):
        y = backend(leaves)
    y.float().square().sum().backward()
    assert leaves.lora_a[0].grad.dtype == torch.float32
    assert leaves.x.grad.dtype == torch.float32
    assert all(t.grad.isfinite().all() for t in (leaves.x, *leaves.lora_a, *leaves.lora_b))


def test_checkpoint_under_autocast(backend, device):
    inputs = CASE.make(torch.float32, device)
    leaves = inputs.map(lambda name, t: t.detach().requires_grad_(name.startswith(("x", "lora"))))
    sources = (leaves.x, *leaves.lora_a, *leaves.lora_b)
    gradients = []
    for wrap in (
        lambda f, x: f(x),
        lambda f, x: torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False),
    ):
        torch.manual_seed(4)
        with torch.autocast(device, torch.bfloat16):
            y = wrap(lambda x: backend(replace(leaves, x=x)), leaves.x)
        gradients.append(torch.autograd.grad(y.float().sum(), sources))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_wrong_dtype_outside_is_right_inside(device):
    inputs = CASE.make(torch.float32, device)
    wrong = replace(inputs, weight=inputs.weight.to(torch.bfloat16))
    with pytest.raises(
        TypeError, match=r"weight has dtype torch\.bfloat16; expected torch\.float32"
    ):
        PF.lora_linear(*wrong.args)
    with torch.autocast(device, torch.bfloat16):
        assert PF.lora_linear(*wrong.args).dtype == torch.bfloat16
