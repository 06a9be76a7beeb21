"""AdapterFusion's oracle against numbers worked out by hand."""

import math

import torch

from pelt_fast.reference import adapter_fusion


def t(*rows):
    return torch.tensor(rows, dtype=torch.float64)


X = t([1.0, 2.0])
# h_1 = relu(1 + 2 - 1) = 2, r_1 = (2, 4) + (1, 0) = (3, 4);  h_2 = relu(1 - 2) = 0, r_2 = 3 · (0, 2) = (0, 6)
ADAPTERS = (
    [t([1.0, 1.0]), t([1.0, -1.0])],
    [t(-1.0), None],
    [t([1.0], [2.0]), t([5.0], [7.0])],
    [t(1.0, 0.0), t(0.0, 2.0)],
)
CALL = {"activation": "relu", "scalings": [1.0, 3.0]}


def test_plain_attention():
    # scores 1·3 + 2·4 = 11 and 12
    y, p = adapter_fusion(X, *ADAPTERS, **CALL)
    first = 1 / (1 + math.e)
    torch.testing.assert_close(p, t([first, 1 - first]))
    torch.testing.assert_close(y, t([3 * first, 6 - 2 * first]))


def test_matrices_biases_temperature_and_residual():
    # q = (2, 1) + (0, 1) = (2, 2);  k_1 = (4, 3) + (1, 1), k_2 = (6, 0) + (1, 1);  scores 18, 16;  over 2: 9, 8
    swap = t([0.0, 1.0], [1.0, 0.0])
    y, p = adapter_fusion(
        X,
        *ADAPTERS,
        **CALL,
        query_weight=swap,
        query_bias=t(0.0, 1.0),
        key_weight=swap,
        key_bias=t(1.0, 1.0),
        value_weight=2 * swap,
        temperature=2.0,
        residual=t([10.0, 20.0]),
    )
    first = math.e / (1 + math.e)
    torch.testing.assert_close(p, t([first, 1 - first]))
    # context = first · (8, 6) + (1 - first) · (12, 0)
    torch.testing.assert_close(y, t([22 - 4 * first, 20 + 6 * first]))


def test_query_value_residual_and_dropout_of_scores():
    # r_1 = (4, 4), r_2 = (1, 6);  scores of (1, 0): 4 and 1;  the second dropped, the first times 1 / (1 - 1/2)
    y, p = adapter_fusion(
        X,
        *ADAPTERS,
        **CALL,
        query=t([1.0, 0.0]),
        value_residual=t([1.0, 0.0]),
        dropout_p=0.5,
        keep=torch.tensor([[True, False]]),
    )
    first = math.exp(8) / (math.exp(8) + 1)
    torch.testing.assert_close(p, t([first, 1 - first]))
    torch.testing.assert_close(y, t([1 + 3 * first, 6 - 2 * first]))


def test_norms_and_what_goes_in():
    ones = t(1.0, 1.0)
    # LN((1, 2) + (2, 7)) = (-1, 1);  h_1 = 0, r_1 = (1, 0);  h_2 = 0, r_2 = (0, 6);  scores -1 and 6
    y, p = adapter_fusion(
        X,
        *ADAPTERS,
        **CALL,
        skip=t([2.0, 7.0]),
        pre_weight=ones,
        pre_eps=0.0,
        ln_weight=2 * ones,
        ln_bias=ones,
        eps=0.0,
    )
    torch.testing.assert_close(p[0, 1].item(), 1 / (1 + math.exp(-7)))
    torch.testing.assert_close(
        y, t([-1.0, 3.0])
    )  # of any two numbers the smaller is -1, the larger 1
