"""Attention over a prefix in C++: every instruction set, memory that is gone, threads."""

import pytest
import torch

from pelt_fast import functional as PF
from pelt_fast.testing.prefix_oracle import deviation
from pelt_fast.testing.prefix_workloads import PrefixCase

CASE = PrefixCase("", 3, 2, 70, 40, 13, 24, "rows")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_every_instruction_set(dtype, isa, run_on):
    run_on(dtype)
    inputs = CASE.make(dtype)
    y = PF.prefix_attention(*inputs.args, **inputs.kwargs, backend="cpp")
    found = deviation(y, inputs)
    assert found.ok, found


def test_threads_do_not_change_a_bit(cpp):
    inputs = PrefixCase("", 3, 5, 130, 20, 30, 64, shared=False).make(torch.float32)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(PF.prefix_attention(*inputs.args, backend="cpp"))
    torch.set_num_threads(1)
    assert all(torch.equal(r, results[0]) for r in results)


def test_nan_stays_where_it_belongs(cpp):
    inputs = CASE.make(torch.float32)
    expected = PF.prefix_attention(*inputs.args, **inputs.kwargs, backend="cpp")
    inputs.query[1, 0, 5] = float("nan")
    y = PF.prefix_attention(*inputs.args, **inputs.kwargs, backend="cpp")
    assert y[1, 0, 5].isnan().all()
    y[1, 0, 5] = expected[1, 0, 5]
    assert torch.equal(y, expected)


def test_freed_memory_is_named(cpp):
    inputs = CASE.make(torch.float32)
    inputs.value.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="value of shape"):
        PF.prefix_attention(*inputs.args, **inputs.kwargs, backend="cpp")
