"""Configurations of multi-LoRA are pure functions of shapes, legal, and decide about bits without counting tokens."""

import itertools
from dataclasses import asdict

import pytest
import torch

from pelt_fast.dispatch import MultiLoRAProblem

pytest.importorskip("triton")
from pelt_fast.backends.triton_ import multi_lora
from pelt_fast.kernels.multi_lora import choice, expand, grad_a, grad_b, grad_x, groups, shrink

FILES = (shrink, expand, grad_x, grad_a, grad_b)


def _shapes(**changes):
    fields = {
        "op": "multi_lora_fwd",
        "arch": "sm_90",
        "dtype": torch.bfloat16,
        "tokens": 4096,
        "adapters": 8,
        "in_features": 4096,
        "out_features": (4096,),
        "ranks": (16,),
        "dropout": False,
    }
    return multi_lora._Shapes(**fields | changes)


PROBLEMS = [
    _shapes(
        op=op,
        dtype=dtype,
        tokens=t,
        in_features=k,
        out_features=(n,) * 2,
        ranks=(r, 8),
        dropout=drop,
    )
    for op, dtype, t, k, n, r, drop in itertools.product(
        ("multi_lora_fwd", "multi_lora_bwd"),
        (torch.bfloat16, torch.float32),
        (1, 37, 100_000),
        (1, 777, 11008),
        (1, 4096),
        (1, 16, 256),
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
        assert config["num_warps"] in (4, 8)
        assert config.get("tile", 64) in (16, 64)
        assert config.get("tile", 64) % config.get("block_t", 16) == 0 or "chunks" in config


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.__name__.rpartition(".")[2])
def test_candidates_are_of_the_default_kind(file):
    candidates = list(file.candidate_configs(_shapes()))
    assert len(candidates) == len(set(candidates)) > 4
    assert {type(candidate) for candidate in candidates} == {type(file.default_config(_shapes()))}


DECIDE = {
    shrink: ("block_k", "block_r", "part"),
    expand: ("block_r",),
    grad_x: ("block_r",),
    grad_a: ("block_t", "block_k", "block_r", "chunks", "num_warps"),
    grad_b: ("block_t", "block_n", "block_r", "chunks", "num_warps"),
}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.__name__.rpartition(".")[2])
def test_bits_do_not_depend_on_the_number_of_tokens(file):
    for problem in PROBLEMS:
        found = {
            tuple(getattr(file.default_config(problem._replace(tokens=t)), n) for n in DECIDE[file])
            for t in (1, 16, 512, 513, 4096, 65536)
        }
        assert len(found) == 1, problem


def test_tiles_are_too_low_for_anything_but_mma_sync():
    """Warp-group and tensor-memory products need 64 rows; theirs would be other bits than those of a low tile."""
    for problem in PROBLEMS:
        for file in (shrink, expand, grad_x):
            assert file.default_config(problem).block_t <= 32


def test_parts_of_the_reduced_dimension_are_few_and_whole():
    for problem in PROBLEMS:
        config = shrink.default_config(problem)
        assert config.part % config.block_k == 0
        assert config.parts(max(problem.in_features, *problem.out_features)) <= 16 or (
            problem.in_features != max(problem.out_features)
        )


def test_few_tokens_are_split_and_many_are_not():
    assert shrink.default_config(_shapes(tokens=1)).split
    assert shrink.default_config(_shapes(tokens=64)).split
    assert not shrink.default_config(_shapes(tokens=4096)).split


def test_partials_of_groups_do_not_depend_on_the_number_of_adapters():
    like = torch.empty(0)
    assert groups.partials(like, 512, 512, 7) is None
    found = groups.partials(like, 8192, 512, 7)
    assert found is not None
    assert found.shape == (32, 7)


def test_cost_counts_every_argument_once():
    problem = _shapes(tokens=3, adapters=2, in_features=5, out_features=(7,), ranks=(2,))
    assert shrink.cost(problem) == (2 * 30, 2 * (15 + 2 * 10 + 6))
    assert expand.cost(problem) == (2 * 42, 2 * (42 + 2 * 14 + 6))
    assert grad_x.cost(problem) == (2 * 30, 2 * (15 + 2 * 10 + 6))
    assert grad_a.cost(problem) == (2 * 30, 2 * (15 + 6 + 2 * 10))
    assert grad_b.cost(problem) == (2 * 42, 2 * (21 + 6 + 2 * 14))


def _problem(**changes):
    fields = {
        "op": "multi_lora_fwd",
        "device_type": "cuda",
        "arch": "sm_90",
        "dtype": torch.bfloat16,
        "adapter_dtypes": (torch.bfloat16,),
        "tokens": 4096,
        "adapters": 8,
        "in_features": 4096,
        "out_features": (4096,),
        "rank": 16,
        "row_scale": False,
        "dropout": False,
    }
    return MultiLoRAProblem(**fields | changes)


def test_unsupported_gives_reasons():
    assert multi_lora.unsupported(_problem()) == []
    assert "float64" in multi_lora.unsupported(_problem(dtype=torch.float64))[0]
    assert "rank 257" in multi_lora.unsupported(_problem(rank=257))[0]
    assert "sm_75" in multi_lora.unsupported(_problem(arch="sm_75"))[0]
    assert "CPU" in multi_lora.unsupported(_problem(device_type="cpu", arch="avx2"))[0]


def test_fused_kernels_are_preferred_where_many_adapters_meet():
    """By the model: no crossover has been measured."""
    assert choice.prefers_fused(_problem())
    assert choice.prefers_fused(_problem(tokens=64, adapters=64))
    assert multi_lora.priority(_problem()) > 5
    assert multi_lora.priority(_problem(device_type="cpu")) == 0
