"""Which kernels run: what is named, what "auto" chooses, what is said where it cannot have the fast ones."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import numpy as np
import pytest

import cuda_backend
from cuda_backend.attention import decode, tiers
from cuda_backend.attention.tiers import by_tier
from refimpl.attention import mods
from refimpl.errors import LostGradientError, OptionError, SlowPathWarning, UnsupportedError

X, SUMS, STARTS = np.ones((1, 3, 2, 8), np.float16), np.zeros((1, 2, 3), np.float32), np.array([0, 3])
# Each function that has tiers, as it is called, the module of its Hopper kernels, and their name there.
CALLS: dict[str, tuple[Any, str, str]] = {
    "flash_attention": (
        lambda **how: cuda_backend.flash_attention(X, X, X, **how), "call_hopper", "flash_attention_hopper"
    ),
    "flash_attention_vjp": (
        lambda **how: cuda_backend.flash_attention_vjp(X, X, X, X, SUMS, X, **how).dq,
        "call_backward_hopper", "flash_attention_vjp_hopper",
    ),
    "flexible_attention": (
        lambda **how: cuda_backend.flexible_attention(X, X, X, mask_mod=mods.causal, **how),
        "call_flexible_hopper", "flexible_attention_hopper",
    ),
    "flexible_attention_vjp": (
        lambda **how: cuda_backend.flexible_attention_vjp(
            X, X, X, X, SUMS, X, mask_mod=mods.causal, **how
        ).dq,
        "call_flexible_backward_hopper", "flexible_attention_vjp_hopper",
    ),
    "varlen_attention": (
        lambda **how: cuda_backend.varlen_attention(X[0], X[0], X[0], STARTS, STARTS, **how),
        "call_flexible_hopper", "flexible_attention_hopper",
    ),
    "varlen_attention_vjp": (
        lambda **how: cuda_backend.varlen_attention_vjp(
            X[0], X[0], X[0], STARTS, STARTS, X[0], SUMS[0], X[0], **how
        ).dq,
        "call_flexible_backward_hopper", "flexible_attention_vjp_hopper",
    ),
}  # fmt: skip


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this be a Hopper GPU, as far as the choice goes."""
    monkeypatch.setattr(tiers, "is_hopper", lambda: True)
    tiers.warn_slow.cache_clear()


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("tier", ["auto", "hopper"])
def test_a_lost_gradient_is_no_matter_of_the_tier(tier: Any) -> None:
    """Other kernels would lose it, too: neither a warning that they run nor the advice to take them."""

    def lost() -> None:
        raise LostGradientError("a tensor requires a gradient")

    with pytest.raises(LostGradientError, match=r"^a tensor requires a gradient$"):
        by_tier(tier, X, lost, lambda: None)


@pytest.mark.parametrize("name", CALLS)
def test_a_tier_that_nobody_has_is_named_first(name: str) -> None:
    call, _, _ = CALLS[name]
    with pytest.raises(OptionError, match="tier: expected one of portable, hopper, auto, got 'banana'"):
        call(tier="banana", block_sizes=(-1, 0))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_operator_looks_at_its_tier_on_every_device(device: str) -> None:
    torch = pytest.importorskip("torch")
    from cuda_backend.torch_ops import attention

    x = torch.ones(1, 3, 2, 8, device=device)
    banana: dict[str, Any] = {"tier": "banana"}
    with pytest.raises(OptionError, match="tier: expected one of portable, hopper, auto, got 'banana'"):
        attention(x, x, x, **banana)


def test_operators_choose_and_functions_are_told() -> None:
    from cuda_backend import torch_ops

    for function, default in (
        (torch_ops.attention, "auto"), *((getattr(cuda_backend, name), "portable") for name in CALLS)
    ):  # fmt: skip
        assert inspect.signature(function).parameters["tier"].default == default


@pytest.mark.cudasim
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("name", CALLS)
def test_auto_is_hopper_where_that_takes_the_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the portable kernels run, with a warning; a tier that was named does not fall back."""
    call, module, kernels = CALLS[name]
    calls: list[Any] = []

    def refusing(*_: Any, **options: Any) -> Any:
        calls.append(options)
        raise UnsupportedError("it is too hot")

    plain = call()
    monkeypatch.setattr(f"cuda_backend.attention.{module}.{kernels}", refusing)
    assert np.array_equal(call(), plain), "the default is portable"
    assert np.array_equal(call(tier="portable"), plain)
    assert not calls
    with pytest.warns(SlowPathWarning, match="^it is too hot; the portable kernels run") as said:
        assert np.array_equal(call(tier="auto"), plain)
    assert "tier=" not in str(said[0].message), "callers of operators have none"
    assert np.array_equal(call(tier="auto"), plain)  # a warning is an error here
    with pytest.raises(UnsupportedError, match="it is too hot; tier='portable' is slower"):
        call(tier="hopper")
    assert len(calls) == 3

    answer = cuda_backend.flash_attention(X, X, X, return_lse=True)
    found = answer.out if not name.endswith("_vjp") else cuda_backend.flash_attention_vjp(X, X, X, X, SUMS, X)
    monkeypatch.setattr(f"cuda_backend.attention.{module}.{kernels}", lambda *_, **__: found)
    wanted = found.dq if name.endswith("_vjp") else found
    assert np.array_equal(call(tier="auto"), wanted[0] if name.startswith("varlen") else wanted)


@pytest.mark.cudasim
@pytest.mark.usefixtures("hopper")
def test_decoding_falls_back_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(*_: Any) -> Any:
        raise UnsupportedError("rows begin anywhere")

    plain = cuda_backend.split_kv_attention(X, X, X, tier="portable")
    monkeypatch.setattr(decode, "attend", refusing)
    monkeypatch.setattr(decode, "_is_for_tensor_cores", lambda *_: True)
    with pytest.warns(SlowPathWarning, match="^rows begin anywhere; the portable"):
        assert np.array_equal(cuda_backend.split_kv_attention(X, X, X), plain)
    with pytest.raises(UnsupportedError, match="rows begin anywhere; tier='portable'"):
        cuda_backend.split_kv_attention(X, X, X, tier="ampere")


@pytest.mark.usefixtures("hopper")
def test_float32_has_no_other_kernels() -> None:
    """So nothing is said of it."""
    run = functools.partial(by_tier, "auto", hopper=lambda: "fast", portable=lambda: "anywhere")
    assert run(X.astype(np.float32)) == "anywhere"
    assert run(X) == "fast"
