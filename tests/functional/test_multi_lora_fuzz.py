"""Random cases against the oracle: what nobody thought of. The same ones every time, so that a failure repeats."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pelt_fast.testing.inputs import LAYOUTS
from pelt_fast.testing.multi_lora_tolerance import assert_accurate
from pelt_fast.testing.multi_lora_workloads import IDS, MultiLoRACase

ROW_LAYOUTS = ["contiguous", "sliced", "transposed", "permuted", "expanded"]
projections = st.lists(st.tuples(st.integers(1, 140), st.integers(1, 40)), min_size=1, max_size=3)


@st.composite
def cases(draw):
    outs, ranks = zip(*draw(projections), strict=True)
    return MultiLoRACase(
        *("", tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))),
        in_features=draw(st.integers(1, 140)),
        out_features=outs,
        rank=ranks,
        adapters=draw(st.integers(1, 9)),
        ids=draw(st.sampled_from(sorted(IDS))),
        mixed_ranks=draw(st.booleans()),
        base=draw(st.booleans()),
        row_scale=draw(st.sampled_from(["", "token", "sample", "one", "number", "zero"])),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.1, 0.9, 1.0])),
        x_layout=draw(st.sampled_from(ROW_LAYOUTS)),
        dy_layout=draw(st.sampled_from(LAYOUTS)),
        base_layout=draw(st.sampled_from([*ROW_LAYOUTS, "fused"])),
        a_layout=draw(st.sampled_from(["contiguous", "transposed", "sliced"])),
        b_layout=draw(st.sampled_from(["contiguous", "rank_major", "sliced", "permuted"])),
        adapter_dtype=draw(st.sampled_from([None, None, torch.float32])),
        scale_dtype=draw(st.sampled_from([None, torch.float32])),
    )


GIVEN = given(
    case=cases(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    frozen=st.sets(st.sampled_from(["x", "base", "lora_a", "lora_b", "row_scale"]), max_size=3),
    seed=st.integers(0, 2**31),
)


def random_cases(examples):
    def decorate(test):
        checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
        return settings(
            max_examples=examples, derandomize=True, deadline=None, suppress_health_check=checks
        )(GIVEN(test))

    return decorate


def check(case, dtype, frozen, seed, backend, device):
    inputs = case.make(dtype, device, seed)
    wanted = [
        name for name, _ in inputs.named_tensors() if name.partition(".")[0] not in {"dy", *frozen}
    ]
    results, keep = backend.run(inputs, wanted, seed)
    assert_accurate(results, inputs, keep)


@random_cases(10)
def test_any_case_matches_the_oracle(case, dtype, frozen, seed, backend, device):
    check(case, dtype, frozen, seed, backend, device)


@pytest.mark.slow
@random_cases(100)
def test_many_cases_match_the_oracle(case, dtype, frozen, seed, backend, device):
    check(case, dtype, frozen, seed, backend, device)
