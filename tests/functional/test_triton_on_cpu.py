"""The whole way from the function through autograd, operators and dispatch into interpreted Triton kernels.

What the kernels compute, shape by shape, is for `tests/kernels`; here it is that they are called rightly.
"""

import importlib

import pytest
import torch

from pelt_fast import MultiAdapterPlan
from pelt_fast import functional as PF
from pelt_fast.env import Env
from pelt_fast.testing import multi_lora_oracle, multi_lora_workloads, oracle
from pelt_fast.testing.multi_lora_tolerance import assert_accurate as assert_multi_accurate
from pelt_fast.testing.tolerance import assert_accurate
from pelt_fast.testing.workloads import CASES

pytest.importorskip("triton")


@pytest.fixture
def interpreted(monkeypatch):
    from pelt_fast.backends.triton_ import device
    from pelt_fast.testing.gpu_free import interpreting

    monkeypatch.setattr(device, "env", Env(triton_cpu=True))
    # that Triton may run on a CPU must not be remembered
    monkeypatch.setattr(importlib.import_module("pelt_fast.dispatch.select"), "_chosen", {})
    with interpreting():
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("dropout_each_its_own", "x_permuted")], ids=str
)
def test_matches_the_oracle(case, dtype, interpreted):
    inputs = case.make(dtype)

    def call(leaves):
        return PF.lora_linear(*leaves.args, **leaves.kwargs, backend="triton")

    results, keep = oracle.run_with_masks(call, inputs)
    assert_accurate(results, inputs, keep)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        c
        for c in multi_lora_workloads.CASES
        if c.name in ("everything", "ids_outside", "base_permuted", "scale_zero", "no_tokens")
    ],
    ids=str,
)
def test_multi_lora_matches_the_oracle(case, dtype, interpreted):
    inputs = case.make(dtype)

    def call(leaves):
        y = PF.multi_lora(*leaves.args, **leaves.kwargs, backend="triton")
        return multi_lora_oracle.joined(y)

    results, keep = multi_lora_oracle.run_with_masks(call, inputs)
    assert_multi_accurate(results, inputs, keep)
    expected = results["y"]
    with torch.no_grad():
        torch.manual_seed(0)
        y = PF.multi_lora(*inputs.args, **inputs.kwargs, backend="triton")
    assert torch.equal(multi_lora_oracle.joined(y), expected)


def test_multi_bottleneck_is_torchs(interpreted):
    g = torch.Generator().manual_seed(0)
    x, other = (torch.randn(2, 7, 24, generator=g) for _ in range(2))
    shapes = ((3, 8, 24), (3, 8), (3, 24, 8), (3, 24), (24,))
    weights = [torch.randn(shape, generator=g) * 0.3 for shape in shapes]
    weights[2] = weights[2].mT.contiguous().mT  # U column by column
    plan = MultiAdapterPlan([0, 2, -1, 1, 2, 9, 0] * 2, 3)
    found = []
    for backend in ("triton", "torch"):
        leaves = [t.detach().requires_grad_() for t in (x, other, *weights)]
        torch.manual_seed(0)
        y = PF.multi_bottleneck(
            *(leaves[0], *leaves[2:6], plan),
            widths=[8, 0, 5],
            residual=leaves[:2],
            ln_weight=leaves[6],
            dropout_p=0.3,
            training=True,
            backend=backend,
        )
        found.append((y, *torch.autograd.grad(y.sin().sum(), leaves)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
