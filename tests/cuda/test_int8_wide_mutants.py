"""Mistakes in the product of codes for many rows on Hopper: the law of the played machine that each breaks.

What depends on who comes first is found whoever does: see `happens_before`.  Mistakes about outliers are in
`test_int8_aside_mutants`.
"""

from __future__ import annotations

import pytest

from cuda_backend.int8 import variant_hopper
from tests.cuda.happens_before import RaceError
from tests.cuda.hopper_machine import HangError
from tests.cuda.int8_wide_played import Asked, Mutant, played

PLAIN = Asked("int32", 128, 130, 141, 100, blocks=1)
SHORT = Asked("bfloat16", 256, 130, 300, 384, blocks=1, biased=False)  # all steps are begun at once
LONG = Asked("float16", 256, 200, 300, 900, blocks=2)
TALL = Asked("int32", 128, 1100, 130, 16, blocks=2)
FEW = Asked("bfloat16", 256, 200, 300, 300, blocks=3, number=17)

UNORDERED = "known to have been written|may still read it"  # whoever comes second complains
DIFFERS = AssertionError, "differ, the first at"
RACE = RaceError, UNORDERED
RUNNING = AssertionError, "while products run|products are still running"
NO_STAGE, NO_SCALES = (HangError, "consumer 0 waits for stage . to be full"), (HangError, "waits for scales")
ARRIVALS = AssertionError, "more arrivals than the barrier was made for"
ONCE, OUTSIDE = (AssertionError, "not stored once"), (AssertionError, "outside all arrays")
NO_FENCE = AssertionError, "without a fence"
UNTOLD = AssertionError, "copied before it is known|not been told of"
TOO_EARLY = AssertionError, "before the grid ahead has ended"
# As threads happen to run.
ANY = AssertionError, f"{UNORDERED}|waits for|more arrivals|differ|has not ended|while products run"

WITHOUT = "here = base + stage * at.stage_bytes\n"
WAIT_FULL = f"barrier.wait(base + at.full + 8 * stage, parity)\n                {WITHOUT}"
WAIT_EMPTY = "barrier.wait(base + at.empty + 8 * stage, parity)\n"
OLDER = "                wgmma.wait_for_older()\n"
RETURNED = "                hand_back(base, lane, before)\n                before = stage"
WAIT_LAST = WAIT_FULL.replace("\n                ", "\n                    ")
HAND_BACK_LAST = (
    "                for _ in range(last):\n"
    "                    hand_back(base, lane, ended)\n"
    "                    ended, _ = next_stage(ended, parity)\n"
)
LEFT_DONE = "                left_done(left)\n"
SCALES_READ = "                barrier.arrive_warp(base + at.columns_empty, lane)\n"
SCALED_RIGHT = (
    "                if halved:\n"
    "                    scale(right, base + at.columns + 8 * width + 16 * quad_lane, low, high)\n"
)
AND_PARITY = "                columns_parity = int32(columns_parity ^ 1)\n"
OWN_ROW, ROW_BELOW = "uint64(min(row, int32(M - 1)))", "uint64(min(int32(row + 8), int32(M - 1)))"


def own_last(role: str, more: int) -> tuple[str, str, str]:
    """Return that a role has so many last stages more than the other."""
    return role, "variant.last\n", f"variant.last + {more}\n"


# What is asked, the module, a part of it, what stands there, how it is seen.
MISTAKES: dict[str, tuple[Asked, tuple[str, str, str], tuple[type[AssertionError], str]]] = {
    # Stages: who hands them back, when, and how often.
    "a stage is not handed back":
        (LONG, ("consumer", RETURNED, "                before = stage"), NO_STAGE),
    "one of the last stages is not handed back":
        (LONG, ("consumer", HAND_BACK_LAST, HAND_BACK_LAST.replace("(last)", "(last - 1)")), NO_STAGE),
    "the stage before the last ones is not handed back":
        (LONG, ("consumer", LEFT_DONE + "                hand_back(base, lane, before)\n", LEFT_DONE),
         NO_STAGE),
    "a stage is handed back before its product has run":
        (LONG, ("consumer", RETURNED, RETURNED.replace("before)", "stage)")), RACE),
    "the last stages are handed back before the right half has run":
        (LONG, ("consumer", "                all_done(right)\n" + HAND_BACK_LAST,
                HAND_BACK_LAST + "                all_done(right)\n"), RACE),
    "older products are not waited for":
        (LONG, ("consumer", OLDER + RETURNED, RETURNED), RACE),
    "all groups but two are waited for":
        (LONG, ("wgmma", "wait_group.sync.aligned 1;", "wait_group.sync.aligned 2;"), RACE),
    "warps of one consumer free a stage":
        (LONG, ("gemm", "consumer_warps, scaled, beside = 8,", "consumer_warps, scaled, beside = 4,"),
         ANY),
    "all warps but one free a stage":
        (LONG, ("gemm", "consumer_warps, scaled, beside = 8,", "consumer_warps, scaled, beside = 7,"),
         ANY),
    "a stage is read before it is full":
        (LONG, ("consumer", WAIT_FULL + "                own[0]", WITHOUT + "                own[0]"),
         RACE),
    "the last stages are read before they are full":
        (LONG, ("consumer", WAIT_LAST + "                    ends[", WITHOUT + "                    ends["),
         RACE),
    "a stage is filled before it is empty":
        (LONG, ("producer", WAIT_EMPTY + "            if step", "if step"), ANY),
    "parity of the consumers":
        (LONG, ("consumer", "int32(0), int32(0), int32(0)\n", "int32(0), int32(1), int32(0)\n"), RACE),
    "parity of the producer":
        (LONG, ("producer", "stage, parity = int32(0), int32(1)", "stage, parity = int32(0), int32(0)"),
         NO_STAGE),
    "parity after a turn of the ring":
        (LONG, ("ring", "return int32(0), int32(parity ^ 1)", "return int32(0), parity"), ANY),
    "bytes of A are not announced":
        (LONG, ("producer", "width * (block_m + block_n)", "width * block_n"), ANY),
    # Which stages come, and in which order.
    "consumers have a last stage more": (FEW, own_last("consumer", 1), DIFFERS),
    "consumers have a last stage less": (FEW, own_last("consumer", -1), DIFFERS),
    "the producer has a last stage more": (FEW, own_last("producer", 1), DIFFERS),
    "the producer has a last stage less": (FEW, own_last("producer", -1), DIFFERS),
    "begun stages are begun for every tile": (LONG, ("producer", "begun = int32(0)", "pass"), NO_STAGE),
    "a stage more is taken to be begun":
        (LONG, ("producer", "int32(min(last, stages))", "int32(min(last, stages) + 1)"), NO_STAGE),
    "a stage less is taken to be begun":
        (LONG, ("producer", "int32(min(last, stages))", "int32(min(last, stages) - 1)"),
         ARRIVALS),
    "last stages are begun, too":
        (SHORT, ("producer", "min(int32(steps - at_last), stages)", "min(steps, stages)"), ARRIVALS),
    "the last stages begin earlier":
        (SHORT, ("producer", "last = int32(steps - at_last)", "last = int32(steps - at_last - 1)"), ARRIVALS),
    "codes of A are read before the grid ahead has ended":
        (LONG, ("producer", "matrix_copy.prefetch(a_map,", "load_a(base, int32(stage), a_map,"),
         TOO_EARLY),
    # Halves.
    "the right half of B":
        (LONG, ("consumer", "right_at = width * STEP // 16", "right_at = width * STEP // 32"), DIFFERS),
    "the left half of B twice":
        (LONG, ("wgmma_halves", "{offset + side * right}", "{offset}"), DIFFERS),
    "the other consumer's rows of A":
        (LONG, ("consumer", "uint32(group * (64 * STEP))", "uint32(0)"), DIFFERS),
    "the right half is committed first":
        (LONG, ("wgmma_halves", "for side in range(halves):", "for side in (1, 0):"), ANY),
    "both halves are one group":
        (LONG, ("wgmma_halves", "if apart or side == halves - 1:", "if side == halves - 1:"), RUNNING),
    "the left half is not waited for":
        (LONG, ("consumer", "                left_done(left)\n", ""), ANY),
    "the left half may still run": (LONG, ("consumer", "wgmma.wait(1, count)", "wgmma.wait(2, count)"),
                                    RUNNING),
    "the right half is not waited for":
        (LONG, ("consumer", "                all_done(right)\n", ""), ANY),
    "the right half may still run": (LONG, ("consumer", "wgmma.wait(0, count)", "wgmma.wait(1, count)"),
                                     RUNNING),
    "no fence": (LONG, ("wgmma_halves", '"wgmma.fence.sync.aligned;"]', '""]'), NO_FENCE),
    "sums are not cleared": (LONG, ("consumer", "right[i] = 0", "pass"), DIFFERS),
    # Scales.
    "scales of the left half for the right one":
        (LONG, ("consumer", "base + at.columns + 8 * width + 16", "base + at.columns + 16"), DIFFERS),
    "the right half is stored over the left one":
        (LONG, ("consumer", "store(right, out, row, start + width", "store(right, out, row, start"),
         ONCE),
    "scales are not waited for":
        (LONG, ("consumer", "barrier.wait(base + at.columns_full, columns_parity)", "pass"), RACE),
    "parity of the scales":
        (LONG, ("consumer", "columns_parity = int32(columns_parity ^ 1)", "pass"), ANY),
    "scales are overwritten without asking":
        (LONG, ("gemm", "barrier.wait(base + at.columns_empty, parity)", "pass"), ANY),
    "scales are given back before they are read":
        (LONG, ("consumer", SCALED_RIGHT + AND_PARITY + SCALES_READ, SCALES_READ + SCALED_RIGHT + AND_PARITY),
         RACE),
    "scales are not given back": (LONG, ("consumer", SCALES_READ, ""), NO_SCALES),
    "scale of the row eight above":
        (LONG, ("consumer", ROW_BELOW, OWN_ROW), DIFFERS),
    "the last row takes the scale of the one above":
        (LONG, ("consumer", OWN_ROW, OWN_ROW.replace("M - 1", "M - 2")), DIFFERS),
    "the last row takes the scale of the one above, eight rows below":
        (LONG._replace(M=204), ("consumer", ROW_BELOW, ROW_BELOW.replace("M - 1", "M - 2")), DIFFERS),
    "scales of rows that there are not": (LONG, ("consumer", OWN_ROW, "uint64(row)"), OUTSIDE),
    "scales of rows that there are not, eight rows below":
        (LONG, ("consumer", ROW_BELOW, ROW_BELOW.replace("M - 1", "M")), OUTSIDE),
    "rows of padding are stored":
        (PLAIN, ("epilogue", "if row + 8 * half < M:", "if row < M:"), OUTSIDE),
    "rows of tiles of another group":
        (TALL, ("layout", "rows - index * group", "rows"), ONCE),
}  # fmt: skip


def judge(asked: Asked, mutant: Mutant | None = None) -> None:
    """Complain of what the machine does not, too: a wrong result."""
    problem = played(asked, mutant, late=True)
    assert problem is None, problem


@pytest.mark.parametrize("asked", [PLAIN, SHORT, LONG, TALL, FEW])
def test_without_a_mistake_nothing_is_seen(asked: Asked) -> None:
    judge(asked)


@pytest.mark.parametrize("wrong", MISTAKES)
def test_mistakes_are_seen(wrong: str) -> None:
    asked, (name, old, new), (error, words) = MISTAKES[wrong]
    with pytest.raises(error, match=words):
        judge(asked, {name: (old, new)})


def test_as_many_last_stages_as_the_ring_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadlock of a draft: one stage has not been handed back yet, and all are wanted at once."""
    monkeypatch.setattr(variant_hopper, "LAST", 4)
    error, words = NO_STAGE
    with pytest.raises(error, match=words):
        judge(LONG)


def test_what_is_asked_for_in_the_cache_does_not_matter() -> None:
    other = "matrix_copy.prefetch(a_map, int32(stage * STEP), int32(row * block_n + 1))"
    right = "matrix_copy.prefetch(a_map, int32(stage * STEP), int32(row * block_m))"
    judge(LONG, {"producer": (right, other)})
