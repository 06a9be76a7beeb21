"""A batch in which every sample names its adapter: served in eval and in training.

What it must compute is what PEFT computes: in eval for the same `adapter_names`, in training, where PEFT has none, for
each adapter alone on its rows.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pelt_fast
from pelt_fast.integrations import peft as integration
from pelt_fast.integrations import peft_mixed, stacked_lora, watch

from .parity import AUTOCAST, BF16, FP32, Precision, Results, assert_as_accurate, gradients, pairs

NAMES = ["second", "__base__", "default", "third", "second", "default", "__base__", "third"]
BASE_ROWS, OTHER_ROWS = [1, 6], [0, 2, 3, 4, 5, 7]
MODELS = ["bert", "gpt2", "llama", "t5"]
# other ranks, other scalings, fewer targets
SECOND = {
    "bert": ["query", "dense"],
    "gpt2": ["c_attn", "c_fc"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "t5": ["q", "v", "wo"],
}


@pytest.fixture
def make_mixed(make, randomize) -> Callable[..., nn.Module]:
    """make_mixed(architecture, ...): a PEFT model with the adapters "default", "second" and "third"."""

    def make_mixed(
        name: str = "bert",
        dtype: torch.dtype = torch.float32,
        adapters_fp32: bool = True,
        second: dict[str, Any] | None = None,
        **options: Any,
    ) -> nn.Module:
        model = make(name, dtype, adapters_fp32, **options)
        common = {"fan_in_fan_out": True} if name == "gpt2" else {}
        dropout = {"lora_dropout": options["lora_dropout"]} if "lora_dropout" in options else {}
        for adapter, more in (
            ("second", {"r": 8, "lora_alpha": 4, "use_rslora": True, **(second or {})}),
            ("third", {"r": 3, "lora_alpha": 5}),
        ):
            config = peft.LoraConfig(
                **{"target_modules": SECOND[name], **common, **dropout, **more}
            )
            model.add_adapter(adapter, config, autocast_adapter_dtype=adapters_fp32)
        randomize(model)
        return model

    return make_mixed


@pytest.fixture
def mixed(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs of the mixed batches that accelerated layers have served themselves so far."""
    inputs: list[Tensor] = []
    original = integration.multi_lora_linear

    def spy(x: Tensor, *base: Any, **operands: Any) -> Tensor:
        inputs.append(x)
        return original(x, *base, **operands)

    monkeypatch.setattr(integration, "multi_lora_linear", spy)
    return inputs


@pytest.fixture
def stacks(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One entry for every stack that was made."""
    made: list[None] = []
    original = stacked_lora._make

    def spy(*args: Any) -> Any:
        made.append(None)
        return original(*args)

    monkeypatch.setattr(stacked_lora, "_make", spy)
    return made


def batch_of(arch: Any, rows: int = len(NAMES), seed: int = 0) -> dict[str, Tensor]:
    batch = arch.batch(rows=rows, seed=seed)
    labels = batch.pop("labels")
    if arch.name == "t5":
        batch["decoder_input_ids"] = labels[:, :4]
    return batch


def loss_of(logits: Tensor) -> Tensor:
    """A sum over rows, so that they can be computed apart."""
    return logits.double().square().mean(dim=tuple(range(1, logits.dim()))).sum()


def train_all(model: nn.Module) -> None:
    model.train()
    model.base_model.set_requires_grad(["default", "second", "third"])


def together(model: nn.Module, batch: dict[str, Tensor], names: list[str] = NAMES) -> Results:
    """One backward of the mixed batch; gradients add up."""
    logits = model(**batch, adapter_names=names).logits
    loss_of(logits).backward()
    return {"logits": logits.detach(), **gradients(model)}


def apart(model: nn.Module, batch: dict[str, Tensor], names: list[str] = NAMES) -> Results:
    """Each adapter alone on its rows, as PEFT trains."""
    parts: dict[int, Tensor] = {}
    for name in dict.fromkeys(names):
        rows = [i for i, other in enumerate(names) if other == name]
        some = {key: value[rows] for key, value in batch.items()}
        if name == "__base__":
            with model.disable_adapter():
                logits = model(**some).logits
        else:
            model.set_adapter(name)
            logits = model(**some).logits
            loss_of(logits).backward()
        parts.update(zip(rows, logits.detach(), strict=True))
    return {"logits": torch.stack([parts[i] for i in range(len(names))]), **gradients(model)}


@pairs(MODELS, [FP32, BF16, AUTOCAST], always=[FP32])
def test_eval(
    name: str, precision: Precision, make_mixed, architectures, accelerated, mixed
) -> None:
    arch = architectures[name]
    plain = make_mixed(name, precision.weights, precision.adapters_fp32).eval()
    fast, batch = accelerated(plain), batch_of(arch)

    def run(model: nn.Module) -> Results:
        return {"logits": model(**batch, adapter_names=NAMES).logits}

    with torch.no_grad():
        exact = run(copy.deepcopy(plain).double())
        with precision():
            theirs, ours = run(plain), run(fast)
    assert len(mixed) == arch.layers
    assert_as_accurate(ours, theirs, exact, precision.computed, arch.layers)
    with precision():
        again = run(fast)  # with gradients on, which changes nothing in place
    assert torch.equal(again["logits"], ours["logits"])


@pairs(MODELS, [FP32, BF16, AUTOCAST], always=[FP32])
def test_gradients(
    name: str, precision: Precision, make_mixed, architectures, accelerated, mixed
) -> None:
    arch = architectures[name]
    plain = make_mixed(name, precision.weights, precision.adapters_fp32)
    fast, batch = accelerated(plain), batch_of(arch)
    train_all(fast)
    exact = apart(copy.deepcopy(plain).double(), batch)
    with precision():
        theirs, ours = apart(plain, batch), together(fast, batch)
    assert len(mixed) == arch.layers
    assert any(".third." in key for key in ours)
    assert_as_accurate(ours, theirs, exact, precision.computed, arch.layers)


def steps(model: nn.Module, arch: Any, run: Callable[..., Results]) -> Results:
    trained = {n: p for n, p in model.named_parameters() if ".lora_" in n}
    start = {name: parameter.detach().clone() for name, parameter in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1, momentum=0.9)
    results = {}
    for step, order in enumerate((NAMES, NAMES[::-1], NAMES[2:] + NAMES[:2])):
        optimizer.zero_grad()
        results[f"logits.{step}"] = run(model, batch_of(arch, seed=step), order)["logits"]
        optimizer.step()
    return {**results, **{name: p.detach() - start[name] for name, p in trained.items()}}


@pairs(MODELS, [FP32, BF16, AUTOCAST], always=[])
def test_three_steps(
    name: str, precision: Precision, make_mixed, architectures, accelerated
) -> None:
    arch = architectures[name]
    plain = make_mixed(name, precision.weights, precision.adapters_fp32)
    fast = accelerated(plain)
    train_all(fast)
    exact = steps(copy.deepcopy(plain).double(), arch, apart)
    with precision():
        theirs, ours = steps(plain, arch, apart), steps(fast, arch, together)
    assert_as_accurate(ours, theirs, exact, precision.computed, 3 * arch.layers)


def test_only_what_is_asked_for_gets_a_gradient(make_mixed, architectures, accelerated) -> None:
    fast, batch = accelerated(make_mixed()), batch_of(architectures["bert"])
    fast.train()
    fast.set_requires_grad(["default", "second", "third"])
    fast.set_requires_grad("second", False)
    found = together(fast, batch, ["second", "__base__", "default", "second"] * 2)
    assert {key.split(".")[-2] for key in found if key != "logits"} == {"default"}
    fast.zero_grad()
    fast.set_requires_grad("default", False)
    loss = fast(**batch, adapter_names=["default"] * len(NAMES)).logits.sum()
    assert not loss.requires_grad


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(
    name, reentrant, make_mixed, architectures, accelerated, mixed, assert_same
) -> None:
    arch = architectures[name]
    fast, batch = accelerated(make_mixed(name)), batch_of(arch)
    train_all(fast)
    expected = together(fast, batch)
    fast.zero_grad()
    calls = len(mixed)
    fast.gradient_checkpointing_enable({"use_reentrant": reentrant})
    fast.enable_input_require_grads()
    before = [copy.copy(module.__dict__) for module in fast.modules()]
    actual = together(fast, batch)
    assert len(mixed) > 2 * calls, "nothing ran again"
    after = [module.__dict__ for module in fast.modules()]
    assert all(
        now[key] is then[key] for now, then in zip(after, before, strict=True) for key in then
    )
    assert actual.keys() == expected.keys()
    for key, value in expected.items():  # T5 adds up in another order, without names too
        assert_same(actual[key], value, key, arch.layers)
    # two forwards before their backwards, of other names, and one of none
    fast.zero_grad()
    fast.base_model.set_adapter(["default"])
    train_all(fast)
    others = NAMES[::-1]
    losses = [
        loss_of(fast(**batch, **options).logits)
        for options in ({"adapter_names": NAMES}, {}, {"adapter_names": others})
    ]
    sum(losses).backward()
    together_again = gradients(fast)
    fast.zero_grad()
    fast.gradient_checkpointing_disable()
    for options in ({"adapter_names": NAMES}, {}, {"adapter_names": others}):
        loss_of(fast(**batch, **options).logits).backward()
    for key, value in gradients(fast).items():
        torch.testing.assert_close(together_again[key], value)


def test_a_checkpoint_that_is_not_the_models(make_mixed, accelerated) -> None:
    class Outer(nn.Module):
        def __init__(self, reentrant: bool) -> None:
            super().__init__()
            self.inner, self.reentrant = nn.Sequential(nn.Linear(6, 6)), reentrant

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=self.reentrant)

    x = torch.randn(2, 6, requires_grad=True)
    for reentrant in (False, True):
        config = peft.LoraConfig(target_modules=["0"], init_lora_weights=False)
        model = peft.get_peft_model(Outer(reentrant), config)
        pelt_fast.accelerate(model)
        loss = model(x=x, adapter_names=["default", "__base__"]).sum()
        with pytest.raises(RuntimeError, match="the model's own gradient_checkpointing_enable"):
            loss.backward()
        model(x=x).sum().backward()


def generate(model: nn.Module, ids: Tensor, **options: Any) -> Tensor:
    return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **{
            "max_new_tokens": 6,
            "min_new_tokens": 6,
            "do_sample": False,
            "pad_token_id": 0,
            "use_cache": True,
            **options,
        },
    )


@pytest.mark.parametrize("beams", [1, 3])
def test_generate(beams, make_mixed, accelerated, mixed) -> None:
    plain = make_mixed("llama").eval()
    fast = accelerated(plain)
    ids = torch.randint(3, 61, (len(NAMES), 5), generator=torch.Generator().manual_seed(4))
    actual = generate(fast, ids, adapter_names=NAMES, num_beams=beams)
    assert len(mixed) == 6 * 14
    assert torch.equal(actual, generate(plain, ids, adapter_names=NAMES, num_beams=beams))
    for row, name in enumerate(NAMES):
        if name == "__base__":
            with plain.disable_adapter():
                alone = generate(plain, ids[row : row + 1], num_beams=beams)
        else:
            plain.set_adapter(name)
            alone = generate(plain, ids[row : row + 1], num_beams=beams)
        assert torch.equal(actual[row], alone[0]), name
    assert len({tuple(row[5:].tolist()) for row in actual}) > 2


@pytest.mark.parametrize("beams", [1, 2])
def test_generate_with_an_encoder(beams, make_mixed, accelerated, mixed) -> None:
    plain = make_mixed("t5").eval()
    fast = accelerated(plain)
    ids = torch.randint(3, 61, (len(NAMES), 5), generator=torch.Generator().manual_seed(4))
    options = {"adapter_names": NAMES, "num_beams": beams}
    assert torch.equal(generate(fast, ids, **options), generate(plain, ids, **options))
    assert mixed


# What is kept from call to call


def test_stacks_and_plans_are_made_once(
    make_mixed, architectures, accelerated, stacks, monkeypatch
) -> None:
    plans: list[None] = []
    original = pelt_fast.MultiAdapterPlan.__init__

    def spy(*args: Any, **kwargs: Any) -> None:
        plans.append(None)
        original(*args, **kwargs)

    monkeypatch.setattr(pelt_fast.MultiAdapterPlan, "__init__", spy)
    stacked_lora.plan_of.cache_clear()
    fast, batch = accelerated(make_mixed("llama").eval()), batch_of(architectures["llama"])
    with torch.inference_mode():
        fast(**batch, adapter_names=NAMES)
        assert (len(stacks), len(plans)) == (14, 1)
        fast(**batch, adapter_names=NAMES)
        fast(**batch, adapter_names=NAMES[::-1])
        assert (len(stacks), len(plans)) == (14, 2)
    fast.base_model.set_requires_grad(["default", "second", "third"], False)
    fast(**batch, adapter_names=NAMES)
    assert len(stacks) == 14
    train_all(fast)
    together(fast, batch)  # what inference mode left is not in the way
    assert (len(stacks), len(plans)) == (28, 2)


def all_lora(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if ".lora_" in name]


def layers_of(model: nn.Module) -> list[lora.Linear]:
    return [module for module in model.modules() if isinstance(module, lora.Linear)]


@torch.no_grad()
def in_place(model: nn.Module) -> None:
    for parameter in all_lora(model):
        parameter.mul_(-2)


def through_data(model: nn.Module) -> None:
    for parameter in all_lora(model):
        parameter.data.mul_(-2)


def other_data(model: nn.Module) -> None:
    for _ in range(2):  # the second may get the address of the first
        for parameter in all_lora(model):
            parameter.data = parameter.data * -2


def other_parameters(model: nn.Module) -> None:
    for layer in layers_of(model):
        for linear in (*layer.lora_A.values(), *layer.lora_B.values()):
            linear.weight = nn.Parameter(linear.weight.detach() * -2)


def loaded(model: nn.Module) -> None:
    model.load_state_dict(
        {k: v * -2 for k, v in model.state_dict().items() if ".lora_" in k}, strict=False
    )


def loaded_by_peft(model: nn.Module) -> None:
    state = peft.get_peft_model_state_dict(model, adapter_name="second")
    peft.set_peft_model_state_dict(model, {k: v * -2 for k, v in state.items()}, "second")


def rescaled(model: nn.Module) -> None:
    for layer in layers_of(model):
        layer.set_scale("default", 3.0)


def in_another_dtype(model: nn.Module) -> None:
    model.double()


def deleted_and_added(model: nn.Module) -> None:
    model.set_adapter("third")
    model.delete_adapter("default")
    torch.manual_seed(3)
    config = peft.LoraConfig(r=6, target_modules=["value"], init_lora_weights=False)
    model.add_adapter("default", config)


def merged_and_unmerged(model: nn.Module) -> None:
    model.merge_adapter()
    model.unmerge_adapter()


def one_lora_less(model: nn.Module) -> None:
    model.base_model.model.bert.encoder.layer[0].attention.self.query.delete_adapter("second")


def stepped(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(all_lora(model), lr=0.1)
    for parameter in all_lora(model):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def another_rank(model: nn.Module) -> None:
    torch.manual_seed(7)
    for layer in layers_of(model):
        if "second" in layer.lora_A:
            inputs, outputs = layer.in_features, layer.out_features
            layer.lora_A["second"] = nn.Linear(inputs, 5, bias=False)
            layer.lora_B["second"] = nn.Linear(5, outputs, bias=False)


def another_rank_of_the_data(model: nn.Module) -> None:
    for layer in layers_of(model):
        for a, b in zip(layer.lora_A.values(), layer.lora_B.values(), strict=True):
            a.weight.data, b.weight.data = a.weight.data[:2], b.weight.data[:, :2]


def other_scalings(model: nn.Module) -> None:
    for layer in layers_of(model):
        layer.scaling = dict.fromkeys(layer.scaling, 0.3)


def scaled_for_a_while(model: nn.Module) -> None:
    for layer in layers_of(model):
        layer.scale_layer(0.5)


def hooked(model: nn.Module) -> None:
    for layer in layers_of(model)[1:]:
        layer.lora_B["default"].register_forward_hook(lambda module, args, output: output * 3)


def forward_of_its_own(model: nn.Module) -> None:
    for layer in layers_of(model)[1:]:
        linear = layer.lora_B["default"]
        linear.forward = lambda x, linear=linear: nn.functional.linear(x, linear.weight) * 3


class Negative(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


def another_class(model: nn.Module) -> None:
    for layer in layers_of(model)[1:]:
        layer.lora_A["default"].__class__ = Negative


def parametrized(model: nn.Module) -> None:
    for layer in layers_of(model)[1:]:
        linear = layer.lora_A["default"]
        nn.utils.parametrize.register_parametrization(linear, "weight", nn.Softsign())


def plain_tensors(model: nn.Module) -> None:
    """As a hypernetwork sets them; twice, since the second time no parameter goes."""
    for layer in layers_of(model)[1:]:
        linear = layer.lora_B["default"]
        weight = linear.weight.detach()
        if isinstance(linear.weight, nn.Parameter):
            del linear.weight
        linear.weight = weight * 3


def hooks_replaced(model: nn.Module) -> None:
    for layer in layers_of(model)[1:]:
        linear = layer.lora_B["default"]
        other = copy.copy(linear)
        other._forward_hooks = {0: lambda module, args, output: output * 3}
        linear.__dict__ = other.__dict__


CHANGES = [
    *(in_place, through_data, other_data, other_parameters, loaded, loaded_by_peft, rescaled),
    *(in_another_dtype, deleted_and_added, merged_and_unmerged, one_lora_less, stepped),
    *(another_rank, another_rank_of_the_data, other_scalings, scaled_for_a_while),
    *(hooked, forward_of_its_own, another_class, parametrized, hooks_replaced),
]


@pytest.mark.parametrize(
    ("change", "extension"),
    [(change, True) for change in CHANGES]
    + [(change, False) for change in (in_place, through_data, other_data, hooked)],
)
def test_no_stack_is_stale(
    change,
    extension,
    make_mixed,
    architectures,
    accelerated,
    assert_same,
    mixed,
    monkeypatch,
) -> None:
    if not extension:
        monkeypatch.setattr(watch, "cpp_extension", lambda: None)
    plain = make_mixed().eval()
    fast, batch = accelerated(plain), batch_of(architectures["bert"])
    with torch.no_grad():
        before = fast(**batch, adapter_names=NAMES).logits
        assert torch.equal(fast(**batch, adapter_names=NAMES).logits, before)
    change(plain)
    change(fast)
    calls = len(mixed)
    with torch.no_grad():
        after = fast(**batch, adapter_names=NAMES).logits
        assert_same(after, plain(**batch, adapter_names=NAMES).logits)
    assert len(mixed) > calls
    if change not in (merged_and_unmerged, in_another_dtype):
        assert not torch.allclose(after.double(), before.double())


def test_weights_that_are_no_parameters(
    make_mixed, architectures, accelerated, assert_same, mixed
) -> None:
    plain = make_mixed().eval()
    fast, batch = accelerated(plain), batch_of(architectures["bert"])
    for _ in range(3):
        plain_tensors(plain)
        plain_tensors(fast)
        for trained in (False, True):
            with torch.set_grad_enabled(trained):
                assert_same(
                    fast(**batch, adapter_names=NAMES).logits,
                    plain(**batch, adapter_names=NAMES).logits,
                )


def test_layers_are_read_once(make_mixed, architectures, accelerated, monkeypatch) -> None:
    if watch.cpp_extension() is None:
        pytest.skip("without the extension they are read at each call")
    read: list[str] = []
    theirs = peft_mixed.adapter_operands

    def spy(layer: Any, name: str, *args: Any) -> Any:
        read.append(name)
        return theirs(layer, name, *args)

    monkeypatch.setattr(peft_mixed, "adapter_operands", spy)
    fast, batch = accelerated(make_mixed("bert", lora_dropout=0.5)), batch_of(architectures["bert"])

    def count(run: Callable[[], Any]) -> int:
        read.clear()
        run()
        return len(read)

    @torch.no_grad()
    def evaluate() -> None:
        fast.eval()(**batch, adapter_names=NAMES)

    every = 13 + 9 + 9
    assert [count(evaluate) for _ in range(2)] == [every, 0]
    assert count(lambda: evaluate() or fast(**batch, adapter_names=NAMES[::-1])) == 0
    in_place(fast)
    assert count(evaluate) == 0, "only the stacks are of the contents"
    train_all(fast)
    assert [count(lambda: together(fast, batch)) for _ in range(2)] == [every, 0], "dropout is on"
    stepped(fast)
    assert count(lambda: together(fast, batch)) == 0
    for dropout in layers_of(fast)[0].lora_dropout.values():
        dropout.p = 0.1
    assert count(lambda: together(fast, batch)) == 3
    assert count(lambda: fast(**batch, adapter_names=["default"] * 8)) == 13


def test_what_is_kept_goes_with_the_layer(make_mixed, architectures, accelerated) -> None:
    fast = accelerated(make_mixed()).eval()
    with torch.no_grad():
        fast(**batch_of(architectures["bert"]), adapter_names=NAMES)
    gone = weakref.ref(layers_of(fast)[0])
    assert gone() in peft_mixed._readings
    del fast
    gc.collect()
    assert gone() is None


def test_what_an_optimizer_wrote_unseen(
    make_mixed, architectures, accelerated, assert_same
) -> None:
    plain = make_mixed().eval()
    fast, batch = accelerated(plain), batch_of(architectures["bert"])
    for adapters in (["default", "second", "third"], ["default"]):
        with torch.no_grad():
            fast(**batch, adapter_names=NAMES)
        fast.train()
        if len(adapters) == 1:
            fast.set_adapter("default")
            fast(**batch).logits.sum().backward()
        else:
            train_all(fast)
            together(fast, batch)
        for model in (plain, fast):
            for parameter in all_lora(model):
                parameter.data.view(-1)[1] += 10.0  # where no sample is
        fast.eval()
        with torch.no_grad():
            assert_same(
                fast(**batch, adapter_names=NAMES).logits,
                plain(**batch, adapter_names=NAMES).logits,
            )


def test_adapters_added_later(
    make_mixed, randomize, architectures, accelerated, assert_same
) -> None:
    plain = make_mixed().eval()
    fast, batch = accelerated(plain), batch_of(architectures["bert"])
    with torch.no_grad():
        fast(**batch, adapter_names=NAMES)
    for model in (plain, fast):
        model.add_adapter("wide", peft.LoraConfig(r=16, target_modules=["query", "value"]))
        randomize(model)
    names = ["wide", *NAMES[1:]]
    with torch.no_grad():
        assert_same(
            fast(**batch, adapter_names=names).logits, plain(**batch, adapter_names=names).logits
        )


def test_disabled_adapters(make_mixed, architectures, accelerated, mixed) -> None:
    fast, batch = accelerated(make_mixed()), batch_of(architectures["bert"])
    with torch.no_grad():
        for training in (False, True):
            fast.train(training)
            with fast.disable_adapter():
                base = fast(**batch).logits
                assert torch.equal(fast(**batch, adapter_names=NAMES).logits, base)
            fast.base_model.disable_adapter_layers()
            assert torch.equal(fast(**batch, adapter_names=NAMES).logits, base)
            fast.base_model.enable_adapter_layers()
            assert not mixed
            assert torch.equal(fast(**batch, adapter_names=["__base__"] * len(NAMES)).logits, base)
            assert not mixed


def test_restore(make_mixed, architectures, accelerated, mixed) -> None:
    plain = make_mixed().eval()
    fast, batch = accelerated(plain), batch_of(architectures["bert"])
    with torch.no_grad():
        expected = plain(**batch, adapter_names=NAMES).logits
        fast(**batch, adapter_names=NAMES)
    calls = len(mixed)
    assert pelt_fast.restore(fast) == 13
    assert [type(m) for m in fast.modules()] == [type(m) for m in plain.modules()]
    kept = (stacked_lora._kept, peft_mixed._readings)
    assert not any(layer in layers for layer in layers_of(fast) for layers in kept)
    with torch.no_grad():
        assert torch.equal(fast(**batch, adapter_names=NAMES).logits, expected)
    assert len(mixed) == calls
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when the model is in train"):
        fast.train()(**batch, adapter_names=NAMES)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copied, make_mixed, architectures, accelerated, mixed) -> None:
    fast, batch = accelerated(make_mixed()), batch_of(architectures["bert"])
    train_all(fast)
    twin = copied(fast)
    expected, actual = together(fast, batch), together(twin, batch)
    assert len(mixed) == 2 * 13
    assert all(torch.equal(actual[key], value) for key, value in expected.items())
    assert pelt_fast.restore(twin) == 13


def test_state_dict_and_files(make_mixed, architectures, tmp_path) -> None:
    model, batch = make_mixed().eval(), batch_of(architectures["bert"])
    keys = list(model.state_dict())
    files = {}
    for folder in ("plain", "fast"):
        if folder == "fast":
            pelt_fast.accelerate(model)
            with torch.no_grad():
                model(**batch, adapter_names=NAMES)
        model.save_pretrained(tmp_path / folder)
        files[folder] = {
            str(path.relative_to(tmp_path / folder)): path.read_bytes()
            for path in sorted((tmp_path / folder).rglob("*"))
            if path.is_file()
        }
    assert list(model.state_dict()) == keys
    assert files["plain"] == files["fast"]


# Dropout and biases


def test_dropout(make_mixed, architectures, accelerated, mixed, assert_same) -> None:
    fast, batch = accelerated(make_mixed(lora_dropout=0.5)), batch_of(architectures["bert"])
    train_all(fast)
    first, second = together(fast, batch)["logits"], together(fast, batch)["logits"]
    assert not (first[OTHER_ROWS] == second[OTHER_ROWS]).any()
    assert torch.equal(first[BASE_ROWS], second[BASE_ROWS]), "the base has no dropout"
    torch.manual_seed(5)
    first = together(fast, batch)["logits"]
    torch.manual_seed(5)
    assert torch.equal(together(fast, batch)["logits"], first)
    assert len(mixed) == 4 * 13
    for layer in layers_of(fast):
        for dropout in layer.lora_dropout.values():
            dropout.p = 1.0
    with fast.disable_adapter():
        base = fast(**batch).logits
    assert_same(fast(**batch, adapter_names=NAMES).logits, base)


def test_unequal_dropout_is_left_to_peft(make_mixed, architectures, accelerated, mixed) -> None:
    plain = make_mixed(second={"lora_dropout": 1.0})
    fast, batch = accelerated(plain), batch_of(architectures["bert"])
    train_all(fast)
    exact, theirs = apart(copy.deepcopy(plain).double(), batch), apart(plain, batch)
    ours = together(fast, batch)
    assert 0 < len(mixed) < 13, "the layers that lack the second adapter are served"
    assert_as_accurate(ours, theirs, exact, torch.float32, 13)
    mixed.clear()
    fast.eval()(**batch, adapter_names=NAMES)
    assert len(mixed) == 13, "there is no dropout in eval"


@pytest.mark.parametrize("precision", [FP32, BF16, AUTOCAST], ids=lambda p: p.name)
def test_biases(precision, make_mixed, architectures, accelerated, mixed) -> None:
    plain = make_mixed("bert", precision.weights, second={"lora_bias": True})
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if name.endswith(".lora_B.second.bias"):
                parameter.uniform_(-1, 1)
    fast, batch = accelerated(plain), batch_of(architectures["bert"])
    train_all(fast)
    exact = apart(copy.deepcopy(plain).double(), batch)
    with precision():
        theirs, ours = apart(plain, batch), together(fast, batch)
    assert len(mixed) == 13
    assert any(key.endswith("lora_B.second.bias") for key in ours)
    assert_as_accurate(ours, theirs, exact, precision.computed, 13)
    fast.eval()
    with precision(), torch.no_grad():
        logits = fast(**batch, adapter_names=NAMES).logits
    assert_as_accurate(
        {"logits": logits},
        *[{"logits": r["logits"]} for r in (theirs, exact)],
        precision.computed,
        13,
    )


# What is not served


def message_of(model: nn.Module, batch: dict[str, Tensor], names: Any) -> str:
    with pytest.raises((ValueError, TypeError)) as caught:
        model(**batch, adapter_names=names)
    assert not any(module._forward_pre_hooks for module in layers_of(model))
    return str(caught.value)


@pytest.mark.parametrize("training", [False, True])
def test_errors_are_those_of_peft(training, make_mixed, architectures, accelerated) -> None:
    plain = make_mixed().eval()
    fast, batch = accelerated(plain), batch_of(architectures["bert"])
    fast.train(training)
    assert message_of(fast, batch, ["nobody", *NAMES[1:]]) == (
        "Trying to infer with non-existing adapter(s): nobody"
    )
    assert message_of(fast, batch, NAMES[1:]) == (
        "Length of `adapter_names` should be the same as the number of inputs, but got 7 and 8 respectively."
    )
    fast.merge_adapter()
    assert message_of(fast, batch, NAMES).startswith("Cannot pass `adapter_names` when there are m")
    fast.unmerge_adapter()
    fast(**batch, adapter_names=NAMES)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"modules_to_save": ["classifier"]},
            r"modules_to_save.* is a ModulesToSaveWrapper|classifier is a ModulesToSaveWrapper",
        ),
        ({"target_modules": ["query", "word_embeddings"]}, "word_embeddings is a Embedding"),
    ],
    ids=["modules_to_save", "embedding"],
)
def test_other_modules(options, reason, make, randomize, architectures, mixed, assert_same) -> None:
    plain = make("bert", **options)
    plain.add_adapter(
        "second",
        peft.LoraConfig(
            r=8, **options, **({} if "target_modules" in options else {"target_modules": ["query"]})
        ),
    )
    randomize(plain)
    plain.eval()
    fast, batch = copy.deepcopy(plain), batch_of(architectures["bert"])
    report = pelt_fast.accelerate(fast)
    assert any(name.endswith(("classifier", "word_embeddings")) for name in report.left)
    names = ["second", "__base__", "default", "second"] * 2
    with torch.no_grad():
        assert_same(
            fast(**batch, adapter_names=names).logits, plain(**batch, adapter_names=names).logits
        )
    assert mixed
    fast.train()
    with pytest.raises(ValueError, match=rf"Cannot pass `adapter_names` when .*({reason})"):
        fast(**batch, adapter_names=names)


@pytest.mark.parametrize("variant", ["use_dora", "velora_config"])
def test_variants(variant, make_mixed, architectures, accelerated, mixed, assert_same) -> None:
    config = True if variant == "use_dora" else peft.tuners.lora.config.VeloraConfig()
    plain = make_mixed(second={variant: config}).eval()
    fast, batch = accelerated(plain), batch_of(architectures["bert"])
    names = ["default", "__base__", "third", "default"] * 2
    with torch.no_grad():
        assert_same(
            fast(**batch, adapter_names=names).logits, plain(**batch, adapter_names=names).logits
        )
    assert len(mixed) == 13, "a variant that no row asks for is not in the way"
    mixed.clear()
    if variant == "use_dora":
        for training in (False, True):
            message = message_of(fast.train(training), batch, NAMES)
            assert message == "Cannot pass `adapter_names` when DoRA is enabled."
        return
    with torch.no_grad():
        assert_same(
            fast(**batch, adapter_names=NAMES).logits, plain(**batch, adapter_names=NAMES).logits
        )
    assert len(mixed) == 4, "the layers that lack the variant"
    assert "when the model is in training mode. adapter 'second': variant" in message_of(
        fast.train(), batch, NAMES
    )


def test_hooks_on_inner_layers_run(make_mixed, architectures, accelerated, mixed) -> None:
    fast, batch = accelerated(make_mixed()), batch_of(architectures["bert"])
    train_all(fast)
    expected = together(fast, batch)
    fast.zero_grad()
    mixed.clear()
    seen: list[nn.Module] = []
    linear = layers_of(fast)[0].lora_A["second"]
    linear.register_forward_hook(lambda module, args, output: seen.append(module))
    actual = together(fast, batch)
    assert seen == [linear]
    assert len(mixed) == 12
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value)


def test_all_rows_have_one_adapter(make_mixed, architectures, accelerated, assert_same) -> None:
    fast, batch = accelerated(make_mixed()), batch_of(architectures["bert"])
    fast.set_adapter("second")
    expected = fast(**batch).logits
    assert_same(fast(**batch, adapter_names=["second"] * len(NAMES)).logits, expected)


@pytest.mark.slow
def test_compile_leaves_mixed_batches_to_peft(make_mixed, accelerated, mixed, assert_same) -> None:
    layer = layers_of(accelerated(make_mixed()).eval())[0]
    x = torch.randn(len(NAMES), 3, 32)
    expected = layer(x, adapter_names=NAMES)
    mixed.clear()
    torch._dynamo.reset()
    actual = torch.compile(layer, backend="aot_eager")(x, adapter_names=NAMES)
    assert_same(actual, expected)
    assert not mixed
