"""Arguments of AdapterFusion that cannot be: the error names the argument, what came and what was expected."""

import pytest
import torch

import pelt_fast
from pelt_fast import functional as PF
from pelt_fast.testing.adapter_workloads import PFEIFFER
from pelt_fast.testing.fusion_workloads import FusionCase

INPUTS = FusionCase("", (5,), 24, (8, 3), **PFEIFFER).make(torch.float32)
POSITIONAL = ("x", "down_weights", "down_biases", "up_weights", "up_biases")


def call(**changed):
    arguments = dict(zip(POSITIONAL, INPUTS.args, strict=True)) | INPUTS.kwargs | changed
    return PF.adapter_fusion(**arguments)


def zeros(*shape, **more):
    return torch.zeros(shape, **more)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": 3}, TypeError, "x is a int"),
        ({"x": zeros()}, ValueError, "x has no dimension"),
        ({"x": zeros(5, 24, dtype=torch.int64)}, TypeError, "x has dtype torch.int64"),
        ({"x": zeros(5, 23)}, ValueError, r"residual\[0\] has shape \(5, 24\); expected \(5, 23\)"),
        ({"down_weights": zeros(8, 24)}, TypeError, "down_weights is a Tensor; expected a list"),
        ({"down_weights": []}, ValueError, "down_weights is empty"),
        ({"down_weights": [zeros(8, 24)]}, ValueError, "up_weights has 2 entries; expected 1"),
        (
            {"down_weights": [zeros(8, 24), zeros(3, 23)]},
            ValueError,
            r"down_weights\[1\] has shape \(3, 23\); expected \(m_n, d\) with d = 24",
        ),
        (
            {"down_weights": [zeros(8, 24), zeros(0, 24)]},
            ValueError,
            r"down_weights\[1\] has shape \(0, 24\)",
        ),
        (
            {"up_weights": [zeros(24, 8), zeros(24, 4)]},
            ValueError,
            r"up_weights\[1\] has shape \(24, 4\); expected \(d, m_n\) = \(24, 3\)",
        ),
        ({"up_biases": [zeros(24)]}, ValueError, "up_biases has 1 entries; expected 2"),
        ({"up_biases": [None, zeros(3)]}, ValueError, r"up_biases\[1\] has shape \(3,\)"),
        ({"down_biases": [None, 1.0]}, TypeError, r"down_biases\[1\] is a float"),
        ({"scaling": [1.0]}, ValueError, "scaling has 1 entries; expected 2"),
        ({"scaling": "2"}, TypeError, "scaling is a str"),
        ({"scaling": [1.0, float("nan")]}, ValueError, r"scaling\[1\] is nan"),
        ({"scaling": zeros(3)}, ValueError, r"scaling has shape \(3,\)"),
        ({"query_weight": zeros(24, 23)}, ValueError, r"query_weight has shape \(24, 23\)"),
        ({"key_weight": None}, ValueError, "key_bias is given without key_weight"),
        ({"key_bias": zeros(23)}, ValueError, r"key_bias has shape \(23,\); expected \(d,\)"),
        (
            {"value_weight": zeros(24, 24, dtype=torch.float64)},
            TypeError,
            "value_weight has dtype torch.float64; expected torch.float32",
        ),
        ({"query": zeros(4, 24)}, ValueError, r"query has shape \(4, 24\); expected \(5, 24\)"),
        ({"query": zeros(5, 24).half()}, TypeError, "query has dtype torch.float16"),
        ({"value_residual": 1}, TypeError, "value_residual is a int"),
        ({"residual": zeros(5, 23)}, ValueError, r"residual has shape \(5, 23\)"),
        ({"ln_weight": None}, ValueError, "ln_bias is given without ln_weight"),
        ({"eps": -1.0}, ValueError, "eps is -1.0"),
        ({"temperature": 0}, ValueError, "temperature is 0.0; expected a positive"),
        ({"temperature": float("inf")}, ValueError, "temperature is inf"),
        ({"temperature": "1"}, TypeError, "temperature is a str"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p is 1.5"),
        ({"activation": torch.relu}, TypeError, "activation is a builtin_function_or_method"),
        ({"activation": "softplus"}, ValueError, "activation='softplus' is not known"),
        ({"backend": "mkl"}, ValueError, "mkl"),
    ],
)
def test_argument_is_named(changed, error, message):
    with pytest.raises(error, match=message):
        call(**changed)


def test_what_cannot_run_says_why():
    with pytest.raises(pelt_fast.BackendUnavailable, match="has no Triton kernel"):
        call(backend="triton")
    with pytest.raises(pelt_fast.BackendUnavailable, match="no CUDA C\\+\\+ kernel"):
        call(backend="cuda")
