"""OpenDelta's files as those of `adapters` and PEFT, and back: real files, the libraries themselves, bad ones."""

import json
import re
from pathlib import Path

import pytest
import torch

from pelt_fast.checkpoints.convert import from_opendelta, to_opendelta
from pelt_fast.checkpoints.convert.from_opendelta import reduction_factor

DATA = Path(__file__).parents[1] / "data" / "opendelta"
# what converts without loss; a prefix_wide's network becomes the prefixes that it makes
EXACT = [
    ("lora", "adapters"),
    ("lora", "peft"),
    ("adapter", "adapters"),
    ("low_rank_adapter", "adapters"),
    ("compacter", "adapters"),
    ("parallel_ff", "adapters"),
    ("prefix", "adapters"),
    ("prefix_flat", "adapters"),
    ("soft_prompt", "peft"),
]
HIDDEN = {"prefix_wide": 16}


def tensors_of(kind):
    return torch.load(DATA / kind / "pytorch_model.bin", weights_only=True)


def config_of(kind):
    return json.loads((DATA / kind / "config.json").read_text())


def same(one, other):
    return sorted(one) == sorted(other) and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )


@pytest.mark.parametrize(("kind", "to"), EXACT)
def test_there_and_back_in_memory_and_in_files(kind, to, tmp_path):
    original, config = tensors_of(kind), config_of(kind)
    converted = from_opendelta(DATA / kind, to, name="task")
    back = to_opendelta(converted.state, config=converted.config, others=converted.others)
    assert same(back.state, original)
    from_files = to_opendelta(converted.save(tmp_path / to), others=converted.others)
    assert same(from_files.state, original)
    assert from_files.config == back.config
    again = from_opendelta(from_files.save(tmp_path / "opendelta"), to, name="task")
    assert same(again.state, converted.state)
    assert again.config == converted.config
    for name in ("delta_type", "non_linearity", "lora_r", "lora_alpha", "reduction_factor"):
        assert back.config.get(name) == config.get(name), name
    mapping = from_opendelta(original, to, config=config, name="task")
    assert same(mapping.state, converted.state)


@pytest.mark.parametrize(("kind", "to"), [*EXACT, ("prefix_wide", "adapters")])
def test_the_library_computes_what_opendelta_computed(kind, to, tmp_path):
    library = pytest.importorskip(to)
    transformers = pytest.importorskip("transformers")
    base = torch.load(DATA / "base.pt", weights_only=True)
    model = transformers.BertModel(
        transformers.BertConfig(**base["sizes"]), add_pooling_layer=False
    )
    model.load_state_dict(base["state_dict"])
    converted = from_opendelta(DATA / kind, to, name="task", hidden_size=HIDDEN.get(kind))
    folder, inputs = str(converted.save(tmp_path)), {"input_ids": base["input_ids"]}
    if to == "peft":
        model = library.PeftModel.from_pretrained(model, folder)
        inputs["attention_mask"] = torch.ones_like(base["input_ids"])
    else:
        library.init(model)
        model.set_active_adapters(model.load_adapter(folder))
        written = tmp_path / "written"
        model.save_adapter(str(written), "task")
        ours, theirs = (
            json.loads((f / "adapter_config.json").read_text())["config"]
            for f in (tmp_path, written)
        )
        assert ours == theirs
    model.load_state_dict(converted.others, strict=False)
    with torch.no_grad():
        found = model.eval()(**inputs).last_hidden_state
    expected = torch.load(DATA / kind / "expected.pt", weights_only=True)["last_hidden_state"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_wide_prefix_comes_back_as_the_prefixes_that_it_makes():
    with pytest.raises(ValueError, match="no multiple of keys and values of size 6"):
        from_opendelta(DATA / "prefix_wide", "adapters")
    converted = from_opendelta(DATA / "prefix_wide", "adapters", hidden_size=16)
    assert converted.config["config"]["flat"] is True
    back = to_opendelta(converted.state, config=converted.config)
    assert {key.rpartition(".")[2] for key in back.state} == {"past_key", "past_value"}
    assert same(from_opendelta(back.state, "adapters", config=back.config).state, converted.state)


def test_a_network_may_not_make_far_more_than_it_holds():
    path, wide = "encoder.layer.0.attention.reparams", 1 << 20
    shapes = {
        "wte.weight": (wide, 1),
        "control_trans.0.weight": (1, 1),
        "control_trans.0.bias": (1,),
    }
    shapes |= {"control_trans.2.weight": (wide, 1), "control_trans.2.bias": (wide,)}
    state = {f"{path}.{part}": torch.zeros(shape) for part, shape in shapes.items()}
    with pytest.raises(ValueError, match="what the network makes takes"):
        from_opendelta(state, "adapters", config={}, hidden_size=16)


def test_rslora_keeps_its_scaling():
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 3, "lora_dropout": 0.0, "use_rslora": True}
    state = {f"base_model.model.x.lora_{p}.weight": torch.randn(4, 4) for p in "AB"}
    assert to_opendelta(state, config=config).config["lora_alpha"] == 6.0


@pytest.mark.parametrize(("hidden", "width"), [(16, 4), (16, 5), (768, 48), (768, 7), (10, 3)])
def test_the_library_makes_the_width_of_the_factor(hidden, width):
    assert int(hidden // reduction_factor(hidden, width)) == width


def test_layers_that_have_none_are_left_out():
    state = {k: t for k, t in tensors_of("lora").items() if ".layer.1." in k}
    converted = from_opendelta(state, "adapters", config=config_of("lora"))
    assert converted.config["config"]["leave_out"] == [0]
    assert same(to_opendelta(converted.state, config=converted.config).state, state)


def changed(kind, key=None, value=None, drop=None, **config):
    state = tensors_of(kind)
    if key is not None:
        state[next(k for k in state if k.endswith(key))] = value
    if drop is not None:
        del state[next(k for k in state if k.endswith(drop))]
    return state, {**config_of(kind), **config}


@pytest.mark.parametrize(
    ("case", "to", "message"),
    [
        (changed("lora"), "opendelta", "to is 'opendelta'; expected 'adapters' or 'peft'"),
        (changed("soft_prompt"), "adapters", "expected 'peft' for OpenDelta's soft_prompt"),
        (changed("prefix"), "peft", "expected 'adapters' for OpenDelta's prefix"),
        (changed("parallel_adapter"), "adapters", "an adapter at 'encoder.layer.0.attention'"),
        (changed("lora", drop="lora_B"), "peft", "has no lora_B"),
        (changed("lora", "lora_B", torch.randn(16, 2)), "peft", "expected (any, 3)"),
        (changed("lora", "lora_A", torch.randn(3, 16).int()), "peft", "of float32, bfloat16"),
        (changed("lora", "lora_A", torch.randn(3, 16).to_sparse()), "peft", "plain dense tensor"),
        (changed("lora", "lora_A", torch.randn(1).expand(3, 16)), "peft", "is expanded"),
        (changed("lora", lora_alpha="much"), "peft", "lora_alpha is 'much'; expected a number"),
        (changed("lora", lora_alpha=None), "adapters", "lora_alpha is None; expected a number"),
        (changed("lora", delta_type="adapter"), "peft", "delta_type is 'adapter'"),
        (changed("adapter", non_linearity="gelu"), "adapters", "non_linearity is 'gelu'"),
        (changed("adapter", drop="up_proj.bias"), "adapters", "has no modulelist.up_proj.bias"),
        (changed("adapter", "up_proj.weight", torch.randn(4, 16)), "adapters", "expected (16, 4)"),
        (changed("compacter", "phm_rule", torch.randn(2, 2, 3)), "adapters", "expected (2, 2, 2)"),
        (changed("compacter", "W_right", torch.randn(2, 1, 0)), "adapters", "expected (2, 1, any)"),
        (changed("prefix_flat", drop="past_value"), "adapters", "has no past_value"),
        (changed("prefix_flat", "past_key", torch.randn(2, 16)), "adapters", "expected (2, 16)"),
        (changed("prefix", "2.bias", torch.randn(64).half()), "adapters", "the dtype is"),
        (changed("prefix", "2.bias", torch.randn(63)), "adapters", "expected (64,)"),
        (({}, {}), "peft", "holds no deltas of OpenDelta"),
        (({**tensors_of("lora"), **tensors_of("adapter")}, {}), "peft", "deltas of lora and"),
        ((tensors_of("lora"), None), "peft", "has no config beside it"),
    ],
)
def test_what_is_refused(case, to, message):
    state, config = case
    with pytest.raises(ValueError, match=re.escape(message)):
        from_opendelta(state, to, config=config)


def back_of(kind, to="adapters", **changes):
    converted = from_opendelta(DATA / kind, to, name="task")
    config = dict(converted.config)
    if to == "adapters":
        config["config"] = {**config["config"], **changes}
    return dict(converted.state), {**config, **(changes if to == "peft" else {})}


def without(case, ending):
    state, config = case
    return {k: t for k, t in state.items() if not k.endswith(ending)}, config


def added(case, key, value):
    state, config = case
    return {**state, key: value}, config


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (back_of("lora", use_gating=True), "use_gating is True; expected False"),
        (back_of("lora", use_dora=True), "use_dora is True"),
        (back_of("lora", composition_mode="scale"), "composition_mode is 'scale'"),
        (back_of("lora", r=4), "expected (4, any)"),
        (back_of("lora", r=0), "r is 0; expected an integer from 1 on"),
        (back_of("lora", "peft", bias="all"), "bias is 'all'; expected 'none'"),
        (back_of("lora", "peft", rank_pattern={"a": 3}), "rank_pattern is {'a': 3}"),
        (back_of("lora", "peft", peft_type="IA3"), "peft_type is 'IA3'"),
        (without(back_of("lora", "peft"), "query.lora_B.weight"), "has no B; expected A and B"),
        (added(back_of("lora", "peft"), "x.y", torch.ones(1)), "holds x.y; expected the keys"),
        (back_of("adapter", original_ln_before=True), "original_ln_before is True"),
        (back_of("adapter", scaling=4.0), "scaling is 4.0; expected 1.0"),
        (back_of("adapter", inv_adapter="nice"), "inv_adapter is 'nice'"),
        (back_of("adapter", non_linearity="mish"), "non_linearity is 'mish'"),
        (back_of("adapter", architecture="ia3"), "architecture is 'ia3'"),
        (without(back_of("adapter"), "0.output.adapters.task.adapter_up.bias"), "expected adapter"),
        (back_of("compacter", shared_phm_rule=True), "shared_phm_rule is True"),
        (back_of("compacter", phm_dim=3), "expected (3, any, 1)"),
        (back_of("prefix", use_gating=True), "use_gating is True"),
        (back_of("prefix", non_linearity="relu"), "non_linearity is 'relu'"),
        (back_of("prefix_flat", prefix_length=5), "expected a multiple of 5 tokens"),
        (
            added(
                back_of("prefix_flat"),
                "encoder.layer.1.attention.self.prefix_tuning.pool.prefix_tunings.task.self_prefix.control_trans",
                torch.zeros(192),
            ),
            "differs from another layer's copy",
        ),
        (
            back_of("soft_prompt", "peft", num_transformer_submodules=2),
            "num_transformer_submodules",
        ),
        (
            ({}, {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "lora_dropout": 0.0}),
            "expected the keys",
        ),
        ((tensors_of("lora"), {"r": 3}), "neither PEFT's"),
        ((tensors_of("lora"), None), "has no config beside it"),
    ],
)
def test_what_is_refused_on_the_way_back(case, message):
    state, config = case
    with pytest.raises(ValueError, match=re.escape(message)):
        to_opendelta(state, config=config)


def test_names_and_others_are_checked():
    with pytest.raises(ValueError, match="expected a name without dots"):
        from_opendelta(DATA / "lora", "adapters", name="a.b")
    state, config = back_of("lora")
    key = "encoder.layer.0.attention.self.query.lora.lora_A"
    with pytest.raises(ValueError, match="others holds encoder"):
        to_opendelta(state, config=config, others={key: torch.ones(1)})


def test_files_are_not_run(tmp_path):
    """The readers of `load_bottleneck_adapters`: what is no tensor is refused before it is made."""
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_of("lora")))
    torch.save({"x.lora.lora_A": print}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no file of tensors that can be read"):
        from_opendelta(folder, "peft")
