"""``nn.BitFit``: which parameters it trains, what it saves, and what it takes back."""

import copy

import pytest
import torch

from pelt_fast.nn import BitFit, LoRALinear


def make():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.LayerNorm(6), torch.nn.Linear(6, 2, bias=False)
    )
    return model.requires_grad_(False)


def trained(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


def test_biases_train_and_nothing_else():
    model = make()
    biases = BitFit(model)
    assert trained(model) == ["0.bias", "1.bias"] == list(biases.names)
    assert [p.numel() for p in biases.parameters()] == [6, 6]
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(biases.parameters(), lr=0.1)
    model(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
    changed = [n for n, p in model.state_dict().items() if not torch.equal(p, before[n])]
    assert changed == list(biases.names)
    biases.restore()
    assert trained(model) == []
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert "2 biases, 12 numbers" in repr(biases)


def test_include():
    model = make()
    assert BitFit(model, include=[r"^1\."]).names == ("1.bias",)
    assert trained(model) == ["1.bias"]


def test_files(tmp_path):
    pytest.importorskip("safetensors")
    model, other = make(), make().double()
    biases = BitFit(model)
    with torch.no_grad():
        for parameter in biases.parameters():
            parameter.normal_()
    path = biases.save(tmp_path / "new")
    assert path.name == "biases.safetensors"
    loaded = BitFit(other, train=False)
    loaded.load(tmp_path / "new")
    assert trained(other) == []
    for name, value in biases.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.double())
    with pytest.raises(FileNotFoundError, match=r"biases\.safetensors is not there"):
        loaded.load(tmp_path)
    (tmp_path / path.name).write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="is no file of tensors"):
        loaded.load(tmp_path)


def test_what_does_not_fit_changes_nothing():
    model = make()
    biases = BitFit(model)
    before = copy.deepcopy(biases.state_dict())
    with pytest.raises(ValueError, match=r"state lacks 1\.bias and has 2\.bias beside; expected 2"):
        biases.load_state_dict({"0.bias": torch.ones(6), "2.bias": torch.ones(2)})
    with pytest.raises(ValueError, match=r"state\['1\.bias'\] has shape \(5,\); expected \(6,\)"):
        biases.load_state_dict({"0.bias": torch.ones(6), "1.bias": torch.ones(5)})
    assert all(torch.equal(v, before[n]) for n, v in biases.state_dict().items())


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (torch.full((6,), float("nan")), ValueError, "not finite in torch.float32"),
        (torch.full((6,), 1e300, dtype=torch.float64), ValueError, "not finite in torch.float32"),
        (torch.zeros(6, device="meta"), TypeError, "float32 on the meta device"),
        (torch.zeros(6, dtype=torch.complex64), TypeError, "is torch.complex64; expected"),
        (torch.zeros(6, dtype=torch.bool), TypeError, "is torch.bool; expected"),
        (None, TypeError, "is NoneType; expected a tensor of numbers"),
    ],
    ids=["nan", "overflow", "meta", "complex", "bool", "none"],
)
def test_a_bad_last_bias_changes_nothing(value, error, message):
    biases = BitFit(make())
    before = {n: t.clone() for n, t in biases.state_dict().items()}
    with pytest.raises(error, match=message):
        biases.load_state_dict({"0.bias": torch.ones(6), "1.bias": value})
    assert all(torch.equal(t, before[n]) for n, t in biases.state_dict().items())
    with pytest.raises(TypeError, match="state is a list; expected a mapping"):
        biases.load_state_dict([])


def test_errors():
    with pytest.raises(TypeError, match="model is a str"):
        BitFit("model")
    with pytest.raises(TypeError, match="include is 'bias'; expected a sequence"):
        BitFit(make(), include="bias")
    with pytest.raises(ValueError, match=r"has no bias whose name has one of \['head'\]"):
        BitFit(make(), include=["head"])
    with pytest.raises(ValueError, match=r"model \(Linear\) has no bias below its head"):
        BitFit(torch.nn.Linear(2, 2, bias=False))


def test_a_layer_of_ours_gives_the_gradient():
    layer = LoRALinear(4, 6, r=2).double()
    assert BitFit(layer).names == ("bias",)
    x = torch.randn(3, 4, dtype=torch.float64)
    layer(x).square().sum().backward()
    torch.testing.assert_close(layer.base_layer.bias.grad, (2 * layer(x)).sum(0))


def test_with_peft():
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9
    )
    plain = transformers.BertForSequenceClassification(config)
    names = BitFit(plain, train=False).names
    lora = peft.LoraConfig(target_modules=["query"], lora_bias=True, modules_to_save=["classifier"])
    model = peft.get_peft_model(copy.deepcopy(plain), lora)
    before = set(trained(model))
    biases = BitFit(model)
    assert biases.names == names
    assert all(name.endswith(".bias") for name in set(trained(model)) - before)
    assert len(set(trained(model)) - before) == len(names)
    biases.restore()
    assert set(trained(model)) == before
