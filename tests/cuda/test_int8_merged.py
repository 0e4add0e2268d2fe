"""Layers of one input computed together, on the host: states, moves, copies, models that call them apart."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest

import cuda_backend
from cuda_backend import torch_modules, torch_ops
from refimpl.errors import DTypeError, OptionError, UnsupportedError
from tests.cuda import int8_on_host

torch: Any = pytest.importorskip("torch")

SIZES = {"q": 32, "k": 8, "v": 5}
called: list[int] = []


@pytest.fixture(autouse=True)
def _reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_backend, "prepare_weight", int8_on_host.prepare_weight)
    called.clear()


def compute(x: Any, weight: Any, **options: Any) -> Any:
    """Count the output features of each call."""
    called.append(weight.codes.shape[1])
    return int8_on_host.compute(x, weight, **options)


class Block(torch.nn.Module):  # type: ignore[misc]
    """Three layers that a model calls one after another, the second without a bias."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        for name, size in SIZES.items():
            self.add_module(name, torch.nn.Linear(20, size, bias=name != "k"))

    def forward(self, x: Any) -> Any:
        return torch.cat([getattr(self, name)(x) for name in SIZES], dim=-1)


def parts(seed: int) -> Any:
    return torch.nn.ModuleList(Block(seed).children())


def merged(seed: int) -> Any:
    return torch_ops.merged_int8_linear(parts(seed), compute=compute)


def block(seed: int, *, merge: Any = (tuple(SIZES),)) -> Any:
    model = Block(seed)
    assert torch_ops.replace_linear(model, merge=merge, compute=compute) == 3
    return model


def apart(seed: int, x: Any) -> list[Any]:
    return [torch_ops.int8_linear(layer, compute=int8_on_host.compute)(x) for layer in parts(seed)]


def in_one_memory(layers: Any) -> bool:
    """Return whether codes, scales and biases of layers are three stretches of memory."""
    held = [(each.codes, each.absmax, each.no_bias if each.bias is None else each.bias) for each in layers]
    kinds = list(zip(*held, strict=True))
    return all(
        len({part.untyped_storage().data_ptr() for part in kind}) == 1
        and kind[0].untyped_storage().nbytes() == sum(part.nbytes for part in kind)
        for kind in kinds
    )  # fmt: skip


X = torch.randn(2, 7, 20, generator=torch.Generator().manual_seed(0))


def same(found: Any, expected: Any) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


def test_a_bias_unlike_the_weight_is_refused_before_anything_changes() -> None:
    wrong = parts(0)
    wrong[2].bias = torch.nn.Parameter(wrong[2].bias.half())
    message = r"expected a bias as the weight is, torch.float32 on cpu, got torch.float16 on cpu"
    with pytest.raises(DTypeError, match=rf"layers\[2\]: {message}"):
        torch_ops.merged_int8_linear(wrong, compute=compute)
    with pytest.raises(DTypeError, match=message):
        torch_ops.int8_linear(wrong[2], compute=compute)
    model = Block(0)
    model.v.bias = wrong[2].bias
    with pytest.raises(DTypeError, match=rf"v: {message}"):
        torch_ops.replace_linear(model, compute=compute)
    assert {type(child) for child in model.children()} == {torch.nn.Linear}
    wrong[2].bias = torch.nn.Parameter(wrong[2].bias.float().to("meta"))
    with pytest.raises(DTypeError, match=r"got torch\.float32 on meta"):
        torch_ops.int8_linear(wrong[2], compute=compute)


def test_its_state_is_that_of_the_layers() -> None:
    layers, expected = parts(1), apart(1, X)
    alone = torch.nn.ModuleList([torch_ops.int8_linear(layer, compute=compute) for layer in layers])
    for state in (layers.state_dict(), alone.state_dict(), merged(1).state_dict()):
        target = merged(2)
        assert not same(target(X), expected)
        target.load_state_dict(state)
        assert same(target(X), expected)
        assert in_one_memory(target)
    assert list(merged(1).state_dict()) == list(alone.state_dict())
    other = torch.nn.ModuleList([torch_ops.int8_linear(layer, compute=compute) for layer in parts(2)])
    other.load_state_dict(merged(1).state_dict())
    assert same([layer(X) for layer in other], expected)
    target = merged(2)
    for part, layer in zip(target, layers, strict=True):
        part.load_state_dict(layer.state_dict())
    assert same(target(X), expected)
    assert repr(target[1]) == "Int8Linear(in_features=20, out_features=8, threshold=6.0)"


def test_a_state_that_does_not_fit() -> None:
    before = apart(2, X)
    for name, value, message in (
        ("1.weight", torch.zeros(9, 20), r"size mismatch for 1\.weight: \[9, 20\], expected \[8, 20\]"),
        ("1.weight", torch.zeros(8, 32), r"size mismatch for 1\.weight: \[8, 32\], expected \[8, 20\]"),
        (
            "1.weight",
            torch.full((8, 20), torch.nan),
            r"While quantising 1\.weight: .*expected finite numbers",
        ),
        ("1.weight", torch.zeros(8, 20, dtype=torch.complex64), r"While quantising 1\.weight: .*complex64"),
        ("1.weight", [0.0], r"size mismatch for 1\.weight: list, expected \[8, 20\]"),
        ("1.codes", torch.zeros(8, 20, dtype=torch.int8), r"size mismatch for 1\.codes"),
        ("1.codes", [0], r'"1\.codes", expected torch.Tensor or Tensor-like'),
    ):
        for strict in (True, False):
            state, target = parts(1).state_dict(), merged(2)
            if name == "1.codes":
                state = merged(1).state_dict()
            state[name] = value
            with pytest.raises(RuntimeError, match=message):
                target.load_state_dict(state, strict=strict)
            assert name == "1.codes" or same(target(X)[1:2], before[1:2]), "as it was"
    target, state = merged(2), parts(1).state_dict()
    del state["1.weight"], state["2.bias"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"1\.codes", "1\.absmax", "2\.bias"'):
        target.load_state_dict(state)
    target = merged(2)
    found = target.load_state_dict({**state, "3.weight": torch.zeros(1)}, strict=False)
    assert found.missing_keys == ["1.codes", "1.absmax", "2.bias"]
    assert found.unexpected_keys == ["3.weight"]
    assert same(target(X)[:2], [apart(1, X)[0], before[1]])


@pytest.mark.parametrize("make", [merged, block])
def test_what_moves_copies_and_loads_layers_one_by_one(make: Callable[[int], Any]) -> None:
    first, expected = make(1), make(1)(X)

    def once(module: Any, wanted: Any = expected) -> None:
        called.clear()
        with torch.no_grad():
            assert same(module(X), wanted)
        assert called == [45]
        assert in_one_memory(list(module.children()))

    def saved(module: Any) -> Any:
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    once(first)
    for copied in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        once(copied)
        copied.load_state_dict(make(2).state_dict())
        once(copied, make(2)(X))
        once(first)
    for assign in (False, True):
        target = make(2)
        target.load_state_dict(saved(first), assign=assign)
        once(target)
        target.load_state_dict({name: value.double() for name, value in saved(first).items()}, assign=assign)
        assert {each.codes.dtype for each in target.children()} == {torch.int8}
        once(target.float())
    single = copy.deepcopy(next(first.children()))
    with torch.no_grad():
        assert torch.equal(single(X), apart(1, X)[0])


@pytest.mark.parametrize("make", [merged, block])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casts_leave_codes_and_scales(make: Callable[[int], Any], dtype: Any) -> None:
    module, rounded = make(1), parts(1)
    module(X)
    module.to(dtype)
    assert not any(part.joined or part.ahead for part in module.children()), "memory that was left"
    for part in module.children():
        assert (part.codes.dtype, part.absmax.dtype) == (torch.int8, torch.float32)
        assert part.bias is None or part.bias.dtype == dtype
    for layer in rounded:
        if layer.bias is not None:
            layer.bias = torch.nn.Parameter(layer.bias.to(dtype).float())
    called.clear()
    with torch.no_grad():
        found = module.float()(X)
        expected = [torch_ops.int8_linear(layer, compute=int8_on_host.compute)(X) for layer in rounded]
        assert same(found, expected if make is merged else torch.cat(expected, dim=-1))
    assert called == [45]
    assert in_one_memory(list(module.children()))


@pytest.mark.parametrize("make", [merged, block])
def test_from_the_meta_device(make: Callable[[int], Any]) -> None:
    with torch.device("meta"):
        module = make(0)
    assert {value.device.type for value in module.state_dict().values()} == {"meta"}
    state = (parts(1) if make is merged else Block(1)).state_dict()
    assert not any(module.load_state_dict(state, assign=True))
    with torch.no_grad():
        assert same(module(X), make(1)(X))
        called.clear()
        module(X)
    assert called == [45]
    assert in_one_memory(list(module.children()))


def test_what_was_laid_side_by_side_in_inference_mode_can_be_written_to() -> None:
    target = merged(2)
    target.load_state_dict(merged(1).state_dict(), assign=True)
    with torch.inference_mode():
        target(X)
    target.load_state_dict(merged(2).state_dict())
    assert same(target(X), apart(2, X))


def test_memories_that_touch_are_not_one() -> None:
    memory = bytearray(8)
    parts = [torch.frombuffer(memory, dtype=torch.int8, offset=place, count=4) for place in (0, 4)]
    assert parts[0].data_ptr() + 4 == parts[1].data_ptr()
    assert torch_modules._as_one(parts) is None
    assert torch_modules._as_one(torch.arange(8).split(4)).tolist() == list(range(8))


def test_layers_of_a_model_are_computed_once_for_the_same_tensor() -> None:
    model, alone = block(3), block(3, merge=())
    assert list(model.state_dict()) == list(alone.state_dict())
    with torch.no_grad():
        expected = {name: getattr(alone, name)(X) for name in SIZES}
        called.clear()
        for names, calls in (
            ("qkv", [45]),
            ("qvk", [45]),
            ("kqv", [8, 45]),  # k before the first: for itself
            ("qkvk", [45, 8]),  # what was fetched is gone
            ("qqkv", [45, 45]),
        ):
            for name in names:
                assert torch.equal(getattr(model, name)(X), expected[name])
            assert called == calls, names
            called.clear()
            model.double().float()  # k is left behind by "kqv", and must not be seen by the next
        assert torch.equal(model.q(X), expected["q"])
        assert torch.equal(model.k(X.clone()), expected["k"])
        assert called == [45, 8], "equal is not the same"


def test_what_was_left_is_not_used_when_something_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = block(3), X.clone()
    with torch.no_grad():
        model.q(x)
        x.add_(1)
        assert torch.equal(model.v(x), apart(3, x)[2]), "the input was written to"
        model.q(x)
        model.load_state_dict(Block(4).state_dict())
        assert torch.equal(model.v(x), apart(4, x)[2]), "another weight"
        model.q(x)
        monkeypatch.setattr(torch_modules, "torch_stream", lambda _: 1)
        called.clear()
        model.v(x)
        assert called == [5], "another stream"
        called.clear()
        with torch.inference_mode():
            inside = x + 0
            model.q(inside)
            inside.zero_()
            assert torch.equal(model.v(inside), apart(4, inside)[2])
        assert called == [32, 5]


def test_replicas_for_several_gpus_compute_for_themselves() -> None:
    model = block(3)
    with torch.no_grad():
        model.q(X)  # leaves the others' outputs with them
        called.clear()
        for name, expected in zip(SIZES, apart(3, X), strict=True):
            layer = getattr(model, name)
            replica = layer._replicate_for_data_parallel()
            # As torch.nn.parallel.replicate: a parameter becomes an attribute.
            for key, value in layer._parameters.items():
                if value is None:
                    replica._parameters[key] = None
                else:
                    setattr(replica, key, value.detach())
            assert torch.equal(replica(X), expected)
        assert called == list(SIZES.values()), "the rest is on another GPU"


def test_layers_that_have_moved_are_not_laid_side_by_side_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    model = block(3)
    for name in ("is_available", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)
    with torch.no_grad():
        model.q(X)
        model.double().float()
        with pytest.raises(UnsupportedError, match="call them once before they are captured"):
            model.q(X)


def test_a_pickle_holds_no_activations() -> None:
    model = block(3)
    size = len(pickle.dumps(model.k))
    with torch.no_grad():
        model.q(torch.zeros(5000, 20))
    assert model.k.ahead is not None
    assert len(pickle.dumps(model.k)) == size


@pytest.mark.parametrize(
    ("merge", "message"),
    [
        (["qk"], "expected groups of two names or more, got 'qk'"),
        ([("q",)], r"expected groups of two names or more, got \('q',\)"),
        ([("q", "k"), ("k", "v")], "expected each name once, got q, k, k, v"),
        ([("q", "k", "w")], "no module has all of q, k, w to replace"),
        ([("q", "other")], "merge: q, other of the model: expected one in_features"),
    ],
)
def test_what_cannot_be_merged_is_said_before_anything_changes(merge: Any, message: str) -> None:
    model = Block(0)
    model.other = torch.nn.Linear(21, 4)
    with pytest.raises(OptionError, match=message):
        torch_ops.replace_linear(model, merge=merge, compute=compute)
    assert {type(child) for child in model.children()} == {torch.nn.Linear}
    with pytest.raises(OptionError, match="no module has all of q, k to replace"):
        torch_ops.replace_linear(model, merge=[("q", "k")], keep=("k",), compute=compute)


def test_a_block_with_two_parents_is_replaced_once() -> None:
    shared = Block(0)
    model = torch.nn.Sequential(torch.nn.Sequential(shared), torch.nn.Sequential(shared))
    assert torch_ops.replace_linear(model, merge=[("q", "v")], compute=compute) == 3
    with torch.no_grad():
        shared(X)
    assert called == [37, 8]


def test_a_llama_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=50, attention_bias=True,
    )  # fmt: skip

    def llama(seed: int, **options: Any) -> Any:
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config).eval()
        assert torch_ops.replace_linear(model, compute=compute, **options) == 14
        return model

    torch.manual_seed(0)
    checkpoint = transformers.LlamaForCausalLM(config).state_dict()
    groups = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]
    alone, together, loaded = llama(0), llama(0, merge=groups), llama(1, merge=groups)
    loaded.load_state_dict(checkpoint)
    tokens = torch.arange(12).reshape(2, 6)
    steps = {
        "max_new_tokens": 3,
        "do_sample": False,
        "attention_mask": torch.ones_like(tokens),
        "pad_token_id": 0,
    }
    with torch.no_grad():
        expected, called[:] = alone(tokens).logits, []
        for model in (together, loaded):
            assert torch.equal(model(tokens).logits, expected)
            assert called == [128, 64, 192, 64] * 2  # qkv, o, gate and up, down; of each of two blocks
            assert torch.equal(model.generate(tokens, **steps), alone.generate(tokens, **steps))
            called.clear()
    alone.load_state_dict(together.state_dict())
    assert set(alone.state_dict()) == set(together.state_dict())
