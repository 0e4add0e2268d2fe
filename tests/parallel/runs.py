"""The network and the runs that the tests of ranks and shards train."""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.parallel import attention_network, initial_parameters

NETWORK = attention_network(vocabulary=7, width=5, heads=1, head_width=3, blocks=1)
RANKS = (1, 2, 3, 4, 7)


def run_of(ranks: int, steps: int = 10, micro: int = 1, seed: int = 0) -> tuple[Any, Any, Any]:
    """Return parameters, tokens and masks; ranks differ in how many tokens count, one may have none."""
    rng = np.random.default_rng(seed)
    tokens = np.repeat(rng.integers(0, 7, (1, micro, ranks, 2, 5)), steps, axis=0)  # so that it can learn
    mask = np.repeat(rng.random((1, micro, ranks, 2, 4)) < rng.random((1, 1, ranks, 1, 1)), steps, axis=0)
    mask[:, :, -1:] &= ranks == 1
    mask[:, :, 0, 0, -2:] = True
    return initial_parameters(NETWORK, rng), tokens, mask
