"""The reference against numbers worked out by hand: everything else is measured against the reference."""

import math

import pytest
import torch

from pelt_fast.reference import central_gate, prefix_attention, prefix_gate

# one head of one feature: scores are products
Q, K, V = [1.0, 2.0], [0.0, math.log(2.0)], [1.0, 4.0]
PREFIX_K, PREFIX_V = [math.log(3.0)], [10.0]


def states(values):
    return torch.tensor(values, dtype=torch.float64)[None, None, :, None]


def attend(**options):
    tensors = (states(Q), states(K), states(V), states(PREFIX_K), states(PREFIX_V))
    return prefix_attention(*tensors, scale=1.0, **options).flatten().tolist()


def test_the_prefix_is_seen_with_the_sequence():
    # weights 3, 1, 2 and, doubled in the exponent, 9, 1, 4
    assert attend() == pytest.approx([(30 + 1 + 8) / 6, (90 + 1 + 16) / 14])


def test_a_mask_is_added_to_the_sequence_alone():
    mask = torch.tensor([[0.0, -math.inf], [math.log(5.0), 0.0]], dtype=torch.float64)
    assert attend(mask=mask) == pytest.approx([(30 + 1) / 4, (90 + 5 + 16) / 18])
    nothing = torch.full((1, 1), -math.inf, dtype=torch.float64)
    assert attend(mask=nothing) == pytest.approx([10.0, 10.0])


def test_causal_behind_the_prefix():
    assert attend(is_causal=True) == pytest.approx([(30 + 1) / 4, (90 + 1 + 16) / 14])


def test_scale():
    tensors = (states(Q), states(K), states(V), states(PREFIX_K), states(PREFIX_V))
    found = prefix_attention(*tensors, scale=0.0).flatten().tolist()
    assert found == pytest.approx([5.0, 5.0])


def test_gate_is_the_mean_over_all_tokens_or_over_the_real_ones():
    x = torch.tensor([[[0.0], [1.0]], [[1.0], [1.0]]], dtype=torch.float64)
    weight = torch.tensor([[math.log(3.0)], [0.0]], dtype=torch.float64)  # σ is 1/2 and 3/4; 1/2
    bias = torch.tensor([0.0, math.log(4.0)], dtype=torch.float64)  # σ is 4/5
    assert prefix_gate(x, weight, None).flatten().tolist() == pytest.approx([0.625, 0.5, 0.75, 0.5])
    assert prefix_gate(x, weight, bias)[:, 1].tolist() == pytest.approx([0.8, 0.8])
    mask = torch.tensor([[1, 0], [1, 1]])
    assert prefix_gate(x, weight, None, mask)[:, 0].tolist() == pytest.approx([0.5, 0.75])


def test_the_central_gate_is_shared_among_submodules():
    x = torch.tensor([[[0.0], [math.log(3.0)]]], dtype=torch.float64)
    weight = torch.tensor(
        [[2.0], [0.0], [-1.0]], dtype=torch.float64
    )  # relu: ln 3 in the mean, 0, 0
    assert central_gate(x, weight, None).flatten().tolist() == pytest.approx([0.6, 0.2, 0.2])
    mask = torch.tensor([[1, 0]])
    assert central_gate(x, weight, None, mask).flatten().tolist() == pytest.approx([1 / 3] * 3)
    bias = torch.tensor([0.0, math.log(9.0), 0.0], dtype=torch.float64)
    shares = central_gate(x, weight, bias, mask).flatten().tolist()
    assert shares == pytest.approx([1 / 11, 9 / 11, 1 / 11])
