"""Other packages' checkpoints: files that they wrote, their own numbers, and files that are broken."""

import collections
import io
import json
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pelt_fast.checkpoints import load_bottleneck_adapters, load_other_parameters, source
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
        ({"up_proj.bias": torch.ones(6).long()}, r"bias has dtype torch.int64; expected float32"),
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
        (["relu"], "its config holds a list; expected configs"),
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
        ({1: torch.ones(2)}, TypeError, "the mapping has a key that is a int; expected names"),
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


# ---- weights that cannot be run, or that are not there


PATH = "encoder.layer.0.output"
PREFIX = f"{PATH}.adapters.t."
WEIGHT = f"{PREFIX}adapter_down.0.weight"
CONFIG = {"non_linearity": "relu", "reduction_factor": 3}
ATOM = 2**30  # squared and times four it is more than any address space


def state(**changes):
    """Weights of one adapter of the library; ``changes`` by the key of its module, dots as ``__``; None: left out."""
    layer = BottleneckAdapter(D, M)
    randomise(layer.parameters())
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    values = {**layer.state_dict(), **changed}
    return {f"{PREFIX}{key}": value for key, value in values.items() if value is not None}


def without_memory():
    tensor = torch.ones(M, D)
    tensor.untyped_storage().resize_(0)
    return tensor


UNFIT = {
    "sparse": (lambda: torch.ones(M, D).to_sparse(), "of layout torch.sparse_coo"),
    "csr": (lambda: torch.ones(M, D).to_sparse_csr(), "of layout torch.sparse_csr"),
    "huge and sparse": (
        lambda: torch.sparse_coo_tensor(torch.zeros(2, 0).long(), torch.zeros(0), (ATOM, ATOM)),
        "of layout torch.sparse_coo",
    ),
    "meta": (lambda: torch.ones(M, D, device="meta"), "on the device meta"),
    "huge on meta": (lambda: torch.ones(ATOM, ATOM, device="meta"), "on the device meta"),
    "nested": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        "a NestedTensor",
    ),
    "strided nested": (lambda: torch.nested.nested_tensor([torch.ones(2)]), "nested"),
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.ones(M, D), 0.1, 0, torch.qint8),
        "quantized",
    ),
    "lazy": (lambda: nn.UninitializedParameter(), "a UninitializedParameter"),
    "expanded": (lambda: torch.ones(1).expand(ATOM, ATOM), "expanded: .* elements"),
    "a little expanded": (lambda: torch.ones(M, 1).expand(M, D), "expanded: 48 elements out of 4"),
    "sliding": (lambda: torch.ones(D + M).unfold(0, D, 1)[:M], "expanded: 48 elements out of 15"),
    "freed": (without_memory, "without its data in memory"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", UNFIT)
def test_weights_that_are_no_dense_memory_are_named(kind):
    make, what = UNFIT[kind]
    with pytest.raises((TypeError, ValueError), match=rf"^the mapping: {WEIGHT} is {what}"):
        load_bottleneck_adapters(state(adapter_down__0__weight=make()), config=CONFIG)
    parts = {"down_proj.weight": make(), "up_proj.weight": torch.ones(D, M)}
    opendelta = {f"p.adapter.modulelist.{part}": value for part, value in parts.items()}
    with pytest.raises((TypeError, ValueError), match=rf"down_proj\.weight is {what}"):
        load_bottleneck_adapters(opendelta)
    with pytest.raises((TypeError, ValueError), match=rf"^the mapping: norm\.weight is {what}"):
        load_other_parameters(opendelta | {"norm.weight": make()})


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", UNFIT)
def test_weights_that_no_adapter_has_are_not_looked_at(kind):
    make, _ = UNFIT[kind]
    assert load_bottleneck_adapters(state() | {"encoder.weight": make()}, config=CONFIG)


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.int64, torch.uint8, torch.bool, torch.complex64),
        *(torch.float8_e4m3fn, torch.float8_e5m2),
    ],
    ids=str,
)
@pytest.mark.parametrize("every", [False, True], ids=["one", "every"])
def test_dtypes_that_do_not_run_are_named(dtype, every):
    weights = state(adapter_down__0__weight=torch.ones(M, D).to(dtype))
    if every:
        weights = {key: value.to(dtype) for key, value in weights.items()}
    message = rf"adapter_down\.0\.weight has dtype {dtype}; expected float32, bfloat16, float16 or"
    with pytest.raises(ValueError, match=message):
        load_bottleneck_adapters(weights, config=CONFIG)


@pytest.mark.parametrize(
    ("dtypes", "runs"),
    [
        ((torch.float64, torch.float32), False),
        ((torch.float32, torch.float64), False),
        ((torch.float64, torch.float16), False),
        ((torch.bfloat16, torch.float16), False),
        ((torch.bfloat16, torch.float32), True),
        ((torch.float32, torch.float16), True),
        ((torch.float64, torch.float64), True),
    ],
    ids=str,
)
def test_dtypes_that_do_not_run_together_are_named(dtypes, runs):
    """What runs: one dtype, or float32 beside one of half precision."""
    down, others = dtypes
    weights = {key: value.to(others) for key, value in state().items()}
    weights[WEIGHT] = weights[WEIGHT].to(down)
    if not runs:
        message = rf"{PATH}'.* has dtype {others} beside adapter_down.0.weight's {down}; expected"
        with pytest.raises(ValueError, match=message):
            load_bottleneck_adapters(weights, config=CONFIG)
        return
    layer = load_bottleneck_adapters(weights, config=CONFIG)[PATH]
    assert {p.dtype for p in layer.parameters()} == set(dtypes)
    narrow = next((d for d in dtypes if d != torch.float32), torch.float32)
    o = torch.ones(2, 3, D, dtype=narrow)
    assert layer(o, o).dtype == narrow


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_load_as_the_library_loads_them(value):
    weights = state()
    weights[WEIGHT][0, 0] = value
    layer = load_bottleneck_adapters(weights, config=CONFIG)[PATH]
    assert torch.equal(layer.adapter_down[0].weight.isfinite(), weights[WEIGHT].isfinite())
    o = torch.ones(2, 3, D)
    assert layer(o, o).shape == o.shape


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.t().contiguous().t(),
        lambda t: torch.stack([t, t], -1)[..., 0],
        lambda t: torch.cat([t, t])[M:],
        lambda t: nn.Parameter(t),
        lambda t: nn.Parameter(t, requires_grad=False),
        lambda t: torch.complex(t, -t).conj().imag,  # a view that negates when it is read
    ],
    ids=["transposed", "strided", "offset", "parameter", "frozen", "negated"],
)
def test_weights_of_any_layout_in_memory_are_copied(change):
    weights = state()
    expected = weights[WEIGHT].clone()
    weights[WEIGHT] = change(expected)
    layer = load_bottleneck_adapters(weights, config=CONFIG)[PATH]
    actual = layer.adapter_down[0].weight
    assert torch.equal(actual, expected)
    assert actual.is_contiguous()
    assert not actual.is_neg()
    assert actual.requires_grad
    assert actual.untyped_storage().nbytes() == M * D * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapter_down__0__weight": None}, "adapter_down.0.weight is missing"),
        ({"adapter_up__weight": None}, "adapter_up.weight is missing"),
        ({"adapter_up__bias": None}, "adapter_up.bias is missing"),
        ({"adapter_down__0__weight": torch.ones(())}, r"0.weight is \(\); expected a matrix"),
        (
            {"adapter_down__0__weight": torch.ones(0, D)},
            r"0.weight is \(0, 12\); expected a matrix",
        ),
        ({"adapter_down__0__weight": torch.ones(2**62, 0)}, "expected a matrix"),
        ({"adapter_down__0__weight": torch.ones(D, M)}, "bias has shape"),
        (
            {"adapter_up__weight": torch.ones(M, D)},
            r"up.weight has shape \(4, 12\); expected \(12, 4",
        ),
        ({"adapter_up__bias": torch.ones(1, D)}, r"up.bias has shape \(1, 12\); expected \(12,\)"),
        ({"adapter_down__3__weight": torch.ones(M, D)}, "adapter_down.3.weight does not belong"),
        ({"adapter_norm_before__weight": torch.ones(D)}, "adapter_norm_before.weight does not"),
        ({"scaling": torch.ones(1)}, "scaling does not belong"),
        ({"adapter_upp__weight": torch.ones(D, M)}, "adapter_upp.weight does not belong"),
        ({"surprise": torch.ones(1)}, "surprise does not belong"),
    ],
)
def test_weights_that_do_not_fit_each_other_are_named(change, message):
    with pytest.raises(ValueError, match=rf"^the mapping: adapter at '{PATH}': .*{message}"):
        load_bottleneck_adapters(state(**change), config=CONFIG)


def test_two_names_of_one_layernorm_hold_one_value():
    layer = BottleneckAdapter(D, M, ln_before=True)
    values = {f"{PREFIX}{k}": v.clone() for k, v in layer.state_dict().items()}
    config = CONFIG | {"ln_before": True}
    assert load_bottleneck_adapters(values, config=config)
    values[f"{PREFIX}adapter_norm_before.bias"].add_(1)
    message = "adapter_norm_before.bias differs from adapter_down.0.bias; expected one layernorm"
    with pytest.raises(ValueError, match=message):
        load_bottleneck_adapters(values, config=config)


def test_keys_that_mean_one_parameter_are_named(variables):
    path = "bert/encoder/layer_0/output"
    twice = variables | {f"{path}/adapters/weights1:0": variables[f"{path}/adapters/weights1"]}
    message = (
        f"{path}/adapters/weights1 and {path}/adapters/weights1:0 are both there; expected one"
    )
    with pytest.raises(ValueError, match=message):
        load_bottleneck_adapters(twice)
    dotted = variables | {"bert/encoder/layer/0/output/adapters/weights1": np.ones((D, M))}
    with pytest.raises(ValueError, match="are both there; expected one"):
        load_bottleneck_adapters(dotted)
    for key in (f"{path}/LayerNorm/gamma:0", "output_weights:0", "cls/output_bias"):
        with pytest.raises(ValueError, match=rf"and {key} are both there; expected one"):
            load_other_parameters(variables | {key: np.ones(D)})
    old = WEIGHT.replace(".adapters.", ".layer_text_task_adapters.")
    with pytest.raises(ValueError, match=f"{WEIGHT} and {old} are both there; expected one"):
        load_bottleneck_adapters(state() | {old: torch.ones(M, D)}, config=CONFIG)


def test_low_rank_and_dense_adapters_at_one_place_are_refused():
    values = torch.load(OPENDELTA / "low_rank_adapter" / "pytorch_model.bin", weights_only=True)
    place = next(iter(values)).partition(".low_rank_adapter")[0]
    values[f"{place}.adapter.modulelist.down_proj.weight"] = torch.ones(2, 16)
    with pytest.raises(ValueError, match=f"two adapters at '{re.escape(place)}'"):
        load_bottleneck_adapters(values)


def test_stray_parameters_of_other_formats_are_named(variables):
    values = torch.load(OPENDELTA / "adapter" / "pytorch_model.bin", weights_only=True)
    place = "encoder.layer.0.output.dense.adapter.modulelist"
    with pytest.raises(ValueError, match=r"mid_proj\.weight does not belong"):
        load_bottleneck_adapters(values | {f"{place}.mid_proj.weight": torch.ones(1)})
    with pytest.raises(ValueError, match="weights3 does not belong"):
        load_bottleneck_adapters(
            variables | {"bert/encoder/layer_0/output/adapters/weights3": np.ones(1)}
        )


# ---- arrays


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.astype(np.longdouble), "has dtype (longdouble|float128)"),
        (lambda a: a.astype(object), "has dtype object"),
        (lambda a: a.astype(str), "has dtype <U"),
        (lambda a: a.astype("datetime64[s]"), "has dtype datetime64"),
        (lambda a: a.astype([("x", np.float32)]), "has dtype "),
        (lambda a: np.lib.stride_tricks.as_strided(np.zeros(1, "V0"), (10**9,)), "has dtype "),
        (lambda a: a.astype(np.complex64), "has dtype torch.complex64; expected float32"),
        (lambda a: a.astype(np.int32), "has dtype torch.int32; expected float32"),
        (lambda a: a.astype(bool), "has dtype torch.bool; expected float32"),
        (lambda a: np.broadcast_to(np.float32(0), (ATOM, ATOM)), "is expanded"),
        (lambda a: np.broadcast_to(a[:1], a.shape), "is expanded"),
        (lambda a: a[0], r"weight is \(4,\); expected a matrix"),
        (lambda a: a[None], r"weight is \(1, 12, 4\); expected a matrix"),
        (lambda a: a.T, "has shape|is"),
    ],
)
def test_arrays_that_do_not_fit_are_named(variables, change, message):
    key = "bert/encoder/layer_0/output/adapters/weights1"
    with pytest.raises(ValueError, match=message):
        load_bottleneck_adapters(variables | {key: change(variables[key])})
    assert load_bottleneck_adapters(variables | {"global_step": change(variables[key])})


# ---- files


class Calls:
    """A pickle that calls a function of torch's own, which torch.load lets through."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


GADGETS = {
    "bytearray": bytearray(8),
    "bytearray of a size": Calls(bytearray, 2**20),
    "tensor of a size": Calls(torch.Tensor, M, D),
    "storage": Calls(
        torch._utils._rebuild_device_tensor_from_cpu_tensor,
        *(torch.ones(1).expand(M, D), torch.float64, "cpu", False),
    ),
    "sparse": torch.ones(M, D).to_sparse(),
    "meta": torch.ones(M, D, device="meta"),
    "module": nn.Linear(2, 2),
    "array": np.ones(2),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("gadget", GADGETS)
def test_pickles_hold_nothing_but_plain_tensors(gadget, zipped, folder):
    path = folder / "pytorch_adapter.bin"
    values = state(adapter_down__0__weight=GADGETS[gadget])
    torch.save(values, path, _use_new_zipfile_serialization=zipped)
    message = rf"^{re.escape(str(path))} is no file of tensors.*: it needs \S+; expected tensors"
    with pytest.raises(ValueError, match=message):
        load_bottleneck_adapters(folder)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "opcodes",
    [
        b")" + b"\x85" * 10**6,  # (((...)))
        b")" + b"q\x00h\x00\x86" * 60,  # t = (t, t), again and again
        b"(" * 1001 + b"t" * 1001,
        b")" + b"r\x00\x01\x00\x00j\x00\x01\x00\x00\x87" * 40,
    ],
    ids=["deep", "wide", "marks", "malformed"],
)
def test_tuples_in_tuples_are_not_read(opcodes, zipped, folder):
    """As a key they would overflow the stack, or take as long as there is time."""
    content = b"\x80\x02}" + opcodes + b"Ns."
    path = folder / "pytorch_adapter.bin"
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", content)
            archive.writestr("archive/version", "3")
    else:
        first = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
        path.write_bytes(b"".join(pickle.dumps(value, 2) for value in first) + content)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} is no file of tensors.*: \S"):
        load_bottleneck_adapters(folder)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_plain_pickles_of_every_kind_of_tensor_load(zipped, folder):
    values = collections.OrderedDict(state())
    values["frozen"] = nn.Parameter(torch.ones(2), requires_grad=False)
    values["with attributes"] = nn.Parameter(torch.ones(2))
    values["with attributes"].note = 3
    dtypes = [torch.bfloat16, torch.int64, torch.bool, torch.complex64]
    if zipped:  # torch writes others into legacy files that it cannot read
        dtypes += [torch.float8_e4m3fn, torch.uint16]
    for dtype in dtypes:
        values[str(dtype)] = torch.ones(2).to(dtype)
    values[WEIGHT] = nn.Parameter(values[WEIGHT])
    torch.save(values, folder / "pytorch_adapter.bin", _use_new_zipfile_serialization=zipped)
    layer = load_bottleneck_adapters(folder)[PATH]
    assert torch.equal(layer.adapter_down[0].weight, values[WEIGHT])


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("size", [ATOM, D], ids=["huge", "small"])
def test_expanded_weights_in_files_are_not_made_dense(size, zipped, folder):
    one = torch.ones(1)
    values = state(
        adapter_down__0__weight=one.expand(size, size),
        adapter_down__0__bias=one.expand(size),
        adapter_up__weight=one.expand(size, size),
        adapter_up__bias=one.expand(size),
    )
    path = folder / "pytorch_adapter.bin"
    torch.save(values, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(folder))}: {WEIGHT} is expanded"):
        load_bottleneck_adapters(folder)


def test_files_that_promise_more_than_they_hold_are_named(folder):
    """A legacy file whose list of storages is empty leaves its tensors unread."""
    weight = torch.ones(M, D)
    buffer = io.BytesIO()
    torch.save({WEIGHT: weight}, buffer, _use_new_zipfile_serialization=False)
    keys = pickle.dumps([str(weight.untyped_storage()._cdata)], 2)
    content = buffer.getvalue()
    assert content.count(keys) == 1
    path = folder / "pytorch_adapter.bin"
    path.write_bytes(content.partition(keys)[0] + pickle.dumps([], 2))
    message = "is no file of tensors that can be read: it has 0 bytes of tensors; expected 192"
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} {message}"):
        load_bottleneck_adapters(folder)


def test_copies_do_not_outgrow_what_holds_them(folder, monkeypatch):
    """Many names of one large tensor are a small file and much memory."""
    monkeypatch.setattr(source, "SPARE", 2**16)
    tensors = {"down": torch.ones(M, 1000), "up": torch.ones(1000, M)}
    tied = {}
    for i in range(20):
        tied[f"layer.{i}.adapters.t.adapter_down.0.weight"] = tensors["down"]
        tied[f"layer.{i}.adapters.t.adapter_up.weight"] = tensors["up"]
    path = folder / "pytorch_adapter.bin"
    torch.save(tied, path)
    message = rf"^{re.escape(str(folder))}: .* out of the 32000 bytes that it holds"
    with pytest.raises(ValueError, match=message):
        load_bottleneck_adapters(folder)
    torch.save({k: v.clone() for k, v in tied.items()}, path)
    assert len(load_bottleneck_adapters(folder)) == 20


def test_large_products_of_small_factors_are_named():
    values = {}
    for linear in ("down", "up"):
        values[f"p.low_rank_adapter.{linear}_sampler.W_left"] = torch.ones(2**20, 1)
        values[f"p.low_rank_adapter.{linear}_sampler.W_right"] = torch.ones(1, 2**20)
    with pytest.raises(ValueError, match=r"adapter at 'p' takes 4398046511104 bytes; .* out of"):
        load_bottleneck_adapters(values)


@pytest.mark.parametrize("suffix", [".bin", ".npz"])
def test_archives_that_unpack_to_far_more_are_named(suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    zeros = b"\0" * 2**20
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(96):
            archive.writestr(f"archive/data/{i}", zeros)
    message = r"is no file of tensors that can be read: it unpacks to 100663296 bytes"
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} {message}"):
        load_bottleneck_adapters(path, config=CONFIG)


def test_compressed_arrays_load(variables, tmp_path):
    path = tmp_path / "weights.npz"
    np.savez_compressed(path, **variables, slots=np.zeros(2**20, np.float32))
    check_houlsby(variables, load_bottleneck_adapters(path), load_other_parameters(path))


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
@pytest.mark.parametrize("suffix", [".bin", ".npz"])
def test_archives_with_a_name_twice_are_named(suffix, folder, variables, tmp_path):
    path = tmp_path / f"weights{suffix}"
    if suffix == ".npz":
        np.savez(path, **variables)
    else:
        torch.save(state(), path)
    with zipfile.ZipFile(path, "a") as archive:
        name = archive.namelist()[0]
        archive.writestr(name, archive.read(name))
    message = f"that can be read: it has '{re.escape(name)}' twice"
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} is no file .*{message}"):
        load_bottleneck_adapters(path, config=CONFIG)


def as_safetensors(values):
    save = pytest.importorskip("safetensors.torch").save
    return save(values)


def test_safetensors_with_a_name_twice_are_named(tmp_path):
    data = as_safetensors(state())
    size = int.from_bytes(data[:8], "little")
    entry = rb'"%s":\{[^}]*\},?' % re.escape(WEIGHT).encode()
    header = re.sub(
        rb"^\{", b"{" + re.search(entry, data).group().rstrip(b",") + b",", data[8 : 8 + size]
    )
    path = tmp_path / "weights.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    message = f"is no file of tensors that can be read: it has '{WEIGHT}' twice"
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} {message}"):
        load_bottleneck_adapters(path, config=CONFIG)


def cut_files():
    buffers = {".bin": io.BytesIO(), ".pt": io.BytesIO(), ".npz": io.BytesIO()}
    torch.save(state(), buffers[".bin"])
    torch.save(state(), buffers[".pt"], _use_new_zipfile_serialization=False)
    np.savez(buffers[".npz"], **tensorflow_variables())
    return {suffix: buffer.getvalue() for suffix, buffer in buffers.items()}


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".npz", ".safetensors"])
@pytest.mark.parametrize("part", [0, 1 / 1000, 1 / 4, 1 / 2, 3 / 4, 0.999])
def test_truncated_files_are_named(suffix, part, tmp_path):
    data = as_safetensors(state()) if suffix == ".safetensors" else cut_files()[suffix]
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(data[: int(part * len(data))])
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} is no file of tensors.*: \S"):
        load_bottleneck_adapters(path, config=CONFIG)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("suffix", [".bin", ".pt", ".npz", ".safetensors"])
def test_damaged_files_load_or_are_named(suffix, tmp_path):
    data = as_safetensors(state()) if suffix == ".safetensors" else cut_files()[suffix]
    path = tmp_path / f"weights{suffix}"
    rng = np.random.default_rng(0)
    for _ in range(60):
        damaged = np.frombuffer(data, np.uint8).copy()
        size = min(damaged.size, 800) if suffix == ".safetensors" else damaged.size
        damaged[rng.integers(size, size=4)] = rng.integers(256, size=4)
        path.write_bytes(damaged.tobytes())
        try:
            layers = load_bottleneck_adapters(path, config=CONFIG)
        except (OSError, TypeError, ValueError) as error:
            assert str(path) in str(error)  # noqa: PT017
        else:
            assert all(isinstance(layer, BottleneckAdapter) for layer in layers.values())


@pytest.mark.parametrize(
    ("holds", "message"),
    [
        ([torch.ones(2)], "holds a list; expected tensors by name"),
        (torch.ones(2), "holds a Tensor; expected tensors by name"),
        (None, "holds a NoneType; expected tensors by name"),
        (7, "holds a int; expected tensors by name"),
        ("text", "holds a str; expected tensors by name"),
        ({(1, 2): torch.ones(2)}, "has a key that is a tuple; expected names"),
        ({"a": [torch.ones(2)]}, "a is a list; expected a tensor or an array"),
        ({"a": {"b": torch.ones(2)}}, "a is a dict; expected a tensor or an array"),
        ({"a": None}, "a is a NoneType; expected a tensor or an array"),
        ({}, "holds no bottleneck adapters; it is empty"),
    ],
)
def test_pickles_of_something_else_are_named(holds, message, folder):
    path = folder / "pytorch_adapter.bin"
    torch.save(holds, path)
    for load in (load_bottleneck_adapters, load_other_parameters):
        with pytest.raises((TypeError, ValueError), match=rf"^{re.escape(str(path))}:? {message}"):
            load(path)


def test_places_that_are_no_files_are_named(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match=r"it; expected|expected .* in it"):
        load_bottleneck_adapters(tmp_path / "..")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    for name in ("dangling", "loop", "pipe", "a\0b"):
        with pytest.raises(FileNotFoundError, match="expected a folder or a file that exists"):
            load_bottleneck_adapters(tmp_path / name)
    # newer Pythons say that there is no such file
    for name in ("a" * 5000, "a/" * 5000):
        with pytest.raises(
            OSError, match=r"^source is '[^']*'[,;] (which cannot be read:|expected)"
        ):
            load_bottleneck_adapters(name)


@pytest.mark.parametrize("name", ["pytorch_adapter.bin", "adapter_config.json"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "dangling"])
def test_folders_whose_files_are_none_are_named(kind, name, folder):
    (folder / name).unlink()
    if kind == "folder":
        (folder / name).mkdir()
    elif kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to(folder / "nowhere")
    with pytest.raises(
        FileNotFoundError, match=r"expected adapter_config\.json with adapter\.safe"
    ):
        load_bottleneck_adapters(folder)


def test_links_to_files_and_folders_load(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("links")
    for name in ("pytorch_adapter.bin", "adapter_config.json"):
        (other / name).symlink_to(folder / name)
    (other / "folder").symlink_to(folder)
    assert list(load_bottleneck_adapters(other)) == [PATH]
    assert list(load_bottleneck_adapters(other / "folder")) == [PATH]


# ---- configs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 200_000, "is no JSON file that can be read: it is nested too deeply"),
        ('{"a":' * 200_000, "is no JSON file that can be read: it is nested too deeply"),
        ('{"config": ' + "1" * 6000 + "}", "is no JSON file that can be read: "),
        (b"\xff\xfe{}", "is no JSON file that can be read: "),
        ('{"config": {}, "config": {}}', "is no JSON file that can be read: it has 'config' twice"),
        ('{"config": {"a": 1, "a": 2}}', "is no JSON file that can be read: it has 'a' twice"),
        (" " * (2**24 + 1), "is no JSON file that can be read: it has more than 16777216 bytes"),
        ("null", "holds a NoneType; expected an object"),
        ('"relu"', "holds a str; expected an object"),
    ],
    ids=range(9),
)
def test_configs_that_are_no_configs_are_named(text, message, folder):
    path = folder / "adapter_config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} {message}"):
        load_bottleneck_adapters(folder)


WRONG = [None, 0, 1, 1.5, "", "yes", [], [True], {}, {"a": 1}, 10**400, float("nan")]
FLAGS = [
    *("use_gating", "is_parallel", "original_ln_before", "original_ln_after", "ln_before"),
    *("ln_after", "adapter_residual_before_ln", "residual_before_ln", "phm_layer"),
    *("mh_adapter", "output_adapter", "cross_adapter"),
]
NUMBERS = {
    "scaling": [
        None,
        True,
        "",
        "yes",
        [],
        [1.0],
        {},
        10**400,
        10**5000,
        float("nan"),
        float("inf"),
    ],
    "dropout": [None, True, "0.1", [], {}, -0.1, 1.1, 10**400, 10**5000, float("nan")],
    "stochastic_depth": [None, True, "0.1", [], {}, -1, 2, 10**400, float("inf")],
    "reduction_factor": [
        *(None, True, "16", [], [16], 0, -1, 10**400, 10**5000, float("nan"), float("inf")),
        *({}, {"default": "16"}, {"default": None}, {"1": 0, "default": 2}, {"default": [2]}),
    ],
    "init_weights_seed": [True, 1.0, "1", [], {}, 10**400, -(10**30), 2**64],
    "init_weights": [None, True, 1, "", "zeros", [], {}],
    "non_linearity": [None, True, 1, "", "sine", [], ["relu"], {}],
    "leave_out": [0, True, "1", {}, ["1"], [None], [1.5], [True]],
}


@pytest.mark.parametrize(
    ("field", "value"),
    [(f, v) for f in FLAGS for v in WRONG] + [(f, v) for f, vs in NUMBERS.items() for v in vs],
    ids=lambda v: str(v)[:20] if not isinstance(v, int) or v < 10**30 else "large",
)
def test_values_of_configs_are_checked(field, value):
    config = {"config": CONFIG | {field: value}}
    with pytest.raises(ValueError, match=rf"^the mapping: .*{field}|^the mapping: .*activation"):
        load_bottleneck_adapters(state(), config=config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (5, "config is a int; expected a mapping or a name"),
        ([CONFIG], "config is a list; expected a mapping or a name"),
        (b"seq_bn", "config is a bytes; expected a mapping or a name"),
        ({"config": None}, "its config holds a NoneType; expected configs"),
        ({"config": 5}, "its config holds a int; expected configs"),
        ({"config": [CONFIG]}, "its config holds a list; expected configs"),
        ({"config": {"configs": [CONFIG, None]}}, "its config holds a NoneType; expected configs"),
        ({"config": {"configs": [[CONFIG]]}}, "its config holds a list; expected configs"),
        ({"config": {"configs": "relu"}}, "configs is a str; expected a list"),
        ({"config": {"configs": {"a": CONFIG}}}, "configs is a dict; expected a list"),
        ({"config": {"configs": []}}, "0 bottleneck configs are for the adapter"),
        ({"config": {"configs": [CONFIG, CONFIG]}}, "0 bottleneck configs are for the adapter"),
        (CONFIG | {"architecture": 5}, "0 bottleneck configs are for the adapter"),
        ({}, "config has no 'non_linearity'"),
    ],
)
def test_configs_of_other_types_are_named(config, message):
    with pytest.raises((TypeError, ValueError), match=message):
        load_bottleneck_adapters(state(), config=config)


@pytest.mark.parametrize("value", [True, 5, [], ["relu"], {}, "", "sine"])
def test_opendelta_activations_are_checked(value, tmp_path):
    shutil.copytree(OPENDELTA / "adapter", tmp_path / "a")
    path = tmp_path / "a" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"non_linearity": value}))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(tmp_path))}.*(activation|non_linear)"):
        load_bottleneck_adapters(tmp_path / "a")


def test_opendelta_configs_are_mappings():
    with pytest.raises(TypeError, match="config is a str; expected OpenDelta's as a mapping"):
        load_bottleneck_adapters(OPENDELTA / "adapter", config="seq_bn")


@pytest.mark.parametrize("name", [5, [], b"t", ("t",)])
def test_names_are_strings(name):
    with pytest.raises(TypeError, match=r"^name is a \w+; expected a str or None"):
        load_bottleneck_adapters(state(), config=CONFIG, name=name)


def test_what_fails_leaves_everything_as_it_was(monkeypatch):
    """Sources, generators and defaults, also where the first of two adapters is good."""
    values = state() | {
        k.replace("layer.0", "layer.1"): v for k, v in state(adapter_up__bias=torch.ones(2)).items()
    }
    before = {k: v.clone() for k, v in values.items()}
    generator = torch.get_rng_state()
    monkeypatch.setattr(torch, "manual_seed", None)  # it would seed every device
    for config in (CONFIG, CONFIG | {"init_weights_seed": 3}):
        with pytest.raises(ValueError, match=r"adapter at 'encoder\.layer\.1\.output'"):
            load_bottleneck_adapters(values, config=config)
        assert load_bottleneck_adapters(state_of(values, "layer.0"), config=config)
    assert all(torch.equal(v, before[k]) for k, v in values.items())
    assert all(not v.requires_grad for v in values.values())
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.get_default_dtype() == torch.float32


def state_of(values, part):
    return {k: v for k, v in values.items() if part in k}


def test_activations_of_transformers_load():
    """Each that has no kernel is made without memory first: nothing of it may stay so."""
    activations = pytest.importorskip("transformers.activations").ACT2FN
    for name in activations:
        try:
            layer = BottleneckAdapter(D, M, activation=name)
        except Exception:
            continue
        values = {f"{PREFIX}{k}": v for k, v in layer.state_dict().items()}
        loaded = load_bottleneck_adapters(values, config=CONFIG | {"non_linearity": name})[PATH]
        o = torch.ones(2, 3, D)
        assert not any(t.is_meta for t in [*loaded.parameters(), *loaded.buffers()]), name
        torch.testing.assert_close(loaded(o, o), layer(o, o), msg=name)
