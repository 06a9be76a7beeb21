"""A packed copy of a weight is used while it is true, never longer, and its memory is accounted for."""

import gc
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from pelt_fast import explain
from pelt_fast import functional as PF
from pelt_fast.nn import LoRALinear
from pelt_fast.testing.workloads import Case

# The first is small enough to be compared whole, the second is not.
SIZES = {"small": (24, 40), "large": (260, 392)}


@pytest.fixture(params=SIZES)
def inputs(request, cpp):
    return Case("", (5,), *SIZES[request.param]).make(torch.float32)


def cpp_is_right(inputs):
    """Forward and dX, which hold a pack of W each, against the torch backend; True when they agree."""
    outcome = []
    for backend in ("cpp", "torch"):
        x = inputs.x.clone().requires_grad_()
        y = PF.lora_linear(x, *inputs.args[1:], backend=backend)
        (dx,) = torch.autograd.grad(y, x, inputs.dy)
        outcome.append((y, dx))
    return all(
        torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
        for ours, theirs in zip(*outcome, strict=True)
    )


def under_no_grad(w):
    with torch.no_grad():
        w.mul_(2)


def through_data(w):
    w.data.mul_(2)


def through_detach(w):
    w.detach().mul_(2)


def through_numpy(w):
    w.numpy()[:] *= 2


def through_a_view(w):
    w.view(-1)[3:].mul_(2)


def one_element(w):
    w[7, 11] += 50


def data_exchanged(w):
    w.data = w.data * 2


def set_to_another(w):
    w.set_(w.clone() * 2)


def copied_into(w):
    w.copy_(w * 2)


def filled(w):
    nn.init.normal_(w)


CHANGES = [
    under_no_grad,
    through_data,
    through_detach,
    through_numpy,
    through_a_view,
    one_element,
    data_exchanged,
    set_to_another,
    copied_into,
    filled,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("which", ["weight", "lora_a", "lora_b"])
def test_changed_in_place(which, change, inputs):
    tensor = inputs.weight if which == "weight" else getattr(inputs, which)[0]
    if which != "weight" and change is one_element:
        change = under_no_grad
    assert cpp_is_right(inputs)
    before = tensor.clone()
    change(tensor)
    assert not torch.equal(before, tensor)
    assert cpp_is_right(inputs)


@pytest.mark.parametrize("line", [0, 7, -1])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("which", ["weight", "lora_a", "lora_b"])
def test_one_row_or_column_changed_behind_the_version_counter(which, axis, line, inputs):
    tensor = inputs.weight if which == "weight" else getattr(inputs, which)[0]
    assert cpp_is_right(inputs)
    version = tensor._version
    tensor.data.select(axis, line).add_(50)
    assert tensor._version == version
    assert cpp_is_right(inputs)


def test_freed_weight_and_a_new_one_at_its_address(cpp):
    """The allocator gives the memory of the last weight to the next."""
    addresses = set()
    for seed in range(20):
        inputs = Case("", (5,), 260, 392).make(torch.float32, seed=seed)
        addresses.add(inputs.weight.data_ptr())
        assert cpp_is_right(inputs)
        del inputs
    assert len(addresses) < 20


def test_load_state_dict(cpp):
    torch.manual_seed(0)
    layer, other = LoRALinear(260, 392), LoRALinear(260, 392)
    nn.init.normal_(other.lora_B["default"].weight)
    x = torch.randn(4, 260)
    layer(x)
    layer.load_state_dict(other.state_dict())
    torch.testing.assert_close(layer(x), other(x))


@pytest.mark.parametrize("fused", [False, True])
def test_optimizer_steps_on_weight_and_adapters(fused, cpp):
    """A weight trained by one part of a program and frozen in another."""
    torch.manual_seed(0)
    inputs = Case("", (5,), 260, 392).make(torch.float32)
    parameters = [inputs.weight, *inputs.lora_a, *inputs.lora_b]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=fused)
    for _ in range(3):
        assert cpp_is_right(inputs)
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    assert cpp_is_right(inputs)


def test_two_views_of_one_storage_are_two_weights(cpp):
    storage = torch.randn(2, 392, 260)
    inputs = Case("", (5,), 260, 392).make(torch.float32)
    for weight in (storage[0], storage[1], storage[0], storage[0].flip(0), storage[1]):
        assert cpp_is_right(replace(inputs, weight=weight))
    square = torch.randn(260, 260)
    inputs = Case("", (5,), 260, 260).make(torch.float32)
    for weight in (square, square.T, square):
        assert cpp_is_right(replace(inputs, weight=weight))


def test_one_weight_in_two_compute_dtypes(cpp):
    """Under autocast an fp32 weight has packs of two dtypes."""
    inputs = Case("", (5,), 260, 392).make(torch.float32)
    assert cpp_is_right(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        ours = PF.lora_linear(*inputs.args, backend="cpp")
        theirs = PF.lora_linear(*inputs.args, backend="torch")
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.05)
    assert cpp_is_right(inputs)


def test_inference_tensors_have_no_version_counter(cpp):
    with torch.inference_mode():
        inputs = Case("", (5,), 260, 392).make(torch.float32)
        for _ in range(2):
            ours = PF.lora_linear(*inputs.args, backend="cpp")
            torch.testing.assert_close(ours, PF.lora_linear(*inputs.args, backend="torch"))
            inputs.weight.mul_(2)


def test_inference_tensors_changed_in_one_element(cpp):
    with torch.inference_mode():
        inputs = Case("", (5,), 260, 392).make(torch.float32)
        for column in range(3):
            ours = PF.lora_linear(*inputs.args, backend="cpp")
            torch.testing.assert_close(ours, PF.lora_linear(*inputs.args, backend="torch"))
            inputs.weight[100, column] += 50


def test_a_large_weight_made_in_inference_mode_is_left_to_torch(cpp):
    with torch.inference_mode():
        made_there = Case("", (5,), 260, 392).make(torch.float32)
    made_here = Case("", (5,), 260, 392).make(torch.float32)
    for inputs, expected in (made_there, "torch"), (made_here, "cpp"):
        assert set(explain("lora_linear", *inputs.args).backends) == {expected}


@pytest.mark.parametrize("size", [0, 16])
@pytest.mark.parametrize("name", ["x", "weight", "bias", "lora_a", "lora_b", "lora_bias"])
def test_memory_taken_from_under_a_tensor(name, size, cpp):
    call = {
        "x": torch.randn(3, 40),
        "weight": torch.randn(24, 40),
        "bias": torch.randn(24),
        "lora_a": torch.randn(2, 40),
        "lora_b": torch.randn(24, 2),
        "scaling": 1.0,
        "lora_bias": torch.randn(24),
    }
    call[name].untyped_storage().resize_(size)
    with pytest.raises(ValueError, match=rf"^{name} of shape .* its storage has {size}"):
        PF.lora_linear(**call, backend="cpp")


def test_memory_taken_between_forward_and_backward(inputs, cpp):
    y = PF.lora_linear(inputs.x.requires_grad_(), *inputs.args[1:], backend="cpp")
    inputs.weight.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"^weight of shape .* its storage has 0"):
        y.backward(inputs.dy)


def test_memory_is_reported_and_goes_with_the_weight(cpp):
    inputs = Case("", (5,), 260, 392).make(torch.float32)
    assert cpp.packed_bytes() == 0
    PF.lora_linear(*inputs.args, backend="cpp")
    one = cpp.packed_bytes()
    weight_bytes = inputs.weight.numel() * 4
    assert weight_bytes <= one < 1.5 * weight_bytes + 65536
    PF.lora_linear(*inputs.args, backend="cpp")
    assert cpp.packed_bytes() == one
    cpp_is_right(inputs)  # backward packs W the other way round
    assert cpp.packed_bytes() > one + weight_bytes / 2
    del inputs
    gc.collect()
    assert cpp.packed_bytes() == 0


def test_changed_weight_replaces_its_pack(cpp):
    inputs = Case("", (5,), 260, 392).make(torch.float32)
    PF.lora_linear(*inputs.args, backend="cpp")
    size = cpp.packed_bytes()
    for _ in range(5):
        inputs.weight.mul_(1.01)
        PF.lora_linear(*inputs.args, backend="cpp")
    assert cpp.packed_bytes() == size


def test_memory_stays_below_the_limit(cpp):
    inputs = [Case("", (5,), 260, 392).make(torch.float32, seed=seed) for seed in range(6)]
    size = 260 * 392 * 4
    cpp.set_packed_limit(3 * size)
    for _ in range(2):
        for each in inputs:
            assert cpp_is_right(each)
            assert cpp.packed_bytes() <= 3 * size
    assert cpp.packed_bytes() > size
    cpp.set_packed_limit(size // 2)
    assert cpp.packed_bytes() <= size // 2


def test_a_limit_below_0_is_refused(cpp):
    with pytest.raises(ValueError, match="bytes is -1; expected at least 0"):
        cpp.set_packed_limit(-1)


def test_limit_0_switches_it_off(cpp):
    inputs = Case("", (5,), 260, 392).make(torch.float32)
    cpp_is_right(inputs)
    cpp.set_packed_limit(0)
    assert cpp.packed_bytes() == 0
    assert cpp_is_right(inputs)
    assert cpp.packed_bytes() == 0


def test_many_threads_call_at_once(cpp):
    """With a cache too small for all, so that packs are made and dropped under each other's feet."""
    cpp.set_packed_limit(3 * 260 * 392 * 4)
    inputs = [Case("", (9,), 260, 392).make(torch.float32, seed=seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda i: cpp_is_right(inputs[i % 4]), range(48)))


FORK = """
import os, torch
from pelt_fast import functional as PF
torch.set_num_threads(1)
t = torch.ones
call = lambda: PF.lora_linear(t(9, 260), weight, None, a, b, 1.0, backend="cpp")
weight, a, b = torch.randn(392, 260), torch.randn(4, 260), torch.randn(392, 4)
expected = call()
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(call(), expected) else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(call(), expected)
print("fine")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_forked_child_computes(cpp, interpreters):
    """As a data loader's workers are made."""
    root = Path(__file__).resolve().parents[2]
    done = interpreters(FORK, root, cwd=root, env=os.environ, timeout=60)
    assert done.stdout.strip() == "fine", done.stderr


@pytest.mark.parametrize("numel", [1, 2000])
def test_a_trained_adapter_that_changes_through_data_is_packed_again(numel, cpp):
    """Optimizers with fp32 copies write back through ``.data``, and in bf16 few elements change at a step."""
    down = (
        torch.randn(300, 512).bfloat16().requires_grad_()
    )  # too large to be read whole if it were frozen
    up, x = torch.eye(512, 300).bfloat16(), torch.randn(40, 512).bfloat16()

    def call(down):
        return PF.bottleneck_adapter(x, down, None, up, None, activation="linear", backend="cpp")

    call(down)
    for at in torch.randint(down.numel(), (20,)).tolist():
        down.data.view(-1)[at : at + numel] += 8.0
        assert torch.equal(call(down), call(down.detach().clone()))
