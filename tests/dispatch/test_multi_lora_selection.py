"""Which backend runs batched multi-LoRA, and what `explain` says of it; `test_selection.py` has the rules."""

import importlib

import pytest
import torch

import pelt_fast
from pelt_fast import functional as PF
from pelt_fast.dispatch import registry
from pelt_fast.dispatch.registry import Backend
from pelt_fast.env import Env
from pelt_fast.testing.multi_lora_workloads import EVERYTHING, MultiLoRACase

# the package's attribute of that name is the function
select = importlib.import_module("pelt_fast.dispatch.select")


@pytest.fixture
def inputs():
    return MultiLoRACase("", (3,), 24, (40, 7)).make(torch.float32)


class Fake:
    """The module of a backend for multi-LoRA, with a fixed opinion on each pass."""

    def __init__(self, forward=(), backward=()):
        self.reasons = {"multi_lora_fwd": forward, "multi_lora_bwd": backward}
        self.problems = []

    def unsupported(self, problem):
        self.problems.append(problem)
        return list(self.reasons[problem.op])

    def priority(self, problem):
        return 100

    def multi_lora_fwd(self, x, lora_a, lora_b, base, *rest):
        if rest[-1]:
            return [b.fill_(7.0) for b in base], x.new_zeros(0)
        y = [x.new_full((x.shape[0], b.shape[1]), 7.0) for b in lora_b]
        return y, x.new_zeros((x.shape[0], sum(a.shape[1] for a in lora_a)))


@pytest.fixture
def as_cpp(monkeypatch):
    """Puts a fake in the place of the C++ backend's module for multi-LoRA, and no other."""
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
                found if (name, family) == ("cpp", "multi_lora") else real(name, family)
            ),
        )
        return fake

    return put


def explain(inputs, **more):
    return pelt_fast.explain(inputs.operation, *inputs.args, **{**inputs.kwargs, **more})


def test_what_is_explained_is_what_runs(inputs, as_cpp):
    as_cpp(Fake())
    assert explain(inputs).backends == ("cpp", "cpp")
    assert all((y == 7.0).all() for y in PF.multi_lora(*inputs.args, **inputs.kwargs))
    with torch.no_grad():
        y = PF.multi_lora(*inputs.args, **inputs.kwargs)
    assert all(found is base for found, base in zip(y, inputs.base, strict=True))
    assert all((base == 7.0).all() for base in inputs.base)
    assert explain(inputs, backend="torch").backends == ("torch", "torch")
    with pelt_fast.use_backend("reference"):
        assert explain(inputs).backends == ("reference", "reference")


def test_passes_are_chosen_apart(inputs, as_cpp):
    as_cpp(Fake(backward=["no backward"]))
    assert explain(inputs).backends == ("cpp", "torch")


def test_a_module_that_is_missing_says_so(inputs, as_cpp):
    as_cpp(None, "cannot be imported: no extension")
    assert explain(inputs).backends == ("torch", "torch")
    assert "cpp rejected: cannot be imported: no extension" in str(explain(inputs))
    with pytest.raises(pelt_fast.BackendUnavailable, match="no extension"):
        PF.multi_lora(*inputs.args, backend="cpp")


def test_problem_describes_the_call(as_cpp):
    fake = as_cpp(Fake())
    case = MultiLoRACase("", (2, 5), 24, **EVERYTHING, adapter_dtype=torch.float32)
    explain(case.make(torch.bfloat16))
    forward, backward = fake.problems[0], fake.problems[-1]
    assert (forward.op, backward.op) == ("multi_lora_fwd", "multi_lora_bwd")
    assert forward.family == "multi_lora"
    assert forward.dtype == torch.bfloat16
    assert set(forward.adapter_dtypes) == {torch.float32}
    assert (forward.tokens, forward.adapters, forward.in_features) == (10, 5, 24)
    assert forward.out_features == (40, 7, 24)
    assert forward.rank == 16
    assert forward.row_scale
    assert forward.dropout
    assert hash(forward) == hash(forward._replace())
    fake.problems.clear()
    explain(MultiLoRACase("", (3,), 24).make(torch.float32))
    assert not fake.problems[0].row_scale
    assert not fake.problems[0].dropout


def test_operators_describe_it_alike(as_cpp, inputs):
    """What runs was asked with the same words as what is explained: same choice, same memory of it."""
    fake = as_cpp(Fake())
    for case in (MultiLoRACase("", (2, 5), 24, **EVERYTHING), MultiLoRACase("", (), 24)):
        inputs = case.make(torch.float32)
        fake.problems.clear()
        explain(inputs)
        explained = set(fake.problems)
        select._chosen.clear()
        fake.problems.clear()
        with torch.no_grad():
            PF.multi_lora(*inputs.args, **inputs.kwargs)
        assert set(fake.problems) <= explained


def test_explanation_reads_like_a_sentence(inputs, as_cpp):
    as_cpp(Fake(["too small"], ["too small"]))
    text = str(explain(inputs, row_scale=torch.ones(3, 1), dropout_p=0.1, training=True))
    for part in (
        "multi_lora_fwd float32 T=3 L=3 in=24 out=40+7 r<=8 row_scale dropout on cpu",
        "multi_lora_bwd",
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
    leaves = inputs.map(lambda name, t: t.detach().requires_grad_(name.startswith("lora")))
    with pelt_fast.use_backend("reference"):
        y = PF.multi_lora(*leaves.args, **leaves.kwargs)
    with pelt_fast.use_backend("cuda"):  # would refuse
        sum(t.sum() for t in y).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("tokens", [0, 1, 33, 4096])
def test_a_backend_that_is_there_is_chosen_by_itself(tokens, dtype, monkeypatch):
    monkeypatch.setattr(select, "_chosen", {})
    monkeypatch.setattr(select, "env", Env())
    inputs = MultiLoRACase("", (tokens,), 64, (64, 8)).make(dtype)
    assert None not in explain(inputs).backends
    assert "reference" not in explain(inputs).backends
