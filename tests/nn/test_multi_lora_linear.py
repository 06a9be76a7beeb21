"""`MultiLoRALinear` against one `LoRALinear` for each adapter."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pelt_fast
from pelt_fast import MultiAdapterPlan, functional
from pelt_fast.nn import LoRALinear, MultiLoRALinear

RANKS = [3, 8, 1, 5]
ALPHAS = [6.0, 4.0, 0.5, 10.0]
IDS = [2, 0, -1, 1, 0, 2, 2, -1, 1, 1, 0]  # adapter 3 has no token
IN, OUT = 12, 20


def make(dtype: torch.dtype = torch.float64, **options) -> MultiLoRALinear:
    """With random A and B, as a zero B hides everything."""
    torch.manual_seed(0)
    layer = MultiLoRALinear(
        IN, OUT, len(RANKS), 8, **{"ranks": RANKS, "lora_alpha": ALPHAS, "dtype": dtype, **options}
    )
    for i, rank in enumerate(layer.ranks.tolist()):
        layer.load_adapter(
            *(i, torch.randn(rank, IN) * 0.3, torch.randn(OUT, rank) * 0.3),
            float(layer.scaling[i]),
        )
    return layer


def singles(layer: MultiLoRALinear) -> list[LoRALinear]:
    """One layer for each adapter, over the same frozen weight."""
    found = []
    for i in range(layer.num_adapters):
        a, b, scaling = layer.state_of(i)
        one = LoRALinear.from_linear(layer.base_layer, len(a), dtype=a.dtype)
        one.scaling["default"] = scaling
        with torch.no_grad():
            one.lora_A["default"].weight.copy_(a)
            one.lora_B["default"].weight.copy_(b)
        found.append(one)
    return found


def split_forward(layer: MultiLoRALinear, ones: list[LoRALinear], x: Tensor) -> Tensor:
    """Every row by the layer of its adapter."""
    rows = x.reshape(-1, IN)
    parts = [
        (ones[g] if g >= 0 else layer.base_layer)(rows[i : i + 1])
        for i, g in enumerate(IDS[: len(rows)])
    ]
    return torch.cat(parts).view(*x.shape[:-1], OUT)


@pytest.fixture
def plan() -> MultiAdapterPlan:
    return MultiAdapterPlan(IDS, len(RANKS))


def inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(len(IDS), IN, generator=torch.Generator().manual_seed(1)).to(dtype)


def bound(dtype: torch.dtype) -> dict[str, float]:
    """Two orders of sums of at most 32 terms of size one, and one more rounding of the intermediate."""
    eps = torch.finfo(dtype).eps
    return {"rtol": 8 * eps, "atol": 8 * eps}


DTYPES = pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [
        (torch.float64, None),
        (torch.float32, None),
        (torch.bfloat16, None),
        (torch.bfloat16, torch.float32),
    ],
    ids=["fp64", "fp32", "bf16", "bf16-fp32-adapters"],
)


@DTYPES
def test_outputs_and_gradients(dtype, adapter_dtype, plan) -> None:
    layer = make(dtype, adapter_dtype=adapter_dtype)
    ones = singles(layer)
    x = inputs(dtype).requires_grad_()
    twin = x.detach().clone().requires_grad_()
    expected, y = split_forward(layer, ones, twin), layer(x, plan)
    torch.testing.assert_close(y, expected, **bound(dtype))
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    y.backward(dy)
    expected.backward(dy)
    torch.testing.assert_close(x.grad, twin.grad, **bound(dtype))
    assert layer.lora_a.grad.dtype is layer.lora_a.dtype
    assert layer.lora_b.grad.stride() == layer.lora_b.stride()
    assert layer.base_layer.weight.grad is None
    for g, one in enumerate(ones):
        a, b, rank = one.lora_A["default"].weight, one.lora_B["default"].weight, RANKS[g]
        if g == 3:
            assert a.grad is None
            assert not layer.lora_a.grad[g].any()
            assert not layer.lora_b.grad[g].any()
            continue
        torch.testing.assert_close(layer.lora_a.grad[g, :rank], a.grad, **bound(dtype))
        torch.testing.assert_close(layer.lora_b.grad[g, :, :rank], b.grad, **bound(dtype))
        assert not layer.lora_a.grad[g, rank:].any()
        assert not layer.lora_b.grad[g, :, rank:].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_three_steps(dtype, plan) -> None:
    layer = make(dtype)
    ones = singles(layer)
    trained = [p for one in ones for p in one.parameters() if p.requires_grad]
    optimizers = [
        torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        for parameters in ([layer.lora_a, layer.lora_b], trained)
    ]
    target = torch.randn(len(IDS), OUT).to(dtype)
    for _ in range(3):
        losses = [
            (y - target).square().mean()
            for y in (layer(inputs(dtype), plan), split_forward(layer, ones, inputs(dtype)))
        ]
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for g, one in enumerate(ones):
        a, b, _ = layer.state_of(g)
        torch.testing.assert_close(a, one.lora_A["default"].weight.detach(), **bound(dtype))
        torch.testing.assert_close(b, one.lora_B["default"].weight.detach(), **bound(dtype))
        assert not layer.lora_a[g, RANKS[g] :].any()
        assert not layer.lora_b[g, :, RANKS[g] :].any()
    assert layer.lora_b.stride() == (8 * OUT, 1, OUT)


def test_adamw_with_decay_keeps_the_tails_zero(plan) -> None:
    layer = make()
    optimizer = torch.optim.AdamW([layer.lora_a, layer.lora_b], lr=0.1, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        layer(inputs(), plan).square().sum().backward()
        optimizer.step()
    for g, rank in enumerate(RANKS):
        assert not layer.lora_a[g, rank:].any()
        assert not layer.lora_b[g, :, rank:].any()


def test_the_plan_of_the_surrounding_block(plan) -> None:
    layer, x = make(), inputs()
    with_plan, alone = layer(x, plan), layer(x)
    base = layer.base_layer
    assert torch.equal(alone, functional.frozen_linear(x, base.weight, base.bias))
    with pelt_fast.use_plan(plan):
        assert torch.equal(layer(x), with_plan)
        other = MultiAdapterPlan([3] * len(IDS), len(RANKS))
        assert torch.equal(layer(x, other), layer(x, plan=other))
        assert not torch.equal(layer(x, other), with_plan)
        with pelt_fast.use_plan(None):
            assert torch.equal(layer(x), alone)
        with pytest.raises(ZeroDivisionError), pelt_fast.use_plan(other):
            1 / 0  # noqa: B018
        assert torch.equal(layer(x), with_plan)
    assert torch.equal(layer(x), alone)
    with (
        pytest.raises(TypeError, match=r"plan is a list; expected a pelt_fast\.MultiAdapterPlan"),
        pelt_fast.use_plan([0]),
    ):
        pass


def test_samples_of_several_tokens() -> None:
    layer = make()
    x = inputs()[:10].view(2, 5, IN)
    plan = MultiAdapterPlan.from_samples([1, -1], 5, len(RANKS))
    y = layer(x, plan)
    assert torch.equal(y[1], layer(x)[1])
    torch.testing.assert_close(y[0], singles(layer)[1](x[0]))


def test_nobody_has_an_adapter() -> None:
    layer, x = make(), inputs().requires_grad_()
    y = layer(x, MultiAdapterPlan([-1] * len(IDS), len(RANKS)))
    assert torch.equal(y, layer(x))
    y.sum().backward()
    assert not layer.lora_a.grad.any()
    assert not layer.lora_b.grad.any()


def test_no_tokens() -> None:
    layer = make()
    y = layer(torch.zeros(0, IN, dtype=torch.float64), MultiAdapterPlan([], len(RANKS)))
    assert y.shape == (0, OUT)
    y.sum().backward()
    assert not layer.lora_a.grad.any()


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_without_gradients(guard, plan) -> None:
    layer, x = make(), inputs()
    expected, before = layer(x, plan), x.clone()
    with guard():
        assert torch.equal(layer(x, plan), expected)
    assert torch.equal(x, before)


def test_autocast(plan) -> None:
    layer = make(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(inputs(torch.float32), plan)
    assert y.dtype is torch.bfloat16
    # x, W, A, B, the intermediate and y are rounded
    torch.testing.assert_close(
        y.float(), layer(inputs(torch.float32), plan), rtol=0.03, atol=0.03 * y.abs().max().item()
    )
    y.float().sum().backward()
    assert layer.lora_a.grad.dtype is torch.float32


def test_dropout(plan) -> None:
    layer, x = make(dropout=0.5), inputs()
    layer.eval()
    still = layer(x, plan)
    assert torch.equal(layer(x, plan), still)
    layer.train()
    torch.manual_seed(3)
    dropped = layer(x, plan)
    torch.manual_seed(3)
    assert torch.equal(layer(x, plan), dropped)
    assert not torch.equal(dropped, still)
    null = [i for i, g in enumerate(IDS) if g < 0]
    assert torch.equal(dropped[null], still[null])
    layer.dropout = 1.0
    torch.testing.assert_close(layer(x, plan), layer.base_layer(x))


def test_starts_as_one_lora_linear_for_each_adapter() -> None:
    layer = MultiLoRALinear(IN, OUT, 2, 4, ranks=[4, 2])
    for g, rank in enumerate((4, 2)):
        one = LoRALinear.from_linear(layer.base_layer, rank)
        torch.manual_seed(g)
        one.reset_adapter("default")
        torch.manual_seed(g)
        layer.reset_adapter(g)
        a, b, scaling = layer.state_of(g)
        assert torch.equal(a, one.lora_A["default"].weight)
        assert torch.equal(b, one.lora_B["default"].weight)
        assert scaling == one.scaling["default"]
    x = inputs(torch.float32)
    plan = MultiAdapterPlan([0, 1, -1, 1, 0, 0, 1, 1, 0, -1, 1], 2)
    assert torch.equal(layer(x, plan), layer(x))
    with torch.no_grad():
        layer.lora_b.fill_(1.0)
    layer.reset_adapter(1)
    assert not layer.lora_b[1].any()
    assert layer.lora_b[0].all()
    assert not layer.lora_a[1, 2:].any()


def test_from_linear_shares_and_freezes() -> None:
    linear = nn.Linear(IN, OUT, dtype=torch.bfloat16)
    layer = MultiLoRALinear.from_linear(
        linear, 3, 4, scaling=[1, 2.0, 3], dropout=0.1, adapter_dtype=torch.float32
    )
    assert layer.base_layer is linear
    assert not linear.weight.requires_grad
    assert layer.lora_a.dtype is layer.lora_b.dtype is torch.float32
    assert layer.scaling.tolist() == [1.0, 2.0, 3.0]
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_a", "lora_b"]
    assert "num_adapters=3, max_rank=4, dropout=0.1" in repr(layer)
    with pytest.raises(TypeError, match=r"linear is a Conv1d; expected a torch\.nn\.Linear"):
        MultiLoRALinear.from_linear(nn.Conv1d(2, 2, 1), 3)


def test_storage_is_by_rank() -> None:
    layer = make()
    assert layer.lora_a.shape == (4, 8, IN)
    assert layer.lora_b.shape == (4, OUT, 8)
    assert layer.lora_b.stride() == (8 * OUT, 1, OUT)
    assert layer.ranks.dtype is torch.int32
    assert layer.scaling.dtype is torch.float64
    assert make(torch.bfloat16).scaling.dtype is torch.float32
    assert layer.scaling.tolist() == pytest.approx(
        [a / r for a, r in zip(ALPHAS, RANKS, strict=True)]
    )
    layer.bfloat16()
    assert layer.lora_a.dtype is torch.bfloat16
    assert layer.scaling.dtype is torch.float64, "bf16 would round the scalings"
    assert layer.lora_b.stride() == (8 * OUT, 1, OUT)
    layer(inputs(torch.bfloat16), MultiAdapterPlan(IDS, 4))


def test_state_dict_round_trip(plan, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    layer = make()
    state = layer.state_dict()
    assert list(state) == [
        *("lora_a", "lora_b", "ranks", "scaling"),
        *("base_layer.weight", "base_layer.bias"),
    ]
    assert all(value.is_contiguous() for value in state.values())
    assert layer.state_dict(keep_vars=True)["lora_b"] is layer.lora_b
    expected = layer(inputs(), plan)
    safetensors.save_file(state, tmp_path / "it.safetensors")
    torch.save(state, tmp_path / "it.pt")
    for read in (
        safetensors.load_file(tmp_path / "it.safetensors"),
        torch.load(tmp_path / "it.pt", weights_only=True),
    ):
        for assign in (False, True):
            fresh = MultiLoRALinear(IN, OUT, 4, 8, dtype=torch.float64)
            fresh.load_state_dict(read, assign=assign)
            assert torch.equal(fresh(inputs(), plan), expected)
            assert fresh.lora_b.stride() == layer.lora_b.stride()
    nested = nn.Sequential(layer)
    assert nested.state_dict()["0.lora_b"].is_contiguous()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copied, plan) -> None:
    layer = make()
    twin, expected = copied(layer), layer(inputs(), plan)
    assert twin.lora_b.stride() == layer.lora_b.stride()
    assert torch.equal(twin(inputs(), plan), expected)
    layer.load_adapter(0, torch.zeros(1, IN), torch.zeros(OUT, 1), 1.0)
    assert torch.equal(twin(inputs(), plan), expected)


def test_an_adapter_out_and_in(plan) -> None:
    layer = make()
    a, b, scaling = layer.state_of(1)
    assert (a.shape, b.shape) == ((8, IN), (OUT, 8))
    assert b.is_contiguous()
    addresses = [p.data_ptr() for p in (layer.lora_a, layer.lora_b, layer.ranks, layer.scaling)]
    small_a, small_b = torch.randn(2, IN), torch.randn(OUT, 2)
    layer.load_adapter(1, small_a, small_b.bfloat16(), 0.25)
    assert addresses == [
        p.data_ptr() for p in (layer.lora_a, layer.lora_b, layer.ranks, layer.scaling)
    ]
    assert layer.ranks.tolist() == [3, 2, 1, 5]
    assert not layer.lora_a[1, 2:].any()
    assert not layer.lora_b[1, :, 2:].any()
    x = inputs()
    rows = x[[i for i, g in enumerate(IDS) if g == 1]]
    expected = (
        layer.base_layer(rows) + 0.25 * rows @ small_a.double().T @ small_b.bfloat16().double().T
    )
    torch.testing.assert_close(layer(x, plan)[[i for i, g in enumerate(IDS) if g == 1]], expected)
    layer.load_adapter(1, a, b, scaling)
    assert torch.equal(layer.lora_b[1], make().lora_b[1])
    layer.load_adapter(1, torch.zeros(0, IN), torch.zeros(OUT, 0), 1.0)
    assert layer.state_of(1).lora_a.shape == (0, IN)
    assert not layer.lora_a[1].any()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((4, (3, IN), (OUT, 3), 1.0), ValueError, r"adapter is 4; expected 0 to 3"),
        ((-1, (3, IN), (OUT, 3), 1.0), ValueError, r"adapter is -1; expected 0 to 3"),
        ((True, (3, IN), (OUT, 3), 1.0), TypeError, r"adapter is a bool; expected an integer"),
        (
            (0, (3, 11), (OUT, 3), 1.0),
            ValueError,
            r"lora_a has shape \(3, 11\); expected \(r, in\)",
        ),
        ((0, (9, IN), (OUT, 9), 1.0), ValueError, r"rank 9; expected at most max_rank = 8"),
        ((0, (3, IN), (OUT, 2), 1.0), ValueError, r"lora_b has shape .* = \(20, 3\)"),
        ((0, (3, IN), (OUT, 3), math.nan), ValueError, r"scaling is nan; expected a finite number"),
        ((0, (3, IN), (OUT, 3), "1"), TypeError, r"scaling is a str; expected a number"),
    ],
)
def test_adapters_that_do_not_fit(arguments, error, message) -> None:
    layer = make()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    index, a, b, scaling = arguments
    with pytest.raises(error, match=message):
        layer.load_adapter(index, torch.ones(a), torch.ones(b), scaling)
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in before.items())


def test_adapters_that_hold_what_they_must_not() -> None:
    layer = make(torch.float16)
    a, b = torch.ones(3, IN), torch.ones(OUT, 3)
    for bad in (math.inf, math.nan, 1e6):  # the last is infinite in fp16
        b[2, 1] = bad
        with pytest.raises(ValueError, match=r"lora_b holds NaN or infinity in torch\.float16"):
            layer.load_adapter(0, a, b, 1.0)
    with pytest.raises(TypeError, match=r"lora_a has dtype torch\.int64"):
        layer.load_adapter(0, a.long(), b, 1.0)
    with pytest.raises(TypeError, match=r"lora_a is a list; expected a dense torch\.Tensor"):
        layer.load_adapter(0, [1.0], b, 1.0)
    assert torch.equal(layer.lora_a, make(torch.float16).lora_a)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_adapters": 0}, ValueError, "num_adapters is 0; expected at least 1"),
        ({"num_adapters": 2.0}, TypeError, "num_adapters is a float; expected an integer"),
        ({"max_rank": 257}, ValueError, "max_rank is 257; expected 1 to 256"),
        ({"ranks": [1, 2]}, ValueError, "ranks has 2 entries; expected 4"),
        ({"ranks": 3}, TypeError, "ranks is a int; expected a list or tuple"),
        ({"ranks": [1, 2, 3, 9]}, ValueError, r"ranks\[3\] is 9; expected 0 to 8"),
        ({"lora_alpha": [1.0]}, ValueError, "lora_alpha has 1 entries; expected 4"),
        ({"lora_alpha": "a"}, TypeError, "lora_alpha is a str; expected a number"),
        ({"scaling": math.inf}, ValueError, "scaling is inf; expected a finite number"),
        ({"dropout": 1.5}, ValueError, "dropout is 1.5; expected a probability"),
    ],
)
def test_arguments(options, error, message) -> None:
    with pytest.raises(error, match=message):
        MultiLoRALinear(IN, OUT, **{"num_adapters": 4, **options})


def test_a_plan_that_does_not_fit(plan) -> None:
    layer = make()
    with pytest.raises(ValueError, match=r"plan is of 11 tokens; expected 3"):
        layer(inputs()[:3], plan)
    with pytest.raises(ValueError, match=r"plan is of 5 adapters; expected 4"):
        layer(inputs(), MultiAdapterPlan(IDS, 5))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant, plan) -> None:
    layer, x = make(), inputs().requires_grad_()
    layer(x, plan).square().sum().backward()
    expected, layer.lora_a.grad = layer.lora_a.grad, None
    with pelt_fast.use_plan(plan):
        checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(layer.lora_a.grad, expected)
    layer.lora_a.grad = None
    checkpoint(layer, x, plan, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(layer.lora_a.grad, expected)
    with pelt_fast.use_plan(plan):
        loss = checkpoint(layer, x, use_reentrant=reentrant).square().sum()
    with pytest.raises(RuntimeError, match=r"run the backward within pelt_fast\.use_plan"):
        loss.backward()
    checkpoint(layer, x, use_reentrant=reentrant).sum().backward()  # the base alone, as before


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("where", ["argument", "block"])
def test_compile(where, plan) -> None:
    layer, x = make(torch.float32), inputs(torch.float32)
    torch._dynamo.reset()
    # a block's plan is read between two graphs
    compiled = torch.compile(layer, fullgraph=where == "argument", backend="aot_eager")
    for ids in (IDS, IDS[::-1]):
        plan.update_(ids)
        expected = torch.autograd.grad(layer(x, plan).square().sum(), [layer.lora_a, layer.lora_b])
        if where == "argument":
            y = compiled(x, plan)
        else:
            with pelt_fast.use_plan(plan):
                y = compiled(x)
        actual = torch.autograd.grad(y.square().sum(), [layer.lora_a, layer.lora_b])
        for value, wanted in zip(actual, expected, strict=True):
            torch.testing.assert_close(value, wanted)


def test_a_place_can_be_loaded_from_itself():
    layer = MultiLoRALinear(6, 5, 2, 4)
    with torch.no_grad():
        layer.lora_a.normal_()
        layer.lora_b.normal_()
    a, b = layer.lora_a[0, 2:4].clone(), layer.lora_b[0, :, 2:4].clone()
    layer.load_adapter(0, layer.lora_a[0, 2:4], layer.lora_b[0, :, 2:4], 1.0)
    state = layer.state_of(0)
    assert torch.equal(state.lora_a, a)
    assert torch.equal(state.lora_b, b)


@pytest.mark.parametrize("scaling", [1e39, 10**400])
def test_scaling_that_does_not_fit_changes_nothing(scaling):
    layer = MultiLoRALinear(6, 5, 2, 4)
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    with pytest.raises(ValueError, match="scaling"):
        layer.load_adapter(0, torch.ones(2, 6), torch.ones(5, 2), scaling)
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())
    with pytest.raises(ValueError, match="scaling"):
        MultiLoRALinear(6, 5, 2, 4, scaling=scaling)
