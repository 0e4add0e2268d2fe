"""All measurements of memsim on this machine's GPU in one run: ``python -m tests.cuda.measure FOLDER``.

FOLDER gets dated files of counted traffic, of peak memory and of a calibration; put into
``memsim/data/measured`` they are rows of `frugal validate`.  It needs PyTorch, and Nsight Compute (``ncu``)
that may read the hardware counters.  What fails says so, and the rest goes on; the exit code is 1 then.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from memsim.measured.nsight import METRICS
from tests.cuda.need_gpu import need_arguments, need_gpu

PYTHON = [sys.executable, "-m"]


def _profiled(folder: Path, cache: str) -> list[str]:
    control = {"cold": "all", "warm": "none"}[cache]
    return [
        "ncu", "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none",
        "--cache-control", control, "--profile-from-start", "off", "--metrics",
        ",".join(metric for metrics in METRICS.values() for metric in metrics),
        "--log-file", str(folder / f"ncu-{cache}.csv"),
        *PYTHON, "tests.cuda.measure_traffic", "run", str(folder / "traffic.json"),
    ]  # fmt: skip


def main(folder: Path) -> int:
    """Measure, and return how many steps failed."""
    folder.mkdir(parents=True, exist_ok=True)
    steps = {
        "counted traffic, cold caches": _profiled(folder, "cold"),
        "counted traffic, warm caches": _profiled(folder, "warm"),
        "file of counted traffic": [
            *PYTHON, "tests.cuda.measure_traffic", "write",
            *(str(folder / name) for name in ("traffic.json", "ncu-cold.csv", "ncu-warm.csv")), str(folder),
        ],
        "peak memory": [*PYTHON, "tests.cuda.measure_memory", str(folder)],
        "calibration": [*PYTHON, "cli.main", "calibrate", "--folder", str(folder)],
    }  # fmt: skip
    failed = 0
    for name, command in steps.items():
        sys.stdout.write(f"{name}\n")
        sys.stdout.flush()
        try:
            code = subprocess.run(command, check=False).returncode
        except OSError as error:
            sys.stdout.write(f"{error}\n")
            code = 1
        failed += code != 0
    return failed


if __name__ == "__main__":
    (named,) = need_arguments("FOLDER")
    need_gpu()
    sys.exit(int(main(Path(named)) > 0))
