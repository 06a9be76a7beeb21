"""Every bad argument: an error that names it, says what came and what was expected. Nothing crashes or changes."""

import math

import numpy
import pytest
import torch

import pelt_fast
from pelt_fast import functional as PF

T, D, M = 3, 4, 2
META = torch.device("meta")


def arguments(**changed):
    call = {
        "x": torch.randn(T, D),
        "down_weight": torch.randn(M, D),
        "down_bias": torch.randn(M),
        "up_weight": torch.randn(D, M),
        "up_bias": torch.randn(D),
    }
    call.update(changed)
    return call


def with_layernorms(**changed):
    names = ("pre_ln_weight", "pre_ln_bias", "ln_weight", "ln_bias")
    return arguments(**{**{name: torch.randn(D) for name in names}, **changed})


def both(name, good):
    """What every tensor argument refuses."""
    low = good.flatten()[0]
    return {
        f"{name}_list": (arguments(**{name: [1.0]}), TypeError, [name, "list", "Tensor"]),
        f"{name}_device": (arguments(**{name: good.to(META)}), ValueError, [name, "meta", "cpu"]),
        f"{name}_double": (arguments(**{name: good.double()}), TypeError, [name, "float64", "float32"]),
        f"{name}_bf16": (arguments(**{name: good.bfloat16()}), TypeError, [name, "bfloat16", "float32"]),
        f"{name}_int": (arguments(**{name: good.long()}), TypeError, [name, "int64", "float32"]),
        f"{name}_sparse": (arguments(**{name: good.to_sparse()}), TypeError, [name, "sparse_coo", "dense"]),
        f"{name}_shape": (
            arguments(**{name: low.expand(9, 9, 9)}), ValueError, [name, "(9, 9, 9)", "expected"]
        ),
    }  # fmt: skip


# (call, type of the error, what its message must hold: argument, what came, what was expected)
BAD = {
    "x_list": (arguments(x=[1.0]), TypeError, ["x", "list", "Tensor"]),
    "x_none": (arguments(x=None), TypeError, ["x", "NoneType", "Tensor"]),
    "x_scalar": (arguments(x=torch.tensor(1.0)), ValueError, ["x", "(..., d)"]),
    "x_int": (arguments(x=torch.ones(T, D, dtype=torch.int64)), TypeError, ["x", "int64", "float32"]),
    "x_bool": (arguments(x=torch.ones(T, D, dtype=torch.bool)), TypeError, ["x", "bool", "float32"]),
    "x_complex": (arguments(x=torch.ones(T, D, dtype=torch.cfloat)), TypeError, ["x", "complex64"]),
    "x_fp8": (arguments(x=torch.ones(T, D).to(torch.float8_e4m3fn)), TypeError, ["x", "float8"]),
    "x_sparse": (arguments(x=torch.ones(T, D).to_sparse()), TypeError, ["x", "sparse_coo", "dense"]),
    "x_nested": (
        arguments(x=torch.nested.nested_tensor([torch.ones(T, D)], layout=torch.jagged)),
        TypeError, ["x", "nested", "dense"]
    ),
    "x_features": (arguments(x=torch.randn(T, 5)), ValueError, ["down_weight", "(2, 4)", "5"]),
    "x_no_features": (arguments(x=torch.randn(T, 0)), ValueError, ["down_weight", "(2, 4)", "d = 0"]),
    "down_weight_none": (arguments(down_weight=None), TypeError, ["down_weight", "NoneType", "(m, d)"]),
    "down_weight_swapped": (
        arguments(down_weight=torch.randn(D, M)), ValueError, ["down_weight", "(4, 2)", "(m, d)"]
    ),
    "down_weight_vector": (arguments(down_weight=torch.randn(D)), ValueError, ["down_weight", "(4,)", "(m, d)"]),
    "down_weight_empty": (arguments(down_weight=torch.randn(0, D)), ValueError, ["down_weight", "(0, 4)", "m >= 1"]),
    "up_weight_none": (arguments(up_weight=None), TypeError, ["up_weight", "NoneType", "(d, m)"]),
    "up_weight_swapped": (arguments(up_weight=torch.randn(M, D)), ValueError, ["up_weight", "(2, 4)", "(4, 2)"]),
    "up_weight_m": (arguments(up_weight=torch.randn(D, 3)), ValueError, ["up_weight", "(4, 3)", "(4, 2)"]),
    **both("down_weight", torch.ones(M, D)),
    **both("up_weight", torch.ones(D, M)),
    **both("down_bias", torch.ones(M)),
    **both("up_bias", torch.ones(D)),
    **both("pre_ln_weight", torch.ones(D)),
    **both("ln_weight", torch.ones(D)),
    **both("skip", torch.ones(T, D)),
    **both("gate", torch.ones(T, 1)),
    **both("scaling", torch.ones(1)),
    "down_bias_of_up": (arguments(down_bias=torch.randn(D)), ValueError, ["down_bias", "(4,)", "(m,) = (2,)"]),
    "up_bias_of_down": (arguments(up_bias=torch.randn(M)), ValueError, ["up_bias", "(2,)", "(d,) = (4,)"]),
    "up_bias_two_dims": (arguments(up_bias=torch.randn(1, D)), ValueError, ["up_bias", "(1, 4)", "(4,)"]),
    "pre_ln_bias_shape": (with_layernorms(pre_ln_bias=torch.randn(M)), ValueError, ["pre_ln_bias", "(2,)", "(4,)"]),
    "ln_bias_dtype": (with_layernorms(ln_bias=torch.randn(D).half()), TypeError, ["ln_bias", "float16", "float32"]),
    "pre_ln_bias_alone": (
        with_layernorms(pre_ln_weight=None), ValueError, ["pre_ln_bias", "without pre_ln_weight"]
    ),
    "ln_bias_alone": (with_layernorms(ln_weight=None), ValueError, ["ln_bias", "without ln_weight"]),
    "skip_rows": (arguments(skip=torch.randn(2, D)), ValueError, ["skip", "(2, 4)", "(3, 4)", "x's shape"]),
    "skip_broadcast": (arguments(skip=torch.randn(D)), ValueError, ["skip", "(4,)", "(3, 4)"]),
    "residual_number": (arguments(residual=1.0), TypeError, ["residual", "float", "Tensor"]),
    "residual_shape": (arguments(residual=torch.randn(1, D)), ValueError, ["residual", "(1, 4)", "(3, 4)"]),
    "residual_dtype": (arguments(residual=torch.randn(T, D).half()), TypeError, ["residual", "float16", "float32"]),
    "residual_in_sequence": (
        arguments(residual=[torch.randn(T, D), torch.randn(T, 1)]), ValueError, ["residual[1]", "(3, 1)", "(3, 4)"]
    ),
    "residual_none_in_sequence": (
        arguments(residual=[None, torch.randn(T, D)]), TypeError, ["residual[0]", "NoneType", "Tensor"]
    ),
    "residual_device": (arguments(residual=torch.ones(T, D, device=META)), ValueError, ["residual", "meta", "cpu"]),
    "gate_flat": (arguments(gate=torch.randn(T)), ValueError, ["gate", "(3,)", "(3, 1)"]),
    "gate_channels": (arguments(gate=torch.randn(T, D)), ValueError, ["gate", "(3, 4)", "(3, 1)"]),
    "gate_rows": (arguments(gate=torch.randn(2, 1)), ValueError, ["gate", "(2, 1)", "(3, 1)"]),
    "gate_dims": (arguments(gate=torch.randn(1, T, 1)), ValueError, ["gate", "(1, 3, 1)", "(3, 1)"]),
    "gate_number": (arguments(gate=0.5), TypeError, ["gate", "float", "Tensor"]),
    "activation_unknown": (arguments(activation="gelu2"), ValueError, ["activation", "gelu2", "relu", "gelu_new"]),
    "activation_none": (arguments(activation=None), TypeError, ["activation", "NoneType", "callable"]),
    "scaling_nan": (arguments(scaling=math.nan), ValueError, ["scaling", "nan", "finite"]),
    "scaling_inf": (arguments(scaling=-math.inf), ValueError, ["scaling", "-inf", "finite"]),
    "scaling_huge": (arguments(scaling=10**400), ValueError, ["scaling", "too large", "finite"]),
    "scaling_none": (arguments(scaling=None), TypeError, ["scaling", "NoneType", "number"]),
    "scaling_text": (arguments(scaling="learned"), TypeError, ["scaling", "str", "number"]),
    "scaling_bool": (arguments(scaling=True), TypeError, ["scaling", "bool", "number"]),
    "scaling_of_m": (arguments(scaling=torch.ones(M)), ValueError, ["scaling", "(2,)", "(1,)", "(4,)"]),
    "scaling_two_dims": (arguments(scaling=torch.ones(1, 1)), ValueError, ["scaling", "(1, 1)", "(1,)"]),
    "eps_negative": (arguments(eps=-1e-5), ValueError, ["eps", "-1e-05", "not negative"]),
    "eps_nan": (arguments(eps=math.nan), ValueError, ["eps", "nan", "finite"]),
    "eps_none": (arguments(eps=None), TypeError, ["eps", "NoneType", "number"]),
    "pre_ln_eps_inf": (arguments(pre_ln_eps=math.inf), ValueError, ["pre_ln_eps", "inf", "finite"]),
    "pre_ln_eps_tensor": (arguments(pre_ln_eps=torch.tensor(1.0)), TypeError, ["pre_ln_eps", "Tensor", "number"]),
    "dropout_negative": (arguments(dropout_p=-0.1), ValueError, ["dropout_p", "-0.1", "between 0 and 1"]),
    "dropout_above_1": (arguments(dropout_p=1.5), ValueError, ["dropout_p", "1.5", "between 0 and 1"]),
    "dropout_nan": (arguments(dropout_p=math.nan), ValueError, ["dropout_p", "nan", "between 0 and 1"]),
    "dropout_none": (arguments(dropout_p=None), TypeError, ["dropout_p", "NoneType", "number"]),
    "backend_unknown": (arguments(backend="cudnn"), ValueError, ["backend", "cudnn", "torch"]),
    "backend_type": (arguments(backend=3), (TypeError, ValueError), ["backend", "3", "torch"]),
}  # fmt: skip


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("bad", BAD)
def test_message_names_the_argument_what_came_and_what_was_expected(bad, training):
    call, error, words = BAD[bad]
    kept = {name: value.clone() for name, value in call.items() if dense(value)}
    generator = torch.get_rng_state()
    with pytest.raises(error) as raised:
        PF.bottleneck_adapter(**call, training=training)
    message = str(raised.value)
    assert all(word in message for word in words), message
    assert all(torch.equal(call[name], value) for name, value in kept.items())
    assert torch.equal(torch.get_rng_state(), generator)


def dense(value):
    plain = isinstance(value, torch.Tensor) and value.layout is torch.strided
    return plain and not value.is_nested and not value.is_meta and value.dtype.itemsize > 1


@pytest.mark.parametrize("bad", BAD)
def test_explain_checks_alike(bad):
    call, error, _ = BAD[bad]
    with pytest.raises(error):
        PF.explain("bottleneck_adapter", **call)


def test_the_arguments_that_the_bad_ones_start_from_are_good():
    assert PF.bottleneck_adapter(**arguments()).shape == (T, D)
    assert PF.bottleneck_adapter(**with_layernorms()).shape == (T, D)


def test_fp32_parameters_want_a_half_precision_x():
    half = {name: value.half() for name, value in with_layernorms().items()}
    half["up_weight"] = half["up_weight"].float()
    half["scaling"] = torch.ones(1)
    assert PF.bottleneck_adapter(**half).dtype == torch.float16
    half["up_weight"] = half["up_weight"].bfloat16()
    with pytest.raises(
        TypeError, match=r"up_weight has dtype torch.bfloat16; expected torch.float16.*float32"
    ):
        PF.bottleneck_adapter(**half)


@pytest.mark.parametrize("name", ["skip", "residual"])
def test_what_is_added_has_the_dtype_of_x(name):
    half = {name: value.half() for name, value in arguments().items()}
    with pytest.raises(TypeError, match=f"{name} has dtype torch.float32; expected torch.float16"):
        PF.bottleneck_adapter(**half, **{name: torch.randn(T, D)})


@pytest.mark.parametrize("named", ["cpp", "triton", "reference"])
def test_a_callable_runs_on_pytorch_alone(named):
    with pytest.raises(pelt_fast.BackendUnavailable, match=r"callable.*'torch'"):
        PF.bottleneck_adapter(**arguments(), activation=torch.sin, backend=named)
    with pelt_fast.use_backend(named), pytest.raises(pelt_fast.BackendUnavailable):
        PF.bottleneck_adapter(**arguments(), activation=torch.sin)
    PF.bottleneck_adapter(**arguments(), activation=torch.sin, backend="torch")


def test_numbers_of_numpy_are_numbers():
    call = arguments()
    plain = PF.bottleneck_adapter(**call, scaling=0.5)
    assert torch.equal(plain, PF.bottleneck_adapter(**call, scaling=numpy.float32(0.5)))
    assert torch.equal(plain, PF.bottleneck_adapter(**call, scaling=0.5, eps=numpy.float64(1e-5)))
