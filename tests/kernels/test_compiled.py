"""Every kernel compiles through its launch function for each architecture and passes the gates on its machine code."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pelt_fast.testing.workloads import Adapter, Case

pytest.importorskip("triton")
from pelt_fast.testing.gpu_free import compiling, inspect_kernel, violations
from pelt_fast.testing.gpu_free.sass import BINARIES

pytestmark = pytest.mark.skipif(
    not (BINARIES / "nvdisasm").exists(), reason="this triton has no NVIDIA disassembler"
)
OCCUPANCY = 1 / 16  # four warps: a GEMM tile may have a multiprocessor to itself
LORA_KERNELS = {
    "_shrink_kernel",
    "_linear_kernel",
    "_grad_b_kernel",
    "_grad_a_kernel",
    "_ordered_sum_kernel",
}


def _reports(kernels, inputs, capability):
    with compiling(capability) as launches:
        kernels.launch(inputs)
    distinct = {(launch.name, id(launch.kernel)): launch for launch in launches}
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(inspect_kernel, distinct.values()))


def _check(reports, tensor_core, aligned):
    found = [
        f"{report.name}: {violation}"
        for report in reports
        for violation in violations(
            report,
            tensor_core=tensor_core and report.name != "_ordered_sum_kernel",
            aligned=aligned,
            min_occupancy=OCCUPANCY,
        )
    ]
    assert {report.name for report in reports} == LORA_KERNELS
    assert not found, "\n".join(found)


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_bfloat16_with_dropout(capability, kernels):
    """The masked kernels, and of those without a mask the GEMM and the pass over dY."""
    case = Case("aligned", (1024,), 768, 1024, (Adapter(16, 0.5, 0.1),), bias=False)
    _check(_reports(kernels, case.make(torch.bfloat16), capability), tensor_core=True, aligned=True)


def _variants():
    plain = {r: (Adapter(r),) for r in (8, 16, 64, 129, 256)}
    two = (Adapter(16, 0.5, 0.1), Adapter(8, 0.5, 0.1, bias=True))
    for capability in (80, 90, 100):
        for rank, adapters in plain.items():
            yield capability, torch.bfloat16, adapters, None, f"rank_{rank}"
        yield capability, torch.bfloat16, two, None, "two_adapters_dropout"
        yield capability, torch.float16, plain[16], torch.float32, "fp32_adapter"
        yield capability, torch.float32, plain[16], None, "fp32"
        yield capability, torch.float32, plain[129], None, "fp32_rank_129"
        yield capability, torch.float32, two, None, "fp32_two_adapters_dropout"


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 96, 4096])
@pytest.mark.parametrize(
    ("capability", "dtype", "adapters", "adapter_dtype"),
    [
        pytest.param(*v[:4], id=f"sm_{v[0]}-{str(v[1]).removeprefix('torch.')}-{v[4]}")
        for v in _variants()
    ],
)
def test_every_variant(capability, dtype, adapters, adapter_dtype, tokens, kernels):
    case = Case("variant", (tokens,), 768, 1024, adapters, adapter_dtype=adapter_dtype)
    reports = _reports(kernels, case.make(dtype), capability)
    aligned = (
        all(adapter.rank % 16 == 0 for adapter in adapters)
        and tokens % 16 == 0
        and dtype != torch.float16
    )
    _check(reports, tensor_core=dtype != torch.float32, aligned=aligned and len(adapters) == 1)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_odd_features(capability, kernels):
    case = Case("odd", (300,), 777, 1001, (Adapter(5, 0.5, 0.1),), bias=True)
    _check(
        _reports(kernels, case.make(torch.bfloat16), capability), tensor_core=True, aligned=False
    )


def test_tf32_uses_tensor_cores(kernels):
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        case = Case("tf32", (1024,), 768, 1024, (Adapter(16),), bias=False)
        reports = _reports(kernels, case.make(torch.float32), 80)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    _check(reports, tensor_core=True, aligned=True)
