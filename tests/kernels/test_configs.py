"""Configurations are pure functions of shapes, and legal ones."""

import itertools
from dataclasses import asdict

import pytest
import torch

from pelt_fast.dispatch import LoRAProblem

pytest.importorskip("triton")
from pelt_fast.backends.triton_ import lora as triton_lora
from pelt_fast.kernels.common.adapters import AdapterTable
from pelt_fast.kernels.lora import choice, grad_a, grad_b, linear, shrink

FILES = (shrink, linear, grad_b, grad_a)


def _problem(**changes):
    fields = {
        "op": "lora_linear_fwd",
        "device_type": "cuda",
        "arch": "sm_90",
        "dtype": torch.bfloat16,
        "weight_dtype": torch.bfloat16,
        "adapter_dtypes": (torch.bfloat16,),
        "tokens": 4096,
        "in_features": 1024,
        "out_features": 2048,
        "ranks": (16,),
        "dropout": False,
        "weight_requires_grad": False,
        "weight_is_inference": False,
    }
    return LoRAProblem(**fields | changes)


PROBLEMS = [
    _problem(
        op=op, arch=arch, dtype=dtype, tokens=tokens, in_features=n, ranks=ranks, dropout=dropout
    )
    for op, arch, dtype, tokens, n, ranks, dropout in itertools.product(
        ("lora_linear_fwd", "lora_linear_bwd"),
        ("sm_80", "sm_90", "sm_100", "sm_120"),
        (torch.bfloat16, torch.float32),
        (1, 37, 8192),
        (7, 4096),
        ((1,), (129, 256)),
        (False, True),
    )
]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.__name__.rpartition(".")[2])
def test_default_config_is_legal(file):
    for problem in PROBLEMS:
        config = asdict(file.default_config(problem))
        for name, value in config.items():
            if name.startswith("block_"):
                assert value >= 16, (problem, config)
                assert value & (value - 1) == 0, (problem, config)
        assert config["num_warps"] in (1, 2, 4, 8)
        if "strip" in config:
            assert config["strip"] % config["block_t"] == 0
        if "split_k" in config:
            assert 1 <= config["split_k"] <= 16


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.__name__.rpartition(".")[2])
def test_candidates_are_of_the_default_kind(file):
    candidates = list(file.candidate_configs(_problem()))
    assert len(candidates) == len(set(candidates)) > 4
    assert {type(candidate) for candidate in candidates} == {type(file.default_config(PROBLEMS[0]))}


def test_few_tiles_are_split():
    assert shrink.default_config(_problem(tokens=16, in_features=8192)).split_k > 1
    assert shrink.default_config(_problem(tokens=65536)).split_k == 1


def test_large_rank_reads_dy_twice_rather_than_write_partials():
    assert grad_b.default_config(_problem(op="lora_linear_bwd", ranks=(16,))).with_ds
    assert not grad_b.default_config(_problem(op="lora_linear_bwd", ranks=(256,))).with_ds


def test_cost_counts_every_argument_once():
    problem = _problem(tokens=3, in_features=5, out_features=7, ranks=(2,))
    assert linear.cost(problem) == (2 * 3 * 5 * 7 + 2 * 3 * 7 * 2, 2 * (15 + 35 + 21 + 2 * (3 + 7)))
    assert shrink.cost(problem) == (2 * 3 * 5 * 2, 2 * (15 + 10 + 6))
    assert grad_a.cost(problem) == (2 * 3 * 5 * 2, 2 * (15 + 2 * (3 + 5)))
    assert grad_b.cost(problem) == (4 * 3 * 7 * 2, 2 * (21 + 2 * 2 * (3 + 7)))


def test_thresholds_keep_their_type():
    """As int32 whatever p is: a type that changed with p would compile a new kernel."""
    table = AdapterTable.make([4, 4, 4], [1.0, 1.0, 1.0], [0.25, 0.75, 1.0])
    assert table.ends == (4, 8, 12)
    assert table.thresholds == (2**30, 3 * 2**30 - 2**32, -1)


def test_unsupported_gives_reasons():
    assert triton_lora.unsupported(_problem()) == []
    assert "float64" in triton_lora.unsupported(_problem(dtype=torch.float64))[0]
    assert "rank 257" in triton_lora.unsupported(_problem(ranks=(8, 257)))[0]
    assert "sm_75" in triton_lora.unsupported(_problem(arch="sm_75"))[0]
    assert "mps" in triton_lora.unsupported(_problem(device_type="mps"))[0]
    assert "CPU" in triton_lora.unsupported(_problem(device_type="cpu", arch="avx2"))[0]


def test_dropout_is_fused_and_unaligned_rows_are_not():
    assert choice.prefers_fused(_problem(dropout=True))
    assert not choice.prefers_fused(_problem(in_features=1023))
    assert triton_lora.priority(_problem(dropout=True)) > triton_lora.priority(
        _problem(in_features=1023)
    )
    assert triton_lora.priority(_problem(device_type="cpu")) == 0


def test_model_of_the_choice_grows_with_work():
    small, large = (choice.modelled_seconds(_problem(tokens=t)) for t in (2048, 16384))
    assert all(0 < a < b for a, b in zip(small, large, strict=True))
