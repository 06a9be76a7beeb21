"""AdapterFusion, every case, backend and dtype, against the fp64 oracle: the output and every gradient."""

import functools
from dataclasses import replace
from itertools import product

import pytest
import torch

from pelt_fast import functional as PF
from pelt_fast.functional import fusion as front
from pelt_fast.random import new_seed
from pelt_fast.testing import fusion_oracle as oracle
from pelt_fast.testing.adapter_workloads import PFEIFFER
from pelt_fast.testing.fusion_tolerance import assert_accurate, yardsticks
from pelt_fast.testing.fusion_workloads import (
    BLOCKS,
    CASES,
    EVERYTHING,
    FLAGS,
    MIXED_DTYPE,
    STRIDES,
    FusionCase,
)
from pelt_fast.testing.tolerance import assert_all_ok, assert_forms, compare

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@functools.cache
def expected(case, dtype, device):
    """The yardsticks are the same for every backend, and slow."""
    inputs = case.make(dtype, device)
    torch.manual_seed(0)
    return yardsticks(inputs, oracle.mask(inputs, new_seed(inputs.x.device)))


def check(case, dtype, backend, device):
    inputs = case.make(dtype, device)
    results, _ = backend.run(inputs)
    assert set(results) == {"y", *oracle.trained(inputs)}
    assert_forms(results, inputs)
    assert_all_ok(compare(results, *expected(case, dtype, device)))
    return results


def named(*names):
    return [case for case in CASES if case.name in names]


# what is added where, in which layout, is a matter of no dtype: the dtypes take turns
_SLOW = {
    (case, dtype)
    for i, case in enumerate((*FLAGS, *STRIDES, *BLOCKS))
    for dtype in DTYPES
    if dtype != DTYPES[i % len(DTYPES)]
}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(
            *pair, id="-".join(map(str, pair)), marks=[pytest.mark.slow] if pair in _SLOW else []
        )
        for pair in product(CASES, DTYPES)
    ],
)
def test_matches_the_oracle(case, dtype, backend, device):
    check(case, dtype, backend, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", MIXED_DTYPE, ids=str)
def test_fp32_parameters_over_half_precision(case, dtype, backend, device):
    results = check(case, dtype, backend, device)
    assert results["y"].dtype == results["x"].dtype == dtype
    assert results["down.0"].dtype == results["query_weight"].dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("block", [PFEIFFER, EVERYTHING], ids=["pfeiffer", "everything"])
def test_matches_the_oracle_at_the_size_of_a_model(block, dtype, backend, device):
    inputs = FusionCase("", (1025,), 768, (48, 48, 48), **block).make(dtype, device)
    results, keep = backend.run(inputs)
    assert_accurate(results, inputs, keep)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", named("past_one_tile", "everything", "few_tokens"), ids=str)
def test_two_runs_are_bitwise_equal(case, dtype, backend, device):
    inputs = case.make(dtype, device)
    first, _ = backend.run(inputs)
    second, _ = backend.run(inputs)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("case", named("odd", "everything", "few_tokens", "sliced_rows"), ids=str)
def test_arguments_are_never_written_to(case, backend, device):
    inputs = case.make(torch.float32, device)
    before = {name: (t.clone(), t._version) for name, t in inputs.named_tensors()}
    backend.run(inputs)
    for name, tensor in inputs.named_tensors():
        value, version = before[name]
        assert torch.equal(tensor, value), name
        assert tensor._version == version, name


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_is_accurate(threads, backend, device):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(FusionCase("", (131,), 72, (24, 7), **EVERYTHING), torch.float32, backend, device)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("case", named("pfeiffer", "everything", "value_residual"), ids=str)
def test_both_orders_are_one_function(case, backend, device, monkeypatch):
    """Folded, and token by token: the choice is one of cost."""
    inputs = case.make(torch.float64, device)
    results = []
    for folded in (True, False):
        monkeypatch.setattr(front, "folds", lambda *_, folded=folded: folded)
        results.append(backend.run(inputs)[0])
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", named("everything", "few_tokens", "one_dim"), ids=str)
def test_attention_sums_to_one_and_is_the_references(case, backend, device):
    case = replace(case, dropout_p=0.0)
    inputs = case.make(torch.float64, device)
    backend.require(inputs)
    y, p = PF.adapter_fusion(
        *inputs.args, **inputs.kwargs, return_attention=True, backend=backend.name
    )
    assert p.shape == (*case.shape, len(case.widths))
    assert not p.requires_grad
    torch.testing.assert_close(p.sum(-1), torch.ones_like(p[..., 0]))
    assert torch.equal(y, backend(inputs))
    if case.shape:
        assert p.std(0).min() > 1e-4, "the attention does not depend on the token"


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "skip", "dy"])
def test_nan_and_inf_stay_in_their_token(where, poison, backend, device):
    inputs = FusionCase("", (31,), 24, (8, 8), **PFEIFFER).make(torch.float32, device)
    getattr(inputs, where)[3, 5] = poison
    results, _ = backend.run(inputs)
    wanted = torch.ones(31, dtype=torch.bool)
    wanted[3] = where == "dy"
    assert torch.equal(results["y"].isfinite().all(1), wanted)
    wanted[3] = False
    assert torch.equal(results["x"].isfinite().all(1), wanted)


def test_scores_far_beyond_what_exp_holds(backend, device):
    """As softmax has it: the largest takes it all, and nothing overflows."""
    inputs = FusionCase("", (31,), 24, (8, 8), **PFEIFFER).make(torch.float32, device)
    inputs = replace(inputs, query_weight=inputs.query_weight * 1e4)
    results, _ = backend.run(inputs)
    assert all(value.isfinite().all() for value in results.values())
    assert_accurate({"y": results["y"]}, inputs, None)


def test_without_dropout_eval_draws_no_random_number(backend, device):
    inputs = FusionCase("", (31,), 24, (8, 8), **PFEIFFER).make(torch.float32, device)
    backend.require(inputs)
    torch.manual_seed(0)
    drawn = torch.rand(1, device=device)
    torch.manual_seed(0)
    more = {**inputs.kwargs, "dropout_p": 0.5, "training": False}
    y = PF.adapter_fusion(*inputs.args, **more, backend=backend.name)
    assert torch.equal(torch.rand(1, device=device), drawn)
    assert_accurate({"y": y}, inputs, None)


@pytest.mark.parametrize("case", named("everything", "few_tokens", "no_tokens"), ids=str)
def test_meta_tensors_give_shapes_and_dtypes(case):
    inputs = case.make(torch.bfloat16).map(lambda _, t: t.to("meta"))
    y = PF.adapter_fusion(*inputs.args, **inputs.kwargs)
    assert (y.device.type, y.dtype, y.shape) == ("meta", torch.bfloat16, inputs.x.shape)


@pytest.mark.parametrize("name", ["pfeiffer", "few_tokens", "value_residual"])
def test_autocast_computes_in_the_autocast_dtype(name, backend, device):
    (case,) = named(name)
    inputs = replace(case, residual_x=False, residual_skip=False, skip_in=False).make(
        torch.float32, device
    )
    backend.require(inputs)
    with torch.autocast(device, torch.bfloat16):
        y, p = PF.adapter_fusion(
            *inputs.args, **inputs.kwargs, return_attention=True, backend=backend.name
        )
        residual = PF.adapter_fusion(
            *inputs.args, **{**inputs.kwargs, "residual": inputs.x}, backend=backend.name
        )
    assert y.dtype == p.dtype == torch.bfloat16
    assert residual.dtype == torch.float32, "what is added keeps its precision"
