"""What PyTorch adds to the algorithms that it runs, for `replay`: kernels between those of the sources.

>>> shape = AttentionShape(B=1, H=2, N=256, D=64)
>>> [kernel.name for kernel in pytorch_flash2_backward(shape, rows=128, columns=128)[0]][:3]
['contiguous dO', 'contiguous O', 'flash2 row sums']
"""

from __future__ import annotations

from memsim.cache.backward_schedules import flash2_backward, standard_backward
from memsim.cache.replay import Access, Block, Kernel
from memsim.cache.tile_schedules import AttentionShape, Schedule

__all__ = ["pytorch_flash2_backward", "pytorch_standard_backward"]


def pytorch_flash2_backward(shape: AttentionShape, *, rows: int, columns: int, workers: int = 1) -> Schedule:
    """Return `flash2_backward` after copies of dO and O, made for inputs that lie [B, H, N, D].

    FlashAttention 2 has [B, N, H, D], and ``_flash_attention_backward`` of ATen's ``attention_backward.cu``
    makes ``grad_out`` and ``out`` contiguous in that order.
    """
    kernels, arrays = flash2_backward(shape, rows=rows, columns=columns, workers=workers)
    copies = [_streamed(f"contiguous {name}", (f"given {name}",), name, arrays[name]) for name in ("dO", "O")]
    return [*copies, *kernels], arrays | {f"given {name}": arrays[name] for name in ("dO", "O")}


def pytorch_standard_backward(shape: AttentionShape, *, rows: int, workers: int = 1) -> Schedule:
    """Return `standard_backward` with a product P dP in memory, from which and P the gradient of S is made.

    ``softmax_backward_cuda_out`` of ATen's ``SoftMax.cu`` multiplies ``grad * output`` in a kernel of its own.
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


def _streamed(name: str, sources: tuple[str, ...], target: str, size: int, piece: int = 1 << 15) -> Kernel:
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
