"""Writes this folder's files with OpenDelta itself. What it needs: README.md."""

import os

os.environ["DELTACENTER_OFFLINE"] = "1"

import shutil
from pathlib import Path

import torch
from opendelta import (
    AdapterModel,
    CompacterModel,
    LoraModel,
    LowRankAdapterModel,
    ParallelAdapterModel,
    PrefixModel,
    SoftPromptModel,
)
from transformers import BertConfig, BertModel

HERE = Path(__file__).parent
SIZES = {
    "vocab_size": 24,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 8,
    "type_vocab_size": 1,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.3,
}
DELTAS = {
    "adapter": (AdapterModel, {"bottleneck_dim": 4, "unfrozen_modules": ["deltas", "LayerNorm"]}),
    "parallel_adapter": (ParallelAdapterModel, {"bottleneck_dim": 5, "non_linearity": "relu"}),
    "low_rank_adapter": (LowRankAdapterModel, {"reduction_factor": 4, "non_linearity": "tanh"}),
}
OTHERS = {
    "lora": (LoraModel, {"lora_r": 3, "lora_alpha": 6}),
    "compacter": (CompacterModel, {"reduction_factor": 2, "hypercomplex_division": 2}),
    "prefix": (PrefixModel, {"prefix_token_num": 3, "embed_dim": 16, "mid_dim": 5}),
    "prefix_flat": (PrefixModel, {"prefix_token_num": 3, "reparameterize": False}),
    "parallel_ff": (
        ParallelAdapterModel,
        {
            "bottleneck_dim": 5,
            "non_linearity": "relu",
            "modified_modules": ["ff@.w1@", "ff@.w2@"],
            "common_structure": True,
        },
    ),
    "prefix_wide": (PrefixModel, {"prefix_token_num": 2, "embed_dim": 6, "mid_dim": 5}),
    "soft_prompt": (SoftPromptModel, {"soft_token_num": 2, "token_init": False}),
}


def randomise(state):
    for tensor in state.values():
        if tensor.is_floating_point():
            tensor.normal_(std=0.3)


def main():
    torch.manual_seed(0)
    base = BertModel(BertConfig(**SIZES), add_pooling_layer=False).eval()
    input_ids = torch.randint(0, SIZES["vocab_size"], (2, 6))
    torch.save(
        {"sizes": SIZES, "state_dict": base.state_dict(), "input_ids": input_ids}, HERE / "base.pt"
    )
    for name, (kind, arguments) in DELTAS.items():
        model = BertModel(BertConfig(**SIZES), add_pooling_layer=False).eval()
        model.load_state_dict(base.state_dict())
        delta = kind(model, **arguments)
        delta.freeze_module(
            exclude=arguments.get("unfrozen_modules", ["deltas"]), set_state_dict=True
        )
        with torch.no_grad():
            randomise(
                model.state_dict()
            )  # what is trained: fresh adapters would compute next to nothing
            layer = delta.delta_modules[1]  # behind, or beside, the feed-forward part of layer 0
            x, output = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
            if name == "parallel_adapter":
                layer.pre_forward(x)
            result = layer.post_forward(output)
            last = model(input_ids).last_hidden_state
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        delta.save_finetuned(str(folder))
        expected = {"x": x, "output": output, "result": result, "last_hidden_state": last}
        torch.save(expected, folder / "expected.pt")
    for name, (kind, arguments) in OTHERS.items():
        model = BertModel(BertConfig(**SIZES), add_pooling_layer=False).eval()
        model.load_state_dict(base.state_dict())
        delta = kind(model, **arguments)
        delta.freeze_module(exclude=["deltas"], set_state_dict=True)
        with torch.no_grad():
            randomise(model.state_dict())
            last = model(input_ids=input_ids).last_hidden_state
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        delta.save_finetuned(str(folder))
        torch.save({"last_hidden_state": last}, folder / "expected.pt")


if __name__ == "__main__":
    main()
