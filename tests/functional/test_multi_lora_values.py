"""Every case, backend and dtype against the fp64 oracle: the outputs and every gradient."""

import functools
import math
from dataclasses import replace

import pytest
import torch

from pelt_fast import MultiAdapterPlan
from pelt_fast import functional as PF
from pelt_fast.random import new_seed
from pelt_fast.testing import multi_lora_oracle as oracle
from pelt_fast.testing.multi_lora_tolerance import assert_accurate, yardsticks
from pelt_fast.testing.multi_lora_workloads import (
    CASES,
    EVERYTHING,
    FP16_OVERFLOW,
    MIXED_DTYPE,
    QKV,
    MultiLoRACase,
)
from pelt_fast.testing.tolerance import assert_all_ok, assert_forms, compare

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
HALVES = [torch.bfloat16, torch.float16]
CASE = MultiLoRACase("", (4, 9), 24, **EVERYTHING)


@functools.cache
def expected(case, dtype, device):
    """The yardsticks are the same for every backend, and slow."""
    inputs = case.make(dtype, device)
    torch.manual_seed(0)
    return yardsticks(inputs, oracle.masks(inputs, new_seed(inputs.x.device)))


def check(case, dtype, backend, device):
    inputs = case.make(dtype, device)
    results, _ = backend.run(inputs)
    assert set(results) == {"y", *(name for name, _ in inputs.named_tensors())} - {"dy"}
    assert_forms(results, inputs)
    assert_all_ok(compare(results, *expected(case, dtype, device)))
    return results


# fp32 always; the other dtypes take turns
_LARGE = ("past_one_chunk", "many_tokens")
_SLOW = {
    (case, dtype)
    for i, case in enumerate(CASES)
    for j, dtype in enumerate(DTYPES[1:])
    if (i + j) % 4 or case.name in _LARGE
}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(
            *(case, dtype),
            id=f"{case}-{dtype}",
            marks=[pytest.mark.slow] if (case, dtype) in _SLOW else [],
        )
        for case in CASES
        for dtype in DTYPES
    ],
)
def test_matches_the_oracle(case, dtype, backend, device):
    check(case, dtype, backend, device)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, marks=[pytest.mark.slow] if "chunk" in c.name else [])
        for c in MIXED_DTYPE
    ],
    ids=str,
)  # fmt: skip
def test_fp32_adapters_over_half_precision(case, dtype, backend, device):
    results = check(case, dtype, backend, device)
    assert results["y"].dtype == dtype
    assert results["lora_a.0"].dtype == results["lora_b.0"].dtype == torch.float32


def test_fp16_that_overflows_before_it_is_scaled(backend, device):
    inputs = FP16_OVERFLOW.make(torch.float16, device)
    most = torch.finfo(torch.float16).max
    where = [t for t, g in enumerate(inputs.ids) if g >= 0]
    ids = [inputs.ids[t] for t in where]
    a, b = inputs.lora_a[0][ids].double(), inputs.lora_b[0][ids].double()
    s = torch.einsum("tk,trk->tr", inputs.x[where].double(), a)
    assert s.abs().max() < most
    assert (s * inputs.row_scale[where].double()).abs().max() > most
    assert torch.einsum("tr,tnr->tn", s, b).abs().max() > most
    results, keep = backend.run(inputs)
    assert all(value.isfinite().all() for value in results.values())
    assert_accurate(results, inputs, keep)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_matches_the_oracle_at_the_size_of_a_model(dtype, dropout_p, backend, device):
    case = MultiLoRACase("", (257,), 768, (768, 1032), 8, (16,), "mixed", True, dropout_p=dropout_p)
    check(case, dtype, backend, device)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_plan_with_room_for_more_tokens(dtype, backend, device):
    """What lies behind the tokens, of a larger batch before, is not looked at."""
    inputs = CASE.make(dtype, device)
    count = inputs.plan.num_adapters
    before = [t % count for t in range(inputs.tokens + 700)]
    roomy = MultiAdapterPlan(before, count, device=device).update_(inputs.ids)
    plain, _ = backend.run(inputs)
    results, _ = backend.run(replace(inputs, plan=roomy))
    for name, value in plain.items():
        assert torch.equal(results[name], value), name


def test_lone_projection_may_come_without_a_sequence(backend, device):
    inputs = MultiLoRACase("", (2, 5), 24).make(torch.float32, device)
    expected = backend(inputs)
    x, (a,), (b,), plan, (scaling,) = inputs.args
    (base,) = inputs.base
    y = PF.multi_lora(x, a, b, plan, scaling, base_out=base, backend=backend.name)
    assert torch.equal(y, expected)
    y = PF.multi_lora(x, [a], [b], plan, [scaling], base_out=[base], backend=backend.name)
    assert isinstance(y, tuple)
    assert torch.equal(y[0], expected)


def test_forms_of_scaling(backend, device):
    inputs = MultiLoRACase("", (9,), 24, (40, 7)).make(torch.float32, device)
    inputs = replace(inputs, scaling=((2.0,) * 3, (2.0,) * 3))
    expected = backend(inputs)
    arguments, base = inputs.args[:4], inputs.base
    vector = torch.full((3,), 2.0, device=device)
    for scaling in (
        *(2, 2.0, [2.0, 2], vector, (vector, 2.0), vector.double(), vector.bfloat16()),
        vector.repeat(2)[::2],
    ):
        y = PF.multi_lora(*arguments, scaling, base_out=base, backend=backend.name)
        assert torch.equal(oracle.joined(y), expected)


def test_forms_of_ranks(backend, device):
    inputs = MultiLoRACase("", (29,), 24, (40, 7), 4, (6,)).make(torch.float32, device)
    numbers = (6, 0, 3, 1)
    inputs = replace(inputs, ranks=(numbers, numbers))
    expected = backend(inputs)
    vector = torch.tensor(numbers, device=device)
    forms = [numbers, list(numbers), [numbers, vector], vector.repeat_interleave(2)[::2]]
    forms += [vector.to(d) for d in (torch.int32, torch.int16, torch.int8, torch.uint8)]
    for ranks in forms:
        y = PF.multi_lora(*inputs.args, ranks=ranks, base_out=inputs.base, backend=backend.name)
        assert torch.equal(oracle.joined(y), expected)
    other = replace(inputs, ranks=(numbers, None))
    y = PF.multi_lora(
        *inputs.args, ranks=[numbers, None], base_out=inputs.base, backend=backend.name
    )
    assert torch.equal(oracle.joined(y), backend(other))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int64], ids=str)
def test_ranks_of_a_dtype_that_does_not_reach_r(dtype, backend, device):
    inputs = MultiLoRACase("", (9,), 24, rank=(256,)).make(torch.float32, device)
    inputs = replace(inputs, ranks=((127, 3, 0),))
    ranks = torch.tensor([127, 3, 0], dtype=dtype, device=device)
    y = PF.multi_lora(*inputs.args, ranks=ranks, base_out=inputs.base, backend=backend.name)
    assert torch.equal(y[0], backend(inputs))


def test_ranks_and_scaling_obey_the_adapter_of_the_token(backend, device):
    """One number each, all different: which adapter's rank and scaling came shows in the result."""
    count, most = 5, 5
    ids = (3, -1, 0, 4, 4, 1, 5, 2)
    x = torch.ones(len(ids), 1, device=device)
    a = torch.ones(count, most, 1, device=device)
    b = 10.0 ** torch.arange(most, device=device).expand(count, 1, most)
    scaling = torch.tensor([2.0, 3.0, 5.0, 7.0, 8.0], device=device)
    plan = MultiAdapterPlan(ids, count, device=device)
    y = PF.multi_lora(x, a, b, plan, scaling, ranks=[4, 0, 2, 1, 3], backend=backend.name)
    assert y.flatten().tolist() == [7.0, 0.0, 2222.0, 888.0, 888.0, 0.0, 0.0, 55.0]


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(
    "case", [CASE, *(c for c in CASES if c.name in ("past_one_tile", "qkv"))], ids=str
)
def test_two_runs_are_bitwise_equal(case, dtype, backend, device):
    inputs = case.make(dtype, device)
    first, _ = backend.run(inputs)
    second, _ = backend.run(inputs)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(
    "case",
    [CASE, MultiLoRACase("large", (700,), 72, (136, 24), 2, (16,), row_scale="token")],
    ids=str,
)
def test_threads_change_no_bit(case, dtype, backend, device):
    if case.name == "large" and backend.name == "reference":
        pytest.skip("the reference goes row by row")
    inputs, before = case.make(dtype, device), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            found.append(backend.run(inputs)[0])
    finally:
        torch.set_num_threads(before)
    one, two, two_again, three = found
    pairs = [(two, two_again)]
    if backend.name != "torch":  # BLAS cuts a product in as many parts as there are threads
        pairs += [(one, two), (one, three)]
    for left, right in pairs:
        assert all(torch.equal(value, right[name]) for name, value in left.items())


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(
    "case", [CASE, *(c for c in CASES if c.name in ("odd", "x_sliced", "b_sliced"))], ids=str
)
def test_arguments_are_never_written_to(case, dtype, backend, device):
    inputs = case.make(dtype, device)
    tensors = [*inputs.named_tensors(), ("plan", inputs.plan._buffer)]
    before = {name: (t.clone(), t._version) for name, t in tensors}
    backend.run(inputs)
    for name, tensor in tensors:
        value, version = before[name]
        torch.testing.assert_close(tensor, value, rtol=0, atol=0, equal_nan=True, msg=name)
        assert tensor._version == version, name


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("ids", ["mixed", "none"])
def test_results_are_fresh_memory_that_may_be_written_to(ids, base, backend, device):
    inputs = MultiLoRACase("", (2, 3), 24, (24, 24), ids=ids, base=base).make(torch.float32, device)
    backend.require(inputs)
    leaves = inputs.map(lambda name, t: t.detach().requires_grad_(name == "lora_b.0"))
    y = PF.multi_lora(*leaves.args, **leaves.kwargs, backend=backend.name)
    arguments = {t.untyped_storage().data_ptr() for _, t in leaves.named_tensors()}
    storages = {t.untyped_storage().data_ptr() for t in y}
    assert len(storages) == 2
    assert not storages & arguments
    y[0].add_(1.0)
    torch.autograd.grad(y[0].sum(), leaves.lora_b[0])


def test_nan_and_inf_of_the_input_arrive_where_they_belong(backend, device):
    """In their own row and in the gradients of their own adapter."""
    inputs = MultiLoRACase("", (5,), 24, ids="none").make(torch.float32, device)
    inputs = inputs.with_ids((0, 1, -1, 2, 2))
    inputs.x[1, 5], inputs.x[2, 3], inputs.x[3, 0] = math.nan, math.nan, math.inf
    results, _ = backend.run(inputs)
    y, a, b = results["y"], results["lora_a.0"], results["lora_b.0"]
    assert y[[0, 2, 4]].isfinite().all()
    assert torch.equal(y[2], inputs.base[0][2])
    assert y[1].isnan().all()
    assert not y[3].isfinite().any()
    assert a[0].isfinite().all()
    assert b[0].isfinite().all()
    assert a[1].isnan()[:, 5].all()
    assert b[1].isnan().all()
    assert not a[2].isfinite().all()
    assert results["x"].isfinite().all()


def test_nan_of_an_adapter_without_tokens_stays_there(backend, device):
    inputs = MultiLoRACase("", (7,), 24, (40, 7), 4, row_scale="token").make(torch.float32, device)
    inputs = inputs.with_ids((0, 3, -1, 3, 0, 7, 0))
    for parameter in (*inputs.lora_a, *inputs.lora_b):
        parameter[1:3] = math.nan
    results, keep = backend.run(inputs)
    for name, value in results.items():
        assert value.isfinite().all(), name
        if name.startswith("lora"):
            assert not value[1:3].any(), name
    clean = inputs.map(lambda _, t: t.nan_to_num(0.0))
    assert_accurate(results, clean, keep)


def test_nan_in_the_gradient_of_a_token_without_adapter_stays_there(backend, device):
    inputs = MultiLoRACase("", (7,), 24, (40,), 2, row_scale="token").make(torch.float32, device)
    inputs = inputs.with_ids((0, 1, -1, 1, 0, 7, 0))
    inputs.dy[[2, 5]] = math.nan
    inputs.row_scale[2] = math.nan
    results, _ = backend.run(inputs)
    for name in ("y", "x", "row_scale", "lora_a.0", "lora_b.0"):
        assert results[name].isfinite().all(), name
    assert not results["x"][[2, 5]].any()
    assert not results["row_scale"][[2, 5]].any()


def test_exact_results_stay_exact(backend, device):
    """Small integers leave no room for rounding: any difference is a wrong formula."""
    case = replace(CASE, dropout_p=0.5, scaling=(2.0, -1.0, 3.0))
    inputs = case.make(torch.float32, device)
    inputs = inputs.map(lambda _, t: (t * 8).round().clamp(-3, 3))
    results, keep = backend.run(inputs)
    for name, value in oracle.exact(inputs, keep).items():
        assert torch.equal(results[name].double(), value), name


def test_without_training_dropout_draws_no_random_number(backend, device):
    inputs = CASE.make(torch.float32, device)
    backend.require(inputs)
    torch.manual_seed(0)
    expected = torch.rand(1, device=device)
    torch.manual_seed(0)
    more = {**inputs.kwargs, "training": False}
    y = PF.multi_lora(*inputs.args, **more, backend=backend.name)
    assert torch.equal(torch.rand(1, device=device), expected)
    assert_accurate({"y": oracle.joined(y)}, replace(inputs, dropout_p=0.0), [None] * 3)


@pytest.mark.parametrize("case", [CASE, MultiLoRACase("", (2, 3), 24, QKV, base=False)])
def test_meta_tensors_give_shapes_and_dtypes(case):
    """As models built without memory need it; and nothing on the way reads a number."""
    inputs = case.make(torch.bfloat16).map(lambda _, t: t.to("meta"))
    ids = torch.empty(inputs.tokens, dtype=torch.int64, device="meta")
    inputs = replace(inputs, plan=MultiAdapterPlan(ids, inputs.plan.num_adapters))
    for y, columns in zip(PF.multi_lora(*inputs.args, **inputs.kwargs), inputs.outs, strict=True):
        assert y.device.type == "meta"
        assert y.dtype == torch.bfloat16
        assert y.shape == (*case.shape, columns)
