"""Each oracle, which shares no code with the project, agrees with the reference that it judges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from refimpl import registry
from refimpl.testing import draw
from refimpl.tolerances import Limit, mismatch, outputs, rewrite_limits
from tests.oracles import OracleMissing

registry.load()

PAIRS = [(name, oracle) for name, oracles in sorted(registry.ORACLES.items()) for oracle in oracles]
EXAMPLES = 30
# An oracle sums in another order and evaluates exp elsewhere, so it gets twice a rewrite's room.
ROOM = 2.0


@pytest.mark.parametrize(("name", "oracle"), PAIRS, ids=[f"{n}-{o.__name__}" for n, o in PAIRS])
def test_oracle_agrees(name: str, oracle: Callable[..., Any]) -> None:
    record = registry.get(name)
    assert record.sample is not None
    judged = 0
    shapes = [{**draw(record, index), **edge} for index, edge in enumerate(record.edges)]
    shapes += [draw(record, seed) for seed in range(EXAMPLES)]
    for seed, shape in enumerate(shapes):
        case = record.sample(np.random.default_rng(seed), **shape)
        try:
            judgement = outputs(case.call(oracle))
        except OracleMissing as error:
            pytest.skip(str(error))
        except NotImplementedError:
            continue
        if record.exact:
            truth, limits = outputs(case.call(record.function)), {}
        else:
            truth, limits = rewrite_limits(record, case)
        for (key, expected), actual in zip(truth.items(), judgement.values(), strict=False):
            limit = None if record.exact else Limit(ROOM * limits[key].largest)
            problem = mismatch(actual, expected, limit, name=key)
            assert problem is None, f"{oracle.__name__} on seed {seed}, {shape}: {problem}"
        judged += 1
    assert judged >= 3, f"{oracle.__name__} judged only {judged} cases of {name}"
