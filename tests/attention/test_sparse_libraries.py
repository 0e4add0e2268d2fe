"""Longformer's and BigBird's layers of the package transformers, with random weights, as judges."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refimpl.attention import (
    bigbird_attention,
    bigbird_attention_blocked,
    bigbird_plan,
    global_tokens_attention,
    longformer_attention,
    longformer_attention_blocked,
    sliding_window_attention,
    window_radius,
)

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
longformer = pytest.importorskip("transformers.models.longformer.modeling_longformer")
big_bird = pytest.importorskip("transformers.models.big_bird.modeling_big_bird")

B, T, H, D = 2, 24, 2, 3
# Longformer's layer takes its softmax in float32, whatever it is given: seven digits are left.
FLOAT32 = {"rtol": 2e-6, "atol": 2e-6}


def _randomized(layer: Any) -> Any:
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for parameter in layer.double().eval().parameters():
            parameter.copy_(torch.from_numpy(rng.standard_normal(parameter.shape)))
    return layer


def _projected(x: Any, layer: Any, *names: str) -> list[Any]:
    """Return projections of x [B, T, H D] with the layer's weights, shape (B, T, H, D)."""
    weights = {name: value.detach().numpy() for name, value in layer.named_parameters()}
    found = (x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"] for name in names)
    return [y.reshape(*x.shape[:2], H, -1) for y in found]


def _longformer(is_global: Any, padded: Any, *, tied: bool) -> tuple[Any, list[Any], list[Any]]:
    """Return the layer's output, and the two sets of projections."""
    from transformers import LongformerConfig

    config = LongformerConfig(
        hidden_size=H * D, num_attention_heads=H, attention_window=[8], num_hidden_layers=1,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    layer = _randomized(longformer.LongformerSelfAttention(config, layer_id=0))
    if tied:
        for name in ("query", "key", "value"):
            getattr(layer, f"{name}_global").load_state_dict(getattr(layer, name).state_dict())
    x = np.random.default_rng(1).standard_normal((B, T, H * D))
    mask = torch.from_numpy(np.where(padded, -10000.0, np.where(is_global, 10000.0, 0.0)))
    with torch.no_grad():
        (out,) = layer(
            torch.from_numpy(x.copy()), attention_mask=mask, is_index_masked=mask < 0,
            is_index_global_attn=mask > 0, is_global_attn=bool(is_global.any()),
        )  # fmt: skip
    local = _projected(x, layer, "query", "key", "value")
    everywhere = _projected(x, layer, "query_global", "key_global", "value_global")
    return out.numpy().reshape(B, T, H, D), local, everywhere


RADIUS = window_radius(8, convention="longformer_paper")
NONE = np.zeros((B, T), dtype=bool)
HUBS = np.array([[i in (0, 5, 6) for i in range(T)], [i in (0, 13) for i in range(T)]])


def test_longformer_without_global_tokens() -> None:
    out, local, _ = _longformer(NONE, NONE, tied=False)
    np.testing.assert_allclose(sliding_window_attention(*local, radius=RADIUS), out, **FLOAT32)


def test_longformer_with_tied_projections() -> None:
    out, local, _ = _longformer(HUBS, NONE, tied=True)
    mine = global_tokens_attention(*local, radius=RADIUS, is_global=HUBS)
    np.testing.assert_allclose(mine, out, **FLOAT32)


@pytest.mark.parametrize("f", [longformer_attention, longformer_attention_blocked])
def test_longformer_with_projections_of_its_own_and_padding(f: Any) -> None:
    lengths = np.array([T, 19])
    padded = np.arange(T) >= lengths[:, None]
    out, local, everywhere = _longformer(HUBS, padded, tied=False)
    mine = f(*local, *everywhere, radius=RADIUS, is_global=HUBS, q_lengths=lengths, k_lengths=lengths)
    np.testing.assert_allclose(mine, out, **FLOAT32)
    tied = global_tokens_attention(
        *local, radius=RADIUS, is_global=HUBS, q_lengths=lengths, k_lengths=lengths
    )
    assert np.abs(tied - out).max() > 0.1  # the second set matters


def _bigbird(blocks: int, size: int, r: int, plan: Any, lengths: Any) -> tuple[Any, list[Any]]:
    from transformers import BigBirdConfig

    config = BigBirdConfig(
        hidden_size=H * D, num_attention_heads=H, block_size=size, num_random_blocks=r,
        max_position_embeddings=blocks * size, attention_type="block_sparse",
    )  # fmt: skip
    layer = _randomized(big_bird.BigBirdBlockSparseAttention(config, seed=0))
    layer._bigbird_block_rand_mask_with_head = lambda **_: list(plan[:, 1:-1])
    x = np.random.default_rng(1).standard_normal((B, blocks * size, H * D))
    valid = torch.from_numpy((np.arange(blocks * size) < lengths[:, None]).astype(np.float64))
    blocked, band, from_mask, to_mask = big_bird.BigBirdModel.create_masks_for_block_sparse_attn(valid, size)
    with torch.no_grad():
        out, _ = layer(
            torch.from_numpy(x), band_mask=band, from_mask=from_mask, to_mask=to_mask,
            from_blocked_mask=blocked, to_blocked_mask=blocked,
        )  # fmt: skip
    return out.numpy().reshape(B, blocks * size, H, D), _projected(x, layer, "query", "key", "value")


@pytest.mark.parametrize("f", [bigbird_attention, bigbird_attention_blocked])
@pytest.mark.parametrize("lengths", [(36, 36), (36, 29)], ids=["whole", "padded"])
def test_bigbird_block_sparse(f: Any, lengths: tuple[int, int]) -> None:
    """The same blocks for each head and row; its kernel is written for rows 0, 1, n - 2 and n - 1 apart."""
    blocks, size, r = 12, 3, 2
    plan, valid = bigbird_plan(blocks, heads=H, random_blocks=r, rng=3), np.array(lengths)
    out, arrays = _bigbird(blocks, size, r, plan, valid)
    mine = f(*arrays, block_size=size, plan=plan, q_lengths=valid, k_lengths=valid)
    np.testing.assert_allclose(mine, out, rtol=1e-11, atol=1e-12)


def test_bigbird_at_full_density_is_its_original_full_attention() -> None:
    from transformers import BigBirdConfig

    config = BigBirdConfig(hidden_size=H * D, num_attention_heads=H, attention_probs_dropout_prob=0.0)
    layer = _randomized(big_bird.BigBirdSelfAttention(config))
    x = np.random.default_rng(1).standard_normal((B, T, H * D))
    with torch.no_grad():
        out = layer(torch.from_numpy(x))[0].numpy().reshape(B, T, H, D)
    arrays = _projected(x, layer, "query", "key", "value")
    np.testing.assert_allclose(
        bigbird_attention(*arrays, block_size=4, window_blocks=13), out, rtol=1e-11, atol=1e-12
    )
