"""The same bits whatever order programs run in, and every time."""

import pytest
import torch

pytest.importorskip("triton")
from pelt_fast.testing.gpu_free import Trace


def _assert_same_bits(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_order_of_programs_does_not_matter(several_programs, kernels):
    if kernels.device != "cpu":
        pytest.skip("a GPU chooses the order by itself")
    inputs = several_programs.make(torch.bfloat16)
    natural, *others = (
        kernels.run(inputs, Trace(order, check=False), capability=90)
        for order in (None, "reverse", "random")
    )
    for other in others:
        _assert_same_bits(natural, other)


def test_two_runs_are_bitwise_equal(several_programs, kernels):
    inputs = several_programs.make(torch.float16, kernels.device)
    _assert_same_bits(kernels.run(inputs), kernels.run(inputs))
