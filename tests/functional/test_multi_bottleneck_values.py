"""Batched bottleneck adapters against fp64: every adapter's rows and gradients are held to its own oracle."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch

from pelt_fast import MultiAdapterPlan
from pelt_fast import functional as PF
from pelt_fast.random import new_seed, philox_mask
from pelt_fast.testing import adapter_tolerance, tolerance
from pelt_fast.testing.adapter_workloads import AdapterInputs
from pelt_fast.testing.inputs import draw

PARAMETERS = ("down", "down_bias", "up", "up_bias", "scale", "ln_weight", "ln_bias")


@dataclass(frozen=True)
class Case:
    """T rows of d features; ``ids`` repeats over them."""

    tokens: int
    features: int
    widths: tuple[int, ...]
    ids: tuple[int, ...]
    activation: str = "gelu"
    biases: bool = True
    scale: bool = True
    gate: bool = True
    residuals: str = "both"  # "x", "other", ""
    layernorm: bool = True
    dropout_p: float = 0.0
    layout: str = "contiguous"
    param_dtype: torch.dtype | None = None

    def make(self, dtype: torch.dtype) -> dict[str, Any]:
        g = torch.Generator().manual_seed(0)
        t, d, m, n = self.tokens, self.features, max(self.widths), len(self.widths)

        def of(*shape, std=1.0, mean=0.0, kind=self.param_dtype or dtype, layout=self.layout):
            value = draw(shape, std, layout, kind, "cpu", g)
            return value + torch.tensor(mean, dtype=kind) if mean else value

        return {
            "x": of(t, d, kind=dtype),
            "other": of(t, d, kind=dtype) if self.residuals in ("both", "other") else None,
            "down": of(n, m, d, std=d**-0.5),
            "down_bias": of(n, m, std=0.5) if self.biases else None,
            "up": of(n, d, m, std=m**-0.5),
            "up_bias": of(n, d, std=0.5) if self.biases else None,
            "scale": of(n, std=0.25, mean=1.0) if self.scale else None,
            "gate": of(t, 1, std=0.25, mean=1.0) if self.gate else None,
            "ln_weight": of(d, std=0.25, mean=1.0) if self.layernorm else None,
            "ln_bias": of(d, std=0.5) if self.layernorm else None,
            "dy": of(t, d, kind=dtype),
        }

    @property
    def all_ids(self) -> list[int]:
        return [self.ids[t % len(self.ids)] for t in range(self.tokens)]


MIXED = (3, -1, 0, 4, 4, 2, 9, 1, 0, 0, 3, 2, -7)
CASES = {
    "everything": Case(23, 20, (6, 0, 3, 1, 6), MIXED, dropout_p=0.3),
    "plain": Case(
        *(9, 24, (8, 5), (1, 0, 1)), "relu", False, False, False, residuals="", layernorm=False
    ),
    "wide": Case(150, 33, (40, 17, 8), (0, 0, 1, 0), "silu", residuals="other"),
    "views": Case(37, 40, (24, 7), (0, 1, -1), "tanh", residuals="x", layout="transposed"),
    "no_layernorm": Case(21, 19, (5, 9), (1, 0), "sigmoid", residuals="both", layernorm=False),
    "one_row": Case(1, 8, (3, 2), (1,), "gelu_tanh"),
    "half_parameters_wide": Case(23, 24, (8, 3), (1, 0, -1), param_dtype=torch.float32),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
GRID = [
    pytest.param(name, dtype, id=f"{name}-{str(dtype)[6:]}")
    for name in CASES
    for dtype in DTYPES
    if name in ("everything", "wide") or dtype == torch.float32 or "half" in name
    if not (name == "half_parameters_wide" and dtype not in (torch.bfloat16, torch.float16))
]


@pytest.fixture(params=["reference", "torch", "cpp"])
def on(request):
    if request.param == "cpp":
        pytest.importorskip("pelt_fast._C")
    return request.param


def call(case: Case, o: dict[str, Any], plan: MultiAdapterPlan, **options: Any) -> torch.Tensor:
    named = {"both": (o["x"], o["other"]), "x": o["x"], "other": o["other"], "": None}
    return PF.multi_bottleneck(
        *(o["x"], o["down"], o["down_bias"], o["up"], o["up_bias"], plan),
        activation=case.activation,
        scaling=1.5 if o["scale"] is None else o["scale"],
        widths=case.widths,
        gate=o["gate"],
        residual=named[case.residuals],
        ln_weight=o["ln_weight"],
        ln_bias=o["ln_bias"],
        dropout_p=case.dropout_p,
        training=True,
        **options,
    )


def results(case, o, plan, **options):
    leaves = {n: None if t is None else t.detach().requires_grad_(n != "dy") for n, t in o.items()}
    y = call(case, leaves, plan, **options)
    names = [n for n, t in leaves.items() if t is not None and n != "dy"]
    found = torch.autograd.grad(y, [leaves[n] for n in names], o["dy"])
    return {"y": y.detach(), **dict(zip(names, found, strict=True))}


def of_adapter(case: Case, o: dict[str, Any], g: int, rows: list[int]) -> AdapterInputs:
    """The call of ``bottleneck_adapter`` that these rows are; of no adapter: one whose U is zero."""
    g, width = (g, case.widths[g]) if 0 <= g < len(case.widths) else (0, 0)
    up, none = o["up"][g, :, : width or 1].contiguous(), width == 0

    def part(name):
        return None if o[name] is None or none else o[name][g]

    return AdapterInputs(
        x=o["x"][rows].contiguous(),
        skip=None if o["other"] is None else o["other"][rows],
        down=o["down"][g, : width or 1].contiguous(),
        down_bias=None if part("down_bias") is None else part("down_bias")[:width],
        up=torch.zeros_like(up) if none else up,
        up_bias=part("up_bias"),
        scale=None if o["scale"] is None else o["scale"][g : g + 1],
        gate=None if o["gate"] is None else o["gate"][rows],
        pre_weight=None,
        pre_bias=None,
        ln_weight=o["ln_weight"],
        ln_bias=o["ln_bias"],
        dy=o["dy"][rows],
        activation=case.activation,
        scaling=1.5 if o["scale"] is None else 1.0,
        pre_eps=0.0,
        eps=1e-5,
        dropout_p=case.dropout_p,
        skip_in=False,
        residual_x=case.residuals in ("both", "x"),
        residual_skip=case.residuals in ("both", "other"),
    )


def rows_of(ids, g, adapters):
    return [t for t, i in enumerate(ids) if (i if 0 <= i < adapters else -1) == g]


@cache
def yardsticks(name: str, dtype: torch.dtype):
    """For each adapter what its results are compared with: the oracle, eager, the bounds."""
    case = CASES[name]
    o, ids = case.make(dtype), case.all_ids
    torch.manual_seed(0)
    seed = new_seed(torch.device("cpu"))
    keep = (
        philox_mask(seed, (case.tokens, case.features), case.dropout_p) if case.dropout_p else None
    )
    found = {}
    for g in range(-1, len(case.widths)):
        rows = rows_of(ids, g, len(case.widths))
        if rows:
            inputs = of_adapter(case, o, g, rows)
            mask = None if keep is None else keep[rows]
            found[g] = rows, adapter_tolerance.yardsticks(inputs, mask)
    return o, found


@pytest.mark.parametrize(("name", "dtype"), GRID)
def test_against_the_oracle(name, dtype, on):
    case = CASES[name]
    o, found = yardsticks(name, dtype)
    plan = MultiAdapterPlan(case.all_ids, len(case.widths))
    torch.manual_seed(0)
    actual = results(case, o, plan, backend=on)
    for key, value in actual.items():
        wanted = o["x"] if key == "y" else o[key]
        assert (value.shape, value.dtype) == (wanted.shape, wanted.dtype), key
    shared: dict[str, list[Any]] = {"ln_weight": [], "ln_bias": []}
    for g, (rows, (exact, eager, bounds)) in found.items():
        of_rows = {"y": "y", "x": "x", "other": "skip", "gate": "gate"}
        mine = {other: actual[k][rows] for k, other in of_rows.items() if k in actual}
        width = case.widths[g] if g >= 0 else 0
        for k in ("down", "down_bias", "up", "up_bias", "scale"):
            if k not in actual or g < 0:
                continue
            grad = actual[k][g]
            if width == 0:
                assert not grad.any()
                continue
            if k in ("down", "down_bias"):
                assert not grad[width:].any()
                grad = grad[:width]
            if k == "up":
                assert not grad[:, width:].any()
                grad = grad[:, :width]
            mine[k] = grad.reshape(exact[k].shape)
        tolerance.assert_all_ok(tolerance.compare(mine, exact, eager, bounds))
        for k, parts in shared.items():
            if k in exact:
                parts.append((exact[k], eager[k], *bounds[k]))
    for k, parts in shared.items():
        if parts:
            exact, eager, most, mean = (
                sum(t.double() for t in p) for p in zip(*parts, strict=True)
            )
            compared = ({k: actual[k]}, {k: exact}, {k: eager}, {k: (most, mean)})
            tolerance.assert_all_ok(tolerance.compare(*compared))
    absent = set(range(len(case.widths))) - set(found)
    for g in absent:
        for k in ("down", "down_bias", "up", "up_bias", "scale"):
            assert k not in actual or not actual[k][g].any()


# what one adapter computes does not depend on who else is in the batch, to the bit

ALONE = replace(
    CASES["wide"], widths=(40, 17, 8, 0), ids=(0, 0, 1, 0, 3, 2, -1), residuals="both", tokens=200
)
PER_ROW = ("y", "x", "other", "gate")


def take(o, rows):
    return {n: t if t is None or n in PARAMETERS else t[rows].contiguous() for n, t in o.items()}


def orders(ids):
    sort = sorted(range(len(ids)), key=lambda t: (ids[t] < 0, ids[t]))
    return {
        "alone": [t for t in range(len(ids)) if ids[t] == 0],
        "sorted": sort,
        "few": [t for t in range(len(ids)) if ids[t] == 0 or t % 3],
        "last": [t for t in reversed(range(len(ids))) if ids[t] != 0]
        + [t for t in range(len(ids)) if ids[t] == 0],
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("on", ["torch", "cpp"])
def test_an_adapter_among_any_neighbours_has_the_same_bits(dtype, on):
    o, ids = ALONE.make(dtype), ALONE.all_ids
    mixed = results(ALONE, o, MultiAdapterPlan(ids, 4), backend=on)
    where = {t: i for i, t in enumerate(range(len(ids)))}
    for how, rows in orders(ids).items():
        found = results(
            ALONE, take(o, rows), MultiAdapterPlan([ids[t] for t in rows], 4), backend=on
        )
        places = [i for i, t in enumerate(rows) if ids[t] == 0]
        mine = [where[rows[i]] for i in places]
        for name, value in found.items():
            if name in PER_ROW:
                assert torch.equal(value[places], mixed[name][mine]), (how, name)
            elif not name.startswith("ln"):
                assert torch.equal(value[0], mixed[name][0]), (how, name)
            elif how == "sorted" and on == "cpp":  # sums over all rows, in the plan's order
                assert torch.equal(value, mixed[name]), (how, name)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_any_number_of_threads_gives_the_same_bits(dtype):
    pytest.importorskip("pelt_fast._C")
    case = replace(ALONE, tokens=150, features=192)  # enough products for more than one thread
    o, plan = case.make(dtype), MultiAdapterPlan(case.all_ids, 4)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            found.append(results(case, o, plan, backend="cpp"))
        finally:
            torch.set_num_threads(1)
    for other in found[1:]:
        for name, value in found[0].items():
            assert torch.equal(value, other[name]), name


def test_no_neighbours_nan_comes_through(on):
    o, ids = ALONE.make(torch.float32), ALONE.all_ids
    clean = results(ALONE, o, MultiAdapterPlan(ids, 4), backend=on)
    mine = torch.tensor(ids) == 1
    for name in ("x", "other", "gate", "dy"):
        o[name] = torch.where(mine[:, None], o[name], torch.nan)
    for name in ("down", "down_bias", "up", "up_bias", "scale"):
        mask = (torch.arange(4) == 1).reshape(-1, *[1] * (o[name].dim() - 1))
        o[name] = torch.where(mask, o[name], torch.nan)
    found = results(ALONE, o, MultiAdapterPlan(ids, 4), backend=on)
    for name, value in found.items():
        part = mine if name in PER_ROW else 1
        if not name.startswith("ln"):
            torch.testing.assert_close(value[part], clean[name][part])


@pytest.mark.parametrize("p", [0.3, 1.0])
def test_the_mask_of_a_token_is_its_rows(p, on):
    """Whatever the adapters: with D = 0 and U = 0 what is left of b_U = 1 shows it."""
    tokens, d = 37, 30
    weights = (torch.zeros(3, 2, d), None, torch.zeros(3, d, 2), torch.ones(3, d))
    for ids in (
        [0] * tokens,
        [2 - t % 3 for t in range(tokens)],
        [t % 5 - 1 for t in range(tokens)],
    ):
        torch.manual_seed(5)
        keep = philox_mask(new_seed(torch.device("cpu")), (tokens, d), p)
        torch.manual_seed(5)
        plan = MultiAdapterPlan(ids, 3)
        x = torch.ones(tokens, d)
        y = PF.multi_bottleneck(x, *weights, plan, dropout_p=p, training=True, backend=on)
        has = torch.tensor([0 <= g < 3 for g in ids])[:, None]
        torch.testing.assert_close(y, torch.where(keep & has, 1 / (1 - p) if p < 1 else 0.0, 0.0))


def test_only_the_gradients_that_are_asked_for(on):
    """Each alone, and all but each: the same numbers as all together."""
    case = CASES["everything"]
    o, plan = case.make(torch.float32), MultiAdapterPlan(case.all_ids, 5)

    def grads(wanted):
        leaves = {
            n: None if t is None else t.detach().requires_grad_(n in wanted) for n, t in o.items()
        }
        torch.manual_seed(0)
        y = call(case, leaves, plan, backend=on)
        return dict(
            zip(wanted, torch.autograd.grad(y, [leaves[n] for n in wanted], o["dy"]), strict=True)
        )

    names = [n for n in o if n != "dy"]
    full = grads(names)
    for name in names:
        for wanted in ([name], [n for n in names if n != name]):
            for n, value in grads(wanted).items():
                torch.testing.assert_close(value, full[n], rtol=1e-5, atol=1e-6)


def test_widths_in_a_tensor_are_clamped(on):
    case = CASES["plain"]
    o, plan = case.make(torch.float32), MultiAdapterPlan(case.all_ids, 2)
    weights = (o["x"], o["down"], None, o["up"], None, plan)
    for dtype in (torch.int32, torch.int64):
        given = PF.multi_bottleneck(
            *weights, widths=torch.tensor([99, -3], dtype=dtype), backend=on
        )
        assert torch.equal(given, PF.multi_bottleneck(*weights, widths=[8, 0], backend=on))


def test_a_callable_activation_is_composed():
    case = replace(CASES["everything"], dropout_p=0.3)
    o, plan = case.make(torch.float64), MultiAdapterPlan(case.all_ids, 5)
    for options in ({}, {"backend": "torch"}):
        torch.manual_seed(0)
        expected = results(case, o, plan, backend="torch")
        torch.manual_seed(0)
        found = results(replace(case, activation=torch.nn.functional.gelu), o, plan, **options)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value)
