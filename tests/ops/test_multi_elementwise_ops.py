"""opcheck of the operators of ``multi_elementwise``, their fakes, and ``torch.compile``."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pelt_fast import MultiAdapterPlan
from pelt_fast import functional as PF
from pelt_fast.ops import multi_elementwise_bwd, multi_elementwise_fwd

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture(params=["torch", "cpp"])
def name(request):
    if request.param == "cpp":
        pytest.importorskip("pelt_fast.backends.cpp")
    return request.param


def calls(backend, tokens=5, transposed=False):
    plan = list(MultiAdapterPlan([0, -1, 2, 2, 0][:tokens], 3).arrays[:3])
    x, dy = torch.randn(2, tokens, 4, dtype=torch.bfloat16)
    if transposed:
        x, dy = (t.T.contiguous().T for t in (x, dy))
    scales, biases = torch.randn(2, 3, 4)
    for parts in ((scales, biases), (scales, None), (None, biases)):
        yield multi_elementwise_fwd, (x, *parts, plan, backend)
    for needs in ((True, True, True), (True, False, False), (False, False, True)):
        given = x if needs[1] else None, scales if needs[0] else None
        yield multi_elementwise_bwd, (dy, *given, plan, *needs, backend)


@pytest.mark.parametrize("tokens", [5, 0])
def test_opcheck(tokens, name):
    for operator, arguments in calls(name, tokens):
        torch.library.opcheck(operator.overload, arguments)


@pytest.mark.parametrize("transposed", [False, True])
def test_fakes_promise_what_the_operators_give(transposed, name):
    for operator, arguments in calls(name, transposed=transposed):
        with FakeTensorMode() as mode:
            move = mode.from_tensor
            fake = operator(*torch.utils._pytree.tree_map_only(torch.Tensor, move, arguments))
        pairs = zip(
            *map(torch.utils._pytree.tree_leaves, (fake, operator(*arguments))), strict=True
        )
        for promised, given in pairs:
            assert (promised.shape, promised.stride()) == (given.shape, given.stride())
            assert promised.dtype == given.dtype


def test_compiled_in_one_graph():
    torch._dynamo.reset()
    leaves = [torch.randn(3, 4, requires_grad=True) for _ in range(2)]

    def function(x, plan):
        return PF.multi_elementwise(x * 2, *leaves, plan).square().sum()

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (3, 6):
        plan = MultiAdapterPlan([0, -1, 2, 2, 0, 1][:tokens], 3)
        x = torch.randn(tokens, 4, requires_grad=True)
        results = [
            torch.autograd.grad(call(x, plan), (x, *leaves)) for call in (function, compiled)
        ]
        torch.testing.assert_close(*results)
    torch._dynamo.reset()
