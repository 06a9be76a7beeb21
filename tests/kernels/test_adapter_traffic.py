"""Counted bytes of the adapter's kernels: near what has to move, and nothing of the size of x that nobody asked for.

The counting rule is that of `gpu_free.dram_bytes`, with the 50 MiB of an H100's cache. Programs load more than this: x
for each of their walks, D and U for each block (README of the kernels). Which bytes a launch touches does not depend on
its tiles, so here they are large ones, which the interpreter is quick with; strips and slabs are the real ones.
"""

from dataclasses import replace

import pytest
import torch

from pelt_fast.testing.adapter_oracle import as_rows
from pelt_fast.testing.adapter_workloads import HOULSBY, PFEIFFER, POST_LN, AdapterCase

pytest.importorskip("triton")
from pelt_fast.kernels.adapter import forward, grad_columns, grad_rows
from pelt_fast.kernels.common.hardware import l2_cache
from pelt_fast.testing.gpu_free import Trace, dram_bytes
from pelt_fast.testing.gpu_free.report import adapter_compulsory_bytes

AT_MOST = 1.1
# Two slabs, whose partials are written twice and read twice by the rule, which knows no order within a launch.
TWO_SLABS_AND_ONE_GRADIENT = {"pfeiffer_4096x64": 1.12}
SHAPES = [(768, 48), (768, 64), (1024, 64), (4096, 64)]
BLOCKS = {"post_ln": POST_LN, "houlsby": HOULSBY, "pfeiffer": PFEIFFER}


@pytest.fixture
def large_tiles(monkeypatch):
    for file, tile in (
        (forward, {"block_t": 512, "block_d": 512}),
        (grad_rows, {"block_t": 512, "block_d": 512}),
        (grad_columns, {"block_t": 512, "block_d": 256}),
    ):
        default = file.default_config
        monkeypatch.setattr(
            file, "default_config", lambda problem, d=default, t=tile: replace(d(problem), **t)
        )


def _passes(kernels, case):
    """The traces of forward and backward."""
    if kernels.device != "cpu":
        pytest.skip("bytes are counted by the interpreter")
    trace = Trace()
    kernels.run(case.make(torch.bfloat16), trace, capability=90)
    return trace.launches[:1], trace.launches[1:]


def _case(name, features, bottleneck, scale=1):
    shape = (2048 // scale,), features // scale, bottleneck // scale
    return AdapterCase(f"{name}_{features}x{bottleneck}", *shape, **BLOCKS[name])


CASES = [
    # a quarter of everything: the same ratios, sixteen times as quick
    *(pytest.param(_case(name, 768, 48, 4), id=f"{name}_quarter") for name in BLOCKS),
    *(
        pytest.param(_case(name, *shape), id=str(_case(name, *shape)), marks=pytest.mark.slow)
        for shape in SHAPES
        for name in BLOCKS
    ),
]


@pytest.mark.parametrize("case", CASES)
def test_traffic_is_near_what_has_to_move(case, large_tiles, adapter_kernels):
    inputs = as_rows(case.make(torch.bfloat16))
    passes = _passes(adapter_kernels, case)
    for launches, backward in zip(passes, (False, True), strict=True):
        counted = dram_bytes(launches, l2_cache("sm_90"))
        compulsory = adapter_compulsory_bytes(inputs, backward)
        at_most = TWO_SLABS_AND_ONE_GRADIENT.get(case.name, AT_MOST) if backward else 1.001
        assert compulsory <= counted <= at_most * compulsory, (backward, counted / compulsory)


def test_nothing_of_the_size_of_x_is_stored_but_results(large_tiles, adapter_kernels):
    """No mask, no v, w or s, and no partials beyond a part of it."""
    case = AdapterCase("everything", (512,), 256, 8, **PFEIFFER, dropout_p=0.1, gate="token")
    forward_pass, backward_pass = _passes(adapter_kernels, case)
    x = 2 * case.tokens * case.features
    for launch in (*forward_pass, *backward_pass):
        for name, stored in launch.stored.items():
            assert stored == x if name in ("y_ptr", "dx_ptr", "dskip_ptr") else stored < x / 2, name


def test_one_launch_forward(adapter_kernels):
    case = AdapterCase("launches", (20,), 40, 12, **PFEIFFER)
    forward_pass, backward_pass = _passes(adapter_kernels, case)
    assert [launch.name for launch in forward_pass] == ["_adapter_forward_kernel"]
    assert [launch.name for launch in backward_pass][:2] == [
        "_adapter_rows_kernel",
        "_adapter_columns_kernel",
    ]
    assert len(backward_pass) <= 3
