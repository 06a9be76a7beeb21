"""The operators of batched bottleneck adapters: opcheck, fakes, `torch.compile`, gradients by finite differences."""

from itertools import product

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck

import pelt_fast
from pelt_fast import MultiAdapterPlan
from pelt_fast import functional as PF
from pelt_fast.ops import multi_bottleneck_bwd, multi_bottleneck_fwd
from pelt_fast.ops.multi_bottleneck import GRADIENTS

CHECKS = ("test_schema", "test_faketensor")
IDS, WIDTHS = [0, 2, -1, 1, 0, 1], [3, 4, 0]


@pytest.fixture(params=["torch", "cpp"])
def on(request):
    if request.param == "cpp":
        pytest.importorskip("pelt_fast._C")
    return request.param


def draw(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def operands(shape, dtype=torch.float32, optional=True, d=5):
    tokens, of = torch.Size(shape).numel(), {"dtype": dtype}
    found = {
        "x": draw(*shape, d, **of),
        "residual": draw(*shape, d, **of) + 1 if optional else None,
        "down": draw(3, 4, d, **of),
        "down_bias": draw(3, 4, **of) if optional else None,
        "up": draw(3, d, 4, **of),
        "up_bias": draw(3, d, **of) if optional else None,
        "scale": draw(3, **of) if optional else None,
        "gate": draw(tokens, **of) if optional else None,
        "ln_weight": draw(d, **of) if optional else None,
        "ln_bias": draw(d, **of) + 1 if optional else None,
    }
    assert tuple(found) == GRADIENTS
    return list(found.values())


def rest(tokens, on, dropout=True):
    plan = MultiAdapterPlan([IDS[t % 6] for t in range(tokens)], 3)
    seed = torch.tensor([11]) if dropout else None
    widths = torch.tensor(WIDTHS, dtype=torch.int32)
    return [plan.arrays, widths, seed, "gelu", 1.5, 1e-5, 0.3 if dropout else 0.0, True, on]


def backward_arguments(shape, on, needs=None, dtype=torch.float32, optional=True, dropout=True):
    tokens = torch.Size(shape).numel()
    tensors, more = operands(shape, dtype, optional), rest(tokens, on, dropout)
    y, q, stats = multi_bottleneck_fwd(*tensors, *more)
    needs = [t is not None for t in tensors] if needs is None else needs
    return (torch.ones_like(y), *tensors[:2], q, stats, *tensors[2:], *more[:-1], needs, on)


@pytest.mark.parametrize(("optional", "dropout"), list(product([False, True], repeat=2)))
def test_opcheck(optional, dropout, on):
    forward = (*operands((6,), optional=optional), *rest(6, on, dropout))
    torch.library.opcheck(multi_bottleneck_fwd.overload, forward, test_utils=CHECKS)
    backward = backward_arguments((6,), on, optional=optional, dropout=dropout)
    torch.library.opcheck(multi_bottleneck_bwd.overload, backward, test_utils=CHECKS)


@pytest.mark.parametrize("only", range(len(GRADIENTS)), ids=GRADIENTS)
def test_opcheck_of_each_gradient_alone(only, on):
    needs = [i == only for i in range(len(GRADIENTS))]
    arguments = backward_arguments((6,), on, needs)
    torch.library.opcheck(multi_bottleneck_bwd.overload, arguments, test_utils=CHECKS)


@pytest.mark.slow
def test_every_check_of_opcheck(on):
    torch.library.opcheck(multi_bottleneck_fwd.overload, (*operands((6,)), *rest(6, on)))
    torch.library.opcheck(multi_bottleneck_bwd.overload, backward_arguments((6,), on))


@pytest.mark.parametrize("shape", [(0,), (), (2, 3), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("optional", [False, True])
def test_fakes_promise_what_the_operators_give(shape, optional, on):
    tensors = operands(shape, torch.bfloat16, optional)
    tensors[4] = tensors[4].mT.contiguous().mT  # U column by column
    forward = (*tensors, *rest(torch.Size(shape).numel(), on))
    backward = backward_arguments(shape, on, dtype=torch.bfloat16, optional=optional)
    for operator, arguments in (
        (multi_bottleneck_fwd, forward),
        (multi_bottleneck_bwd, backward),
    ):
        with FakeTensorMode() as mode:
            fake = operator(
                *torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments)
            )
        for promised, given in zip(fake, operator(*arguments), strict=True):
            assert promised.shape == given.shape
            assert promised.stride() == given.stride()
            assert promised.dtype == given.dtype


def test_outputs_share_no_memory_with_inputs_or_each_other(on):
    for operator, arguments in (
        (multi_bottleneck_fwd, (*operands((6,)), *rest(6, on))),
        (multi_bottleneck_bwd, backward_arguments((6,), on)),
    ):
        given = torch.utils._pytree.tree_leaves(arguments)
        taken = {t.untyped_storage().data_ptr() for t in given if isinstance(t, torch.Tensor)}
        places = [t.untyped_storage().data_ptr() for t in operator(*arguments)]
        assert len(set(places)) == len(places)
        assert not taken.intersection(places)


def function(on, plan, dropout=0.0):
    def call(x, other, down, down_bias, up, up_bias, scale, gate, ln_weight, ln_bias):
        return PF.multi_bottleneck(
            *(x, down, down_bias, up, up_bias, plan),
            activation="gelu_tanh",
            scaling=1.0 if scale is None else scale,
            widths=WIDTHS,
            gate=None if gate is None else gate[:, None],
            residual=x if other is None else (x, other),
            ln_weight=ln_weight,
            ln_bias=ln_bias,
            dropout_p=dropout,
            training=True,
            backend=on,
        )

    return call


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.4])
@pytest.mark.parametrize(
    "on", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("reference", "torch")), "cpp"]
)
def test_gradcheck(dropout, on):
    if on == "cpp":
        pytest.importorskip("pelt_fast._C")
    call = function(on, MultiAdapterPlan(IDS[:5], 3), dropout)

    def seeded(*leaves):
        torch.manual_seed(0)  # the same mask at every evaluation
        return call(*leaves)

    for optional in (False, True):
        leaves = [
            None if t is None else t.requires_grad_()
            for t in operands((5,), torch.float64, optional, d=3)
        ]
        assert gradcheck(seeded, leaves)


def test_a_second_derivative_raises(on):
    leaves = [t.requires_grad_() for t in operands((5,))]
    y = function(on, MultiAdapterPlan(IDS[:5], 3))(*leaves)
    (dx,) = torch.autograd.grad(y.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.grad(dx.sum(), leaves[2])


# Dynamo makes an instance of every autograd function that it traces, and torch warns of it.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("on", ["cpp", pytest.param("torch", marks=pytest.mark.slow)])
def test_one_graph_for_every_number_of_tokens_and_every_batch(on):
    if on == "cpp":
        pytest.importorskip("pelt_fast._C")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def layer(x, other, *more):
        *weights, plan = more
        return torch.relu(function(on, plan, 0.25)(x * 2, other, *weights))

    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    compilations = []
    # no size twice, nor the number of tiles: the compiler takes equal sizes for one and the same
    for tokens, ids in ((18, IDS * 3), (50, IDS * 9), (50, [-1] * 50)):
        leaves = [t.requires_grad_() for t in operands((tokens,), d=11)]
        plan = MultiAdapterPlan(ids[:tokens], 3)
        results = []
        for run in (layer, compiled):
            torch.manual_seed(0)
            results.append(torch.autograd.grad(run(*leaves, plan).square().sum(), leaves))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1]
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_without_a_layernorm():
    """The gradient of the residual is then dy itself."""
    x, _, down, _, up, *_ = operands((6,))
    plan, leaves = MultiAdapterPlan(IDS[:6], 3), [t.requires_grad_() for t in (x, down, up)]

    def layer(x, down, up):
        y = pelt_fast.functional.multi_bottleneck(x, down, None, up, None, plan, residual=x * 2)
        return y.square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for a, b in zip(*(torch.autograd.grad(f(*leaves), leaves) for f in (layer, compiled)), strict=True):  # fmt: skip
        assert torch.equal(a, b)
    torch._dynamo.reset()


def test_explain_names_the_backends():
    x, _, down, *_ = operands((6,))
    up, plan = operands((6,))[4], MultiAdapterPlan(IDS, 3)
    report = pelt_fast.explain("multi_bottleneck", x, down, None, up, None, plan, residual=x)
    assert len(report.backends) == 2
    assert "m<=4" in str(report)
    asked = pelt_fast.explain("multi_bottleneck", x, down, None, up, None, plan, backend="torch")
    assert asked.backends == ("torch", "torch")
    assert pelt_fast.explain(
        "multi_bottleneck", x, down, None, up, None, plan, backend="cuda"
    ).backends == (None, None)
