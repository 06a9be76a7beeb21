"""Random cases against the oracle: what nobody thought of. The same ones every time, so that a failure repeats."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pelt_fast.functional import ACTIVATIONS
from pelt_fast.testing.adapter_tolerance import assert_accurate
from pelt_fast.testing.adapter_workloads import NAMES, AdapterCase
from pelt_fast.testing.inputs import LAYOUTS

ROW_LAYOUTS = ["contiguous", "sliced", "transposed", "permuted", "expanded"]
cases = st.builds(
    AdapterCase,
    name=st.just(""),
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple),
    features=st.integers(1, 140),
    bottleneck=st.integers(1, 70),
    activation=st.sampled_from(ACTIVATIONS),
    down_bias=st.booleans(),
    up_bias=st.booleans(),
    scaling=st.sampled_from([1.0, 0.5, -1.0, 4.0, 0.0]),
    gate=st.sampled_from(["", "token", "sample"]),
    skip_in=st.booleans(),
    residual_x=st.booleans(),
    residual_skip=st.booleans(),
    pre_ln=st.booleans(),
    post_ln=st.booleans(),
    ln_bias=st.booleans(),
    # one feature has no variance: 1e-12 would make 1e6 of 1 / deviation, which PyTorch rounds to fp16
    pre_eps=st.sampled_from([1e-6, 1e-5]),
    eps=st.sampled_from([1e-6, 1e-2]),
    dropout_p=st.sampled_from([0.0, 0.0, 0.1, 0.9, 1.0]),
    x_layout=st.sampled_from(ROW_LAYOUTS),
    skip_layout=st.sampled_from(ROW_LAYOUTS),
    dy_layout=st.sampled_from(LAYOUTS),
    weight_layout=st.sampled_from(["contiguous", "transposed", "sliced"]),
    param_dtype=st.sampled_from([None, None, torch.float32]),
    x_std=st.sampled_from([1.0, 1.0, 0.01, 10.0]),
)
# a learned scale takes the place of the number
cases = st.one_of(
    cases,
    st.builds(
        lambda case, scale: AdapterCase(**{**vars(case), "scale": scale, "scaling": 1.0}),
        cases,
        st.sampled_from(["one", "channel"]),
    ),
)


GIVEN = given(
    case=cases,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    frozen=st.sets(st.sampled_from(NAMES), max_size=5),
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
    wanted = [name for name, _ in inputs.named_tensors() if name not in {"dy", *frozen}]
    results, keep = backend.run(inputs, wanted, seed)
    assert_accurate(results, inputs, keep)


@random_cases(20)
def test_any_case_matches_the_oracle(case, dtype, frozen, seed, backend, device):
    check(case, dtype, frozen, seed, backend, device)


@pytest.mark.slow
@random_cases(60)
def test_many_cases_match_the_oracle(case, dtype, frozen, seed, backend, device):
    check(case, dtype, frozen, seed, backend, device)
