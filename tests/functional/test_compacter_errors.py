"""Bad arguments of `compacter` and `phm_linear`: the error names the argument, what came and what was expected."""

import re

import pytest
import torch

import pelt_fast
from pelt_fast import functional as PF
from pelt_fast.testing.compacter_workloads import HOULSBY, CompacterCase

INPUTS = CompacterCase("", (5,), 40, 12, **HOULSBY).make(torch.float32)


def zeros(*shape, **more):
    return torch.zeros(*shape, **more)


def changed(name, value):
    values = dict(zip(("x", "down", "down_bias", "up", "up_bias"), INPUTS.args, strict=True))
    options = dict(INPUTS.kwargs)
    if "." in name:
        weight, part = name.split(".")
        values[weight] = values[weight]._replace(**{part: value})
    else:
        (values if name in values else options)[name] = value
    return PF.compacter(**values, **options)


@pytest.mark.parametrize(
    ("name", "value", "error", "words"),
    [
        ("x", [1.0], TypeError, "x is a list; expected a torch.Tensor"),
        ("x", zeros(5, 36), ValueError, "residual[0] has shape (5, 40)"),
        ("down", zeros(12, 40), TypeError, "down is a Tensor; expected a functional.PHM"),
        ("down.rule", None, TypeError, "down.rule is a NoneType; expected a torch.Tensor"),
        ("down.rule", zeros(4, 4), ValueError, "down.rule has shape (4, 4); expected (n, n, n)"),
        ("down.rule", zeros(4, 4, 3), ValueError, "down.rule has shape (4, 4, 3)"),
        ("down.left", zeros(3, 10, 1), ValueError, "down.left has shape (3, 10, 1); expected n"),
        ("down.left", zeros(4, 9, 1), ValueError, "down takes 36 features; expected d = 40"),
        ("down.left", zeros(4, 0, 1), ValueError, "down.left has shape (4, 0, 1)"),
        ("down.right", zeros(4, 2, 3), ValueError, "down.right has shape (4, 2, 3)"),
        ("up.right", zeros(4, 1, 9), ValueError, "up goes from 12 to 36 features; expected 12 to"),
        ("up.rule", zeros(4, 4, 4).double(), TypeError, "up.rule has dtype torch.float64"),
        ("up.rule", zeros(4, 4, 4, device="meta"), ValueError, "up.rule is on meta; expected cpu"),
        ("up", PF.PHM(zeros(2, 2, 2), zeros(2, 6, 1), zeros(2, 1, 20)), ValueError, "a rule of 2"),
        ("down_bias", zeros(40), ValueError, "down_bias has shape (40,); expected (m,) = (12,)"),
        ("scaling", zeros(3), ValueError, "scaling has shape (3,)"),
        ("gate", zeros(4, 1), ValueError, "gate has shape (4, 1)"),
        ("activation", "selu", ValueError, "activation='selu' is not known"),
        ("dropout_p", 1.5, ValueError, "dropout_p is 1.5"),
        ("backend", "fast", ValueError, "backend='fast' is not known"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_argument(name, value, error, words):
    with pytest.raises(error, match=re.escape(words)):
        changed(name, value)


def test_a_backend_that_cannot_run():
    with pytest.raises(pelt_fast.BackendUnavailable, match="compacter_fwd"):
        changed("backend", "cuda")


def test_a_callable_is_composed_by_torch_alone():
    options = {**INPUTS.kwargs, "activation": torch.sin, "backend": "cpp"}
    with pytest.raises(pelt_fast.BackendUnavailable, match="callable"):
        PF.compacter(*INPUTS.args, **options)


def test_freed_memory_is_named(device):
    inputs = CompacterCase("", (5,), 40, 12).make(torch.float32, device)
    inputs.up_left.untyped_storage().resize_(0)
    if device != "cpu":
        pytest.skip("the check is of the C++ kernels")
    with pytest.raises(ValueError, match="up of shape"):
        PF.compacter(*inputs.args, **inputs.kwargs, backend="cpp")


def test_phm_linear():
    weight = INPUTS.args[1]
    with pytest.raises(TypeError, match=r"weight is a Tensor; expected a functional\.PHM"):
        PF.phm_linear(zeros(5, 40), zeros(12, 40))
    with pytest.raises(ValueError, match=re.escape("x has shape (5, 36); expected (..., 40)")):
        PF.phm_linear(zeros(5, 36), weight)
    with pytest.raises(ValueError, match=re.escape("bias has shape (40,)")):
        PF.phm_linear(zeros(5, 40), weight, zeros(40))


def test_explain_says_what_runs():
    explanation = pelt_fast.explain("compacter", *INPUTS.args, **INPUTS.kwargs, backend="torch")
    assert explanation.backends == ("torch", "torch")
    assert "compacter_fwd float32 T=5 d=40 m=12 n=4 r=1+1 gelu post_ln skip" in str(explanation)
