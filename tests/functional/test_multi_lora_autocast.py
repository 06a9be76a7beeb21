"""Under autocast x is cast to its dtype; parameters keep theirs, and gradients come back in them.

A base that is wider than the autocast dtype is added in its own, as PyTorch adds a bf16 product to an fp32 tensor.
"""

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from pelt_fast import functional as PF
from pelt_fast.testing import multi_lora_oracle as oracle
from pelt_fast.testing.multi_lora_tolerance import assert_accurate, yardsticks
from pelt_fast.testing.multi_lora_workloads import EVERYTHING, MultiLoRACase
from pelt_fast.testing.tolerance import assert_all_ok, compare

HALVES = [torch.bfloat16, torch.float16]
CASE = MultiLoRACase("", (4, 9), 24, **EVERYTHING)
NO_BASE = replace(CASE, base=False)


def cast(inputs, dtype):
    """What autocast hands to a linear: every operand in the autocast dtype; but the row scale, which is a factor."""
    return inputs.map(lambda name, t: t if name == "row_scale" else t.to(dtype))


@pytest.mark.parametrize(
    ("of", "dtype"),
    [
        (torch.float32, torch.bfloat16),
        pytest.param(torch.float32, torch.float16, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, torch.bfloat16, marks=pytest.mark.slow),
        (torch.float16, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("case", [CASE, NO_BASE], ids=["base", "no_base"])
def test_matches_the_oracle_on_operands_cast(case, of, dtype, backend, device):
    inputs = case.make(of, device)
    inputs = replace(inputs, dy=case.make(dtype, device).dy)
    if case.base:  # of the dtype that is computed in
        inputs = replace(inputs, base=tuple(b.to(dtype) for b in inputs.base))
    with torch.autocast(device, dtype):
        results, keep = backend.run(inputs)
    assert results["y"].dtype == dtype
    for name, tensor in inputs.named_tensors():
        if name in results:
            assert results[name].dtype == tensor.dtype, name
    narrow = cast(inputs, dtype)
    dtypes = {name: t.dtype for name, t in narrow.named_tensors()}
    assert_accurate({k: v.to(dtypes.get(k, dtype)) for k, v in results.items()}, narrow, keep)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_wider_base_keeps_its_precision(dtype, backend, device):
    """What LoRA adds is rounded to the autocast dtype; the sum is not."""
    inputs = CASE.make(torch.float32, device)
    with torch.autocast(device, dtype):
        results, keep = backend.run(inputs)
    assert results["y"].dtype == torch.float32
    lora = cast(replace(inputs, base=(None,) * 3), dtype)
    exact, eager, bounds = yardsticks(lora, keep, ["lora_a.0", "lora_b.0"])
    base = torch.cat(inputs.base, -1)
    found = {name: results[name].to(dtype) for name in ("lora_a.0", "lora_b.0")}
    found["y"] = (results["y"].double() - base.double()).to(torch.float32)
    assert_all_ok(compare(found, exact, eager, bounds))
    assert torch.equal(results["base.0"], inputs.dy[..., :40])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_parameters_of_mixed_dtypes(dtype, backend, device):
    inputs = CASE.make(torch.float32, device)
    mixed = replace(
        inputs,
        lora_b=tuple(b.to(dtype) for b in inputs.lora_b),
        base=tuple(b.to(dtype) for b in inputs.base),
        dy=inputs.dy.to(dtype),
    )
    with torch.autocast(device, dtype):
        results, keep = backend.run(mixed)
    assert results["y"].dtype == dtype
    assert results["lora_a.0"].dtype == torch.float32
    assert results["lora_b.0"].dtype == dtype
    narrow = cast(mixed, dtype)
    dtypes = {name: t.dtype for name, t in narrow.named_tensors()}
    assert_accurate({k: v.to(dtypes.get(k, dtype)) for k, v in results.items()}, narrow, keep)


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


def test_wrong_dtype_outside_is_right_inside(device):
    inputs = NO_BASE.make(torch.float32, device)
    wrong = replace(inputs, lora_b=tuple(b.to(torch.bfloat16) for b in inputs.lora_b))
    with pytest.raises(
        TypeError, match=r"lora_b\[0\] has dtype torch\.bfloat16; expected torch\.float32"
    ):
        PF.multi_lora(*wrong.args)
    with torch.autocast(device, torch.bfloat16):
        assert oracle.joined(PF.multi_lora(*wrong.args)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str
)
def test_what_is_added_has_a_floating_dtype(dtype):
    inputs = MultiLoRACase("", (5,), 24).make(torch.float32)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(TypeError, match=rf"base_out\[0\] has dtype {dtype}; expected a floating"),
    ):
        PF.multi_lora(*inputs.args, base_out=[torch.ones(5, 40).to(dtype)])
