"""An error of ``prefix_attention`` and ``prefix_gate`` names the argument, what came and what was expected."""

import pytest
import torch

from pelt_fast import functional as PF

B, H, L, S, P, D = 2, 3, 4, 5, 6, 8


def arguments(**changed):
    given = {
        "query": torch.randn(B, H, L, D),
        "key": torch.randn(B, H, S, D),
        "value": torch.randn(B, H, S, D),
        "prefix_key": torch.randn(1, H, P, D),
        "prefix_value": torch.randn(1, H, P, D),
    }
    return {**given, **changed}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"query": [1.0]}, TypeError, "query is a list; expected a torch.Tensor"),
        ({"query": torch.randn(B, H, L)}, ValueError, r"query has shape \(2, 3, 4\)"),
        ({"query": torch.ones(B, H, L, D, dtype=torch.int64)}, TypeError, "query has dtype"),
        ({"key": None}, TypeError, "key is a NoneType"),
        ({"key": torch.randn(B, H, S, D - 1)}, ValueError, r"key has shape .* D = 8 of query"),
        ({"key": torch.randn(B, 2, S, D)}, ValueError, "key has 2 heads; expected .* divides 3"),
        ({"key": torch.randn(B, H, S, D).double()}, TypeError, "key has dtype torch.float64"),
        ({"value": torch.randn(B, H, S + 1, D)}, ValueError, "value has shape .* key's"),
        ({"prefix_key": torch.randn(3, H, P, D)}, ValueError, "prefix_key has shape"),
        ({"prefix_value": torch.randn(1, H, P + 1, D)}, ValueError, "prefix_value has shape"),
        ({"attn_mask": torch.zeros(L, S + P)}, ValueError, "attn_mask has shape"),
        ({"attn_mask": torch.zeros(S)}, ValueError, "attn_mask has shape"),
        ({"attn_mask": torch.zeros(L, S).int()}, TypeError, "attn_mask has dtype torch.int32"),
        ({"is_causal": 1}, TypeError, "is_causal is a int"),
        ({"is_causal": True, "attn_mask": torch.zeros(L, S)}, ValueError, "is_causal is True and"),
        ({"scale": float("nan")}, ValueError, "scale is nan"),
        ({"gate": torch.ones(B)}, ValueError, r"gate has shape \(2,\); expected"),
        ({"gate": torch.ones(B, 1).double()}, TypeError, "gate has dtype"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p is 1.5"),
        ({"backend": "fast"}, ValueError, "backend='fast' is not known"),
        ({"key": torch.randn(B, H, S, D, device="meta")}, ValueError, "key is on meta"),
    ],
)
def test_prefix_attention(changed, error, message):
    for function in (PF.prefix_attention, lambda **kw: PF.explain("prefix_attention", **kw)):
        with pytest.raises(error, match=message):
            function(**arguments(**changed))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": torch.randn(L, D)}, ValueError, r"x has shape \(4, 8\); expected \(B, T, d\)"),
        ({"weight": torch.randn(1, D + 1)}, ValueError, "weight has shape .* d = 8"),
        ({"bias": torch.randn(2)}, ValueError, r"bias has shape \(2,\); expected \(g,\) = \(1,\)"),
        ({"weight": torch.randn(1, D).double()}, TypeError, "weight has dtype"),
        ({"attention_mask": torch.ones(B, L + 1)}, ValueError, "attention_mask has shape"),
    ],
)
def test_prefix_gate(changed, error, message):
    given = {"x": torch.randn(B, L, D), "weight": torch.randn(1, D), "bias": torch.randn(1)}
    for gate in (PF.prefix_gate, PF.central_gate):
        with pytest.raises(error, match=message):
            gate(**{**given, **changed})
