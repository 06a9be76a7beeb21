"""``nn.PrefixTuning`` and ``nn.PrefixGate``: values, gradients, what is kept and when it is not, the library's keys."""

import copy
import gc
import pickle
import re
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from pelt_fast.nn import PrefixGate, PrefixTuning
from pelt_fast.nn import kept as kept_module

LAYERS, HEADS, D, P, B = 3, 2, 4, 5, 3


def make(**options):
    torch.manual_seed(0)
    return PrefixTuning(LAYERS, HEADS, D, P, bottleneck=6, **options)


def naive(layer, batch):
    """As written: the MLP of as many equal rows as there are samples."""
    if layer.flat:
        states = layer.control_trans.expand(batch, -1)
    else:
        tokens = layer.wte.weight.expand(batch, -1, -1)
        first, _, last = layer.control_trans
        states = F.linear(
            torch.tanh(F.linear(tokens, first.weight, first.bias)), last.weight, last.bias
        )
    states = states.reshape(batch, P, LAYERS * 2, HEADS, D)
    return states.permute(2, 0, 3, 1, 4).split(2)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("batch", [1, B])
def test_values_and_gradients(flat, batch):
    layer = make(flat=flat).double()
    with torch.no_grad():
        assert all(map(torch.allclose, layer(batch), naive(layer, batch)))
    gradients = []
    for function in (layer, lambda b: naive(layer, b)):
        layer.zero_grad()
        states = function(batch)
        assert [s.shape for s in states] == [(2, batch, HEADS, P, D)] * LAYERS
        sum((s * torch.randn(s.shape, generator=torch.Generator().manual_seed(i))).sum()
            for i, s in enumerate(states)).backward()  # fmt: skip
        gradients.append([p.grad.clone() for p in layer.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_dropout_draws_for_every_sample():
    layer = make(dropout_p=0.5)
    keys = layer(B)[0][0]
    assert not torch.equal(keys[0], keys[1])
    assert (keys == 0).float().mean().item() == pytest.approx(0.5, abs=0.15)
    kept = keys != 0
    torch.testing.assert_close(keys[kept], 2 * naive(layer, B)[0][0][kept])
    layer.eval()
    assert torch.equal(layer(B)[0][0][0], layer(B)[0][0][1])


class Counted(torch.nn.Module):
    """An activation that counts its calls."""

    calls = 0

    def forward(self, x):
        Counted.calls += 1
        return torch.tanh(x)


@pytest.fixture
def layer():
    layer = make(activation=Counted())
    Counted.calls = 0
    return layer


def computed(layer, batch=B):
    before = Counted.calls
    with torch.no_grad():
        found = layer(batch)
    assert all(map(torch.allclose, found, naive(layer, batch)))
    return Counted.calls - before


def test_it_is_computed_once_while_nothing_changes(layer):
    assert [computed(layer), computed(layer), computed(layer, 1)] == [1, 0, 0]
    layer.eval()
    assert computed(layer) == 0


def change_in_place(layer):
    with torch.no_grad():
        layer.control_trans[2].weight[0, 0] += 1


def step(layer):
    layer(B)[0].square().sum().backward()
    torch.optim.SGD(layer.parameters(), 0.1).step()


def through_data(layer):
    layer.wte.weight.data.mul_(2)


def new_data(layer):
    layer.wte.weight.data = layer.wte.weight.data * 2


def new_parameter(layer):
    layer.control_trans[0].bias = torch.nn.Parameter(torch.ones(6))


def load(layer):
    layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()})


@pytest.mark.parametrize(
    "change", [change_in_place, step, through_data, new_data, new_parameter, load]
)
def test_a_change_is_seen(layer, change):
    computed(layer)
    change(layer)
    assert computed(layer) == 1
    assert computed(layer) == 0


def test_with_a_graph_nothing_is_kept(layer):
    computed(layer)
    before = Counted.calls
    for _ in range(2):
        layer(B)[0].sum().backward()
    assert Counted.calls == before + 2
    assert computed(layer) == 0
    layer.requires_grad_(False)
    layer(B)
    assert Counted.calls == before + 2


def test_kept_in_inference_mode_it_can_be_trained_upon(layer):
    with torch.inference_mode():
        layer(B)
    layer.requires_grad_(False)
    query = torch.randn(2, B, HEADS, P, D, requires_grad=True)
    (layer(B)[0] * query).sum().backward()
    assert Counted.calls == 1


def test_autocast_has_a_result_of_its_own(layer):
    computed(layer)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(B)[0].dtype == torch.bfloat16
    assert computed(layer) == 1


def test_copies_keep_for_themselves(layer):
    computed(layer)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert computed(other) == 1
    assert list(layer.state_dict()) == [name for name, _ in layer.named_parameters()]


def test_nothing_outlives_its_layer():
    layer = make()
    computed(layer)
    assert layer in kept_module._kept
    gone, result = weakref.ref(layer), weakref.ref(kept_module._kept[layer].result[0])
    del layer
    gc.collect()
    assert gone() is None
    assert result() is None


@pytest.mark.parametrize("flat", [False, True])
def test_eject(flat):
    layer = make(flat=flat, dropout_p=0.3).eval()
    ejected = layer.eject()
    assert ejected.flat
    assert not ejected.training
    assert list(ejected.state_dict()) == ["control_trans"]
    assert all(map(torch.allclose, ejected(B), layer(B)))


@pytest.mark.parametrize("flat", [False, True])
def test_state_dict_of_the_library(flat):
    adapters = pytest.importorskip("adapters")
    from adapters.methods.prefix_tuning import FlatPrefixTuning
    from adapters.methods.prefix_tuning import PrefixTuning as Theirs

    config = adapters.PrefixTuningConfig(prefix_length=P, bottleneck_size=6, flat=flat)
    theirs = (FlatPrefixTuning if flat else Theirs)(LAYERS, HEADS, HEADS * D, config)
    ours = make(flat=flat)
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        for a, b in zip(ours(B), theirs(B), strict=True):
            torch.testing.assert_close(a, b)


def test_gate():
    gate = PrefixGate(4, shared=False)
    x, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 1, 1]])
    expected = torch.sigmoid(gate.gate(x))
    torch.testing.assert_close(gate(x, mask), expected.mean(1))
    gate.compat = "paper"
    torch.testing.assert_close(gate(x, mask)[0], expected[0, :2].mean(0))
    assert PrefixGate(4)(x).shape == (2, 1)


def test_errors():
    with pytest.raises(ValueError, match="prefix_length is 0; expected an int of at least 1"):
        PrefixTuning(1, 1, 4, 0)
    with pytest.raises(ValueError, match="compat is 'new'; expected 'adapters' or 'paper'"):
        PrefixGate(4, compat="new")


def test_the_document_s_snippets_run():
    text = (Path(__file__).parents[2] / "docs" / "prefix.md").read_text()
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    namespace: dict = {}
    exec(compile(snippet, "docs/prefix.md", "exec"), namespace)
    assert namespace["y"].shape == (3, 4, 7, 16)
    assert namespace["flat"].flat
