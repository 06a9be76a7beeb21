"""The plan of a batch against what NumPy makes of the same ids."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from pelt_fast import MultiAdapterPlan

TILES = (16, 64, 512)


def expected(ids, adapters, capacity=None):
    """The arrays as the docstring of `MultiAdapterPlan.arrays` has them, token by token and tile by tile."""
    capacity = len(ids) if capacity is None else capacity
    bucket = np.array([g if 0 <= g < adapters else adapters for g in ids], dtype=np.int64)
    perm = np.argsort(bucket, kind="stable")
    counts = np.bincount(bucket, minlength=adapters + 1)
    indptr = np.concatenate([[0], np.cumsum(counts)])
    arrays = [bucket, perm, indptr]
    for size in TILES:
        rows = [
            (g if g < adapters else -1, start, min(size, indptr[g + 1] - start), 0)
            for g in range(adapters + 1)
            for start in range(indptr[g], indptr[g + 1], size)
        ]
        room = -(-capacity // size) + min(adapters + 1, capacity)
        assert len(rows) <= room
        arrays.append(np.array(rows + [(0, 0, 0, 0)] * (room - len(rows))).reshape(room, 4))
    chunks = np.concatenate([[0], np.cumsum(-(-counts // TILES[-1]))])[: adapters + 1]
    return [*arrays, chunks]


def check(plan, ids, adapters, capacity=None):
    tokens, wanted = len(ids), expected(ids, adapters, capacity)
    assert plan.tokens == tokens
    assert len(plan.arrays) == 7
    for i, (found, value) in enumerate(zip(plan.arrays, wanted, strict=True)):
        assert found.dtype == torch.int32
        if i < 2:
            assert found.shape == (plan.max_tokens,)
            found = found[:tokens]
        np.testing.assert_array_equal(found.cpu().numpy(), value, err_msg=str(i))
    counts = [sum(g == a for g in ids) for a in range(adapters)]
    assert plan.counts.tolist() == counts
    assert plan.active.tolist() == [c > 0 for c in counts]
    assert plan.active_adapters() == [a for a, c in enumerate(counts) if c]


any_id = st.one_of(st.integers(-2, 9), st.sampled_from([-(2**62), 2**31, 2**40, 127]))
any_ids = st.one_of(
    st.lists(any_id, max_size=40),
    # runs, as samples make them, past the sizes of tiles and chunks
    st.lists(st.tuples(any_id, st.integers(0, 700)), max_size=5).map(
        lambda runs: [g for g, n in runs for _ in range(n)]
    ),
)


@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(ids=any_ids, adapters=st.integers(1, 9), more=st.integers(0, 600), second=any_ids)
def test_any_ids(ids, adapters, more, second, device):
    capacity = max(len(ids), len(second)) + more
    plan = MultiAdapterPlan(ids, adapters, max_tokens=capacity, device=device)
    check(plan, ids, adapters, capacity)
    check(MultiAdapterPlan(ids, adapters, device=device), ids, adapters)
    check(plan.update_(second), second, adapters, capacity)


@pytest.mark.parametrize(
    "ids",
    [[], [0], [-1], [-1] * 40, [2] * 1025, [0, 2, 0, 2, -1, 5], list(range(3)) * 171, [3, 2, 1, 0]],
    ids=lambda ids: f"{len(ids)}_{ids[:3]}",
)
@pytest.mark.parametrize("adapters", [1, 3, 200])
def test_named_ids(ids, adapters, device):
    check(MultiAdapterPlan(ids, adapters, device=device), ids, adapters)


@pytest.mark.parametrize(
    "make",
    [
        list,
        tuple,
        np.array,
        lambda ids: np.array(ids, dtype=np.int8),
        lambda ids: np.array(ids, dtype=">i4").astype("=i4"),
        lambda ids: np.repeat(np.array(ids), 2)[::2],
        torch.tensor,
        lambda ids: torch.tensor(ids, dtype=torch.int8),
        lambda ids: torch.tensor(ids, dtype=torch.int32).repeat_interleave(3)[::3],
        lambda ids: torch.tensor(ids)[None].expand(2, -1)[1],
    ],
)
def test_forms_of_ids(make, device):
    ids = [2, 0, -1, 2, 7, 1]
    check(MultiAdapterPlan(make(ids), 3, device=device), ids, 3)


def test_ids_that_may_not_be_written_to_or_run_backwards():
    """As arrays of other libraries are."""
    ids = np.array([2, 0, -1, 2])
    ids.setflags(write=False)
    check(MultiAdapterPlan(ids, 3), ids.tolist(), 3)
    check(MultiAdapterPlan(ids[::-1], 3), ids[::-1].tolist(), 3)


def test_ids_are_read_at_once(device):
    """Who changes them later changes no plan."""
    for ids in (np.array([2, 0, -1]), torch.tensor([2, 0, -1]), torch.tensor([2, 0, -1]).int()):
        plan = MultiAdapterPlan(ids, 3, device=device)
        ids[:] = 1
        check(plan, [2, 0, -1], 3)


def test_updates_stay_in_one_buffer_of_one_size(device):
    plan = MultiAdapterPlan([0, 1, 2] * 300, 4, max_tokens=1000, device=device)
    places = [(t.data_ptr(), t.shape, t.stride()) for t in plan.arrays]
    held = plan.arrays  # views that a captured graph would keep
    for ids in ([3] * 1000, [], [-1] * 7, [1, -1, 1], [9, 0, 3] * 200):
        version = plan._buffer._version
        assert plan.update_(ids) is plan
        check(plan, ids, 4, 1000)
        assert [(t.data_ptr(), t.shape, t.stride()) for t in plan.arrays] == places
        assert plan._buffer._version > version
        fresh = MultiAdapterPlan(ids, 4, max_tokens=1000, device=device)
        assert all(torch.equal(a, b) for a, b in zip(held, fresh.arrays, strict=True))


def test_sizes_depend_on_no_id(device):
    shapes = {
        tuple(t.shape for t in MultiAdapterPlan(ids, 5, device=device).arrays)
        for ids in ([0] * 33, [-1] * 33, list(range(33)), [t % 6 - 1 for t in range(33)])
    }
    assert len(shapes) == 1


def test_too_many_tokens_are_refused_and_nothing_changes(device):
    plan = MultiAdapterPlan([0, 1], 2, device=device)
    with pytest.raises(ValueError, match=r"token_adapter has 3 entries; expected at most .* 2"):
        plan.update_([0, 1, 1])
    check(plan, [0, 1], 2)
    with pytest.raises(ValueError, match="max_tokens"):
        MultiAdapterPlan([0, 1], 2, max_tokens=1)


@pytest.mark.parametrize(
    ("ids", "at", "what"), [([0, 3], 1, 3), ([-2, 0], 0, -2), ([0, 2**40], 1, 2**40)]
)
@pytest.mark.parametrize("make", [list, np.array, torch.tensor])
def test_check_names_the_id_that_is_out_of_range(make, ids, at, what):
    plan = MultiAdapterPlan([-1, 2], 3, check=True)
    message = rf"token_adapter\[{at}\] is {what}; expected -1 or an adapter below 3"
    with pytest.raises(ValueError, match=message):
        plan.update_(make(ids))
    check(plan, [-1, 2], 3)
    with pytest.raises(ValueError, match=message):
        MultiAdapterPlan(make(ids), 3, check=True)


def test_from_samples(device):
    plan = MultiAdapterPlan.from_samples([2, -1, 0], 4, 3, max_tokens=20, device=device)
    check(plan, [2] * 4 + [-1] * 4 + [0] * 4, 3, 20)
    check(MultiAdapterPlan.from_samples(torch.tensor([1]), 0, 2), [], 2)


@pytest.mark.parametrize(
    ("ids", "adapters", "more", "error", "words"),
    [
        ([0.5], 2, {}, TypeError, ["token_adapter", "float", "integers"]),
        (torch.tensor([True]), 2, {}, TypeError, ["token_adapter", "bool", "integers"]),
        (torch.tensor([1j]), 2, {}, TypeError, ["token_adapter", "complex", "integers"]),
        (["a"], 2, {}, TypeError, ["token_adapter", "integers"]),
        (None, 2, {}, TypeError, ["token_adapter", "integers"]),
        ([2**70], 2, {}, TypeError, ["token_adapter", "integers"]),
        ([[0], [1, 2]], 2, {}, TypeError, ["token_adapter", "integers"]),
        ([[0, 1]], 2, {}, ValueError, ["token_adapter", "(1, 2)", "(T,)"]),
        (3, 2, {}, ValueError, ["token_adapter", "()", "(T,)"]),
        (torch.ones(2).int().to_sparse(), 2, {}, TypeError, ["token_adapter", "dense"]),
        ([0], 0, {}, ValueError, ["num_adapters", "0", "at least 1"]),
        ([0], 2.0, {}, TypeError, ["num_adapters", "float", "integer"]),
        ([0], True, {}, TypeError, ["num_adapters", "bool", "integer"]),
        ([0], 2**31, {}, ValueError, ["num_adapters", "2147483648"]),
        ([0], 2, {"max_tokens": -1}, ValueError, ["max_tokens", "-1", "at least 0"]),
        ([0], 2, {"max_tokens": 1.5}, TypeError, ["max_tokens", "float", "integer"]),
    ],
)
def test_bad_arguments(ids, adapters, more, error, words):
    with pytest.raises(error) as raised:
        MultiAdapterPlan(ids, adapters, **more)
    assert all(word in str(raised.value) for word in words), str(raised.value)


class NoReading(TorchDispatchMode):
    """Fails where an operator's result has a size or a number that only the device knows."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().partition(".")[0]
        assert name not in (
            *("aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::masked_select"),
            *("aten::unique_dim", "aten::_unique2", "aten::unique_consecutive", "aten::equal"),
            *("aten::repeat_interleave.Tensor", "aten::is_nonzero", "aten::bincount"),
        ), name
        if name == "aten::index":
            assert all(t is None or t.dtype not in (torch.bool, torch.uint8) for t in args[1])
        if name in ("aten::_to_copy", "aten::copy_"):
            assert (kwargs or {}).get("device") is None
        return function(*args, **(kwargs or {}))


def test_ids_on_the_device_are_never_read_on_the_host(device, monkeypatch):
    ids = torch.tensor([2, 0, -1, 9, 2, 1] * 100, device=device)
    plan = MultiAdapterPlan(ids, 3)

    def read(*_, **__):
        raise AssertionError("reads what is on the device")

    with monkeypatch.context() as patched:
        for name in (
            *("item", "tolist", "nonzero", "numpy", "cpu", "__bool__", "__int__", "__float__"),
            *("__index__", "unique"),
        ):
            patched.setattr(torch.Tensor, name, read)
        with NoReading():
            plan.update_(ids.flip(0))
            built = MultiAdapterPlan(ids, 3, max_tokens=1000)
            plan.counts, plan.active  # noqa: B018
    check(plan, ids.flip(0).tolist(), 3)
    check(built, ids.tolist(), 3, 1000)


def test_ids_that_have_no_values(device):
    """On the meta device there is nothing to read: shapes follow from shapes alone."""
    ids = torch.empty(37, dtype=torch.int64, device="meta")
    plan = MultiAdapterPlan(ids, 3, max_tokens=50)
    assert plan.device.type == "meta"
    real = MultiAdapterPlan([0] * 37, 3, max_tokens=50, device=device)
    assert [t.shape for t in plan.arrays] == [t.shape for t in real.arrays]
    plan.update_(ids[:5])
    assert plan.tokens == 5


def test_copies(device):
    plan = MultiAdapterPlan([0, -1, 1], 2, max_tokens=5, device=device)
    for made in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        check(made, [0, -1, 1], 2, 5)
        versions = [t._version for t in made.arrays]
        check(made.update_([1]), [1], 2, 5)
        assert all(t._version > v for t, v in zip(made.arrays, versions, strict=True))
        check(plan, [0, -1, 1], 2, 5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_made_or_changed_without_gradients(mode, device):
    with mode():
        made = MultiAdapterPlan([0, 1], 2, device=device)
    assert not made._buffer.is_inference()
    made.update_([1, 1])
    with mode():
        made.update_([1, -1])
    check(made, [1, -1], 2)


def test_repr_says_what_it_is():
    text = repr(MultiAdapterPlan([0, 1], 3, max_tokens=9))
    assert all(part in text for part in ("tokens=2", "num_adapters=3", "max_tokens=9", "cpu"))
