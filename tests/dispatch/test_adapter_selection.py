"""Which backend runs an adapter, and what `explain` says of it; `test_selection.py` has the rules of selection."""

import importlib

import pytest
import torch

import pelt_fast
from pelt_fast import functional as PF
from pelt_fast.dispatch import registry
from pelt_fast.dispatch.registry import Backend
from pelt_fast.env import Env
from pelt_fast.testing.adapter_workloads import EVERYTHING, PFEIFFER, AdapterCase
from pelt_fast.testing.workloads import Case

# the package's attribute of that name is the function
select = importlib.import_module("pelt_fast.dispatch.select")


@pytest.fixture
def inputs():
    return AdapterCase("", (3,), 24, 8, **PFEIFFER).make(torch.float32)


class Fake:
    """The adapter's module of a backend, with a fixed opinion on each pass."""

    def __init__(self, forward=(), backward=()):
        self.reasons = {"bottleneck_adapter_fwd": forward, "bottleneck_adapter_bwd": backward}
        self.problems = []

    def unsupported(self, problem):
        self.problems.append(problem)
        return list(self.reasons[problem.op])

    def priority(self, problem):
        return 100

    def bottleneck_adapter_fwd(self, x, skip, down, *rest):
        return x.new_full(x.shape, 7.0), x.new_zeros(x.shape[0], down.shape[0]), None, None


@pytest.fixture
def as_cpp(monkeypatch):
    """Puts a fake in the place of the C++ backend's module for adapters, and no other."""
    monkeypatch.setattr(select, "_chosen", {})
    monkeypatch.setattr(select, "_logged", set())
    monkeypatch.setattr(select, "env", Env())
    real = registry.backend

    def put(fake, missing=None):
        # a fake has no extension that ordinary calls could take
        monkeypatch.setattr("pelt_fast.functional.ordinary.cpp_extension", lambda: None)
        found = Backend("cpp", None if missing else fake, missing)
        monkeypatch.setattr(
            select,
            "backend",
            lambda name, family: (
                found if (name, family) == ("cpp", "adapter") else real(name, family)
            ),
        )
        return fake

    return put


def explain(inputs, **more):
    return pelt_fast.explain(inputs.operation, *inputs.args, **{**inputs.kwargs, **more})


def test_what_is_explained_is_what_runs(inputs, as_cpp):
    as_cpp(Fake())
    assert explain(inputs).backends == ("cpp", "cpp")
    assert (PF.bottleneck_adapter(*inputs.args, **inputs.kwargs) == 7.0).all()
    assert explain(inputs, backend="torch").backends == ("torch", "torch")
    with pelt_fast.use_backend("reference"):
        assert explain(inputs).backends == ("reference", "reference")


def test_passes_are_chosen_apart(inputs, as_cpp):
    as_cpp(Fake(backward=["no backward"]))
    explanation = explain(inputs)
    assert explanation.backends == ("cpp", "torch")
    assert "no backward" in str(explanation)


def test_families_have_modules_of_their_own(inputs, as_cpp):
    """A backend may have one family and lack another."""
    as_cpp(None, missing="cannot be imported: not built")
    assert explain(inputs).backends == ("torch", "torch")
    with pytest.raises(pelt_fast.BackendUnavailable, match="not built"):
        PF.bottleneck_adapter(*inputs.args, **inputs.kwargs, backend="cpp")
    lora = Case("", (3,), 8, 6).make(torch.float32)
    assert "not built" not in str(PF.explain("lora_linear", *lora.args))


def test_the_problem_says_all_that_a_backend_may_refuse(as_cpp):
    fake = as_cpp(Fake())
    case = AdapterCase("", (2, 5), 24, 8, "silu", **EVERYTHING, param_dtype=torch.float32)
    explain(case.make(torch.bfloat16))
    forward = fake.problems[0]
    assert (forward.op, forward.dtype) == ("bottleneck_adapter_fwd", torch.bfloat16)
    assert set(forward.param_dtypes) == {torch.float32}
    assert (forward.tokens, forward.features, forward.bottleneck) == (10, 24, 8)
    assert forward.activation == "silu"
    assert forward.pre_ln
    assert forward.post_ln
    assert forward.skip
    assert forward.gate
    assert forward.dropout
    assert hash(forward) == hash(forward._replace())
    fake.problems.clear()
    explain(AdapterCase("", (3,), 24, 8).make(torch.float32))
    bare = fake.problems[0]
    assert not any((bare.pre_ln, bare.post_ln, bare.skip, bare.gate, bare.dropout))


def test_explanation_reads_like_a_sentence(inputs, as_cpp):
    as_cpp(Fake(["too small"], ["too small"]))
    text = str(explain(inputs, dropout_p=0.1, training=True))
    for part in (
        "bottleneck_adapter_fwd float32 T=3 d=24 m=8 gelu pre_ln post_ln skip dropout on cpu",
        "bottleneck_adapter_bwd",
        "-> torch",
        "cpp rejected: too small",
        "triton rejected: ",
    ):
        assert part in text
    assert "reference" not in text


def test_explanation_of_a_forced_backend_that_cannot(inputs, as_cpp):
    as_cpp(Fake(["too small"], ["too small"]))
    explanation = explain(inputs, backend="cpp")
    assert explanation.backends == (None, None)
    assert "asked for: cpp" in str(explanation)


def test_backward_runs_where_forward_ran(inputs):
    """Autograd's threads have contexts of their own, and a block may have ended before backward runs."""
    leaves = inputs.map(lambda name, t: t.detach().requires_grad_(name == "up"))
    with pelt_fast.use_backend("reference"):
        y = PF.bottleneck_adapter(*leaves.args, **leaves.kwargs)
    with pelt_fast.use_backend("cuda"):  # would refuse
        y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_backend_that_is_there_is_chosen_by_itself(dtype, monkeypatch):
    """No case of the families' common shapes falls through to nothing."""
    monkeypatch.setattr(select, "_chosen", {})
    monkeypatch.setattr(select, "env", Env())
    for activation in PF.ACTIVATIONS:
        inputs = AdapterCase("", (33,), 64, 16, activation, **PFEIFFER).make(dtype)
        assert None not in explain(inputs).backends


def test_unknown_operation_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'adapter'.*lora_linear.*bottleneck_adapter"):
        PF.explain("adapter")
