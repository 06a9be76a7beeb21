"""Counted bytes of multi-LoRA: what has to move, once, and next to nothing else.

The rule is that of `gpu_free.dram_bytes`, with the 50 MiB of an H100's cache: partials of a split shrink, and rows that
several programs load, are hits there.
"""

from functools import cache

import pytest
import torch

from pelt_fast.testing import multi_lora_oracle
from pelt_fast.testing.multi_lora_workloads import MultiLoRACase

pytest.importorskip("triton")
from pelt_fast.backends.triton_ import multi_lora
from pelt_fast.kernels.common.hardware import l2_cache
from pelt_fast.testing.gpu_free import Trace, dram_bytes, interpreting

DECODE = MultiLoRACase("decode", (16,), 512, (512,), 16, (16,), ids="distinct")
QKV = MultiLoRACase("qkv", (16,), 512, (512, 128, 128), 4, (16,), ids="sorted")
TRAINING = MultiLoRACase("training", (512,), 256, (256,), 4, (16,), ids="sorted")
NULLS = MultiLoRACase("nulls", (64,), 64, (64,), 4, (16,))


@cache
def _passes(case):
    """The inputs, and the traces of forward and backward."""
    inputs, trace = case.make(torch.bfloat16), Trace()
    with interpreting(trace, capability=90):
        multi_lora_oracle.run_backend(multi_lora, inputs)
    names = [launch.name for launch in trace.launches]
    backward = names.index("_shrink_kernel", 1)
    return inputs, trace.launches[:backward], trace.launches[backward:]


def _compulsory(inputs, backward):
    """Every row of the call once, and A and B of the adapters that have a token; all gradients of A and B."""
    t, k, n = inputs.tokens, inputs.x.shape[1], sum(inputs.outs)
    ranks = [a.shape[1] for a in inputs.lora_a]
    present = len({g for g in inputs.ids if 0 <= g < inputs.plan.num_adapters})
    an_adapter = sum(r * (k + out) for r, out in zip(ranks, inputs.outs, strict=True))
    rows, s = t * (k + 2 * n), t * sum(ranks)
    if not backward:
        return 2 * (rows + s + present * an_adapter)
    gradients = inputs.plan.num_adapters * an_adapter
    return 2 * (t * (2 * k + n) + s + present * an_adapter + gradients)


@pytest.mark.parametrize("case", [DECODE, QKV, TRAINING], ids=str)
def test_traffic_is_near_what_has_to_move(case, kernels):
    if kernels.device != "cpu":
        pytest.skip("bytes are counted by the interpreter")
    inputs, *passes = _passes(case)
    for launches, backward in zip(passes, (False, True), strict=True):
        counted, compulsory = dram_bytes(launches, l2_cache("sm_90")), _compulsory(inputs, backward)
        at_most = 1.12 if backward else 1.15  # partials of decode, plans, and ds
        assert compulsory <= counted <= at_most * compulsory, (backward, counted / compulsory)


def test_nothing_of_the_size_of_rows_is_stored_but_results(kernels):
    if kernels.device != "cpu":
        pytest.skip("bytes are counted by the interpreter")
    inputs, forward, backward = _passes(TRAINING)
    rows = inputs.x.nbytes
    for launch in (*forward, *backward):
        for name, stored in launch.stored.items():
            whole = name.startswith(("ys", "dx_ptr"))
            assert stored == rows if whole else stored < rows / 2, (launch.name, name)


def test_x_and_dy_are_read_once_by_each_pass_over_them(kernels):
    """And of tokens without an adapter not at all."""
    if kernels.device != "cpu":
        pytest.skip("bytes are counted by the interpreter")
    inputs, forward, backward = _passes(NULLS)
    live = sum(0 <= g < inputs.plan.num_adapters for g in inputs.ids) / inputs.tokens
    of = {launch.name: launch for launch in (*forward, *backward)}
    for name, launch in (
        ("xs.0", forward[0]),
        ("xs.0", backward[0]),
        ("x_ptr", of["_grad_a_kernel"]),
    ):
        assert launch.loaded[name] == inputs.x.nbytes * live
    assert of["_grad_b_kernel"].loaded["dys.0"] == inputs.dy.nbytes * live


def test_launches(kernels):
    if kernels.device != "cpu":
        pytest.skip("launches are counted by the interpreter")
    _, forward, backward = _passes(QKV)
    assert [launch.name for launch in forward] == ["_shrink_kernel", "_expand_kernel"]
    assert len(backward) <= 7
