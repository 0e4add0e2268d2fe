"""Other estimators' counts of one run: their own printed numbers, and states by hand in every stage."""

from __future__ import annotations

from typing import Any

import pytest

from memsim.memory.disagreement import disagreement
from memsim.memory.run import Run
from memsim.model import dense
from memsim.parameters import parameters
from memsim.zero import zero_memory

GPT = dense(layers=3, width=24, heads=4, ffn=96, vocabulary=50, gated=False, bias=False, tied=False)
COUNT = int(parameters(model=GPT).total)


def _views(**run: Any) -> dict[str, Any]:
    views = disagreement(model=GPT, run=Run(gpus=8, sequence=16, **run))
    return {view.name: view for view in views}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_states_of_every_stage_by_hand(stage: Any) -> None:
    """The optimizer is divided from stage 1, gradients from 2, weights from 3, among 8."""
    views = _views(stage=stage)
    o, g, w = (8 if stage >= first else 1 for first in (1, 2, 3))
    for name, gradients in (("zero", 2), ("korthikanti", 4)):
        parts = views[name].parts
        assert parts["weights"] * w == 2 * COUNT, name
        assert parts["gradients"] * g == gradients * COUNT, name
        assert parts["optimizer"] * o == 12 * COUNT, name
    assert views["megatron"].parts["gradients"] == 4 * COUNT  # whatever the stage
    assert ("deepspeed" in views) is (stage >= 2)


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_s_estimators_are_those_of_zero(stage: Any) -> None:
    """`zero_memory` has them for a number of parameters; a model adds its largest matrix in stage 3."""
    found = _views(stage=stage)["deepspeed"].total
    known = zero_memory(parameters=COUNT, ranks=8, stage=stage, convention="deepspeed").total
    assert found == known + (4 * 24 * 96 if stage == 3 else 0)


def test_activations_by_hand() -> None:
    """12 numbers a token, width and layer of 16 bits; 34 bytes of them, and 5 a s / h; checkpoints 2."""
    b, s, h, layers, heads = 2, 16, 24, 3, 4
    for recompute, zero, paper in (
        ("none", 24, 34 + 5 * heads * s / h),
        ("selective", 24, 34),
        ("full", 2, 2),
    ):
        views = _views(batch=2, recompute=recompute)
        assert views["zero"].parts["activations"] == zero * b * s * h * layers
        assert views["korthikanti"].parts["activations"] == pytest.approx(paper * b * s * h * layers)
