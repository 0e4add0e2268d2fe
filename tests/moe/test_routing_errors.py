"""What a caller gets wrong is said in one line."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refimpl.errors import DTypeError, OptionError, ShapeError
from refimpl.moe.batch_priority import batch_priority
from refimpl.moe.capacity import expert_capacity
from refimpl.moe.dispatch import dispatch
from refimpl.moe.expert_parallel import expert_parallel
from refimpl.moe.gating import dense_mixture, top_k_gates
from refimpl.moe.gshard import gshard_as_printed
from refimpl.moe.gshard_as_coded import gshard_as_coded
from refimpl.moe.noisy_gating import noisy_top_k_gates, vmoe_noisy_gates
from refimpl.moe.switch import switch

X, ROUTER = np.ones((4, 2)), np.zeros((2, 3))
LAYER = X, ROUTER, np.ones((3, 2, 5)), np.ones((3, 5, 2))
TWO_IN_ONE = np.ones((1, 4, 3, 1))


@pytest.mark.parametrize(
    ("f", "args", "options", "error", "message"),
    [
        (switch, (X, np.zeros((3, 3)), *LAYER[2:]), {}, ShapeError, "w_router: axis D must equal that of x"),
        (switch, (X, ROUTER, np.ones((3, 4, 5)), LAYER[3]), {}, ShapeError, "w_in: axis D must equal"),
        (switch, (*LAYER[:3], np.ones((3, 4, 2))), {}, ShapeError, "w_out: axis F must equal that of w_in"),
        (switch, (X, ROUTER, LAYER[2][0], LAYER[3]), {}, ShapeError, "w_in: expected 3 axes"),
        (switch, (X, np.zeros((2, 6)), *LAYER[2:]), {}, ShapeError, "w_in: axis E must equal the router's"),
        (gshard_as_coded, (X, ROUTER[:, :2], *LAYER[2:]), {}, ShapeError, "w_in: axis E must equal"),
        (batch_priority, (X, np.zeros((2, 6)), *LAYER[2:]), {}, ShapeError, "w_in: axis E must equal"),
        (batch_priority, LAYER, {"k": "two"}, DTypeError, "k: expected a whole number"),
        (dense_mixture, (*LAYER[:3], np.ones((4, 5, 2))), {}, ShapeError, "w_out: axis E must equal"),
        (dense_mixture, LAYER, {"w_gate": np.ones((4, 2, 5))}, ShapeError, "w_gate: axis E must equal"),
        (dispatch, (X[None], TWO_IN_ONE, *LAYER[2:]), {"dispatch_mask": TWO_IN_ONE}, DTypeError, "bool"),
        (switch, (X.astype(complex), *LAYER[1:]), {}, DTypeError, "x: expected float64"),
        (switch, LAYER, {"groups": 3}, ShapeError, "tokens that divide into 3 groups, got 4"),
        (switch, LAYER, {"groups": 0}, OptionError, "groups: expected at least 1"),
        (switch, LAYER, {"capacity": -1}, OptionError, "capacity: expected at least 0"),
        (switch, LAYER, {"capacity_factor": 0.0}, OptionError, "capacity_factor: expected a finite number"),
        (switch, LAYER, {"rounding": "up"}, OptionError, "rounding: expected one of"),
        (switch, LAYER, {"jitter": 0.1}, OptionError, "jitter: expected either uniforms or rng"),
        (switch, LAYER, {"jitter": 1.5, "rng": 0}, OptionError, "jitter: expected a number in"),
        (switch, LAYER, {"activation": "tanh"}, OptionError, "activation: expected one of"),
        (switch, LAYER, {"jitter": 0.1, "uniforms": X[:1]}, ShapeError, "uniforms: axis T"),
        (gshard_as_printed, (X, ROUTER[:, :1], LAYER[2][:1], LAYER[3][:1]), {}, OptionError, "at most 1"),
        (gshard_as_printed, LAYER, {"uniforms": np.ones(3)}, ShapeError, "uniforms: axis T"),
        (gshard_as_printed, LAYER, {"uniforms": np.ones(4), "rng": 0}, OptionError, "rng: expected None"),
        (gshard_as_coded, LAYER, {"second_policy": "some"}, OptionError, "second_policy: expected one of"),
        (gshard_as_coded, LAYER, {"second_policy": "random", "threshold": 0.0}, OptionError, "threshold"),
        (dense_mixture, LAYER, {"temperature": 0.0}, OptionError, "temperature: expected a finite number"),
        (top_k_gates, (ROUTER,), {"k": 4, "convention": "switch"}, OptionError, "k: expected at most 3"),
        (top_k_gates, (ROUTER,), {"k": 0, "convention": "switch"}, OptionError, "k: expected at least 1"),
        (top_k_gates, (ROUTER,), {"k": 1, "convention": "base"}, OptionError, "convention: expected one of"),
        (top_k_gates, (ROUTER[0],), {"k": 1, "convention": "switch"}, ShapeError, "logits: expected 2 axes"),
        (noisy_top_k_gates, (X, ROUTER, ROUTER[:, :2]), {"k": 1}, ShapeError, "w_noise"),
        (noisy_top_k_gates, (X, ROUTER, ROUTER), {"k": 1, "noise": X}, ShapeError, "noise: axis E"),
        (vmoe_noisy_gates, (X, ROUTER), {"k": 1, "noise_std": np.nan}, OptionError, "noise_std"),
        (dispatch, (X[None], TWO_IN_ONE, *LAYER[2:]), {}, OptionError, "at most one token in each place"),
        (dispatch, (X[None], TWO_IN_ONE[:, :3], *LAYER[2:]), {}, ShapeError, "combine: axis S must equal"),
        (expert_parallel, LAYER, {}, ShapeError, "x: expected 3 axes"),
        (expert_parallel, (X[None, :0][:0], *LAYER[1:]), {}, OptionError, "ranks: expected at least 1"),
    ],
)  # fmt: skip
def test_message(f: Any, args: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        f(*args, **options)


def test_capacity_needs_an_expert() -> None:
    with pytest.raises(OptionError, match="experts: expected at least 1, got 0"):
        expert_capacity(4, 0, factor=1.0, rounding="mesh_tf")
