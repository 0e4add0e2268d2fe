"""What a rank sends in a step of training, in bytes, as a chain of formulas; times follow from it.

Rings and pairwise exchanges: of a vector of n bytes on g ranks a rank sends ``(g - 1)/g n`` in each phase, as
`memsim.collectives` counts without padding.  Quantities are those of a stage of a pipeline and one
micro-batch; `..._volume` are those of the step.
"""

from __future__ import annotations

from memsim.derivation import Definition

__all__ = ["KINDS", "VOLUMES"]

_TP = "Shoeybi et al. 2019, arXiv:1909.08053, section 3; arXiv:2205.05198, section 4.2.2"
_PP = "Narayanan et al. 2021, arXiv:2104.04473, section 4.1"
_DP = "Rajbhandari et al. 2020, arXiv:1910.02054, section 7"
_CP = "Liu et al. 2023, arXiv:2310.01889, section 3"
_EP = "Lepikhin et al. 2020, arXiv:2006.16668, section 3"
KINDS = ("tensor", "context", "expert", "pipeline", "data")


def _shards(name: str, size: str, what: str) -> tuple[Definition, ...]:
    """Return what a ring phase over the parameters of a rank sends, those of experts apart."""
    return (
        Definition(f"sent_{name}", f"(c*d - 1)*{size}*P_most/(c*d)", "B", f"{what}, sent in a phase", _DP),
        Definition(
            f"sent_{name}x",
            f"(c*d/e - 1)*{size}*P_expert*e/(c*d)",
            "B",
            f"{what} of experts, sent in a phase",
            _DP,
        ),
    )


VOLUMES = (
    # Each half of a layer ends in an all-reduce, or has an all-gather before and a reduce-scatter behind it.
    Definition("sent_t", "4(t - 1)*y*x*h*L*ρ/t", "B", "activations to tensor-parallel ranks, forward", _TP),
    # Where a rank keeps its part of the sequence only, what goes into a product is gathered once more for the
    # gradient of the weights, behind the product that makes the gradient of the input.
    Definition(
        "sent_q",
        "2(t - 1)*y*x*h*L*ρ/t if q > 0 else 0",
        "B",
        "activations gathered again, backward",
        "Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2",
    ),
    # Keys and values travel once around the ring; backward their gradients go with them.
    Definition("sent_c", "(c - 1)*y*x*(A_k + A_v)*L*ρ/t", "B", "keys and values around the ring", _CP),
    Definition("sent_e", "2(e - 1)*y*x*h*K_x*ρ/(e*u)", "B", "tokens to experts and back, forward", _EP),
    # Each rank of a tensor-parallel group sends its part; the next stage gathers them within the node.
    Definition("sent_p", "2v*y*x*h/t if p > 1 else 0", "B", "activations to other stages, both ways", _PP),
    Definition("P_most", "max(P_first, P_last)", "parameters", "parameters of the larger end stage", _DP),
    *_shards("g", "y_g", "gradients"),
    *_shards("w", "y_w", "weights"),
    Definition("tensor_volume", "m*(sent_t*(3 if r > 1 else 2) + sent_q)", "B", "tensor parallelism", _TP),
    Definition("context_volume", "m*sent_c*((2 if r > 0 else 1) + 2)", "B", "context parallelism", _CP),
    Definition("expert_volume", "m*sent_e*(3 if r > 1 else 2)", "B", "expert parallelism", _EP),
    Definition("pipeline_volume", "m*sent_p", "B", "pipeline parallelism", _PP),
    Definition(
        "data_volume",
        "m*(2(sent_w + sent_wx) + sent_g + sent_gx) if z > 2 else"
        " (m*(sent_g + sent_gx) + sent_w + sent_wx if z > 1 else"
        " (sent_g + sent_gx + sent_w + sent_wx if z > 0 else 2(sent_g + sent_gx)))",
        "B",
        "data parallelism",
        _DP,
    ),
)
