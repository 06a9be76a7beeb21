"""What stays in memory between forward and backward: s (T, ΣR), the seed, L numbers; the rest by alias."""

import gc
import weakref

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from pelt_fast import functional as PF
from pelt_fast.testing.multi_lora_workloads import EVERYTHING, MultiLoRACase

TOKENS, IN, OUT, R, L = 10, 24, (40, 7), (6, 3), 4


def saved_by(call):
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = call()
    return y, saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "permuted", "expanded"])
@pytest.mark.parametrize(
    "trained",
    [("lora_a", "lora_b"), ("lora_b",), ("x",), ("x", "lora_a", "lora_b", "base", "row_scale")],
    ids="+".join,
)
@pytest.mark.parametrize("ids", ["mixed", pytest.param("none", marks=pytest.mark.slow)])
def test_nothing_new_of_the_size_of_x_or_y(ids, trained, layout, dropout_p, dtype, backend, device):
    case = MultiLoRACase(
        *("", (2, 5), IN, OUT, L, R, ids),
        row_scale="token",
        dropout_p=dropout_p,
        x_layout=layout,
        base_layout=layout,
    )
    inputs = case.make(dtype, device)
    leaves = inputs.map(
        lambda name, t: t.detach().requires_grad_(name.partition(".")[0] in trained)
    )
    _, saved = saved_by(lambda: backend(leaves))

    arguments = {t.untyped_storage().data_ptr(): name for name, t in leaves.named_tensors()}
    arguments[leaves.plan._buffer.untyped_storage().data_ptr()] = "plan"
    known = {name for t in saved if (name := arguments.get(t.untyped_storage().data_ptr()))}
    new = [t for t in saved if t.untyped_storage().data_ptr() not in arguments]
    assert "x" in known
    assert not any(name.startswith(("base", "dy")) for name in known)
    expected = [((TOKENS, sum(R)), dtype)]
    expected += [((1,), torch.int64)] * (dropout_p > 0)
    expected += [((L,), torch.int32), ((L,), torch.float32)] * len(OUT)
    assert sorted((tuple(t.shape), str(t.dtype)) for t in new) == sorted(
        (shape, str(kind)) for shape, kind in expected
    )
    # a slice would keep more alive than it shows
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in new)


def test_scale_of_each_sample_saves_no_more_than_a_number_for_each_token(backend, device):
    case = MultiLoRACase("", (2, 5), IN, OUT, L, R, row_scale="sample")
    leaves = case.make(torch.float32, device).map(lambda _, t: t.detach().requires_grad_())
    _, saved = saved_by(lambda: backend(leaves))
    arguments = {t.untyped_storage().data_ptr() for _, t in leaves.named_tensors()}
    arguments.add(leaves.plan._buffer.untyped_storage().data_ptr())
    new = [t for t in saved if t.untyped_storage().data_ptr() not in arguments]
    assert max(t.numel() for t in new) == TOKENS * sum(R)


def test_saved_tensors_can_be_moved_away_and_back(backend, device):
    """As `save_on_cpu` and offloading do: all that backward needs goes through the hooks."""
    inputs = MultiLoRACase("", (6,), IN, **EVERYTHING).make(torch.float32, device)
    leaves = inputs.map(lambda name, t: t.detach().requires_grad_(name != "dy"))
    sources = [t for name, t in leaves.named_tensors() if name != "dy"]
    torch.manual_seed(0)
    expected = torch.autograd.grad(backend(leaves), sources, inputs.dy)
    torch.manual_seed(0)
    with saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        y = backend(leaves)
        moved = torch.autograd.grad(y, sources, inputs.dy)
    torch.testing.assert_close(moved, expected, rtol=1e-6, atol=1e-6)


def test_graph_is_freed_with_the_output(backend, device):
    """Saving through anything but `save_for_backward` would keep x alive in a reference cycle."""
    inputs = MultiLoRACase("", (6,), IN).make(torch.float32, device)
    leaves = inputs.map(lambda name, t: t.detach().clone().requires_grad_(name.startswith("lora")))
    backend.require(inputs)
    y = PF.multi_lora(*leaves.args, **leaves.kwargs, backend=backend.name)
    node = weakref.ref(y[0].grad_fn)
    gc.disable()
    try:
        del y
        assert node() is None
    finally:
        gc.enable()
