"""What PyTorch adds to the algorithms that it runs, for `replay`: kernels between those of the sources.

>>> shape = AttentionShape(B=1, H=2, N=256, D=64)
>>> [kernel.name for kernel in pytorch_flash2_backward(shape, rows=128, columns=128)[0]][:3]
['contiguous dO', 'contiguous O', 'flash2 row sums']
"""

from __future__ import annotations

from memsim.cache.backward_schedules import flash2_backward, standard_backward
from memsim.cache.replay import Access, Block, Kernel
from memsim.cache.tile_schedules import AttentionShape, Schedule, rows_of, tiles_of

__all__ = ["pytorch_flash2_backward", "pytorch_flash2_split", "pytorch_standard_backward"]


def pytorch_flash2_backward(shape: AttentionShape, *, rows: int, columns: int, workers: int = 1) -> Schedule:
    """Return `flash2_backward` after copies of dO and O, made for inputs that lie [B, H, N, D].

    FlashAttention 2 has [B, N, H, D], and ``_flash_attention_backward`` of ATen's ``attention_backward.cu``
    makes ``grad_out`` and ``out`` contiguous in that order.
    """
    kernels, arrays = flash2_backward(shape, rows=rows, columns=columns, workers=workers)
    copies = [_streamed(f"contiguous {name}", (f"given {name}",), name, arrays[name]) for name in ("dO", "O")]
    return [*copies, *kernels], arrays | {f"given {name}": arrays[name] for name in ("dO", "O")}


def pytorch_flash2_split(
    shape: AttentionShape, *, rows: int, columns: int, splits: int, workers: int = 1
) -> Schedule:
    """Return FlashAttention 2 forward where there are too few tiles of queries: keys are split as well.

    ``flash_fwd_splitkv_kernel`` leaves O and the log-sum-exp of each part in fp32, of which
    ``flash_fwd_splitkv_combine_kernel`` makes the results.
    """
    N, Tk, width = shape.N, shape.keys, shape.D * shape.e
    tiles = tiles_of(Tk, columns)
    every = -(-len(tiles) // splits)
    parts, combined = [], []
    for queries in tiles_of(N, rows):
        for split in range(splits):
            for head in range(shape.heads):
                place = split * shape.heads + head
                moves = [rows_of("Q", head, N, queries, width)]
                for keys in reversed(tiles[split * every : (split + 1) * every]):
                    moves += [rows_of(name, head // shape.group, Tk, keys, width) for name in ("K", "V")]
                moves.append(rows_of("O parts", place, N, queries, 4 * shape.D, "write"))
                moves.append(rows_of("lse parts", place, N, queries, 4, "write"))
                parts.append(Block(tuple(moves)))
    for head in range(shape.heads):
        for queries in tiles_of(N, rows):
            moves = []
            for place in range(head, splits * shape.heads, shape.heads):
                moves.append(rows_of("O parts", place, N, queries, 4 * shape.D))
                moves.append(rows_of("lse parts", place, N, queries, 4))
            results = (
                rows_of("O", head, N, queries, width, "write"),
                rows_of("lse", head, N, queries, 4, "write"),
            )
            combined.append(Block((*moves, *results)))
    arrays = shape.arrays(("Q", "O"), ("K", "V"), ("lse",))
    arrays |= {"O parts": splits * shape.heads * N * shape.D * 4, "lse parts": splits * shape.heads * N * 4}
    named = (("flash2 split", parts), ("flash2 combine", combined))
    return [Kernel(name, tuple(blocks), workers) for name, blocks in named], arrays


def pytorch_standard_backward(shape: AttentionShape, *, rows: int, workers: int = 1) -> Schedule:
    """Return `standard_backward` with a product P dP in memory, from which and P the gradient of S is made.

    ``softmax_backward_cuda_out`` of ATen's ``SoftMax.cu`` has ``grad * output`` computed by a kernel of its
    own.
    """
    kernels, arrays = standard_backward(shape, rows=rows, workers=workers)
    product = _streamed("P dP", ("dP", "P"), "P dP", arrays["P"])
    found: list[Kernel] = []
    for kernel in kernels:
        if kernel.name == "dS = softmax'(dP)":
            found += [product, _renamed(kernel, "dP", "P dP")]
        else:
            found.append(kernel)
    return found, arrays | {"P dP": arrays["P"]}


def _streamed(name: str, sources: tuple[str, ...], target: str, size: int, piece: int = 1 << 18) -> Kernel:
    """Return a kernel that goes once through arrays of one size."""
    blocks = []
    for start in range(0, size, piece):
        here = start, min(piece, size - start)
        reads = (Access(source, *here) for source in sources)
        blocks.append(Block((*reads, Access(target, *here, "write"))))
    return Kernel(name, tuple(blocks))


def _renamed(kernel: Kernel, old: str, new: str) -> Kernel:
    """Return a kernel that reads another array of the same size."""
    return kernel._replace(
        blocks=tuple(
            Block(tuple(a._replace(array=new) if a.array == old else a for a in block.accesses))
            for block in kernel.blocks
        )
    )
