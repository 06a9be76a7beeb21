"""Prefixes out of files of `adapters` and PEFT: in one form, and what is wrong is named."""

import pytest
import torch

from pelt_fast.checkpoints import load_prefixes

P, D, M, OUT = 3, 8, 4, 32


def mlp(name="a", location="self_prefix", path="bert.prefix_tuning."):
    torch.manual_seed(0)
    shapes = {
        "wte.weight": (P, D),
        "control_trans.0.weight": (M, D),
        "control_trans.0.bias": (M,),
        "control_trans.2.weight": (OUT, M),
        "control_trans.2.bias": (OUT,),
    }
    prefix = f"{path}prefix_tunings.{name}.{location}."
    return {prefix + key: torch.randn(shape) for key, shape in shapes.items()}


def computed(weights):
    tokens, first, first_bias, last, last_bias = weights.values()
    return torch.tanh(tokens @ first.T + first_bias) @ last.T + last_bias


@pytest.mark.parametrize("flat", [False, True])
def test_files_of_the_library_and_of_peft(flat, tmp_path):
    adapters, peft = pytest.importorskip("adapters"), pytest.importorskip("peft")
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=11, intermediate_size=8, **sizes))
    base = BertModel(model.config)
    base.load_state_dict(model.state_dict())
    adapters.init(model)
    config = adapters.PrefixTuningConfig(prefix_length=P, bottleneck_size=M, flat=flat)
    model.add_adapter("a", config=config, set_active=True)
    model.save_adapter(tmp_path / "a", "a")
    (prefix,) = load_prefixes(tmp_path / "a").values()
    if not flat:
        model.eject_prefix_tuning("a")
    (module,) = model.base_model.prefix_tuning.prefix_tunings["a"].values()
    torch.testing.assert_close(prefix.reshape(-1), module.control_trans.detach())

    virtual = peft.PrefixTuningConfig(
        task_type="FEATURE_EXTRACTION",
        num_virtual_tokens=P,
        num_layers=2,
        token_dim=8,
        num_attention_heads=2,
    )
    theirs = peft.get_peft_model(base, virtual)
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight.copy_(prefix)
    theirs.save_pretrained(tmp_path / "peft")
    again = load_prefixes(tmp_path / "peft")
    assert list(again) == ["self_prefix"]
    assert torch.equal(again["self_prefix"], prefix)
    # the same prefix, and so the same model, but for where its positions start
    states = theirs.get_prompt(1)
    for i, (keys, values) in enumerate(module(1)):
        torch.testing.assert_close(states.self_attention_cache.layers[i].keys
                                   if hasattr(states, "self_attention_cache")
                                   else states.layers[i].keys, keys)  # fmt: skip
        assert values.shape == keys.shape


def test_locations_names_and_repeated_keys():
    weights = mlp()
    again = mlp(path="bert.encoder.layer.0.attention.self.prefix_tuning.pool.")
    cross = {k: v + 1 for k, v in mlp(location="cross_prefix").items()}
    other = {k: v - 1 for k, v in mlp(name="b").items()}
    found = load_prefixes({**again, **weights, **cross})
    assert list(found) == ["self_prefix", "cross_prefix"]
    torch.testing.assert_close(found["self_prefix"], computed(weights))
    torch.testing.assert_close(found["cross_prefix"], computed(cross))
    found = load_prefixes({**weights, **other}, name="b")
    torch.testing.assert_close(found["self_prefix"], computed(other))


def test_settings():
    relu = load_prefixes(mlp(), config={"architecture": "prefix_tuning", "non_linearity": "relu"})
    assert not torch.equal(relu["self_prefix"], computed(mlp()))
    flat = {"prefix_tunings.a.self_prefix.control_trans": torch.arange(12.0)}
    union = {"config": {"configs": [{"architecture": "lora"},
                                    {"architecture": "prefix_tuning", "prefix_length": 3}]}}  # fmt: skip
    assert load_prefixes(flat, config=union)["self_prefix"].tolist() == [
        [0.0, 1.0, 2.0, 3.0],
        [4.0, 5.0, 6.0, 7.0],
        [8.0, 9.0, 10.0, 11.0],
    ]


def without(weights, part):
    return {k: v for k, v in weights.items() if part not in k}


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        ({}, {}, ValueError, "holds no prefixes"),
        ({**mlp(), **mlp("b")}, {}, ValueError, "holds prefixes 'a', 'b'; expected one of them"),
        (mlp(), {"name": "c"}, ValueError, "holds prefixes 'a'; expected one"),
        (mlp(), {"name": 1}, TypeError, "name is a int"),
        (without(mlp(), "wte"), {}, ValueError, "self_prefix lacks wte.weight"),
        (
            {**mlp(), next(iter(mlp())): torch.ones(P, D + 1)},
            {},
            ValueError,
            "does not go together",
        ),
        ({**mlp(), next(iter(mlp())): torch.ones(P, D).half()}, {}, ValueError, "go together"),
        (mlp(), {"config": {"non_linearity": 3}}, ValueError, "non_linearity is 3"),
        (mlp(), {"config": {"non_linearity": "cubic"}}, ValueError, "cubic"),
        ({"prefix_tunings.a.x.control_trans": torch.ones(7)}, {}, ValueError, "length is None"),
        (
            {"prefix_tunings.a.x.control_trans": torch.ones(7)},
            {"config": {"prefix_length": 2}},
            ValueError,
            "expected one dimension and a config with a length that divides it",
        ),
        ({"prompt_embeddings": torch.ones(7)}, {}, ValueError, "expected two dimensions"),
    ],
)
def test_errors(source, options, error, message):
    with pytest.raises(error, match=message):
        load_prefixes(source, **options)
