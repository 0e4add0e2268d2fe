"""A small decoder trained on one device and on a mesh of ranks: what they hold and send; the models."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from memsim.pipeline import pipeline_in_flight
from memsim.prices.mesh import mesh_phases, rank_sizes
from memsim.zero import partitioned_memory
from refimpl.parallel.adam import AdamW
from refimpl.parallel.comm import Launch, Sent, Traffic
from refimpl.parallel.decoder_stages import decoder_params, decoder_vector
from refimpl.parallel.mesh import Mesh
from refimpl.parallel.mesh_training import MeshTraining, mesh_training
from refimpl.parallel.mixed_precision import LossScale, initial_state, optimizer_step
from refimpl.parallel.mixture import MixtureConfig, model_shapes
from refimpl.parallel.network import cross_entropy
from refimpl.registry import Case
from refimpl.transformer.config import DecoderConfig, initial_decoder
from refimpl.transformer.model import decoder_logits, decoder_logits_vjp

if TYPE_CHECKING:
    from refimpl.numerics import BoolArray, FloatArray, IntArray

__all__ = ["TOLERANCE", "MeshExperiment"]

TOLERANCE = 1e-10  # of parameters in float64: Adam turns rounding of a gradient near 0 into part of a step


@dataclass(frozen=True)
class MeshExperiment:
    """What is trained: a decoder with a tied table, rotary positions, and gated layers or mixtures of them.

    Attributes
    ----------
    steps, sequences, length : int
        Steps, and sequences of a step, on all ranks together, of so many tokens.
    seed : int
        Of parameters and tokens.
    experts : int
        Of each layer, of which a token goes to 2; 0: feed-forward layers are no mixtures.
    """

    steps: int = 10
    sequences: int = 12
    length: int = 8
    seed: int = 0
    experts: int = 0
    optimizer: AdamW = field(default_factory=lambda: AdamW(lr=0.01, weight_decay=0.01))

    @cached_property
    def config(self) -> DecoderConfig:
        """Four layers; heads, hidden units and vocabulary divide by 4."""
        sizes: dict[str, Any] = {"vocabulary": 32, "width": 16, "layers": 4, "num_heads": 4, "hidden": 24}
        if self.experts:
            return MixtureConfig(**sizes, experts=self.experts, k=min(2, self.experts))
        return DecoderConfig(**sizes)

    @cached_property
    def start(self) -> FloatArray:
        """Initial parameters, float64: matrices normal with variance 1 / rows, gains 1."""
        rng = np.random.default_rng(self.seed)
        if not self.experts:
            return decoder_vector(self.config, initial_decoder(self.config, rng))
        return np.concatenate(
            [
                np.ones(shape) if len(shape) == 1 else rng.standard_normal(shape).ravel() / shape[-2] ** 0.5
                for shape in model_shapes(self.config).values()
            ]
        )

    @cached_property
    def batch(self) -> tuple[IntArray, BoolArray]:
        """Tokens of a step (sequences, length + 1), the same in every step, and which predictions count."""
        rng = np.random.default_rng(self.seed + 1)
        tokens = rng.integers(0, self.config.vocabulary, (self.sequences, self.length + 1))
        return tokens, rng.random((self.sequences, self.length)) < 0.8

    def dealt(self, micro: int, data: int) -> tuple[IntArray, BoolArray]:
        """Return tokens and masks of all steps, dealt to micro-batches and ranks; gaps are masked."""
        share = -(-self.sequences // (micro * data))

        def deal(x: Any) -> Any:
            whole = np.zeros((micro * data * share, x.shape[1]), x.dtype)
            whole[: len(x)] = x
            return np.broadcast_to(
                whole.reshape(micro, data, share, -1), (self.steps, micro, data, share, x.shape[1])
            )

        tokens, mask = self.batch
        return deal(tokens), deal(mask)

    @cached_property
    def on_one_device(self) -> tuple[FloatArray, list[float]]:
        """Parameters and losses after all steps of plain AdamW on whole batches; of mixtures, on one rank."""
        tokens, mask = self.batch
        if self.experts:
            alone = mesh_training(
                self.start, *self.dealt(1, 1), config=self.config, mesh=Mesh(), optimizer=self.optimizer
            )
            return alone.parameters, alone.losses.tolist()
        counted = max(int(mask.sum()), 1)
        state, losses = initial_state(self.start, LossScale(1.0)), []
        for _ in range(self.steps):
            params = decoder_params(self.config, state.master)
            logits = decoder_logits(params, tokens[:, :-1], config=self.config)
            loss, dlogits = cross_entropy(logits, tokens[:, 1:], mask)
            gradients = decoder_logits_vjp(params, tokens[:, :-1], dlogits / counted, config=self.config)
            gradient = decoder_vector(self.config, gradients)
            state = optimizer_step(state, gradient, optimizer=self.optimizer)
            losses.append(loss / counted)
        return state.master, losses

    def run(self, mesh: Mesh, launch: Launch, *, micro: int, **options: Any) -> list[dict[str, Any]]:
        """Train on a mesh; return a row for each label under which ranks sent something.

        Parameters
        ----------
        mesh : Mesh
            The ranks.
        launch : callable
            Starts them.
        micro : int
            Micro-batches of a step on each data-parallel rank.
        **options
            ``stage``, ``schedule``, ``chunks``, ``recompute``, ``sequence_parallel`` of `mesh_training`.
        """
        traffic = Traffic()
        arrays = (self.start, *self.dealt(micro, mesh.data))
        case = Case(arrays, {"config": self.config, "mesh": mesh, **options})
        settings: dict[str, Any] = {"optimizer": self.optimizer, "traffic": traffic, "launch": launch}
        trained: MeshTraining = case.replace(**settings).call(mesh_training)
        expected, losses = self.on_one_device
        difference = float(np.max(np.abs(trained.parameters - expected)))
        held = [self._held(mesh, rank, options) for rank in range(mesh.size)]
        in_flight = [
            int(
                pipeline_in_flight(
                    schedule=options["schedule"],
                    ranks=mesh.pipeline,
                    micro_batches=micro,
                    chunks=options["chunks"],
                    rank=mesh.place(rank).pipeline,
                ).total
            )
            for rank in range(mesh.size)
        ]
        model = mesh_phases(case)
        summary: dict[str, Any] = {
            **mesh._asdict(),
            "ranks": mesh.size,
            "micro_batches": micro,
            **options,
            "steps": self.steps,
            "difference": difference,
            "copies_differ": float(trained.spread),
            "first_loss": losses[0],
            "last_loss": losses[-1],
            "held_bytes": trained.held_bytes.tolist(),
            "model_held_bytes": held,
            "one_device_bytes": 5 * self.start.nbytes,
            "in_flight": trained.in_flight.tolist(),
            "model_in_flight": in_flight,
        }
        agrees = (
            difference <= TOLERANCE
            and not summary["copies_differ"]
            and summary["held_bytes"] == held
            and summary["in_flight"] == in_flight
            and np.allclose(trained.losses, losses, rtol=0, atol=TOLERANCE)
        )
        rows = []
        labels = {*traffic.phases, *(name for phases in model for name in phases)}
        for label in sorted(labels) or ["none"]:  # one rank alone sends nothing
            counted = [traffic.sent(rank, label) for rank in range(mesh.size)]
            priced = [phases.get(label, Sent(0, 0)) for phases in model]
            row = {
                "collective": label,
                "sent_bytes": [sent.bytes for sent in counted],
                "model_sent_bytes": [sent.bytes for sent in priced],
                "sent_messages": [sent.messages for sent in counted],
                "model_sent_messages": [sent.messages for sent in priced],
            }
            rows.append({**summary, **row, "agrees": bool(agrees and counted == priced)})
        return rows

    def _held(self, mesh: Mesh, rank: int, options: dict[str, Any]) -> int:
        """Return the bytes of model states that a rank holds by the formula of ZeRO, of its own units."""
        sizes = rank_sizes(self.config, mesh, options["chunks"], mesh.place(rank).pipeline)
        total = 0
        for owners, experts in ((mesh.data, False), (1, True)):  # an expert is one rank's alone
            units = [size for key, (size, _) in sizes.items() if key.endswith("experts") == experts]
            if units:
                memory = partitioned_memory(
                    units=units, ranks=owners, stage=options["stage"], model_itemsize=8, state_itemsize=8
                )
                total += int(memory.total)
        return total
