"""Mistakes about the outliers of the product of codes for many rows: the law of the machine that each breaks.

How they are listed, set aside and awaited, how their codes are taken away, and how they are added.
"""

from __future__ import annotations

import pytest

from tests.cuda.hopper_machine import HangError
from tests.cuda.int8_wide_played import Asked
from tests.cuda.test_int8_wide_mutants import (
    ANY,
    DIFFERS,
    FEW,
    NO_STAGE,
    RACE,
    RUNNING,
    UNORDERED,
    UNTOLD,
    WAIT_EMPTY,
    WITHOUT,
    judge,
)

MANY = Asked("float16", 128, 130, 141, 400, blocks=2, number=70)
NONE = Asked("bfloat16", 256, 130, 300, 100, blocks=1, number=0)
CHUNK = Asked("bfloat16", 256, 200, 300, 300, blocks=3, number=9)  # of outliers: one for each half
WHOLE = FEW._replace(halves=False)

UNWRITTEN = AssertionError, f"{UNORDERED}|outside all arrays"  # or garbage has been used by then
NO_TURN = HangError, "waits for a turn to be passed"
TURNS = AssertionError, f"{UNORDERED}|not been told of|passed on once"
NOT_RUN = AssertionError, f"{UNORDERED}|while products run"
NOT_MET = AssertionError, "for lanes that have not met"
NO_FULL = HangError, "consumer 0 waits for stage . to be full"

# Setting aside.
TOLD = "            turns.to_the_copy_engine()\n            barrier.warp()\n"
DONE = "while copy.load_word_fresh(counters + uint64(DONE)) < shares:\n                    turns.rest()\n"
SEEN = "                turns.word_seen(counters + uint64(DONE))\n"
TOGETHER = "        together()\n"
READY, NUMBER = "barrier.arrive(ready)\n", "copy.store_shared_word(number_at, number)\n"
HALF_ENDS = "int32(half if warp == 0 else K)"
OWN_PLACE = "int32(before * warp)"
# Codes that are taken away.
RETURNED = "                            hand_back(base, lane, before)\n"
KEPT = RETURNED + "                            before = stage\n"
OLDER = "                            wgmma.wait_for_older()\n" + RETURNED
TAKEN_AT_ONCE = (
    RETURNED + RETURNED.replace("before)", "stage)") + "                            before = int32(-1)\n"
)
TAKEN = "                            both_done(left, right)\n"
TAKEN_BACK = TAKEN + "                            hand_back(base, lane, stage)\n"
LEFT_DONE = "                left_done(left)\n                hand_back(base, lane, before)\n"
REMOVED = (
    "            if removed:\n"
    "                remove_surplus(left, taken, indices, number, side_by_side, row, own_column, M, N)\n"
)
RIGHT_DONE = (
    "                all_done(right)\n"
    "                for _ in range(last):\n"
    "                    hand_back(base, lane, ended)\n"
    "                    ended, _ = next_stage(ended, parity)\n"
)
REMOVED_RIGHT = (
    "                if removed:\n                    remove_surplus(right, taken, indices, number, "
    "side_by_side, row, own_column + width, M, N)\n"
)
SCALED = "                scale(left, base + at.columns + 16 * quad_lane, low, high)\n"
# What is added.
BEGIN = "                begin_outliers(left,"
WAIT_FULL = f"                barrier.wait(base + at.full + 8 * stage, parity)\n                {WITHOUT}"
BEGUN = f"{BEGIN} short_descriptor(here + a_short), short_descriptor(here + a_bytes))\n"
LEFT_ADDED = "                if halved:\n                    all_done(left)\n"
RIGHT_ADDED = (
    "                    if halved:\n"
    "                        multiply_outliers(right, a, short_descriptor(b + short_right))\n"
)
ADDED_BACK = "                    hand_back(base, lane, stage)\n                    stage, parity"
STARTED = "low, high = float32(0.0), float32(0.0)\n"
FURTHER_RIGHT = "add_surplus(right, surplus, indices, number, side_by_side, row, own_column"

# What is asked, the module, a part of it, what stands there, how it is seen.
MISTAKES: dict[str, tuple[Asked, tuple[str, str, str], tuple[type[AssertionError], str]]] = {
    # The list.
    "both warps list from the start": (FEW, ("aside", OWN_PLACE, "int32(0)"), RACE),
    "both warps list behind the first half": (FEW, ("aside", OWN_PLACE, "before"), UNWRITTEN),
    "marks between the halves are listed twice":
        (FEW, ("aside", HALF_ENDS, "int32(half + 16 if warp == 0 else K)"), DIFFERS),
    "marks between the halves are not listed":
        (FEW, ("aside", HALF_ENDS, "int32(half - 16 if warp == 0 else K)"), DIFFERS),
    "marks are written before places are known":
        (FEW, ("aside", "listed, indices, False)", "listed, indices, True)"), UNWRITTEN),
    "places are known before all are counted":
        (FEW, ("aside", TOGETHER + "        before = copy", "        before = copy"), UNWRITTEN),
    "the list is read before all is written":
        (FEW, ("aside", TOGETHER + "        if number", "        if number"), UNWRITTEN),
    "both warps count in one place": (FEW, ("aside", "counted + 16 * warp", "counted"), RACE),
    "the first warp's marks count twice":
        (FEW, ("aside", "uint32(counted + 16))", "uint32(counted))"), DIFFERS),
    "counts lie in the list":
        (FEW, ("layout", "behind + 32 + 4 * LISTED", "behind + 32"), RACE),
    # Shares.
    "sign of the codes that are taken away":
        (FEW, ("aside", "own[i] = uint32(-int32(own[i]))", "pass"), DIFFERS),
    "outliers are ready before other blocks have set theirs aside":
        (FEW, ("aside", DONE, "pass\n"), UNTOLD),
    "a share too many is passed":
        (FEW, ("aside", "uint64(DONE), done)", "uint64(DONE), done + 1)"), TURNS),
    "a share too few is passed":
        (FEW, ("aside", "uint64(DONE), done)", "uint64(DONE), done - 1)"), NO_TURN),
    "one share is passed for all of a warp":
        (FEW, ("aside", "uint64(DONE), done)", "uint64(DONE), int32(min(done, 1)))"), NO_TURN),
    "who has looked is not told what others have done": (FEW, ("aside", SEEN, ""), UNTOLD),
    "the copy engine is not told what is set aside":
        (FEW, ("aside", TOLD, TOLD.replace("turns.to_the_copy_engine()", "pass")), UNTOLD),
    "one lane tells the copy engine what it has set aside":
        (FEW, ("aside", TOLD, "            if lane == 0:\n    " + TOLD), UNTOLD),
    "a lane passes shares before the others are done":
        (FEW, ("aside", TOLD, TOLD.replace("barrier.warp()", "pass")), NOT_MET),
    "the number is written behind its barrier":
        (FEW, ("aside", f"{NUMBER}                {READY}", f"{READY}                {NUMBER}"), RACE),
    "marks are cleared while others read them":
        (FEW, ("aside", "if registers.uniform(last) != 0:", "if number > 0:"), RACE),
    "a counter is cleared while another warp spins":
        (FEW, ("aside", "            together()\n        if warp == 0:", "        if warp == 0:"),
         RACE),
    # Their stages.
    "the number of outliers before it is known":
        (FEW, ("consumer", "barrier.wait(base + at.ready, 0)", "pass"), RACE),
    "outliers are copied before they are set aside":
        (FEW, ("producer", "barrier.wait(base + at.ready, 0)", "pass"), RACE),
    "chunks are brought before their stage is empty":
        (FEW, ("producer", WAIT_EMPTY + "            column", "column"), ANY),
    "codes of outliers come a stage early":
        (FEW, ("producer", "codes, int32(0), last, begun", "codes, int32(0), int32(last - 1), begun"),
         ANY),
    "outliers are asked for once":
        (MANY, ("producer", "range(number):", "range(min(number, 1)):"), NO_STAGE),
    "chunks are rounded down": (FEW, ("producer", "near + (CHUNK - 1)", "near"), NO_STAGE),
    "chunks of codes are rounded down":
        (FEW, ("producer", "near + (TAKEN_CHUNK - 1)", "near"), NO_STAGE),
    "more chunks are brought than lie side by side":
        (MANY, ("producer", "min(number, side_by_side)", "number"), ANY),
    "chunks of codes lie elsewhere":
        (FEW, ("producer", "int32(2 * side_by_side), TAKEN", "int32(side_by_side), TAKEN"), DIFFERS),
    "a swizzle of 128 bytes for outliers":
        (FEW, ("wgmma", "1 << 62, 3 << 62", "1 << 62, 1 << 62"), DIFFERS),
    "only the first tile has outliers":
        (FEW, ("consumer", STARTED, STARTED + "            near = int32(0)\n"), ANY),
    "only the first tile has further outliers":
        (MANY, ("consumer", STARTED, STARTED + "            number = int32(0) if tile > first else number\n"),
         DIFFERS),
    # Codes that are taken away.
    "the right half of B's codes of outliers":
        (FEW, ("consumer", "[0], short_right // 16,", "[0], right_at,"), DIFFERS),
    "codes of outliers may still run":
        (WHOLE, ("wgmma_halves", "wgmma.wait_group.sync.aligned 0;", "wgmma.wait_group.sync.aligned 1;"),
         RUNNING),
    "a stage of codes is handed back while their product runs":
        (FEW, ("consumer", KEPT, TAKEN_AT_ONCE), RACE),
    "the stage before that of codes is handed back twice": (FEW, ("consumer", KEPT, RETURNED), ANY),
    "the stage before that of codes is not handed back":
        (FEW, ("consumer", KEPT, KEPT.removeprefix(RETURNED)), NO_STAGE),
    "the stage before that of codes may still be read":
        (FEW, ("consumer", OLDER, RETURNED), RACE),
    "of a whole tile, the stage of codes is not handed back":
        (WHOLE, ("consumer", TAKEN_BACK, TAKEN), NO_STAGE),
    "of a whole tile, the product of codes may still run":
        (WHOLE, ("consumer", TAKEN_BACK, TAKEN_BACK.removeprefix(TAKEN)), NOT_RUN),
    "sign of the codes that are taken away one by one":
        (MANY, ("epilogue", "total[4 * i + e] -= low * met", "total[4 * i + e] += low * met"),
         DIFFERS),
    "further codes are taken away while the left half runs":
        (MANY, ("consumer", LEFT_DONE + REMOVED, REMOVED + LEFT_DONE), RUNNING),
    "further codes are taken away while the right half runs":
        (MANY, ("consumer", RIGHT_DONE + REMOVED_RIGHT, REMOVED_RIGHT + RIGHT_DONE), RUNNING),
    "further codes of the left half stay": (MANY, ("consumer", REMOVED, ""), DIFFERS),
    "further codes of the left half twice":
        (MANY, ("consumer", REMOVED_RIGHT, REMOVED_RIGHT.replace("right,", "left,")), DIFFERS),
    "further codes of the left half's columns":
        (MANY, ("consumer", REMOVED_RIGHT, REMOVED_RIGHT.replace(" + width", "")), DIFFERS),
    # What is added.
    "the right half of B's outliers":
        (FEW, ("consumer", "short_descriptor(b + short_right)", "short_descriptor(b)"), DIFFERS),
    "the first chunk is begun before it is full":
        (CHUNK, ("consumer", WAIT_FULL + BEGIN, f"                {WITHOUT}" + BEGIN), RACE),
    "of no outliers a chunk is begun": (NONE, ("consumer", "near > 0:", "near >= 0:"), NO_FULL),
    "the left half's first chunk is added twice":
        (FEW, ("consumer", "todo < near:", "todo <= near:"), DIFFERS),
    "the left half lacks the second chunk, which nobody awaits":
        (FEW, ("consumer", "todo < near:", "todo < near - CHUNK:"), RACE),
    "the left half's outliers may still run": (CHUNK, ("consumer", LEFT_ADDED, ""), RUNNING),
    "a chunk is handed back before the right half has it":
        (CHUNK, ("consumer", RIGHT_ADDED + "                    hand_back(base, lane, stage)\n",
                 "                    hand_back(base, lane, stage)\n" + RIGHT_ADDED), RACE),
    "a chunk is handed back when it is begun, too":
        (CHUNK, ("consumer", BEGIN, "                hand_back(base, lane, stage)\n" + BEGIN), ANY),
    "the left half is scaled while its outliers are added":
        (CHUNK, ("consumer", SCALED, WAIT_FULL + BEGUN + SCALED), RUNNING),
    "further outliers of the left half's columns":
        (MANY, ("consumer", FURTHER_RIGHT + " + width", FURTHER_RIGHT), DIFFERS),
}  # fmt: skip


@pytest.mark.parametrize("asked", [MANY, NONE, CHUNK, WHOLE])
def test_without_a_mistake_nothing_is_seen(asked: Asked) -> None:
    judge(asked)


@pytest.mark.parametrize("wrong", MISTAKES)
def test_mistakes_about_outliers_are_seen(wrong: str) -> None:
    asked, (name, old, new), (error, words) = MISTAKES[wrong]
    with pytest.raises(error, match=words):
        judge(asked, {name: (old, new)})
