"""The adapter's configurations are pure functions of shapes, and legal ones; so is the choice of a backend."""

import itertools
from dataclasses import asdict

import pytest
import torch

from pelt_fast.dispatch import AdapterProblem

pytest.importorskip("triton")
from pelt_fast.backends.triton_ import adapter
from pelt_fast.kernels.adapter import choice, forward, grad_columns, grad_rows
from pelt_fast.kernels.adapter.operands import Form, Operands
from pelt_fast.kernels.common.hardware import l2_cache, sm_count

FILES = (forward, grad_rows, grad_columns)


def _problem(**changes):
    fields = {
        "op": "bottleneck_adapter_bwd",
        "device_type": "cuda",
        "arch": "sm_90",
        "dtype": torch.bfloat16,
        "param_dtypes": (torch.bfloat16,),
        "tokens": 8192,
        "features": 768,
        "bottleneck": 64,
        "activation": "gelu",
        "pre_ln": False,
        "post_ln": True,
        "skip": True,
        "gate": False,
        "dropout": False,
    }
    return AdapterProblem(**fields | changes)


PROBLEMS = [
    _problem(
        arch=arch, dtype=dtype, tokens=tokens, features=d, bottleneck=m, dropout=extra, pre_ln=extra
    )
    for arch, dtype, tokens, d, m, extra in itertools.product(
        ("sm_80", "sm_90", "sm_100", "sm_120"),
        (torch.bfloat16, torch.float32),
        (1, 37, 100_000),
        (1, 777, 8192),
        (1, 48, 512),
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
        assert config.get("strips", 1) >= 1


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.__name__.rpartition(".")[2])
def test_candidates_are_of_the_default_kind(file):
    candidates = list(file.candidate_configs(_problem()))
    assert len(candidates) == len(set(candidates)) > 4
    assert {type(candidate) for candidate in candidates} == {type(file.default_config(PROBLEMS[0]))}


def test_blocks_are_long_where_there_are_rows_enough():
    assert [
        forward.default_config(_problem(tokens=t)).block_t for t in (1, 2048, 6000, 100_000)
    ] == [16, 16, 32, 64]


def test_rows_are_held_where_they_fit():
    assert forward.default_config(_problem(tokens=2048)).held
    assert not forward.default_config(_problem(tokens=2048, features=4096)).held
    assert not forward.default_config(_problem(tokens=2048, dtype=torch.float32)).held
    assert not forward.default_config(_problem(tokens=2048, post_ln=False)).held


def test_rows_have_sixteen_bytes_a_thread_while_registers_last():
    def tile(**changes):
        config = grad_rows.default_config(_problem(**changes))
        return config.block_t, config.block_d, config.block_m

    assert tile(tokens=2048) == (16, 64, 64)
    assert tile(tokens=100_000) == (32, 32, 64)
    assert tile(tokens=100_000, dropout=True) == (16, 32, 64)
    assert tile(tokens=100_000, bottleneck=256) == (16, 32, 128)
    assert tile(tokens=100_000, bottleneck=512) == (16, 16, 128)
    assert tile(tokens=100_000, bottleneck=129)[2] == 32


@pytest.mark.parametrize("bottleneck", [1, 8, 24, 48, 200])
def test_strides_of_up_are_known_by_what_divides_them(bottleneck):
    """Of a transposed or expanded U nothing is assumed."""
    x, down, up = torch.empty(3, 32), torch.empty(bottleneck, 32), torch.empty(32, bottleneck)

    def align_up(up):
        ops = Operands.make(x, None, down, None, up, *[None] * 8, 1.0, 0.0)
        return Form.make(ops, "relu", False, True, False, "ieee").align_up

    assert align_up(up) == min(bottleneck & -bottleneck, 16)
    assert bottleneck == 1 or align_up(up.T.contiguous().T) == 1
    assert align_up(up[:1].expand(32, -1)) == 1


def test_partials_stay_a_small_part_of_the_bytes():
    for tokens, d, m in itertools.product((512, 2048, 65536), (768, 4096), (8, 64, 256)):
        problem = _problem(tokens=tokens, features=d, bottleneck=m)
        strips = grad_columns.default_config(problem).strips
        partials = 4 * strips * (2 * d * m + 6 * d)
        assert strips == 1 or partials < grad_columns.cost(problem).bytes / 8


def test_slabs_fit_the_cache_and_leave_no_half_of_the_gpu_without_rows():
    for arch, d in itertools.product(("sm_80", "sm_90", "sm_100"), (768, 4096, 8192)):
        problem = _problem(arch=arch, features=d, tokens=100_000)
        rows = grad_columns.slab_rows(problem, 5)
        assert rows % 64 == 0
        assert rows >= 4 * sm_count(arch)
        assert 5 * 2 * d * rows <= l2_cache(arch) or rows <= 8 * sm_count(arch) + 64
    assert grad_columns.slab_rows(_problem(tokens=100), 5) >= 100


def test_cost_counts_every_argument_once():
    problem = _problem(tokens=3, features=5, bottleneck=2, skip=False)
    assert forward.cost(problem) == (4 * 30, 2 * (2 * 15 + 2 * 10 + 6))
    assert grad_rows.cost(problem) == (6 * 30, 2 * (3 * 15 + 2 * 10 + 3 * 6))
    assert grad_columns.cost(problem) == (6 * 30, 2 * (2 * 15 + 4 * 10 + 2 * 6))


def test_unsupported_gives_reasons():
    assert adapter.unsupported(_problem()) == []
    assert "float64" in adapter.unsupported(_problem(dtype=torch.float64))[0]
    assert "8193 features" in adapter.unsupported(_problem(features=8193))[0]
    assert "bottleneck of 513" in adapter.unsupported(_problem(bottleneck=513))[0]
    assert "sm_75" in adapter.unsupported(_problem(arch="sm_75"))[0]
    assert "CPU" in adapter.unsupported(_problem(device_type="cpu", arch="avx2"))[0]


def test_a_large_bottleneck_and_unaligned_rows_belong_to_torch():
    """By the model: no crossover has been measured."""
    for op in ("bottleneck_adapter_fwd", "bottleneck_adapter_bwd"):
        assert choice.prefers_fused(_problem(op=op, bottleneck=48))
        assert not choice.prefers_fused(_problem(op=op, bottleneck=512))
        assert not choice.prefers_fused(_problem(op=op, features=1023))
    assert adapter.priority(_problem()) > 10 > adapter.priority(_problem(bottleneck=512)) > 0
    assert adapter.priority(_problem(device_type="cpu")) == 0


def test_model_of_the_choice_grows_with_work():
    small, large = (choice.modelled_seconds(_problem(tokens=t)) for t in (2048, 16384))
    assert all(0 < a < b for a, b in zip(small, large, strict=True))
