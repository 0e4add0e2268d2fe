"""State space models: Mamba's selective scan, in its forms, and the block made of it."""

from refimpl.ssm.chunked_vjp import selective_scan_chunked_vjp
from refimpl.ssm.mamba_block import (
    MambaOutput,
    mamba_block,
    mamba_block_chunked,
    mamba_block_step,
    mamba_block_vjp,
)
from refimpl.ssm.recurrence import Step, associative_scan, combine
from refimpl.ssm.scan_forms import selective_scan_associative, selective_scan_chunked
from refimpl.ssm.selective_scan import ScanOutput, selective_scan, selective_scan_step
from refimpl.ssm.selective_scan_vjp import ScanGradients, selective_scan_vjp

__all__ = [
    "MambaOutput",
    "ScanGradients",
    "ScanOutput",
    "Step",
    "associative_scan",
    "combine",
    "mamba_block",
    "mamba_block_chunked",
    "mamba_block_step",
    "mamba_block_vjp",
    "selective_scan",
    "selective_scan_associative",
    "selective_scan_chunked",
    "selective_scan_chunked_vjp",
    "selective_scan_step",
    "selective_scan_vjp",
]
