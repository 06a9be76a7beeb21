"""Each check catches the fault that it is there for: the adapter's real kernel files with one line broken."""

import pytest
import torch

from pelt_fast.testing.adapter_oracle import as_rows
from pelt_fast.testing.adapter_tolerance import deviations
from pelt_fast.testing.adapter_workloads import EVERYTHING, PFEIFFER, T5, AdapterCase

pytest.importorskip("triton")
from pelt_fast.backends.triton_ import adapter
from pelt_fast.kernels.adapter import operands
from pelt_fast.testing.gpu_free import Trace, compiling, inspect_kernel, mutant, violations

SLICED = {"x_layout": "sliced", "skip_layout": "sliced", "dy_layout": "sliced"}
ODD = AdapterCase("odd", (7,), 37, 3, **PFEIFFER, **SLICED)
BLOCKS = AdapterCase("blocks", (36,), 40, 20, **EVERYTHING)


@pytest.fixture
def broken(monkeypatch, tmp_path, adapter_kernels):
    """`broken(file, old, new)` puts a broken copy of one kernel file under the backend."""
    if adapter_kernels.device != "cpu":
        pytest.skip("a broken kernel may take a GPU down")

    def put(file, old, new):
        if file == "operands":  # its functions live on in the files that import them
            copy = mutant(operands, old, new, tmp_path)
            for user in (adapter.forward, adapter.grad_rows, adapter.grad_columns):
                for name in set(vars(user)) & set(vars(copy)):
                    if getattr(vars(user)[name], "__module__", "") == operands.__name__:
                        monkeypatch.setattr(user, name, vars(copy)[name])
        else:
            whole = getattr(adapter, file)
            copy = mutant(whole, old, new, tmp_path)
            for name in ("default_config", "slab_rows"):  # a test may have its own
                if hasattr(whole, name):
                    setattr(copy, name, getattr(whole, name))
            monkeypatch.setattr(adapter, file, copy)
            if file == "grad_columns":
                monkeypatch.setattr(adapter, "Partials", copy.Partials)

    return put


def quick_ones(mutations, count):
    """The first ones; the rest is slow."""
    slow = [pytest.param(*mutation, marks=pytest.mark.slow) for mutation in mutations[count:]]
    return mutations[:count] + slow


OUT_OF_BOUNDS = [
    ("operands", "mask=live_t[:, None] & live_c[None, :]", "mask=live_t[:, None]"),
    ("operands", "mask=live_r[:, None] & live_c[None, :]", "mask=live_c[None, :]"),
    ("forward", "mask=live_t[:, None] & live_c[None, :]", "mask=live_c[None, :]"),
    ("grad_rows", "mask=live_t[:, None] & live_c[None, :]", "mask=live_t[:, None]"),
    ("grad_columns", "d_up, live, earlier", "d_up, live_c[:, None], earlier"),
    # a stride that is assumed instead of taken
    ("operands", "ops.x, ops.stride_xt", "ops.x, ops.features"),
    ("grad_columns", "dy_ptr, stride_dyt", "dy_ptr, ops.features"),
    ("operands", "mask=live_t[:, None] & live_c[None, :]", "mask=live_c[None, :]"),
    ("operands", "mask=live_t[:, None] & live_m[None, :]", "mask=live_t[:, None]"),
    (
        "operands",
        "tl.load(ptr + columns, mask=live_c,",
        "tl.load(ptr + columns, mask=columns >= 0,",
    ),
    ("operands", "ptr + rows * 2, mask=live_t", "ptr + rows * 2, mask=rows >= 0"),
]


@pytest.mark.parametrize(("file", "old", "new"), quick_ones(OUT_OF_BOUNDS, 6))
def test_trace_catches_a_broken_mask_or_stride(file, old, new, broken, adapter_kernels):
    inputs = ODD.make(torch.float32)
    broken(file, old, new)
    with pytest.raises(Exception, match=r"outside (every argument|the tensor's view)|two lanes"):
        adapter_kernels.run(inputs, Trace())


RACES = [
    ("grad_columns", "place = ptr + strip * stride + at", "place = ptr + at"),
    ("grad_rows", "tl.program_id(0) * FORM.block_t", "0"),
    ("forward", "tl.program_id(0) * FORM.block_t", "0"),
    ("grad_columns", "if tile == 0:", "if tile >= 0:"),
]


@pytest.mark.parametrize(("file", "old", "new"), quick_ones(RACES, 2))
def test_trace_catches_a_race(file, old, new, several_blocks, broken, adapter_kernels):
    inputs = BLOCKS.make(torch.bfloat16)
    broken(file, old, new)
    with pytest.raises(Exception, match="by another program"):
        adapter_kernels.run(inputs, Trace())


WRONG_VALUES = [
    # every block of columns has the first one's mask
    ("operands", "rows, start, ops.features", "rows, 0, ops.features"),
    ("grad_rows", "- normal * second[:, None]", ""),
    # a later slab forgets the earlier
    ("grad_columns", "        if earlier:", "        if not earlier:"),
    # statistics that forget the distance of a chunk's mean from the others'
    ("forward", "mean, squares = include_chunk", "mean, _squares = include_chunk"),
    # what is left out
    ("operands", "w * ops.amount", "w"),
    ("operands", "s = e * gate *", "s = e *"),
    ("grad_rows", "(g - first[:, None]", "(g"),
    ("grad_rows", "activate_backward(da[i], q.to(tl.float32), FORM.activation)", "da[i]"),
    # every strip takes the first one's rows, a partial is left out
    ("grad_columns", "begin + strip * strip_rows", "begin + 0 * strip"),
    ("grad_columns", "outs, self.buffer.shape[0]", "outs, self.buffer.shape[0] - 1"),
]


@pytest.mark.parametrize(("file", "old", "new"), quick_ones(WRONG_VALUES, 4))
def test_oracle_catches_a_wrong_value(file, old, new, several_blocks, broken, adapter_kernels):
    inputs = BLOCKS.make(torch.float32)
    broken(file, old, new)
    results = adapter_kernels.run(inputs)
    found = deviations(results, as_rows(inputs), adapter_kernels.mask(inputs))
    assert any(not deviation.ok for deviation in found)


def test_far_rows_catch_a_32_bit_offset(broken, adapter_kernels, far_rows):
    inputs = AdapterCase("far_rows", (3,), 40, 12, **T5).make(torch.float16)
    near = adapter_kernels.run(inputs)["y"]
    far = inputs.map(lambda name, t: far_rows(t, name) if name == "x" else t)
    assert torch.equal(adapter_kernels.run(far)["y"], near)
    broken("forward", "tl.arange(0, FORM.block_t)).to(tl.int64)", "tl.arange(0, FORM.block_t))")
    assert not torch.equal(adapter_kernels.run(far)["y"], near)


GATES = [
    (
        "forward",
        "tl.dot(v, d, q[i],",
        "tl.dot(v.to(tl.float32), d.to(tl.float32), q[i],",
        "tensor-core",
    ),
    ("grad_rows", "num_warps=config.num_warps", "num_warps=1", "spilled registers"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("file", "old", "new", "message"), GATES)
def test_gates_catch_a_bad_kernel(file, old, new, message, broken, adapter_kernels):
    inputs = AdapterCase("aligned", (512,), 256, 128, **T5).make(torch.bfloat16)
    broken(file, old, new)
    if file == "forward":  # its other product
        old = "tl.dot(a[i], u, w,"
        broken("operands", old, "tl.dot(a[i].to(tl.float32), u.to(tl.float32), w,")
    with compiling(80) as launches:
        adapter_kernels.launch(inputs)
    launch = next(launch for launch in launches if file.removeprefix("grad_") in launch.name)
    report = inspect_kernel(launch)
    found = violations(report, tensor_core=True, aligned=True, min_occupancy=0.1, narrow=100)
    assert any(message in violation for violation in found), found
