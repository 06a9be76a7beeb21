"""`torch.library.opcheck` with every pattern of optional arguments, and the fakes against the real thing."""

from itertools import product

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pelt_fast.ops import lora_linear_bwd, lora_linear_fwd
from pelt_fast.testing.workloads import Adapter, Case

CHECKS = ("test_schema", "test_faketensor")
OPTIONS = list(product([False, True], repeat=3))


def forward_arguments(inputs, backend, bias=True, lora_bias=True, dropout=True):
    n = len(inputs.lora_a)
    return (
        inputs.x,
        inputs.weight,
        inputs.bias if bias else None,
        list(inputs.lora_a),
        list(inputs.lora_b),
        list(inputs.lora_bias) if lora_bias else [None] * n,
        list(inputs.scaling),
        [0.3] * n if dropout else [0.0] * n,
        torch.tensor([11], device=inputs.x.device) if dropout else None,
        backend.name,
    )


def backward_arguments(inputs, backend, need_a, need_b, need_rest, dropout=True):
    n = len(inputs.lora_a)
    _, s = lora_linear_fwd(*forward_arguments(inputs, backend, dropout=dropout))
    return (
        inputs.dy,
        inputs.x if need_a else None,
        inputs.weight,
        list(inputs.lora_a),
        list(inputs.lora_b),
        s if need_b else None,
        list(inputs.scaling),
        [0.3] * n if dropout else [0.0] * n,
        torch.tensor([11], device=inputs.x.device) if dropout else None,
        need_rest,
        need_rest,
        [need_a] * n,
        [need_b] * n,
        [need_rest] * n,
        backend.name,
    )


@pytest.fixture
def inputs(device):
    return Case("", (2, 5), 24, 40, (Adapter(3, bias=True), Adapter(8, 2.0))).make(
        torch.float32, device
    )


@pytest.mark.parametrize(("bias", "lora_bias", "dropout"), OPTIONS)
def test_forward(bias, lora_bias, dropout, inputs, backend):
    backend.require(inputs)
    arguments = forward_arguments(inputs, backend, bias, lora_bias, dropout)
    torch.library.opcheck(lora_linear_fwd.overload, arguments, test_utils=CHECKS)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize(("need_a", "need_b", "need_rest"), OPTIONS)
def test_backward(need_a, need_b, need_rest, dropout, inputs, backend):
    backend.require(inputs)
    arguments = backward_arguments(inputs, backend, need_a, need_b, need_rest, dropout)
    torch.library.opcheck(lora_linear_bwd.overload, arguments, test_utils=CHECKS)


def test_every_check_of_opcheck(inputs, backend):
    """With AOT dispatch and symbolic shapes, which take longer: one call of each operator."""
    backend.require(inputs)
    torch.library.opcheck(lora_linear_fwd.overload, forward_arguments(inputs, backend))
    torch.library.opcheck(
        lora_linear_bwd.overload, backward_arguments(inputs, backend, True, True, True)
    )


@pytest.mark.parametrize("shape", [(0,), (1,), (), (2, 3), (2, 0, 3), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("x_layout", ["contiguous", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fakes_promise_what_the_operators_give(shape, x_layout, dtype, backend, device):
    """Sizes, strides and dtypes: a compiled graph believes the fake."""
    inputs = Case("", shape, 24, 40, (Adapter(3, bias=True), Adapter(8)), x_layout=x_layout).make(
        dtype, device
    )
    backend.require(inputs)
    forward = forward_arguments(inputs, backend)
    backward = backward_arguments(inputs, backend, True, True, True)
    for operator, arguments in ((lora_linear_fwd, forward), (lora_linear_bwd, backward)):
        with FakeTensorMode() as mode:
            fake = operator(
                *torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments)
            )
        real = operator(*arguments)
        flat_fake, flat_real = (torch.utils._pytree.tree_leaves(t) for t in (fake, real))
        for promised, given in zip(flat_fake, flat_real, strict=True):
            assert promised.shape == given.shape
            assert promised.stride() == given.stride()
            assert promised.dtype == given.dtype


def test_outputs_share_no_memory_with_inputs_or_each_other(inputs, backend):
    backend.require(inputs)
    arguments = backward_arguments(inputs, backend, True, True, True)
    outputs = torch.utils._pytree.tree_leaves(lora_linear_bwd(*arguments))
    tensors = [t for t in torch.utils._pytree.tree_leaves(arguments) if isinstance(t, torch.Tensor)]
    storages = [t.untyped_storage().data_ptr() for t in (*tensors, *outputs)]
    assert len(set(storages)) == len(storages)
