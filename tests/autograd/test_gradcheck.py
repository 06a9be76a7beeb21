"""fp64 gradients against finite differences: independent of the oracle and of every formula."""

import pytest
import torch

from pelt_fast import functional as PF
from pelt_fast.testing.workloads import Adapter, Case


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case("plain", (4,), 5, 6, (Adapter(2),)), marks=pytest.mark.slow),
        Case("three_dims", (2, 3), 5, 6, (Adapter(2),), bias=False),
        Case("one_dim", (), 5, 6, (Adapter(3, bias=True),)),
        pytest.param(Case("dropout", (4,), 5, 6, (Adapter(2, 0.5, 0.4),)), marks=pytest.mark.slow),
        Case("dropout_all", (4,), 5, 6, (Adapter(2, 0.5, 1.0),)),
        Case("two", (4,), 5, 6, (Adapter(2, 2.0, 0.4), Adapter(3, -1.0, bias=True))),
    ],
    ids=str,
)
def test_gradcheck(case, backend, device):
    inputs = case.make(torch.float64, device)
    backend.require(inputs)
    leaves = inputs.map(lambda _, t: t.detach().requires_grad_())
    n = len(case.adapters)
    biases = [b for b in leaves.lora_bias if b is not None]

    def function(x, bias, *adapters):
        torch.manual_seed(0)  # the same mask at every evaluation
        lora_a, lora_b, rest = adapters[:n], adapters[n : 2 * n], iter(adapters[2 * n :])
        return PF.lora_linear(
            x,
            inputs.weight,
            bias,
            lora_a,
            lora_b,
            inputs.scaling,
            lora_bias=[next(rest) if a.bias else None for a in case.adapters],
            dropout_p=inputs.dropout_p,
            training=True,
            backend=backend.name,
        )

    assert torch.autograd.gradcheck(
        function, (leaves.x, leaves.bias, *leaves.lora_a, *leaves.lora_b, *biases), fast_mode=False
    )
