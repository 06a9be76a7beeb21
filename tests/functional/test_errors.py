"""Every bad argument: an error that names it, says what came and what was expected. Nothing crashes."""

import math

import numpy
import pytest
import torch

from pelt_fast import functional as PF

OUT, IN, R = 6, 4, 2


def arguments(**changed):
    call = {
        "x": torch.randn(3, IN),
        "weight": torch.randn(OUT, IN),
        "bias": torch.randn(OUT),
        "lora_a": torch.randn(R, IN),
        "lora_b": torch.randn(OUT, R),
        "scaling": 0.5,
    }
    call.update(changed)
    return call


def two_adapters(**changed):
    a, b = torch.randn(R, IN), torch.randn(OUT, R)
    return arguments(**{"lora_a": [a, a], "lora_b": [b, b], "scaling": [1.0, 1.0], **changed})


META = torch.device("meta")
# (call, type of the error, what its message must hold: argument, what came, what was expected)
BAD = {
    "x_list": (arguments(x=[1.0]), TypeError, ["x", "list", "Tensor"]),
    "x_none": (arguments(x=None), TypeError, ["x", "NoneType", "Tensor"]),
    "x_scalar": (arguments(x=torch.tensor(1.0)), ValueError, ["x", "(..., in)"]),
    "x_int": (arguments(x=torch.ones(3, IN, dtype=torch.int64)), TypeError, ["x", "int64", "float32"]),
    "x_bool": (arguments(x=torch.ones(3, IN, dtype=torch.bool)), TypeError, ["x", "bool", "float32"]),
    "x_complex": (arguments(x=torch.ones(3, IN, dtype=torch.cfloat)), TypeError, ["x", "complex64"]),
    "x_fp8": (arguments(x=torch.ones(3, IN).to(torch.float8_e4m3fn)), TypeError, ["x", "float8"]),
    "x_features": (arguments(x=torch.randn(3, 5)), ValueError, ["weight", "(6, 4)", "5"]),
    "x_other_dtype": (arguments(x=torch.randn(3, IN).double()), TypeError, ["weight", "float32", "float64"]),
    "x_sparse": (arguments(x=torch.ones(3, IN).to_sparse()), TypeError, ["x", "torch.sparse_coo", "dense"]),
    "x_mkldnn": (arguments(x=torch.ones(3, IN).to_mkldnn()), TypeError, ["x", "mkldnn", "dense"]),
    "x_nested": (
        arguments(x=torch.nested.nested_tensor([torch.ones(3, IN)], layout=torch.jagged)),
        TypeError, ["x", "nested", "dense"]
    ),
    "weight_sparse": (
        arguments(weight=torch.ones(OUT, IN).to_sparse()), TypeError, ["weight", "torch.sparse_coo", "dense"]
    ),
    "bias_sparse": (arguments(bias=torch.ones(OUT).to_sparse()), TypeError, ["bias", "sparse_coo", "(out,)"]),
    "lora_a_sparse": (arguments(lora_a=torch.ones(R, IN).to_sparse()), TypeError, ["lora_a", "sparse_coo"]),
    "lora_b_sparse": (arguments(lora_b=torch.ones(OUT, R).to_sparse()), TypeError, ["lora_b", "sparse_coo"]),
    "weight_none": (arguments(weight=None), TypeError, ["weight", "NoneType", "(out, in)"]),
    "weight_1d": (arguments(weight=torch.randn(IN)), ValueError, ["weight", "(4,)", "(out, in)"]),
    "weight_3d": (arguments(weight=torch.randn(1, OUT, IN)), ValueError, ["weight", "(1, 6, 4)"]),
    "weight_swapped": (arguments(weight=torch.randn(IN, OUT)), ValueError, ["weight", "(4, 6)", "in = 4"]),
    "weight_no_rows": (arguments(weight=torch.randn(0, IN)), ValueError, ["weight", "(0, 4)"]),
    "weight_dtype": (arguments(weight=torch.randn(OUT, IN).half()), TypeError, ["weight", "float16", "float32"]),
    "weight_int8": (
        arguments(weight=torch.ones(OUT, IN, dtype=torch.int8)), TypeError, ["weight", "int8", "float32"]
    ),
    "weight_device": (arguments(weight=torch.randn(OUT, IN, device=META)), ValueError, ["weight", "meta", "cpu"]),
    "bias_shape": (arguments(bias=torch.randn(IN)), ValueError, ["bias", "(4,)", "(6,)"]),
    "bias_2d": (arguments(bias=torch.randn(1, OUT)), ValueError, ["bias", "(1, 6)", "(6,)"]),
    "bias_dtype": (arguments(bias=torch.randn(OUT).double()), TypeError, ["bias", "float64", "float32"]),
    "bias_device": (arguments(bias=torch.randn(OUT, device=META)), ValueError, ["bias", "meta", "cpu"]),
    "bias_number": (arguments(bias=0.5), TypeError, ["bias", "float", "(out,)"]),
    "lora_a_none": (arguments(lora_a=None), TypeError, ["lora_a", "NoneType", "Tensor"]),
    "lora_a_empty": (arguments(lora_a=[], lora_b=[], scaling=[]), ValueError, ["lora_a", "empty", "one adapter"]),
    "lora_a_features": (arguments(lora_a=torch.randn(R, 5)), ValueError, ["lora_a", "(2, 5)", "in = 4"]),
    "lora_a_1d": (arguments(lora_a=torch.randn(IN)), ValueError, ["lora_a", "(4,)", "(r, in)"]),
    "lora_a_rank_0": (
        arguments(lora_a=torch.randn(0, IN), lora_b=torch.randn(OUT, 0)), ValueError, ["lora_a", "rank 0", "1 to 256"]
    ),
    "lora_a_rank_257": (
        arguments(lora_a=torch.randn(257, IN), lora_b=torch.randn(OUT, 257)),
        ValueError,
        ["lora_a", "rank 257", "1 to 256"],
    ),
    "lora_a_bf16": (arguments(lora_a=torch.randn(R, IN).bfloat16()), TypeError, ["lora_a", "bfloat16", "float32"]),
    "lora_a_device": (arguments(lora_a=torch.randn(R, IN, device=META)), ValueError, ["lora_a", "meta", "cpu"]),
    "lora_b_rank": (arguments(lora_b=torch.randn(OUT, 3)), ValueError, ["lora_b", "(6, 3)", "(6, 2)"]),
    "lora_b_swapped": (arguments(lora_b=torch.randn(R, OUT)), ValueError, ["lora_b", "(2, 6)", "(6, 2)"]),
    "lora_b_out": (arguments(lora_b=torch.randn(5, R)), ValueError, ["lora_b", "(5, 2)", "(6, 2)"]),
    "lora_b_double": (arguments(lora_b=torch.randn(OUT, R).double()), TypeError, ["lora_b", "float64", "float32"]),
    "lora_b_fewer": (two_adapters(lora_b=[torch.randn(OUT, R)]), ValueError, ["lora_b", "1", "2"]),
    "lora_b_more": (arguments(lora_b=[torch.randn(OUT, R)] * 2), ValueError, ["lora_b", "2", "1"]),
    "lora_b_in_sequence": (
        two_adapters(lora_b=[torch.randn(OUT, R), torch.randn(OUT, 7)]), ValueError, ["lora_b[1]", "(6, 7)", "(6, 2)"]
    ),
    "lora_b_none_in_sequence": (
        two_adapters(lora_b=[torch.randn(OUT, R), None]), TypeError, ["lora_b[1]", "NoneType", "Tensor"]
    ),
    "lora_bias_shape": (arguments(lora_bias=torch.randn(5)), ValueError, ["lora_bias", "(5,)", "(6,)"]),
    "lora_bias_dtype": (arguments(lora_bias=torch.randn(OUT).half()), TypeError, ["lora_bias", "float16", "float32"]),
    "lora_bias_count": (two_adapters(lora_bias=[None]), ValueError, ["lora_bias", "1", "2"]),
    "lora_bias_lone_tensor": (two_adapters(lora_bias=torch.randn(OUT)), ValueError, ["lora_bias", "1", "2"]),
    "lora_bias_number": (arguments(lora_bias=0.5), TypeError, ["lora_bias", "float", "Tensor"]),
    "scaling_nan": (arguments(scaling=math.nan), ValueError, ["scaling", "nan", "finite"]),
    "scaling_inf": (arguments(scaling=-math.inf), ValueError, ["scaling", "-inf", "finite"]),
    "scaling_nan_in_sequence": (two_adapters(scaling=[1.0, math.nan]), ValueError, ["scaling", "nan", "finite"]),
    "scaling_count": (two_adapters(scaling=[1.0]), ValueError, ["scaling", "1", "2"]),
    "scaling_none": (arguments(scaling=None), TypeError, ["scaling", "NoneType", "number"]),
    "scaling_text": (arguments(scaling="1"), TypeError, ["scaling", "str", "number"]),
    "scaling_tensor": (arguments(scaling=torch.tensor(1.0)), TypeError, ["scaling", "Tensor", "number"]),
    "dropout_negative": (arguments(dropout_p=-0.1), ValueError, ["dropout_p", "-0.1", "between 0 and 1"]),
    "dropout_above_1": (arguments(dropout_p=1.5), ValueError, ["dropout_p", "1.5", "between 0 and 1"]),
    "dropout_nan": (arguments(dropout_p=math.nan), ValueError, ["dropout_p", "nan", "between 0 and 1"]),
    "dropout_count": (two_adapters(dropout_p=[0.1]), ValueError, ["dropout_p", "1", "2"]),
    "dropout_none": (arguments(dropout_p=None), TypeError, ["dropout_p", "NoneType", "number"]),
    "backend_unknown": (arguments(backend="cudnn"), ValueError, ["backend", "cudnn", "torch"]),
    "backend_type": (arguments(backend=3), (TypeError, ValueError), ["backend", "3", "torch"]),
}  # fmt: skip


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("bad", BAD)
def test_message_names_the_argument_what_came_and_what_was_expected(bad, training):
    call, error, words = BAD[bad]
    with pytest.raises(error) as raised:
        PF.lora_linear(**call, training=training)
    message = str(raised.value)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("bad", BAD)
def test_explain_checks_alike(bad):
    call, error, _ = BAD[bad]
    with pytest.raises(error):
        PF.explain("lora_linear", **call)


def test_the_arguments_that_the_bad_ones_start_from_are_good():
    assert PF.lora_linear(**arguments()).shape == (3, OUT)
    assert PF.lora_linear(**two_adapters()).shape == (3, OUT)


def test_fp32_adapters_want_a_half_precision_base():
    half = {k: v.half() if isinstance(v, torch.Tensor) else v for k, v in arguments().items()}
    half["lora_a"] = half["lora_a"].float()
    assert PF.lora_linear(**half).dtype == torch.float16
    half["lora_a"] = half["lora_a"].bfloat16()
    with pytest.raises(
        TypeError, match=r"lora_a has dtype torch.bfloat16; expected torch.float16.*float32"
    ):
        PF.lora_linear(**half)


def test_unknown_operation_of_explain():
    with pytest.raises(ValueError, match=r"'conv'.*lora_linear"):
        PF.explain("conv")


def test_a_number_of_numpy_is_a_number():
    call = arguments()
    plain = PF.lora_linear(**call)
    assert torch.equal(plain, PF.lora_linear(**{**call, "scaling": numpy.float32(0.5)}))


def test_a_number_too_large_for_a_float_is_named():
    with pytest.raises(ValueError, match="scaling is too large"):
        PF.lora_linear(**arguments(scaling=10**400))
