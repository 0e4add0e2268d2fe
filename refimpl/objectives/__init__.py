"""What language models are trained for and judged by: next-token and preference losses, metrics."""

from refimpl.objectives.cross_entropy import NegativeLogLikelihood, log_softmax, negative_log_likelihood
from refimpl.objectives.labels import response_mask
from refimpl.objectives.language_modeling import (
    LossGradients,
    instruction_loss,
    instruction_loss_vjp,
    next_token_loss,
    next_token_loss_vjp,
)
from refimpl.objectives.metrics import (
    CorpusMetrics,
    bits_per_byte,
    corpus_metrics,
    pass_at_k,
    perplexity,
    standard_error,
)
from refimpl.objectives.preference import (
    PreferenceGradients,
    RankedPairs,
    bradley_terry_loss,
    bradley_terry_loss_vjp,
    bradley_terry_probability,
    ranked_pairs,
)

__all__ = [
    "CorpusMetrics",
    "LossGradients",
    "NegativeLogLikelihood",
    "PreferenceGradients",
    "RankedPairs",
    "bits_per_byte",
    "bradley_terry_loss",
    "bradley_terry_loss_vjp",
    "bradley_terry_probability",
    "corpus_metrics",
    "instruction_loss",
    "instruction_loss_vjp",
    "log_softmax",
    "negative_log_likelihood",
    "next_token_loss",
    "next_token_loss_vjp",
    "pass_at_k",
    "perplexity",
    "ranked_pairs",
    "response_mask",
    "standard_error",
]
