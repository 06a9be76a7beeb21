"""What an adapter computes does not depend on who else is in the batch: to the bit.

Its rows of y and dx, and its dA and dB, are those of a batch of its tokens alone, in the same order.
"""

import random
from dataclasses import replace

import pytest
import torch

from pelt_fast import MultiAdapterPlan
from pelt_fast.testing.multi_lora_workloads import MultiLoRACase

SMALL = MultiLoRACase(
    *("small", (61,), 40, (24, 33), 4, (8, 19)),
    mixed_ranks=True,
    row_scale="token",
    b_layout="rank_major",
)
# more than two chunks of 512 tokens of one adapter
LARGE = MultiLoRACase("large", (1300,), 24, (40,), 2, (3,), scaling=(0.5, -2.0))
WIDE = MultiLoRACase("wide", (40,), 520, (300,), 3, (16,), row_scale="token")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def order(inputs, g, how):
    """Rows in which those of adapter g keep their order."""
    rows = range(inputs.tokens)
    mine = [t for t in rows if inputs.ids[t] == g]
    others = [t for t in rows if inputs.ids[t] != g]
    if how == "alone":
        return mine
    if how == "first":
        return mine + others
    if how == "last":
        return others[::-1] + mine
    if how == "sorted":
        return sorted(rows, key=lambda t: inputs.ids[t])
    if how == "few":  # half of the others
        kept = set(mine + others[::2])
        return [t for t in rows if t in kept]
    if how == "many":  # each of the others five times
        return [t for t in rows for _ in range(1 if t in set(mine) else 5)]
    draw = random.Random(0)
    places = set(draw.sample(rows, len(mine)))
    draw.shuffle(others)
    left, right = iter(mine), iter(others)
    return [next(left) if t in places else next(right) for t in rows]


def assert_same(one, other, g, rows_of_one, rows_of_other, of_other=None):
    """The results of adapter g, which is number ``of_other`` in the other batch."""
    of_other = g if of_other is None else of_other
    for name, value in one.items():
        if name.startswith("lora"):
            assert torch.equal(value[g], other[name][of_other]), name
        else:
            assert torch.equal(value[rows_of_one], other[name][rows_of_other]), name


def rows_of(inputs, g):
    return [t for t, adapter in enumerate(inputs.ids) if adapter == g]


@pytest.fixture(autouse=True)
def not_the_reference(backend):
    if backend.name == "reference":
        pytest.skip("the reference multiplies vectors, and BLAS adds as they are aligned")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [SMALL, LARGE, WIDE], ids=str)
def test_among_any_neighbours(case, dtype, backend, device):
    inputs = case.make(dtype, device)
    mixed, _ = backend.run(inputs)
    for how in ("alone", "first", "last", "sorted", "few", "many", "shuffled"):
        for g in range(case.adapters) if how == "alone" else (case.adapters - 2,):
            changed = inputs.rows(order(inputs, g, how))
            results, _ = backend.run(changed)
            assert_same(mixed, results, g, rows_of(inputs, g), rows_of(changed, g))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [SMALL, LARGE, WIDE], ids=str)
def test_in_a_layer_of_its_own(case, dtype, backend, device):
    """Without the other adapters' parameters: L = 1."""
    inputs = case.make(dtype, device)
    mixed, _ = backend.run(inputs)
    for g in range(case.adapters):
        mine = inputs.rows(order(inputs, g, "alone"))
        own = replace(
            mine,
            lora_a=tuple(a[g : g + 1] for a in mine.lora_a),
            lora_b=tuple(b[g : g + 1] for b in mine.lora_b),
            scaling=tuple(s[g : g + 1] for s in mine.scaling),
            ranks=tuple(None if r is None else r[g : g + 1] for r in mine.ranks),
            plan=MultiAdapterPlan([0] * mine.tokens, 1, device=device),
            ids=(0,) * mine.tokens,
        )
        results, _ = backend.run(own)
        assert_same(mixed, results, g, rows_of(inputs, g), list(range(own.tokens)), 0)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("case", [SMALL, WIDE], ids=str)
def test_with_dropout_among_any_adapters_of_the_neighbours(case, dtype, backend, device):
    """The mask of a token is its row's, so here the rows stay, and the neighbours change their adapters."""
    inputs = replace(case, dropout_p=0.3).make(dtype, device)
    mixed, _ = backend.run(inputs)
    g, count = 1, case.adapters
    rows = rows_of(inputs, g)
    others = [a for a in range(-1, count + 1) if a != g]
    for ids in (
        [g if a == g else -1 for a in inputs.ids],
        [g if a == g else 0 for a in inputs.ids],
        [g if a == g else others[t % len(others)] for t, a in enumerate(inputs.ids)],
    ):
        results, _ = backend.run(inputs.with_ids(tuple(ids)))
        assert_same(mixed, results, g, rows, rows)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_among_neighbours_that_hold_nan(dtype, backend, device):
    inputs = SMALL.make(dtype, device)
    mixed, _ = backend.run(inputs)
    g = 1
    mine = torch.zeros(inputs.tokens, dtype=torch.bool, device=device)
    mine[rows_of(inputs, g)] = True
    poisoned = inputs.map(
        lambda name, t: (
            torch.where(mine[:, None], t, torch.nan)
            if not name.startswith("lora")
            else torch.where((torch.arange(4, device=device) == g)[:, None, None], t, torch.nan)
        )
    )
    results, _ = backend.run(poisoned)
    rows = rows_of(inputs, g)
    assert_same(mixed, results, g, rows, rows)


def test_one_projection_or_several(backend, device):
    """Projections that share x are those of calls of their own; the first draws the same mask."""
    inputs = replace(SMALL, dropout_p=0.3).make(torch.float32, device)
    together, _ = backend.run(inputs)
    first = replace(
        inputs,
        **{name: getattr(inputs, name)[:1] for name in ("lora_a", "lora_b", "base", "ranks", "scaling")},
        dy=inputs.dy[:, :24],
    )  # fmt: skip
    alone, _ = backend.run(first)
    assert torch.equal(together["y"][:, :24], alone["y"])
    for name in ("lora_a.0", "lora_b.0"):
        assert torch.equal(together[name], alone[name]), name
