"""The same bits whatever order programs run in, and every time."""

import pytest
import torch

from pelt_fast.testing.adapter_workloads import EVERYTHING, AdapterCase

pytest.importorskip("triton")
from pelt_fast.testing.gpu_free import Trace

ADAPTER = AdapterCase("several_blocks", (36,), 40, 20, **EVERYTHING)
TWO_RUNS = "on a CPU the runs in two orders are two runs"


def _assert_same_bits(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_order_of_programs_does_not_matter(several_programs, kernels):
    if kernels.device != "cpu":
        pytest.skip("a GPU chooses the order by itself")
    inputs = several_programs.make(torch.bfloat16)
    natural, reverse = (
        kernels.run(inputs, Trace(order, check=False), capability=90) for order in (None, "reverse")
    )
    _assert_same_bits(natural, reverse)


def test_two_runs_are_bitwise_equal(several_programs, kernels):
    if kernels.device == "cpu":
        pytest.skip(TWO_RUNS)
    inputs = several_programs.make(torch.float16, kernels.device)
    _assert_same_bits(kernels.run(inputs), kernels.run(inputs))


def test_order_of_programs_does_not_matter_to_the_adapter(several_blocks, adapter_kernels):
    if adapter_kernels.device != "cpu":
        pytest.skip("a GPU chooses the order by itself")
    inputs = ADAPTER.make(torch.bfloat16)
    natural, reverse = (
        adapter_kernels.run(inputs, Trace(order, check=False)) for order in (None, "reverse")
    )
    _assert_same_bits(natural, reverse)


def test_two_runs_of_the_adapter_are_bitwise_equal(several_blocks, adapter_kernels):
    if adapter_kernels.device == "cpu":
        pytest.skip(TWO_RUNS)
    inputs = ADAPTER.make(torch.float16, adapter_kernels.device)
    _assert_same_bits(adapter_kernels.run(inputs), adapter_kernels.run(inputs))
