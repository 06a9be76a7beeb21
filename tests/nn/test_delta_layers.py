"""`DiffPruningLinear` and `MaskedLinear`: parameters, penalty, merging, copies, training."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pelt_fast import functional as PF
from pelt_fast.nn import DiffPruningLinear, MaskedLinear, diff_pruning_penalty


def perturbed(layer):
    """Fresh differences are zero, and would show nothing."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if not name.startswith("base_layer"):
                p.fill_(1.0) if "group" in name else p.normal_()  # an open gate of the whole
    return layer


def test_parameters_and_defaults():
    linear = nn.Linear(6, 4)
    layer = DiffPruningLinear.from_linear(linear, structured=True)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters() if p.requires_grad}
    assert shapes == {
        "diff": (4, 6),
        "log_alpha": (4, 6),
        "group_log_alpha": (1,),
        "bias_diff": (4,),
        "bias_log_alpha": (4,),
        "bias_group_log_alpha": (1,),
    }
    assert layer.base_layer is linear
    assert not linear.weight.requires_grad
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), linear(x))  # a fresh difference is zero
    layer.eval()
    assert torch.equal(layer(x), linear(x))
    plain = DiffPruningLinear(6, 4, bias=False)
    assert [n for n, p in plain.named_parameters() if p.requires_grad] == ["diff", "log_alpha"]
    assert "stretch=(-1.5, 1.5)" in repr(layer)


@pytest.mark.parametrize("structured", [False, True])
def test_diff_pruning_is_its_function(structured):
    layer = perturbed(DiffPruningLinear(6, 4, structured=structured))
    x = torch.randn(2, 3, 6)
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    options = {"training": True}
    bias, of_bias = PF.diff_pruning_weight(
        *(layer.base_layer.bias, layer.bias_diff, layer.bias_log_alpha),
        group_log_alpha=layer.bias_group_log_alpha,
        **options,
    )
    expected, count = PF.diff_pruning_linear(
        *(x, layer.base_layer.weight, bias, layer.diff, layer.log_alpha),
        group_log_alpha=layer.group_log_alpha,
        **options,
    )
    assert torch.equal(y, expected)
    assert torch.equal(diff_pruning_penalty(nn.Sequential(layer)), count + of_bias)
    grads = torch.autograd.grad(
        y.sum() + layer.penalty, [p for p in layer.parameters() if p.requires_grad]
    )
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_is_eval(dtype):
    for layer in (
        DiffPruningLinear(6, 4, structured=True, dtype=dtype, delta_dtype=torch.float32),
        MaskedLinear(6, 4, dtype=dtype, score_dtype=torch.float32),
    ):
        perturbed(layer).eval()
        merged, x = layer.merged(), torch.randn(5, 6, dtype=dtype)
        assert torch.equal(merged(x), layer(x))
        assert not torch.equal(merged(x), layer.base_layer(x))
        assert merged.weight.data_ptr() != layer.base_layer.weight.data_ptr()
        assert not any(p.requires_grad for p in merged.parameters())


def test_copies_and_files():
    for layer in (DiffPruningLinear(6, 4, structured=True), MaskedLinear(6, 4)):
        perturbed(layer)
        layer(torch.randn(2, 6))
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        other = type(layer)(6, 4, **({"structured": True} if hasattr(layer, "diff") else {}))
        other.load_state_dict(layer.state_dict())
        x = torch.randn(2, 6)
        for twin in (copy.deepcopy(layer), torch.load(file, weights_only=False), other):
            assert torch.equal(twin.eval()(x), layer.eval()(x))
            assert getattr(twin, "penalty", None) is None
        layer.train()


def test_penalty_needs_a_training_forward():
    layer = DiffPruningLinear(6, 4)
    with pytest.raises(ValueError, match="1 DiffPruningLinear layers, of which none has run"):
        diff_pruning_penalty(nn.Sequential(layer))
    with pytest.raises(ValueError, match="0 DiffPruningLinear"):
        diff_pruning_penalty(nn.Linear(2, 2))
    layer(torch.randn(2, 6))
    assert 27 < diff_pruning_penalty(layer).item() < 28  # 28 gates that start open


def test_checkpointing_draws_the_same_noise():
    layer = perturbed(DiffPruningLinear(6, 4))
    x = torch.randn(5, 6, requires_grad=True)
    results = []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(2)
        y = call(x)
        results.append(torch.autograd.grad(y.square().sum(), (x, layer.diff, layer.log_alpha)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_training_learns_a_sparse_difference():
    torch.manual_seed(0)
    layer = DiffPruningLinear(16, 8, bias=False)
    target = layer.base_layer.weight.detach().clone()
    target[2, 3] += 1.5
    target[5, 1] -= 1.5
    optimizer = torch.optim.Adam([layer.diff, layer.log_alpha], lr=0.05)
    for _ in range(300):
        x = torch.randn(64, 16)
        loss = (layer(x) - x @ target.T).square().mean() + 2e-3 * diff_pruning_penalty(layer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    changed = (layer.merged().weight != layer.base_layer.weight).nonzero().tolist()
    assert changed == [[2, 3], [5, 1]]


def test_masking_starts_sparse_and_learns():
    torch.manual_seed(0)
    layer = MaskedLinear(64, 64, init_sparsity=0.25, bias=False)
    share = (layer.scores < layer.threshold).float().mean().item()
    assert share == pytest.approx(0.25, abs=0.03)
    wanted = torch.rand(64, 64) > 0.25
    target = layer.base_layer.weight * wanted
    optimizer = torch.optim.SGD([layer.scores], lr=10.0)
    for _ in range(100):
        x = torch.randn(256, 64)
        loss = (layer(x) - x @ target.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = ((layer.scores >= layer.threshold) == wanted).float().mean().item()
    assert right > 0.9
    assert repr(layer).startswith("MaskedLinear")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"threshold": 0.0}, ValueError, "threshold is 0.0"),
        ({"threshold": "a"}, TypeError, "threshold is a str"),
        ({"init_sparsity": 1.5}, ValueError, "init_sparsity is 1.5"),
    ],
)
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        MaskedLinear(3, 4, **options)
    with pytest.raises(TypeError, match="linear is a Identity"):
        MaskedLinear.from_linear(nn.Identity())
    with pytest.raises(TypeError, match="linear is a Identity"):
        DiffPruningLinear.from_linear(nn.Identity())
