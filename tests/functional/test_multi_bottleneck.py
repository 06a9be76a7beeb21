"""Bottleneck adapters of which every token names its own: each row is that of its adapter alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pelt_fast import MultiAdapterPlan
from pelt_fast import functional as PF

T, D, M, L = 23, 20, 6, 5
WIDTHS = [6, 0, 3, 1, 6]
IDS = [3, -1, 0, 4, 4, 2, 9, 1, 0, 0, 3, 2, -7, 1, 4, 0, 2, 2, 3, -1, 4, 0, 0]
NAMES = (
    "x",
    "down",
    "down_bias",
    "up",
    "up_bias",
    "scaling",
    "gate",
    "other",
    "ln_weight",
    "ln_bias",
)
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.bfloat16: 4e-2,
    torch.float16: 6e-3,
}  # of the largest element; the kernels' own errors are held to the oracle in test_adapter_values


@pytest.fixture(params=["torch", "cpp", "auto"])
def on(request):
    if request.param == "cpp":
        pytest.importorskip("pelt_fast._C")
    return request.param


def operands(dtype, seed=0):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g) * scale).to(dtype)

    return {
        "x": draw(T, D),
        "down": draw(L, M, D, scale=D**-0.5),
        "down_bias": draw(L, M, scale=0.3),
        "up": draw(L, D, M, scale=M**-0.5),
        "up_bias": draw(L, D, scale=0.3),
        "scaling": draw(L, scale=0.5) + 1,
        "gate": draw(T, 1) * 0.5 + 1,
        "other": draw(T, D),
        "ln_weight": draw(D) * 0.2 + 1,
        "ln_bias": draw(D, scale=0.2),
    }


def spoil(o):
    """What lies beyond an adapter's width may hold anything."""
    for g, width in enumerate(WIDTHS):
        o["down"][g, width:] = float("nan")
        o["down_bias"][g, width:] = float("nan")
        o["up"][g, :, width:] = float("nan")
    return o


def ours(o, ids=IDS, rows=slice(None), **options):
    plan = MultiAdapterPlan(ids, L)
    x = o["x"][rows]
    return PF.multi_bottleneck(
        x, o["down"], o["down_bias"], o["up"], o["up_bias"], plan, activation="gelu",
        scaling=o["scaling"], widths=WIDTHS, gate=o["gate"][rows], residual=(x, o["other"][rows]),
        ln_weight=o["ln_weight"], ln_bias=o["ln_bias"], **options,
    )  # fmt: skip


def eager(o):
    rows = []
    for t, g in enumerate(IDS):
        y = o["x"][t] + o["other"][t]
        if 0 <= g < L and WIDTHS[g]:
            w = WIDTHS[g]
            q = o["down"][g, :w] @ o["x"][t] + o["down_bias"][g, :w]
            u = o["up"][g, :, :w] @ F.gelu(q) + o["up_bias"][g]
            y = y + o["gate"][t] * o["scaling"][g] * u
        rows.append(F.layer_norm(y, (D,), o["ln_weight"], o["ln_bias"]))
    return torch.stack(rows)


def with_gradients(run, o, dy):
    leaves = {name: t.detach().clone().requires_grad_() for name, t in o.items()}
    y = run(leaves)
    found = torch.autograd.grad(y, [leaves[n] for n in NAMES], dy.to(y.dtype), allow_unused=True)
    return {"y": y.detach(), **dict(zip(NAMES, found, strict=True))}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_row_is_its_adapters(dtype, on):
    o, dy = spoil(operands(dtype)), torch.randn(T, D, generator=torch.Generator().manual_seed(1))
    exact = with_gradients(eager, {n: t.double() for n, t in o.items()}, dy)
    found = with_gradients(lambda leaves: ours(leaves, backend=on), o, dy)
    for name, wanted in exact.items():
        assert found[name].dtype == dtype
        error = (found[name].double() - wanted).abs().max() / wanted.abs().max()
        assert error < TOLERANCE[dtype], (name, float(error))


def test_gradients_beyond_a_width_and_of_absent_adapters_are_zeros(on):
    o = spoil(operands(torch.float32))
    found = with_gradients(lambda leaves: ours(leaves, [2] * T, backend=on), o, torch.ones(T, D))
    for name in ("down", "down_bias", "up"):
        grad = found[name].movedim(-1, 1) if name == "up" else found[name]
        assert grad[2, : WIDTHS[2]].abs().sum() > 0
        assert not grad[2, WIDTHS[2] :].any()
        assert not grad[[0, 1, 3, 4]].any()


def test_an_adapter_alone_and_among_neighbours_has_the_same_bits(on):
    o, dy = spoil(operands(torch.float32)), torch.randn(T, D)
    for g in (0, 3):
        mine = torch.tensor([i for i, other in enumerate(IDS) if other == g])
        mixed = with_gradients(lambda leaves: ours(leaves, backend=on), o, dy)
        alone = with_gradients(
            lambda leaves, g=g, mine=mine: ours(leaves, [g] * len(mine), mine, backend=on),
            o,
            dy[mine],
        )
        assert torch.equal(mixed["y"][mine], alone["y"])
        for name in ("down", "down_bias", "up", "up_bias", "scaling"):
            assert torch.equal(mixed[name][g], alone[name][g]), name


def test_lora_rows_adapter_rows_both_and_base_rows_in_one_batch(on):
    torch.manual_seed(0)
    ranks, widths = [3, 0, 2, 0], [0, 4, 4, 0]  # LoRA, adapter, both, neither
    ids = [0, 1, 2, 3, -1, 2, 1, 0]
    x, weight = torch.randn(8, D), torch.randn(D, D)
    a, b = torch.randn(4, 3, D), torch.randn(4, D, 3)
    down, up = torch.randn(4, 4, D), torch.randn(4, D, 4)
    plan = MultiAdapterPlan(ids, 4)
    h = PF.multi_lora(x, a, b, plan, 0.5, ranks=ranks, base_out=x @ weight.T, backend=on)
    y = PF.multi_bottleneck(h, down, None, up, None, plan, widths=widths, residual=h, backend=on)
    for t, g in enumerate(ids):
        wanted = x[t] @ weight.T
        if g in (0, 2):
            wanted = wanted + 0.5 * (x[t] @ a[g, : ranks[g]].T @ b[g, :, : ranks[g]].T)
        if g in (1, 2):
            wanted = wanted + F.relu(wanted @ down[g].T) @ up[g].T
        torch.testing.assert_close(y[t], wanted, rtol=1e-4, atol=1e-4)


def test_dropout_keeps_the_mean_and_drops_nothing_outside_of_training(on):
    o = operands(torch.float32)
    plan = MultiAdapterPlan([0] * 2000 + [-1] * 50, L)
    x = o["x"][:1].expand(2050, D)

    def call(training):
        torch.manual_seed(0)
        return PF.multi_bottleneck(
            x, o["down"], o["down_bias"], o["up"], o["up_bias"], plan,
            dropout_p=0.25, training=training, backend=on,
        )  # fmt: skip

    dropped, kept = call(True), call(False)
    assert torch.equal(kept[0], kept[1999])
    assert abs((dropped[:2000] == 0).float().mean() - 0.25) < 0.01
    torch.testing.assert_close(dropped[:2000].mean(0), kept[0], rtol=0.1, atol=0.02)
    assert not dropped[2000:].any()


@pytest.mark.parametrize("shape", [(0, D), (2, 0, D), (D,), (1, 2, 3, D)])
def test_shapes(shape, on):
    o = operands(torch.float32)
    x = torch.randn(shape)
    rows = x.numel() // D
    plan = MultiAdapterPlan([t % 3 - 1 for t in range(rows)], L)
    weights = (o["down"], o["down_bias"], o["up"], o["up_bias"])
    y = PF.multi_bottleneck(x, *weights, plan, residual=x, backend=on)
    flat = PF.multi_bottleneck(
        x.reshape(-1, D), *weights, plan, residual=x.reshape(-1, D), backend=on
    )
    assert torch.equal(y.reshape(-1, D), flat)
    assert y.shape == x.shape


def test_no_token_has_an_adapter(on):
    o = operands(torch.float32)
    for ids in ([-1] * T, [1] * T):
        y = ours(o, ids, backend=on)
        wanted = F.layer_norm(o["x"] + o["other"], (D,), o["ln_weight"], o["ln_bias"])
        torch.testing.assert_close(y, wanted)


def test_under_autocast(on):
    o = operands(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = PF.multi_bottleneck(
            o["x"], o["down"], None, o["up"], None, MultiAdapterPlan(IDS, L), backend=on
        )
    plain = PF.multi_bottleneck(o["x"], o["down"], None, o["up"], None, MultiAdapterPlan(IDS, L))
    torch.testing.assert_close(y.float(), plain, rtol=0.1, atol=0.1)


GOOD = operands(torch.float32)
BAD = {
    "x": ({"x": [1.0]}, TypeError, ["x", "list"]),
    "down_weight": ({"down_weight": GOOD["down"][0]}, ValueError, ["down_weight", "(L, M, d)"]),
    "up_weight": ({"up_weight": GOOD["up"][:3]}, ValueError, ["up_weight", "(5, 20, 6)"]),
    "down_bias": ({"down_bias": GOOD["up_bias"]}, ValueError, ["down_bias", "(5, 6)"]),
    "up_bias": ({"up_bias": GOOD["up_bias"].double()}, TypeError, ["up_bias", "float64"]),
    "plan": ({"plan": [0] * T}, TypeError, ["plan", "list", "MultiAdapterPlan"]),
    "plan_tokens": ({"plan": MultiAdapterPlan([0], L)}, ValueError, ["plan", "1 tokens", "23"]),
    "plan_adapters": ({"plan": MultiAdapterPlan(IDS, 3)}, ValueError, ["plan", "3 adapters", "5"]),
    "widths": ({"widths": [1, 2]}, ValueError, ["widths", "2 entries", "(5,)"]),
    "widths_high": ({"widths": [7] * L}, ValueError, ["widths", "7", "6"]),
    "widths_type": ({"widths": [1.5] * L}, TypeError, ["widths", "integers"]),
    "scaling": ({"scaling": torch.ones(3)}, ValueError, ["scaling", "(3,)", "(5,)"]),
    "scaling_nan": ({"scaling": float("nan")}, ValueError, ["scaling", "finite"]),
    "gate": ({"gate": torch.ones(7, 1)}, ValueError, ["gate", "(7, 1)", "(23, 1)"]),
    "residual": ({"residual": torch.ones(T, 3)}, ValueError, ["residual", "(23, 3)", "(23, 20)"]),
    "ln_bias": ({"ln_bias": torch.ones(D)}, ValueError, ["ln_bias", "ln_weight"]),
    "ln_weight": ({"ln_weight": torch.ones(3)}, ValueError, ["ln_weight", "(3,)"]),
    "dropout_p": ({"dropout_p": 1.5}, ValueError, ["dropout_p", "1.5"]),
}


@pytest.mark.parametrize(("changed", "error", "words"), BAD.values(), ids=BAD)
def test_bad_arguments(changed, error, words):
    call = {
        "x": GOOD["x"],
        "down_weight": GOOD["down"],
        "down_bias": GOOD["down_bias"],
        "up_weight": GOOD["up"],
        "up_bias": GOOD["up_bias"],
        "plan": MultiAdapterPlan(IDS, L),
    }
    with pytest.raises(error) as caught:
        PF.multi_bottleneck(**{**call, **changed})
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"activation": "nonsense"}, ValueError),
        ({"dropout_p": 7.0}, ValueError),
        ({"backend": "zzz"}, ValueError),
        ({"gate": torch.ones(T, 1).int()}, TypeError),
        ({"scaling": torch.ones(L).int()}, TypeError),
        ({"eps": -1.0, "ln_weight": torch.ones(D)}, ValueError),
    ],
    ids=["activation", "dropout_p", "backend", "gate", "scaling", "eps"],
)
def test_bad_arguments_where_no_token_has_an_adapter(changed, error):
    o, plan = GOOD, MultiAdapterPlan([-1] * T, L)
    with pytest.raises(error, match=next(iter(changed))):
        PF.multi_bottleneck(o["x"], o["down"], None, o["up"], None, plan, **changed)


@pytest.mark.parametrize("ids", [[-1] * T, IDS], ids=["none", "mixed"])
def test_bf16_under_fp16_autocast(ids):
    o = operands(torch.bfloat16)
    plan = MultiAdapterPlan(ids, L)
    with torch.autocast("cpu", torch.float16):
        y = PF.multi_bottleneck(o["x"], o["down"], None, o["up"], None, plan, residual=o["x"])
    assert y.isfinite().all()


def test_small_changes_of_a_narrow_adapter_are_noticed(on):
    o = operands(torch.float32)
    up = o["up"].requires_grad_()
    plan = MultiAdapterPlan([2] * T, L)

    def call():
        return PF.multi_bottleneck(
            o["x"], o["down"], None, up, None, plan, widths=WIDTHS, backend=on
        ).detach()

    for row in range(D):
        before = call()
        up.data[2, row, 1] += 1.0  # counted by no version
        assert not torch.equal(call()[:, row], before[:, row])
