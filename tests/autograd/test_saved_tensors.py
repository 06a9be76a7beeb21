"""What stays in memory between forward and backward: x by alias, s (T, R), the seed; parameters by alias."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from pelt_fast.testing.workloads import Adapter, Case

DTYPES = [torch.float32, torch.bfloat16]
RANKS, TOKENS = (3, 16), 10


def saved_by(call):
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = call()
    return y, saved


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("x_layout", ["contiguous", "transposed", "permuted", "expanded"])
@pytest.mark.parametrize(
    "trained",
    [("lora_a", "lora_b"), ("lora_a",), ("lora_b",), ("x",), ("x", "lora_a", "lora_b", "bias")],
    ids="+".join,
)
def test_nothing_new_but_s_and_the_seed(trained, x_layout, dropout_p, dtype, backend, device):
    adapters = tuple(Adapter(rank, dropout_p=dropout_p) for rank in RANKS)
    inputs = Case("", (2, 5), 24, 40, adapters, x_layout=x_layout).make(dtype, device)
    leaves = inputs.map(
        lambda name, t: t.detach().requires_grad_(name.partition(".")[0] in trained)
    )
    _, saved = saved_by(lambda: backend(leaves))

    arguments = {t.data_ptr(): name for name, t in leaves.named_tensors()}
    aliases = {arguments[t.data_ptr()] for t in saved if t.data_ptr() in arguments}
    new = [t for t in saved if t.data_ptr() not in arguments]
    expected = []
    if "lora_b" in trained:
        expected.append(((TOKENS, sum(RANKS)), dtype))
    if dropout_p:
        expected.append(((1,), torch.int64))
    assert sorted((tuple(t.shape), t.dtype) for t in new) == sorted(expected)
    # a slice would keep more alive than it shows
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in new)
    assert ("x" in aliases) == ("lora_a" in trained)


def test_saved_tensors_can_be_moved_away_and_back(backend, device):
    """As `save_on_cpu` and offloading do: all that backward needs goes through the hooks."""
    inputs = Case("", (6,), 24, 40, (Adapter(8, dropout_p=0.3),)).make(torch.float32, device)
    leaves = inputs.map(lambda name, t: t.detach().requires_grad_(name.startswith(("x", "lora"))))
    sources = (leaves.x, *leaves.lora_a, *leaves.lora_b)
    torch.manual_seed(0)
    expected = torch.autograd.grad(backend(leaves), sources, inputs.dy)
    torch.manual_seed(0)
    with saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        y = backend(leaves)
        moved = torch.autograd.grad(y, sources, inputs.dy)
    assert all(torch.equal(a, b) for a, b in zip(moved, expected, strict=True))


def test_graph_is_freed_with_the_output(backend, device):
    """Saving through anything but `save_for_backward` would keep x alive in a reference cycle."""
    import gc
    import weakref

    inputs = Case("", (6,), 24, 40).make(torch.float32, device)
    leaves = inputs.map(lambda name, t: t.detach().clone().requires_grad_(name.startswith("lora")))
    y = backend(leaves)
    node = weakref.ref(y.grad_fn)
    gc.disable()
    try:
        del y
        assert node() is None
    finally:
        gc.enable()
