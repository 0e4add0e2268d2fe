"""The time of a step of training, as a chain of formulas: computation, what ranks send, the bubble.

A ring sends what each rank needs from its neighbour, so its time is that of its slowest link: within a node
the accelerators' own, and between nodes the network, of which a group with few members in a node has a larger
share.
Groups are nested as in Megatron-LM: tensor, context, data (experts within it), pipeline.
"""

from __future__ import annotations

from memsim.derivation import Definition
from memsim.kernel_times import of_kernels
from memsim.planning.division_volumes import VOLUMES
from memsim.roofline import ROOFLINE

__all__ = ["KERNEL_TIME", "TIME"]

_TP = "Shoeybi et al. 2019, arXiv:1909.08053, section 3; arXiv:2205.05198, section 4.2.2"
_PP = "Narayanan et al. 2021, arXiv:2104.04473, section 2.2"
_DP = "Rajbhandari et al. 2020, arXiv:1910.02054, section 7"
_CP = "Liu et al. 2023, arXiv:2310.01889, section 3"
_EP = "Lepikhin et al. 2020, arXiv:2006.16668, section 3"
_RING = "Thakur et al. 2005, doi:10.1177/1094342005051521, section 4"
_MFU = "Korthikanti et al. 2022, arXiv:2205.05198, appendix A"


def _bandwidth(name: str, stride: str, size: str, what: str) -> Definition:
    """Return the bandwidth of a ring whose members lie `stride` ranks apart."""
    formula = f"(W if {stride}*{size} <= N else min(W, w*max(1, N/({stride}))))*η_n"
    return Definition(name, formula, "B/s", f"bandwidth of a ring of {what} parallelism", _RING)


TIME = (
    *ROOFLINE,
    *VOLUMES,
    _bandwidth("β_t", "1", "t", "tensor"),
    _bandwidth("β_c", "t", "c", "context"),
    _bandwidth("β_d", "t", "(c*d)", "data"),
    _bandwidth("β_x", "t*e", "(c*d/e)", "data (experts)"),
    # An all-to-all and a hop between stages use the rank's own share of the network.
    Definition("β_e", "(W if t*c*e <= N else min(W, w))*η_n", "B/s", "bandwidth of an all-to-all", _EP),
    Definition("β_p", "(W if G <= N else min(W, w))*η_n", "B/s", "bandwidth between stages", _PP),
    Definition("tensor_f", "sent_t/β_t + 4(t - 1)*α*L*ρ", "s", "tensor parallelism, forward, a stage", _TP),
    # An all-reduce of the backward pass waits for nobody but the next gradient of activations; with sequence
    # parallelism only its reduce-scatter does, since the all-gather comes first.
    Definition(
        "tensor_hidden",
        "τ*min(f_qkv + f_up, tensor_f*(1 - q/2))",
        "s",
        "tensor parallelism beside gradients of weights",
        "Korthikanti et al. 2022, arXiv:2205.05198, section 6.2",
    ),
    Definition(
        "tensor", "tensor_f*(3 if r > 1 else 2) - tensor_hidden", "s", "tensor parallelism, a stage", _TP
    ),
    # Keys and values travel behind the scores.
    Definition("ring_f", "sent_c/β_c + (c - 1)*α*L*ρ", "s", "a round of keys and values", _CP),
    Definition(
        "context",
        "max(0, ring_f - ω*f_core)*(2 if r > 0 else 1) + max(0, 2ring_f - ω*g_core)",
        "s",
        "context parallelism, not hidden",
        _CP,
    ),
    Definition(
        "expert_f",
        "sent_e/β_e + 2(e - 1)*α*L_x*ρ",
        "s",
        "dispatch to experts and back, forward",
        _EP,
    ),
    Definition("expert", "expert_f*(3 if r > 1 else 2)", "s", "expert parallelism, a stage", _EP),
    Definition("hops", "sent_p/β_p + 2v*α if p > 1 else 0", "s", "sends to the next stages", _PP),
    Definition(
        "slot",
        "forward + gradient + again + tensor + context + expert + hops",
        "s",
        "one micro-batch in one stage, forward and backward",
        _PP,
    ),
    Definition("compute", "m*(forward + gradient + head)", "s", "computation", _PP),
    Definition("recompute", "m*again", "s", "recomputation", _MFU),
    Definition("tensor_step", "m*tensor", "s", "tensor parallelism", _TP),
    Definition("context_step", "m*context", "s", "context parallelism, exposed", _CP),
    Definition("expert_step", "m*expert", "s", "expert parallelism", _EP),
    Definition("hops_step", "m*hops", "s", "pipeline parallelism, sends", _PP),
    Definition("bubble", "(p - 1)*slot/v", "s", "pipeline bubble", _PP),
    # Data parallelism: gradients reduced and weights gathered, by micro-batch from ZeRO stage 2 and 3 on.
    Definition(
        "wait_d", "α*(c*d - 1 + (c*d/e - 1 if P_x > 0 else 0))", "s", "latency of a phase over ranks", _RING
    ),
    Definition("reduce_d", "sent_g/β_d + sent_gx/β_x + wait_d", "s", "reduce-scatter of gradients", _DP),
    Definition("gather_d", "sent_w/β_d + sent_wx/β_x + wait_d", "s", "all-gather of weights", _DP),
    Definition(
        "data",
        "m*(2gather_d + reduce_d) if z > 2 else (m*reduce_d + gather_d if z > 1 else"
        " (reduce_d + gather_d if z > 0 else 2reduce_d))",
        "s",
        "data parallelism, hidden or not",
        _DP,
    ),
    Definition(
        "data_step",
        "max(0, data - ω*(forward + gradient + again)*(m if z > 1 else 1))",
        "s",
        "data parallelism, exposed",
        _DP,
    ),
    # Gradients are read for their norm, clipped, read by Adam and set to zero; Adam reads and writes states
    # and writes weights.  Offloaded, gradients and weights cross the link to the host instead.
    Definition("owned", "P_most/n_o + P_expert/x_o", "parameters", "parameters that a rank updates", _DP),
    Definition(
        "optimizer",
        "owned*(y_g + y_w)/(C*η_n) if o > 0 else owned*(5y_g + 2y_o + y_w)/(M*η_m)",
        "s",
        "optimizer, or its link to the host",
        "Ren et al. 2021, arXiv:2101.06840, section 4",
    ),
    Definition(
        "step",
        "compute + recompute + tensor_step + context_step + expert_step + hops_step + bubble + data_step"
        " + optimizer",
        "s",
        "time of a step",
        _PP,
    ),
    # Utilization
    Definition(
        "FLOP_model",
        "6B*s*(W_q + W_o + W_f + W_a + W_h) + 6B*s*s*(A_q + A_o)*L",
        "FLOP",
        "operations of the model, without recomputation; scores in full",
        _MFU,
    ),
    Definition(
        "FLOP_again",
        "2B*s*(W_q + W_o + W_f + W_a) + 2B*s*s*(A_q + A_o)*L if r > 1 else"
        " (2B*s*s*(A_q + A_o)*L if r > 0 else 0)",
        "FLOP",
        "operations recomputed",
        _MFU,
    ),
    Definition("mfu", "FLOP_model/(step*G*R_x)", "1", "model FLOPs utilization", _MFU),
    Definition("hfu", "(FLOP_model + FLOP_again)/(step*G*R_x)", "1", "hardware FLOPs utilization", _MFU),
)
# The same with the times of kernels, for settings that know how long one takes to start.
KERNEL_TIME = tuple(of_kernels(TIME))
