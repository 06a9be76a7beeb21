"""Transformers' models with adapters that PEFT trained and saved: each row is what PEFT computes."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
import transformers

import pelt_fast
from pelt_fast.nn import MultiLoRALinear

TOKENS, SAMPLES = 5, 5
SIZES = {"vocab_size": 31, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, **SIZES)
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        **SIZES,
    )
    return transformers.LlamaForCausalLM(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0, **SIZES
    )
    return transformers.T5ForConditionalGeneration(config)


# model, the pool's targets, the adapters' configs
MODELS: dict[str, tuple[Any, list[str], list[dict[str, Any]]]] = {
    "gpt2": (
        gpt2,
        ["c_attn", "c_proj", "c_fc"],
        [
            {"r": 2, "target_modules": ["c_attn", "c_proj"]},
            {"r": 4, "target_modules": ["c_attn"], "use_rslora": True},
            {
                "r": 3,
                "target_modules": ["c_attn", "attn.c_proj", "c_fc"],
                "rank_pattern": {"h.1.attn.c_attn": 1},
                "alpha_pattern": {"c_fc": 5, r"^transformer\.h\.0\..*": 3},
            },
        ],
    ),
    "llama": (
        llama,
        ["q_proj", "v_proj", "up_proj", "lm_head"],
        [
            {"r": 2, "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
            {"r": 8, "target_modules": r".*layers\.\d+\.self_attn\.[qv]_proj"},
            {"r": 1, "target_modules": ["q_proj", "up_proj", "lm_head"], "exclude_modules": ["1.mlp.up_proj"]},
        ],
    ),
    "t5": (
        t5,
        ["q", "v", "wo"],
        [
            {"r": 2, "target_modules": ["q", "v"]},
            {"r": 3, "target_modules": ["wo", "q"]},
            {"r": 1, "target_modules": ["v"]},
        ],
    ),
}  # fmt: skip


@pytest.fixture(params=MODELS, scope="module")
def served(request, tmp_path_factory):
    make, targets, configs = MODELS[request.param]
    torch.manual_seed(0)
    model = make().eval()
    folders = []
    for i, config in enumerate(configs):
        lora = peft.LoraConfig(
            init_lora_weights=False, fan_in_fan_out=request.param == "gpt2", lora_alpha=4, **config
        )
        trained = peft.get_peft_model(copy.deepcopy(model), lora)
        folders.append(tmp_path_factory.mktemp(f"{request.param}{i}"))
        trained.save_pretrained(folders[-1], save_embedding_layers=False)
    return model, targets, folders


def call(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    kwargs = {"decoder_input_ids": ids[:, :3]} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **kwargs).logits


def test_rows_are_pefts(served):
    model, targets, folders = served
    ids = torch.randint(1, 31, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(0))
    mask, names = torch.ones_like(ids), ["1", None, "2", "0", "2"]
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2, "attention_mask": mask}
    with torch.inference_mode():
        expected = {None: call(model, ids)}
        written = {None: model.generate(input_ids=ids, **options)}
        for i, folder in enumerate(folders):
            single = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
            expected[f"{i}"] = call(single, ids)
            written[f"{i}"] = single.generate(input_ids=ids, **options)
        before, parameters = dict(model.state_dict()), dict(model.named_parameters())
        pool = pelt_fast.AdapterPool(model, targets, slots=4, max_rank=8)
        try:
            for i, folder in enumerate(folders):
                pool.load(f"{i}", folder)
            assert list(model.state_dict()) == list(before)
            assert list(dict(model.named_parameters())) == list(parameters)
            with pool.batch(names):
                y, text = call(model, ids), model.generate(input_ids=ids, **options)
            if not model.config.is_encoder_decoder:
                with pool.batch(names, TOKENS) as plan:
                    assert plan.tokens == SAMPLES * TOKENS
                    torch.testing.assert_close(call(model, ids), y, rtol=0, atol=0)
        finally:
            pool.restore()
    assert not any(isinstance(module, MultiLoRALinear) for module in model.modules())
    for i, name in enumerate(names):
        torch.testing.assert_close(y[i], expected[name][i])
        length = min(text.shape[1], written[name].shape[1])
        assert torch.equal(text[i, :length], written[name][i, :length])
    assert not torch.allclose(expected["0"], expected[None])


def test_states_and_configs_of_peft(served):
    model, targets, folders = served
    folder = random.Random(0).choice(folders)
    single = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
    ids = torch.ones(1, TOKENS, dtype=torch.int64)
    pool = pelt_fast.AdapterPool(model, targets, slots=1, max_rank=8)
    try:
        state, config = (
            peft.get_peft_model_state_dict(single, save_embedding_layers=False),
            single.peft_config["default"],
        )
        pool.load("a", state, config)
        with torch.inference_mode(), pool.batch(["a"]):
            y = call(model, ids)
        with torch.inference_mode():
            torch.testing.assert_close(y, call(single, ids))
    finally:
        pool.restore()
