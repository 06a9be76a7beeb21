"""Counted bytes: large tensors move once, no mask and no dropped x exists, and the whole is near what has to move."""

from functools import cache

import pytest
import torch

from pelt_fast.testing.workloads import Adapter, Case

pytest.importorskip("triton")
from pelt_fast.testing.gpu_free import Trace, interpreting
from pelt_fast.testing.gpu_free.report import compulsory_bytes, eager_bytes, launches

CASE = Case("traffic", (64,), 256, 256, (Adapter(16, 0.5, 0.1),), bias=False)


@cache
def _counted():
    traces = []
    for run in launches(CASE.make(torch.bfloat16)):
        traces.append(Trace())
        with interpreting(traces[-1], capability=90):
            run()
    return traces


@pytest.fixture
def passes(kernels):
    if kernels.device != "cpu":
        pytest.skip("bytes are counted by the interpreter")
    return _counted()


def test_large_tensors_move_once(passes):
    x, y = 2 * CASE.tokens * CASE.in_features, 2 * CASE.tokens * CASE.out_features
    forward, backward = ({launch.name: launch for launch in trace.launches} for trace in passes)
    assert forward["_shrink_kernel"].loaded["x_ptr"] == x
    assert forward["_linear_kernel"].stored == {"out_ptr": y}
    assert backward["_grad_b_kernel"].loaded["dy_ptr"] == y
    assert backward["_grad_a_kernel"].loaded["x_ptr"] == x
    assert backward["_linear_kernel"].stored == {"out_ptr": x}
    for kernels in (forward, backward):
        assert "out_ptr" not in kernels["_linear_kernel"].loaded


def test_nothing_of_the_size_of_a_mask_is_stored(passes):
    elements = CASE.tokens * CASE.in_features
    for trace in passes:
        for launch in trace.launches:
            for name, stored in launch.stored.items():
                assert name.endswith(("out_ptr", "part_ptr")), (launch.name, name)
                partial_or_result = name.endswith("part_ptr") or launch.name == "_linear_kernel"
                assert partial_or_result or stored < elements, (launch.name, name)


@pytest.mark.parametrize("backward", [False, True])
def test_traffic_is_near_what_has_to_move(passes, backward):
    """Bytes that reach DRAM when a tile's second read hits L2, with every partial of a reduction."""
    counted = 0
    for launch in passes[backward].launches:
        footprint = launch.footprint
        counted += sum(min(count, footprint[name]) for name, count in launch.loaded.items())
        counted += sum(launch.stored.values())
    compulsory, eager = compulsory_bytes(CASE, 2, backward), eager_bytes(CASE, 2, backward)
    # x is read by shrink and by the GEMM, dY by grad_b and by the GEMM: the compulsory count has them once
    assert compulsory < counted < 2.2 * compulsory
    assert counted < 0.75 * eager
