"""Blocks that take turns, or numbers: a word in global memory says whose turn it is, or how many came.

What a block has done before `pass_turn` is seen by the one that `word_seen` has told of it, what the copy
engine has done included: for it stands the fence between the proxies.  What other threads of the block have
done counts if a barrier of the block lies between, and they see what the thread has been told behind another.

Source: PTX ISA 8.7, "Memory Consistency Model", "Data Movement and Conversion Instructions: ld", "red",
"atom", "membar, fence".
"""

from __future__ import annotations

from cuda_backend.ptx.assembly import instruction, types

__all__ = ["pass_turn", "take_number", "word_seen"]

word_seen = instruction(
    "word_seen",
    types.int32,
    {"address": types.uint64},
    "ld.acquire.gpu.global.b32 $0, [$1]; fence.proxy.async;",
    "=r,l",
    'The word, and with it all that was done before it was written.  PTX ISA, "ld", .acquire.',
)

pass_turn = instruction(
    "pass_turn",
    types.void,
    {"address": types.uint64},
    "fence.proxy.async; fence.acq_rel.gpu; red.release.gpu.global.add.s32 [$0], 1;",
    "l",
    'Add 1 to the word, after all that this thread has seen done.  PTX ISA, "red", .release.',
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
