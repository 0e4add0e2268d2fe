"""The memory of a rank in a step of training, as a chain of formulas: states, activations, the fuller stage.

Letters: `memsim.decoder.LETTERS`, `training_setting.LETTERS`, `division.LETTERS`.  The first
stage of a pipeline holds the embedding and keeps most micro-batches; the last holds the head and its logits.
"""

from __future__ import annotations

from memsim.derivation import Definition

__all__ = ["MEMORY"]

_ZERO = "Rajbhandari et al. 2020, arXiv:1910.02054, section 5"
_ACT = "Korthikanti et al. 2022, arXiv:2205.05198, section 4"
_PIPE = "Narayanan et al. 2021, arXiv:2104.04473, section 2.2"
_EP = "Lepikhin et al. 2020, arXiv:2006.16668, section 3"


MEMORY = (
    Definition("m", "B/(d*b)", "1", "micro-batches of a rank and step", _PIPE),
    Definition(
        "x",
        "b*s/c",
        "tokens",
        "tokens of a micro-batch on a rank",
        "Liu et al. 2023, arXiv:2310.01889, section 3",
    ),
    Definition("u", "t if q > 0 else 1", "1", "ranks that divide what tensor parallelism leaves whole", _ACT),
    # Layers that do not divide leave some stages with one chunk's layer less; the fullest ones set the pace.
    Definition("l_chunk", "ceil(L/(p*v))", "1", "layers of a chunk of the fullest stage", _PIPE),
    Definition("ρ", "l_chunk*v/L", "1", "share of the layers in the fullest stage", _PIPE),
    # Parameters
    Definition("P_dense", "((P_a + P_f)/t + P_r)*ρ", "parameters", "layers of a stage, but experts", _EP),
    Definition("P_expert", "P_x*ρ/(e*t)", "parameters", "experts of a stage", _EP),
    Definition("P_first", "P_dense + (P_i + (0 if p > 1 else P_o))/t", "parameters", "first stage", _PIPE),
    Definition("P_last", "P_dense + (P_o + (P_e if p > 1 else P_i))/t", "parameters", "last stage", _PIPE),
    # States: ZeRO divides the optimizer from stage 1, gradients from 2, weights from 3, among the ranks that
    # hold the same weights, d*c of them; each expert stands on d*c/e.
    Definition("n_w", "d*c if z > 2 else 1", "1", "ranks that divide weights", _ZERO),
    Definition("n_g", "d*c if z > 1 else 1", "1", "ranks that divide gradients", _ZERO),
    Definition("n_o", "d*c if z > 0 else 1", "1", "ranks that divide optimizer states", _ZERO),
    Definition("x_w", "d*c/e if z > 2 else 1", "1", "ranks that divide an expert's weights", _ZERO),
    Definition("x_g", "d*c/e if z > 1 else 1", "1", "ranks that divide its gradients", _ZERO),
    Definition("x_o", "d*c/e if z > 0 else 1", "1", "ranks that divide its optimizer states", _ZERO),
    Definition("state", "y_w/n_w + y_g/n_g + (1 - o)*y_o/n_o", "B", "states of a parameter", _ZERO),
    Definition(
        "states_expert",
        "P_expert*(y_w/x_w + y_g/x_g + (1 - o)*y_o/x_o)",
        "B",
        "states of a stage's experts",
        _ZERO,
    ),
    Definition("states_first", "P_first*state + states_expert", "B", "model states, first stage", _ZERO),
    Definition("states_last", "P_last*state + states_expert", "B", "model states, last stage", _ZERO),
    Definition(
        "gathered",
        "2y_w*(P_dense + P_expert)*p/L if z > 2 else 0",
        "B",
        "whole weights of the layer at work and of the one fetched ahead",
        "Rajbhandari et al. 2020, arXiv:1910.02054, section 7.2.2",
    ),
    Definition("host", "o*y_o*(P_first/n_o + P_expert/x_o)", "B", "optimizer states on the host", _ZERO),
    # Activations of one layer and micro-batch, elements of y bytes, masks of 1; δ is 1 with dropout.
    Definition("a_r", "x*h*(4y + 2δ)/u", "B", "norms, inputs of both halves, dropout masks", _ACT),
    Definition(
        "a_a", "y*x*(A_q + A_k + A_v + A_o)/t", "B", "queries, keys, values, attention's output", _ACT
    ),
    Definition(
        "a_s",
        "0 if r > 0 else (4H*x/t if φ > 0 else (y + (y + 1)*δ)*H*b*s*s/(c*t))",
        "B",
        "softmax and its dropout, or the log-sum-exp of FlashAttention",
        f"{_ACT}; Dao et al. 2022, arXiv:2205.14135, section 3.1",
    ),
    Definition(
        "a_f", "y*x*j*(F + F_x)/(L*t)", "B", "inside the feed-forward networks, mean over layers", _ACT
    ),
    Definition("a_x", "y*x*h*K_x/(L*u)", "B", "tokens dispatched to experts, mean over layers", _EP),
    Definition("a_layer", "a_r + a_a + a_s + a_f + a_x", "B", "activations of a layer and micro-batch", _ACT),
    Definition(
        "a_kept", "y*x*h/u if r > 1 else a_layer", "B", "what is kept of them until the backward pass", _ACT
    ),
    Definition(
        "l_first",
        "L*ρ*min(m, p + (p - 1)/v if v > 1 else p)",
        "1",
        "layers whose activations the first stage keeps, times micro-batches",
        f"{_ACT}.2.3",
    ),
    Definition(
        "l_last",
        "L*ρ*min(m, ((v - 1)*p + 1)/v)",
        "1",
        "the same for the last stage",
        f"{_PIPE}.2",
    ),
    Definition("a_again", "a_layer if r > 1 else 0", "B", "the layer that is being recomputed", _ACT),
    Definition("a_in", "δ*x*h*min(m, p)/u", "B", "dropout mask of the embedding", f"{_ACT}.3"),
    Definition("a_out", "2y*x*h/u + 4x*V/t", "B", "final norm, input of the head, fp32 logits", f"{_ACT}.3"),
    Definition(
        "activations_first",
        "a_kept*l_first + a_again + a_in + (0 if p > 1 else a_out)",
        "B",
        "activations, first stage",
        _ACT,
    ),
    Definition(
        "activations_last",
        "a_kept*l_last + a_again + a_out + (0 if p > 1 else a_in)",
        "B",
        "activations, last stage",
        _ACT,
    ),
    Definition("first", "states_first + activations_first + gathered", "B", "memory, first stage", _ZERO),
    Definition("last", "states_last + activations_last + gathered", "B", "memory, last stage", _ZERO),
    Definition("memory", "max(first, last)", "B", "memory of the fullest rank", _ZERO),
)
