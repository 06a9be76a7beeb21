"""``multi_elementwise``: values and gradients against fp64, layouts, dtypes, what is bitwise the same, errors."""

import itertools

import pytest
import torch

import pelt_fast
from pelt_fast import MultiAdapterPlan
from pelt_fast import functional as PF
from pelt_fast.backends.torch_.multi_elementwise import segment_sums
from pelt_fast.reference import multi_elementwise as by_formula
from pelt_fast.testing import inputs as drawing

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
L = 4
IDS = {
    "mixed": [2, -1, 0, 2, 2, 9, 0, -1, 2, 3, 3, 2, 0],
    "none": [-1] * 5,
    "one": [3] * 7,
    "token": [1],
    "empty": [],
    "large": [(7 * t) % 6 - 1 for t in range(777)],
}
PARTS = {"both": (True, True), "scales": (True, False), "biases": (False, True)}


@pytest.fixture(params=["reference", "torch", "cpp"])
def name(request):
    if request.param == "cpp":
        pytest.importorskip("pelt_fast.backends.cpp")
    return request.param


@pytest.fixture(params=["torch", "cpp"])
def kernels(request):
    if request.param == "cpp":
        pytest.importorskip("pelt_fast.backends.cpp")
    with pelt_fast.use_backend(request.param):
        yield


def draw(*shape, dtype=torch.float32, layout="contiguous", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return drawing.draw(shape, 1.0, layout, dtype, "cpu", generator)


def arguments(ids, dtype, features=33, parts="both", layout="contiguous", wider=False):
    scales, biases = (
        draw(L, features, dtype=torch.float32 if wider else dtype, seed=i) if there else None
        for i, there in enumerate(PARTS[parts], 1)
    )
    x = draw(len(ids), features, dtype=dtype, layout=layout, seed=3)
    return x, scales, biases, MultiAdapterPlan(ids, L)


def gradients(x, scales, biases, plan, dy, backend):
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, scales, biases)]
    y = PF.multi_elementwise(*leaves, plan, backend=backend)
    given = [t for t in leaves if t is not None]
    return y.detach(), torch.autograd.grad(y, given, dy)


def unit(dtype):
    """Of rounding: relative, and among subnormal numbers absolute."""
    info = torch.finfo(dtype)
    return info.eps / 2, info.smallest_normal * info.eps


def check(x, scales, biases, plan, ids, backend):
    """Within a few roundings of fp64, element by element; sums within one for each term."""
    dy = draw(*x.shape, dtype=x.dtype, seed=4)
    y, found = gradients(x, scales, biases, plan, dy, backend)
    wide = [
        None if t is None else t.detach().double().requires_grad_() for t in (x, scales, biases)
    ]
    a = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps / 2
    rows, dy = (t.reshape(len(ids), x.shape[-1]) for t in (wide[0], dy.double()))
    exact = by_formula(rows, wide[1], wide[2], ids) if ids else rows
    size = exact.abs() + rows.abs() * (3 if scales is None else 3 * scales.double().abs().max())
    u, least = unit(x.dtype)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    off = (y.double().reshape(exact.shape) - exact).abs()
    assert bool((off <= u * exact.abs() + 2 * a * size + least).all())
    given = [t for t in wide if t is not None]
    expected = torch.autograd.grad(exact, given, dy, allow_unused=True, materialize_grads=True)
    terms = dy.abs() * (1 if scales is None else 1 + rows.abs())
    for gradient, true, parameter in zip(
        found, expected, [t for t in (x, scales, biases) if t is not None], strict=True
    ):
        assert gradient.shape == parameter.shape
        assert gradient.dtype == parameter.dtype
        u, least = unit(parameter.dtype)
        bound = 2 * u * true.abs() + 2 * a * (true.abs() + terms.sum(0).max() if ids else 0)
        assert bool(((gradient.double() - true).abs() <= bound + least).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ids", IDS)
def test_against_fp64(ids, dtype, name):
    for parts, features in (("both", 33), ("scales", 64), ("biases", 1)):
        check(*arguments(IDS[ids], dtype, features, parts), IDS[ids], name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_parameters_over_a_half(dtype, name):
    check(*arguments(IDS["mixed"], dtype, wider=True), IDS["mixed"], name)


@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded"])
def test_layouts(layout, kernels):
    x, scales, biases, plan = arguments(IDS["mixed"], torch.float32, layout=layout)
    plain = x.clone(memory_format=torch.contiguous_format)
    y = PF.multi_elementwise(x, scales, biases, plan)
    assert torch.equal(y, PF.multi_elementwise(plain, scales, biases, plan))
    x, scales, biases, _ = arguments([0] * 12, torch.float32)
    by_rows = MultiAdapterPlan.from_samples([2, -1, 0], 4, L)
    y = PF.multi_elementwise(x, scales, biases, by_rows)
    whole = PF.multi_elementwise(x.view(3, 2, 2, 33), scales.T.contiguous().T, biases, by_rows)
    assert torch.equal(whole.view(12, 33), y)
    one = MultiAdapterPlan([1], L)
    vector = PF.multi_elementwise(x[0], scales, None, one)
    assert torch.equal(vector, x[0] * scales[1])


def test_tokens_without_an_adapter_keep_their_bits(kernels):
    x = torch.tensor([[-0.0, float("inf"), -float("inf"), float("nan"), 1e-45]]).expand(3, 5)
    parameters = torch.full((L, 5), float("nan"))
    plan = MultiAdapterPlan([-1, 7, -1], L)
    for parts in ((parameters, None), (None, parameters), (parameters, parameters)):
        y = PF.multi_elementwise(x, *parts, plan)
        assert torch.equal(y.view(torch.int32), x.contiguous().view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapter_s_gradient_is_bitwise_that_of_its_tokens_alone(dtype, kernels):
    ids = torch.tensor(IDS["large"])
    x, scales, biases, plan = arguments(ids.tolist(), dtype, 96)
    dy = draw(*x.shape, dtype=dtype, seed=4)

    def run(x, dy, plan):
        leaves = [t.detach().requires_grad_() for t in (x, scales, biases)]
        return torch.autograd.grad(PF.multi_elementwise(*leaves, plan), leaves, dy)

    dx, *mixed = run(x, dy, plan)
    again = run(x, dy, plan)
    assert all(map(torch.equal, (dx, *mixed), again))
    torch.set_num_threads(3)
    try:
        again = run(x, dy, plan)
    finally:
        torch.set_num_threads(1)
    assert all(map(torch.equal, (dx, *mixed), again))
    for g in range(L):
        mine = (ids == g).nonzero().flatten()
        dx_alone, *alone = run(x[mine], dy[mine], MultiAdapterPlan(ids[mine], L))
        assert torch.equal(dx_alone, dx[mine])
        for whole, part in zip(mixed, alone, strict=True):
            assert torch.equal(whole[g], part[g])
            others = [i for i in range(L) if i != g]
            assert not part[others].any()


def test_sums_by_segments_are_those_of_a_gpu():
    """What runs where no host may be waited for, here on a CPU."""
    plan = MultiAdapterPlan(IDS["mixed"], L, max_tokens=40)
    rows = draw(len(IDS["mixed"]), 5, dtype=torch.float64)
    sorted_rows = rows[plan.arrays[1][: plan.tokens].long()]
    found = segment_sums(sorted_rows, plan.arrays[2])
    ids = torch.tensor(IDS["mixed"])
    torch.testing.assert_close(found, torch.stack([rows[ids == g].sum(0) for g in range(L)]))


@pytest.mark.parametrize("parts", PARTS)
def test_gradcheck_and_every_pattern(parts, name):
    x, scales, biases, plan = arguments(IDS["mixed"], torch.float64, 3, parts)
    given = [t for t in (x, scales, biases) if t is not None]
    expected = None
    for pattern in sorted(itertools.product([False, True], repeat=len(given)), reverse=True):
        leaves = [t.detach().requires_grad_(w) for t, w in zip(given, pattern, strict=True)]

        def function(*tensors):
            rest = iter(tensors[1:])
            parts = [None if t is None else next(rest) for t in (scales, biases)]
            return PF.multi_elementwise(tensors[0], *parts, plan, backend=name)

        if all(pattern):
            assert torch.autograd.gradcheck(function, leaves)
        y = function(*leaves)
        assert y.requires_grad == any(pattern)
        if any(pattern):
            wanted = [t for t in leaves if t.requires_grad]
            found = dict(zip(map(id, wanted), torch.autograd.grad(y.sum(), wanted), strict=True))
            found = [found.get(id(t)) for t in leaves]
            expected = expected or found
            for gradient, true in zip(found, expected, strict=True):
                assert gradient is None or torch.equal(gradient, true)


def test_saved_and_second_derivative(kernels):
    x, scales, biases, plan = arguments(IDS["mixed"], torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        PF.multi_elementwise(x, scales, biases.requires_grad_(), plan)
    assert not any(t.is_floating_point() for t in saved)
    y = PF.multi_elementwise(x.requires_grad_(), scales.requires_grad_(), None, plan)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
    y = PF.multi_elementwise(x, scales, None, plan)
    plan.update_(IDS["mixed"])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_autocast_leaves_it_alone(kernels):
    x, scales, biases, plan = arguments(IDS["mixed"], torch.float32)
    expected = PF.multi_elementwise(x, scales, biases, plan)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(PF.multi_elementwise(x, scales, biases, plan), expected)
        y = PF.multi_elementwise(x, scales.bfloat16().double(), None, plan)
    assert torch.equal(y, PF.multi_elementwise(x, scales.bfloat16().float(), None, plan))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": torch.ones(3, 4).int()}, TypeError, "x has dtype torch.int32"),
        ({"scales": None, "biases": None}, ValueError, "scales and biases are both None"),
        ({"scales": torch.ones(L, 5)}, ValueError, r"scales has shape \(4, 5\); .* features = 4"),
        ({"scales": torch.ones(4)}, ValueError, r"scales has shape \(4,\); expected \(L, features"),
        ({"biases": torch.ones(2, 4)}, ValueError, "biases has 2 rows; expected 4, as many as"),
        ({"biases": torch.ones(L, 4).double()}, TypeError, "biases has dtype torch.float64"),
        ({"biases": [1.0]}, TypeError, "biases is a list; expected a torch.Tensor"),
        ({"plan": [0, 1, 2]}, TypeError, "plan is a list; expected a pelt_fast.MultiAdapterPlan"),
        ({"plan": MultiAdapterPlan([0] * 2, L)}, ValueError, "plan is of 2 tokens; expected 3"),
        ({"plan": MultiAdapterPlan([0] * 3, 5)}, ValueError, "plan is of 5 adapters; expected 4"),
        ({"backend": "fast"}, ValueError, "backend='fast' is not known"),
    ],
)
def test_errors(changed, error, message):
    given = {"x": torch.ones(3, 4), "scales": torch.ones(L, 4), "biases": torch.ones(L, 4)}
    given = {**given, "plan": MultiAdapterPlan([0, 1, -1], L), **changed}
    for function in (PF.multi_elementwise, lambda **kw: PF.explain("multi_elementwise", **kw)):
        with pytest.raises(error, match=message):
            function(**given)


def test_backends():
    x, scales, _, plan = arguments(IDS["mixed"], torch.float32)
    with pelt_fast.use_backend("torch"):
        found = PF.explain("multi_elementwise", x, scales, None, plan)
    assert found.backends == ("torch", "torch")
    assert "multi_elementwise_fwd float32 T=13 L=4 features=33 scaled" in str(found)
    with pytest.raises(pelt_fast.BackendUnavailable, match="no triton kernel serves this"):
        PF.multi_elementwise(x, scales, None, plan, backend="triton")


def test_a_layer_of_peft():
    peft = pytest.importorskip("peft")
    base = torch.nn.Linear(6, 5).double()
    x = draw(L, 3, 6, dtype=torch.float64)
    plan = MultiAdapterPlan.from_samples(range(L), 3, L)
    for feedforward in (False, True):
        config = peft.IA3Config(
            target_modules=["0"], feedforward_modules=["0"] if feedforward else []
        )
        model = peft.get_peft_model(torch.nn.Sequential(base), config, "user0")
        for g in range(1, L):
            model.add_adapter(f"user{g}", config)
        layer = model.base_model.model[0]
        scales = draw(L, 6 if feedforward else 5, dtype=torch.float64, seed=1)
        for g in range(L):
            layer.ia3_l[f"user{g}"].data = scales[g].view_as(layer.ia3_l[f"user{g}"]).clone()
        if feedforward:
            ours = base(PF.multi_elementwise(x, scales, None, plan))
        else:
            ours = PF.multi_elementwise(base(x), scales, None, plan)
        for g in range(L):
            model.set_adapter(f"user{g}")
            torch.testing.assert_close(ours[g], model(x[g]))
