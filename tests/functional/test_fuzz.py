"""Random cases against the oracle: what nobody thought of. The same ones every time, so that a failure repeats."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pelt_fast.testing.tolerance import assert_accurate
from pelt_fast.testing.workloads import LAYOUTS, Adapter, Case

ROW_LAYOUTS = ["contiguous", "sliced", "transposed", "permuted", "expanded"]
adapters = st.builds(
    Adapter,
    rank=st.integers(1, 40),
    scaling=st.sampled_from([0.5, -1.0, 2.0, 0.0, 16.0]),
    dropout_p=st.sampled_from([0.0, 0.0, 0.1, 0.9, 1.0]),
    bias=st.booleans(),
)
cases = st.builds(
    Case,
    name=st.just(""),
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple),
    in_features=st.integers(1, 140),
    out_features=st.integers(1, 140),
    adapters=st.lists(adapters, min_size=1, max_size=3).map(tuple),
    bias=st.booleans(),
    x_layout=st.sampled_from(ROW_LAYOUTS),
    dy_layout=st.sampled_from(LAYOUTS),
    weight_layout=st.sampled_from(["contiguous", "transposed", "sliced"]),
    adapter_dtype=st.sampled_from([None, None, torch.float32]),
)


GIVEN = given(
    case=cases,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    frozen=st.sets(st.sampled_from(["x", "bias", "lora_a", "lora_b", "lora_bias"]), max_size=3),
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
        name
        for name, _ in inputs.named_tensors()
        if name.partition(".")[0] not in {"weight", "dy", *frozen}
    ]
    results, keep = backend.run(inputs, wanted, seed)
    assert_accurate(results, inputs, keep)


@random_cases(20)
def test_any_case_matches_the_oracle(case, dtype, frozen, seed, backend, device):
    check(case, dtype, frozen, seed, backend, device)


@pytest.mark.slow
@random_cases(100)
def test_many_cases_match_the_oracle(case, dtype, frozen, seed, backend, device):
    check(case, dtype, frozen, seed, backend, device)
