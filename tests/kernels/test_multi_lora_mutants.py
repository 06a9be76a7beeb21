"""Each check catches the fault that it is there for: the real files of multi-LoRA with one line broken."""

from dataclasses import replace

import pytest
import torch

from pelt_fast.testing import multi_lora_oracle
from pelt_fast.testing.multi_lora_tolerance import deviations
from pelt_fast.testing.multi_lora_workloads import MultiLoRACase

pytest.importorskip("triton")
from pelt_fast.backends.triton_ import multi_lora
from pelt_fast.kernels.multi_lora import groups, tiles
from pelt_fast.testing.gpu_free import Trace, mutant

FILES = ("shrink", "expand", "grad_x", "grad_a", "grad_b", "groups")
SHARED = {"tiles": tiles, "groups": groups}
ODD = MultiLoRACase(
    *("odd", (21,), 37, (29,), 3, (3,)),
    x_layout="sliced",
    dy_layout="sliced",
    base_layout="sliced",
    a_layout="sliced",
    b_layout="sliced",
)
MIXED = MultiLoRACase(
    *("mixed", (21,), 40, (24, 40), 5, (8, 16)), mixed_ranks=True, row_scale="token", dropout_p=0.25
)
PLAIN = replace(MIXED, row_scale="", dropout_p=0.0)
SEED = torch.tensor([11])


def _run(kernels, inputs, trace=None):
    with kernels.context(trace, 90):
        return multi_lora_oracle.run_backend(multi_lora, inputs, SEED if inputs.dropout_p else None)


@pytest.fixture
def broken(monkeypatch, tmp_path, kernels):
    """`broken(file, old, new)` puts a broken copy of one kernel file under the backend."""
    if kernels.device != "cpu":
        pytest.skip("a broken kernel may take a GPU down")

    def put(file, old, new):
        if file in SHARED:  # its functions live on in the files that import them
            copy = mutant(SHARED[file], old, new, tmp_path)
            for user in (getattr(multi_lora, name) for name in FILES if name != file):
                for name in set(vars(user)) & set(vars(copy)):
                    if getattr(vars(user)[name], "__module__", "") == SHARED[file].__name__:
                        monkeypatch.setattr(user, name, vars(copy)[name])
        else:
            copy = mutant(getattr(multi_lora, file), old, new, tmp_path)
        if file != "tiles":
            monkeypatch.setattr(multi_lora, file, copy)

    return put


def quick_ones(mutations, count):
    """The first ones; the rest is slow."""
    slow = [pytest.param(*mutation, marks=pytest.mark.slow) for mutation in mutations[count:]]
    return mutations[:count] + slow


OUT_OF_BOUNDS = [
    ("shrink", "mask=live[:, None] & live_k[None, :]", "mask=live[:, None]"),
    ("expand", "mask = live[:, None] & live_n[None, :]", "mask = live[:, None]"),
    ("grad_x", "mask=live[:, None] & live_k[None, :]", "mask=live[:, None]"),
    ("grad_b", "mask=live[:, None] & live_n[None, :]", "mask=live[:, None]"),
    ("tiles", "mask = live_inner[:, None] & (lanes < rank)", "mask = (lanes < rank)"),
    ("grad_a", "mask=live[:, None] & live_k[None, :]", "mask=live[:, None]"),
    # a stride that is assumed instead of taken
    ("shrink", "tokens[:, None] * stride_xt", "tokens[:, None] * features"),
    ("expand", "tokens[:, None] * strides_base[i]", "tokens[:, None] * columns[i]"),
    ("grad_b", "tokens[:, None] * strides_dy[i]", "tokens[:, None] * columns[i]"),
    ("tiles", "adapter.to(tl.int64) * strides[0]", "adapter.to(tl.int64) * strides[0] * 2"),
    # an id without an adapter
    ("tiles", "ranks_ptr + adapter, mask=adapter >= 0", "ranks_ptr + adapter, mask=adapter >= -1"),
]


@pytest.mark.parametrize(("file", "old", "new"), quick_ones(OUT_OF_BOUNDS, 5))
def test_trace_catches_a_broken_mask_or_stride(file, old, new, broken, kernels):
    inputs = ODD.make(torch.float32)
    broken(file, old, new)
    with pytest.raises(Exception, match=r"outside (every argument|the tensor's view)|by another"):
        _run(kernels, inputs, Trace())


@pytest.fixture
def unequal_tiles(monkeypatch):
    """Programs that share a tile, parts of K in programs of their own."""
    for name in ("shrink", "expand"):
        file = getattr(multi_lora, name)
        default = file.default_config.__wrapped__
        more = {"split": True, "block_k": 16, "part": 32} if name == "shrink" else {}
        changed = lambda p, d=default, m=more: replace(d(p), tile=64, block_t=16, **m)
        monkeypatch.setattr(file, "default_config", changed)


RACES = [
    ("shrink", "(part.to(tl.int64) * count + tokens)", "tokens"),
    ("tiles", "before = (tl.program_id(0) % PER_TILE) * BLOCK_T", "before = 0"),
]


@pytest.mark.parametrize(("file", "old", "new"), RACES)
def test_trace_catches_a_race(file, old, new, unequal_tiles, broken, kernels, monkeypatch):
    inputs = MultiLoRACase("race", (40,), 40, (24,), 1, (4,), "identical").make(torch.float32)
    config = multi_lora.shrink.default_config
    broken(file, old, new)
    monkeypatch.setattr(multi_lora.shrink, "default_config", config)
    with pytest.raises(Exception, match="by another program"):
        _run(kernels, inputs, Trace())


def test_trace_catches_partials_of_groups_on_one_another(broken, kernels):
    inputs = MultiLoRACase("groups", (1030,), 16, (16,), 1, (4,), "identical").make(torch.float32)
    broken("grad_a", "(slot.to(tl.int64) * TOTAL + lanes)", "lanes.to(tl.int64)")
    with pytest.raises(Exception, match="by another program"):
        _run(kernels, inputs, Trace())


WRONG_VALUES = [
    # NaN from beyond the rank
    ("tiles", "tile = tl.where((lanes < rank)[None, :], tile, 0.0)", "tile = tile", PLAIN),
    # adapters without a token keep what was in memory
    ("groups", "& (groups != 1)", "& (groups > 1)", replace(PLAIN, ids="identical")),
    ("grad_b", "db * scaling", "db", PLAIN),
    ("tiles", "live) * scaling_of(scaling_ptr, adapter)", "live)", MIXED),
    ("expand", "row_scale * scaling_of(scalings[i], adapter)", "row_scale", MIXED),
    # every projection has the first one's mask
    ("shrink", "(seed, tokens, k, features, PROJECTION,", "(seed, tokens, k, features, 0,", MIXED),
    ("grad_a", "(seed, tokens, first, features, i,", "(seed, tokens, first, features, 0,", MIXED),
    ("grad_x", "(seed, tokens, begin, features, i,", "(seed, tokens, begin, features, 0,", MIXED),
    # another token's row; the next adapter's weights
    (
        "tiles",
        "before + lane, mask=live, other=0)",
        "before + lane * 0, mask=live, other=0)",
        PLAIN,
    ),
    ("shrink", "scaling_of(scalings[i], adapter) * dot", "2 * dot", MIXED),
    ("expand", "y += tl.load(base", "y = tl.load(base", PLAIN),
]


@pytest.mark.parametrize(("file", "old", "new", "case"), quick_ones(WRONG_VALUES, 5))
def test_oracle_catches_a_wrong_value(file, old, new, case, broken, kernels):
    inputs = case.make(torch.float32)
    broken(file, old, new)
    keep = multi_lora_oracle.masks(inputs, SEED if inputs.dropout_p else None)
    results = _run(kernels, inputs)
    results["y"] = results["y"].reshape(inputs.dy.shape)
    assert any(not deviation.ok for deviation in deviations(results, inputs, keep))


def test_partials_in_a_wrong_place_are_caught(broken, kernels):
    ids = (0,) * 515 + (1,) * 520 + (2,)
    case = MultiLoRACase("groups", (len(ids),), 16, (16,), 4, (4,), base=False)
    inputs = case.make(torch.float32).with_ids(ids)
    broken("groups", "begin // ROWS * 2 + min(index, 1)", "begin // ROWS * 2")
    results = _run(kernels, inputs)
    found = deviations({"lora_a.0": results["lora_a.0"]}, inputs, [None])
    assert any(not deviation.ok for deviation in found)


def test_far_slots_catch_a_32_bit_offset(broken, kernels, far_rows):
    inputs = MultiLoRACase("far", (3,), 40, (24,), 3, (4,), ids="distinct").make(torch.float16)
    near = _run(kernels, inputs)["y"]
    far = inputs.map(
        lambda name, t: (
            far_rows(t.reshape(3, -1), name).unflatten(1, t.shape[1:]) if name == "lora_a.0" else t
        )
    )
    assert torch.equal(_run(kernels, far)["y"], near)
    broken("tiles", "adapter.to(tl.int64) * strides[0]", "adapter * strides[0]")
    assert not torch.equal(_run(kernels, far)["y"], near)
