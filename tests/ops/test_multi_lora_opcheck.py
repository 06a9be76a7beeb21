"""`torch.library.opcheck` with every pattern of optional arguments, and the fakes against the real thing."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pelt_fast.ops import multi_lora_add_, multi_lora_bwd, multi_lora_fwd
from pelt_fast.testing.multi_lora_oracle import operands
from pelt_fast.testing.multi_lora_workloads import MultiLoRACase

BY_AUTOGRAD = "the reference differentiates by autograd, which the modes of opcheck turn off"
CHECKS = ("test_schema", "test_faketensor")
OPTIONS = list(product([False, True], repeat=3))
CASE = MultiLoRACase("", (2, 5), 24, (40, 7), 4, (8, 3), mixed_ranks=True, row_scale="token")


def forward_arguments(inputs, backend, base=True, row_scale=True, dropout=True):
    _, a, b, _, *rest, scales = operands(inputs)
    return (
        *(inputs.x, a, b, list(inputs.base) if base else [None] * len(a), *rest),
        scales if row_scale else None,
        0.3 if dropout else 0.0,
        torch.tensor([11], device=inputs.x.device) if dropout else None,
        backend.name,
    )


def backward_arguments(inputs, backend, needs=(True,) * 4, row_scale=True, dropout=True):
    x, a, b, base, *rest, name = forward_arguments(inputs, backend, False, row_scale, dropout)
    _, s = multi_lora_fwd(x, a, b, base, *rest, name)
    dy = list(inputs.dy.split(inputs.outs, -1))
    return (dy, x, a, b, s, *rest, *needs, name)


@pytest.fixture
def inputs(device):
    return CASE.make(torch.float32, device)


@pytest.mark.parametrize(("base", "row_scale", "dropout"), OPTIONS)
def test_forward(base, row_scale, dropout, inputs, backend):
    backend.require(inputs)
    arguments = forward_arguments(inputs, backend, base, row_scale, dropout)
    torch.library.opcheck(multi_lora_fwd.overload, arguments, test_utils=CHECKS)


@pytest.mark.parametrize(("row_scale", "dropout"), list(product([False, True], repeat=2)))
def test_in_place(row_scale, dropout, inputs, backend):
    backend.require(inputs)
    arguments = forward_arguments(inputs, backend, True, row_scale, dropout)
    torch.library.opcheck(multi_lora_add_.overload, arguments, test_utils=CHECKS)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize(("need_dx", "need_da", "need_db"), OPTIONS)
@pytest.mark.parametrize("need_drow_scale", [False, True])
def test_backward(need_dx, need_da, need_db, need_drow_scale, dropout, inputs, backend):
    backend.require(inputs)
    if backend.name == "reference":
        pytest.skip(BY_AUTOGRAD)
    needs = (need_dx, need_da, need_db, need_drow_scale)
    arguments = backward_arguments(inputs, backend, needs, dropout=dropout)
    torch.library.opcheck(multi_lora_bwd.overload, arguments, test_utils=CHECKS)


@pytest.mark.slow
def test_every_check_of_opcheck(inputs, backend):
    """With AOT dispatch and symbolic shapes, which take longer: one call of each operator."""
    backend.require(inputs)
    torch.library.opcheck(multi_lora_fwd.overload, forward_arguments(inputs, backend))
    torch.library.opcheck(multi_lora_add_.overload, forward_arguments(inputs, backend))
    if backend.name != "reference":
        torch.library.opcheck(multi_lora_bwd.overload, backward_arguments(inputs, backend))


@pytest.mark.parametrize("shape", [(0,), (1,), (), (2, 3), (2, 0, 3), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "expanded"])
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float64, marks=pytest.mark.slow)], ids=str
)
def test_fakes_promise_what_the_operators_give(shape, layout, dtype, backend, device):
    """Sizes, strides and dtypes: a compiled graph believes the fake."""
    a_layout = "expanded" if layout == "expanded" else "contiguous"
    case = replace(CASE, shape=shape, x_layout=layout, mixed_ranks=False, a_layout=a_layout)
    inputs = replace(case, b_layout="rank_major").make(dtype, device)
    backend.require(inputs)
    for operator, arguments in (
        (multi_lora_fwd, forward_arguments(inputs, backend)),
        (multi_lora_bwd, backward_arguments(inputs, backend)),
        (multi_lora_bwd, backward_arguments(inputs, backend, (False,) * 4)),
    ):
        with FakeTensorMode() as mode:
            fake = operator(
                *torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments)
            )
        real = operator(*arguments)
        flat_fake, flat_real = (torch.utils._pytree.tree_leaves(t) for t in (fake, real))
        for promised, given in zip(flat_fake, flat_real, strict=True):
            assert promised.shape == given.shape
            assert promised.stride() == given.stride()
            assert promised.dtype == given.dtype


def test_outputs_share_no_memory_with_inputs_or_each_other(inputs, backend):
    backend.require(inputs)
    for operator, arguments in (
        (multi_lora_fwd, forward_arguments(inputs, backend)),
        (multi_lora_bwd, backward_arguments(inputs, backend)),
    ):
        outputs = torch.utils._pytree.tree_leaves(operator(*arguments))
        given = torch.utils._pytree.tree_leaves(arguments)
        taken = {t.untyped_storage().data_ptr() for t in given if isinstance(t, torch.Tensor)}
        places = [t.untyped_storage().data_ptr() for t in outputs]
        assert len(set(places)) == len(places)
        assert not taken.intersection(places)
