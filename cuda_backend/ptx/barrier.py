"""mbarriers: how a producer and its consumers hand stages of shared memory to each other.

A barrier is eight bytes of shared memory, named by its 32-bit shared address. A *full* barrier completes a
phase when the bytes announced by `expect_bytes` have arrived; an *empty* one when every consumer warp has
called `arrive`. Phases alternate parity 0, 1, 0, ...; waiting for parity 1 on a fresh barrier returns at
once, which is how a producer finds all stages empty at the start.

Source: PTX ISA 8.7, "Parallel Synchronization and Communication Instructions: mbarrier".
"""

from __future__ import annotations

from cuda_backend.ptx.assembly import Intrinsic, instruction, types

__all__ = [
    "arrive",
    "arrive_warp",
    "expect_bytes",
    "give_turn",
    "initialise",
    "meet_warp",
    "named",
    "publish_initialisation",
    "publish_stores",
    "take_turn",
    "wait",
    "warp",
]

_BARRIER = {"barrier": types.uint32}

initialise = instruction(
    "initialise",
    types.void,
    {**_BARRIER, "arrivals": types.uint32},
    "mbarrier.init.shared::cta.b64 [$0], $1;",
    "r,r",
    'A phase completes after `arrivals` arrivals.  PTX ISA, "mbarrier.init".',
)

publish_initialisation = instruction(
    "publish_initialisation",
    types.void,
    {},
    "fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;",
    "",
    "Let the copy engine see initialised barriers; a block barrier must follow for the other threads.  "
    'PTX ISA, "membar, fence".',
)

publish_stores = instruction(
    "publish_stores",
    types.void,
    {},
    "fence.proxy.async.shared::cta;",
    "",
    "Let tensor cores and the copy engine see what this thread has stored in shared memory, once a barrier "
    'tells them of it.  PTX ISA, "membar, fence", fence.proxy.async.',
)

expect_bytes = instruction(
    "expect_bytes",
    types.void,
    {**_BARRIER, "count": types.uint32},
    "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;",
    "r,r",
    'Arrive once, and announce `count` bytes.  PTX ISA, "mbarrier.arrive", .expect_tx.',
)

arrive = instruction(
    "arrive",
    types.void,
    _BARRIER,
    "mbarrier.arrive.shared::cta.b64 _, [$0];",
    "r",
    'Arrive once, with release semantics in the block.  PTX ISA, "mbarrier.arrive".',
)

arrive_warp = instruction(
    "arrive_warp",
    types.void,
    {**_BARRIER, "lane": types.int32},
    "{ .reg .pred first; setp.eq.s32 first, $1, 0; bar.warp.sync 0xffffffff; "
    "@first mbarrier.arrive.shared::cta.b64 _, [$0]; }",
    "r,r",
    'A whole warp, of which this is lane `lane`, arrives once.  PTX ISA, "mbarrier.arrive", "bar.warp.sync".',
)

meet_warp = instruction(
    "meet_warp",
    types.void,
    {},
    "bar.warp.sync 0xffffffff;",
    "",
    'The lanes of a warp wait for each other, and see what each has done.  PTX ISA, "bar.warp.sync".',
)

wait = instruction(
    "wait",
    types.void,
    {**_BARRIER, "parity": types.uint32},
    "{ .reg .pred done; WAIT${:uid}: "
    "mbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1; "
    "@!done bra WAIT${:uid}; }",
    "r,r",
    "Spin until the phase of this parity has completed.  The loop ends a basic block for ptxas, so what is "
    'computed before it does not sink below.  PTX ISA, "mbarrier.try_wait".',
)

warp = instruction(
    "warp",
    types.void,
    {},
    "bar.warp.sync 0xffffffff;",
    "",
    'The lanes of a warp meet, and see what each has stored.  PTX ISA, "bar.warp.sync".',
)


def named(number: int, threads: int) -> Intrinsic:
    """Return barrier `number`, 1 to 15, of `threads` threads of a block in whole warps."""
    doc = 'Orders their memory accesses, too.  PTX ISA, "bar".'
    return instruction("named", types.void, {}, f"bar.sync {number}, {threads};", "", doc)


take_turn = instruction(
    "take_turn",
    types.void,
    {"number": types.int32},
    "bar.sync $0, 256;",
    "r",
    'A warpgroup waits until another has given it turn `number`, 1 to 15.  PTX ISA, "bar.sync".',
)

give_turn = instruction(
    "give_turn",
    types.void,
    {"number": types.int32},
    "bar.arrive $0, 256;",
    "r",
    'A warpgroup gives another turn `number`, and goes on.  PTX ISA, "bar.arrive".',
)
