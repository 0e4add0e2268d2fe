"""Forward calls on Hopper whose block mask says something else than the function: the states rule.

What the kernel is told, lists and bits, is walked through and held to what the states mean; its own mask,
where it asks one, is called.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cuda_backend.arrays import view
from cuda_backend.attention import call_flexible_hopper, plan_flexible_hopper, remembered
from cuda_backend.attention.lists_hopper import ALL, NOTHING, ROWS
from cuda_backend.attention.ruled_masks import divides, ruled
from cuda_backend.attention.traced import source_of
from cuda_backend.attention.user_device import Mods
from refimpl.attention import mods
from refimpl.attention.block_mask import DEAD, FULL, PARTIAL, BlockMask
from refimpl.attention.user_functions import as_mod, where_allowed
from tests.cuda.hopper_machine import fragment

pytestmark = pytest.mark.cudasim

B, H, D, STREAM = 2, 2, 64, 0
DOCUMENTS = np.sort(np.random.default_rng(0).integers(0, 4, (B, 400)), axis=1).astype(np.int32)
MASKS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "sliding": (mods.sliding(20), ()),
    "documents": (mods.documents(), (DOCUMENTS,)),
}
CASES = [
    ((64, 128), (128, 256)),  # of all tiles that the kernel may take some divide these
    ((64, 128), (100, 270)),  # ragged at both ends
    ((2, 3), (18, 19)),
    ((48, 40), (150, 300)),
    ((400, 400), (100, 200)),
]


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimpleNamespace(MULTIPROCESSOR_COUNT=4)
    monkeypatch.setattr(plan_flexible_hopper, "cuda", SimpleNamespace(get_current_device=lambda: device))
    monkeypatch.setattr(plan_flexible_hopper, "driver", SimpleNamespace(cuStreamSynchronize=lambda _: (0,)))
    remembered._answers.clear()


def problem(
    name: str, sizes: tuple[int, int], lengths: tuple[int, int], seed: int = 0
) -> tuple[Mods, tuple[Any, ...], BlockMask, Any]:
    """Return a mask, its arrays, states that contradict it, and what both allow, [B, H, Tq, Tk]."""
    mask, aux = MASKS[name]
    tiles = (B, 1, *(-(-length // size) for length, size in zip(lengths, sizes, strict=True)))
    given = BlockMask(np.random.default_rng(seed).integers(0, 3, tiles).astype(np.uint8), sizes, lengths)
    mod = as_mod("mask_mod", mask)
    grid = np.ogrid[:B, :H, : lengths[0], : lengths[1]]
    b, _, i, j = grid
    state = given.states[b, 0, i // sizes[0], j // sizes[1]]
    allowed = np.where(state == PARTIAL, where_allowed(mod, tuple(grid), aux), state == FULL)
    found = Mods(mod, aux=tuple((x.dtype.name, x.ndim) for x in aux))
    return found, aux, given, np.broadcast_to(allowed, (B, H, *lengths))


def lists_of(given: Mods, aux: tuple[Any, ...], blocks: BlockMask) -> Any:
    """Return the lists of a call in float16."""
    q, k = (((B, T, H, D), (2 * T * H * D, 2 * H * D, 2 * D, 2), "float16", None) for T in blocks.lengths)
    arrays = tuple(view("aux", x, STREAM) for x in aux)
    return call_flexible_hopper._lists((q, k, k), given, arrays, aux, blocks, STREAM)


def told(lists: Any, lengths: tuple[int, int]) -> Any:
    """Return what warpgroups that follow the lists see, [B, H, Tq, Tk]."""
    tiles, work, steps, words = (
        lists.tiles, *(np.asarray(x.owner) for x in (lists.work, lists.steps, lists.words))
    )  # fmt: skip
    keys, consumers = tiles.block_n, tiles.consumers
    rows = -(-lengths[0] // (ROWS * consumers)) * ROWS * consumers
    seen = np.zeros((B, H, rows, -(-lengths[1] // keys) * keys), bool)
    row, column = fragment(keys)  # [accumulator, thread]
    place, thread = np.indices(row.shape)
    for block, head, start, count in work.tolist():
        for tile, *each in steps[start : start + count].tolist():
            for w, known in enumerate(each[:consumers]):
                here = seen[*divmod(head, H), ROWS * (consumers * block + w) :, keys * tile :]
                if known == ALL:
                    here[:ROWS, :keys] = True
                elif known != NOTHING:
                    word = words[known, thread, place % 4 // 2]
                    here[row, column] = word >> (2 * (place // 4) + place % 2).astype(np.uint32) & 1
    return seen[:, :, : lengths[0], : lengths[1]]


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("sizes", "lengths"), CASES)
def test_lists_and_bits_say_what_states_mean(
    name: str, sizes: tuple[int, int], lengths: tuple[int, int]
) -> None:
    given, aux, blocks, allowed = problem(name, sizes, lengths)
    assert np.array_equal(told(lists_of(given, aux, blocks), lengths), allowed)


def test_other_states_are_other_lists() -> None:
    """Of the same function, sizes and lengths: what one block mask was told no other hears."""
    for seed in range(3):
        given, aux, blocks, allowed = problem("sliding", (16, 16), (70, 70), seed)
        assert np.array_equal(told(lists_of(given, aux, blocks), (70, 70)), allowed)


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_that_kernels_ask_obeys_states(name: str) -> None:
    """As it is called, and as it is written down for the GPU; the score does not see the states."""
    lengths = 18, 19
    given, aux, blocks, allowed = problem(name, (2, 3), lengths)
    score = as_mod("score_mod", lambda s, b, h, i, j, aux: s + len(aux), ("score",))
    arrays = tuple(view("aux", x, STREAM) for x in aux)
    found, views = ruled(given._replace(score=score), arrays, blocks, ((B, 18, H, D), (), "", None), STREAM)
    assert [(x.dtype, len(x.shape)) for x in views] == list(found.aux)
    owners, grid = tuple(np.asarray(x.owner) for x in views), np.ogrid[:B, :H, :18, :19]
    mask: Any = found.mask
    assert np.array_equal(where_allowed(mask, tuple(grid), owners), allowed)
    assert found.score is not None
    assert found.score.call((0.0,), (0, 0, 0, 0), owners) == len(aux)
    scope: dict[str, Any] = {"int32": int, "uint32": int}
    source = source_of(mask, found.aux, "bool")
    assert source is not None
    exec(source, scope)
    for at in np.ndindex(allowed.shape):
        assert bool(scope["traced"](*at, owners)) == allowed[at]


def test_it_is_one_function_for_one_mask() -> None:
    """A kernel is compiled for a mask and sizes of tiles, not for each call or for each array of states."""
    layout: Any = ((B, 18, H, D), (), "", None)
    found = [
        ruled(Mods(as_mod("mask_mod", mods.sliding(radius))), (), problem("sliding", sizes, (18, 19), n)[2],
              layout, STREAM)[0]
        for n, (radius, sizes) in enumerate([(5, (2, 3)), (5, (2, 3)), (6, (2, 3)), (5, (3, 3))])
    ]  # fmt: skip
    assert found[0] == found[1]
    assert hash(found[0]) == hash(found[1])
    assert found[0] not in found[2:]


def test_bits_that_do_not_fit_leave_the_question_to_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_flexible_hopper, "MOST_BYTES", 0)
    given, aux, blocks, _ = problem("sliding", (2, 3), (18, 19))
    asked: list[Any] = []

    class _Asked(Exception):  # noqa: N818
        """Nothing is launched here."""

    def plan(_q: Any, _k: Any, _v: Any, _scale: Any, given: Mods, *_: Any) -> Any:
        asked.append(given)
        raise _Asked

    for name, value in {
        "make_flexible_plan": plan, "current_device": lambda: 0, "wait_for": lambda *_: None,
        "reasons": lambda *_, **__: [],
    }.items():  # fmt: skip
        monkeypatch.setattr(call_flexible_hopper, name, value)
    q, k = (np.zeros((B, T, H, D), np.float16) for T in (18, 19))
    with pytest.raises(_Asked):
        call_flexible_hopper.flexible_attention_hopper(
            q, k, k, mods=given, arrays=(), aux=aux, blocks=blocks, scale=None, return_lse=False, stream=0
        )
    assert asked[0].aux == (("uint8", 4),)
    assert asked[0].mask != given.mask


def test_tiles_that_divide_need_no_states() -> None:
    states = np.full((1, 1, 2, 2), DEAD, np.uint8)
    assert divides(BlockMask(states, (128, 128), (256, 256)), (64, 64))
    for sizes, lengths in (((128, 128), (250, 256)), ((128, 128), (256, 250)), ((130, 128), (260, 256))):
        assert not divides(BlockMask(states, sizes, lengths), (64, 64))
