"""Values of the multi-LoRA kernels against the fp64 oracle, every access checked, programs in random order."""

from dataclasses import replace

import pytest
import torch

from pelt_fast.segments import TILES, MultiAdapterPlan
from pelt_fast.testing import multi_lora_oracle
from pelt_fast.testing.multi_lora_tolerance import assert_accurate
from pelt_fast.testing.multi_lora_workloads import (
    CASES,
    EVERYTHING,
    FP16_OVERFLOW,
    MIXED_DTYPE,
    QKV,
    MultiLoRACase,
)

pytest.importorskip("triton")
from pelt_fast.backends.triton_ import multi_lora
from pelt_fast.kernels.multi_lora import expand, grad_a, grad_b, shrink
from pelt_fast.kernels.multi_lora.tiles import CHUNK_ROWS
from pelt_fast.testing.gpu_free import Trace

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# What is quick and stands for its kind; the rest takes minutes, interpreted.
QUICK = (
    *("one_token", "one_token_of_none", "odd", "four_dims", "all_ones", "8_adapters", "qkv"),
    *("ids_mixed", "ids_none", "ids_gaps", "ids_outside", "rank_1", "rank_8", "mixed_ranks_3"),
    *("each_its_own_rank", "everything", "qkv_fused_base", "no_base", "no_base_no_adapter"),
    *("scale_zero", "scale_sample", "x_sliced", "dy_expanded", "base_sliced", "a_transposed"),
    *("b_rank_major", "b_permuted", "dropout_odd", "dropout_all", "fp32_adapters_everything"),
)
EVERY_DTYPE = ("odd", "each_its_own_rank")
SEED = -0x0123456789ABCDEF  # both halves of Philox's key differ, and the sign bit is set


def _seed(inputs):
    return torch.tensor([SEED], device=inputs.x.device) if inputs.dropout_p else None


def _run(kernels, inputs, trace=None, capability=90, wanted=None):
    if (
        wanted is None
        and inputs.row_scale is not None
        and inputs.row_scale.numel() != inputs.tokens
    ):
        # its gradient is summed above the backend
        names = [name for name, _ in inputs.named_tensors()]
        wanted = [name for name in names if name not in ("dy", "row_scale")]
    with kernels.context(trace, capability):
        return multi_lora_oracle.run_backend(multi_lora, inputs, _seed(inputs), wanted)


def _check(kernels, inputs, capability=90):
    results = _run(kernels, inputs, Trace("random"), capability)
    assert_accurate(
        _shaped(results, inputs), inputs, multi_lora_oracle.masks(inputs, _seed(inputs))
    )
    return results


def _shaped(results, inputs):
    """y's rows back in the shape of dy."""
    return {**results, "y": results["y"].reshape(inputs.dy.shape)}


def _slow(case, dtype):
    return case.name not in (QUICK if dtype == torch.bfloat16 else EVERY_DTYPE)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(
            case,
            dtype,
            id=f"{case}-{str(dtype).removeprefix('torch.')}",
            marks=[pytest.mark.slow] if _slow(case, dtype) else [],
        )
        for dtype in DTYPES
        for case in (*CASES, *MIXED_DTYPE)
        if case.tokens and case.adapter_dtype != dtype
    ],
)
def test_every_case(case, dtype, kernels):
    _check(kernels, case.make(dtype, kernels.device))


def test_fp16_near_overflow(kernels):
    results = _check(kernels, FP16_OVERFLOW.make(torch.float16, kernels.device))
    assert results["y"].isfinite().all()


BLOCKS = MultiLoRACase("blocks", (70,), 132, (72, 24), 3, (20, 5), mixed_ranks=True)


@pytest.fixture
def several_programs(monkeypatch):
    """Small tiles and parts: more than one program in every dimension, and partials of the shrink, at `BLOCKS`."""
    monkeypatch.setattr(
        shrink,
        "default_config",
        lambda problem: shrink.ShrinkConfig(16, 16, 16, 16, 48, problem.op.endswith("_fwd")),
    )
    monkeypatch.setattr(
        expand, "default_config", lambda problem: expand.ExpandConfig(16, 16, 32, 16)
    )
    monkeypatch.setattr(grad_a, "default_config", lambda problem: grad_a.GradAConfig(16, 32, 16, 1))
    monkeypatch.setattr(grad_b, "default_config", lambda problem: grad_b.GradBConfig(16, 32, 16, 1))


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_several_programs_in_every_dimension(dropout_p, several_programs, kernels):
    case = replace(BLOCKS, dropout_p=dropout_p, row_scale="token" if dropout_p else "")
    _check(kernels, case.make(torch.bfloat16, kernels.device))


def _schedules(monkeypatch, forward, backward):
    """(tile, block_t, split) of the forward, split of the backward: who does what, and nothing else."""
    default = {file: file.default_config.__wrapped__ for file in (shrink, expand)}
    tile, block_t, split = forward

    def of_shrink(problem):
        config = default[shrink](problem)
        if problem.op.endswith("_bwd"):
            return replace(config, split=backward)
        return replace(config, tile=tile, block_t=block_t, split=split)

    monkeypatch.setattr(shrink, "default_config", of_shrink)
    monkeypatch.setattr(
        expand,
        "default_config",
        lambda problem: replace(default[expand](problem), tile=tile, block_t=block_t),
    )


def test_a_token_has_the_same_bits_in_every_schedule(kernels, monkeypatch):
    """Decode and prefill: parts of K as programs or in a loop, low tiles or high ones."""
    case = MultiLoRACase("schedules", (37,), 300, (300, 24), 3, (20, 5), mixed_ranks=True)
    inputs = case.make(torch.bfloat16, kernels.device)
    assert shrink.default_config(_problem(inputs)).parts(300) > 1
    found = []
    for forward, backward in (((16, 16, True), True), ((64, 16, False), False)):
        _schedules(monkeypatch, forward, backward)
        found.append(_run(kernels, inputs))
        monkeypatch.undo()
    for name in found[0]:
        assert torch.equal(found[0][name], found[1][name]), name


def _problem(inputs):
    return multi_lora._shapes(
        "multi_lora_fwd", inputs.x, inputs.lora_a, inputs.lora_b, bool(inputs.dropout_p)
    )


MIXTURE = MultiLoRACase(
    "mixture", (45,), 72, QKV[:2], 4, (8, 16), mixed_ranks=True, row_scale="token"
)


def test_an_adapter_alone_has_the_bits_that_it_has_in_a_mixture(kernels):
    inputs = MIXTURE.make(torch.bfloat16, kernels.device)
    together = _run(kernels, inputs)
    for adapter in (-1, 0, 1):
        index = [t for t, g in enumerate(inputs.ids) if g == adapter]
        alone = _run(kernels, inputs.rows(index))
        for name in ("y", "x", "row_scale"):
            assert torch.equal(alone[name].squeeze(), together[name][index].squeeze()), name
        for name in ("lora_a.0", "lora_a.1", "lora_b.0", "lora_b.1"):
            if adapter >= 0:
                assert torch.equal(alone[name][adapter], together[name][adapter]), name
            others = [g for g in range(4) if g != adapter]
            assert not alone[name][others].any()


def test_order_of_others_does_not_matter(kernels):
    """Tokens sorted by adapter, each adapter's in their order: the same gradients, bit by bit."""
    inputs = MIXTURE.make(torch.float32, kernels.device)
    order = sorted(range(inputs.tokens), key=lambda t: inputs.ids[t])
    mixed, tidy = _run(kernels, inputs), _run(kernels, inputs.rows(order))
    for name in ("lora_a.0", "lora_a.1", "lora_b.0", "lora_b.1"):
        assert torch.equal(mixed[name], tidy[name]), name


@pytest.mark.parametrize("chunks", [1, 2])
def test_adapters_of_several_groups(chunks, kernels, monkeypatch):
    """One adapter of three chunks, one of two, one of one, one of none: partials, direct results and zeros."""
    rows = [1030, 520, 3]
    ids = tuple(g for g, count in enumerate(rows) for _ in range(count))
    case = MultiLoRACase("groups", (sum(rows),), 16, (16,), 4, (4,), base=False)
    inputs = case.make(torch.float32, kernels.device).with_ids(ids)
    for file in (grad_a, grad_b):
        default = file.default_config
        monkeypatch.setattr(
            file, "default_config", lambda p, d=default: replace(d(p), chunks=chunks, block_t=256)
        )
    wanted = ["lora_a.0", "lora_b.0"]
    results = _run(kernels, inputs, Trace("random"), wanted=wanted)
    assert_accurate(_shaped(results, inputs), inputs, [None])
    alone = _run(kernels, inputs.rows([t for t, g in enumerate(ids) if g == 1]), wanted=wanted)
    for name in wanted:
        assert torch.equal(alone[name][1], results[name][1])
        assert not results[name][3].any()


def test_rows_of_tiles_are_the_plans():
    assert TILES == (16, 64, CHUNK_ROWS)


@pytest.mark.parametrize("split", [True, False])
def test_in_place(split, kernels, monkeypatch):
    """The same bits in slices of a fused base; rows without an adapter are neither read nor written."""
    _schedules(monkeypatch, (16, 16, split), False)
    case = MultiLoRACase("fused", (23,), 300, QKV, 3, mixed_ranks=True, base_layout="fused")
    inputs = case.make(torch.bfloat16, kernels.device)
    x, a, b, base, *rest = multi_lora_oracle.operands(inputs)
    with kernels.context():
        y, s = multi_lora.multi_lora_fwd(x, a, b, base, *rest, 0.0, None, False)
    fused = torch.full((23, sum(QKV) + 3), 7.0, dtype=x.dtype, device=x.device)
    slices = fused[:, :-3].split(QKV, -1)
    null = [t for t, g in enumerate(inputs.ids) if not 0 <= g < 3]
    for part, given in zip(slices, base, strict=True):
        part.copy_(given)
        part[null] = float("nan")
    with kernels.context(Trace("random")):
        changed, again = multi_lora.multi_lora_fwd(x, a, b, slices, *rest, 0.0, None, True)
    assert torch.equal(s, again)
    assert (fused[:, -3:] == 7).all()
    live = [t for t in range(23) if t not in null]
    for part, result, expected in zip(slices, changed, y, strict=True):
        assert result.data_ptr() == part.data_ptr()
        assert torch.equal(part[live], expected[live])
        assert part[null].isnan().all()


PATTERNS = [("x",), ("row_scale",), ("lora_a.0", "lora_a.1"), ("lora_b.0", "lora_b.1"), ()]


@pytest.mark.parametrize("wanted", PATTERNS, ids=str)
def test_gradients_that_are_asked_for_alone(wanted, kernels):
    inputs = MIXTURE.make(torch.bfloat16, kernels.device)
    together = _run(kernels, inputs)
    results = _run(kernels, inputs, Trace("random"), wanted=wanted)
    assert set(results) == {"y", *wanted}
    for name, value in results.items():
        assert torch.equal(value, together[name]), name


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # by the interpreter
@pytest.mark.parametrize("infinite", ["x", "dy"])
@pytest.mark.parametrize("split", [True, False])
def test_infinity_stays_in_its_row_and_within_the_rank(infinite, split, kernels, monkeypatch):
    """Infinity times the zeros that pad a rank would be NaN."""
    _schedules(monkeypatch, (16, 16, split), split)
    case = MultiLoRACase(
        "infinite", (19,), 300, (300,), 4, (8,), mixed_ranks=True, row_scale="token"
    )
    inputs = case.make(torch.float32, kernels.device)
    row = inputs.ids.index(0)  # an adapter of half the rank
    tensor = getattr(inputs, infinite).clone()
    tensor[row] = float("inf")
    results = _run(kernels, replace(inputs, **{infinite: tensor}))
    others = [t for t in range(19) if t != row]
    for name in ("y", "x", "row_scale"):
        assert results[name][others].isfinite().all(), name
    rank = inputs.used_ranks[0][0]
    assert not results["lora_a.0"][0, rank:].any()
    assert not results["lora_b.0"][0, :, rank:].any()
    for name in ("lora_a.0", "lora_b.0"):
        assert results[name][1:].isfinite().all()


def test_fp32_products_are_tf32_where_torch_allows_it(kernels, tf32):
    inputs = MultiLoRACase("tf32", (16,), 64, (32,), base=False).make(torch.float32, kernels.device)
    exact = multi_lora_oracle.exact(inputs, [None])
    results = _run(kernels, inputs)
    for name in ("y", "x", "lora_a.0", "lora_b.0"):
        error = (results[name] - exact[name]).abs().max() / exact[name].abs().max()
        assert 1e-5 < error < 1e-2, name


def test_offsets_past_two_to_the_31(kernels, far_rows):
    """Strides of 2**30 elements: the third row, or adapter, begins where a 32-bit offset has turned negative."""
    case = MultiLoRACase("far", (3,), 40, (24,), 3, (4,), ids="distinct")
    inputs = case.make(torch.float16, kernels.device)

    def moved(name, t):
        if name.startswith("lora"):
            return far_rows(t.reshape(3, -1), name).unflatten(1, t.shape[1:])
        return far_rows(t, name) if name in ("x", "dy", "base.0") else t

    near = _run(kernels, inputs)
    for name, value in _run(kernels, inputs.map(moved)).items():
        assert torch.equal(value, near[name]), name


@pytest.mark.parametrize("order", ["reverse", "random"])
def test_order_of_programs_does_not_matter(order, several_programs, kernels):
    if kernels.device != "cpu":
        pytest.skip("a GPU chooses the order by itself")
    inputs = replace(BLOCKS, row_scale="token").make(torch.bfloat16)
    first, second = (_run(kernels, inputs, Trace(o, check=False)) for o in (None, order))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_a_plan_of_greater_capacity(kernels):
    """What is left over in the plan's arrays does nothing: stale tokens, tiles and chunks of an earlier batch."""
    case = MultiLoRACase("capacity", (21,), 40, **EVERYTHING)
    inputs = case.make(torch.bfloat16, kernels.device)
    plan = MultiAdapterPlan([1] * 150, 5, device=kernels.device).update_(list(inputs.ids))
    expected, results = _run(kernels, inputs), _run(kernels, replace(inputs, plan=plan), Trace())
    for name in expected:
        assert torch.equal(expected[name], results[name]), name
