"""fp64 gradients of attention over a prefix and of its gate against finite differences, and which are asked for."""

from itertools import product

import pytest
import torch

from pelt_fast import functional as PF
from pelt_fast.testing.prefix_workloads import PrefixCase

NAMES = ("query", "key", "value", "prefix_key", "prefix_value")


@pytest.mark.parametrize(
    ("mask", "gate", "shared"), [(None, 1, True), ("causal", 0, True), ("float", 2, False)]
)
def test_gradcheck(mask, gate, shared, device):
    case = PrefixCase("", 2, 2, 3, 3, 2, 3, mask, shared=shared, gate=gate)
    inputs = case.make(torch.float64, device)
    options = dict(inputs.options)
    leaves = [t.detach().requires_grad_() for t in inputs.args]
    names = [name for name in ("gate", "attn_mask") if name in options]
    leaves += [options.pop(name).detach().requires_grad_() for name in names]

    def function(*tensors):
        extra = dict(zip(names, tensors[5:], strict=True))
        return PF.prefix_attention(*tensors[:5], **options, **extra)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("gate", [PF.prefix_gate, PF.central_gate])
def test_gradcheck_of_the_gates(gate, device):
    torch.manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, device=device, requires_grad=True)
        for shape in ((2, 3, 4), (2, 4), (2,))
    )
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]], device=device)
    for given in (None, mask):
        assert torch.autograd.gradcheck(
            lambda *t, m=given: gate(*t, attention_mask=m), (x, weight, bias)
        )


def test_every_pattern_of_requires_grad(device):
    inputs = PrefixCase("", 2, 2, 3, 4, 2, 4).make(torch.float64, device)
    every = [t.detach().requires_grad_() for t in inputs.args]
    y = PF.prefix_attention(*every)
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(y, every, dy)
    for wanted in product([False, True], repeat=5):
        leaves = [t.detach().requires_grad_(w) for t, w in zip(inputs.args, wanted, strict=True)]
        y = PF.prefix_attention(*leaves)
        assert y.requires_grad == any(wanted)
        if any(wanted):
            y.backward(dy)
        for leaf, gradient, w in zip(leaves, expected, wanted, strict=True):
            assert (leaf.grad is not None) == w
            if w:
                torch.testing.assert_close(leaf.grad, gradient)
