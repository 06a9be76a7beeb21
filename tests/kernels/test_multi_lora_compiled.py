"""Every kernel of multi-LoRA compiles through its launch function and passes the gates on its machine code."""

import pytest
import torch

from pelt_fast.testing import multi_lora_oracle
from pelt_fast.testing.multi_lora_workloads import MultiLoRACase

pytest.importorskip("triton")
from pelt_fast.backends.triton_ import multi_lora
from pelt_fast.testing.gpu_free import compiling, inspect_launches, violations
from pelt_fast.testing.gpu_free.sass import BINARIES

pytestmark = pytest.mark.skipif(
    not (BINARIES / "nvdisasm").exists(), reason="this triton has no NVIDIA disassembler"
)
OCCUPANCY = 1 / 8
PRODUCTS = {
    "_shrink_kernel",
    "_expand_kernel",
    "_grad_x_kernel",
    "_grad_a_kernel",
    "_grad_b_kernel",
}
SUMS = {"_finish_kernel", "_sums_kernel"}
# Tiles of s are a few hundred elements: less than 16 bytes for a thread.
SMALL = {"_shrink_kernel", *SUMS}
NARROW = 8  # a row scale in half precision is read an element a row
SEED = torch.tensor([7])


def _launches(case, dtype, capability):
    inputs = case.make(dtype)
    with compiling(capability) as launches:
        multi_lora_oracle.run_backend(multi_lora, inputs, SEED if case.dropout_p else None)
    return launches


def _check(case, dtype, capability, aligned=True):
    launches = _launches(case, dtype, capability)
    found = []
    for report in inspect_launches(launches):
        wrong = violations(
            report,
            tensor_core=dtype != torch.float32 and report.name in PRODUCTS,
            aligned=aligned,
            min_occupancy=OCCUPANCY,
            narrow=NARROW if case.row_scale else 0,
        )
        if report.name in SMALL:
            wrong = [violation for violation in wrong if "no 128-bit" not in violation]
        found += [f"{report.name}: {violation}" for violation in wrong]
    assert {launch.name for launch in launches} - SUMS == PRODUCTS
    assert not found, "\n".join(found)
    return launches


def _one_instruction(launches):
    """The products of single tokens are of mma.sync whatever the height of the tile: the same bits in any batch."""
    for launch in launches:
        if launch.name in ("_shrink_kernel", "_expand_kernel", "_grad_x_kernel"):
            ptx = launch.kernel.asm["ptx"]
            assert "mma.sync" in ptx, launch.name
            assert "wgmma" not in ptx, launch.name
            assert "tcgen05.mma" not in ptx, launch.name


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_prefill_and_training(capability):
    case = MultiLoRACase("training", (2048,), 768, (1024,), 8, (16,))
    _one_instruction(_check(case, torch.bfloat16, capability))


HALF, FULL = torch.bfloat16, torch.float32
QKV = (1024, 256, 256)
VARIANTS = {
    "decode": ((64,), 4096, (4096,), 32, (16,), HALF, {}),
    "decode_qkv": ((64,), 768, QKV, 32, (16,), HALF, {"row_scale": "token", "dropout_p": 0.1}),
    "one_token": ((1,), 768, (768,), 32, (8,), HALF, {}),
    "training_qkv": ((4096,), 768, QKV, 8, (16,), HALF, {"row_scale": "token"}),
    "dropout": ((4096,), 768, (1024,), 8, (16,), HALF, {"dropout_p": 0.1}),
    "dropout_qkv": ((4096,), 768, QKV, 8, (16,), HALF, {"dropout_p": 0.1}),
    "rank_8": ((4096,), 768, (1024,), 8, (8,), HALF, {}),
    "rank_64": ((4096,), 768, (1024,), 8, (64,), HALF, {}),
    "rank_64_decode": ((64,), 768, (1024,), 8, (64,), HALF, {}),
    "rank_129": ((4096,), 768, (1024,), 8, (129,), HALF, {}),
    "rank_256": ((4096,), 768, (1024,), 8, (256,), HALF, {}),
    "rank_256_decode": ((64,), 4096, (1024,), 8, (256,), HALF, {"row_scale": "token"}),
    "rank_major": ((4096,), 768, (1024,), 8, (16,), HALF, {"b_layout": "rank_major"}),
    "fp16_fp32_adapters": ((4096,), 768, (1024,), 8, (16,), torch.float16, {"adapter_dtype": FULL}),
    "fp32": ((4096,), 768, (1024,), 8, (16,), FULL, {"row_scale": "token"}),
    "fp32_decode": ((64,), 768, (1024,), 8, (64,), FULL, {"dropout_p": 0.1}),
    "fp32_rank_256": ((4096,), 768, (1024,), 8, (256,), FULL, {"dropout_p": 0.1}),
    "odd": ((300,), 777, (1001,), 8, (5,), HALF, {"row_scale": "token", "dropout_p": 0.1}),
    "odd_two": ((3000,), 777, (1001, 33), 8, (5, 129), HALF, {"dropout_p": 0.1}),
    "odd_fp32": ((3000,), 777, (1001, 33), 8, (5, 129), FULL, {"dropout_p": 0.1}),
}
UNALIGNED = ("odd", "odd_two", "odd_fp32", "rank_129", "one_token")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant(variant, capability):
    *shape, dtype, more = VARIANTS[variant]
    case = MultiLoRACase(variant, *shape, **more)
    launches = _check(case, dtype, capability, variant not in UNALIGNED)
    if dtype == HALF:
        _one_instruction(launches)
