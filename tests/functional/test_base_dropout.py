"""``functional.dropout`` is torch's, bit for bit, and so is the attention around it."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pelt_fast.dispatch import cpp_extension
from pelt_fast.functional.attention import attention
from pelt_fast.functional.dropout import dropout


def drawn(draw, x: Tensor, p: float, before: int = 0) -> tuple[Tensor, Tensor]:
    """The result of a seed, and what the generator gives next; ``before`` words were taken before."""
    torch.manual_seed(11)
    for _ in range(before):
        torch.randint(9, (1,))
    y = draw(x, p, True)
    return y, torch.get_rng_state()


@pytest.mark.parametrize("before", [0, 1, 2, 623])
@pytest.mark.parametrize("shape", [(1,), (311,), (312, 1), (313,), (5, 17, 33)])
def test_masks_and_generator_are_torchs(shape: tuple[int, ...], before: int) -> None:
    x = torch.randn(shape)
    x.view(-1)[0] = torch.inf
    for p in (0.1, 0.5, 1e-9, 1 - 2**-30):
        expected, got = drawn(F.dropout, x, p, before), drawn(dropout, x, p, before)
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_an_upper_half_that_ties_is_settled_by_the_lower() -> None:
    # of 2^20 draws, about one has the upper 21 bits of a given threshold
    x = torch.ones(1 << 20)
    assert torch.equal(drawn(dropout, x, 0.5)[0], drawn(F.dropout, x, 0.5)[0])
    # a probability that is the number drawn: u < keep is false for it, and true for the next larger
    torch.manual_seed(11)
    u = torch.empty(1, dtype=torch.float64).uniform_().item()
    for keep in (u, u + 2**-53, u + 2**-54):
        assert torch.equal(drawn(dropout, x[:1], 1 - keep)[0], drawn(F.dropout, x[:1], 1 - keep)[0])


def test_gradients_of_all_orders_are_torchs() -> None:
    found = []
    for draw in (F.dropout, dropout):
        x = torch.linspace(-1, 1, 30).view(5, 6).requires_grad_()
        y = drawn(draw, x, 0.3)[0]
        (first,) = torch.autograd.grad((y * y).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad((first**3).sum(), x)
        basis = torch.eye(30).view(30, 5, 6)
        (batched,) = torch.autograd.grad(drawn(draw, x, 0.3)[0], x, basis, is_grads_batched=True)
        found.append((y, first, second, batched))
    torch.testing.assert_close(found[1], found[0])
    assert all(torch.equal(a, b) for a, b in itertools.islice(zip(*found, strict=True), 2))


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(4, 6, dtype=torch.float64),
        torch.randn(4, 6, dtype=torch.bfloat16),
        torch.randn(6, 4).t(),
        torch.empty(0, 3),
        torch.tensor(2.0),
    ],
)
def test_the_rest_is_left_to_torch(x: Tensor) -> None:
    for p in (0.0, 0.4, 1.0):
        assert torch.equal(drawn(dropout, x, p)[0], drawn(F.dropout, x, p)[0])
    assert dropout(x, 0.4, False) is x
    with pytest.raises(ValueError, match=r"dropout probability has to be between 0 and 1"):
        dropout(x, 1.5, True)


def test_transforms_and_compilation_go_to_torch() -> None:
    x = torch.randn(3, 8)
    y = torch.func.vmap(lambda row: dropout(row, 0.5, True), randomness="different")(x)
    assert y.shape == x.shape
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        kept = dropout(dual, 0.5, True)
        tangent = torch.autograd.forward_ad.unpack_dual(kept).tangent
        assert torch.equal(tangent, torch.autograd.forward_ad.unpack_dual(kept).primal)
    compiled = torch.compile(
        lambda t: dropout(t, 0.5, True), fullgraph=True, backend="aot_eager", dynamic=False
    )
    assert compiled(x).shape == x.shape


def draws_one_by_one() -> bool:
    """Whether torch's masks are of the generator's words in turn, and not of a library's own generator."""
    torch.manual_seed(5)
    mask = torch.empty(1000).bernoulli_(0.3)
    torch.manual_seed(5)
    return torch.equal(mask, (torch.empty(1000, dtype=torch.float64).uniform_() < 0.3).float())


def test_what_is_kept_for_backward_is_a_byte_an_element() -> None:
    extension = cpp_extension()
    if extension is None or not draws_one_by_one():
        pytest.skip("dropout is torch's here: no extension, or masks of MKL's generator")
    assert extension.ordinary_dropout(torch.ones(1), 0.5) is not None
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        dropout(torch.ones(40, requires_grad=True), 0.5, True)
    assert [(t.dtype, t.numel()) for t in saved] == [(torch.uint8, 40)]


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_torchs(masked: bool) -> None:
    found = []
    for function in (F.scaled_dot_product_attention, attention):
        generator = torch.Generator().manual_seed(1)
        q, k, v = (
            torch.randn(2, 9, 3, 16, generator=generator).transpose(1, 2).requires_grad_()
            for _ in range(3)
        )
        mask = torch.zeros(2, 1, 9, 9)
        mask[1, :, :, 5:] = -torch.inf
        mask[0, :, 3] = -torch.inf  # sees nothing
        torch.manual_seed(2)
        y = function(q, k, v, attn_mask=mask if masked else None, dropout_p=0.2)
        found.append((y, *torch.autograd.grad(y.square().sum(), (q, k, v)), torch.rand(1)))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_other_attention_is_left_to_torch() -> None:
    q = torch.randn(2, 4, 5, 8)
    for change in (
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": torch.ones(5, 5, dtype=torch.bool).tril()},
        {"dropout_p": 0.0},
        {"dropout_p": 1.0},
    ):
        arguments = {"dropout_p": 0.2, **change}
        found = []
        for function in (F.scaled_dot_product_attention, attention):
            torch.manual_seed(2)
            found.append(function(q, q, q, **arguments))
        assert torch.equal(*found)
    half = q.double()
    torch.manual_seed(2)
    expected = F.scaled_dot_product_attention(half, half, half, dropout_p=0.2)
    torch.manual_seed(2)
    assert torch.equal(attention(half, half, half, dropout_p=0.2), expected)
