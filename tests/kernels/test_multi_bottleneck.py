"""Batched bottleneck adapters on multi-LoRA's kernels: values, every access checked; machine code through its gates."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pelt_fast.backends.reference_ import multi_bottleneck as oracle
from pelt_fast.backends.torch_ import multi_bottleneck as composed
from pelt_fast.ops.multi_bottleneck import GRADIENTS
from pelt_fast.segments import MultiAdapterPlan

pytest.importorskip("triton")
from pelt_fast.testing.gpu_free import Trace, compiling, inspect_launches, violations
from pelt_fast.testing.gpu_free.sass import BINARIES

IDS, WIDTHS = (3, -1, 0, 2, 2, 1, 9, 0, 0, 3, 2, -7), (20, 0, 3, 17)


def draw(tokens, d, widths, dtype, device, seed, **options: Any):
    g = torch.Generator().manual_seed(0)
    m, n = max(widths), len(widths)

    def of(*shape, std=1.0, mean=0.0):
        return (torch.randn(*shape, generator=g) * std + mean).to(device, dtype)

    bare = options.get("bare", False)
    tensors = [
        of(tokens, d),
        None if bare else of(tokens, d),
        of(n, m, d, std=d**-0.5),
        None if bare else of(n, m, std=0.5),
        of(n, d, m, std=m**-0.5),
        None if bare else of(n, d, std=0.5),
        None if bare else of(n, std=0.25, mean=1.0),
        None if bare else of(tokens, std=0.25, mean=1.0),
        None if bare else of(d, std=0.25, mean=1.0),
        None if bare else of(d, std=0.5),
    ]
    for g_, width in enumerate(widths):  # whatever lies beyond a width is not read
        for i in (2, 3):
            if tensors[i] is not None:
                tensors[i][g_, width:] = float("nan")
        tensors[4][g_, :, width:] = float("nan")
    ids = [IDS[t % len(IDS)] for t in range(tokens)]
    plan = MultiAdapterPlan(ids, n, device=device, max_tokens=options.get("capacity", tokens))
    rest = [
        plan.arrays,
        torch.tensor(widths, dtype=torch.int32, device=device),
        torch.tensor([seed], device=device) if seed else None,
        options.get("activation", "gelu"),
        1.5,
        1e-5,
        0.3 if seed else 0.0,
        not bare,
    ]
    return tensors, rest, of(tokens, d)


def results(backend, tensors, rest, dy, needs=None):
    needs = [t is not None for t in tensors] if needs is None else needs
    y, q, stats = backend.multi_bottleneck_fwd(*tensors, *rest)
    x, residual, *parameters = tensors
    grads = backend.multi_bottleneck_bwd(dy, x, residual, q, stats, *parameters, *rest, needs)
    found = {"y": y, **dict(zip(GRADIENTS, grads, strict=True))}
    return {name: value for name, value in found.items() if value is not None}


@pytest.fixture
def module():
    from pelt_fast.backends.triton_ import multi_bottleneck

    return multi_bottleneck


def wide(tensors):
    return [None if t is None else t.double() for t in tensors]


def without_nan(tensors):
    """The compositions read no NaN either, but gradients of the oracle's products would."""
    return [None if t is None else t.nan_to_num() for t in tensors]


CASES = {
    "everything": (41, 40, 0, {}),
    "dropout": (41, 40, 17, {}),
    "bare": (12, 33, 0, {"bare": True, "activation": "relu"}),
    "capacity": (29, 24, 0, {"capacity": 90}),
    "parts_of_d": (11, 304, 0, {"widths": (24, 8, 0, 5), "activation": "sigmoid"}),
    "blocks_of_m": (11, 24, 0, {"widths": (140, 8, 0, 5)}),
}


DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def quick(case, dtype):
    """The rest takes longer, interpreted."""
    return dtype == torch.bfloat16 or (case in ("everything", "dropout") and dtype == torch.float32)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(c, t, marks=() if quick(c, t) else pytest.mark.slow, id=f"{c}-{str(t)[6:]}")
        for c in CASES
        for t in DTYPES
    ],
)
def test_values_and_gradients(case, dtype, module, kernels):
    tokens, d, seed, options = CASES[case]
    options = {"widths": WIDTHS, **options}
    tensors, rest, dy = draw(tokens, d, dtype=dtype, device=kernels.device, seed=seed, **options)
    with kernels.context(Trace("random")):
        found = results(module, tensors, rest, dy)
    eager = results(composed, without_nan(tensors), rest, dy)
    exact = results(oracle, wide(without_nan(tensors)), rest, dy.double())
    assert set(found) == set(exact)
    for name, value in found.items():
        assert value.dtype == dtype, name
        error = (value.double() - exact[name]).abs().max()
        allowed = (eager[name].double() - exact[name]).abs().max()
        rounding = 4 * torch.finfo(dtype).eps * exact[name].abs().max()
        assert error <= 2 * allowed + rounding, name


@pytest.mark.parametrize("only", ["x", "down_bias", "scale"])
def test_each_gradient_alone(only, module, kernels):
    tensors, rest, dy = draw(13, 24, WIDTHS, torch.float32, kernels.device, 17)
    with kernels.context():
        together = results(module, tensors, rest, dy)
        alone = results(module, tensors, rest, dy, [name == only for name in GRADIENTS])
    assert set(alone) == {"y", only}
    assert torch.equal(alone[only], together[only])


def test_an_adapter_alone_has_the_bits_that_it_has_in_a_mixture(module, kernels):
    tensors, rest, dy = draw(45, 40, WIDTHS, torch.bfloat16, kernels.device, 0)
    with kernels.context():
        mixed = results(module, tensors, rest, dy)
    ids = [IDS[t % len(IDS)] for t in range(45)]
    rows = [t for t in range(45) if ids[t] == 2]
    mine = [t[rows] if i in (0, 1, 7) else t for i, t in enumerate(tensors)]
    plan = MultiAdapterPlan([2] * len(rows), 4, device=kernels.device)
    with kernels.context():
        alone = results(module, mine, [plan.arrays, *rest[1:]], dy[rows])
    for name in ("y", "x", "residual", "gate"):
        assert torch.equal(alone[name], mixed[name][rows]), name
    for name in ("down", "down_bias", "up", "up_bias", "scale"):
        assert torch.equal(alone[name][2], mixed[name][2]), name


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # by the interpreter
def test_infinity_of_one_row_stays_there(module, kernels):
    tensors, rest, dy = draw(19, 24, WIDTHS, torch.float32, kernels.device, 0)
    for row in (1, 2):  # without an adapter, and of adapter 0
        changed = [t.clone() if t is not None else None for t in tensors]
        changed[0][row] = float("inf")
        with kernels.context():
            found = results(module, changed, rest, dy)
        others = [t for t in range(19) if t != row]
        for name in ("y", "x", "residual", "gate"):
            assert found[name][others].isfinite().all(), name
        for name in ("down", "down_bias", "up", "up_bias", "scale"):
            clean = found[name] if row == 1 else found[name][1:]
            assert clean.isfinite().all(), name


def test_what_is_too_wide_says_so(module):
    problem = type(
        "P",
        (),
        {"dtype": torch.bfloat16, "bottleneck": 1000, "device_type": "cuda", "arch": "sm_90"},
    )
    assert module.unsupported(problem) == ["width 1000 is above 768; torch goes adapter by adapter"]


PRODUCTS = (
    "_shrink_kernel",
    "_expand_kernel",
    "_grad_x_kernel",
    "_grad_a_kernel",
    "_grad_b_kernel",
)


@pytest.mark.slow
@pytest.mark.skipif(
    not (BINARIES / "nvdisasm").exists(), reason="this triton has no NVIDIA disassembler"
)
@pytest.mark.parametrize(
    ("tokens", "width", "capability"),
    [
        *((2048, 48, capability) for capability in (80, 90, 100)),
        *((tokens, width, 90) for tokens, width in ((64, 48), (64, 768), (2048, 256), (2048, 768))),
    ],
)
def test_results_in_fp32_compile_without_spills(tokens, width, capability, module):
    """The kernels are those of multi-LoRA; new is that x is a half and what they write is fp32."""
    tensors, rest, dy = draw(tokens, 768, (width,) * 8, torch.bfloat16, "cpu", 0)
    with compiling(capability) as launches:
        results(module, without_nan(tensors), rest, dy)
    found = []
    for report in inspect_launches(launches):
        dot = report.name in PRODUCTS
        wrong = violations(report, tensor_core=dot, aligned=dot, min_occupancy=1 / 8)
        found += [f"{report.name}: {violation}" for violation in wrong]
    assert {launch.name for launch in launches} >= set(PRODUCTS)
    assert not found, "\n".join(found)
