"""What stays in memory between forward and backward: q (T, m), row statistics, the seed; the rest by alias."""

import gc
import weakref

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from pelt_fast.testing.adapter_workloads import (
    EVERYTHING,
    HOULSBY,
    NAMES,
    PFEIFFER,
    T5,
    AdapterCase,
)

TOKENS, D, M = 10, 24, 3
BLOCKS = {"pfeiffer": PFEIFFER, "houlsby": HOULSBY, "t5": T5, "everything": EVERYTHING}


def saved_by(call):
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = call()
    return y, saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "permuted", "expanded"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("trained", [("down", "up"), ("x",), NAMES], ids=["adapter", "x", "all"])
def test_nothing_new_but_q_statistics_and_seed(trained, block, layout, dtype, backend, device):
    case = AdapterCase("", (2, 5), D, M, **BLOCKS[block], x_layout=layout, skip_layout=layout)
    inputs = case.make(dtype, device)
    leaves = inputs.map(lambda name, t: t.detach().requires_grad_(name in trained))
    _, saved = saved_by(lambda: backend(leaves))

    arguments = {t.untyped_storage().data_ptr() for _, t in leaves.named_tensors()}
    new = [t for t in saved if t.untyped_storage().data_ptr() not in arguments and t.numel()]
    expected = [((TOKENS, M), dtype)]
    expected += [((TOKENS, 2), torch.float32)] * (case.pre_ln + case.post_ln)
    expected += [((1,), torch.int64)] * (case.dropout_p > 0)
    assert sorted((tuple(t.shape), str(t.dtype)) for t in new) == sorted(
        (shape, str(kind)) for shape, kind in expected
    )
    # a slice would keep more alive than it shows
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in new)


def test_gate_for_each_sample_saves_no_more_than_a_number_for_each_token(backend, device):
    case = AdapterCase("", (2, 5), D, M, **HOULSBY, gate="sample")
    leaves = case.make(torch.float32, device).map(lambda _, t: t.detach().requires_grad_())
    _, saved = saved_by(lambda: backend(leaves))
    arguments = {t.untyped_storage().data_ptr() for _, t in leaves.named_tensors()}
    new = [t for t in saved if t.untyped_storage().data_ptr() not in arguments and t.numel()]
    assert max(t.numel() for t in new) == TOKENS * M


def test_saved_tensors_can_be_moved_away_and_back(backend, device):
    """As `save_on_cpu` and offloading do: all that backward needs goes through the hooks."""
    inputs = AdapterCase("", (6,), D, M, **EVERYTHING).make(torch.float32, device)
    leaves = inputs.map(lambda name, t: t.detach().requires_grad_(name != "dy"))
    sources = [t for name, t in leaves.named_tensors() if name != "dy"]
    torch.manual_seed(0)
    expected = torch.autograd.grad(backend(leaves), sources, inputs.dy)
    torch.manual_seed(0)
    with saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        y = backend(leaves)
        moved = torch.autograd.grad(y, sources, inputs.dy)
    assert all(torch.equal(a, b) for a, b in zip(moved, expected, strict=True))


def test_graph_is_freed_with_the_output(backend, device):
    """Saving through anything but `save_for_backward` would keep x alive in a reference cycle."""
    inputs = AdapterCase("", (6,), D, M, **PFEIFFER).make(torch.float32, device)
    leaves = inputs.map(lambda name, t: t.detach().clone().requires_grad_(name in ("down", "up")))
    y = backend(leaves)
    node = weakref.ref(y.grad_fn)
    gc.disable()
    try:
        del y
        assert node() is None
    finally:
        gc.enable()
