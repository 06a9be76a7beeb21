"""The Compacter operators: `torch.library.opcheck`, fakes against the real thing, `torch.compile(fullgraph=True)`."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from pelt_fast import functional as PF
from pelt_fast.ops import compacter_bwd, compacter_fwd
from pelt_fast.ops.compacter import GRADIENTS
from pelt_fast.testing import oracle
from pelt_fast.testing.compacter_workloads import EVERYTHING, HOULSBY, NAMES, CompacterCase

# Dynamo makes an instance of every autograd function that it traces, and torch warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

BLOCKS = {"bare": {"down_bias": False}, "houlsby": HOULSBY, "everything": EVERYTHING}


def forward_arguments(inputs, backend):
    _, _, *parameters = inputs.operands
    seed = torch.tensor([11], device=inputs.x.device) if inputs.dropout_p else None
    return (inputs.x, inputs.skip, *parameters, seed, *inputs.settings, backend.name)


def backward_arguments(inputs, backend, wanted=NAMES):
    _, q, *stats = compacter_fwd(*forward_arguments(inputs, backend))
    x, skip, *rest = forward_arguments(inputs, backend)
    alike = inputs.skip_in and inputs.residual_x == inputs.residual_skip
    needs = [
        name in wanted and operand is not None and not (alike and name == "skip")
        for name, operand in zip(NAMES, inputs.operands, strict=True)
    ]
    return (inputs.dy, x, skip, q, *stats, *rest[:-1], needs, rest[-1])


def test_names_are_those_of_the_operator():
    assert GRADIENTS == NAMES


@pytest.mark.parametrize("block", BLOCKS)
def test_opcheck(block, backend, device):
    inputs = CompacterCase("", (2, 5), 40, 12, **BLOCKS[block]).make(torch.float32, device)
    backend.require(inputs)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        compacter_fwd.overload, forward_arguments(inputs, backend), test_utils=checks
    )
    if backend.name == "reference":
        return  # it differentiates by autograd, which the modes of opcheck turn off
    for wanted in (NAMES, ("x", "up_rule"), ("down_right", "up_right", "gate"), ()):
        arguments = backward_arguments(inputs, backend, wanted)
        torch.library.opcheck(compacter_bwd.overload, arguments, test_utils=checks)


def test_every_check_of_opcheck(backend, device):
    """With AOT dispatch and symbolic shapes, which take longer: one call of each operator."""
    inputs = CompacterCase("", (2, 5), 40, 12, **EVERYTHING).make(torch.float32, device)
    backend.require(inputs)
    torch.library.opcheck(compacter_fwd.overload, forward_arguments(inputs, backend))
    if backend.name != "reference":
        torch.library.opcheck(compacter_bwd.overload, backward_arguments(inputs, backend))


@pytest.mark.parametrize("shape", [(0,), (1,), (), (2, 0, 3), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fakes_promise_what_the_operators_give(shape, dtype, backend, device):
    """Sizes, strides and dtypes: a compiled graph believes the fake."""
    case = CompacterCase("", shape, 40, 12, **EVERYTHING, x_layout="transposed", rank=2)
    inputs = case.make(dtype, device)
    backend.require(inputs)
    for operator, arguments in (
        (compacter_fwd, forward_arguments(inputs, backend)),
        (compacter_bwd, backward_arguments(inputs, backend)),
    ):
        with FakeTensorMode() as mode:
            fake = operator(
                *torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments)
            )
        real = operator(*arguments)
        flat_fake, flat_real = (torch.utils._pytree.tree_leaves(t) for t in (fake, real))
        for promised, given in zip(flat_fake, flat_real, strict=True):
            assert (promised.shape, promised.dtype) == (given.shape, given.dtype)
            pairs = zip(promised.stride(), given.stride(), given.shape, strict=True)
            assert all(a == b for a, b, size in pairs if size != 1)


def test_outputs_share_no_memory_with_inputs_or_each_other(backend, device):
    inputs = CompacterCase("", (2, 5), 40, 12, **EVERYTHING).make(torch.float32, device)
    backend.require(inputs)
    for operator, arguments in (
        (compacter_fwd, forward_arguments(inputs, backend)),
        (compacter_bwd, backward_arguments(inputs, backend)),
    ):
        outputs = torch.utils._pytree.tree_leaves(operator(*arguments))
        tensors = [t for t in (*arguments, *outputs) if isinstance(t, torch.Tensor) and t.numel()]
        storages = [t.untyped_storage().data_ptr() for t in tensors]
        assert len(set(storages)) == len(storages)


def test_one_graph_for_every_number_of_tokens(backend, device):
    if backend.name == "reference":
        pytest.skip("its graph is that of the operators, as every backend's")
    torch._dynamo.reset()
    make = CompacterCase("", (2, 5), 40, 12, **{**EVERYTHING, "gate": "sample"}).make
    backend.require(make(torch.float32, device))

    def plain(inputs):
        x, down, *rest = inputs.args
        up = rest[1]._replace(rule=down.rule)  # one rule for both, as models have it
        y = PF.compacter(x, down, rest[0], up, rest[2], **inputs.kwargs, backend=backend.name)
        return torch.relu(y)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(plain, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    wanted = [name for name in NAMES if name != "up_rule"]
    for tokens in (5, 9, 20):  # no size twice: the compiler takes equal sizes for one and the same
        inputs = CompacterCase("", (2, tokens), 40, 12, **{**EVERYTHING, "gate": "sample"}).make(
            torch.float32, device
        )
        results = []
        for function in (plain, compiled):
            torch.manual_seed(0)
            results.append(oracle.run(function, inputs, wanted))
        for name, value in results[0].items():
            assert torch.equal(value, results[1][name]), name
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1]
    torch._dynamo.reset()
