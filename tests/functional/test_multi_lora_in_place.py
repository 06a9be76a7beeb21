"""`base_out` is changed in place where gradients are off, and left alone where they are on."""

import math
from dataclasses import replace

import pytest
import torch

from pelt_fast import MultiAdapterPlan
from pelt_fast import functional as PF
from pelt_fast.testing import multi_lora_oracle as oracle
from pelt_fast.testing.multi_lora_tolerance import assert_accurate
from pelt_fast.testing.multi_lora_workloads import CASES, EVERYTHING, QKV, MultiLoRACase

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CASE = MultiLoRACase("", (4, 9), 24, **EVERYTHING)
SQUARE = MultiLoRACase("", (9,), 24, (24,), ids="mixed")


def call(inputs, backend, seed=3, **more):
    backend.require(inputs)
    torch.manual_seed(seed)
    return PF.multi_lora(*inputs.args, **{**inputs.kwargs, **more}, backend=backend.name)


def bits(t):
    """NaN, too, is equal to itself, and 0 is not -0."""
    return t.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        CASE,
        *(
            c
            for c in CASES
            if c.name
            in (
                *("no_tokens", "empty_batch", "one_dim", "odd", "qkv_fused_base", "ids_none"),
                *("base_sliced", "base_strided_rows", "base_transposed", "base_permuted"),
                *("many_tokens", "x_expanded", "mixed_ranks_129"),
            )
        ),
    ],
    ids=str,
)
def test_same_tensor_same_bits(case, dtype, backend, device):
    inputs = case.make(dtype, device)
    expected = call(inputs, backend)
    versions = [b._version for b in inputs.base]
    with torch.no_grad():
        y = call(inputs, backend)
    for found, base, version, value in zip(y, inputs.base, versions, expected, strict=True):
        assert found is base
        assert torch.equal(base, value)
        assert base._version > version or not base.numel()


def test_lone_tensor_is_returned_itself(backend, device):
    inputs = SQUARE.make(torch.float32, device)
    (a,), (b,), (scaling,), (base,) = inputs.lora_a, inputs.lora_b, inputs.args[4], inputs.base
    with torch.no_grad():
        y = PF.multi_lora(inputs.x, a, b, inputs.plan, scaling, base_out=base, backend=backend.name)
    assert y is base


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_slices_of_one_buffer_and_nothing_beside_them(dtype, backend, device):
    """A fused QKV projection, with columns between that are no one's."""
    inputs = MultiLoRACase("", (3, 7), 40, QKV, 4, mixed_ranks=True).make(dtype, device)
    widths = (2, QKV[0], 3, QKV[1], 1, QKV[2], 5)
    buffer = torch.randn(3, 7, sum(widths), device=device).to(dtype)
    before = buffer.clone()
    inputs = replace(inputs, base=buffer.split(widths, -1)[1::2])
    expected = call(inputs, backend)
    with torch.no_grad():
        call(inputs, backend)
    for i, (now, then) in enumerate(
        zip(buffer.split(widths, -1), before.split(widths, -1), strict=True)
    ):
        assert torch.equal(now, expected[i // 2] if i % 2 else then)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_an_adapter_keep_every_bit(dtype, backend, device):
    inputs = MultiLoRACase("", (8,), 24, (40, 7), row_scale="token").make(dtype, device)
    inputs = inputs.with_ids((0, -1, 2, 3, 1, -7, 0, 2**40))
    for b in inputs.base:
        b[1], b[3], b[5], b[7, ::2] = -0.0, math.nan, math.inf, -math.nan
    expected = [b.clone() for b in inputs.base]
    with torch.no_grad():
        y = call(inputs, backend)
    for found, value in zip(y, expected, strict=True):
        null = [1, 3, 5, 7]
        assert torch.equal(bits(found[null]), bits(value[null]))
        assert not torch.equal(found[[0, 2, 4, 6]], value[[0, 2, 4, 6]])


def overlaps():
    """Calls in which what is read lies where the result is written."""

    def square(inputs):
        x = inputs.x.clone()
        return replace(inputs, x=x, base=(x,))

    def view(inputs):
        buffer = torch.cat([inputs.x, inputs.base[0]], -1)
        return replace(inputs, x=buffer[:, :24], base=(buffer[:, 12:36],))

    def shifted_rows(inputs):
        buffer = torch.cat([inputs.x, inputs.x[:1]])
        return replace(inputs, x=buffer[1:], base=(buffer[:-1],))

    def row_scale(inputs):
        base = inputs.base[0].clone()
        return replace(inputs, row_scale=base[:, 3:4], base=(base,))

    def lora_b(inputs):
        base = inputs.base[0].clone()
        return replace(
            inputs, lora_b=(base[:, :24].reshape(-1)[: 3 * 24].view(3, 24, 1),), base=(base,)
        )

    def lora_a(inputs):
        base = inputs.base[0].clone()
        return replace(inputs, lora_a=(base[:3].view(3, 1, 24),), base=(base,))

    def base_of_another_call(inputs):
        """Reads beside what it writes: nothing is in the way."""
        buffer = torch.cat([inputs.x, inputs.base[0]], -1)
        return replace(inputs, x=buffer[:, :24], base=(buffer[:, 24:],))

    return [base_of_another_call, square, view, shifted_rows, row_scale, lora_a, lora_b]  # fmt: skip


@pytest.mark.parametrize("make", overlaps(), ids=lambda make: make.__name__)
def test_what_is_read_may_lie_where_the_result_is_written(make, backend, device):
    rank = 1 if make.__name__.startswith("lora") else 8
    inputs = replace(SQUARE, rank=(rank,), row_scale="token").make(torch.float32, device)
    inputs = make(inputs)
    expected = call(inputs, backend)
    with torch.no_grad():
        (y,) = call(inputs, backend)
    assert y is inputs.base[0]
    assert torch.equal(y, expected[0])


def test_two_projections_over_the_x_that_one_of_them_changes(backend, device):
    inputs = MultiLoRACase("", (9,), 24, (24, 40), row_scale="token").make(torch.float32, device)
    inputs = replace(inputs, base=(inputs.x, inputs.base[1]))
    expected = call(inputs, backend)
    with torch.no_grad():
        y = call(inputs, backend)
    assert all(torch.equal(a, b) for a, b in zip(y, expected, strict=True))


@pytest.mark.parametrize("offset", [0, 1, 23])
@pytest.mark.parametrize("shape", [(9,), (3, 3)], ids=str)
def test_outputs_that_overlap_are_refused(offset, shape, backend, device):
    inputs = MultiLoRACase("", shape, 24, (24, 24)).make(torch.float32, device)
    buffer = torch.randn(*shape, 60, device=device)
    bases = (buffer[..., :24], buffer[..., offset : offset + 24])
    with torch.no_grad(), pytest.raises(ValueError, match=r"base_out .*overlap"):
        call(replace(inputs, base=bases), backend)


def test_meta_tensors_have_no_memory_to_share():
    inputs = CASE.make(torch.bfloat16).map(lambda _, t: t.to("meta"))
    ids = torch.empty(inputs.tokens, dtype=torch.int64, device="meta")
    inputs = replace(inputs, plan=MultiAdapterPlan(ids, inputs.plan.num_adapters))
    with torch.no_grad():
        y = PF.multi_lora(*inputs.args, **inputs.kwargs)
    assert all(found is base for found, base in zip(y, inputs.base, strict=True))


def test_outputs_side_by_side_or_row_by_row_do_not_overlap(backend, device):
    inputs = MultiLoRACase("", (9,), 24, (24, 24)).make(torch.float32, device)
    side = torch.randn(9, 48, device=device)
    rows = torch.randn(18, 24, device=device)
    for bases in (side.split(24, -1), rows.split(9), (rows[::2], rows[1::2])):
        given = replace(inputs, base=tuple(bases))
        expected = call(given, backend)
        with torch.no_grad():
            y = call(given, backend)
        assert all(torch.equal(a, b) for a, b in zip(y, expected, strict=True))


def test_a_base_of_which_all_rows_are_one_is_refused(backend, device):
    inputs = SQUARE.make(torch.float32, device)
    base = torch.randn(24, device=device).expand(9, 24)
    expected = base.clone()
    with torch.no_grad(), pytest.raises(ValueError, match=r"base_out .* expanded"):
        call(replace(inputs, base=(base,)), backend)
    assert torch.equal(base, expected)


def test_with_gradients_on_the_base_stays(backend, device):
    """Whether anything requires one or not."""
    inputs = CASE.make(torch.float32, device)
    before = [b.clone() for b in inputs.base]
    versions = [b._version for b in inputs.base]
    for base, value, version, y in zip(
        inputs.base, before, versions, call(inputs, backend), strict=True
    ):
        assert y is not base
        assert torch.equal(base, value)
        assert base._version == version


def test_what_autograd_saved_of_the_base_is_missed(backend, device):
    """The version counter counts: a backward that needs the old value raises."""
    inputs = SQUARE.make(torch.float32, device)
    z = inputs.base[0].clone().requires_grad_()
    y = z.exp()  # saves its result
    with torch.no_grad():
        call(replace(inputs, base=(y,)), backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_leaf_may_be_changed_where_gradients_are_off(backend, device):
    inputs = SQUARE.make(torch.float32, device)
    leaf = inputs.base[0].clone().requires_grad_()
    expected = call(inputs, backend)[0]
    with torch.no_grad():
        (y,) = call(replace(inputs, base=(leaf,)), backend)
    assert y is leaf
    assert leaf.requires_grad
    assert torch.equal(leaf, expected)


@pytest.mark.parametrize("made", ["before", "within"])
def test_inference_mode(made, backend, device):
    inputs = CASE.make(torch.bfloat16, device)
    expected = call(inputs, backend)
    with torch.inference_mode():
        if made == "within":
            inputs = replace(inputs, base=tuple(b.clone() for b in inputs.base))
        y = call(inputs, backend)
    for found, base, value in zip(y, inputs.base, expected, strict=True):
        assert found is base
        assert torch.equal(base, value)


def test_a_tensor_of_inference_mode_outside_of_it(backend, device):
    """PyTorch forbids to change it."""
    inputs = SQUARE.make(torch.float32, device)
    with torch.inference_mode():
        base = inputs.base[0].clone()
    with torch.no_grad(), pytest.raises(RuntimeError, match="update to inference tensor"):
        call(replace(inputs, base=(base,)), backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_under_autocast_the_base_keeps_its_dtype(dtype, backend, device):
    inputs = CASE.make(torch.bfloat16, device)
    wide = replace(inputs, base=tuple(b.to(dtype) for b in inputs.base))
    with torch.autocast(device, torch.bfloat16):
        expected = call(wide, backend)
        with torch.no_grad():
            y = call(wide, backend)
    for found, base, value in zip(y, wide.base, expected, strict=True):
        assert found is base
        assert base.dtype == dtype
        torch.testing.assert_close(base, value.to(dtype), rtol=1e-6, atol=1e-6)


def test_many_calls_add_up(backend, device):
    """As layers that share an output do; every one of them against the oracle."""
    inputs = replace(SQUARE, ids="gaps", adapters=5).make(torch.float32, device)
    base = inputs.base[0].clone()
    for round_ in range(3):
        step = replace(inputs, base=(base.clone(),)).with_ids(
            tuple((g + round_) % 6 - 1 for g in inputs.ids)
        )
        with torch.no_grad():
            call(replace(step, base=(base,)), backend)
        assert_accurate({"y": base}, step, [None])


def test_a_plan_that_changes_between_calls(backend, device):
    inputs = SQUARE.make(torch.float32, device)
    plan = MultiAdapterPlan([-1] * 9, 3, device=device)
    for ids in ([0] * 9, [t % 5 - 1 for t in range(9)], [-1] * 9):
        plan.update_(ids)
        given = replace(inputs, plan=plan)
        fresh = inputs.with_ids(tuple(ids))
        with torch.no_grad():
            base = inputs.base[0].clone()
            call(replace(given, base=(base,)), backend)
        assert torch.equal(base, oracle.joined(call(fresh, backend)))


def _in_place(base, **changed):
    plan = MultiAdapterPlan([0, 1, -1], 2)
    call = {
        "x": torch.ones(3, 8),
        "lora_a": torch.ones(2, 2, 8),
        "lora_b": torch.ones(2, 4, 2),
        "plan": plan,
        "scaling": 1.0,
        "base_out": base,
    }
    return PF.multi_lora(**{**call, **changed})


def test_expanded_base_is_refused_before_any_is_changed():
    bases = (torch.zeros(3, 4), torch.zeros(1, 4).expand(3, 4))
    a, b = [torch.ones(2, 2, 8)] * 2, [torch.ones(2, 4, 2)] * 2
    with torch.no_grad(), pytest.raises(ValueError, match=r"base_out .* expanded"):
        _in_place(bases, lora_a=a, lora_b=b)
    assert not bases[0].any()


@pytest.mark.parametrize(
    ("shape", "stride", "apart"),
    [
        ((3, 4), (3, 1), False),
        ((3, 4), (1, 1), False),
        ((3, 4), (5, 1), True),
        ((3, 4), (1, 3), True),
    ],
    ids=str,
)
def test_a_base_strided_by_hand(shape, stride, apart):
    memory = torch.zeros(40)
    base = memory.as_strided(shape, stride)
    if apart:
        wanted = _in_place(torch.zeros(shape))
        with torch.no_grad():
            assert torch.equal(_in_place(base), wanted)
        return
    with torch.no_grad(), pytest.raises(ValueError, match=r"base_out .* strided by hand"):
        _in_place(base)
    assert not memory.any()


def test_negated_base():
    base = torch.complex(torch.zeros(3, 4), torch.ones(3, 4)).conj().imag  # -1, by a bit
    assert base.is_neg()
    wanted = _in_place(base.clone().resolve_neg())
    assert torch.equal(_in_place(base), wanted)
    with torch.no_grad():
        assert torch.equal(_in_place(base), wanted)


def test_compiled_without_gradients_it_changes_the_base_too():
    base = torch.zeros(3, 4)
    with torch.no_grad():
        wanted = _in_place(torch.zeros(3, 4))
        torch.compile(_in_place, backend="aot_eager")(base)
    assert torch.equal(base, wanted)


@pytest.mark.parametrize("name", ["scaling", "ranks", "row_scale"])
def test_freed_memory_of_what_is_cast(name):
    value = {
        "scaling": torch.ones(2, dtype=torch.float64),
        "ranks": torch.ones(2, dtype=torch.int64),
        "row_scale": torch.ones(3, 1, dtype=torch.float64),
    }[name]
    value.untyped_storage().resize_(0)
    with torch.no_grad(), pytest.raises(ValueError, match=f"{name} .* freed"):
        _in_place(torch.zeros(3, 4), **{name: value})


def test_scaling_beyond_the_accumulator():
    with pytest.raises(ValueError, match=r"scaling is 1e\+39"):
        _in_place(None, scaling=1e39)
