"""fp64 gradients against finite differences: independent of the oracle and of every formula."""

from dataclasses import replace

import pytest
import torch

from pelt_fast import functional as PF
from pelt_fast.testing import multi_lora_oracle as oracle
from pelt_fast.testing.multi_lora_workloads import MultiLoRACase


@pytest.mark.parametrize(
    "case",
    [
        MultiLoRACase("no_base", (4,), 4, (3,), 2, (2,), base=False),
        pytest.param(
            MultiLoRACase("one_dim", (), 4, (3,), 2, (3,), "identical", row_scale="number"),
            marks=pytest.mark.slow,
        ),
        MultiLoRACase("samples", (2, 2), 3, (2, 1), 2, (2, 1), row_scale="sample"),
        pytest.param(
            MultiLoRACase("none", (3,), 4, (3,), 2, (2,), "none", row_scale="token"),
            marks=pytest.mark.slow,
        ),
        MultiLoRACase("gaps", (4,), 3, (2,), 4, (2,), "gaps", row_scale="one"),
        MultiLoRACase("dropout", (3,), 3, (2, 1), 2, (1,), row_scale="token", dropout_p=0.4),
        pytest.param(
            MultiLoRACase("dropout_all", (2,), 3, (2,), 2, (1,), row_scale="token", dropout_p=1.0),
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_gradcheck(case, backend, device):
    inputs = case.make(torch.float64, device)
    backend.require(inputs)
    n, ranks = len(inputs.outs), [tuple(range(1, case.adapters + 1))] * len(inputs.outs)
    inputs = replace(inputs, ranks=tuple(ranks))  # of their own, some beyond R

    def function(x, scale, *rest):
        torch.manual_seed(0)  # the same mask at every evaluation
        lora_a, lora_b, base = rest[:n], rest[n : 2 * n], rest[2 * n :]
        given = replace(inputs, x=x, lora_a=lora_a, lora_b=lora_b, row_scale=scale)
        given = replace(given, base=base or (None,) * n)
        return oracle.joined(PF.multi_lora(*given.args, **given.kwargs, backend=backend.name))

    bases = [b for b in inputs.base if b is not None]
    tensors = (inputs.x, inputs.row_scale, *inputs.lora_a, *inputs.lora_b, *bases)
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=False)
