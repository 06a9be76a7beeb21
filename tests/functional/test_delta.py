"""Diff pruning and masking: values, gradients, what is saved, autocast, errors."""

import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

import pelt_fast
from pelt_fast import functional as PF
from pelt_fast.ops import diff_pruning_bwd, diff_pruning_fwd
from pelt_fast.testing import inputs as drawing
from pelt_fast.testing.delta import DiffInputs, exact, wrong

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(), (1,), (5, 7), (3, 11, 37), (64, 96), (0, 4)]


def run(inputs, backend):
    stretch = (inputs.lower, inputs.upper)
    arguments = (inputs.diff, inputs.log_alpha, inputs.weight, inputs.scale, inputs.seed)
    dtype = inputs.weight.dtype
    out, count = diff_pruning_fwd(*arguments, *stretch, dtype, backend.name)
    *grads, again = diff_pruning_bwd(
        *(*arguments, inputs.dmade, inputs.dcount, *stretch),
        *(True, True, inputs.scale is not None, True, dtype, backend.name),
    )
    assert torch.equal(out, again)
    assert out.dtype == dtype
    assert [g.dtype for g in grads[:2]] == [inputs.diff.dtype, inputs.log_alpha.dtype]
    found = dict(zip(("diff", "log_alpha", "scale"), grads, strict=True))
    if inputs.scale is None:
        del found["scale"]
    return {"out": out, "count": count, **found}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_diff_pruning_matches_the_oracle(shape, dtype, backend):
    inputs = DiffInputs.make(shape, dtype)
    assert not wrong(run(inputs, backend), inputs)


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("stretch", [(-0.1, 1.1), (-1.5, 1.5), (-3.0, 1.25)])
def test_options_of_diff_pruning(stretch, scaled, noisy, backend):
    inputs = DiffInputs.make(
        (33, 65), torch.float32, scaled=scaled, noisy=noisy, stretch=stretch, seed=3
    )
    assert not wrong(run(inputs, backend), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fp32_deltas_over_a_half_precision_weight(dtype, backend):
    inputs = DiffInputs.make((33, 65), dtype, delta_dtype=torch.float32)
    assert not wrong(run(inputs, backend), inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_judge_sees_what_is_wrong(dtype):
    inputs = DiffInputs.make((33, 65), dtype)
    expected, _ = exact(inputs)
    for name, value in expected.items():
        assert not wrong({name: value}, inputs)
        assert wrong({name: value * 1.01}, inputs), name
    other = DiffInputs.make((33, 65), dtype)
    other.seed.add_(1)
    assert len(wrong(exact(other)[0], inputs)) >= 3


def test_infinite_log_alpha_opens_and_closes_for_certain(backend):
    weight, diff = torch.full((2,), 3.0), torch.tensor([5.0, math.inf])
    log_alpha = torch.tensor([math.inf, math.inf])
    for training in (False, True):
        call = {"training": training, "backend": backend.name}
        made, count = PF.diff_pruning_weight(weight, diff, log_alpha, **call)
        assert made.tolist() == [8.0, math.inf]
        assert count.item() == 2.0
        made, count = PF.diff_pruning_weight(weight, torch.ones(2), -log_alpha, **call)
        assert made.tolist() == [3.0, 3.0]
        assert count.item() == 0.0


def test_noise_opens_as_many_gates_as_are_counted(backend):
    zero, one = torch.zeros(100, 100), torch.ones(100, 100)
    log_alpha = torch.full((100, 100), -0.4)
    torch.manual_seed(0)
    made, count = PF.diff_pruning_weight(
        zero, one, log_alpha, stretch=(-0.5, 1.25), training=True, backend=backend.name
    )
    share = 1 / (1 + math.exp(0.4) * (0.5 / 1.25))
    assert count.item() == pytest.approx(10_000 * share, rel=1e-5)
    spread = math.sqrt(10_000 * share * (1 - share))
    assert abs((made > 0).sum().item() - 10_000 * share) < 4 * spread
    assert made.min() == 0
    assert made.max() == 1


def test_every_call_draws_its_own_noise_and_eval_draws_none(backend):
    inputs = DiffInputs.make((9, 9), torch.float32)
    call = (inputs.weight, inputs.diff, inputs.log_alpha)
    state = torch.get_rng_state()
    first, second = (PF.diff_pruning_weight(*call, backend=backend.name)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(state, torch.get_rng_state())
    noisy = [
        PF.diff_pruning_weight(*call, training=True, backend=backend.name)[0] for _ in range(2)
    ]
    assert not torch.equal(*noisy)


# ---- linears ----

LAYOUTS = {
    "plain": ((6,), "contiguous"),
    "three_dims": ((2, 3), "permuted"),
    "one_dim": ((), "contiguous"),
    "four_dims": ((2, 1, 3), "sliced"),
    "no_rows": ((0,), "contiguous"),
    "columns": ((7,), "transposed"),
    "expanded": ((7,), "expanded"),
}


def leaves_of(shape, layout, dtype, weight_layout="contiguous"):
    generator = torch.Generator().manual_seed(0)

    def draw(*size, layout="contiguous"):
        return drawing.draw(size, 1.0, layout, dtype, "cpu", generator)

    x = draw(*shape, 24, layout=layout)
    weight, diff, gates = (draw(40, 24, layout=weight_layout) for _ in range(3))
    return x, weight, draw(40), diff, gates, draw(*shape, 40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", LAYOUTS)
def test_linears_are_their_weights_times_x(case, dtype, backend):
    """y and every gradient, the frozen weight's and the bias's too."""
    x, weight, bias, diff, gates, dy = leaves_of(*LAYOUTS[case], dtype, "transposed")
    group = torch.tensor([0.7], dtype=dtype)
    tensors = [t.requires_grad_() for t in (x, weight, bias, diff, gates, group)]
    options = {"group_log_alpha": group, "training": True, "backend": backend.name}

    def composed():
        made, count = PF.diff_pruning_weight(weight, diff, gates, **options)
        return F.linear(x, made, bias), count

    results = []
    for call in (
        lambda: PF.diff_pruning_linear(x, weight, bias, diff, gates, **options),
        composed,
    ):
        torch.manual_seed(4)
        y, count = call()
        grads = torch.autograd.grad((y, count), tensors, (dy, torch.tensor(0.5).to(count)))
        results.append((y, count, *grads))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)

    y = PF.masked_linear(x, weight, bias, gates, threshold=0.25, backend=backend.name)
    mask = (gates >= 0.25).to(dtype)
    expected = F.linear(x, weight * mask, bias)
    torch.testing.assert_close(y, expected)
    ours = torch.autograd.grad(y, (x, weight, bias, gates), dy)
    theirs = torch.autograd.grad(expected, (x, weight, bias), dy)
    for one, other in zip(ours, theirs, strict=False):
        torch.testing.assert_close(one, other)
    dmade = dy.reshape(-1, 40).T @ x.reshape(-1, 24)
    torch.testing.assert_close(ours[3], dmade * weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mask_is_exact(dtype, backend):
    """Rounded once: x = 1 shows the weight, and the gradient of a score is one product."""
    weight, scores = torch.randn(37, 29).to(dtype), torch.randn(37, 29).to(dtype)
    scores[0, :3] = torch.tensor([0.3, math.nan, math.inf])  # at the threshold, rounded alike
    scores.requires_grad_()
    y = PF.masked_linear(
        torch.eye(29, dtype=dtype), weight, None, scores, threshold=0.3, backend=backend.name
    )
    assert torch.equal(y.T, torch.where(scores >= 0.3, weight, 0.0))
    (dscores,) = torch.autograd.grad(y, scores, torch.full((29, 37), 2.0, dtype=dtype))
    assert torch.equal(dscores, 2 * weight)


@pytest.mark.parametrize("trains", list(itertools.product([False, True], repeat=4)))
def test_every_pattern_of_requires_grad(trains, backend):
    tensors = leaves_of((6,), "contiguous", torch.float64)
    x, weight, bias, diff, gates, dy = tensors
    group = torch.tensor([0.7], dtype=torch.float64)
    options = {"group_log_alpha": group, "training": True, "backend": backend.name}
    leaves = (x, diff, gates, group)

    def gradients(wanted):
        for t in leaves:
            t.requires_grad_(any(t is w for w in wanted))
        torch.manual_seed(0)
        y, count = PF.diff_pruning_linear(x, weight, bias, diff, gates, **options)
        outputs = [(t, g) for t, g in ((y, dy), (count, torch.ones_like(count))) if t.requires_grad]
        if not wanted:
            assert not outputs
            return ()
        return torch.autograd.grad([t for t, _ in outputs], wanted, [g for _, g in outputs])

    everything = dict(zip(map(id, leaves), gradients(leaves), strict=True))
    wanted = [t for t, train in zip(leaves, trains, strict=True) if train]
    for t, grad in zip(wanted, gradients(wanted), strict=True):
        assert torch.equal(grad, everything[id(t)])


def test_either_result_alone_can_be_differentiated(backend):
    inputs = DiffInputs.make((9, 5), torch.float64)
    diff, gates = inputs.diff.requires_grad_(), inputs.log_alpha.requires_grad_()
    x = torch.randn(3, 5, dtype=torch.float64)
    for call in (
        lambda: PF.diff_pruning_weight(inputs.weight, diff, gates, backend=backend.name),
        lambda: PF.diff_pruning_linear(x, inputs.weight, None, diff, gates, backend=backend.name),
    ):
        _, count = call()
        ddiff, dgates = torch.autograd.grad(count, (diff, gates), allow_unused=True)
        assert ddiff is None or not ddiff.any()
        share = torch.sigmoid(gates)
        torch.testing.assert_close(dgates, share * (1 - share))
        made, _ = call()
        assert torch.autograd.grad(made.sum(), diff)[0].any()


@pytest.mark.parametrize("kind", ["weight", "diff", "masked"])
def test_gradcheck(kind, backend):
    inputs = DiffInputs.make((4, 3), torch.float64, seed=1)
    x, bias = torch.randn(2, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    group = torch.tensor(1.0, dtype=torch.float64)
    options = {"training": True, "backend": backend.name}

    def weight_of(weight, diff, gates, group):
        torch.manual_seed(11)
        return PF.diff_pruning_weight(weight, diff, gates, group_log_alpha=group, **options)

    def diff_of(x, weight, bias, diff, gates, group):
        torch.manual_seed(11)
        return PF.diff_pruning_linear(
            x, weight, bias, diff, gates, group_log_alpha=group, **options
        )

    def masked(x, weight, bias):
        return PF.masked_linear(x, weight, bias, inputs.log_alpha, backend=backend.name)

    deltas = (inputs.diff, inputs.log_alpha, group)
    function, arguments = {
        "weight": (weight_of, (inputs.weight, *deltas)),
        "diff": (diff_of, (x, inputs.weight, bias, *deltas)),
        "masked": (masked, (x, inputs.weight, bias)),
    }[kind]
    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in arguments])


def test_nothing_of_a_weights_size_is_kept(backend):
    x, weight, bias, diff, gates, _ = leaves_of((6,), "contiguous", torch.float32)
    tensors = [t.requires_grad_(t is not weight) for t in (x, weight, bias, diff, gates)]
    for call, new in (
        (lambda: PF.diff_pruning_linear(*tensors, training=True, backend=backend.name), [(1,)]),
        (lambda: PF.masked_linear(*tensors[:4], backend=backend.name), []),
    ):
        saved = []
        with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # noqa: B023
            call()
        known = {t.data_ptr() for t in tensors}
        assert [tuple(t.shape) for t in saved if t.data_ptr() not in known] == new


def test_differentiating_twice_is_refused(backend):
    x, weight, bias, diff, gates, _ = leaves_of((6,), "contiguous", torch.float32)
    diff.requires_grad_()
    y, _ = PF.diff_pruning_linear(x, weight, bias, diff, gates, backend=backend.name)
    (grad,) = torch.autograd.grad(y.square().sum(), diff, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_autocast_makes_the_weight_in_its_dtype(backend):
    """fp32 parameters: no rounded copies of them, gradients in fp32."""
    x, weight, bias, diff, gates, _ = leaves_of((6,), "contiguous", torch.float32)
    for t in (diff, gates):
        t.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, count = PF.diff_pruning_linear(x, weight, bias, diff, gates, backend=backend.name)
        masked = PF.masked_linear(x, weight, bias, gates, backend=backend.name)
    made, _ = PF.diff_pruning_weight(weight, diff, gates, backend=backend.name)
    half = torch.bfloat16
    assert torch.equal(y, F.linear(x.to(half), made.to(half), bias.to(half)))
    assert torch.equal(
        masked, F.linear(x.to(half), (weight * (gates >= 0.01)).to(half), bias.to(half))
    )
    assert count.dtype == torch.float32
    grads = torch.autograd.grad(y.sum() + masked.sum() + count, (diff, gates))
    assert [g.dtype for g in grads] == [torch.float32] * 2


def good():
    return {
        "x": torch.randn(2, 3),
        "weight": torch.randn(4, 3),
        "bias": torch.randn(4),
        "diff": torch.randn(4, 3),
        "log_alpha": torch.randn(4, 3),
    }


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x is a list"),
        ({"x": torch.randn(2, 3).int()}, TypeError, "x has dtype torch.int32"),
        ({"x": torch.tensor(1.0)}, ValueError, "x has no dimension"),
        ({"weight": None}, TypeError, "weight is a NoneType"),
        ({"weight": torch.randn(4, 2)}, ValueError, "weight has shape (4, 2); expected (out, in)"),
        ({"weight": torch.randn(4, 3).half()}, TypeError, "weight has dtype torch.float16"),
        ({"bias": torch.randn(3)}, ValueError, "bias has shape (3,); expected (out,) = (4,)"),
        ({"diff": torch.randn(3, 4)}, ValueError, "diff has shape (3, 4); expected (4, 3)"),
        ({"diff": torch.randn(4, 3).double()}, TypeError, "diff has dtype torch.float64"),
        ({"log_alpha": torch.randn(12)}, ValueError, "log_alpha has shape (12,)"),
        ({"log_alpha": torch.randn(4, 3, device="meta")}, ValueError, "log_alpha is on meta"),
        ({"log_alpha": torch.eye(3).to_sparse()}, TypeError, "log_alpha is of layout"),
        ({"group_log_alpha": torch.randn(2)}, ValueError, "group_log_alpha has shape (2,)"),
        ({"group_log_alpha": 1.0}, TypeError, "group_log_alpha is a float"),
        ({"group_log_alpha": torch.ones(1).half()}, TypeError, "group_log_alpha has dtype"),
        ({"stretch": 1.0}, TypeError, "stretch is 1.0; expected two numbers"),
        ({"stretch": (0.0, 1.1)}, ValueError, "expected lower < 0 and upper > 1"),
        ({"stretch": (-0.1, 1.0)}, ValueError, "expected lower < 0 and upper > 1"),
        ({"stretch": (-math.inf, 2.0)}, ValueError, "stretch is -inf; expected a finite"),
        ({"stretch": (math.nan, 2.0)}, ValueError, "expected lower < 0"),
        ({"stretch": ("a", 2.0)}, TypeError, "stretch is a str"),
        ({"backend": "best"}, ValueError, "backend='best' is not known"),
    ],
)
def test_errors_of_diff_pruning(changed, error, message):
    with pytest.raises(error, match=re.escape(message)):
        PF.diff_pruning_linear(**{**good(), **changed})


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"scores": torch.randn(3, 4)}, ValueError, "scores has shape (3, 4); expected (4, 3)"),
        ({"scores": [0.0]}, TypeError, "scores is a list"),
        ({"threshold": "0"}, TypeError, "threshold is a str"),
        ({"threshold": math.nan}, ValueError, "threshold is nan; expected a finite number"),
    ],
)
def test_errors_of_masking(changed, error, message):
    tensors = good()
    arguments = {**{k: tensors[k] for k in ("x", "weight", "bias")}, "scores": tensors["diff"]}
    with pytest.raises(error, match=re.escape(message)):
        PF.masked_linear(**{**arguments, **changed})


def test_freed_memory_is_named(backend):
    tensors = good()
    tensors["diff"].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="diff of shape"):
        PF.diff_pruning_linear(**tensors, backend=backend.name)


def test_a_weight_in_fp64_is_not_cast_by_autocast():
    tensors = {k: t.double() for k, t in good().items()}
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(TypeError, match="weight has dtype"),
    ):
        PF.diff_pruning_linear(**{**tensors, "x": torch.randn(2, 3)})


def test_explain_names_the_backends():
    tensors = good()
    x, weight, bias, diff, gates = tensors.values()
    for name, arguments in (
        ("diff_pruning_weight", (weight, diff, gates)),
        ("diff_pruning_linear", (x, weight, bias, diff, gates)),
        ("masked_linear", (x, weight, bias, diff)),
    ):
        assert pelt_fast.explain(name, *arguments, backend="torch").backends == ("torch", "torch")
        assert "12 elements" in str(pelt_fast.explain(name, *arguments))
