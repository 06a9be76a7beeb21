"""Other packages' checkpoints: files that they wrote, their own numbers, and files that are broken."""

import io
import json
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pelt_fast.checkpoints import load_bottleneck_adapters, load_other_parameters
from pelt_fast.nn import BottleneckAdapter

OPENDELTA = Path(__file__).parents[1] / "data" / "opendelta"
D, M = 12, 4


def randomise(tensors):
    with torch.no_grad():
        for tensor in tensors:
            tensor.normal_(std=0.3)


# ---- OpenDelta


def expected_of(kind):
    return torch.load(OPENDELTA / kind / "expected.pt", weights_only=True)


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("adapter", "encoder.layer.0.output.dense"),
        ("parallel_adapter", "encoder.layer.0.intermediate.dense"),
        ("low_rank_adapter", "encoder.layer.0.output.dense"),
    ],
)
def test_opendelta_layer(kind, path):
    layers = load_bottleneck_adapters(OPENDELTA / kind)
    assert len(layers) == 4
    expected = expected_of(kind)
    layer = layers[path]
    y = layer(expected["output"], expected["x"] if layer.is_parallel else None)
    assert not torch.allclose(y, expected["output"], atol=0.05)
    torch.testing.assert_close(y, expected["result"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["adapter", "parallel_adapter", "low_rank_adapter"])
def test_opendelta_model(kind):
    """A BERT of today's transformers with our adapters in it gives the hidden states that OpenDelta's gave."""
    transformers = pytest.importorskip("transformers")
    base = torch.load(OPENDELTA / "base.pt", weights_only=True)
    config = transformers.BertConfig(**base["sizes"], attn_implementation="eager")
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    model.load_state_dict(base["state_dict"])
    model.load_state_dict(load_other_parameters(OPENDELTA / kind), strict=False)
    layers = load_bottleneck_adapters(OPENDELTA / kind)
    for path, layer in layers.items():
        if kind == "parallel_adapter":
            beside(model, path, layer)
        else:
            behind(model, path, layer)
    with torch.no_grad():
        actual = model(base["input_ids"]).last_hidden_state
    expected = expected_of(kind)["last_hidden_state"]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def behind(model, path, layer):
    model.get_submodule(path).register_forward_hook(lambda module, args, output: layer(output))


def beside(model, path, layer):
    """From the input of ``attention`` to its output, from the input of ``intermediate.dense`` to ``output.dense``'s."""
    read = []
    reader = model.get_submodule(path)
    writer = model.get_submodule(path.replace("intermediate.dense", "output.dense"))

    def write(module, args, output):
        if isinstance(output, tuple):
            return layer(output[0], read.pop()), *output[1:]
        return layer(output, read.pop())

    reader.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    writer.register_forward_hook(write)


def test_opendelta_state_dicts_need_no_config():
    state = torch.load(OPENDELTA / "adapter" / "pytorch_model.bin", weights_only=True)
    layers = load_bottleneck_adapters(state)
    folder = load_bottleneck_adapters(OPENDELTA / "adapter")
    o = torch.randn(2, 3, 16)
    assert list(layers) == list(folder)
    for path, layer in layers.items():
        assert torch.equal(layer(o), folder[path](o))
    relu = load_bottleneck_adapters(state, config={"non_linearity": "relu"})
    assert all(layer.non_linearity.f == "relu" for layer in relu.values())


def test_opendelta_names_the_exact_gelu_otherwise():
    state = torch.load(OPENDELTA / "adapter" / "pytorch_model.bin", weights_only=True)
    layers = load_bottleneck_adapters(state, config={"non_linearity": "gelu_orig"})
    assert {layer.non_linearity.f for layer in layers.values()} == {"gelu"}


def test_what_else_opendelta_trained():
    state = torch.load(OPENDELTA / "adapter" / "pytorch_model.bin", weights_only=True)
    others = load_other_parameters(OPENDELTA / "adapter")
    assert {k for k in state if ".adapter." not in k} == set(others)
    assert "embeddings.LayerNorm.weight" in others
    assert load_other_parameters(OPENDELTA / "parallel_adapter") == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"down_proj.weight": None}, r"at 'p': adapter_down.0.weight is missing"),
        ({"up_proj.bias": None}, r"at 'p': adapter_up.bias is missing; present: adapter_down"),
        (
            {"down_proj.weight": torch.ones(4)},
            r"adapter_down.0.weight is \(4,\); expected a matrix",
        ),
        ({"up_proj.weight": torch.ones(4, 6)}, r"up.weight has shape \(4, 6\); expected \(6, 4\)"),
        ({"up_proj.bias": torch.ones(6).long()}, r"bias has dtype torch.int64; expected floating"),
    ],
)
def test_incomplete_adapters_are_named(change, message):
    state = {
        "down_proj.weight": torch.ones(4, 6),
        "down_proj.bias": torch.ones(4),
        "up_proj.weight": torch.ones(6, 4),
        "up_proj.bias": torch.ones(6),
    } | change
    state = {f"p.adapter.modulelist.{k}": v for k, v in state.items() if v is not None}
    with pytest.raises(ValueError, match=message):
        load_bottleneck_adapters(state)


def test_low_rank_adapters_of_rank_2_are_refused():
    state = {
        "p.low_rank_adapter.down_sampler.W_left": torch.ones(6, 2),
        "p.low_rank_adapter.down_sampler.W_right": torch.ones(2, 4),
    }
    with pytest.raises(ValueError, match=r"\(6, 2\) and \(2, 4\); expected .* rank 1"):
        load_bottleneck_adapters(state)


def test_two_deltas_at_one_place_are_refused():
    state = torch.load(OPENDELTA / "adapter" / "pytorch_model.bin", weights_only=True)
    state |= {k.replace(".adapter.", ".parallel_adapter."): v for k, v in state.items()}
    with pytest.raises(ValueError, match=r"two adapters at 'encoder\.layer\.0\.attention"):
        load_bottleneck_adapters(state)


def test_compacter_is_refused():
    state = {"p.compactor.down_sampler.W_left": torch.ones(4, 2, 1)}
    with pytest.raises(ValueError, match="Compacter's projections are no plain matrices"):
        load_bottleneck_adapters(state)


# ---- google-research/adapter-bert


def tensorflow_variables():
    """Names and shapes as in adapter-bert's modeling.py, with the slots of its optimizer and a frozen variable."""
    rng = np.random.default_rng(0)
    variables = {}
    for place in ("layer_0/attention/output", "layer_0/output", "layer_11/output"):
        path = f"bert/encoder/{place}"
        shapes = {"weights1": (D, M), "biases1": (1, M), "weights2": (M, D), "biases2": (1, D)}
        for name, shape in shapes.items():
            variables[f"{path}/adapters/{name}"] = rng.normal(size=shape).astype(np.float32)
            variables[f"{path}/adapters/{name}/adam_m"] = np.zeros(shape, np.float32)
        for name in ("gamma", "beta"):
            variables[f"{path}/LayerNorm/{name}"] = rng.normal(size=D).astype(np.float32)
            variables[f"{path}/LayerNorm/{name}/adam_v"] = np.zeros(D, np.float32)
        variables[f"{path}/dense/kernel"] = np.zeros((D, D), np.float32)
    variables["bert/embeddings/LayerNorm/gamma"] = rng.normal(size=D).astype(np.float32)
    variables["bert/embeddings/LayerNorm/beta"] = rng.normal(size=D).astype(np.float32)
    variables["output_weights"] = rng.normal(size=(3, D)).astype(np.float32)
    variables["output_bias"] = rng.normal(size=3).astype(np.float32)
    variables["global_step"] = np.int64(100)
    return variables


def houlsby(variables, path, o, x):
    """``feedforward_adapter`` and the lines around it in adapter-bert's modeling.py, in numpy."""
    v = {
        k.removeprefix(f"{path}/"): a.astype(np.float64)
        for k, a in variables.items()
        if k != "global_step"
    }
    q = o @ v["adapters/weights1"] + v["adapters/biases1"]
    q = q * 0.5 * (1.0 + np.tanh(np.sqrt(2 / np.pi) * (q + 0.044715 * q**3)))
    s = q @ v["adapters/weights2"] + v["adapters/biases2"] + o + x
    s = (s - s.mean(-1, keepdims=True)) / np.sqrt(s.var(-1, keepdims=True) + 1e-12)
    return s * v["LayerNorm/gamma"] + v["LayerNorm/beta"]


@pytest.fixture
def variables():
    return tensorflow_variables()


def check_houlsby(variables, layers, others):
    o, x = np.random.default_rng(1).normal(size=(2, 5, D))
    for place in ("layer_0/attention/output", "layer_0/output", "layer_11/output"):
        path = "bert.encoder." + place.replace("layer_", "layer.").replace("/", ".")
        norm = nn.LayerNorm(D, eps=1e-12)
        norm.weight.data = others[f"{path}.LayerNorm.weight"]
        norm.bias.data = others[f"{path}.LayerNorm.bias"]
        y = layers[path].double()(torch.tensor(o), torch.tensor(x), norm.double())
        expected = houlsby(variables, f"bert/encoder/{place}", o, x)
        torch.testing.assert_close(y, torch.tensor(expected))
    assert len(layers) == 3


def test_adapter_bert_variables(variables):
    layers, others = load_bottleneck_adapters(variables), load_other_parameters(variables)
    check_houlsby(variables, layers, others)
    assert torch.equal(others["classifier.weight"], torch.tensor(variables["output_weights"]))
    assert torch.equal(others["classifier.bias"], torch.tensor(variables["output_bias"]))
    assert "bert.embeddings.LayerNorm.bias" in others
    assert len(others) == 2 * 4 + 2


@pytest.mark.parametrize("suffix", ["", ":0"])
def test_adapter_bert_arrays_in_a_file(variables, suffix, tmp_path):
    np.savez(tmp_path / "adapters.npz", **{f"{k}{suffix}": v for k, v in variables.items()})
    path = tmp_path / "adapters.npz"
    check_houlsby(variables, load_bottleneck_adapters(path), load_other_parameters(path))


def test_adapter_bert_in_other_byte_order_and_read_only(variables):
    swapped = {
        k: np.asarray(v).astype(np.asarray(v).dtype.newbyteorder(">")) for k, v in variables.items()
    }
    for value in swapped.values():
        value.flags.writeable = False
    check_houlsby(variables, load_bottleneck_adapters(swapped), load_other_parameters(swapped))


def test_adapter_bert_names_are_those_of_transformers(variables):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=8,
        hidden_size=D,
        num_hidden_layers=12,
        num_attention_heads=2,
        intermediate_size=8,
    )
    with torch.device("meta"):
        model = transformers.BertForSequenceClassification(config)
    for path in load_bottleneck_adapters(variables):
        assert isinstance(model.get_submodule(path).LayerNorm, nn.LayerNorm)
    assert set(load_other_parameters(variables)) <= set(model.state_dict())


# ---- adapters


@pytest.fixture
def library():
    return pytest.importorskip("adapters")


def small_bert():
    from transformers import BertConfig

    return BertConfig(
        vocab_size=20,
        hidden_size=D,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
    )


def library_model(kind, config):
    import adapters

    adapters.init(model := kind(config))
    return model


def library_layers(model, name):
    """The library's own modules by the path that the loader gives them."""
    found = {}
    for path, module in model.named_modules():
        if path.endswith(f".adapters.{name}"):
            found[path.removesuffix(f".adapters.{name}")] = module
    return found


def check_layers(layers, theirs):
    assert list(layers) == list(theirs)
    o, x = torch.randn(2, 3, D), torch.randn(2, 3, D)
    norm = nn.LayerNorm(D)
    randomise(norm.parameters())
    for path, layer in layers.items():
        h, _, residual = theirs[path].pre_forward(o, x, norm)
        expected = theirs[path].post_forward(theirs[path](h, residual)[0], o, x, norm)
        torch.testing.assert_close(layer(o, x, norm), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("safe", [False, True], ids=["bin", "safetensors"])
@pytest.mark.parametrize(
    "form", ["seq_bn", "double_seq_bn", "par_bn", "unipelt", "every flag", "layers"]
)
def test_folder_of_the_library(form, safe, tmp_path):
    from adapters import BnConfig, SeqBnConfig
    from transformers import BertModel

    configs = {
        "every flag": BnConfig(
            *(True, True, 3, "gelu_new"),
            ln_after=True,
            use_gating=True,
            scaling="channel",
            adapter_residual_before_ln=True,
            residual_before_ln="post_add",
            original_ln_before=True,
        ),
        "layers": SeqBnConfig(reduction_factor={"0": 2, "default": 5}, leave_out=[]),
    }
    if (form, safe) == ("unipelt", True):
        pytest.skip(
            "the library cannot write prefix tuning as safetensors: its tensors share memory"
        )
    model = library_model(BertModel, small_bert())
    model.add_adapter("task", config=configs.get(form, form))
    randomise(model.parameters())
    model.save_adapter(str(tmp_path), "task", use_safetensors=safe)
    model.eval()
    state = torch.get_rng_state()
    layers = load_bottleneck_adapters(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    check_layers(layers, library_layers(model, "task"))
    assert all(p.requires_grad for layer in layers.values() for p in layer.parameters())
    assert load_other_parameters(tmp_path) == {}


@pytest.mark.usefixtures("library")
def test_layernorm_before_has_two_names_in_the_file(tmp_path):
    from adapters import SeqBnConfig
    from transformers import BertModel

    model = library_model(BertModel, small_bert())
    model.add_adapter("task", config=SeqBnConfig(ln_before=True, non_linearity="prelu"))
    randomise(model.parameters())
    model.save_adapter(str(tmp_path), "task")
    model.eval()
    layers = load_bottleneck_adapters(tmp_path)
    check_layers(layers, library_layers(model, "task"))
    layer = next(iter(layers.values()))
    assert layer.adapter_norm_before is layer.adapter_down[0]
    assert len(list(layer.parameters())) == 7


@pytest.mark.usefixtures("library")
def test_union_of_different_places(tmp_path):
    """Each place has the config that is for it, also in T5, whose blocks number their places."""
    from adapters import BnConfig, ConfigUnion
    from transformers import BertModel, T5Config, T5Model

    union = ConfigUnion(
        BnConfig(True, False, 3, "tanh"),
        BnConfig(False, True, 2, "relu", original_ln_before=True, cross_adapter=True),
    )
    bert = library_model(BertModel, small_bert())
    t5 = library_model(
        T5Model,
        T5Config(vocab_size=20, d_model=D, d_kv=6, d_ff=8, num_layers=1, num_heads=2),
    )
    for name, model in (("bert", bert), ("t5", t5)):
        model.add_adapter("task", config=union)
        randomise(p for n, p in model.named_parameters() if ".adapters." in n)
        model.save_adapter(str(tmp_path / name), "task")
        model.eval()
        layers = load_bottleneck_adapters(tmp_path / name)
        assert {layer.non_linearity.f for layer in layers.values()} == {"tanh", "relu"}
        check_layers(layers, library_layers(model, "task"))


@pytest.mark.usefixtures("library")
def test_weights_with_several_adapters_ask_for_a_name():
    from adapters import SeqBnConfig
    from transformers import BertModel

    model = library_model(BertModel, small_bert())
    for name in ("a", "b"):
        model.add_adapter(name, config=SeqBnConfig(reduction_factor=3))
    randomise(model.parameters())
    model.eval()
    layers = load_bottleneck_adapters(model.state_dict(), config=SeqBnConfig(), name="b")
    check_layers(layers, library_layers(model, "b"))
    with pytest.raises(ValueError, match="holds adapters 'a', 'b'; expected one of them as name"):
        load_bottleneck_adapters(model.state_dict(), config=SeqBnConfig())
    with pytest.raises(ValueError, match="holds adapters 'a', 'b'; expected one of them, not 'c'"):
        load_bottleneck_adapters(model.state_dict(), config=SeqBnConfig(), name="c")
    with pytest.raises(ValueError, match="expected the library's config as config"):
        load_bottleneck_adapters(model.state_dict(), name="a")


def test_loaded_adapters_share_no_memory_with_their_source():
    state = torch.load(OPENDELTA / "adapter" / "pytorch_model.bin", weights_only=True)
    layers = load_bottleneck_adapters(state)
    before = {k: v.clone() for k, v in state.items()}
    randomise(p for layer in layers.values() for p in layer.parameters())
    assert all(torch.equal(v, before[k]) for k, v in state.items())


@pytest.fixture
def folder(tmp_path):
    """What the library saves, written by hand."""
    layer = BottleneckAdapter(D, M)
    randomise(layer.parameters())
    state = {f"encoder.layer.0.output.adapters.t.{k}": v for k, v in layer.state_dict().items()}
    torch.save(state, tmp_path / "pytorch_adapter.bin")
    config = {
        "config": {"non_linearity": "gelu", "reduction_factor": 3, "original_ln_before": True},
        "name": "t",
        "version": "adapters.1.3.0",
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path


def change_config(folder, **fields):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_files_from_before_versions_name_activations_otherwise(folder):
    layer = load_bottleneck_adapters(folder)["encoder.layer.0.output"]
    assert layer.non_linearity.f == "gelu"
    assert (layer.original_ln_before, layer.residual_before_ln) == (True, True)
    change_config(folder, version=None)
    assert load_bottleneck_adapters(folder)["encoder.layer.0.output"].non_linearity.f == "gelu_tanh"
    change_config(folder, config={"non_linearity": "gelu_orig", "reduction_factor": 3})
    assert load_bottleneck_adapters(folder)["encoder.layer.0.output"].non_linearity.f == "gelu"


def test_modules_of_old_versions(folder):
    state = torch.load(folder / "pytorch_adapter.bin", weights_only=True)
    old = {k.replace(".adapters.", ".layer_text_task_adapters."): v for k, v in state.items()}
    torch.save(old, folder / "pytorch_adapter.bin")
    assert list(load_bottleneck_adapters(folder)) == ["encoder.layer.0.output"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"non_linearity": "relu"}, "config has no 'reduction_factor'"),
        (
            {"non_linearity": "relu", "reduction_factor": 3, "ln_before": True},
            "adapter_down.1.weight",
        ),
        (
            {"non_linearity": "relu", "reduction_factor": 3, "use_gating": True},
            "gate.weight is miss",
        ),
        (
            {"non_linearity": "relu", "reduction_factor": 3, "scaling": "learned"},
            "scaling is missing",
        ),
        ({"non_linearity": "sine", "reduction_factor": 3}, "'sine' is not known"),
        ({"non_linearity": "relu", "reduction_factor": 3, "phm_layer": True}, "phm_layer"),
        ({"architecture": "lora", "r": 8}, "0 bottleneck configs are for the adapter at 'encoder"),
        ({"architecture": "union", "configs": []}, "0 bottleneck configs"),
        (["relu"], "0 bottleneck configs"),
    ],
)
def test_configs_that_do_not_fit_are_named(folder, config, message):
    change_config(folder, config=config)
    with pytest.raises(ValueError, match=f"^{re.escape(str(folder))}: .*{message}"):
        load_bottleneck_adapters(folder)


def test_parameters_that_the_config_does_not_have_are_named(folder):
    state = torch.load(folder / "pytorch_adapter.bin", weights_only=True)
    state["encoder.layer.0.output.adapters.t.gate.weight"] = torch.ones(1, D)
    torch.save(state, folder / "pytorch_adapter.bin")
    with pytest.raises(ValueError, match=r"gate\.weight does not belong to its config"):
        load_bottleneck_adapters(folder)


@pytest.mark.usefixtures("library")
def test_compacter_of_the_library_is_refused(tmp_path):
    from transformers import BertModel

    model = library_model(BertModel, small_bert())
    model.add_adapter("task", config="compacter++[phm_dim=2,reduction_factor=2]")
    model.save_adapter(str(tmp_path), "task")
    with pytest.raises(ValueError, match="Compacter"):
        load_bottleneck_adapters(tmp_path)


# ---- what is no checkpoint


class Harmful:
    """A pickle that runs code when it is read."""

    def __reduce__(self):
        return (print, ("this must not run",))


@pytest.mark.parametrize("content", ["harmful", "text", "empty", "cut", "zip", "list"])
def test_broken_weights_are_named(content, folder, capsys):
    path = folder / "pytorch_adapter.bin"
    buffer = io.BytesIO()
    if content == "harmful":
        torch.save({"a": Harmful()}, path)
    elif content == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("data.pkl", b"nothing")
    elif content == "list":
        torch.save([torch.ones(2)], path)
    else:
        torch.save(torch.load(path, weights_only=True), buffer)
        data = {"text": b"not a checkpoint", "empty": b"", "cut": buffer.getvalue()[:500]}
        path.write_bytes(data[content])
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} (is no file of|holds a list)"):
        load_bottleneck_adapters(folder)
    assert "must not run" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"nonsense", b'\x08\x00\x00\x00\x00\x00\x00\x00{"a":1}'])
def test_broken_files_of_other_kinds_are_named(suffix, content, tmp_path):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} is no file of tensors"):
        load_bottleneck_adapters(path)


def test_arrays_of_objects_are_not_unpickled(tmp_path):
    path = tmp_path / "weights.npz"
    np.savez(path, **{"a/adapters/weights1": np.array([Harmful()], dtype=object)})
    with pytest.raises(ValueError, match=r"is no file of tensors that can be read: .*pickle"):
        load_bottleneck_adapters(path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00"])
def test_broken_configs_are_named(text, folder):
    path = folder / "adapter_config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} (is no JSON|holds a list)"):
        load_bottleneck_adapters(folder)


def test_missing_files_are_named(tmp_path, folder):
    with pytest.raises(
        FileNotFoundError, match="nowhere'; expected a folder or a file that exists"
    ):
        load_bottleneck_adapters(tmp_path / "nowhere")
    (folder / "pytorch_adapter.bin").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"expected adapter_config\.json with adapter\.safe"
    ):
        load_bottleneck_adapters(folder)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (None, TypeError, "source is a NoneType; expected a path or a mapping"),
        ([1], TypeError, "source is a list; expected a path or a mapping"),
        ({}, ValueError, "the mapping holds no bottleneck adapters; it is empty"),
        ({"lora_A.weight": torch.ones(2)}, ValueError, "not such as 'lora_A.weight'"),
        ({1: torch.ones(2)}, TypeError, "the mapping has the key 1; expected names"),
        ({"state_dict": {}}, TypeError, "state_dict is a dict; expected a tensor or an array"),
    ],
)
def test_what_is_no_source_is_named(source, error, message):
    for load in (load_bottleneck_adapters, load_other_parameters):
        with pytest.raises(error, match=message):
            load(source)


def test_a_config_of_ones_own_comes_before_the_folders(folder):
    layers = load_bottleneck_adapters(
        folder, config={"non_linearity": "relu", "reduction_factor": 3, "is_parallel": True}
    )
    layer = layers["encoder.layer.0.output"]
    assert (layer.non_linearity.f, layer.is_parallel, layer.bottleneck_size) == ("relu", True, M)


def test_a_file_alone_needs_its_config(folder, tmp_path):
    shutil.copy(folder / "pytorch_adapter.bin", tmp_path / "alone.bin")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert load_bottleneck_adapters(tmp_path / "alone.bin", config=config)
    with pytest.raises(ValueError, match="has no config beside it"):
        load_bottleneck_adapters(tmp_path / "alone.bin")
