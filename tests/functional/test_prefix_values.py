"""``prefix_attention`` of every backend against the oracle; ``prefix_gate``."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from pelt_fast import functional as PF
from pelt_fast import reference
from pelt_fast.dispatch import BackendUnavailable
from pelt_fast.testing.prefix_oracle import deviation
from pelt_fast.testing.prefix_workloads import CASES, PrefixCase

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SMALL = PrefixCase("small", 2, 2, 5, 6, 4, 8)


def run(inputs, **options):
    return PF.prefix_attention(*inputs.args, **{**inputs.kwargs, **options})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_close_to_the_oracle(case, dtype, backend, device):
    inputs = case.make(dtype, device)
    backend.require(inputs)
    y = run(inputs, backend=backend.name)
    assert y.dtype == dtype
    assert y.shape == inputs.query.shape
    found = deviation(y, inputs)
    assert found.ok, found
    assert torch.equal(run(inputs, backend=backend.name), y)


def test_a_wrong_result_is_seen(device):
    inputs = CASES[0].make(torch.float32, device)
    y = run(inputs)
    assert not deviation(y + 1e-5 * y.abs().max(), inputs).ok
    swapped = replace(inputs, prefix_value=inputs.prefix_key)
    assert not deviation(run(swapped), inputs).ok


@pytest.mark.parametrize("mask", [None, "causal", "bool"])
def test_composed_where_a_gradient_is_needed(mask, device):
    case = PrefixCase("", 3, 2, 6, 6, 4, 8, mask, gate=2)
    inputs = case.make(torch.float64, device)
    inputs.prefix_key.requires_grad_()
    y = run(inputs)
    assert y.requires_grad
    found = deviation(y.detach(), inputs)
    assert found.ok, found
    with pytest.raises(
        BackendUnavailable, match="cannot run prefix_attention: a gradient is needed"
    ):
        run(inputs, backend="reference")


def test_fewer_heads_of_keys_than_of_queries(device):
    inputs = SMALL.make(torch.float64, device)
    one = replace(
        inputs,
        **{
            name: getattr(inputs, name)[:, :1]
            for name in ("key", "value", "prefix_key", "prefix_value")
        },
    )
    both = replace(
        inputs,
        **{
            name: getattr(one, name).expand(-1, 2, -1, -1)
            for name in ("key", "value", "prefix_key", "prefix_value")
        },
    )
    torch.testing.assert_close(run(one), run(both))


@pytest.mark.parametrize(
    ("batch", "queries", "keys", "prefix"), [(0, 3, 3, 2), (2, 0, 3, 2), (2, 3, 0, 2), (2, 3, 4, 0)]
)
def test_sizes_of_zero(batch, queries, keys, prefix, device):
    inputs = PrefixCase("", batch, 2, queries, keys, prefix, 4).make(torch.float32, device)
    y = run(inputs)
    together = [
        torch.cat([a.expand(batch, -1, -1, -1), b], 2)
        for a, b in ((inputs.prefix_key, inputs.key), (inputs.prefix_value, inputs.value))
    ]
    expected = F.scaled_dot_product_attention(inputs.query, *together)
    torch.testing.assert_close(y, expected)


def test_dropout_acts_in_training_alone(device):
    inputs = SMALL.make(torch.float32, device)
    assert torch.equal(run(inputs, dropout_p=0.5), run(inputs))
    torch.manual_seed(0)
    dropped = run(inputs, dropout_p=0.5, training=True)
    assert not torch.equal(dropped, run(inputs))
    torch.manual_seed(0)
    assert torch.equal(run(inputs, dropout_p=0.5, training=True), dropped)
    assert not run(inputs, dropout_p=1.0, training=True).any()


def test_scale(backend, device):
    inputs = SMALL.make(torch.float64, device)
    backend.require(inputs)
    halved = replace(inputs, query=inputs.query * 0.5)
    y = run(inputs, scale=0.5 / 8**0.5, backend=backend.name)
    torch.testing.assert_close(y, run(halved, backend=backend.name))


def test_arguments_are_left_as_they_are(backend, device):
    inputs = PrefixCase("", 2, 2, 5, 6, 4, 8, "float").make(torch.float32, device)
    backend.require(inputs)
    before = [t.clone() for t in (*inputs.args, inputs.options["attn_mask"])]
    y = run(inputs, backend=backend.name)
    y.zero_()  # whatever the result shares memory with
    after = (*inputs.args, inputs.options["attn_mask"])
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, backend, device):
    inputs = SMALL.make(torch.float32, device)
    backend.require(inputs)
    with torch.autocast(device, dtype):
        y = run(inputs, backend=backend.name)
    assert y.dtype == dtype
    cast = replace(inputs, **{k: getattr(inputs, k).to(dtype) for k in ("query", "key", "value")})
    cast = replace(cast, prefix_key=inputs.prefix_key.to(dtype))
    cast = replace(cast, prefix_value=inputs.prefix_value.to(dtype))
    assert torch.equal(y, run(cast, backend=backend.name))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("gates", [1, 2])
@pytest.mark.parametrize("name", ["prefix_gate", "central_gate"])
def test_gate(name, gates, masked, device):
    torch.manual_seed(0)
    x, weight = torch.randn(3, 5, 8, device=device), torch.randn(gates, 8, device=device)
    bias = torch.randn(gates, device=device)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]], device=device)
    mask = mask if masked else None
    function = getattr(PF, name)
    gate = function(x, weight, bias, attention_mask=mask)
    exact = getattr(reference, name)(x.double(), weight.double(), bias.double(), mask)
    torch.testing.assert_close(gate.double(), exact, rtol=1e-6, atol=1e-6)
    if masked:  # padding counts for nothing
        x[1, 2:] = torch.tensor([100.0, float("nan"), float("inf")], device=device)[:, None]
        exact = getattr(reference, name)(x.double(), weight.double(), bias.double(), mask)
        torch.testing.assert_close(gate.double(), exact, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(function(x, weight, bias, attention_mask=mask), gate)
