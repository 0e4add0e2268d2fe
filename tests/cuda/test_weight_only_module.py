"""Modules with a weight in NF4 or int8, on the host: their kernels, packing included, in the simulator."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest

import cuda_backend
from cuda_backend import torch_ops, torch_weight_only
from cuda_backend.weight_only import prepared
from refimpl import quant
from refimpl.errors import DTypeError, OptionError, UnsupportedError
from refimpl.quant.nf4 import LEVELS

torch: Any = pytest.importorskip("torch")

FORMS = ("int8", "nf4")
K, N = 256, 20


def on_host(stored: Any, give: Any) -> Any:
    """Return a stored weight with its arrays as tensors, or its tensors as arrays."""
    return type(stored)(*[give(part) if hasattr(part, "dtype") else part for part in stored])


@pytest.fixture(autouse=True)
def _simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch_weight_only, "FEW", {"int8": 16, "nf4": 16}
    )  # calls in the simulator take their time
    for name in ("prepare_int8_groups", "prepare_nf4"):

        def prepare(stored: Any, *, name: str = name, **options: Any) -> Any:
            real = getattr(prepared, name)
            return on_host(real(on_host(stored, lambda part: part.numpy()), **options), torch.from_numpy)

        monkeypatch.setattr(cuda_backend, name, prepare)


def decode(x: Any, weight: Any, *, bias: Any) -> Any:
    f = cuda_backend.int8_linear_decode if len(weight) == 4 else cuda_backend.nf4_linear_decode
    shift = None if bias is None else bias.detach().numpy()
    return torch.from_numpy(f(x.numpy(), on_host(weight, lambda part: part.numpy()), bias=shift))


def linear(seed: int = 0, *, bias: bool = True, size: tuple[int, int] = (K, N)) -> Any:
    torch.manual_seed(seed)
    return torch.nn.Linear(*size, bias=bias, dtype=torch.float16)


def module(form: Any, layer: Any) -> Any:
    return torch_ops.weight_only_linear(layer, weight=form, compute=decode)


def defined(form: str, weight: Any) -> Any:
    """Return the weight [N, K] that the definition stores, in float32, and what it stores."""
    given = weight.detach().float().numpy().T
    if form == "int8":
        stored: Any = quant.quantize_groups(given)
        return quant.dequantize_groups(stored).T, stored
    stored = quant.nf4_quantize(given)
    return quant.qlora_dequantize(stored), stored


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("values", ["normal", "zeros", "tiny", "midway"])
def test_it_stores_what_the_definition_stores(
    form: str, values: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_weight_only, "SLICE", 3 * 512)  # three rows at a time
    weight = torch.randn(10, 512, generator=torch.Generator().manual_seed(0))
    if values == "zeros":
        weight[::2] = 0
    elif values == "tiny":
        weight[::3, :70] *= 1e-39
    elif values == "midway":  # in blocks whose absmax is 127, and 1
        levels = torch.tensor(LEVELS.tolist())
        middle = (levels[:-1] + levels[1:]) / 2
        weight = torch.arange(-126.5, 127).repeat(21)[:5120] if form == "int8" else middle.repeat(342)[:5120]
        weight = weight.reshape(10, 512).clone()
        weight[:, ::64] = 127 if form == "int8" else 1
    _, expected = defined(form, weight)
    found = torch_weight_only.groups_of(weight) if form == "int8" else torch_weight_only.nf4_of(weight)
    for name, mine, wanted in zip(found._fields, found, expected, strict=True):
        assert np.array_equal(np.asarray(mine), np.asarray(wanted)), name
    weight[9, 511] = torch.inf
    with pytest.raises(OptionError, match="expected finite numbers"):
        torch_weight_only.groups_of(weight)


@pytest.mark.cudasim
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
def test_few_tokens_by_the_kernel_and_many_by_the_widened_weight(
    form: str, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = 256 if form == "int8" else 1024  # absmax for two scales
    layer = linear(bias=bias, size=(features, 20))
    found = module(form, layer)
    weight, _ = defined(form, layer.weight)
    wide = torch.from_numpy(np.ascontiguousarray(weight))
    assert torch.equal(found.weight_in(torch.float32), wide), "the packing, turned back"
    monkeypatch.setattr(torch_weight_only, "SLICE", 1)
    assert torch.equal(found.weight_in(torch.float32), wide), "a tile at a time"
    x = torch.randn(2, 9, features, generator=torch.Generator().manual_seed(1)).half()
    with torch.no_grad():
        many, few = found(x), found(x[:, :1])
        exact = x.float() @ wide.T + (0 if layer.bias is None else layer.bias.float())
    assert many.shape == (2, 9, 20)
    for out, wanted in ((many, exact), (few, exact[:, :1])):
        assert out.dtype == torch.float16
        # Levels of NF4, or widened weights, are rounded to float16, and so are outputs: 2**-11 each.
        torch.testing.assert_close(out.float(), wanted, rtol=2**-10, atol=2**-10)
    assert found(x[:0]).shape == (0, 9, 20)
    counted: list[int] = []

    def count(rows: Any, *_: Any, **__: Any) -> Any:
        counted.append(len(rows))
        return rows[:, :20]

    monkeypatch.setattr(found, "compute", count)
    monkeypatch.setattr(torch_weight_only, "FEW", {"int8": 128, "nf4": 128})
    for tokens in (1, 16, 40, 128, 129):
        given = x.new_tensor(range(tokens))[:, None].expand(-1, features)
        out = found(given.contiguous())
        assert out.shape == (tokens, 20)
        assert tokens > 128 or torch.equal(out, given[:, :20])
    assert counted == [1, 16, 16, 16, 8, *[16] * 8]
    with pytest.raises(UnsupportedError, match="WeightOnlyLinear: no gradient"):
        found(x.requires_grad_())


@pytest.mark.cudasim
@pytest.mark.parametrize("form", FORMS)
def test_state_copies_and_casts(form: str) -> None:
    source, other, x = linear(1), linear(2), torch.ones(17, K, dtype=torch.float16)
    first, expected = module(form, source), module(form, source)(x)
    assert set(first.state_dict()) == {*torch_weight_only.STORED[form], "bias"}
    assert repr(first) == f"WeightOnlyLinear(in_features={K}, out_features={N}, weight={form})"
    for state in (source.state_dict(), first.state_dict()):
        for assign in (False, True):
            target = module(form, other)
            assert not torch.equal(target(x), expected)
            target.load_state_dict(state, assign=assign)
            assert torch.equal(target(x), expected)
    with pytest.raises(RuntimeError, match=rf"size mismatch for weight: \[{N}, 512\], expected \[{N}, {K}\]"):
        first.load_state_dict({**source.state_dict(), "weight": torch.zeros(N, 512)})
    first.prepared()
    for copied in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert copied.settled is None
        assert torch.equal(copied(x), expected)
    before = [first.get_buffer(name).dtype for name in first.stored]
    assert torch.equal(first.float().half()(x), expected)
    assert [first.get_buffer(name).dtype for name in first.stored] == before


@pytest.mark.cudasim
@pytest.mark.parametrize("form", FORMS)
def test_what_was_written_is_in_memory_before_the_next_call(form: str) -> None:
    layer = module(form, linear(1))
    state = layer.state_dict()
    layer.prepared()
    for change in (
        lambda: layer.load_state_dict(state),
        lambda: layer.half(),
        lambda: layer.scale.mul_(2),
        lambda: setattr(layer, "codes", layer.codes.clone()),
        lambda: setattr(layer, "codes", layer.codes.clone()),
    ):
        settled = layer.settled
        layer.prepared()
        assert layer.settled is settled, "nothing to wait for"
        change()
        layer.prepared()
        assert layer.settled is not settled


@pytest.mark.cudasim
@pytest.mark.parametrize("form", FORMS)
def test_in_a_model(form: Any) -> None:
    model = torch.nn.Sequential(linear(1, size=(K, K)), torch.nn.ReLU(), linear(2))
    model.add_module("lm_head", linear(3, size=(N, 3)))
    x = torch.randn(18, K, generator=torch.Generator().manual_seed(1)).half()
    with torch.no_grad():
        exact = model(x)
        assert torch_ops.replace_linear(model, weight_only=form, compute=decode) == 2
        error = (model(x) - exact).float().norm() / exact.float().norm()
    assert 0 < error < (0.02 if form == "int8" else 0.2)
    assert type(model.lm_head) is torch.nn.Linear


def test_what_is_refused_is_refused_before_anything_changes() -> None:
    wrong: Any = (
        (
            linear(size=(128, 4)),
            "nf4",
            UnsupportedError,
            "1: in_features is 128; .* nf4 takes multiples of 256",
        ),
        (
            linear(size=(320, 4)),
            "int8",
            UnsupportedError,
            "1: in_features is 320; .* int8 takes multiples of 128",
        ),
        (linear(), "fp4", OptionError, "expected 'nf4' or 'int8', got 'fp4'"),
        (linear().to("meta"), "nf4", DTypeError, "1: expected a layer on the GPU, got one on meta"),
    )
    for layer, form, error, message in wrong:
        model = torch.nn.Sequential(linear(), layer)
        with pytest.raises(error, match=message):
            torch_ops.replace_linear(model, weight_only=form, compute=decode)
        assert type(model[0]) is torch.nn.Linear
    with pytest.raises(OptionError, match="expected none with weight_only"):
        torch_ops.replace_linear(torch.nn.Sequential(linear()), weight_only="nf4", merge=[("q", "k")])
    with pytest.raises(OptionError, match=r"expected a torch\.nn\.Linear, got ReLU"):
        torch_ops.weight_only_linear(torch.nn.ReLU())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [4, 40])
def test_other_formats_are_refused_for_few_and_for_many_tokens(form: str, tokens: int) -> None:
    layer = module(form, linear(bias=False))
    with torch.no_grad(), pytest.raises(UnsupportedError, match=r"bfloat16, got torch\.float32"):
        layer(torch.zeros(tokens, K))
