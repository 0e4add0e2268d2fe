"""The operations of a call of a fine-tuned layer, from the shapes of its arrays.

Each price equals what the reference counts through `refimpl.memory.Memory` as it runs.
"""

from __future__ import annotations

import numpy as np

from refimpl.registry import Case, prices

__all__ = ["adapter", "lora", "lora_merge"]


@prices("peft.lora", counts="flops")
@prices("quant.qlora", counts="flops")
def lora(case: Case) -> dict[str, int]:
    """Return ``2 T (K N + R (K + N))``: the base, whatever it is stored in, and the branch beside it."""
    (T, K), (_, R), (_, N) = (np.shape(array) for array in case.args[:3])
    return {"flops": 2 * T * (K * N + R * (K + N))}


@prices("peft.lora.merge", counts="flops")
def lora_merge(case: Case) -> dict[str, int]:
    """Return ``2 K R N``, once; the merged layer then costs what the base does."""
    (K, R), (_, N) = (np.shape(array) for array in case.args[:2])
    return {"flops": 2 * K * R * N}


@prices("peft.adapter", counts="flops")
def adapter(case: Case) -> dict[str, int]:
    """Return ``4 D m`` for each token: an adapter is never merged away."""
    x, (D, m) = case.args[0], np.shape(case.args[1])
    return {"flops": 4 * int(np.prod(np.shape(x)[:-1])) * D * m}
