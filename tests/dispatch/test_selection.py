"""Which backend runs: who asks first, what a refusal says, what a fallback logs."""

import contextvars
import importlib
import logging
import threading
from dataclasses import replace

import pytest
import torch

import pelt_fast
from pelt_fast import functional as PF
from pelt_fast.dispatch import registry
from pelt_fast.dispatch.registry import Backend
from pelt_fast.env import Env
from pelt_fast.testing.workloads import Case

# the package's attribute of that name is the function
select = importlib.import_module("pelt_fast.dispatch.select")


@pytest.fixture
def inputs():
    return Case("", (3,), 8, 6).make(torch.float32)


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """No choice is remembered from one test to the next, nor from the environment of whoever runs them."""
    monkeypatch.setattr(select, "_chosen", {})
    monkeypatch.setattr(select, "_logged", set())
    monkeypatch.setattr(select, "env", Env())


class Fake:
    """A backend's module with a fixed opinion."""

    def __init__(self, reasons=(), priority=100):
        self.reasons, self.rank, self.calls = list(reasons), priority, 0

    def unsupported(self, problem):
        return self.reasons

    def priority(self, problem):
        return self.rank

    def lora_linear_fwd(self, x, weight, *rest):
        self.calls += 1
        return x.new_full((x.shape[0], weight.shape[0]), 7.0), x.new_zeros((x.shape[0], 8))


@pytest.fixture
def as_cpp(monkeypatch):
    """Puts a fake in the place of the C++ backend."""

    def put(fake, missing=None):
        # a fake has no extension that ordinary calls could take
        monkeypatch.setattr("pelt_fast.functional.ordinary.cpp_extension", lambda: None)
        found = Backend("cpp", None if missing else fake, missing)
        real = registry.backend
        monkeypatch.setattr(
            select, "backend", lambda name, family: found if name == "cpp" else real(name, family)
        )
        return fake

    return put


def chosen(inputs, **kwargs):
    return PF.explain("lora_linear", *inputs.args, **kwargs).backends[0]


def test_argument_beats_use_backend_beats_environment_beats_heuristic(inputs, monkeypatch, as_cpp):
    as_cpp(Fake())
    assert chosen(inputs) == "cpp"
    monkeypatch.setattr(select, "env", Env(backend="torch"))
    assert chosen(inputs) == "torch"
    with pelt_fast.use_backend("reference"):
        assert chosen(inputs) == "reference"
        assert chosen(inputs, backend="torch") == "torch"
        assert chosen(inputs, backend=None) == "reference"
    assert chosen(inputs) == "torch"


def test_what_is_explained_is_what_runs(inputs, as_cpp):
    fake = as_cpp(Fake())
    assert (PF.lora_linear(*inputs.args) == 7.0).all()
    with pelt_fast.use_backend("torch"):
        assert not (PF.lora_linear(*inputs.args) == 7.0).any()
    assert not (PF.lora_linear(*inputs.args, backend="torch") == 7.0).any()
    assert (PF.lora_linear(*inputs.args, backend="cpp") == 7.0).all()
    assert fake.calls == 2


def test_blocks_nest_and_end_with_an_exception(inputs, as_cpp):
    as_cpp(Fake())
    with pelt_fast.use_backend("torch"):
        with pelt_fast.use_backend("reference"):
            assert chosen(inputs) == "reference"
        assert chosen(inputs) == "torch"
    with pytest.raises(KeyError), pelt_fast.use_backend("torch"):
        raise KeyError
    assert chosen(inputs) == "cpp"


def test_use_backend_is_of_its_thread_and_context(inputs, as_cpp):
    as_cpp(Fake())
    seen = {}
    with pelt_fast.use_backend("torch"):
        context = contextvars.copy_context()
        thread = threading.Thread(target=lambda: seen.update(thread=chosen(inputs)))
        thread.start()
        thread.join()
        assert chosen(inputs) == "torch"
    assert seen["thread"] == "cpp"
    assert context.run(chosen, inputs) == "torch"


def test_backward_runs_where_forward_ran(inputs):
    """Autograd's threads have contexts of their own, and a block may have ended before backward runs."""
    leaves = inputs.map(lambda name, t: t.detach().requires_grad_(name.startswith("lora")))
    with pelt_fast.use_backend("reference"):
        y = PF.lora_linear(*leaves.args)
    with pelt_fast.use_backend("cuda"):  # would refuse
        y.sum().backward()


@pytest.mark.parametrize("how", ["argument", "block"])
def test_forced_and_unable_raises_with_every_reason(how, inputs, as_cpp):
    as_cpp(Fake(["too small", "wrong phase of the moon"]))
    with (
        pelt_fast.use_backend("cpp" if how == "block" else "auto"),
        pytest.raises(pelt_fast.BackendUnavailable) as raised,
    ):
        PF.lora_linear(*inputs.args, backend="cpp" if how == "argument" else None)
    message = str(raised.value)
    for part in ("'cpp'", "too small", "wrong phase of the moon", "T=3", "in=8", "out=6", "r=8"):
        assert part in message
    assert isinstance(raised.value, RuntimeError)


def test_forced_by_environment_and_unable_raises(inputs, as_cpp, monkeypatch):
    as_cpp(Fake(["too small"]))
    monkeypatch.setattr(select, "env", Env(backend="cpp"))
    with pytest.raises(pelt_fast.BackendUnavailable, match="too small"):
        PF.lora_linear(*inputs.args)


def test_forced_and_not_importable_raises_with_the_import_error(inputs, as_cpp):
    as_cpp(None, missing="cannot be imported: no compiler was there")
    with pytest.raises(pelt_fast.BackendUnavailable, match="no compiler was there"):
        PF.lora_linear(*inputs.args, backend="cpp")


def test_automatic_falls_back_and_logs_each_reason_once(inputs, as_cpp, caplog):
    as_cpp(Fake(["too small"]))
    caplog.set_level(logging.INFO, logger="pelt_fast")
    for tokens in (3, 4, 3, 5):
        shape = Case("", (tokens,), 8, 6).make(torch.float32)
        torch.testing.assert_close(
            PF.lora_linear(*shape.args), PF.lora_linear(*shape.args, backend="torch")
        )
    messages = [
        record.getMessage() for record in caplog.records if "too small" in record.getMessage()
    ]
    assert len(messages) == 1
    assert "lora_linear_fwd" in messages[0]
    assert "cpp" in messages[0]


def test_a_backend_for_other_devices_is_no_fallback(inputs, as_cpp, caplog):
    """Triton on a CPU tensor is nothing to be told about."""
    caplog.set_level(logging.INFO, logger="pelt_fast")
    PF.lora_linear(*inputs.args)
    assert not [r for r in caplog.records if "triton" in r.getMessage()]


def test_strict_forbids_the_fallback(inputs, as_cpp, monkeypatch):
    as_cpp(Fake(["too small"]))
    monkeypatch.setattr(select, "env", Env(strict=True))
    with pytest.raises(pelt_fast.BackendUnavailable, match=r"(?s)PELT_FAST_STRICT.*too small"):
        PF.lora_linear(*inputs.args)
    PF.lora_linear(*inputs.args, backend="torch")  # asked for by name: nothing falls back


def test_strict_lets_the_preferred_backend_run(inputs, as_cpp, monkeypatch):
    as_cpp(Fake())
    monkeypatch.setattr(select, "env", Env(strict=True))
    assert (PF.lora_linear(*inputs.args) == 7.0).all()


def test_torch_may_win(inputs, as_cpp):
    as_cpp(Fake(priority=1))
    assert chosen(inputs) == "torch"


def test_reference_is_never_chosen(inputs, as_cpp):
    as_cpp(Fake(["no"]))
    explanation = PF.explain("lora_linear", *inputs.args)
    assert "reference" not in str(explanation)


def test_an_error_in_unsupported_is_a_bug_and_not_a_reason(inputs, as_cpp):
    class Broken(Fake):
        def unsupported(self, problem):
            raise ZeroDivisionError

    as_cpp(Broken())
    with pytest.raises(ZeroDivisionError):
        PF.lora_linear(*inputs.args)


def test_memory_of_choices_is_bounded(inputs, as_cpp, monkeypatch):
    as_cpp(Fake())
    monkeypatch.setattr(select, "_CACHE_LIMIT", 8)
    for tokens in range(1, 40):
        PF.lora_linear(*Case("", (tokens,), 8, 6).make(torch.float32).args)
    assert len(select._chosen) <= 8


def test_explanation_reads_like_a_sentence(inputs, as_cpp):
    as_cpp(Fake(["too small"]))
    text = str(pelt_fast.explain("lora_linear", *inputs.args, dropout_p=0.1, training=True))
    for part in (
        "lora_linear_fwd float32 T=3 in=8 out=6 r=8 dropout on cpu",
        "lora_linear_bwd",
        "-> torch",
        "cpp rejected: too small",
        "triton rejected: ",
    ):
        assert part in text


def test_explanation_of_a_forced_backend_that_cannot(inputs, as_cpp):
    as_cpp(Fake(["too small"]))
    explanation = pelt_fast.explain("lora_linear", *inputs.args, backend="cpp")
    assert explanation.backends == (None, None)
    assert "asked for: cpp" in str(explanation)
    assert "too small" in str(explanation)


def test_explain_counts_tokens_of_every_dimension(inputs):
    x = torch.randn(2, 3, 4, 8)
    text = str(pelt_fast.explain("lora_linear", x, *inputs.args[1:]))
    assert "T=24" in text


@pytest.mark.parametrize("name", ["cudnn", "", "Torch"])
def test_unknown_names_are_refused_at_once(name, inputs):
    with pytest.raises(ValueError, match=r"auto.*torch.*cpp"), pelt_fast.use_backend(name):
        pass
    with pytest.raises(ValueError, match=r"auto.*torch.*cpp"):
        PF.lora_linear(*inputs.args, backend=name)


def test_cuda_says_what_there_is_instead(inputs):
    with pytest.raises(pelt_fast.BackendUnavailable, match="triton"):
        PF.lora_linear(*inputs.args, backend="cuda")


def test_a_trainable_weight_is_not_packed(inputs):
    trainable = replace(inputs, weight=inputs.weight.clone().requires_grad_())
    assert chosen(trainable) == "torch"


def test_auto_by_name_overrides_what_is_asked_for_outside(inputs, monkeypatch):
    with pelt_fast.use_backend("reference"):
        assert chosen(inputs) == "reference"
        assert chosen(inputs, backend="auto") != "reference"
    monkeypatch.setattr(select, "env", Env(backend="reference"))
    assert chosen(inputs) == "reference"
    with pelt_fast.use_backend("auto"):
        assert chosen(inputs) != "reference"
