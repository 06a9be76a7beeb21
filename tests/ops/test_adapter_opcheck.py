"""`torch.library.opcheck` with optional arguments there and not there, and the fakes against the real thing."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pelt_fast.ops import bottleneck_adapter_bwd, bottleneck_adapter_fwd
from pelt_fast.ops.adapter import GRADIENTS
from pelt_fast.testing.adapter_workloads import (
    EVERYTHING,
    HOULSBY,
    NAMES,
    PFEIFFER,
    PRE_LN,
    T5,
    AdapterCase,
)

BY_AUTOGRAD = "the reference differentiates by autograd, which the modes of opcheck turn off"
CHECKS = ("test_schema", "test_faketensor")
BLOCKS = {
    "bare": {"down_bias": False, "up_bias": False},
    "t5": T5,
    "houlsby": HOULSBY,
    "pfeiffer": PFEIFFER,
    "pre_ln": {**PRE_LN, "ln_bias": False, "scale": "one"},
    "everything": EVERYTHING,
}


def forward_arguments(inputs, backend):
    _, _, *parameters = inputs.operands
    seed = torch.tensor([11], device=inputs.x.device) if inputs.dropout_p else None
    return (inputs.x, inputs.skip, *parameters, seed, *inputs.settings, backend.name)


def backward_arguments(inputs, backend, wanted=NAMES):
    _, q, *stats = bottleneck_adapter_fwd(*forward_arguments(inputs, backend))
    x, skip, *rest = forward_arguments(inputs, backend)
    alike = inputs.skip_in and inputs.residual_x == inputs.residual_skip
    needs = [
        name in wanted and operand is not None and not (alike and name == "skip")
        for name, operand in zip(NAMES, inputs.operands, strict=True)
    ]
    return (inputs.dy, x, skip, q, *stats, *rest[:-1], needs, rest[-1])


def strides(tensor):
    """Those that matter: of more than one element."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return [stride for size, stride in pairs if size != 1]


@pytest.fixture(params=BLOCKS)
def inputs(request, device):
    return AdapterCase("", (2, 5), 24, 8, **BLOCKS[request.param]).make(torch.float32, device)


def test_names_are_those_of_the_operator():
    assert GRADIENTS == NAMES


def test_forward(inputs, backend):
    backend.require(inputs)
    arguments = forward_arguments(inputs, backend)
    torch.library.opcheck(bottleneck_adapter_fwd.overload, arguments, test_utils=CHECKS)


@pytest.mark.parametrize(
    "wanted", [NAMES, ("x", "skip"), ("down", "up", "scale"), ("ln_weight", "gate"), ()], ids=str
)
def test_backward(wanted, inputs, backend):
    backend.require(inputs)
    if backend.name == "reference":
        pytest.skip(BY_AUTOGRAD)
    arguments = backward_arguments(inputs, backend, wanted)
    torch.library.opcheck(bottleneck_adapter_bwd.overload, arguments, test_utils=CHECKS)


def test_every_check_of_opcheck(backend, device):
    """With AOT dispatch and symbolic shapes, which take longer: one call of each operator."""
    inputs = AdapterCase("", (2, 5), 24, 8, **EVERYTHING).make(torch.float32, device)
    backend.require(inputs)
    torch.library.opcheck(bottleneck_adapter_fwd.overload, forward_arguments(inputs, backend))
    if backend.name != "reference":
        torch.library.opcheck(bottleneck_adapter_bwd.overload, backward_arguments(inputs, backend))


def _slow(layout, dtype, block):
    """Half of them: each pair of two of these is in the other half too."""
    return ((layout == "expanded") + (dtype == torch.bfloat16) + (block == "bare")) % 2


@pytest.mark.parametrize("shape", [(0,), (1,), (), (2, 3), (2, 0, 3), (2, 3, 2)], ids=str)
@pytest.mark.parametrize(
    ("layout", "dtype", "block"),
    [
        pytest.param(
            *chosen,
            id="-".join(map(str, chosen)),
            marks=[pytest.mark.slow] if _slow(*chosen) else [],
        )
        for chosen in product(
            ["transposed", "expanded"], [torch.float32, torch.bfloat16], ["everything", "bare"]
        )
    ],
)
def test_fakes_promise_what_the_operators_give(block, shape, layout, dtype, backend, device):
    """Sizes, strides and dtypes: a compiled graph believes the fake."""
    case = AdapterCase("", shape, 24, 8, **BLOCKS[block], x_layout=layout, dy_layout=layout)
    inputs = case.make(dtype, device)
    if case.scale and dtype == torch.bfloat16:
        inputs = replace(inputs, scale=inputs.scale.float())
    backend.require(inputs)
    forward = forward_arguments(inputs, backend)
    backward = backward_arguments(inputs, backend)
    for operator, arguments in (
        (bottleneck_adapter_fwd, forward),
        (bottleneck_adapter_bwd, backward),
    ):
        with FakeTensorMode() as mode:
            fake = operator(
                *torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments)
            )
        real = operator(*arguments)
        flat_fake, flat_real = (torch.utils._pytree.tree_leaves(t) for t in (fake, real))
        for promised, given in zip(flat_fake, flat_real, strict=True):
            assert promised.shape == given.shape
            assert strides(promised) == strides(given)
            assert promised.dtype == given.dtype


def test_outputs_share_no_memory_with_inputs_or_each_other(inputs, backend):
    backend.require(inputs)
    for operator, arguments in (
        (bottleneck_adapter_fwd, forward_arguments(inputs, backend)),
        (bottleneck_adapter_bwd, backward_arguments(inputs, backend)),
    ):
        outputs = torch.utils._pytree.tree_leaves(operator(*arguments))
        tensors = [t for t in (*arguments, *outputs) if isinstance(t, torch.Tensor) and t.numel()]
        storages = [t.untyped_storage().data_ptr() for t in tensors]
        assert len(set(storages)) == len(storages)
