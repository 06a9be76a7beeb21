"""Each check catches the fault that it is there for: real kernel files with one line broken."""

import pytest
import torch

from pelt_fast.testing.tolerance import deviations
from pelt_fast.testing.workloads import Adapter, Case

pytest.importorskip("triton")
from pelt_fast.backends.triton_ import lora as triton_lora
from pelt_fast.testing.gpu_free import Trace, compiling, inspect_kernel, mutant, violations

ODD = Case("odd", (21,), 37, 29, (Adapter(3),), x_layout="sliced", dy_layout="sliced")
DROPOUT = Case("dropout", (21,), 36, 28, (Adapter(3, 0.5, 0.5), Adapter(4, 0.5, 0.25)))
STRIPS = Case("strips", (70,), 40, 24, (Adapter(4),))


@pytest.fixture
def broken(monkeypatch, tmp_path, kernels):
    """`broken(file, old, new)` puts a broken copy of one kernel file under the backend."""
    if kernels.device != "cpu":
        pytest.skip("a broken kernel may take a GPU down")

    def put(file, old, new):
        monkeypatch.setattr(
            triton_lora, file, mutant(getattr(triton_lora, file), old, new, tmp_path)
        )

    return put


OUT_OF_BOUNDS = [
    ("shrink", "mask=live_t[:, None] & live_k[None, :], other", "mask=live_t[:, None], other"),
    ("shrink", "mask=live_k[:, None] & live_r[None, :]", "mask=live_k[:, None]"),
    ("linear", "mask=live_t[:, None] & live_k[None, :], other", "mask=live_k[None, :], other"),
    ("linear", "mask=live_k[:, None] & live_n[None, :]", "mask=live_k[:, None]"),
    ("linear", "mask=live_t[:, None] & live_n[None, :]", "mask=live_n[None, :]"),
    ("grad_b", "mask=live_t[:, None] & live_n[None, :]", "mask=live_n[None, :]"),
    ("grad_a", "mask=live_t[:, None] & live_k[None, :]", "mask=live_t[:, None]"),
    # a stride that is assumed instead of taken
    ("shrink", "[:, None] * stride_xt", "[:, None] * features"),
    ("grad_b", "rows[:, None] * stride_dt", "rows[:, None] * columns"),
]


@pytest.mark.parametrize(("file", "old", "new"), OUT_OF_BOUNDS)
def test_trace_catches_a_broken_mask_or_stride(file, old, new, broken, kernels):
    inputs = ODD.make(torch.float32)
    kernels.run(inputs, Trace())
    broken(file, old, new)
    with pytest.raises(Exception, match=r"outside (every argument|the tensor's view)"):
        kernels.run(inputs, Trace())


RACES = [
    ("grad_b", "(tile_strip.to(tl.int64) * columns + long_cols)", "long_cols"),
    ("grad_a", "(tile_strip.to(tl.int64) * total_rank + ranks)", "ranks"),
    ("shrink", "(split.to(tl.int64) * tokens + rows)", "rows.to(tl.int64)"),
]


@pytest.mark.parametrize(("file", "old", "new"), RACES)
def test_trace_catches_a_race(file, old, new, broken, kernels):
    """Partials of a split reduction that land on one another."""
    case = Case("split", (16,), 1040, 24, (Adapter(4),)) if file == "shrink" else STRIPS
    inputs = case.make(torch.bfloat16)
    broken(file, old, new)
    with pytest.raises(Exception, match="was stored by another program"):
        kernels.run(inputs, Trace())


def test_shuffled_order_catches_a_race_by_its_bits(broken, kernels):
    inputs = STRIPS.make(torch.bfloat16)
    broken("grad_a", "(tile_strip.to(tl.int64) * total_rank + ranks)", "ranks")
    # the launch reads the first strip's place alone
    broken(
        "grad_a", "launch_ordered_sum(part[:, start:end]", "launch_ordered_sum(part[:1, start:end]"
    )
    natural, reverse = (
        kernels.run(inputs, Trace(order, check=False))["lora_a.0"] for order in (None, "reverse")
    )
    assert not torch.equal(natural, reverse)


WRONG_VALUES = [
    # backward draws another adapter's mask
    (
        "grad_a",
        "features,\n                    i,",
        "features,\n                    i + 1,",
    ),
    ("linear", "columns, i, thresholds[i]", "columns, i + 1, thresholds[i]"),
    # every block of columns has the first one's mask; in ODD-sized problems there is one block only
    ("shrink", "seed, rows, k, features", "seed, rows, 0, features"),
    # scaling left out, and a rank column counted for its neighbour
    (
        "shrink",
        "acc *= scale_of_rank(ranks, ends, scales)",
        "acc *= scale_of_rank(ranks * 0, ends, scales)",
    ),
    ("grad_b", "(table.ends, table.scales, db", "(table.ends, table.scales[::-1], db"),
    ("shrink", "(ranks < ends[i]))[None", "(ranks <= ends[i]))[None"),
    # the accumulator forgets its start
    ("linear", "acc = tl.dot(x, w, acc,", "acc = tl.dot(x, w,"),
]


@pytest.mark.parametrize(("file", "old", "new"), WRONG_VALUES)
def test_oracle_catches_a_wrong_value(file, old, new, broken, kernels):
    case = Case("blocks", (21,), 132, 28, DROPOUT.adapters) if "rows, k" in old else DROPOUT
    case = (
        Case("scalings", (21,), 36, 28, (Adapter(3, 0.5, 0.5), Adapter(4, -2.0, 0.25)))
        if "scal" in old
        else case
    )
    inputs = case.make(torch.float32)
    broken(file, old, new)
    found = deviations(kernels.run(inputs), inputs, kernels.masks(inputs))
    assert any(not deviation.ok for deviation in found)


def test_far_rows_catch_a_32_bit_offset(broken, kernels, tmp_path):
    inputs = Case("far_rows", (3,), 40, 40).make(torch.float16)
    near = kernels.run(inputs)["y"]
    storage = torch.from_file(
        str(tmp_path / "far"), shared=True, size=2**32 + 40, dtype=torch.float16
    )
    far = storage.as_strided((3, 40), (2**30, 1), 2**31)
    far.copy_(inputs.x)
    inputs = inputs.map(lambda name, t: far if name == "x" else t)
    assert torch.equal(kernels.run(inputs)["y"], near)
    broken("shrink", "rows.to(tl.int64)[:, None] * stride_xt", "rows[:, None] * stride_xt")
    assert not torch.equal(kernels.run(inputs)["y"], near)


GATES = [
    (
        "shrink",
        "tl.dot(x, a, acc,",
        "tl.dot(x.to(tl.float32), a.to(tl.float32), acc,",
        "tensor-core",
    ),
    ("shrink", '["tokens", "steps"]', '["tokens", "features", "stride_xt"]', "128-bit global load"),
    ("grad_b", "num_warps=config.num_warps", "num_warps=1", "spilled registers"),
]


@pytest.mark.parametrize(("file", "old", "new", "message"), GATES)
def test_gates_catch_a_bad_kernel(file, old, new, message, broken, kernels):
    inputs = Case("aligned", (512,), 512, 512, (Adapter(16),)).make(torch.bfloat16)
    broken(file, old, new)
    with compiling(80) as launches:
        kernels.launch(inputs)
    launch = next(launch for launch in launches if file in launch.name)
    report = inspect_kernel(launch)
    found = violations(report, tensor_core=True, aligned=True, min_occupancy=0.1)
    assert any(message in violation for violation in found), found
