"""Kernels that were timed beside what their card's calibration says of them, as rows of `frugal validate`.

>>> found = {row.id: row for row in kernel_rows()}
>>> row = found["calibration.h200.attention.8x16x4096x64"]
>>> row.published, row.unit, row.use, abs(row.error) < 0.01
('0.6266', 'ms', 'held out', True)
"""

from __future__ import annotations

from memsim.kernel_times import KERNELS
from memsim.measured.calibration import calibrations
from memsim.measured.checked import Checked

__all__ = ["kernel_rows"]


def kernel_rows() -> list[Checked]:
    """Return all kernels of the calibrations that memsim ships with; no bar is about them."""
    rows = []
    for found in calibrations():
        for row in found.rows:
            sizes = "x".join(str(row[name]) for name in KERNELS[row["kind"]].sizes)
            rows.append(
                Checked(
                    id=f"calibration.{found.hardware}.{row['kind']}.{sizes}",
                    source=f"measured here, `frugal calibrate`, {found.date}",
                    published=f"{1e3 * row['seconds']:.4g}",
                    unit="ms",
                    predicted=1e3 * row["predicted_s"],
                    error=row["error"],
                    use=row["use"],
                    stack=f"calibrated {row['kind']}",
                    hardware=found.hardware,
                    belongs="",
                )
            )
    return rows
