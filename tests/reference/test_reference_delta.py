"""Diff pruning and masking against numbers worked out by hand."""

import math

import pytest
import torch

from pelt_fast.random import new_seed, philox_mask, philox_odds
from pelt_fast.reference import diff_pruning_weight, masked_weight

F64 = torch.float64
# sigmoid(ln 3) = 3/4, sigmoid(0) = 1/2, sigmoid(-ln 3) = 1/4;  stretched to (-1.5, 1.5): 0.75, 0, -0.75
LOG_ALPHA = [math.log(3.0), 0.0, -math.log(3.0)]


def tensors(*values):
    return [torch.tensor(v, dtype=F64, requires_grad=True) for v in values]


def test_gates_without_noise():
    weight, diff, log_alpha, scale = tensors([1.0, 2.0, 3.0], [4.0, 4.0, 4.0], LOG_ALPHA, 2.0)
    made, count = diff_pruning_weight(
        weight, diff, log_alpha, scale=scale, odds=None, lower=-1.5, upper=1.5
    )
    # gates 0.75, 0, 0;  -lower / upper = 1, so the count is that of the sigmoids
    assert made.tolist() == pytest.approx([7.0, 2.0, 3.0])
    assert count.item() == pytest.approx(1.5)
    dmade = torch.tensor([1.0, 1.0, 1.0], dtype=F64)
    ddiff, dgates, dscale = torch.autograd.grad(
        (made, count), (diff, log_alpha, scale), (dmade, torch.tensor(10.0, dtype=F64))
    )
    assert ddiff.tolist() == pytest.approx([1.5, 0.0, 0.0])
    # 2 · 4 · 3 · 3/16 + 10 · 3/16;  at the lower edge half of nothing is cut: 2 · 4 · 3 / 4 + 10 / 4;  cut: 10 · 3/16
    assert dgates.tolist() == pytest.approx([4.5 + 1.875, 6.0 + 2.5, 1.875])
    assert dscale.item() == pytest.approx(3.0)


def test_noise_and_another_stretch():
    weight, diff, log_alpha = tensors([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0])
    odds = torch.tensor([1 / 3, 3.0, 1 / 999999], dtype=F64)  # u = 3/4, 1/4, nearly 1
    made, count = diff_pruning_weight(
        weight, diff, log_alpha, scale=None, odds=odds, lower=-1.0, upper=3.0
    )
    # sigmoids 3/4, 1/4, nearly 1; stretched to 2, 0, nearly 3; count: 3 · sigmoid(-ln(1/3)) = 3 · 3/4
    assert made.tolist() == pytest.approx([2.0, 1.0, 2.0])
    assert count.item() == pytest.approx(2.25)


def test_masks_and_their_gradients():
    weight, scores = tensors([[1.0, -2.0], [3.0, -4.0]], [[0.5, 0.4], [math.nan, 9.0]])
    made = masked_weight(weight, scores, 0.5)
    assert made.tolist() == [[1.0, 0.0], [0.0, -4.0]]
    dmade = torch.tensor([[1.0, 10.0], [100.0, 1000.0]], dtype=F64)
    dweight, dscores = torch.autograd.grad(made, (weight, scores), dmade)
    assert dweight.tolist() == [[1.0, 0.0], [0.0, 1000.0]]
    assert dscores.tolist() == [[1.0, -20.0], [300.0, -4000.0]]


def test_odds_are_of_the_words_that_masks_compare():
    torch.manual_seed(0)
    seed = new_seed(torch.device("cpu"))
    u = 1 / (1 + philox_odds(seed, (7, 9, 11), F64))
    for p in (0.1, 0.5, 0.9):
        assert torch.equal(u.reshape(63, 11) >= p, philox_mask(seed, (63, 11), p))
    single = philox_odds(seed, (7, 9, 11), torch.float32).double()
    torch.testing.assert_close(single, (1 - u) / u, rtol=3e-7, atol=0)
