"""A small network trained on one device and by ZeRO on ranks: what they hold and send, beside the models."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from memsim.prices.collective import zero as priced
from memsim.zero import partitioned_memory
from refimpl.parallel.adam import AdamW
from refimpl.parallel.comm import Comm, Launch, Traffic
from refimpl.parallel.data import data_parallel
from refimpl.parallel.mixed_precision import LossScale, initial_state, optimizer_step
from refimpl.parallel.network import (
    Batch,
    Network,
    attention_network,
    initial_parameters,
    loss_and_gradients,
    parameter_count,
    split_units,
)
from refimpl.parallel.sharding import gather_vector, shard_vector
from refimpl.parallel.zero import zero_initial, zero_steps
from refimpl.parallel.zero_checkpoint import load_zero, save_zero
from refimpl.registry import Case

if TYPE_CHECKING:
    from refimpl.numerics import BoolArray, FloatArray, IntArray

__all__ = ["Experiment"]

# Of parameters in float64 after up to ten steps: ranks add in another order than one device.  What is rounded
# away adds up from step to step: two ranks differ by 9.5e-13 after 100 steps, and by 1.2e-12 after 200.
TOLERANCE, UP_TO = 1e-12, 10
_SENT = ("gradients", "parameters", "statistics")


@dataclass(frozen=True)
class Experiment:
    """What is trained: a causal attention model on random sequences that repeat, so that it can learn.

    Attributes
    ----------
    steps, micro, sequences : int
        Steps, micro-batches a step, and sequences of all ranks in each of those.
    seed : int
        Of parameters and tokens.
    """

    steps: int = 10
    micro: int = 1
    sequences: int = 11
    seed: int = 0
    vocabulary: int = 11
    optimizer: AdamW = field(default_factory=lambda: AdamW(lr=0.01, weight_decay=0.01))

    @cached_property
    def network(self) -> Network:
        """Four units, none of which divides by all numbers of ranks."""
        return attention_network(vocabulary=self.vocabulary, width=5, heads=2, head_width=3, blocks=2)

    @cached_property
    def start(self) -> FloatArray:
        """Initial parameters, float64."""
        return initial_parameters(self.network, np.random.default_rng(self.seed))

    @cached_property
    def sequences_of_a_step(self) -> tuple[IntArray, BoolArray]:
        """Tokens (micro, sequences, 5) and which predictions count, (micro, sequences, 4)."""
        rng = np.random.default_rng(self.seed + 1)
        tokens = rng.integers(0, self.vocabulary, (self.micro, self.sequences, 5))
        return tokens, rng.random((self.micro, self.sequences, 4)) < 0.8

    def dealt(self, ranks: int) -> tuple[IntArray, BoolArray]:
        """Return tokens and masks of all steps, dealt to ranks in turn; gaps are masked."""
        tokens, mask = self.sequences_of_a_step
        share = -(-self.sequences // ranks)

        def deal(x: Any) -> Any:
            whole = np.zeros((self.micro, share * ranks, x.shape[-1]), x.dtype)
            whole[:, : self.sequences] = x
            rows = whole.reshape(self.micro, share, ranks, x.shape[-1]).swapaxes(1, 2)
            return np.broadcast_to(rows, (self.steps, *rows.shape))

        return deal(tokens), deal(mask)

    @cached_property
    def on_one_device(self) -> FloatArray:
        """The parameters after all steps of plain Adam on whole batches."""
        tokens, mask = self.sequences_of_a_step
        batch = Batch(tokens.reshape(-1, tokens.shape[-1]), mask.reshape(-1, mask.shape[-1]))
        state = initial_state(self.start, LossScale(1.0))
        for _ in range(self.steps):
            gradients: dict[int, FloatArray] = {}
            units = split_units(self.network, state.master)
            loss_and_gradients(
                self.network,
                units.__getitem__,
                batch,
                1.0 / max(int(mask.sum()), 1),
                gradients.__setitem__,
            )
            whole = np.concatenate([gradients[index] for index in range(len(self.network))])
            state = optimizer_step(state, whole, optimizer=self.optimizer)
        return state.master

    @property
    def tolerance(self) -> float:
        """How far parameters of ranks may be from those of one device."""
        return TOLERANCE * max(1.0, self.steps / UP_TO)

    def run(
        self,
        ranks: int,
        stage: Any,
        launch: Launch,
        *,
        save: str | os.PathLike[str] | None = None,
        resume: str | os.PathLike[str] | None = None,
    ) -> dict[str, Any]:
        """Train on `ranks`, and return what came of it as a row: values, bytes held, bytes and messages sent.

        Parameters
        ----------
        ranks, stage : int
            How many ranks, and what they divide.
        launch : callable
            Starts the ranks.
        save, resume : path, optional
            Where the sharded states are saved after the last step, and from where training goes on.
        """
        tokens, mask = self.dealt(ranks)
        network, traffic = self.network, Traffic()

        def program(comm: Comm) -> tuple[list[FloatArray], FloatArray, int, int]:
            if resume is None:
                state = zero_initial(comm, network, self.start, stage=stage)
            else:
                state = load_zero(comm, resume, network, stage=stage)
            first = state.optimizer.step
            state, _, held = zero_steps(
                comm, network, state, tokens[first:], mask[first:], optimizer=self.optimizer
            )
            if save is not None:
                save_zero(comm, save, network, state)
            return state.parameters, state.optimizer.master, held, first

        results = launch(ranks, program, traffic=traffic)
        first = results[0][3]
        kept = [np.concatenate(parameters) for parameters, *_ in results]
        trained = [gather_vector(network, kept)] if stage == 3 else kept
        masters = gather_vector(network, [master for _, master, *_ in results])
        difference = max(float(np.max(np.abs(x - self.on_one_device))) for x in (*trained, masters))
        sizes = [unit.size for unit in network]
        memory = partitioned_memory(units=sizes, ranks=ranks, stage=stage, model_itemsize=8, state_itemsize=8)
        case = Case((self.start, tokens[first:], mask[first:]), {"network": network, "stage": stage})
        model = priced(case)
        counted = {
            name: [sum(getattr(traffic.sent(rank, phase), name) for phase in _SENT) for rank in range(ranks)]
            for name in ("bytes", "messages")
        }
        expected = {
            name: [model[f"rank {rank} {name}"] for rank in range(ranks)] for name in ("bytes", "messages")
        }
        held = [held for _, _, held, _ in results]
        owned = self._owned_once([len(master) for _, master, *_ in results])
        return {
            "ranks": ranks,
            "stage": stage,
            "steps": self.steps - first,
            "resumed_after": first,
            "difference": difference,
            "parameters": parameter_count(network),
            "owned_once": owned,
            "held_bytes": held,
            "model_held_bytes": [memory.total] * ranks,
            "sent_bytes": counted["bytes"],
            "model_sent_bytes": expected["bytes"],
            "sent_messages": counted["messages"],
            "model_sent_messages": expected["messages"],
            "over_data_parallel": self._over_data_parallel(ranks, launch, traffic, self.steps - first),
            "agrees": difference <= self.tolerance
            and owned == parameter_count(network)
            and (held == [memory.total] * ranks or first == self.steps)
            and counted == expected,
        }

    def _over_data_parallel(self, ranks: int, launch: Launch, sharded: Traffic, steps: int) -> float | None:
        """Return what rank 0 sent of gradients and parameters over what it sends in data parallelism."""
        tokens, mask = self.dealt(ranks)
        plain = Traffic()
        one = tokens[:1], mask[:1]  # every step sends the same
        data_parallel(self.start, *one, network=self.network, traffic=plain, launch=launch)
        ours, theirs = (
            sum(traffic.sent(0, phase).bytes for phase in ("gradients", "parameters"))
            for traffic in (sharded, plain)
        )
        return ours / (theirs * steps) if theirs * steps else None

    def _owned_once(self, lengths: Sequence[int]) -> int:
        """Return how many elements exactly one of the shards of these lengths holds."""
        names = np.arange(1.0, parameter_count(self.network) + 1)
        shards = [shard_vector(self.network, names, rank, len(lengths)) for rank in range(len(lengths))]
        if [len(shard) for shard in shards] != list(lengths):
            return 0
        owners = np.bincount(np.concatenate(shards).astype(int), minlength=len(names) + 1)
        return int(np.sum(owners[1:] == 1))
