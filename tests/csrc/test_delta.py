"""Diff pruning and masking in C++: every instruction set, any number of threads, the same bits."""

import pytest
import torch

from pelt_fast.testing.delta import DiffInputs, wrong

cpp = pytest.importorskip("pelt_fast.backends.cpp")
delta = pytest.importorskip("pelt_fast.backends.cpp.delta")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def run(inputs):
    arguments = (inputs.diff, inputs.log_alpha, inputs.weight, inputs.scale, inputs.seed)
    stretch, dtype = (inputs.lower, inputs.upper), inputs.weight.dtype
    out, count = delta.diff_pruning_fwd(*arguments, *stretch, dtype)
    grads = delta.diff_pruning_bwd(
        *arguments, inputs.dmade, inputs.dcount, *stretch, True, True, True, False, dtype
    )
    names = ("out", "count", "diff", "log_alpha", "scale")
    return dict(zip(names, (out, count, *grads[:3]), strict=True))


@pytest.fixture
def isa():
    before = cpp.isa()
    yield cpp.set_isa
    cpp.set_isa(before)


@pytest.mark.parametrize("name", cpp.available_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(dtype, name, isa):
    isa(name)
    for shape in ((1, 1), (3, 7), (41, 67)):
        inputs = DiffInputs.make(shape, dtype)
        assert not wrong(run(inputs), inputs)
        weight, scores = inputs.weight, inputs.log_alpha
        masked = delta.masking_fwd(weight, scores, 0.3, dtype)
        assert torch.equal(masked, torch.where(scores >= 0.3, weight, 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_change_no_bit(dtype):
    inputs = DiffInputs.make((333, 257), dtype)  # 84 pieces of 1024 elements, the last one short
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(inputs))
    finally:
        torch.set_num_threads(1)
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name
    assert not wrong(results[0], inputs)


def test_memory_that_is_gone_is_named():
    inputs = DiffInputs.make((5, 9), torch.float32)
    inputs.log_alpha.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="log_alpha of shape"):
        run(inputs)
