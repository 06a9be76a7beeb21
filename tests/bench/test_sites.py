"""`bench.sites`: every method runs and is timed."""

import pytest

from bench.delta.cases import KINDS
from bench.sites import delta_steps, least, line, steps_of

pytest.importorskip("peft")


@pytest.mark.parametrize("train", [False, True])
def test_methods_at_a_linear(train):
    found = least(steps_of(4, 8, 6, train), 0.0)
    assert list(found) == ["frozen", "IA³, l ⊙ y", "IA³, l ⊙ x", "BitFit"]
    assert all(0 <= t < float("inf") for t in found.values())


@pytest.mark.parametrize("kind", KINDS)
def test_gated_weights(kind):
    assert list(least(delta_steps(4, 8, 6, kind), 0.0)) == ["full", "eager", "ours"]
    assert (
        line("x", {"full": 2.0, "ours": 3.0}, "full")
        == "x: full 2.00 ms (1.00 ×), ours 3.00 ms (1.50 ×)"
    )
