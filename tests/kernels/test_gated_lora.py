"""The gated LoRA linear through the kernels of the LoRA linear: values and gradients, every access checked."""

import pytest
import torch

from pelt_fast.backends.reference_ import gated_lora as oracle
from pelt_fast.backends.torch_ import gated_lora as composed

pytest.importorskip("triton")
from pelt_fast.testing.gpu_free import Trace

SAMPLES, LENGTH, IN, OUT, RANK, SCALING = 2, 7, 24, 40, 3, 0.5
NAMES = ("x", "bias", "lora_a", "lora_b", "gate_weight", "gate_bias")


def results(backend, x, dy, weight, bias, adapter, p, seed):
    y, s, gate = backend.gated_lora_linear_fwd(x, weight, bias, *adapter, SCALING, p, seed, SAMPLES)
    grads = backend.gated_lora_linear_bwd(
        dy, x, weight, *adapter, SCALING, p, seed, s, gate, [True] * 6
    )
    return {"y": y, **dict(zip(NAMES, grads, strict=True))}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("p", [pytest.param(0.0, marks=pytest.mark.slow), 0.3])
@pytest.mark.parametrize("paper", [False, True], ids=["all tokens", "real tokens"])
def test_values_and_gradients(dtype, p, paper, kernels):
    from pelt_fast.backends.triton_ import gated_lora

    generator = torch.Generator().manual_seed(0)

    def draw(*shape, std=1.0):
        return (torch.randn(*shape, generator=generator) * std).to(kernels.device, dtype)

    x, dy = draw(SAMPLES * LENGTH, IN), draw(SAMPLES * LENGTH, OUT)
    weight, bias = draw(OUT, IN, std=IN**-0.5), draw(OUT)
    adapter = [draw(RANK, IN, std=IN**-0.5), draw(OUT, RANK), draw(1, IN), draw(1)]
    counted = None
    if paper:
        counted = torch.full((SAMPLES, LENGTH), 0.25, device=kernels.device)
        counted[:, 4:] = 0
    seed = torch.tensor([17], device=kernels.device) if p else None
    with kernels.context(Trace("random")):
        found = results(gated_lora, x, dy, weight, bias, [*adapter, counted], p, seed)
    eager = results(composed, x, dy, weight, bias, [*adapter, counted], p, seed)
    wide = [t.double() for t in (x, dy, weight, bias)]
    exact = results(oracle, *wide, [*(t.double() for t in adapter), counted], p, seed)
    for name, value in found.items():
        assert value.dtype == dtype
        error = (value.double() - exact[name].reshape(value.shape)).abs().max()
        allowed = (eager[name].double() - exact[name].reshape(value.shape)).abs().max()
        rounding = 4 * torch.finfo(dtype).eps * exact[name].abs().max()
        assert error <= 2 * allowed + rounding, name
