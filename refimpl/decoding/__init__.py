"""Decoding: drawing tokens from a model, one at a time or several from a draft.

A function that bears its module's name is imported from there: ``refimpl.decoding.sampling.sampling``.
"""

from refimpl.decoding.sampling import Generated, Model, autoregressive, inverse_cdf, sampling_law
from refimpl.decoding.speculative import NO_TOKEN, Speculated, acceptance_rate, residual
from refimpl.decoding.speculative_loop import SpeculativelyGenerated, speculative_decoding, uncached
from refimpl.decoding.verification import Verified, rollback

__all__ = [
    "NO_TOKEN",
    "Generated",
    "Model",
    "Speculated",
    "SpeculativelyGenerated",
    "Verified",
    "acceptance_rate",
    "autoregressive",
    "inverse_cdf",
    "residual",
    "rollback",
    "sampling_law",
    "speculative_decoding",
    "uncached",
]
