"""States of tiles by the kernel, simulated; what is remembered; tiles that the caller made."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import cuda_backend
from cuda_backend.arrays import view
from cuda_backend.attention import tile_states
from cuda_backend.attention.remembered import KEPT, remembered
from cuda_backend.attention.user_device import Mods
from refimpl.attention import block_mask, flexible_attention, flexible_attention_vjp, mods
from refimpl.attention.samples_flexible import MASKS, sample_flexible
from refimpl.attention.user_functions import as_mod
from refimpl.errors import OptionError

pytestmark = pytest.mark.cudasim

SHAPE: dict[str, Any] = {"B": 2, "Tq": 11, "Tk": 13, "Hkv": 1, "group": 2, "D": 3, "Dv": 2}
CLOSE = 2e-5  # float32, scores of size 1, as in test_flexible_simulated


@pytest.mark.parametrize("mask", [name for name in MASKS if name != "none"])
def test_the_kernel_counts_what_the_host_counts(mask: str) -> None:
    options = sample_flexible(np.random.default_rng(0), mask=mask, **SHAPE).kwargs
    aux = options.get("aux", ())
    arrays = tuple(view("aux", array, 0) for array in aux)
    kinds = tuple((array.dtype, len(array.shape)) for array in arrays)
    asked = Mods(as_mod("mask_mod", options["mask_mod"]), aux=kinds)
    for sizes in ((3, 4), (16, 13)):
        found = tile_states.queue_states(asked, arrays, (2, 2, 11, 13), sizes, 0).owner
        expected = block_mask(options["mask_mod"], 2, 2, 11, 13, block_sizes=sizes, aux=aux).states
        assert np.array_equal(found, np.broadcast_to(expected, found.shape))


def test_tiles_of_the_caller_serve_both_passes() -> None:
    """Tiles of 4 x 6 in kernels of 8 x 8 are cut to 4 x 2."""
    case = sample_flexible(np.random.default_rng(0), mask="documents", score="softcap", **SHAPE)
    exact = case.args
    q, k, v = (x.astype(np.float32) for x in exact)
    options = case.kwargs
    tiles = cuda_backend.block_mask(options["mask_mod"], 2, 2, 11, 13, block_sizes=(4, 6), aux=options["aux"])
    out, lse = cuda_backend.flexible_attention(q, k, v, block_mask=tiles, return_lse=True, **options)
    found = cuda_backend.flexible_attention_vjp(q, k, v, out, lse, out, block_mask=tiles, **options)
    assert np.abs(out - flexible_attention(*case.args, **options)).max() < CLOSE
    exact = (*exact, out.astype(float))
    wanted = flexible_attention_vjp(*exact, **options)
    for name in ("dq", "dk", "dv"):
        assert np.abs(getattr(found, name) - getattr(wanted, name)).max() < CLOSE, name
    with pytest.raises(OptionError, match="divisors"):
        cuda_backend.flexible_attention(q, k, v, block_mask=tiles, block_sizes=(8, 8), **options)


def test_joined_masks_are_kernels_too() -> None:
    rng, numbers = np.random.default_rng(0), np.array([[0, 0, 0, 1, 1, 1, 1, 2, 2]])
    q, k, v = (rng.standard_normal((1, 9, 1, 3)).astype(np.float32) for _ in range(3))
    options: dict[str, Any] = {"mask_mod": mods.both(mods.causal, mods.documents()), "aux": (numbers,)}
    found = cuda_backend.flexible_attention(q, k, v, **options)
    assert np.abs(found - flexible_attention(q, k, v, **options)).max() < CLOSE


def test_a_mask_is_asked_once_while_nothing_changes(monkeypatch: Any) -> None:
    asked: list[Any] = []

    def counted(*sizes: Any, **options: Any) -> Any:
        asked.append(sizes)
        return block_mask(*sizes, **options)

    monkeypatch.setattr(tile_states, "on_host", counted)
    x, documents = np.ones((1, 6, 1, 2), np.float32), np.array([[7, 7, 7, 8, 8, 9]])

    def call() -> Any:
        return cuda_backend.flexible_attention(x, x, x, mask_mod=mods.documents(), aux=(documents,))

    call(), call()
    assert len(asked) == 1
    documents[0, 0] = 5
    call()
    assert len(asked) == 2


def test_a_block_mask_stays_the_same_object_while_nothing_changes() -> None:
    """So lists of tiles that are made of it can be kept by it."""
    documents = np.array([[7, 7, 7, 8, 8, 9]])

    def made(radius: int = 2) -> Any:
        mask = mods.both(mods.causal, mods.sliding(radius))
        return cuda_backend.block_mask(mask, 1, 1, 6, 6, block_sizes=(2, 2)), cuda_backend.block_mask(
            mods.documents(), 1, 1, 6, 6, block_sizes=(2, 2), aux=(documents,)
        )

    first = made()
    assert all(a is b for a, b in zip(first, made(), strict=True))
    assert made(3)[0] is not first[0]
    documents[0, 3] = 7
    assert made()[1] is not first[1]
    assert made()[1].live.tolist() != first[1].live.tolist()


def test_tensors_are_known_by_the_writes_to_them() -> None:
    torch = pytest.importorskip("torch")
    tensor, numbers = torch.zeros(3), itertools.count(1)

    def ask() -> Any:
        return remembered(("tensor",), (tensor,), lambda: next(numbers))

    assert [ask(), ask()] == [1, 1]
    tensor.add_(1)
    assert [ask(), ask()] == [2, 2]
    tensor = torch.zeros(3)
    assert ask() == 3
    with torch.inference_mode():
        tensor = torch.zeros(3)
    assert [ask(), ask()] == [4, 5]


def test_only_so_many_answers_are_kept() -> None:
    first = remembered(("many", 0), (), object)
    for index in range(1, KEPT):
        remembered(("many", index), (), object)
    assert remembered(("many", 0), (), object) is first
    for index in range(KEPT, 2 * KEPT):
        remembered(("many", index), (), object)
    assert remembered(("many", 0), (), object) is not first
