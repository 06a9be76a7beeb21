"""Adapters that must be refused, each with what the refusal has to say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from .exact import Adapter

# all three modules have LoRA
GOOD = next(a for a in map(Adapter, range(100)) if len(a.weights) == 3)
KEY = "base_model.model.out.lora_{}.weight"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def config(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / CONFIG).write_text(json.dumps({**GOOD.config, **changes}))

    return spoil


def config_text(data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / CONFIG).write_bytes(data) and None


def weights(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        change(state)
        save_file({k: v.contiguous() for k, v in state.items()}, folder / WEIGHTS)

    return spoil


def entry(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    return weights(lambda state: state.update({name: change(state[name])}))


def moved(old: str, new: str) -> Callable[[Path], None]:
    return weights(lambda state: state.update({new: state.pop(old)}))


def data(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / WEIGHTS
        path.write_bytes(change(path.read_bytes()))

    return spoil


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def spoiled(raw: bytes) -> bytes:
        length = int.from_bytes(raw[:8], "little")
        found = json.loads(raw[8 : 8 + length])
        found = change(found) or found
        text = json.dumps(found).encode()
        return len(text).to_bytes(8, "little") + text + raw[8 + length :]

    return data(spoiled)


def with_value(value: float) -> Callable[[Tensor], Tensor]:
    def change(t: Tensor) -> Tensor:
        t = t.clone()
        t[-1, -1] = value
        return t

    return change


def to_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save(GOOD.state, folder / "adapter_model.bin")


def too_high_a_rank(folder: Path) -> None:
    large = {KEY.format("A"): torch.ones(5, 8), KEY.format("B"): torch.ones(6, 5)}
    weights(lambda state: state.update(large))(folder)
    config(rank_pattern={**GOOD.config["rank_pattern"], "out": 5})(folder)


def overlapping(found: dict[str, Any]) -> None:
    for value in found.values():
        start, end = value["data_offsets"]
        value["data_offsets"] = [0, end - start]


HEADER = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    # files
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "is a folder without"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), "expected the adapter's config"),
    "a pickle": (to_pickle, "is a pickle, which may run code"),
    "empty": (data(lambda raw: b""), "no safetensors file"),
    "seven bytes": (data(lambda raw: raw[:7]), "no safetensors file"),
    "half a header": (data(lambda raw: raw[:50]), "no safetensors file"),
    "truncated": (data(lambda raw: raw[:-5]), "its header says"),
    "too long": (data(lambda raw: raw + b"1234"), "its header says"),
    "text": (data(lambda raw: b"version https://git-lfs.github.com/spec/v1\n" * 5), "no safetens"),
    "zeros": (data(lambda raw: bytes(500)), "no safetensors file"),
    "a huge header": (data(lambda raw: b"\xff" * 8 + raw), "no safetensors file"),
    "a header of garbage": (data(lambda raw: raw[:8] + b"\x80" * (len(raw) - 8)), "no safetensors"),
    "a deep header": (data(lambda raw: (10**5).to_bytes(8, "little") + b"[" * 10**5), "nested"),
    "a list": (data(lambda raw: (2).to_bytes(8, "little") + b"[]"), "no object"),
    "a name twice": (
        data(lambda raw: (109).to_bytes(8, "little") + HEADER + HEADER[1:-1] + b"}  " + bytes(8)),
        "a name twice",
    ),
    "no shape": (header(lambda h: h[KEY.format("A")].pop("shape") and None), "no sane shape"),
    "an odd shape": (header(lambda h: h[KEY.format("A")].update(shape=[-1, "x"])), "no sane shape"),
    "a huge shape": (header(lambda h: h[KEY.format("A")].update(shape=[2**40, 2**40])), "other bytes"),
    "an odd entry": (header(lambda h: h.update({KEY.format("A"): 3})), "no sane shape"),
    "one place for all": (
        header(overlapping),
        "can be read",
    ),
    # configs
    "empty config": (config_text(b""), "no JSON file"),
    "garbage config": (config_text(b"{]"), "no JSON file"),
    "binary config": (config_text(bytes(range(256))), "no JSON file"),
    "deep config": (config_text(b"[" * 10**5), "no JSON file"),
    "list config": (config_text(b"[]"), "expected an object"),
    "nameless config": (config_text(b"{}"), "peft_type is None"),
    "another method": (config(peft_type="IA3"), "peft_type is 'IA3'"),
    "r is text": (config(r="8"), "r is '8'; expected an integer"),
    "r is zero": (config(r=0), "r is 0"),
    "r is huge": (config(r=10**400), "r is .*expected an integer"),
    "alpha is NaN": (config(lora_alpha=float("nan")), "lora_alpha is nan"),
    "alpha is huge": (config(lora_alpha=10**400), "lora_alpha is .*expected a finite"),
    "scaling overflows": (config(alpha_pattern={"out": 1e300}), "scaling of out"),
    "rank of a list": (config(rank_pattern=[1]), r"rank_pattern is \[1\]"),
    "rank is text": (config(rank_pattern={"out": "1"}), "rank_pattern.*expected an integer"),
    "alpha is none": (config(alpha_pattern={"out": None}), "alpha_pattern.*expected a finite"),
    "a broken pattern": (config(alpha_pattern={"(": 1}), "no pattern"),
    "rslora is text": (config(use_rslora="false"), "use_rslora is 'false'"),
    "no targets": (config(target_modules=None), "target_modules is None"),
    "empty targets": (config(target_modules=[]), "target_modules is empty"),
    "odd targets": (config(target_modules=[1]), r"target_modules is \[1\]"),
    "odd layers": (config(layers_to_transform="1"), "layers_to_transform"),
    "odd layers pattern": (config(layers_pattern=["(a+)+"]), "layers_pattern"),
    "DoRA": (config(use_dora=True), "use_dora is True: DoRA"),
    "bias": (config(bias="all"), "bias is 'all'"),
    "saved modules": (config(modules_to_save=["unserved"]), "modules_to_save"),
    "lora bias": (config(lora_bias=True), "lora_bias"),
    "unknown": (config(use_flux_capacitor=True), "use_flux_capacitor.*does not know"),
    "PiSSA": (config(init_lora_weights="pissa_niter_4"), "changes base weights"),
    # names
    "a module is missing": (
        weights(lambda s: [s.pop(KEY.format(p)) for p in "AB"]),
        "target_modules names out, which has no weights",
    ),
    "a module too many": (
        config(target_modules=["up", "down"]),
        "out has weights in it, but target_modules does not",
    ),
    "a target that is not served": (
        config(target_modules=["up", "down", "out", "unserved"]),
        "target_modules names unserved, a Embedding",
    ),
    "half a module": (weights(lambda s: s.pop(KEY.format("B"))), "without its other half"),
    "another base": (
        moved(KEY.format("A"), "base_model.model.model.layers.0.q_proj.lora_A.weight"),
        "no module of this model",
    ),
    "an adapter's name": (
        moved(KEY.format("A"), "base_model.model.out.lora_A.default.weight"),
        "not called as PEFT saves it",
    ),
    "no prefix": (moved(KEY.format("A"), "out.lora_A.weight"), "not called as PEFT saves it"),
    "a magnitude": (moved(KEY.format("A"), "base_model.model.out.lora_magnitude_vector"), "DoRA"),
    "an embedding": (moved(KEY.format("A"), "base_model.model.unserved.lora_embedding_A"), "embed"),
    "a saved module": (
        weights(lambda s: s.update({"base_model.model.unserved.weight": torch.ones(3, 2)})),
        "no LoRA weight",
    ),
    "nothing": (weights(lambda s: s.clear()), "no LoRA weight in it"),
    # tensors
    "NaN": (entry(KEY.format("A"), with_value(float("nan"))), "NaN or infinity"),
    "infinity": (entry(KEY.format("B"), with_value(float("-inf"))), "NaN or infinity"),
    "too wide for the dtype": (
        entry(KEY.format("B"), lambda t: with_value(1e300)(t.double())),
        "NaN or infinity in torch.float32",
    ),
    "integers": (entry(KEY.format("A"), lambda t: t.int()), "dtype I32"),
    "complex": (entry(KEY.format("A"), lambda t: t.to(torch.complex64)), "dtype C64"),
    "flat": (entry(KEY.format("A"), lambda t: t.flatten()), "expected two dimensions"),
    "empty tensors": (entry(KEY.format("A"), lambda t: t[:0]), "have shapes"),
    "transposed": (entry(KEY.format("B"), lambda t: t.T.contiguous()), "have shapes"),
    "features": (entry(KEY.format("A"), lambda t: t[:, :-1]), "have shapes"),
    "another rank": (config(rank_pattern={}, r=3), "of rank 3 by the config"),
    "too high a rank": (
        too_high_a_rank,
        "out has rank 5; expected at most the pool's max_rank, 4",
    ),
}  # fmt: skip


def spoiled(name: str, folder: Path) -> Path:
    """The good adapter with one thing wrong."""
    GOOD.save(folder)
    BAD[name][0](folder)
    return folder


def good_bytes() -> bytes:
    return save(GOOD.state)
