"""The product with a frozen weight: F.linear, packed where that is faster."""

import pytest
import torch
import torch.nn.functional as F

import pelt_fast
from pelt_fast import functional as PF
from pelt_fast.dispatch import cpp_extension

pytestmark = pytest.mark.skipif(cpp_extension() is None, reason="the C++ extension is not built")

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, torch.float64, *HALVES]
TRAINED = (
    [*HALVES, torch.float32] if cpp_extension() and cpp_extension().isa() == "avx2" else HALVES
)
"""What is packed with gradients: many rows of float32 where AVX2 is the best instruction set."""
IN, OUT = 37, 53


@pytest.fixture
def packed(monkeypatch):
    """What the extension gave, call by call: None where PyTorch computes."""
    found = []

    class Spy:
        def ordinary_frozen_linear(self, *args):
            found.append(cpp_extension().ordinary_frozen_linear(*args))
            return found[-1]

    monkeypatch.setattr("pelt_fast.functional.ordinary.cpp_extension", Spy)
    return found


def tensors(dtype, *shape, bias=True):
    torch.manual_seed(0)
    x = torch.randn(*shape, IN, dtype=dtype)
    weight = torch.randn(OUT, IN, dtype=dtype) / IN**0.5
    return x, weight, torch.randn(OUT, dtype=dtype) if bias else None


def error(y, x, weight, bias):
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    return (y.double() - exact).abs().max().item()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(2,), (31,), (4, 8), (1, 2, 3, 5)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_accurate_as_torch(dtype, shape, bias, packed) -> None:
    args = tensors(dtype, *shape, bias=bias)
    y = PF.frozen_linear(*args)
    assert isinstance(packed[-1], torch.Tensor)
    assert y.shape == (*shape, OUT)
    assert y.dtype is dtype
    # float64 has no exact result beside it, and torch's no error then: a sum of K terms in another order
    x, weight, _ = (None if t is None else t.double().abs() for t in args)
    order = torch.finfo(torch.promote_types(dtype, torch.float32)).eps * IN**0.5
    peer = error(F.linear(*args), *args)
    assert error(y, *args) <= 2 * peer + order * (x @ weight.t()).max()


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.t().contiguous().t(),
        lambda x: x[:, ::2].repeat_interleave(2, 1)[:, :IN],
        lambda x: x[:1].expand(8, -1),
        lambda x: torch.randn(8, 2 * IN)[:, :IN],
    ],
    ids=["transposed", "gathered", "expanded", "sliced"],
)
def test_views(view, packed) -> None:
    x, weight, bias = tensors(torch.float32, 8)
    x = view(x)
    y = PF.frozen_linear(x, weight.t().contiguous().t(), bias)
    assert isinstance(packed[-1], torch.Tensor)
    torch.testing.assert_close(y, F.linear(x, weight, bias))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((0,), torch.float32), ((1,), torch.float32), ((33,), torch.float64), ((), torch.float32)]
    + [((1,), torch.bfloat16), ((0, 3), torch.bfloat16)],
    ids=str,
)
def test_left_to_torch(shape, dtype, packed) -> None:
    """No rows, one, and of float64 many: bitwise what F.linear gives."""
    args = tensors(dtype, *shape)
    assert torch.equal(PF.frozen_linear(*args), F.linear(*args))
    assert packed == [None]


@pytest.mark.parametrize("tokens", [9, 40])
@pytest.mark.parametrize("dtype", TRAINED, ids=str)
@pytest.mark.parametrize("trains", ["x", "x and bias", "bias"])
def test_gradients(dtype, trains, tokens, packed) -> None:
    x, weight, bias = tensors(dtype, 3, tokens)
    dy = torch.randn(3, tokens, OUT, dtype=dtype)
    leaves = [t.requires_grad_() for t, name in ((x, "x"), (bias, "bias")) if name in trains]
    ours = torch.autograd.grad(PF.frozen_linear(x, weight, bias), leaves, dy)
    assert packed == [True]
    theirs = torch.autograd.grad(F.linear(x, weight, bias), leaves, dy)
    wide = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    exact = torch.autograd.grad(F.linear(*wide), [wide[0], wide[2]], dy.double())
    exact = [g for g, name in zip(exact, ("x", "bias"), strict=True) if name in trains]
    for mine, peer, true in zip(ours, theirs, exact, strict=True):
        assert mine.dtype is dtype
        terms = OUT if true.ndim > 1 else 3 * tokens  # of dx, and of dbias
        rounding = torch.finfo(dtype).eps * terms**0.5
        bound = 2 * (peer - true).abs().max() + true.abs().max() * rounding
        assert (mine - true).abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_weight_that_trains_is_left_to_torch(dtype, packed) -> None:
    x, weight, bias = tensors(dtype, 8)
    PF.frozen_linear(x, weight.requires_grad_(), bias).sum().backward()
    assert packed == [None]
    assert weight.grad is not None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_with_a_gradient_as_without(dtype, packed) -> None:
    """A checkpoint runs a layer without gradients, and again with them."""
    x, weight, bias = tensors(dtype, 8)
    without = PF.frozen_linear(x, weight, bias)
    assert torch.equal(PF.frozen_linear(x.requires_grad_(), weight, bias), without)
    assert packed[-1] is True


def test_a_changed_weight_counts() -> None:
    x, weight, bias = tensors(torch.float32, 8)
    PF.frozen_linear(x, weight, bias)
    weight.mul_(2)
    torch.testing.assert_close(PF.frozen_linear(x, weight, bias), F.linear(x, weight, bias))


@pytest.mark.parametrize("trains", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_is_packed_only_where_there_is_room(dtype, trains, packed) -> None:
    x, weight, bias = tensors(dtype, 8)
    x.requires_grad_(trains)
    extension = cpp_extension()
    extension.clear_packed()
    extension.set_packed_limit(weight.nbytes // 2)
    try:
        assert torch.equal(PF.frozen_linear(x, weight, bias), F.linear(x, weight, bias))
        assert packed == [None]
        assert extension.packed_bytes() == 0
    finally:
        extension.set_packed_limit(4096 << 20)
    PF.frozen_linear(x, weight, bias)
    assert packed[-1] is not None
    assert extension.packed_bytes() >= weight.nbytes


def test_training_needs_room_for_the_transpose_too(packed) -> None:
    x, weight, bias = tensors(torch.bfloat16, 40)
    extension = cpp_extension()
    extension.clear_packed()
    extension.set_packed_limit(weight.nbytes * 2)  # strips are padded: one pack fits, two do not
    try:
        y = PF.frozen_linear(x.requires_grad_(), weight, bias)
        assert torch.equal(y, F.linear(x, weight, bias))
        assert packed == [None]
    finally:
        extension.set_packed_limit(4096 << 20)


@pytest.mark.parametrize("other", ["torch", "reference"])
def test_another_backend_is_torch(other, packed) -> None:
    args = tensors(torch.float32, 8)
    with pelt_fast.use_backend(other):
        assert torch.equal(PF.frozen_linear(*args), F.linear(*args))
    assert packed == []


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, w, b: (x[:, 1:], w, b),
        lambda x, w, b: (x.double(), w, b),
        lambda x, w, b: (x, w[None, None], b),
        lambda x, w, b: (x, w, b[1:]),
        lambda x, w, b: (x, None, b),
    ],
    ids=["features", "dtype", "weight's shape", "bias", "no weight"],
)
def test_errors_are_torchs(wrong) -> None:
    args = wrong(*tensors(torch.float32, 8))
    with pytest.raises((RuntimeError, TypeError)) as theirs:
        F.linear(*args)
    with pytest.raises(theirs.type) as ours:
        PF.frozen_linear(*args)
    assert str(ours.value) == str(theirs.value)


def test_under_autocast_and_inference_mode(packed) -> None:
    args = tensors(torch.float32, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(PF.frozen_linear(*args), F.linear(*args))
    with torch.inference_mode():
        torch.testing.assert_close(PF.frozen_linear(*args), F.linear(*args))
    assert packed[0] is None
    assert isinstance(packed[1], torch.Tensor)
