"""The reference against numbers worked out by hand: everything else is measured against the reference."""

import math

import pytest
import torch

from pelt_fast.reference import multi_lora

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# adapter 0: x Aᵀ = x0 + x1, x0;   adapter 1: x Aᵀ = 2 x1, x0 - x1
X = [[1.0, 2.0], [-1.0, 1.0], [3.0, 0.0], [2.0, 2.0]]
A = [[[1.0, 1.0], [1.0, 0.0]], [[0.0, 2.0], [1.0, -1.0]]]
B = [[[2.0, 0.0], [-1.0, 1.0]], [[1.0, 1.0], [0.0, 4.0]]]
IDS = [1, 0, -1, 0]
SCALING = [0.5, -1.0]


def tensors(dtype, *values):
    return [torch.tensor(v, dtype=dtype) for v in values]


def call(x, a, b, ids=IDS, ranks=(2, 2), base=None, row_scale=None, p=0.0, keep=None):
    return multi_lora(
        *(x, a, b, ids, ranks, SCALING),
        base=base,
        row_scale=row_scale,
        dropout_p=p,
        keep=keep,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_token_goes_through_its_own_adapter(dtype):
    y = call(*tensors(dtype, X, A, B))
    assert y.dtype == dtype
    # s = [4, -1], [0, -1], none, [4, 2];  s Bᵀ = [3, -4], [0, -1], none, [8, -2]
    assert y.tolist() == [[-3.0, 4.0], [0.0, -0.5], [0.0, 0.0], [4.0, -1.0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_base_and_row_scale(dtype):
    base, scale = tensors(
        dtype, [[10.0, 20.0], [30.0, 40.0], [50.0, 60.0], [70.0, 80.0]], [2.0, 4.0, 8.0, 0.0]
    )
    y = call(*tensors(dtype, X, A, B), base=base, row_scale=scale)
    assert y.tolist() == [[4.0, 28.0], [30.0, 38.0], [50.0, 60.0], [70.0, 80.0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ranks_hide_what_lies_beyond_them(dtype):
    x, a, b = tensors(dtype, X, A, B)
    a[0, 1:], b[0, :, 1:] = math.nan, math.nan
    a[1], b[1] = math.nan, math.nan
    y = call(x, a, b, ranks=(1, 0))
    # s = [], [0], none, [4]
    assert y.tolist() == [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [4.0, -2.0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_keeps_and_rescales(dtype):
    keep = torch.tensor([[True, False], [False, True], [True, True], [False, False]])
    y = call(*tensors(dtype, X, A, B), p=0.5, keep=keep)
    # drop(x) = [2, 0], [0, 2], [6, 0], [0, 0];  s = [0, 2], [2, 0], none, [0, 0]
    assert y.tolist() == [[-2.0, -8.0], [2.0, -1.0], [0.0, 0.0], [0.0, 0.0]]


def test_dropout_of_everything_leaves_the_base():
    x, a, b, base = tensors(torch.float64, X, A, B, X)
    keep = torch.zeros(4, 2, dtype=torch.bool)
    assert call(x, a, b, base=base, p=1.0, keep=keep).tolist() == X


@pytest.mark.parametrize("outside", [-1, -5, 2, 99, 2**40])
def test_ids_outside_name_no_adapter(outside):
    x, a, b, base = tensors(torch.float64, X, A, B, X)
    assert call(x, a, b, ids=[outside] * 4, base=base).tolist() == X


def test_gradients():
    x, a, b, base, scale = (
        t.requires_grad_() for t in tensors(torch.float64, X, A, B, X, [2.0, 4.0, 8.0, 1.0])
    )
    y = call(x, a, b, base=base, row_scale=scale)
    dy = torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0], [1.0, 2.0]], dtype=torch.float64)
    dx, da, db, dbase, dscale = torch.autograd.grad(y, (x, a, b, base, scale), dy)
    # c = -2, 2, none, 0.5;  dy B = [1, 1], [-1, 1], none, [0, 2];  dS = [-2, -2], [-2, 2], none, [0, 1]
    assert dx.tolist() == [[-2.0, -2.0], [0.0, -2.0], [0.0, 0.0], [1.0, 0.0]]  # dS A
    # adapter 0: [-2, 2]ᵀ [-1, 1] + [0, 1]ᵀ [2, 2];  adapter 1: [-2, -2]ᵀ [1, 2]
    assert da.tolist() == [[[2.0, -2.0], [0.0, 4.0]], [[-2.0, -4.0], [-2.0, -4.0]]]
    # adapter 0: 2 [0, 1]ᵀ [0, -1] + 0.5 [1, 2]ᵀ [4, 2];  adapter 1: -2 [1, 0]ᵀ [4, -1]
    assert db.tolist() == [[[2.0, 1.0], [4.0, 0.0]], [[-8.0, 2.0], [0.0, 0.0]]]
    assert dbase.tolist() == dy.tolist()
    assert dscale.tolist() == [-3.0, -0.5, 0.0, 2.0]  # scaling · dy · (s Bᵀ)


def test_gradients_beyond_a_rank_and_of_absent_adapters_are_zeros():
    x, a, b = (t.requires_grad_() for t in tensors(torch.float64, X, A, B))
    y = call(x, a, b, ids=[0, 0, -1, 0], ranks=(1, 2))
    da, db = torch.autograd.grad(y.sum(), (a, b))
    assert da[0, 0].any()
    assert db[0, :, 0].any()
    assert not da[0, 1].any()
    assert not db[0, :, 1].any()
    assert not da[1].any()
    assert not db[1].any()


def test_gradients_through_dropout_meet_the_same_mask():
    x, a, b = (t.requires_grad_() for t in tensors(torch.float64, X, A, B))
    keep = torch.tensor([[True, False], [False, True], [True, True], [False, False]])
    y = call(x, a, b, p=0.5, keep=keep)
    dy = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    dx, da, db = torch.autograd.grad(y, (x, a, b), dy)
    # dS = -[1, 1], 0.5 [-2, 2], none, 0.5 [1, 1];  dS A = [-1, -1], [0, -1], none, [1, 0.5]
    assert dx.tolist() == [[-2.0, 0.0], [0.0, -2.0], [0.0, 0.0], [0.0, 0.0]]
    assert da.tolist() == [[[0.0, -2.0], [0.0, 2.0]], [[-2.0, 0.0], [-2.0, 0.0]]]
    assert db.tolist() == [[[0.0, 0.0], [2.0, 0.0]], [[0.0, -2.0], [0.0, 0.0]]]
