"""opcheck of the operators of diff pruning and masking, their fakes, and `torch.compile`."""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pelt_fast import functional as PF
from pelt_fast.ops import diff_pruning_bwd, diff_pruning_fwd, masking_bwd, masking_fwd
from pelt_fast.testing.delta import DiffInputs

# Dynamo makes an instance of every autograd function that it traces, and torch warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
BOOLS = [False, True]
BY_AUTOGRAD = "the reference differentiates by autograd, which the modes of opcheck turn off"


def calls(backend, options=True, needs=True, transposed=False):
    inputs = DiffInputs.make((5, 9), torch.bfloat16, delta_dtype=torch.float32)
    tensors = [inputs.diff, inputs.log_alpha, inputs.weight]
    if transposed:
        tensors = [t.T.contiguous().T for t in tensors]
    diff, _, weight = tensors
    extra = (inputs.scale, inputs.seed) if options else (None, None)
    grads = (inputs.dmade, inputs.dcount) if options else (inputs.dmade, None)
    rest = (-0.1, 1.1)
    dtype = torch.float32
    needed = (needs,) * 3
    return (
        (diff_pruning_fwd, (*tensors, *extra, *rest, dtype, backend.name)),
        (
            diff_pruning_bwd,
            (*tensors, *extra, *grads, *rest, needs, needs, options, True, dtype, backend.name),
        ),
        (masking_fwd, (weight, diff, 0.1, dtype, backend.name)),
        (masking_bwd, (weight, diff, inputs.dmade, 0.1, *needed, dtype, backend.name)),
    )


@pytest.mark.parametrize(("options", "needs"), list(itertools.product(BOOLS, BOOLS)))
def test_opcheck(options, needs, backend):
    if backend.name == "reference":
        pytest.skip(BY_AUTOGRAD)
    for operator, arguments in calls(backend, options, needs):
        torch.library.opcheck(
            operator.overload, arguments, test_utils=("test_schema", "test_faketensor")
        )


def test_every_check_of_opcheck(backend):
    for operator, arguments in calls(backend):
        if backend.name == "reference" and operator in (diff_pruning_bwd, masking_bwd):
            continue  # BY_AUTOGRAD
        torch.library.opcheck(operator.overload, arguments)


@pytest.mark.parametrize("transposed", BOOLS)
def test_fakes_promise_what_the_operators_give(transposed, backend):
    for operator, arguments in calls(backend, transposed=transposed):
        with FakeTensorMode() as mode:
            move = mode.from_tensor
            fake = operator(*torch.utils._pytree.tree_map_only(torch.Tensor, move, arguments))
        real = operator(*arguments)
        pairs = zip(*map(torch.utils._pytree.tree_leaves, (fake, real)), strict=True)
        for promised, given in pairs:
            assert promised.shape == given.shape
            assert promised.stride() == given.stride()
            assert promised.dtype == given.dtype


def test_compiled_in_one_graph(backend):
    if backend.name == "reference":
        pytest.skip("the graph is the same as the others'")
    torch._dynamo.reset()
    inputs = DiffInputs.make((8, 6), torch.float32)
    weight, diff, gates = inputs.weight, inputs.diff, inputs.log_alpha
    leaves = [t.requires_grad_() for t in (diff, gates, torch.ones(1))]

    def function(x):
        y, count = PF.diff_pruning_linear(
            x,
            weight,
            None,
            diff,
            gates,
            group_log_alpha=leaves[2],
            training=True,
            backend=backend.name,
        )
        made, more = PF.diff_pruning_weight(weight, diff, gates, backend=backend.name)
        masked = PF.masked_linear(x * 2, made, None, gates, backend=backend.name)
        return (y + masked).sum() + count + more

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (3, 7):
        results = []
        for call in (function, compiled):
            torch.manual_seed(0)
            x = torch.ones(tokens, 6, requires_grad=True)
            y = call(x)
            results.append((y, *torch.autograd.grad(y, (x, *leaves))))
        for plain, ours in zip(*results, strict=True):
            torch.testing.assert_close(ours, plain)
    torch._dynamo.reset()
