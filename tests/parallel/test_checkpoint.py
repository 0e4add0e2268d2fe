"""Sharded states that are saved by some ranks and resumed by others: the same bits, whole or not at all."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refimpl.errors import OptionError, ShapeError
from refimpl.parallel import AdamW, Batch, LossScale, run_ranks, zero_initial, zero_step
from refimpl.parallel.sharding import gather_vector
from refimpl.parallel.zero import ZeroState
from refimpl.parallel.zero_checkpoint import load_zero, save_zero
from tests.parallel.runs import NETWORK, run_of

ROOT = Path(__file__).resolve().parents[2]
KILLED = """
import os, signal, sys
import numpy as np
from refimpl.parallel import run_ranks, zero_initial
from refimpl.parallel.zero_checkpoint import save_zero
from tests.parallel.runs import NETWORK, run_of

start, folder, moment = run_of(1, steps=1)[0], sys.argv[1], sys.argv[2]
write = np.savez

def killed(path, **arrays):
    if "rank-1" in str(path):
        with open(path, "wb") as half:
            half.write(b"PK" * 100 if moment == "writing" else b"")
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, **arrays)

np.savez = killed
run_ranks(3, lambda comm: save_zero(comm, folder, NETWORK, zero_initial(comm, NETWORK, start, stage=1)))
"""


def trained(comm: Any, state: ZeroState, steps: range, arrays: tuple[Any, Any, Any]) -> ZeroState:
    """Go on training on `comm.size` ranks with the sequences dealt anew."""
    _, tokens, mask = arrays
    for step in steps:
        words, counts = (x[step].reshape(-1, x.shape[-1])[comm.rank :: comm.size] for x in (tokens, mask))
        state, *_ = zero_step(comm, NETWORK, state, [Batch(words, counts)], optimizer=AdamW(lr=0.01))
    return state


@pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 7), (4, 1), (1, 3)])
def test_resuming_on_another_number_of_ranks(tmp_path: Path, before: int, after: int) -> None:
    arrays = run_of(6, steps=6)

    def first(comm: Any) -> None:
        state = trained(comm, zero_initial(comm, NETWORK, arrays[0], stage=2), range(3), arrays)
        save_zero(comm, tmp_path / "states", NETWORK, state)

    def second(comm: Any) -> Any:
        state = load_zero(comm, tmp_path / "states", NETWORK, stage=3)
        assert state.optimizer.step == 3
        return trained(comm, state, range(3, 6), arrays).optimizer.master

    def uninterrupted(comm: Any) -> Any:
        return trained(
            comm, zero_initial(comm, NETWORK, arrays[0], stage=1), range(6), arrays
        ).optimizer.master

    run_ranks(before, first)
    (expected,) = run_ranks(1, uninterrupted)
    np.testing.assert_allclose(gather_vector(NETWORK, run_ranks(after, second)), expected, rtol=0, atol=1e-12)


def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    arrays = run_of(3, steps=2)

    def save(comm: Any) -> Any:
        state = zero_initial(comm, NETWORK, arrays[0], stage=2, loss_scale=LossScale(8.0, 3))
        state = trained(comm, state, range(2), arrays)
        save_zero(comm, tmp_path / "states", NETWORK, state)
        return state

    saved = run_ranks(3, save)
    loaded = run_ranks(3, lambda comm: load_zero(comm, tmp_path / "states", NETWORK, stage=2))
    for a, b in zip(saved, loaded, strict=True):
        assert a.optimizer[3:] == b.optimizer[3:] == (2, LossScale(8.0, 5))
        for x, y in zip([*a.parameters, *a.optimizer[:3]], [*b.parameters, *b.optimizer[:3]], strict=True):
            np.testing.assert_array_equal(x, y)


def test_states_are_saved_whole_or_not_at_all(tmp_path: Path) -> None:
    start = run_of(1, steps=1)[0]
    target = tmp_path / "states"

    def dies(comm: Any) -> None:
        state = zero_initial(comm, NETWORK, start, stage=1)
        if comm.rank == 1:  # it cannot write its shard
            state = state._replace(optimizer=None)  # type: ignore[arg-type]
        save_zero(comm, target, NETWORK, state)

    with pytest.raises(AttributeError):
        run_ranks(3, dies)
    assert not target.exists()

    def saves(comm: Any) -> None:
        save_zero(comm, target, NETWORK, zero_initial(comm, NETWORK, start, stage=1))

    run_ranks(3, saves)
    assert [path.name for path in tmp_path.iterdir()] == ["states"]
    with pytest.raises(OptionError, match="exists"):
        run_ranks(3, saves)


def test_what_loading_refuses(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="saved states of rank 0"):
        run_ranks(1, lambda comm: load_zero(comm, tmp_path / "none", NETWORK, stage=1))
    start = run_of(1, steps=1)[0]
    run_ranks(
        2, lambda comm: save_zero(comm, tmp_path / "s", NETWORK, zero_initial(comm, NETWORK, start, stage=1))
    )
    with pytest.raises(ShapeError, match="units of"):
        run_ranks(1, lambda comm: load_zero(comm, tmp_path / "s", NETWORK[:2], stage=1))
    (tmp_path / "s" / "rank-1.npz").unlink()
    with pytest.raises(OptionError, match="saved states of rank 1"):
        run_ranks(1, lambda comm: load_zero(comm, tmp_path / "s", NETWORK, stage=1))


@pytest.mark.parametrize("moment", ["opening", "writing"])
def test_a_process_killed_while_it_saves_leaves_nothing_that_looks_saved(tmp_path: Path, moment: str) -> None:
    target = tmp_path / "states"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(target), moment], cwd=ROOT, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["states.partial"]
    with pytest.raises(OptionError, match="saved states of rank 0"):
        run_ranks(2, lambda comm: load_zero(comm, target, NETWORK, stage=2))
    start = run_of(1, steps=1)[0]
    run_ranks(2, lambda comm: save_zero(comm, target, NETWORK, zero_initial(comm, NETWORK, start, stage=2)))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["rank-0.npz", "rank-1.npz", "states"]
    states = run_ranks(3, lambda comm: load_zero(comm, target, NETWORK, stage=3))
    masters = [state.optimizer.master for state in states]
    np.testing.assert_array_equal(gather_vector(NETWORK, masters), start)


def test_a_damaged_shard_is_one_clear_error(tmp_path: Path) -> None:
    start = run_of(1, steps=1)[0]
    target = tmp_path / "states"
    run_ranks(1, lambda comm: save_zero(comm, target, NETWORK, zero_initial(comm, NETWORK, start, stage=1)))
    shard = target / "rank-0.npz"
    for damaged in (b"", shard.read_bytes()[:200]):
        shard.write_bytes(damaged)
        with pytest.raises(OptionError, match=r"rank-0\.npz holds no saved states"):
            run_ranks(1, lambda comm: load_zero(comm, target, NETWORK, stage=1))
