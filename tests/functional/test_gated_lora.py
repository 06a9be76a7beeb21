"""The LoRA linear with UniPELT's gate, on every backend: values, gradients, layouts, errors, what is saved."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import pelt_fast
from pelt_fast import functional as PF
from pelt_fast import reference
from pelt_fast.dispatch import cpp_extension
from pelt_fast.random import new_seed, philox_mask
from pelt_fast.testing import inputs as drawing

NAMES = ("x", "bias", "lora_a", "lora_b", "gate_weight", "gate_bias")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def make(
    shape=(3, 5),
    n_in=24,
    n_out=40,
    rank=8,
    dtype=torch.float32,
    adapter_dtype=None,
    bias=True,
    gate_bias=True,
    layout="contiguous",
    device="cpu",
):
    generator = torch.Generator().manual_seed(0)

    def draw(*size, std=1.0, dtype=dtype, layout="contiguous"):
        return drawing.draw(size, std, layout, dtype, device, generator)

    wide = adapter_dtype or dtype
    return {
        "x": draw(*shape, n_in, layout=layout),
        "weight": draw(n_out, n_in, std=n_in**-0.5),
        "bias": draw(n_out) if bias else None,
        "lora_a": draw(rank, n_in, std=n_in**-0.5, dtype=wide),
        "lora_b": draw(n_out, rank, std=rank**-0.5, dtype=wide),
        "gate_weight": draw(1, n_in, std=n_in**-0.5, dtype=wide),
        "gate_bias": draw(1, dtype=wide) if gate_bias else None,
    }


def weights_of(tensors, paper):
    """Masks in the manner of the paper; the last token of each sample does not count."""
    if not paper:
        return None
    mask = torch.ones(tensors["x"].shape[:-1])
    mask[..., -1] = 0
    return mask / mask.sum(-1, keepdim=True)


def run(function, tensors, wanted, dy, **kwargs):
    leaves = {
        name: None if t is None else t.detach().requires_grad_(name in wanted)
        for name, t in tensors.items()
    }
    y = function(*leaves.values(), **kwargs)
    names = [name for name in wanted if leaves[name] is not None]
    grads = torch.autograd.grad(y, [leaves[name] for name in names], dy) if names else ()
    return {"y": y.detach(), **dict(zip(names, grads, strict=True))}


def composed(x, weight, bias, lora_a, lora_b, gate_weight, gate_bias, *, token_weight, keep, p):
    """The library's own order: LoRA.forward with use_gating, in the dtypes of its arguments."""
    dropped = x if keep is None else x * keep / (1 - p)
    delta = dropped.to(lora_a.dtype) @ lora_a.T @ lora_b.T
    opened = torch.sigmoid(
        torch.nn.functional.linear(x.to(gate_weight.dtype), gate_weight, gate_bias)
    )
    if token_weight is None:
        gate = opened.mean(-2, keepdim=True)
    else:
        gate = (opened * token_weight.unsqueeze(-1).to(opened)).sum(-2, keepdim=True)
    return (torch.nn.functional.linear(x, weight, bias) + 0.5 * delta * gate).to(x.dtype)


def exact(tensors, wanted, dy, token_weight, keep, p):
    wide = {name: None if t is None else t.double() for name, t in tensors.items()}
    shape = tensors["x"].shape
    samples = math.prod(shape[:-2])
    keep = None if keep is None else keep.view(samples, *shape[-2:])

    def function(x, *rest):
        y, _ = reference.gated_lora_linear(
            x.reshape(samples, *shape[-2:]),
            *rest,
            0.5,
            token_weight=None
            if token_weight is None
            else token_weight.double().view(samples, shape[-2]),
            dropout_p=p,
            keep=keep,
        )
        return y.reshape(*shape[:-1], -1)

    return run(function, wide, wanted, dy.double())


def check(backend, tensors, *, paper=False, p=0.0, wanted=NAMES):
    """Errors at most twice eager's and a bound of a few units of rounding of the dtype."""
    generator = torch.Generator().manual_seed(1)
    x = tensors["x"]
    dy = torch.randn(*x.shape[:-1], tensors["weight"].shape[0], generator=generator).to(x.dtype)
    token_weight = weights_of(tensors, paper)
    explanation = PF.explain("gated_lora_linear", *tensors.values(), 0.5, backend=backend.name)
    if None in explanation.backends:
        pytest.skip(str(explanation.choices[0].error))
    torch.manual_seed(5)
    keep = None
    if p:
        keep = philox_mask(new_seed(x.device), (x[..., 0].numel(), x.shape[-1]), p).view(x.shape)
    torch.manual_seed(5)
    actual = run(
        lambda *args: PF.gated_lora_linear(
            *args,
            0.5,
            token_weight=token_weight,
            dropout_p=p,
            training=p > 0,
            backend=backend.name,
        ),
        tensors,
        wanted,
        dy,
    )
    oracle = exact(tensors, wanted, dy, token_weight, keep, p)
    eager = run(
        lambda *args: composed(*args, token_weight=token_weight, keep=keep, p=p),
        tensors,
        wanted,
        dy,
    )
    unit = torch.finfo(x.dtype).eps
    for name, value in actual.items():
        source = tensors.get(name, x)
        assert value.dtype == source.dtype, name
        assert value.shape == oracle[name].shape, name
        scale = oracle[name].abs().max()
        error = (value.double() - oracle[name]).abs().max()
        allowed = (eager[name].double() - oracle[name]).abs().max()
        assert error <= 2 * allowed + 4 * unit * scale, (name, error, allowed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("paper", [False, True], ids=["all tokens", "real tokens"])
def test_values_and_gradients(dtype, paper, backend):
    check(backend, make(dtype=dtype), paper=paper)


@pytest.mark.parametrize(
    "options",
    [
        {"shape": (7,), "n_in": 13, "n_out": 29, "rank": 3},
        {"shape": (2, 3, 4)},
        {"shape": (1, 1)},
        {"shape": (2, 67), "n_in": 129, "n_out": 131, "rank": 16},
        {"shape": (5, 103), "n_in": 40, "n_out": 24, "rank": 129},
        {"rank": 1},
        {"rank": 256},
        {"bias": False, "gate_bias": False},
        {"adapter_dtype": torch.float32, "dtype": torch.bfloat16},
        {"layout": "transposed"},
        {"layout": "expanded"},
        {"layout": "sliced"},
    ],
    ids=str,
)
def test_shapes_and_layouts(options, backend):
    check(backend, make(**options))


@pytest.mark.parametrize("p", [0.1, 1.0])
def test_dropout_spares_the_gate(p, backend):
    if p == 1.0:
        tensors = make()
        y, gate = PF.gated_lora_linear(
            *tensors.values(), dropout_p=p, training=True, return_gate=True, backend=backend.name
        )
        plain = torch.nn.functional.linear(tensors["x"], tensors["weight"], tensors["bias"])
        torch.testing.assert_close(y, plain)
        assert (gate > 0).all()
    else:
        check(backend, make(shape=(4, 33)), p=p)


@pytest.mark.parametrize("wanted", [(name,) for name in NAMES] + [("x", "lora_b"), ()], ids=str)
def test_every_gradient_alone(wanted, backend):
    check(backend, make(), wanted=wanted)


@pytest.mark.parametrize("paper", [False, True])
def test_gradcheck(paper, backend):
    tensors = {
        name: t if t is None or name == "weight" else t.requires_grad_()
        for name, t in make((2, 3), 5, 4, 2, torch.float64).items()
    }
    token_weight = weights_of(tensors, paper)

    def function(*args):
        return PF.gated_lora_linear(
            *args,
            0.5,
            token_weight=token_weight,
            dropout_p=0.3,
            training=True,
            backend=backend.name,
        )

    torch.manual_seed(0)
    state = torch.get_rng_state()

    def seeded(*args):
        torch.set_rng_state(state)
        return function(*args)

    assert torch.autograd.gradcheck(seeded, tuple(tensors.values()))


def test_a_trained_weight(backend):
    tensors = make()
    dy = torch.randn(3, 5, 40)
    if backend.name == "cpp":
        with pytest.raises(pelt_fast.BackendUnavailable, match="weight requires a gradient"):
            run(lambda *a: PF.gated_lora_linear(*a, backend="cpp"), tensors, ("weight",), dy)
        return
    found = run(
        lambda *a: PF.gated_lora_linear(*a, 0.5, backend=backend.name), tensors, ("weight",), dy
    )
    want = exact(tensors, ("weight",), dy, None, None, 0.0)["weight"]
    torch.testing.assert_close(found["weight"].double(), want, rtol=1e-4, atol=1e-5)


def test_the_gate_that_is_returned(backend):
    tensors = make(shape=(2, 3, 5))
    _, gate = PF.gated_lora_linear(*tensors.values(), return_gate=True, backend=backend.name)
    opened = torch.nn.functional.linear(
        tensors["x"], tensors["gate_weight"], tensors["gate_bias"]
    ).sigmoid()
    torch.testing.assert_close(gate, opened.mean((-2, -1)))
    assert not gate.requires_grad


def test_a_token_without_weight_counts_for_nothing(backend):
    tensors = make(shape=(1, 4))
    tensors["x"][0, 3] = float("inf")
    weight = torch.tensor([[0.5, 0.25, 0.25, 0.0]])
    y, gate = PF.gated_lora_linear(
        *tensors.values(), token_weight=weight, return_gate=True, backend=backend.name
    )
    assert gate.isfinite().all()
    assert y[0, :3].isfinite().all()


def test_bitwise_the_same_twice():
    tensors = make(shape=(4, 101), n_in=130, n_out=96)
    dy = torch.randn(4, 101, 96)
    first, second = (run(PF.gated_lora_linear, tensors, NAMES, dy) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_nothing_of_the_size_of_x_is_saved():
    tensors = make(shape=(4, 64), n_in=96, n_out=96)
    sizes = []

    def pack(t):
        known = {v.untyped_storage().data_ptr() for v in tensors.values() if v is not None}
        if t.untyped_storage().data_ptr() not in known:
            sizes.append(t.numel())
        return t

    for name in NAMES:
        tensors[name].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        PF.gated_lora_linear(*tensors.values())
    assert sum(sizes) == 4 * 64 * 9 + 4


@pytest.mark.skipif(cpp_extension() is None, reason="the C++ extension is not built")
@pytest.mark.parametrize("grad", [False, True])
def test_the_short_way_is_bitwise_the_long_way(grad, monkeypatch):
    tensors = make(shape=(2, 33))
    dy = torch.randn(2, 33, 40)
    wanted = NAMES if grad else ()
    short = run(PF.gated_lora_linear, tensors, wanted, dy)
    monkeypatch.setattr("pelt_fast.functional.ordinary.cpp_extension", lambda: None)
    for name, value in run(PF.gated_lora_linear, tensors, wanted, dy).items():
        assert torch.equal(value, short[name]), name


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_in_one_graph():
    tensors = make()
    for name in NAMES:
        tensors[name].requires_grad_()

    def step(x, *rest):
        return PF.gated_lora_linear(x, *rest, 0.5).square().sum()

    leaves = [tensors[name] for name in NAMES]
    want = torch.autograd.grad(step(*tensors.values()), leaves)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for ours, eager in zip(
        torch.autograd.grad(compiled(*tensors.values()), leaves), want, strict=True
    ):
        torch.testing.assert_close(ours, eager)


def test_operators_are_what_they_say(backend):
    tensors = make((2, 3), 5, 4, 2)
    from pelt_fast.ops import gated_lora_linear_bwd, gated_lora_linear_fwd

    x, weight, bias, *adapter = tensors.values()
    forward = (x, weight, bias, *adapter, None, 0.5, 0.0, None, 2, backend.name)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(gated_lora_linear_fwd.overload, forward, test_utils=checks)
    _, s, gate = gated_lora_linear_fwd(*forward)
    needs = [True] * 6
    dy = torch.randn(2, 3, 4)
    backward = (dy, x, weight, *adapter, None, 0.5, 0.0, None, s, gate, needs, backend.name)
    torch.library.opcheck(gated_lora_linear_bwd.overload, backward, test_utils=checks)
    with FlopCounterMode(display=False):
        PF.gated_lora_linear(*tensors.values())


def test_empty_batches(backend):
    for shape in ((0, 5), (2, 0)):
        tensors = make(shape=shape)
        found = run(
            lambda *a: PF.gated_lora_linear(*a, backend=backend.name),
            tensors,
            NAMES,
            torch.zeros(*shape, 40),
        )
        assert found["y"].shape == (*shape, 40)
        assert all((g == 0).all() for name, g in found.items() if name != "y")


def test_autocast(backend):
    tensors = make()
    with torch.autocast("cpu", torch.bfloat16):
        y = PF.gated_lora_linear(*tensors.values(), backend=backend.name)
    assert y.dtype == torch.bfloat16


def test_no_double_backward():
    tensors = make()
    for name in NAMES:
        tensors[name].requires_grad_()
    y = PF.gated_lora_linear(*tensors.values())
    (grad,) = torch.autograd.grad(y.square().sum(), tensors["gate_weight"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(24)}, r"x has shape \(24,\); expected \(..., L, in\)"),
        ({"gate_weight": torch.randn(24)}, r"gate_weight has shape \(24,\); expected \(1, in\)"),
        ({"gate_weight": torch.randn(2, 24)}, "gate_weight has shape"),
        ({"gate_bias": torch.randn(2)}, "gate_bias has shape"),
        ({"lora_b": torch.randn(40, 7)}, "lora_b has shape"),
        ({"scaling": math.nan}, "scaling is nan"),
        ({"dropout_p": -0.1, "training": True}, "dropout_p is -0.1"),
        ({"token_weight": torch.ones(3, 4)}, "token_weight has shape"),
        ({"lora_a": torch.randn(257, 24)}, "rank 257"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_values(change, message):
    with pytest.raises(ValueError, match=message):
        PF.gated_lora_linear(**(make() | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate_weight": torch.randn(1, 24).double()}, "gate_weight has dtype torch.float64"),
        ({"gate_weight": None}, "gate_weight is a NoneType"),
        ({"token_weight": torch.ones(3, 5, dtype=torch.int64)}, "token_weight has dtype"),
        ({"scaling": "1"}, "scaling is a str"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_types(change, message):
    with pytest.raises(TypeError, match=message):
        PF.gated_lora_linear(**(make() | change))
