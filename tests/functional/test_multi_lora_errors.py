"""Every bad argument: an error that names it, says what came and what was expected. Nothing crashes."""

import math

import pytest
import torch

from pelt_fast import MultiAdapterPlan
from pelt_fast import functional as PF

T, OUT, IN, R, L = 3, 6, 4, 2, 3
META = torch.device("meta")


def arguments(**changed):
    call = {
        "x": torch.randn(T, IN),
        "lora_a": torch.randn(L, R, IN),
        "lora_b": torch.randn(L, OUT, R),
        "plan": MultiAdapterPlan([0, -1, 2], L),
        "scaling": 0.5,
    }
    call.update(changed)
    return call


def two(**changed):
    a, b = torch.randn(L, R, IN), torch.randn(L, OUT, R)
    return arguments(**{"lora_a": [a, a], "lora_b": [b, b], **changed})


# (call, type of the error, what its message must hold: argument, what came, what was expected)
BAD = {
    "x_list": (arguments(x=[1.0]), TypeError, ["x", "list", "Tensor"]),
    "x_none": (arguments(x=None), TypeError, ["x", "NoneType", "Tensor"]),
    "x_scalar": (arguments(x=torch.tensor(1.0)), ValueError, ["x", "(..., in)"]),
    "x_int": (arguments(x=torch.ones(T, IN, dtype=torch.int64)), TypeError, ["x", "int64", "float32"]),
    "x_complex": (arguments(x=torch.ones(T, IN, dtype=torch.cfloat)), TypeError, ["x", "complex64"]),
    "x_fp8": (arguments(x=torch.ones(T, IN).to(torch.float8_e4m3fn)), TypeError, ["x", "float8"]),
    "x_sparse": (arguments(x=torch.ones(T, IN).to_sparse()), TypeError, ["x", "sparse_coo", "dense"]),
    "x_features": (arguments(x=torch.randn(T, 5)), ValueError, ["lora_a", "(3, 2, 4)", "in = 5"]),
    "x_tokens": (arguments(x=torch.randn(4, IN)), ValueError, ["plan", "3 tokens", "expected 4"]),
    "x_other_dtype": (arguments(x=torch.randn(T, IN).double()), TypeError, ["lora_a", "float32", "float64"]),
    "lora_a_none": (arguments(lora_a=None), TypeError, ["lora_a", "NoneType", "Tensor"]),
    "lora_a_empty": (arguments(lora_a=[], lora_b=[]), ValueError, ["lora_a", "empty", "one projection"]),
    "lora_a_2d": (arguments(lora_a=torch.randn(R, IN)), ValueError, ["lora_a", "(2, 4)", "(L, R, in)"]),
    "lora_a_no_adapter": (arguments(lora_a=torch.randn(0, R, IN)), ValueError, ["lora_a", "(0, 2, 4)", "L >= 1"]),
    "lora_a_features": (arguments(lora_a=torch.randn(L, R, 5)), ValueError, ["lora_a", "(3, 2, 5)", "in = 4"]),
    "no_features": (
        arguments(x=torch.randn(T, 0), lora_a=torch.randn(L, R, 0)), ValueError, ["lora_a", "(3, 2, 0)", "in >= 1"]
    ),
    "lora_a_rank_0": (
        arguments(lora_a=torch.randn(L, 0, IN), lora_b=torch.randn(L, OUT, 0)), ValueError, ["lora_a", "rank 0", "256"]
    ),
    "lora_a_rank_257": (
        arguments(lora_a=torch.randn(L, 257, IN), lora_b=torch.randn(L, OUT, 257)), ValueError, ["lora_a", "rank 257"]
    ),
    "lora_a_sparse": (arguments(lora_a=torch.ones(L, R, IN).to_sparse()), TypeError, ["lora_a", "sparse_coo"]),
    "lora_a_bf16": (arguments(lora_a=torch.randn(L, R, IN).bfloat16()), TypeError, ["lora_a", "bfloat16", "float32"]),
    "lora_a_device": (arguments(lora_a=torch.randn(L, R, IN, device=META)), ValueError, ["lora_a", "meta", "cpu"]),
    "lora_a_other_adapters": (
        two(lora_a=[torch.ones(L, R, IN), torch.ones(4, R, IN)], lora_b=[torch.ones(L, OUT, R), torch.ones(4, OUT, R)]),
        ValueError, ["lora_a[1]", "4 adapters", "expected 3"],
    ),
    "lora_a_none_in_sequence": (two(lora_a=[torch.randn(L, R, IN), None]), TypeError, ["lora_a[1]", "NoneType"]),
    "lora_b_none": (arguments(lora_b=None), TypeError, ["lora_b", "NoneType", "Tensor"]),
    "lora_b_rank": (arguments(lora_b=torch.randn(L, OUT, 3)), ValueError, ["lora_b", "(3, 6, 3)", "(3, out, 2)"]),
    "lora_b_swapped": (arguments(lora_b=torch.randn(L, R, OUT)), ValueError, ["lora_b", "(3, 2, 6)", "(3, out, 2)"]),
    "lora_b_adapters": (arguments(lora_b=torch.randn(4, OUT, R)), ValueError, ["lora_b", "(4, 6, 2)", "(3, out, 2)"]),
    "lora_b_no_out": (arguments(lora_b=torch.randn(L, 0, R)), ValueError, ["lora_b", "(3, 0, 2)", "out >= 1"]),
    "lora_b_double": (arguments(lora_b=torch.randn(L, OUT, R).double()), TypeError, ["lora_b", "float64", "float32"]),
    "lora_b_fewer": (two(lora_b=[torch.randn(L, OUT, R)]), ValueError, ["lora_b", "1", "expected 2"]),
    "lora_b_in_sequence": (
        two(lora_b=[torch.randn(L, OUT, R), torch.randn(L, OUT, 7)]), ValueError, ["lora_b[1]", "(3, 6, 7)"]
    ),
    "plan_none": (arguments(plan=None), TypeError, ["plan", "NoneType", "MultiAdapterPlan"]),
    "plan_ids": (arguments(plan=[0, 1, 2]), TypeError, ["plan", "list", "MultiAdapterPlan"]),
    "plan_tokens": (arguments(plan=MultiAdapterPlan([0, 1], L)), ValueError, ["plan", "2 tokens", "expected 3"]),
    "plan_adapters": (arguments(plan=MultiAdapterPlan([0, 1, 2], 4)), ValueError, ["plan", "4 adapters", "expected 3"]),
    "plan_device": (
        arguments(plan=MultiAdapterPlan([0, 1, 2], L, device=META)), ValueError, ["plan", "meta", "cpu"]
    ),
    "scaling_nan": (arguments(scaling=math.nan), ValueError, ["scaling", "nan", "finite"]),
    "scaling_inf": (two(scaling=[1.0, -math.inf]), ValueError, ["scaling[1]", "-inf", "finite"]),
    "scaling_none": (arguments(scaling=None), TypeError, ["scaling", "NoneType", "number"]),
    "scaling_text": (arguments(scaling="1"), TypeError, ["scaling", "str", "number"]),
    "scaling_bool": (arguments(scaling=True), TypeError, ["scaling", "bool", "number"]),
    "scaling_list": (arguments(scaling=[0.5]), TypeError, ["scaling", "list", "number"]),
    "scaling_shape": (arguments(scaling=torch.ones(4)), ValueError, ["scaling", "(4,)", "(3,)"]),
    "scaling_0d": (arguments(scaling=torch.tensor(1.0)), ValueError, ["scaling", "()", "(3,)"]),
    "scaling_int": (arguments(scaling=torch.ones(L, dtype=torch.int64)), TypeError, ["scaling", "int64", "floating"]),
    "scaling_device": (arguments(scaling=torch.ones(L, device=META)), ValueError, ["scaling", "meta", "cpu"]),
    "scaling_count": (two(scaling=[1.0]), ValueError, ["scaling", "1", "expected 2"]),
    "scaling_in_sequence": (two(scaling=[1.0, torch.ones(2)]), ValueError, ["scaling[1]", "(2,)", "(3,)"]),
    "scaling_trained": (
        arguments(scaling=torch.ones(L, requires_grad=True)), ValueError, ["scaling", "a gradient", "row_scale"]
    ),
    "ranks_number": (arguments(ranks=2), TypeError, ["ranks", "2", "integers"]),
    "ranks_floats": (arguments(ranks=[1.0, 2.0, 2.0]), TypeError, ["ranks", "1.0", "integers"]),
    "ranks_bools": (arguments(ranks=[True, True, True]), TypeError, ["ranks", "True", "integers"]),
    "ranks_count": (arguments(ranks=[1, 2]), ValueError, ["ranks", "(2,)", "(3,)"]),
    "ranks_above": (arguments(ranks=[1, 2, 3]), ValueError, ["ranks", "3", "0 to 2"]),
    "ranks_below": (arguments(ranks=[1, 2, -1]), ValueError, ["ranks", "-1", "0 to 2"]),
    "ranks_dtype": (arguments(ranks=torch.ones(L)), TypeError, ["ranks", "float32", "integers"]),
    "ranks_bool_tensor": (arguments(ranks=torch.ones(L).bool()), TypeError, ["ranks", "bool", "integers"]),
    "ranks_shape": (arguments(ranks=torch.ones(L, 1, dtype=torch.int32)), ValueError, ["ranks", "(3, 1)", "(3,)"]),
    "ranks_device": (
        arguments(ranks=torch.ones(L, dtype=torch.int32, device=META)), ValueError, ["ranks", "meta", "cpu"]
    ),
    "ranks_of_too_few": (two(ranks=[[1, 2, 2]]), ValueError, ["ranks", "1", "expected 2"]),
    "ranks_in_sequence": (two(ranks=[None, [1, 2, 9]]), ValueError, ["ranks[1]", "9", "0 to 2"]),
    "base_shape": (arguments(base_out=torch.randn(T, 5)), ValueError, ["base_out", "(3, 5)", "(3, 6)"]),
    "base_rows": (arguments(base_out=torch.randn(1, OUT)), ValueError, ["base_out", "(1, 6)", "(3, 6)"]),
    "base_dtype": (arguments(base_out=torch.randn(T, OUT).double()), TypeError, ["base_out", "float64", "float32"]),
    "base_device": (arguments(base_out=torch.randn(T, OUT, device=META)), ValueError, ["base_out", "meta", "cpu"]),
    "base_number": (arguments(base_out=0.5), TypeError, ["base_out", "float", "Tensor"]),
    "base_sparse": (arguments(base_out=torch.ones(T, OUT).to_sparse()), TypeError, ["base_out", "sparse_coo"]),
    "base_count": (two(base_out=[torch.randn(T, OUT)]), ValueError, ["base_out", "1", "expected 2"]),
    "base_none_in_sequence": (
        two(base_out=[torch.randn(T, OUT), None]), TypeError, ["base_out[1]", "NoneType", "Tensor"]
    ),
    "row_scale_number": (arguments(row_scale=0.5), TypeError, ["row_scale", "float", "Tensor"]),
    "row_scale_flat": (arguments(row_scale=torch.randn(T)), ValueError, ["row_scale", "(3,)", "(3, 1)"]),
    "row_scale_wide": (arguments(row_scale=torch.randn(T, OUT)), ValueError, ["row_scale", "(3, 6)", "(3, 1)"]),
    "row_scale_dims": (arguments(row_scale=torch.randn(1, T, 1)), ValueError, ["row_scale", "(1, 3, 1)", "(3, 1)"]),
    "row_scale_int": (arguments(row_scale=torch.ones(T, 1).int()), TypeError, ["row_scale", "int32", "float32"]),
    "row_scale_device": (arguments(row_scale=torch.randn(T, 1, device=META)), ValueError, ["row_scale", "meta", "cpu"]),
    "dropout_negative": (arguments(dropout_p=-0.1), ValueError, ["dropout_p", "-0.1", "between 0 and 1"]),
    "dropout_above_1": (arguments(dropout_p=1.5), ValueError, ["dropout_p", "1.5", "between 0 and 1"]),
    "dropout_nan": (arguments(dropout_p=math.nan), ValueError, ["dropout_p", "nan", "between 0 and 1"]),
    "dropout_none": (arguments(dropout_p=None), TypeError, ["dropout_p", "NoneType", "number"]),
    "backend_unknown": (arguments(backend="cudnn"), ValueError, ["backend", "cudnn", "torch"]),
    "backend_type": (arguments(backend=3), (TypeError, ValueError), ["backend", "3", "torch"]),
}  # fmt: skip


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("gradients", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("bad", BAD)
def test_message_names_the_argument_what_came_and_what_was_expected(bad, gradients, training):
    call, error, words = BAD[bad]
    if bad == "scaling_trained" and not gradients:
        pytest.skip("it gets no gradient then")
    with torch.set_grad_enabled(gradients), pytest.raises(error) as raised:
        PF.multi_lora(**call, training=training)
    message = str(raised.value)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("bad", BAD)
def test_explain_checks_alike(bad):
    call, error, _ = BAD[bad]
    with pytest.raises(error):
        PF.explain("multi_lora", **call)


def test_the_arguments_that_the_bad_ones_start_from_are_good():
    assert PF.multi_lora(**arguments()).shape == (T, OUT)
    assert [y.shape for y in PF.multi_lora(**two())] == [(T, OUT)] * 2


def test_a_bad_call_changes_nothing():
    """Nor does it in place: everything is checked first."""
    base = torch.zeros(T, OUT)
    with torch.no_grad(), pytest.raises(ValueError, match="ranks"):
        PF.multi_lora(**arguments(base_out=base, ranks=[9, 9, 9]))
    assert not base.any()
    assert base._version == 0


def test_fp32_adapters_want_a_half_precision_x():
    half = {k: v.half() if isinstance(v, torch.Tensor) else v for k, v in arguments().items()}
    half["lora_a"] = half["lora_a"].float()
    assert PF.multi_lora(**half).dtype == torch.float16
    half["lora_a"] = half["lora_a"].bfloat16()
    with pytest.raises(
        TypeError, match=r"lora_a has dtype torch.bfloat16; expected torch.float16.*float32"
    ):
        PF.multi_lora(**half)


def test_a_single_row_scale_serves_every_shape():
    for scale in (torch.ones(()), torch.ones(1), torch.ones(1, 1)):
        assert PF.multi_lora(**arguments(row_scale=scale)).shape == (T, OUT)
