"""What AdapterFusion keeps between calls: the folded matrices of an ordinary call, the stacked adapters of training."""

from dataclasses import replace

import pytest
import torch

from pelt_fast import functional as PF
from pelt_fast.dispatch import cpp_extension
from pelt_fast.testing.adapter_workloads import PFEIFFER
from pelt_fast.testing.fusion_workloads import BLOCKS, EVERYTHING, STRIDES, FusionCase

pytestmark = pytest.mark.skipif(cpp_extension() is None, reason="the C++ extension is not built")

CASES = {
    case.name: replace(case, dropout_p=0.0)
    for case in (*BLOCKS, *STRIDES)
    if not case.value_residual
}
ATTENTION = ("query_weight", "query_bias", "key_weight", "key_bias", "value_weight")


class Spy:
    """The extension, counting the calls that it served as ordinary ones."""

    def __init__(self, extension):
        self._extension, self.served = extension, 0

    def __getattr__(self, name):
        return getattr(self._extension, name)

    def ordinary_fusion(self, *args):
        found = self._extension.ordinary_fusion(*args)
        self.served += found is not None
        return found


@pytest.fixture
def spy(monkeypatch):
    spy = Spy(cpp_extension())
    monkeypatch.setattr("pelt_fast.functional.ordinary.cpp_extension", lambda: spy)
    PF.clear_folded()
    return spy


def call(inputs, **changed):
    return PF.adapter_fusion(*inputs.args, **{**inputs.kwargs, **changed}, return_attention=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_an_ordinary_call_is_bitwise_as_the_long_way(name, dtype, spy, monkeypatch):
    inputs = CASES[name].make(dtype)
    first = call(inputs)
    assert spy.served == 0, "nothing is kept yet"
    second = call(inputs)
    assert spy.served == 1
    assert torch.equal(PF.adapter_fusion(*inputs.args, **inputs.kwargs), second[0])
    monkeypatch.setattr("pelt_fast.functional.ordinary.cpp_extension", lambda: None)
    for ours, long, made in zip(second, call(inputs), first, strict=True):
        assert torch.equal(ours, long)
        assert torch.equal(ours, made)
        assert (ours.dtype, ours.shape, ours.stride()) == (long.dtype, long.shape, long.stride())


def test_not_ordinary(spy):
    inputs = FusionCase("", (3, 13), 40, (8, 8), **EVERYTHING).make(torch.float32)
    call(inputs, training=False)
    call(inputs, training=False)
    assert spy.served == 1
    call(inputs, training=True)
    call(replace(inputs, x=inputs.x.clone().requires_grad_()), training=False)
    call(inputs, training=False, backend="torch")
    call(inputs, training=False, value_residual=inputs.x)
    call(inputs, training=False, residual=[inputs.x, inputs.x])
    call(inputs, training=False, residual=[inputs.x, inputs.skip.clone()])
    with torch.autocast("cpu", torch.bfloat16):
        call(inputs, training=False)
    inputs.up[0].requires_grad_()
    call(inputs, training=False)
    assert spy.served == 1


def test_dropout_takes_matrices_of_its_own(spy):
    """Dropped scores are zero, so that what all scores have in common counts."""
    inputs = FusionCase("", (3, 13), 40, (8, 8), **EVERYTHING).make(torch.float32)
    found = []
    for kept in (True, False):
        PF.clear_folded()
        if kept:
            call(inputs, training=False)
        torch.manual_seed(0)
        found.append(call(inputs, training=True)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"skip": torch.zeros(5, 23)}, ValueError, r"skip has shape \(5, 23\)"),
        ({"query": torch.zeros(5, 23)}, ValueError, r"query has shape \(5, 23\)"),
        ({"residual": [None]}, TypeError, "residual is a NoneType"),
        ({"ln_weight": None}, ValueError, "ln_bias is given without ln_weight"),
        ({"ln_weight": torch.zeros(23)}, ValueError, r"ln_weight has shape \(23,\)"),
        ({"temperature": 0.0}, ValueError, "temperature is 0.0"),
        ({"temperature": float("nan")}, ValueError, "temperature is nan"),
        ({"eps": -1.0}, ValueError, "eps is -1.0"),
        ({"dropout_p": 2.0}, ValueError, "dropout_p"),
        ({"dropout_p": "0"}, TypeError, "dropout_p"),
        ({"dropout_p": torch.zeros(2), "training": True}, TypeError, "dropout_p"),
        ({"activation": 3}, TypeError, "activation is a int"),
        ({"activation": "none"}, ValueError, "activation='none' is not known"),
        ({"scaling": [1.0]}, ValueError, "scaling has 1 entries"),
        ({"backend": "none"}, ValueError, "none"),
    ],
)
def test_errors_where_matrices_are_kept(changed, error, message, spy):
    inputs = FusionCase("", (5,), 24, (8, 3), **PFEIFFER).make(torch.float32)
    call(inputs)
    with pytest.raises(error, match=message):
        call(inputs, **changed)
    with pytest.raises(ValueError, match=r"\(5, 24\)"):
        call(replace(inputs, x=torch.zeros(5, 23)))
    assert spy.served == 0


def gradients(inputs):
    wanted = [t for name, t in inputs.named_tensors() if t.requires_grad]
    y, _ = call(inputs)
    return [y, *torch.autograd.grad(y, wanted, inputs.dy)]


def training(case, dtype=torch.float32):
    """The second stage: the attention trains, the adapters do not."""
    return case.make(dtype).map(
        lambda name, t: t.requires_grad_(name in ("x", *ATTENTION) and t is not None)
    )


CHANGES = {
    "in place": lambda t: t.detach().mul_(1.5),
    "data": lambda t: t.data.mul_(1.5),
    "exchanged": lambda t: setattr(t, "data", t.data * 1.5),
}


@pytest.mark.parametrize("name", ["pfeiffer", "few_tokens", "few_tokens_static"])
def test_stacked_adapters_are_kept_while_they_are_true(name):
    PF.clear_folded()
    inputs = training(CASES[name])
    first = gradients(inputs)
    kept = PF.folded_bytes()
    assert kept > 0
    for ours, theirs in zip(gradients(inputs), first, strict=True):
        assert torch.equal(ours, theirs)
    assert PF.folded_bytes() == kept
    for which in (inputs.down, inputs.down_bias, inputs.up, inputs.up_bias):
        for change in CHANGES.values():
            change(which[1])
            found = gradients(inputs)
            PF.clear_folded()
            fresh = gradients(inputs)
            assert not torch.equal(found[0], first[0])
            for ours, theirs in zip(found, fresh, strict=True):
                assert torch.equal(ours, theirs)
            first = found


def test_adapters_that_train_are_not_kept():
    inputs = (
        CASES["pfeiffer"].make(torch.float32).map(lambda name, t: t.requires_grad_(name != "dy"))
    )
    PF.clear_folded()
    gradients(inputs)
    assert PF.folded_bytes() == 0
    for t in (*inputs.down, *inputs.down_bias, *inputs.up, *inputs.up_bias):
        t.requires_grad_(False)
    gradients(inputs)
    assert PF.folded_bytes() > 0
    inputs.up[0].requires_grad_()
    gradients(inputs)
    assert PF.folded_bytes() == 0, "a step of an optimizer will follow"
