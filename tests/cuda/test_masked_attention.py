"""What transformers asks of an attention, as options; their way through the kernels; gradients, dropout."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import cuda_backend
from cuda_backend.attention import attend as attending
from cuda_backend.transformers_attention import frugal_attention, options_of
from refimpl.attention import (
    flexible_attention,
    scaled_dot_product_attention,
    scaled_dot_product_attention_vjp,
)
from refimpl.errors import DTypeError, OptionError, ShapeError, UnsupportedError

torch = pytest.importorskip("torch")

from cuda_backend.torch_ops import attention, masked_attention, varlen_attention  # noqa: E402

CLOSE = 2e-5  # float32, scores of size 1


def draws(*shape: int) -> Any:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


LAYER = SimpleNamespace(is_causal=True)


def test_dropout_is_drawn_from_pytorchs_generator() -> None:
    """The same seed drops the same; what is dropped is what the reference drops, and has its gradient."""
    q, k, v = (draws(1, 2, 5, 3).requires_grad_() for _ in range(3))

    def call(seed: int) -> Any:
        torch.manual_seed(seed)
        return frugal_attention(LAYER, q, k, v, dropout=0.4)[0]

    assert torch.equal(call(1), call(1))
    assert not torch.equal(call(1), call(2))
    torch.manual_seed(1)
    seed = int(torch.randint(0, 2**63 - 1, ()))
    arrays = [x.detach().transpose(1, 2).numpy() for x in (q, k, v)]
    expected = scaled_dot_product_attention(*arrays, causal=True, dropout_p=0.4, rng=seed)
    assert np.abs(call(1).detach().numpy() - expected).max() < 1e-12
    assert torch.autograd.gradcheck(_seeded, (q, k, v))


def _seeded(q: Any, k: Any, v: Any) -> Any:
    torch.manual_seed(1)
    return frugal_attention(LAYER, q, k, v, dropout=0.4)[0]


def test_a_bias_has_a_gradient_and_joins_masks() -> None:
    q, k, v, bias = (
        draws(*s).requires_grad_() for s in ((1, 2, 4, 3), (1, 1, 5, 3), (1, 1, 5, 2), (1, 2, 4, 5))
    )
    mask = torch.ones(1, 1, 4, 5, dtype=torch.bool).tril(1)
    for given in (None, mask, torch.zeros(1, 1, 4, 5, dtype=torch.float64).masked_fill(~mask, -1e9)):
        layer = SimpleNamespace(is_causal=False)

        def call(q: Any, k: Any, v: Any, bias: Any, given: Any = given, layer: Any = layer) -> Any:
            return frugal_attention(layer, q, k, v, given, position_bias=bias)[0]

        assert torch.autograd.gradcheck(call, (q, k, v, bias))
        whole = bias if given is None else torch.where(mask, bias, -1e9)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, whole, enable_gqa=True)
        assert (call(q, k, v, bias).transpose(1, 2) - expected).abs().max() < 1e-12


def test_options_as_functions_say_the_same() -> None:
    """On the host by the reference, and in the simulator by the kernels that the GPU runs."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, n, h, 4)) for n, h in ((6, 4), (6, 2), (6, 2)))
    for shape in ((1, 1), (2, 1), (1, 4), (2, 4)):
        mask = rng.random((*shape, 6, 6)) < 0.6
        for options in (
            {"attn_mask": mask}, {"attn_mask": mask, "softcap": 0.7, "scale": 0.3},
            {"attn_mask": mask, "causal": "top_left"},
        ):  # fmt: skip
            functions = attending.as_functions(options)
            assert functions is not None
            expected = scaled_dot_product_attention(q, k, v, **options)
            assert np.abs(flexible_attention(q, k, v, **functions) - expected).max() < 1e-12
    functions = attending.as_functions({"causal": "top_left", "softcap": 0.7})
    assert functions is not None
    single = [x.astype(np.float32) for x in (q, k, v)]
    found = cuda_backend.flexible_attention(*single, **functions)
    assert np.abs(found - scaled_dot_product_attention(q, k, v, causal=True, softcap=0.7)).max() < CLOSE
    for refused in ({"bias": 1}, {"attn_mask": mask, "causal": "bottom_right"}, {"causal": "top_left"}):
        assert attending.as_functions(refused) is None


@pytest.mark.cudasim
@pytest.mark.parametrize(
    ("wanted", "ran"),
    [
        ({"causal": "top_left"}, "flash_attention"),
        ({"causal": "top_left", "softcap": 0.7}, "flexible_attention"),
        ({"attn_mask": True}, "flexible_attention"),
        ({"causal": "top_left", "window": 3, "softcap": 0.7}, "flexible_attention"),
        ({"causal": "top_left", "window": 3, "dropout_p": 0.3, "rng": 5}, "flash_attention"),
        ({"attn_mask": True, "dropout_p": 0.3, "rng": 5}, "flash_attention"),
        ({"attn_mask": True, "causal": "top_left"}, "flexible_attention"),
        ({"attn_mask": True, "causal": "top_left", "window": 3}, "flexible_attention"),
        (
            {"attn_mask": True, "causal": "top_left", "window": 3, "dropout_p": 0.3, "rng": 5},
            "flash_attention",
        ),
        ({"bias": True, "causal": "top_left"}, "flash_attention"),
    ],
)
def test_the_way_through_the_kernels(
    wanted: dict[str, Any], ran: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What happens to tensors of the GPU, with tensors of the host that the simulator takes as arrays."""
    calls: list[str] = []

    def simulated(name: str) -> Any:
        function = getattr(cuda_backend, name)

        def called(*tensors: Any, **options: Any) -> Any:
            calls.append(name)
            options = {key: x.numpy() if hasattr(x, "numpy") else x for key, x in options.items()}
            if "aux" in options:
                options["aux"] = tuple(x.numpy() for x in options["aux"])
            found = function(*(x.contiguous().numpy() for x in tensors), **options)
            return type(found)(*(None if x is None else torch.from_numpy(x) for x in found))

        return called

    for name in ("flash_attention", "flash_attention_vjp", "flexible_attention", "flexible_attention_vjp"):
        monkeypatch.setattr(cuda_backend, name, simulated(name), raising=False)
    q, k, v, do = (draws(1, 6, heads, 3).float() for heads in (2, 1, 1, 2))
    options = dict(wanted)
    if "attn_mask" in options:
        options["attn_mask"] = draws(1, 2, 6, 6) < 0.5
    if "bias" in options:
        options["bias"] = draws(1, 2, 6, 6).float()
    out, lse = attending.forward(q, k, v, options)
    found = attending.gradients((q, k, v, out, lse, do), options)
    arrays: Any = tuple(x.double().numpy() for x in (q, k, v, do))
    exact = {key: x.numpy() if hasattr(x, "numpy") else x for key, x in options.items()}
    if exact.pop("window", None):
        exact = {key: x for key, x in exact.items() if key != "causal"}
        i, j = np.ogrid[:6, :6]
        exact["attn_mask"] = (j <= i) & (j > i - 3) & exact.get("attn_mask", True)
    assert np.abs(out.numpy() - scaled_dot_product_attention(*arrays[:3], **exact)).max() < CLOSE
    truth = scaled_dot_product_attention_vjp(*arrays, **exact)
    for ours, expected in zip(found, truth, strict=True):
        assert (ours is None) == (expected is None)
        assert expected is None or np.abs(ours.numpy() - expected).max() < CLOSE
    assert calls == [ran, f"{ran}_vjp"]


def test_the_operator_is_sound() -> None:
    """Schema, shapes without data, autograd's registration, and all of it traced."""
    from cuda_backend.attention.autograd_masked import register as operator

    q, k, v, bias = (
        draws(*s).requires_grad_() for s in ((1, 4, 2, 3), (1, 5, 1, 3), (1, 5, 1, 2), (1, 1, 4, 5))
    )
    mask = torch.ones(1, 2, 4, 5, dtype=torch.bool).tril(1)
    for given in ((mask, None), (None, bias)):
        torch.library.opcheck(operator(torch), (q, k, v, *given, None, "", None, 0.7, 0.3, 0.0))
    options = "top_left", 2, None, None, 0.5
    torch.library.opcheck(operator(torch), (q, k, v, None, None, torch.tensor(3), *options))


def test_a_window_and_a_mask_are_both_asked() -> None:
    """Output and gradient are those of PyTorch with the mask that both make, whatever axes the mask has."""
    q, k, v = (draws(2, n, h, 3).requires_grad_() for n, h in ((6, 4), (7, 2), (7, 2)))
    i, j = torch.arange(6)[:, None], torch.arange(7)[None]
    whole = torch.rand(2, 4, 6, 7, generator=torch.Generator().manual_seed(0)) < 0.7
    whole[..., 0, 0] = True
    for mask in (whole, whole[:1], whole[:, :1], whole[0, 0], whole[:, :1, :1], whole[0, 0, 0], None):
        for window in (1, 3, 9):
            found = masked_attention(q, k, v, attn_mask=mask, causal="top_left", window=window)
            seen = (j <= i) & (i - j < window) & (True if mask is None else mask)
            turned = [x.detach().clone().transpose(1, 2).requires_grad_() for x in (q, k, v)]
            wanted = torch.nn.functional.scaled_dot_product_attention(
                *turned, attn_mask=seen.expand(2, 4, 6, 7), enable_gqa=True
            ).nan_to_num()
            wanted = wanted * seen.expand(2, 4, 6, 7).any(-1, keepdim=True)
            assert (found.transpose(1, 2) - wanted).abs().max() < 1e-12
    assert torch.autograd.gradcheck(
        lambda *x: masked_attention(*x, attn_mask=whole, causal="top_left", window=3), (q, k, v)
    )


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"window": 3}, OptionError, "window: expected causal='top_left'"),
        ({"window": 3, "causal": "bottom_right"}, OptionError, "window: expected causal='top_left'"),
        ({"window": 0, "causal": True}, OptionError, "window: expected at least 1, got 0"),
        ({"window": -2, "causal": "top_left"}, OptionError, "window: expected at least 1, got -2"),
        ({"attn_mask": torch.ones(6, 6)}, DTypeError, "attn_mask: expected bool"),
        (
            {"attn_mask": torch.ones(6, 5).bool()},
            ShapeError,
            r"attn_mask: expected .* \(1, 2, 6, 6\), got \(6, 5\)",
        ),
        ({"causal": "middle"}, OptionError, "causal: expected False"),
    ],
)
def test_options_that_say_nothing(options: dict[str, Any], error: Any, said: str) -> None:
    """On every device: what the reference does not see is looked at before a device is chosen."""
    q = draws(1, 6, 2, 4)
    with pytest.raises(error, match=said):
        masked_attention(q, q, q, **options)
    if "middle" not in options.values():
        aligned = {"causal": "top_left"} if options.get("causal") is True else {}
        with pytest.raises(error, match=said):
            attending.checked(q, q, options | aligned)


@pytest.mark.parametrize("causal", [True, False, None])
def test_causality_is_the_references(causal: Any) -> None:
    q = draws(1, 5, 2, 4)
    wanted = scaled_dot_product_attention(*[q.numpy()] * 3, causal=bool(causal))
    for f in (attention, masked_attention):
        assert np.abs(f(q, q, q, causal=causal).numpy() - wanted).max() < 1e-12
        if causal:
            with pytest.raises(OptionError, match=r"causal: True is ambiguous for Tq=3, Tk=5"):
                f(q[:, :3], q, q, causal=causal)


def test_formats_that_no_kernel_has() -> None:
    q, starts = draws(1, 4, 2, 4), torch.tensor([0, 4])

    def packed(*x: Any) -> Any:
        q, k, v = (y[0] for y in x)
        return varlen_attention(q, k, v, starts, starts)

    def in_a_model(*x: Any) -> Any:
        return frugal_attention(LAYER, *x)

    for f in (attention, masked_attention, packed, in_a_model):
        with pytest.raises(DTypeError, match="q: expected float64, float32, float16, bfloat16, got int64"):
            f(*[q.long()] * 3)
        with pytest.raises(DTypeError, match="expected one dtype, got q float64, k float32, v float16"):
            f(q, q.float(), q.half())


def test_masks_of_transformers_as_options() -> None:
    q, k, mask = draws(2, 2, 3, 4), draws(2, 2, 5, 4), torch.ones(1, 1, 1, 8, dtype=torch.bool)
    assert options_of(q, k, mask, None, True)["attn_mask"].shape == (1, 1, 3, 5)
    assert options_of(q, k, None, None, True) == {"causal": "top_left"}
    assert options_of(q[:, :, :1], k, None, None, True) == options_of(q, k, None, None, False) == {}
    with pytest.raises(DTypeError, match=r"attention_mask: expected bool or floating .* torch\.int64"):
        options_of(q, k, torch.ones(1, 1, 3, 5, dtype=torch.long), None, True)
    with pytest.raises(ShapeError, match=r"attention_mask: expected shape \(B or 1, Hq or 1, 3, 5\)"):
        options_of(q, k, torch.ones(2, 5, dtype=torch.bool), None, True)


def test_what_is_refused() -> None:
    x = draws(1, 1, 2, 2)
    with pytest.raises(UnsupportedError, match="no s_aux"):
        frugal_attention(LAYER, x, x, x, s_aux=torch.zeros(1))


def test_a_window_without_causality_is_refused_where_it_hides_a_key() -> None:
    q = draws(1, 2, 5, 4)
    with pytest.raises(UnsupportedError, match="sliding_window=3 of 5 keys, not causal"):
        frugal_attention(LAYER, q, q, q, is_causal=False, sliding_window=3)
    wide = frugal_attention(LAYER, q, q, q, is_causal=False, sliding_window=9)[0]
    assert torch.equal(wide, frugal_attention(LAYER, q, q, q, is_causal=False)[0])
