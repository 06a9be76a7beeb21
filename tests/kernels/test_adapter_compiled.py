"""Every kernel of the adapter compiles through its launch function and passes the gates on its machine code."""

import pytest
import torch

from pelt_fast.testing.adapter_workloads import EVERYTHING, HOULSBY, PFEIFFER, T5, AdapterCase

pytest.importorskip("triton")
from pelt_fast.testing.gpu_free import compiling, inspect_launches, violations
from pelt_fast.testing.gpu_free.sass import BINARIES

pytestmark = pytest.mark.skipif(
    not (BINARIES / "nvdisasm").exists(), reason="this triton has no NVIDIA disassembler"
)
OCCUPANCY = 1 / 8  # eight warps
KERNELS = {"_adapter_forward_kernel", "_adapter_rows_kernel", "_adapter_columns_kernel"}
SUMS = "_ordered_sums_kernel"
# Vectors (biases, layernorms, scale) are read an element a thread, once for each walk or held chunk, and dgate stored.
NARROW = 32


def _check(kernels, case, dtype, capability, aligned=True):
    inputs = case.make(dtype)
    with compiling(capability) as launches:
        kernels.launch(inputs)
    reports = inspect_launches(launches)
    found = [
        f"{report.name}: {violation}"
        for report in reports
        for violation in violations(
            report,
            tensor_core=dtype != torch.float32 and report.name != SUMS,
            aligned=aligned,
            min_occupancy=OCCUPANCY,
            narrow=NARROW,
        )
    ]
    assert {report.name for report in reports} - {SUMS} == KERNELS
    assert not found, "\n".join(found)


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_bfloat16(capability, adapter_kernels):
    """T5's block: no mask, no layernorm. What layernorms and masks add is among the slow ones."""
    case = AdapterCase("aligned", (2048,), 768, 64, **T5)
    _check(adapter_kernels, case, torch.bfloat16, capability)


BASE, HALF, FULL = (2048, 768, 64), torch.bfloat16, torch.float32
VARIANTS = {
    "houlsby": (BASE, HALF, HOULSBY),
    "houlsby_48": ((2048, 768, 48), HALF, HOULSBY),
    "pfeiffer": (BASE, HALF, PFEIFFER),
    "everything": (BASE, HALF, EVERYTHING),
    "fp16": (BASE, torch.float16, PFEIFFER),
    "fp32_parameters": (BASE, HALF, {**PFEIFFER, "param_dtype": FULL}),
    "one_token": ((1, 768, 64), HALF, PFEIFFER),
    "many_tokens": ((32768, 768, 64), HALF, EVERYTHING),
    "many_tokens_houlsby": ((32768, 768, 64), HALF, HOULSBY),
    "features_1024": ((2048, 1024, 64), HALF, PFEIFFER),
    "features_4096": ((2048, 4096, 64), HALF, PFEIFFER),
    "features_8192": ((2048, 8192, 16), HALF, EVERYTHING),
    "bottleneck_8": ((2048, 768, 8), HALF, HOULSBY),
    "bottleneck_24": ((2048, 768, 24), HALF, HOULSBY),
    "bottleneck_128": ((16384, 768, 128), HALF, PFEIFFER),
    "bottleneck_129": ((2048, 768, 129), HALF, EVERYTHING),
    "bottleneck_200": ((2048, 768, 200), HALF, EVERYTHING),
    "bottleneck_256": ((2048, 1024, 256), HALF, PFEIFFER),
    "bottleneck_512": ((16384, 1024, 512), HALF, EVERYTHING),
    "fp32": (BASE, FULL, PFEIFFER),
    "fp32_everything": (BASE, FULL, EVERYTHING),
    "fp32_bottleneck_128": ((2048, 768, 128), FULL, EVERYTHING),
    "fp32_bottleneck_512": ((2048, 768, 512), FULL, HOULSBY),
    "odd": ((300, 777, 37), HALF, EVERYTHING),
    "odd_many_tokens": ((16385, 1001, 129), HALF, EVERYTHING),
    "odd_fp32": ((300, 777, 37), FULL, EVERYTHING),
    "all_ones": ((1, 1, 1), HALF, EVERYTHING),
}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant(variant, capability, adapter_kernels):
    (tokens, features, bottleneck), dtype, block = VARIANTS[variant]
    case = AdapterCase(variant, (tokens,), features, bottleneck, **block)
    # a 16 x 16 tile has less than 16 bytes for a thread
    aligned = features % 16 == 0 and bottleneck % 8 == 0 and bottleneck > 16
    _check(adapter_kernels, case, dtype, capability, aligned)
