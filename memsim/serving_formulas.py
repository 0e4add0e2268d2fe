"""Memory and time of inference as a chain of formulas: weights, cache, the prompt's pass, a decoding pass.

Letters: `memsim.decoder.LETTERS`, `memsim.inference.LETTERS`.  A pass of the model over `a` tokens of each of
`b` sequences reads every dense weight once, of the experts those that a token of the batch goes through, and
the cache of `n` tokens; it takes the longer of the times of its operations and its bytes, product by product.
"""

from __future__ import annotations

from memsim.derivation import Definition

__all__ = ["CACHE", "SERVING"]

_POPE = "Pope et al. 2022, arXiv:2211.05102, section 2"
_ROOF = "Williams et al. 2009, doi:10.1145/1498765.1498785"
_MQA = "Ainslie et al. 2023, arXiv:2305.13245; DeepSeek-AI 2024, arXiv:2405.04434, section 2.1.4"
_TP = "Shoeybi et al. 2019, arXiv:1909.08053, section 3"

CACHE = (Definition("token", "A_c*L*y_c", "B", "cache of a token", _MQA),)


def _pass(name: str, what: str, tokens: str, context: str, width: str, share: str) -> tuple[Definition, ...]:
    """Return the formulas of a pass over `tokens` of each sequence, each meeting `context` others."""
    x = f"b*{tokens}"
    return (
        Definition(
            f"touched_{name}",
            f"E*(1 - (1 - K_x/(L_x*E))**min({x}, ceil(20L_x*E/K_x))) if L_x > 0 else 0",
            "1",
            f"experts of a layer that {what} goes through, chosen evenly",
            "expected distinct draws; above 20 E/K draws all, to within e**-20",
        ),
        Definition(
            f"FLOP_{name}", f"2{x}*(W_q + W_o + W_f + W_a)/t", "FLOP", f"products with weights, {what}", _POPE
        ),
        Definition(
            f"read_{name}",
            f"y_w*(W_q + W_o + W_f + (W_x*touched_{name}/E if E > 0 else 0))/t",
            "B",
            f"weights read, {what}",
            _POPE,
        ),
        Definition(
            f"weights_{name}",
            f"max(FLOP_{name}/(R*η_c), read_{name}/(M*η_m))",
            "s",
            f"products with weights, {what}",
            _ROOF,
        ),
        Definition(
            f"attention_{name}",
            f"max(2{x}*{context}*{share}*{width}*L/(t*R*η_c),"
            f" b*({context} + {tokens})*A_c*y_c*L/(d_c*M*η_m))",
            "s",
            f"scores and values from the cache, {what}",
            _ROOF,
        ),
        Definition(
            f"links_{name}",
            f"4(t - 1)*({x}*h*y/(t*β) + α)*L",
            "s",
            f"tensor parallelism, {what}",
            _TP,
        ),
    )


def _head(name: str, tokens: str, what: str) -> Definition:
    return Definition(
        f"head_{name}",
        f"max(2b*{tokens}*W_h/(t*R*η_c), y_h*W_h/(t*M*η_m))",
        "s",
        f"head, {what}",
        _ROOF,
    )


SERVING = (
    *CACHE,
    Definition(
        "d_c", "H_c/ceil(H_c/t)", "1", "share of the cache's heads on the fullest rank, inverted", _MQA
    ),
    Definition("β", "(W if t <= N else min(W, w))*η_n", "B/s", "bandwidth of a ring of ranks", _TP),
    Definition("weights", "((P_a + P_f + P_x)*y_w + (P_i + P_o)*y_h)/t + P_r*y_h", "B", "weights", _POPE),
    Definition("cache", "b*(s + g)*token/d_c", "B", "cache of prompt and answer", _MQA),
    Definition(
        "working",
        "y*s*(2h + (A_q + A_k + A_v + j*max(F/L, F_x/L))/t)",
        "B",
        "activations of a layer over one prompt, with FlashAttention",
        _POPE,
    ),
    Definition("memory", "weights + cache + working", "B", "memory of a rank", _POPE),
    Definition("capacity_left", "capacity - weights - working", "B", "memory that a cache may fill", _POPE),
    Definition(
        "limit",
        "capacity_left/((s + g)*token/d_c)",
        "1",
        "sequences that fit beside the weights",
        _POPE,
    ),
    # The prompt: every token meets half of the others on average; the head is needed for the last one only.
    *_pass("prompt", "the prompt", "s", "s", "(A_q + A_o)", "κ"),
    _head("prompt", "1", "the prompt"),
    Definition(
        "prefill",
        "weights_prompt + attention_prompt + links_prompt + head_prompt",
        "s",
        "time to the first token",
        _POPE,
    ),
    # Decoding: the context grows from s to s + g, and its mean counts as time is linear in it.
    Definition("n", "s + (g + 1)/2", "tokens", "mean context of a generated token", _POPE),
    *_pass("step", "a step of decoding", "a", "n", "A_d", "1"),
    _head("step", "a", "a step of decoding"),
    Definition(
        "decode",
        "weights_step + attention_step + links_step + head_step",
        "s",
        "a step of decoding",
        _POPE,
    ),
    Definition("answer", "prefill + (g - 1)*decode", "s", "prompt and answer", _POPE),
    Definition("rate", "b*g/answer", "1/s", "tokens a second, all sequences", _POPE),
)
