"""Batched multi-LoRA under every instruction set that this machine has, and what only C++ can get wrong."""

import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from pelt_fast import MultiAdapterPlan
from pelt_fast import functional as PF
from pelt_fast.backends.cpp import _C
from pelt_fast.random import new_seed
from pelt_fast.testing import multi_lora_oracle as oracle
from pelt_fast.testing.multi_lora_tolerance import yardsticks
from pelt_fast.testing.multi_lora_workloads import EVERYTHING, MultiLoRACase
from pelt_fast.testing.tolerance import assert_all_ok, assert_forms, compare

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Sizes at, just below and just past what vectors, squares and blocks hold; sums along and across their lanes.
CASES = [
    MultiLoRACase("past_a_block", (19,), 1030, (130,), rank=(33,), mixed_ranks=True),
    MultiLoRACase("short_sums", (35,), 31, (257,), rank=(15,), b_layout="rank_major"),
    MultiLoRACase("rank_major", (21,), 72, (1030, 65), 4, (17,), b_layout="rank_major"),
    MultiLoRACase("one_column", (9,), 1, (1,), rank=(1,), b_layout="rank_major"),
    MultiLoRACase("all_at_once", (70,), 136, **EVERYTHING),
]


def run(inputs):
    def call(leaves):
        return oracle.joined(PF.multi_lora(*leaves.args, **leaves.kwargs, backend="cpp"))

    return oracle.run_with_masks(call, inputs)


@functools.cache
def expected(case, dtype):
    """The yardsticks are the same for every instruction set, and slow."""
    inputs = case.make(dtype)
    torch.manual_seed(0)
    return yardsticks(inputs, oracle.masks(inputs, new_seed(inputs.x.device)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_oracle(case, dtype, isa, run_on):
    run_on(dtype)
    inputs = case.make(dtype)
    results, _ = run(inputs)
    assert_forms(results, inputs)
    assert_all_ok(compare(results, *expected(case, dtype)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [100, 301])
@pytest.mark.parametrize("case", ["short_sums", "past_a_block"])
def test_over_the_frozen_linear(case, tokens, dtype, isa, run_on):
    """Alone or riding on the product: s and all gradients but dx to the bit those of the adapters alone."""
    run_on(dtype)
    case = replace(next(c for c in CASES if c.name == case), shape=(tokens,), row_scale="token")
    inputs = replace(case, base=False).make(dtype)
    x, a, b, base, *rest = oracle.operands(inputs)
    weight = (torch.randn(case.out_features[0], case.in_features) / 16).to(dtype)
    bias, dropout = torch.randn(case.out_features[0]).to(dtype), (0.3, torch.tensor([5]))
    y, s = _C.multi_lora_linear_fwd(x, weight, bias, a, b, *rest, *dropout)
    added, its_s = _C.multi_lora_fwd(x, a, b, base, *rest, *dropout)
    dx, da, db, dscale = _C.multi_lora_linear_bwd(
        *(inputs.dy, x, weight, a, b, s, *rest, *dropout, True, True, True, True)
    )
    its_dx, *others = _C.multi_lora_bwd([inputs.dy], x, a, b, s, *rest, *dropout, *[True] * 4)
    for one, other in zip((s, *da, *db, dscale), (its_s, *others[0], *others[1], others[2]), strict=True):  # fmt: skip
        assert torch.equal(one, other)
    eps = torch.finfo(dtype).eps
    for found, of_base, more in (
        (y, F.linear(x, weight, bias), added[0]),
        (dx, inputs.dy @ weight, its_dx),
    ):
        size = (of_base.abs() + more.abs()).max()
        torch.testing.assert_close(found, of_base + more, rtol=0, atol=(2 + eps**-0.1) * eps * size.item())  # fmt: skip


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_same_bits_with_any_number_of_threads(threads, isa, run_on):
    run_on(torch.float32)
    inputs = CASES[-1].make(torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone, _ = run(inputs)
        torch.set_num_threads(threads)
        found, _ = run(inputs)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[name], t) for name, t in alone.items())


@pytest.mark.parametrize("shape", [(4, 8), (16, 16), (33, 5), (7, 70), (1, 9), (64, 48)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_take_the_strides_of_a_dense_stack(shape, dtype, cpp):
    rank, out = shape
    x, dy = torch.randn(6, 12, dtype=dtype), torch.randn(6, out, dtype=dtype)
    a = torch.randn(2, rank, 12, dtype=dtype, requires_grad=True)
    b = torch.randn(2, rank, out, dtype=dtype).transpose(1, 2).requires_grad_()
    other = b.detach().contiguous().requires_grad_()
    plan = MultiAdapterPlan([0, 1, 1, 0, -1, 1], 2)
    (of_turned,) = torch.autograd.grad(PF.multi_lora(x, a, b, plan, 0.5, backend="cpp"), b, dy)
    (of_plain,) = torch.autograd.grad(
        PF.multi_lora(x, a, other, plan, 0.5, backend="cpp"), other, dy
    )
    assert of_turned.stride() == b.stride() or 1 in shape
    torch.testing.assert_close(of_turned, of_plain)


def _arguments(**changed):
    plan = MultiAdapterPlan([0, 1, -1], 2)
    call = {
        "x": torch.randn(3, 8),
        "a": [torch.randn(2, 2, 8)],
        "b": [torch.randn(2, 4, 2)],
        "base": [torch.randn(3, 4)],
        "plan": plan.arrays,
        "ranks": [torch.tensor([2, 2], dtype=torch.int32)],
        "scaling": [torch.ones(2)],
        "row_scale": None,
        "dropout_p": 0.0,
        "seed": None,
    }
    for i, name in ((1, "perm"), (2, "indptr")):
        if name in changed:
            call["plan"][i] = changed.pop(name)
    return [{**call, **changed}[name] for name in call]


@pytest.mark.parametrize(
    "changed",
    [
        {"perm": torch.tensor([0, 1, 3], dtype=torch.int32)},
        {"perm": torch.tensor([0, -1, 2], dtype=torch.int32)},
        {"indptr": torch.tensor([0, 1, 2, 4], dtype=torch.int32)},
        {"indptr": torch.tensor([0, -5, 2, 3], dtype=torch.int32)},
        {"indptr": torch.tensor([0, 1, 2, 2], dtype=torch.int32)},
        {"perm": torch.tensor([0, 1, 1], dtype=torch.int32)},
        {"perm": torch.tensor([0, 1], dtype=torch.int32)},
    ],
    ids=[
        "row_past_the_end",
        "row_before_the_start",
        "segment_past_the_end",
        "segment_before_the_start",
        "row_without_segment",
        "row_twice",
        "too_few_rows",
    ],
)
def test_plan_that_was_written_over_leads_out_of_no_tensor(changed, cpp):
    with pytest.raises(ValueError, match="plan does not hold each of x's 3 rows once"):
        _C.multi_lora_fwd(*_arguments(**changed))


@pytest.mark.parametrize("name", ["x", "a", "b", "base", "ranks", "scaling"])
def test_freed_memory_is_an_error(name, cpp):
    arguments = _arguments()
    position = ["x", "a", "b", "base", "plan", "ranks", "scaling"].index(name)
    value = arguments[position]
    (value if isinstance(value, torch.Tensor) else value[0]).untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="its storage has 0"):
        _C.multi_lora_fwd(*arguments)
