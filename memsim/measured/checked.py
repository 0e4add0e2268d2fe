"""A measured number beside the predicted one.

>>> row = Checked("x", "a table", "2.0", "s", 2.5, 0.25, "held out", "a stack", "h200", "")
>>> row.published, row.predicted, row.fits
('2.0', 2.5, None)
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Checked"]


@dataclass(frozen=True, slots=True)
class Checked:
    """One measured number beside the predicted one.

    Attributes
    ----------
    id, source, published, unit : str
        Its name, where it stands, its digits and their unit.
    predicted, error : float
        In `unit`, and ``predicted / published - 1``; of less traffic than `hbm.toml` says, parts of that.
    use : {"calibration", "held out"}
        Whether efficiencies were fitted to it.
    stack, hardware, belongs : str
        What ran it, on what, and the set of rows that a bar is about.
    memory : float or None
        Bytes that the fullest rank is predicted to hold.
    fits : bool or None
        Whether they are there: it ran, so anything but True is wrong.
    """

    id: str
    source: str
    published: str
    unit: str
    predicted: float
    error: float
    use: str
    stack: str
    hardware: str
    belongs: str
    memory: float | None = None
    fits: bool | None = None
