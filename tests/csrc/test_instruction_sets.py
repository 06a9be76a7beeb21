"""Every instruction set that this machine has, the plain path included, against the oracle."""

import pytest
import torch

from pelt_fast import functional as PF
from pelt_fast.env import CPU_ISAS
from pelt_fast.testing import oracle
from pelt_fast.testing.tolerance import assert_accurate
from pelt_fast.testing.workloads import CASES, FP16_OVERFLOW, MIXED_DTYPE, Adapter, Case

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Sizes at, just below and just past what vectors, tiles and blocks hold.
EDGES = [
    Case(
        f"edge_{tokens}x{n_in}x{n_out}_r{rank}",
        (tokens,),
        n_in,
        n_out,
        (Adapter(rank, dropout_p=p),),
    )
    for tokens, n_in, n_out, rank, p in [
        (95, 255, 511, 15, 0.0),
        (97, 257, 513, 17, 0.1),
        (5, 31, 33, 32, 0.1),
        (6, 32, 32, 33, 0.0),
        (1, 300, 600, 8, 0.5),
        (193, 16, 17, 1, 0.1),
    ]
]
PLAIN = [
    c for c in CASES if c.name in ("odd", "past_one_tile", "rank_129", "three_adapters", "dropout")
]


ROWS_THAT_OVERLAP = {
    "expanded": lambda n: torch.randn(n).expand(70, n),
    "unfolded": lambda n: torch.randn(n + 69).unfold(0, n, 1),
    "one_row_of_stride_0": lambda n: torch.randn(n).as_strided((1, n), (0, 1)),
}


def run(inputs):
    def call(leaves):
        return PF.lora_linear(*leaves.args, **leaves.kwargs, backend="cpp")

    return oracle.run_with_masks(call, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*PLAIN, *EDGES], ids=str)
def test_matches_the_oracle(case, dtype, run_on):
    run_on(dtype)
    inputs = case.make(dtype)
    results, keep = run(inputs)
    assert_accurate(results, inputs, keep)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fp32_adapters_and_a_shrink_that_overflows(dtype, run_on):
    run_on(dtype)
    for case in (MIXED_DTYPE[-1], FP16_OVERFLOW):
        inputs = case.make(dtype)
        results, keep = run(inputs)
        assert all(value.isfinite().all() for value in results.values())
        assert_accurate(results, inputs, keep)


@pytest.mark.parametrize("rows", ROWS_THAT_OVERLAP)
def test_rows_that_overlap(rows, isa):
    x = ROWS_THAT_OVERLAP[rows](96).bfloat16()
    dy = ROWS_THAT_OVERLAP["expanded"](40)[: x.shape[0]].bfloat16()
    weight, lora_a, lora_b = (torch.randn(s).bfloat16() for s in ((40, 96), (4, 96), (40, 4)))
    outcomes = []
    for layout in (lambda t: t, lambda t: t.clone(memory_format=torch.contiguous_format)):
        leaves = [t.clone().requires_grad_() for t in (lora_a, lora_b)]
        y = PF.lora_linear(layout(x), weight, None, *leaves, 1.0, backend="cpp")
        outcomes.append((y, *torch.autograd.grad(y, leaves, layout(dy))))
    for overlapping, contiguous in zip(*outcomes, strict=True):
        torch.testing.assert_close(overlapping, contiguous)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_memory_kept_between_calls_leaks_nothing(dtype, run_on):
    """Tiles live in memory that a thread keeps; here it holds NaN when the next call begins."""
    run_on(dtype)
    n = 700
    for p in (0.0, 0.5):
        inputs = Case("", (200,), n, n, (Adapter(256, dropout_p=p),)).make(dtype)
        run(inputs.map(lambda _, t: torch.full_like(t, float("nan"))))
    for case in (*PLAIN, *EDGES):
        inputs = case.make(dtype)
        results, keep = run(inputs)
        assert_accurate(results, inputs, keep)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_sets_agree_on_the_mask(dtype, cpp):
    """What p = ½ drops is the same on each: the outputs agree, closer than one flipped element would let them."""
    inputs = Case("", (9,), 77, 40, (Adapter(8, 4.0, 0.5),)).make(dtype)
    outputs = []
    for name in (*cpp.available_isas(), "amx_emulated"):
        cpp.set_isa(name)
        outputs.append(run(inputs)[0])
    for other in outputs[1:]:
        for name, value in outputs[0].items():
            torch.testing.assert_close(value, other[name], rtol=0.02, atol=0.05, msg=name)


def test_an_unknown_or_absent_set_is_refused(cpp):
    with pytest.raises(ValueError, match=r"'sse9'.*default"):
        cpp.set_isa("sse9")
    for name in set(CPU_ISAS) - set(cpp.available_isas()):
        with pytest.raises(ValueError, match=name):
            cpp.set_isa(name)
