"""The Mamba block beside transformers' model, in steps, in low precision, and its errors and prices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from memsim.prices.ssm import block
from memsim.ssm import mamba_parameters, mamba_traffic
from refimpl.errors import OptionError, ShapeError
from refimpl.memory import Memory
from refimpl.registry import Case
from refimpl.ssm import mamba_block, mamba_block_chunked, mamba_block_step, mamba_block_vjp
from refimpl.ssm.block_samples import sample_block
from refimpl.transformer import rms_norm

SHAPE: dict[str, Any] = {"B": 2, "T": 6, "M": 3, "Din": 4, "N": 3, "R": 2, "k": 4}


def case(seed: int = 0, **changes: Any) -> Case:
    shape = {**SHAPE, "discretization": "euler", "extra": "states", **changes}
    return sample_block(np.random.default_rng(seed), **shape)


def test_steps_are_the_whole_and_leave_their_states_alone() -> None:
    call = case()
    whole = call.replace(return_state=True).call(mamba_block)
    weights = dict(call.kwargs)
    states = weights.pop("conv_state"), weights.pop("scan_state")
    for t in range(SHAPE["T"]):
        before = [state.copy() for state in states]
        out, *after = mamba_block_step(call.args[0][:, t], *states, **weights)
        for state, copy in zip(states, before, strict=True):
            np.testing.assert_array_equal(state, copy)
        np.testing.assert_allclose(out, whole.out[:, t], rtol=1e-12, atol=1e-13)
        states = tuple(after)
    for mine, theirs in zip(states, whole[1:], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-13)


def _published(weights: Any, prefix: str) -> dict[str, Any]:
    """Return a layer of transformers' Mamba as arguments of `mamba_block`."""
    get = lambda name: weights[f"{prefix}.{name}"].numpy()  # noqa: E731
    linear = {name: get(f"{name[2:]}_proj.weight").T for name in ("w_in", "w_x", "w_dt", "w_out")}
    return linear | {
        "w_conv": get("conv1d.weight")[:, 0], "b_conv": get("conv1d.bias"), "b_dt": get("dt_proj.bias"),
        "A_log": get("A_log"), "D": get("D"),
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # transformers says that it has no fast path here
def test_a_model_of_transformers() -> None:
    """MambaModel (transformers 5.24), two layers with their norms and residuals, in float32."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=40, hidden_size=24, state_size=8, num_hidden_layers=2, conv_kernel=4, pad_token_id=0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.MambaModel(config).eval()
    tokens = torch.randint(0, 40, (2, 13))
    with torch.no_grad():
        expected = model(tokens).last_hidden_state.numpy()
    weights = model.state_dict()
    x = weights["embeddings.weight"].numpy()[tokens.numpy()]
    eps = config.layer_norm_epsilon
    for layer in range(2):
        normed = rms_norm(x, weights[f"layers.{layer}.norm.weight"].numpy(), eps=eps)
        x = x + mamba_block(normed, **_published(weights, f"layers.{layer}.mixer"))
    found = rms_norm(x, weights["norm_f.weight"].numpy(), eps=eps)
    # Two float32 computations of values near 1, of some hundred roundings each.
    np.testing.assert_allclose(found, expected, rtol=0, atol=100 * np.finfo(np.float32).eps)


@pytest.mark.filterwarnings("ignore")
def test_parameters_are_those_of_transformers() -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.MambaConfig(vocab_size=50280, hidden_size=768, num_hidden_layers=24)
    with torch.device("meta"):
        model = transformers.MambaModel(config)
    counted = sum(parameter.numel() for parameter in model.parameters())
    ours = 24 * (mamba_parameters(M=768).total + 768) + 768 + 50280 * 768
    assert ours == counted == 129_135_360  # what state-spaces/mamba-130m has


@pytest.mark.parametrize("extra", ["released", "biases", "states", "bare"])
@pytest.mark.parametrize("form", [mamba_block, mamba_block_chunked])
def test_traffic_with_states_returned(form: Any, extra: str) -> None:
    call = case(extra=extra).replace(return_state=True)
    for dtype in (np.float64, np.float32, np.float16):
        narrow = call.map_arrays(lambda array, to=dtype: array.astype(to))
        counted = Memory()
        narrow.replace(memory=counted).call(form)
        assert counted.totals() == block(narrow)


def test_the_estimate_of_traffic_is_the_count() -> None:
    call, counted = case(extra="released", B=1).map_arrays(lambda array: array.astype(np.float16)), Memory()
    call.replace(memory=counted).call(mamba_block)
    sizes = {"T": 6, "M": 3, "D": 4, "N": 3, "R": 2, "k": 4}
    assert mamba_traffic(**sizes).total == counted.bytes_read + counted.bytes_written


def test_low_precision_is_rounded_once() -> None:
    call = case(extra="released", T=30).map_arrays(lambda array: array.astype(np.float16))
    wide = call.map_arrays(lambda array: array.astype(np.float32))
    found = call.call(mamba_block)
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, wide.call(mamba_block).astype(np.float16))
    gradients = mamba_block_vjp(*call.args, np.ones_like(found), **call.kwargs)
    assert {g.dtype for g in gradients if g is not None} == {np.dtype(np.float16)}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"D": None}, OptionError, "weights: missing D, without a place none"),
        ({"w_up": np.zeros((3, 4))}, OptionError, "without a place w_up"),
        ({"w_in": np.zeros((3, 7))}, ShapeError, r"w_in: expected shape \(3, 8\), got \(3, 7\)"),
        ({"w_x": np.zeros((4, 7))}, ShapeError, r"w_x: expected shape \(4, 8\), got \(4, 7\)"),
        ({"conv_state": np.zeros((2, 4, 4))}, ShapeError, r"conv_state: expected shape \(2, 3, 4\)"),
        ({"w_conv": np.zeros((4, 0)), "conv_state": None}, ShapeError, "w_conv: expected at least one tap"),
        ({"discretization": "bilinear"}, OptionError, "discretization: expected one of"),
    ],
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        case().replace(**changes).call(mamba_block)
