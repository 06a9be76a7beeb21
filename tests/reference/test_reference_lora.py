"""The reference against numbers worked out by hand: everything else is measured against the reference."""

import pytest
import torch

from pelt_fast.reference import lora_linear

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# x Wᵀ = [[5, 11], [1, 1]];  x Aᵀ = [[3], [0]];  x Aᵀ Bᵀ = [[6, -3], [0, 0]]
X = [[1.0, 2.0], [-1.0, 1.0]]
W = [[1.0, 2.0], [3.0, 4.0]]
A = [[1.0, 1.0]]
B = [[2.0], [-1.0]]


def tensors(dtype, *values):
    return [torch.tensor(v, dtype=dtype) for v in values]


def call(x, w, bias, a, b, scaling, lora_bias=None, p=0.0, keep=None):
    return lora_linear(
        x, w, bias, [a], [b], [scaling], lora_bias=[lora_bias], dropout_p=[p], keep=[keep]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain(dtype):
    y = call(*tensors(dtype, X, W), None, *tensors(dtype, A, B), 0.5)
    assert y.dtype == dtype
    assert y.tolist() == [[8.0, 9.5], [1.0, 1.0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_biases_the_adapters_is_scaled(dtype):
    bias, lora_bias = tensors(dtype, [10.0, 20.0], [4.0, 8.0])
    y = call(*tensors(dtype, X, W), bias, *tensors(dtype, A, B), 0.5, lora_bias)
    # + bias + 0.5 * lora_bias = + [12, 24]
    assert y.tolist() == [[20.0, 33.5], [13.0, 25.0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_keeps_and_rescales(dtype):
    keep = torch.tensor([[True, False], [False, True]])
    y = call(*tensors(dtype, X, W), None, *tensors(dtype, A, B), 0.5, p=0.5, keep=keep)
    # drop(x) = [[2, 0], [0, 2]], so drop(x) Aᵀ = [[2], [2]]; the base product sees x undropped
    assert y.tolist() == [[7.0, 10.0], [3.0, 0.0]]


def test_dropout_of_everything_leaves_the_base_product():
    keep = torch.zeros(2, 2, dtype=torch.bool)
    y = call(
        *tensors(torch.float64, X, W), None, *tensors(torch.float64, A, B), 0.5, p=1.0, keep=keep
    )
    assert y.tolist() == [[5.0, 11.0], [1.0, 1.0]]


def test_adapters_are_summed_each_with_its_own_scaling():
    x, w, a, b = tensors(torch.float64, X, W, A, B)
    a2, b2 = tensors(torch.float64, [[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]])
    y = lora_linear(
        x,
        w,
        None,
        [a, a2],
        [b, b2],
        [0.5, -3.0],
        lora_bias=[None, None],
        dropout_p=[0.0, 0.0],
        keep=[None, None],
    )
    # the second adapter adds -3 x
    assert y.tolist() == [[5.0, 3.5], [4.0, -2.0]]


def test_gradients():
    x, w, a, b, bias, lora_bias = (
        t.requires_grad_() for t in tensors(torch.float64, X, W, A, B, [0.0, 0.0], [0.0, 0.0])
    )
    y = call(x, w, bias, a, b, 0.5, lora_bias)
    dy = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    dx, dw, da, db, dbias, dlora_bias = torch.autograd.grad(y, (x, w, a, b, bias, lora_bias), dy)
    # dS = 0.5 dY B = [[1], [-1]]
    assert dx.tolist() == [[2.0, 3.0], [5.0, 7.0]]  # dY W + dS A
    assert dw.tolist() == [[1.0, 2.0], [-2.0, 2.0]]  # dYᵀ X
    assert da.tolist() == [[2.0, 1.0]]  # dSᵀ X
    assert db.tolist() == [[1.5], [0.0]]  # 0.5 dYᵀ [3, 0]ᵀ
    assert dbias.tolist() == [1.0, 2.0]
    assert dlora_bias.tolist() == [0.5, 1.0]


def test_gradients_through_dropout_meet_the_same_mask():
    x, w, a, b = (t.requires_grad_() for t in tensors(torch.float64, X, W, A, B))
    keep = torch.tensor([[True, False], [False, True]])
    y = call(x, w, None, a, b, 0.5, p=0.5, keep=keep)
    dy = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    dx, da, db = torch.autograd.grad(y, (x, a, b), dy)
    assert dx.tolist() == [[3.0, 2.0], [6.0, 6.0]]  # dY W + 2 · keep · (dS A)
    assert da.tolist() == [[2.0, -2.0]]  # dSᵀ drop(x)
    assert db.tolist() == [[1.0], [2.0]]  # 0.5 dYᵀ [2, 2]ᵀ
