"""fp64 gradients against finite differences: independent of the oracle and of every formula."""

from dataclasses import replace

import pytest
import torch

from pelt_fast import functional as PF
from pelt_fast.testing.adapter_workloads import (
    EVERYTHING,
    HOULSBY,
    NAMES,
    PFEIFFER,
    PRE_LN,
    T5_PFEIFFER,
    AdapterCase,
)

# a finite difference needs a smooth activation and a variance that is no rounding error
EPS = {"pre_eps": 1e-2, "eps": 1e-2}


@pytest.mark.parametrize(
    "case",
    [
        AdapterCase("bare", (3,), 4, 3),
        pytest.param(
            AdapterCase("pfeiffer", (3,), 4, 3, "tanh", **{**PFEIFFER, **EPS}),
            marks=pytest.mark.slow,
        ),
        AdapterCase("houlsby", (2, 2), 4, 3, "silu", **HOULSBY, **EPS, gate="sample"),
        AdapterCase("one_dim", (), 4, 3, "gelu_tanh", **T5_PFEIFFER, scale="one"),
        AdapterCase("pre_ln", (3,), 4, 3, "mish", **PRE_LN, **EPS, down_bias=False, ln_bias=False),
        AdapterCase("everything", (3,), 4, 3, "quick_gelu", **{**EVERYTHING, **EPS}),
        AdapterCase("dropout_all", (2,), 4, 3, "sigmoid", **{**PFEIFFER, **EPS}, dropout_p=1.0),
    ],
    ids=str,
)
def test_gradcheck(case, backend, device):
    inputs = case.make(torch.float64, device)
    backend.require(inputs)
    names = [name for name in NAMES if getattr(inputs, name) is not None]

    def function(*tensors):
        torch.manual_seed(0)  # the same mask at every evaluation
        given = replace(inputs, **dict(zip(names, tensors, strict=True)))
        return PF.bottleneck_adapter(*given.args, **given.kwargs, backend=backend.name)

    leaves = [getattr(inputs, name).detach().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=False)
