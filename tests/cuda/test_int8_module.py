"""The module in the place of `torch.nn.Linear`, on the host, with the reference in the place of kernels."""

from __future__ import annotations

import weakref
from typing import Any

import pytest

import cuda_backend
from cuda_backend import torch_layers, torch_modules, torch_ops
from refimpl.errors import BackendUnavailableError, DTypeError, OptionError, ShapeError, UnsupportedError
from tests.cuda.int8_on_host import compute, prepare_weight

torch: Any = pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def _reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_backend, "prepare_weight", prepare_weight)


def model() -> Any:
    torch.manual_seed(0)
    inner = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3, bias=False))
    whole = torch.nn.Sequential(inner, torch.nn.Sequential())
    whole.add_module("lm_head", torch.nn.Linear(3, 5))
    return whole


def test_layers_are_replaced_but_for_those_that_are_kept() -> None:
    x, linear = torch.randn(2, 7, 20), model()
    with torch.no_grad():
        exact = linear(x)
        assert torch_ops.replace_linear(linear, compute=compute) == 2
        found = linear(x)
    assert type(linear.lm_head) is torch.nn.Linear
    assert linear[0][0].training
    assert not torch_ops.int8_linear(torch.nn.Linear(4, 4).eval(), compute=compute).training
    assert found.shape == exact.shape
    assert 0 < (found - exact).norm() < 0.02 * exact.norm()
    assert repr(linear[0][0]) == "Int8Linear(in_features=20, out_features=32, threshold=6.0)"
    assert set(linear.state_dict()) == {
        "0.0.codes", "0.0.absmax", "0.0.bias", "0.2.codes", "0.2.absmax", "lm_head.weight", "lm_head.bias",
    }  # fmt: skip
    assert linear[0][0].codes.shape == (32, 32)


def test_it_loads_what_a_linear_layer_saved_and_what_it_saved_itself() -> None:
    x, source, target = torch.randn(4, 20), model(), model()
    state = source.state_dict()
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.add_(1.0)
        for each in (source, target):
            torch_ops.replace_linear(each, compute=compute)
        expected = source(x)
        assert not torch.equal(target(x), expected)
        target.load_state_dict(state)
        assert torch.equal(target(x), expected)
        again = model()
        torch_ops.replace_linear(again, compute=compute)
        again.load_state_dict(target.state_dict())
        assert torch.equal(again(x), expected)
    assert "0.0.weight" in state, "the caller's state is not touched"


def test_on_the_meta_device_it_loads_one_file_after_another() -> None:
    x, source = torch.randn(4, 20), model()
    state = source.state_dict()
    names = list(state)
    with torch.device("meta"):
        target = model()
    assert torch_ops.replace_linear(target, compute=compute) == 2
    for part in (names[:1], names[1:]):
        found = target.load_state_dict({name: state[name] for name in part}, strict=False, assign=True)
        assert not found.unexpected_keys
    torch_ops.replace_linear(source, compute=compute)
    with torch.no_grad():
        assert torch.equal(target(x), source(x))


def test_outliers_are_set_aside() -> None:
    x = torch.randn(4, 20)
    x[:, 3] = 50.0
    with torch.no_grad():
        layer = torch.nn.Linear(20, 6)
        near = torch_ops.int8_linear(layer, compute=compute)(x)
        far = torch_ops.int8_linear(layer, compute=compute, threshold=None)(x)
        exact = layer(x)
    # The outliers meet int8 weights, whose error remains.
    assert (near - exact).norm() < 0.5 * (far - exact).norm()


def test_an_input_with_any_strides() -> None:
    layer = torch.nn.Linear(20, 6)
    given: list[int] = []

    def strided(x: Any, *rest: Any, **options: Any) -> Any:
        given.append(x.stride(1))
        return compute(x, *rest, **options)

    module = torch_ops.int8_linear(layer, compute=strided)
    with torch.no_grad():
        for x in (
            torch.randn(1, 20, 7).transpose(1, 2),
            torch.randn(20),
            torch.randn(0, 20),
            torch.randn(9, 40)[:, ::2],
        ):
            assert torch.equal(module(x), module(x.contiguous()))
            assert module(x).shape == layer(x).shape
    assert set(given) == {1}


def test_no_gradient_is_given() -> None:
    layer = torch_ops.int8_linear(torch.nn.Linear(4, 4), compute=compute)
    with pytest.raises(UnsupportedError, match="no gradient"):
        layer(torch.ones(1, 4, requires_grad=True))
    assert not layer(torch.ones(1, 4)).requires_grad


def test_merged_layers_give_what_each_gives_alone() -> None:
    torch.manual_seed(1)
    x = torch.randn(2, 7, 20)
    x[:, :, 3] = 50.0
    layers = [torch.nn.Linear(20, size, bias=size != 8) for size in (32, 8, 5)]
    k = layers[1]
    with torch.no_grad():
        merged = torch_ops.merged_int8_linear(layers, compute=compute)
        found = merged(x)
        expected = [torch_ops.int8_linear(layer, compute=compute)(x) for layer in layers]
        assert isinstance(found, tuple)
        assert [each.shape for each in found] == [(2, 7, 32), (2, 7, 8), (2, 7, 5)]
        for one, alone in zip(found, expected, strict=True):
            assert torch.equal(one, alone)
        fresh = [torch.nn.Linear(20, size, bias=size != 8) for size in (32, 8, 5)]
        other = torch_ops.merged_int8_linear(fresh, compute=compute)
        other.load_state_dict(merged.state_dict())
        assert all(map(torch.equal, other(x), found))
        (single,) = torch_ops.merged_int8_linear([k], compute=compute)(x)
        assert torch.equal(single, expected[1])
        # Products that underflow: a layer without a bias keeps its -0.0 beside one that has a bias.
        k.weight.fill_(1e-20)
        _, zeros, _ = torch_ops.merged_int8_linear(layers, compute=compute)(torch.full((1, 20), -1e-30))
        assert zeros.eq(0).all()
        assert zeros.signbit().all()


def test_layers_that_do_not_merge_are_refused() -> None:
    with pytest.raises(OptionError, match="got no layers"):
        torch_ops.merged_int8_linear([], compute=compute)
    with pytest.raises(OptionError, match="expected one in_features"):
        torch_ops.merged_int8_linear([torch.nn.Linear(4, 4), torch.nn.Linear(5, 4)], compute=compute)
    half = torch.nn.Linear(4, 4, dtype=torch.float16)
    with pytest.raises(OptionError, match=r"torch\.float16"):
        torch_ops.merged_int8_linear([torch.nn.Linear(4, 4), half], compute=compute)
    with pytest.raises(OptionError, match="got one Linear"):
        torch_ops.merged_int8_linear(half, compute=compute)
    done = torch_ops.int8_linear(torch.nn.Linear(4, 4), compute=compute)
    with pytest.raises(OptionError, match=r"layers\[1\]: expected a torch.nn.Linear, got Int8Linear"):
        torch_ops.merged_int8_linear([torch.nn.Linear(4, 4), done], compute=compute)


def test_casts_leave_codes_and_scales() -> None:
    x, layer = torch.randn(3, 20), torch_ops.int8_linear(torch.nn.Linear(20, 6, bias=False), compute=compute)
    with torch.no_grad():
        expected = layer(x)
        for cast in (layer.half, layer.bfloat16, lambda: layer.to(torch.float16), layer.double):
            assert cast() is layer
            assert layer.codes.dtype == torch.int8
            assert layer.absmax.dtype == torch.float32
            assert torch.equal(layer(x), expected)


def test_what_is_kept_is_there() -> None:
    for keep, message in (
        (("lmhead",), "no child named lmhead"),
        (("0.1.0", "lm_head"), r"no child named 0\.1\.0"),
        ("lm_head", "one string"),
    ):
        linear = model()
        with pytest.raises(OptionError, match=message):
            torch_ops.replace_linear(linear, keep=keep, compute=compute)
        assert type(linear[0][0]) is torch.nn.Linear
    linear = model()
    assert torch_ops.replace_linear(linear, keep=("0.2", "lm_head"), compute=compute) == 1
    assert type(linear[0][2]) is torch.nn.Linear
    del linear.lm_head
    assert torch_ops.replace_linear(linear, compute=compute) == 1, "there need be no head"
    with pytest.raises(OptionError, match="linear layer itself"):
        torch_ops.replace_linear(torch.nn.Linear(4, 4))


def test_mistakes_are_said_before_anything_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match=r"expected a torch\.nn\.Linear, got Conv1d"):
        torch_ops.int8_linear(torch.nn.Conv1d(4, 4, 1))
    with pytest.raises(ShapeError, match=r"expected \[..., 4\], got \[2, 5\]"):
        torch_ops.int8_linear(torch.nn.Linear(4, 4), compute=compute)(torch.ones(2, 5))

    def no_device() -> int:
        raise BackendUnavailableError("no GPU")

    linear = model()
    monkeypatch.setattr(torch_modules, "current_device", no_device)
    with pytest.raises(OptionError, match="no module has all of q_prj, k_proj"):
        torch_ops.replace_linear(linear, merge=[("q_prj", "k_proj")])
    with pytest.raises(BackendUnavailableError, match="no GPU"):
        torch_ops.replace_linear(linear)
    monkeypatch.setattr(torch_modules, "current_device", lambda: 0)
    with pytest.raises(DTypeError, match=r"0\.0: expected a layer on the GPU, got one on cpu"):
        torch_ops.replace_linear(linear)
    assert type(linear[0][0]) is torch.nn.Linear


def test_each_layer_goes_when_it_has_been_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that fills half of the memory has to find room for its codes."""
    linear = model()
    originals = [weakref.ref(layer) for layer in (linear[0][0], linear[0][2])]
    alive: list[list[bool]] = []
    real = torch_layers.int8_linear

    def watched(layer: Any, **options: Any) -> Any:
        alive.append([each() is not None for each in originals])
        return real(layer, **options)

    monkeypatch.setattr(torch_layers, "int8_linear", watched)
    assert torch_ops.replace_linear(linear, compute=compute) == 2
    assert alive == [[True, True], [False, True]]
