"""Every kernel compiles through its launch function for each architecture and passes the gates on its machine code."""

import pytest
import torch

from pelt_fast.testing.workloads import Adapter, Case

pytest.importorskip("triton")
from pelt_fast.testing.gpu_free import compiling, inspect_launches, violations
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
    return inspect_launches(launches)


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


ONE = {rank: (Adapter(rank),) for rank in (8, 16, 64, 129, 256)}
TWO = (Adapter(16, 0.5, 0.1), Adapter(8, 0.5, 0.1, bias=True))
VARIANTS = {
    **{f"rank_{rank}": (4096, torch.bfloat16, adapters, None) for rank, adapters in ONE.items()},
    "one_token": (1, torch.bfloat16, ONE[8], None),
    "few_tokens": (96, torch.bfloat16, ONE[16], None),
    "two_adapters_dropout": (4096, torch.bfloat16, TWO, None),
    "fp32_adapter": (4096, torch.float16, ONE[16], torch.float32),
    "fp32": (4096, torch.float32, ONE[16], None),
    "fp32_rank_129": (4096, torch.float32, ONE[129], None),
    "fp32_two_adapters_dropout": (4096, torch.float32, TWO, None),
}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant(variant, capability, kernels):
    tokens, dtype, adapters, adapter_dtype = VARIANTS[variant]
    case = Case(variant, (tokens,), 768, 1024, adapters, adapter_dtype=adapter_dtype)
    reports = _reports(kernels, case.make(dtype), capability)
    aligned = variant in ("rank_16", "rank_64", "rank_256", "few_tokens")
    _check(reports, tensor_core=dtype != torch.float32, aligned=aligned)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("tokens", [300, 4095])
def test_odd_features(tokens, capability, kernels):
    case = Case("odd", (tokens,), 777, 1001, (Adapter(5, 0.5, 0.1),), bias=True)
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
