"""Copies from global to shared memory that a thread starts and does not wait for, in groups.

A thread waits for its own copies; what other lanes have copied it sees behind a barrier.

Source: PTX ISA 8.7, "Data Movement and Conversion Instructions: cp.async", "cp.async.commit_group",
"cp.async.wait_group".
"""

from __future__ import annotations

from cuda_backend.ptx.assembly import Intrinsic, instruction, types

__all__ = ["commit", "copy_16", "wait"]


def copy_16(ahead: int = 0) -> Intrinsic:
    """Return ``copy_16(target, source, size)``: `size` bytes, 16 or 0, and zeros to the sixteenth.

    They pass by the L1 cache; `ahead` bytes, 64, 128 or 256, around the source may come to the L2 cache.
    """
    hint = f".L2::{ahead}B" if ahead else ""
    return instruction(
        f"copy_16_{ahead}",
        types.void,
        {"target": types.uint32, "source": types.uint64, "size": types.int32},
        f"cp.async.cg.shared.global{hint} [$0], [$1], 16, $2;",
        "r,l,r",
        'Start one copy.  PTX ISA, "cp.async".',
    )


commit = instruction(
    "commit",
    types.void,
    {},
    "cp.async.commit_group;",
    "",
    'Close the group of what this thread has started, be it nothing.  PTX ISA, "cp.async.commit_group".',
)


def wait(running: int) -> Intrinsic:
    """Return what waits until at most the newest `running` groups of this thread are still under way."""
    doc = 'PTX ISA, "cp.async.wait_group".'
    return instruction("wait", types.void, {}, f"cp.async.wait_group {running};", "", doc)
