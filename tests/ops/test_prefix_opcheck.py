"""`torch.library.opcheck`, one graph under torch.compile, and which backend is chosen for attention over a prefix."""

import pytest
import torch

from pelt_fast import explain
from pelt_fast import functional as PF
from pelt_fast.testing.prefix_workloads import PrefixCase

OP = torch.ops.pelt_fast.prefix_attention.default
CHECKS = ("test_schema", "test_faketensor")


@pytest.mark.parametrize("mask", [None, "float", "causal"])
@pytest.mark.parametrize("layout", ["model", "dense"])
def test_opcheck(mask, layout, backend, device):
    inputs = PrefixCase("", 2, 3, 5, 6, 4, 8, mask, layout=layout).make(torch.float32, device)
    backend.require(inputs)
    options = inputs.options
    prefix = [t.expand(2, -1, -1, -1) for t in inputs.args[3:]]
    arguments = (*inputs.args[:3], *prefix, options.get("attn_mask"), mask == "causal", 0.5)
    torch.library.opcheck(OP, (*arguments, backend.name), test_utils=CHECKS)


@pytest.mark.parametrize("grad", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_one_graph(grad, device):
    inputs = PrefixCase("", 2, 2, 5, 6, 4, 8, "bool", gate=1).make(torch.float32, device)
    leaves = [t.detach().requires_grad_(grad) for t in inputs.args]

    def function(*tensors):
        return PF.prefix_attention(*tensors, **inputs.options)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), function(*leaves))


def test_the_fold_is_chosen_where_it_pays(backend, device):
    few = PrefixCase("", 1, 2, 8, 8, 4, 8).make(torch.float32, device)
    many = PrefixCase("", 4, 8, 64, 64, 4, 64).make(torch.float32, device)
    backend.require(few)
    if backend.name != "cpp" or device != "cpu":
        return

    def chosen(inputs, **options):
        return explain("prefix_attention", *inputs.args, **options).backends

    assert chosen(few) == ("torch",)
    assert chosen(few, backend="cpp") == ("cpp",)
    assert chosen(many) == ("cpp",)
    assert chosen(many, dropout_p=0.1, training=True) == ("torch",)
    many.prefix_key.requires_grad_()
    assert chosen(many) == ("torch",)
    assert "a gradient is needed" in str(explain("prefix_attention", *many.args))
    with torch.no_grad():
        assert chosen(many) == ("cpp",)
