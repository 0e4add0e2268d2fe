"""Blocks that take turns, or numbers: a word in global memory says whose turn it is, or how many came.

What a block has done before `pass_turns` is seen by the one that `word_seen` has told of it, what the copy
engine has done included: for it stands the fence between the proxies.  What other threads of the block have
done counts if a barrier of the block lies between, and they see what the thread has been told behind another.

Source: PTX ISA 8.7, "Memory Consistency Model", "Data Movement and Conversion Instructions: ld", "red",
"atom", "membar, fence".
"""

from __future__ import annotations

from cuda_backend.ptx.assembly import instruction, types

__all__ = [
    "addition_seen",
    "pass_addition",
    "pass_turn_of_warp",
    "pass_turns",
    "rest",
    "take_number",
    "to_the_copy_engine",
    "wait_for_turn",
    "word_seen",
]

word_seen = instruction(
    "word_seen",
    types.int32,
    {"address": types.uint64},
    "ld.acquire.gpu.global.b32 $0, [$1]; fence.proxy.async;",
    "=r,l",
    'The word, and with it all that was done before it was written.  PTX ISA, "ld", .acquire.',
)

pass_turns = instruction(
    "pass_turns",
    types.void,
    {"address": types.uint64, "count": types.int32},
    "fence.proxy.async; fence.acq_rel.gpu; red.release.gpu.global.add.s32 [$0], $1;",
    "l,r",
    'Add `count` to the word, after all that this thread has seen done.  PTX ISA, "red", .release.',
)

addition_seen = instruction(
    "addition_seen",
    types.int32,
    {"address": types.uint64},
    "ld.acquire.gpu.global.b32 $0, [$1]; fence.proxy.async.global;",
    "=r,l",
    "`word_seen` of who lets the copy engine add to global memory where others have: a fence of that memory "
    'alone is no barrier of the multiprocessor.  PTX ISA, "membar, fence", fence.proxy.async.global.',
)

pass_addition = instruction(
    "pass_addition",
    types.void,
    {"address": types.uint64},
    "red.release.gpu.global.add.s32 [$0], 1;",
    "l",
    "Add 1 behind `bulk.wait_added`: what the copy engine has done is done for this thread, without a fence "
    'between the proxies.  PTX ISA, "Async proxy": completion is followed by an implicit one.',
)

rest = instruction(
    "rest",
    types.void,
    {},
    "nanosleep.u32 256;",
    "",
    'Leave the multiprocessor to others for a quarter of a microsecond, more or less.  PTX ISA, "nanosleep".',
)

to_the_copy_engine = instruction(
    "to_the_copy_engine",
    types.void,
    {},
    "fence.proxy.async;",
    "",
    "Order what this thread stores, or has been told of, before what the copy engine reads.  "
    'PTX ISA, "membar, fence", fence.proxy.async.',
)

wait_for_turn = instruction(
    "wait_for_turn",
    types.void,
    {"address": types.uint64, "least": types.int32},
    "{ .reg .pred early; .reg .b32 seen; TURN${:uid}: ld.acquire.gpu.global.b32 seen, [$0]; "
    "setp.lt.s32 early, seen, $1; @early bra TURN${:uid}; bar.warp.sync 0xffffffff; }",
    "l,r",
    "Spin, a whole warp, until the word is at least `least`: each lane sees what was done before, if threads "
    'and not the copy engine did it.  PTX ISA, "ld", .acquire.',
)

pass_turn_of_warp = instruction(
    "pass_turn_of_warp",
    types.void,
    {"address": types.uint64, "lane": types.int32},
    "{ .reg .pred first; setp.eq.s32 first, $1, 0; bar.warp.sync 0xffffffff; "
    "@first red.release.gpu.global.add.s32 [$0], 1; }",
    "l,r",
    "Add 1 to the word, after all that a whole warp, of which this is lane `lane`, has done: causality goes "
    "through the warp's barrier, so one lane releases what all have added.  "
    'PTX ISA, "Memory Consistency Model", base causality order; "red", .release.',
)

take_number = instruction(
    "take_number",
    types.int32,
    {"address": types.uint64, "bound": types.int32},
    "atom.acq_rel.gpu.global.inc.u32 $0, [$1], $2;",
    "=r,l,r",
    "Increment the word, from `bound` to 0, after all that this thread has seen done; its old value, and "
    'with it all that was done before earlier numbers were taken.  PTX ISA, "atom", .inc, .acq_rel.',
)
