"""AdapterFusion's operators: `torch.library.opcheck`, fakes against the real thing, `torch.compile(fullgraph=True)`."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from pelt_fast import functional as PF
from pelt_fast.ops import adapter_fusion_bwd, adapter_fusion_fwd
from pelt_fast.ops.fusion import GRADIENTS
from pelt_fast.testing import fusion_oracle as oracle
from pelt_fast.testing import inputs as draws
from pelt_fast.testing.adapter_workloads import HOULSBY, PFEIFFER
from pelt_fast.testing.fusion_workloads import EVERYTHING, FusionCase

# Dynamo makes an instance of every autograd function that it traces, and torch warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

D, WIDTHS = 24, (8, 3)
THIN, N = sum(WIDTHS), len(WIDTHS)
BARE, FULL = "bare", "full"


def forward_arguments(kind, backend, shape=(2, 5), layout="contiguous", dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def draw(*size, layout="contiguous"):
        return draws.draw(size, 0.3, layout, dtype, "cpu", generator)

    x, down, score, value = (
        draw(*shape, D, layout=layout),
        draw(THIN, D),
        draw(THIN + N, D),
        draw(THIN + N, D),
    )
    if kind == BARE:
        optional = [None] * 2
        tensors = [x, None, None, down, None, score, None, value, *optional, *optional, None]
        settings = ["gelu", list(WIDTHS), 1.0, 1e-5, 1e-5, 0.0, False, False, False]
    else:
        rows = [draw(*shape, D, layout=layout) for _ in range(2)]
        norms = [draw(D) for _ in range(4)]
        tensors = [x, *rows, down, draw(THIN), score, draw(THIN + N), value, *norms]
        tensors += [torch.tensor([11])]
        settings = ["tanh", list(WIDTHS), 2.0, 1e-5, 1e-5, 0.25, True, True, False]
    return (*tensors, *settings, backend.name)


def backward_arguments(kind, backend, wanted=GRADIENTS, **options):
    arguments = forward_arguments(kind, backend, **options)
    _, *saved = adapter_fusion_fwd(*arguments)
    needs = [
        name in wanted and t is not None
        for name, t in zip(GRADIENTS, arguments[: len(GRADIENTS)], strict=True)
    ]
    dy = torch.ones_like(arguments[0])
    return (dy, *saved, *arguments[:-1], needs, arguments[-1])


@pytest.fixture
def able(backend):
    backend.require(FusionCase("", (3,), D, WIDTHS, "tanh").make(torch.float32))
    return backend


@pytest.mark.parametrize("kind", [BARE, FULL])
def test_opcheck(kind, able):
    # with AOT dispatch and symbolic shapes, which take longer, one of the two
    more = {} if kind == FULL else {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(adapter_fusion_fwd.overload, forward_arguments(kind, able), **more)
    if able.name == "reference":
        return  # it differentiates by autograd, which the modes of opcheck turn off
    for wanted in (GRADIENTS, ("x",), ("score", "value"), ("ln_weight",), ()):
        arguments = backward_arguments(kind, able, wanted)
        torch.library.opcheck(adapter_fusion_bwd.overload, arguments, **more)
        more = {"test_utils": ("test_schema", "test_faketensor")}


@pytest.mark.parametrize("shape", [(0,), (1,), (), (2, 3), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fakes_promise_what_the_operators_give(shape, dtype, able):
    """Sizes, strides and dtypes: a compiled graph believes the fake. And outputs share no memory."""
    options = {"shape": shape, "layout": "transposed", "dtype": dtype}
    for operator, arguments in (
        (adapter_fusion_fwd, forward_arguments(FULL, able, **options)),
        (adapter_fusion_bwd, backward_arguments(FULL, able, **options)),
    ):
        with FakeTensorMode() as mode:
            fake = operator(
                *torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments)
            )
        real = operator(*arguments)
        flat_fake, flat_real = (torch.utils._pytree.tree_leaves(t) for t in (fake, real))
        for promised, given in zip(flat_fake, flat_real, strict=True):
            assert promised.shape == given.shape
            assert [
                s for n, s in zip(promised.shape, promised.stride(), strict=True) if n != 1
            ] == [s for n, s in zip(given.shape, given.stride(), strict=True) if n != 1]
            assert promised.dtype == given.dtype
        tensors = [t for t in (*arguments, *flat_real) if isinstance(t, torch.Tensor) and t.numel()]
        storages = [t.untyped_storage().data_ptr() for t in tensors]
        assert len(set(storages)) == len(storages)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compiles_as_one_graph(able):
    """The front and its folding, as far as Dynamo; the operators go through AOT dispatch above."""
    inputs = FusionCase("", (2, 7), D, WIDTHS, **HOULSBY).make(torch.float32)
    leaves = inputs.map(lambda name, t: t.detach().requires_grad_(name != "dy"))
    compiled = torch.compile(PF.adapter_fusion, fullgraph=True, backend="eager")
    more = {**leaves.kwargs, "backend": able.name}
    assert torch.equal(compiled(*leaves.args, **more), PF.adapter_fusion(*leaves.args, **more))


@pytest.mark.parametrize(
    ("block", "tokens"),
    [
        pytest.param(HOULSBY, (13, 17), id="houlsby", marks=pytest.mark.slow),
        pytest.param(EVERYTHING, (13, 17, 40), id="folded", marks=pytest.mark.slow),
        pytest.param(PFEIFFER, (13, 17, 40), id="pfeiffer", marks=pytest.mark.slow),
        # no size equal to another: one symbol would stand for both
        pytest.param(EVERYTHING, (4, 5, 6), id="few_tokens", marks=pytest.mark.slow),
    ],
)
def test_same_results_for_every_number_of_tokens_from_one_graph(block, tokens, able):
    if able.name == "reference":
        pytest.skip("one graph of formulas is as good as another")
    counter = CompileCounterWithBackend("aot_eager")

    def plain(inputs):
        inputs = replace(inputs, x=inputs.x * 2)  # a residual that is x is the same tensor still
        y = PF.adapter_fusion(*inputs.args, **inputs.kwargs, backend=able.name)
        return torch.relu(y)

    compiled = torch.compile(plain, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for count in tokens:
        inputs = FusionCase("", (2, count), D, WIDTHS, **block).make(torch.float32)
        results = []
        for function in (plain, compiled):
            torch.manual_seed(0)
            results.append(oracle.run(function, inputs, oracle.trained(inputs)))
        for name, value in results[0].items():
            torch.testing.assert_close(results[1][name], value, msg=name)
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1]
