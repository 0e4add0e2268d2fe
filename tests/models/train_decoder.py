"""Train the two decoders of this folder: ``python -m tests.models.train_decoder [decoder|draft]``.

Next-token loss on bytes of `corpus.txt`, gradients written out in `refimpl.transformer`, AdamW of
`refimpl.parallel`.  The last tenth of the text is held out.  Everything follows from the seed.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from refimpl.numerics import FloatArray, IntArray
from refimpl.objectives.language_modeling import next_token_loss, next_token_loss_vjp
from refimpl.parallel import AdamW, adamw_step
from refimpl.safetensors_format import write_tensors
from refimpl.transformer import DecoderConfig, decoder_logits, decoder_logits_vjp, initial_decoder
from tests.models.decoders import CONFIGS, HERE

SEED = 7
# Windows longer than what the tests generate: rotary positions never seen are predicted badly.
BATCH, LENGTH = 4, 288
STEPS = {"decoder": 260, "draft": 700}
PEAK_RATE = 6e-3
WARM_UP = 30
MAX_NORM = 1.0


class Trained(NamedTuple):
    """Parameters, the loss of every step, and the held-out loss before and after."""

    params: dict[str, FloatArray]
    losses: list[float]
    before: float
    after: float


def corpus() -> tuple[IntArray, IntArray]:
    """Return the bytes to train on, and those held out."""
    tokens = np.frombuffer((HERE / "corpus.txt").read_bytes(), np.uint8).astype(np.int64)
    cut = len(tokens) * 9 // 10
    return tokens[:cut], tokens[cut:]


def rate(step: int, steps: int) -> float:
    """Return the learning rate of a step from 1: a linear warm-up, then half a cosine down to a tenth."""
    if step <= WARM_UP:
        return PEAK_RATE * step / WARM_UP
    share = (step - WARM_UP) / max(steps - WARM_UP, 1)
    return PEAK_RATE * (0.1 + 0.45 * (1 + math.cos(math.pi * share)))


def held_out_loss(
    params: Mapping[str, FloatArray], config: DecoderConfig, tokens: IntArray, length: int = LENGTH
) -> float:
    """Return the mean loss in nats a byte over windows of the held-out text."""
    windows = tokens[: len(tokens) // length * length].reshape(-1, length)
    return next_token_loss(decoder_logits(params, windows, config=config), windows)


def train(config: DecoderConfig, *, steps: int, seed: int = SEED, length: int = LENGTH) -> Trained:
    """Return a decoder trained in float32 for `steps` steps on windows of `length` bytes."""
    rng = np.random.default_rng(seed)
    training, held_out = corpus()
    params = initial_decoder(config, rng, dtype=np.float32)
    shapes = {name: array.shape for name, array in params.items()}
    ends = np.cumsum([array.size for array in params.values()])[:-1]
    flat = np.concatenate([array.ravel() for array in params.values()])
    momentum, variance = np.zeros_like(flat), np.zeros_like(flat)
    before, losses = held_out_loss(params, config, held_out, length), []
    for step in range(1, steps + 1):
        starts = rng.integers(0, len(training) - length + 1, BATCH)
        batch = training[starts[:, None] + np.arange(length)]
        logits = decoder_logits(params, batch, config=config)
        losses.append(next_token_loss(logits, batch))
        dlogits = next_token_loss_vjp(logits, batch, 1.0).dlogits
        gradients = decoder_logits_vjp(params, batch, dlogits, config=config)
        gradient = np.concatenate([gradients[name].ravel() for name in shapes])
        gradient *= min(1.0, MAX_NORM / float(np.linalg.norm(gradient)))
        settings = AdamW(lr=rate(step, steps), betas=(0.9, 0.98), weight_decay=0.1)
        flat, momentum, variance = adamw_step(
            flat, gradient, momentum, variance, step=step, optimizer=settings
        )
        parts = zip(shapes.items(), np.split(flat, ends), strict=True)
        params = {name: part.reshape(shape) for (name, shape), part in parts}
    return Trained(params, losses, before, held_out_loss(params, config, held_out, length))


def main(names: list[str]) -> None:
    """Train the models named, all by default, and write them."""
    for name in names or CONFIGS:
        start = time.perf_counter()
        trained = train(CONFIGS[name], steps=STEPS[name])
        write_tensors(HERE / f"{name}.safetensors", trained.params)
        count = sum(array.size for array in trained.params.values())
        sys.stdout.write(
            f"{name}: {count} parameters, {STEPS[name]} steps, training loss {trained.losses[0]:.3f} to "
            f"{np.mean(trained.losses[-20:]):.3f}, held out {trained.before:.3f} to {trained.after:.3f} nats "
            f"a byte, {time.perf_counter() - start:.0f} s\n"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
