"""Saving sharded training states, and resuming them on another number of ranks.

Every rank writes its own shard, so nothing is ever gathered to save.  The folder appears under its name only
when all shards are written: a run that dies while saving leaves no folder that looks complete.
"""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from refimpl.errors import OptionError, ShapeError
from refimpl.numerics import round_to
from refimpl.parallel.collectives import ring_all_reduce
from refimpl.parallel.comm import Comm
from refimpl.parallel.mixed_precision import LossScale, OptimizerState
from refimpl.parallel.network import Network
from refimpl.parallel.sharding import gather_vector, shard_vector
from refimpl.parallel.zero import ZeroState, zero_initial

__all__ = ["load_zero", "save_zero"]

_VECTORS = ("master", "momentum", "variance")


def save_zero(comm: Comm, folder: str | os.PathLike[str], network: Network, state: ZeroState) -> None:
    """Write this rank's part of the states into `folder`, together with the other ranks.

    Parameters
    ----------
    comm : Comm
        This rank.
    folder : path
        Must not exist; its parent must, and be the same for all ranks.
    network : sequence of Unit
        What is trained.
    state : ZeroState
        This rank's part.  The low-precision parameters are not written: they are the master copy, rounded.

    Raises
    ------
    OptionError
        If `folder` exists.
    OSError
        If a shard cannot be written; `folder` does not exist then.
    """
    target = Path(folder)
    partial = target.with_name(target.name + ".partial")
    if target.exists():
        raise OptionError(f"folder: expected a new one; {target} exists")
    _barrier(comm)
    if comm.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that died while saving
        partial.mkdir()
    _barrier(comm)
    optimizer = state.optimizer
    np.savez(
        partial / f"rank-{comm.rank}.npz",
        sizes=np.array([unit.size for unit in network]),
        ranks=comm.size,
        step=optimizer.step,
        loss_scale=np.array(optimizer.loss_scale, np.float64),
        **{name: getattr(optimizer, name) for name in _VECTORS},
    )
    _barrier(comm)  # all shards are written before the name appears, and it has before anyone returns
    if comm.rank == 0:
        partial.replace(target)
    _barrier(comm)


def load_zero(
    comm: Comm,
    folder: str | os.PathLike[str],
    network: Network,
    *,
    stage: int,
    model_dtype: npt.DTypeLike | None = None,
) -> ZeroState:
    """Return this rank's part of states that any number of ranks saved, in any stage.

    Parameters
    ----------
    comm : Comm
        This rank.
    folder : path
        What `save_zero` wrote.
    network : sequence of Unit
        What is trained; units as long as those saved.
    stage : {1, 2, 3}
        How to go on, whatever the stage was.
    model_dtype : dtype, optional
        Format of the model.  Default: that of the master copy.

    Returns
    -------
    ZeroState
        Bit for bit what was saved, cut for this number of ranks.

    Raises
    ------
    OptionError
        If `folder` or one of its shards is missing or damaged.
    ShapeError
        If the units have other lengths.
    """
    first = _read(Path(folder), 0)
    sizes = [unit.size for unit in network]
    if first["sizes"].tolist() != sizes:
        raise ShapeError(f"network: expected units of {first['sizes'].tolist()} parameters, got {sizes}")
    saved = [_read(Path(folder), rank) for rank in range(int(first["ranks"]))]
    whole = {name: gather_vector(network, [shard[name] for shard in saved]) for name in _VECTORS}
    scale, good_steps = first["loss_scale"].tolist()
    dtype = whole["master"].dtype if model_dtype is None else np.dtype(model_dtype)
    state = zero_initial(comm, network, round_to(whole["master"], dtype), stage=stage)
    shards = {name: shard_vector(network, vector, comm.rank, comm.size) for name, vector in whole.items()}
    optimizer = OptimizerState(
        **shards, step=int(first["step"]), loss_scale=LossScale(scale, int(good_steps))
    )
    return state._replace(optimizer=optimizer)


def _read(folder: Path, rank: int) -> dict[str, npt.NDArray[np.float64]]:
    path = folder / f"rank-{rank}.npz"
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except FileNotFoundError:
        raise OptionError(f"folder: expected saved states of rank {rank}; {folder} has none") from None
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise OptionError(f"folder: {path} holds no saved states: {error}") from None


def _barrier(comm: Comm) -> None:
    """Return once every rank is here."""
    with comm.phase("checkpoint"):
        ring_all_reduce(comm, np.zeros(1))
