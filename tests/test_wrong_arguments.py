"""An argument that cannot be right is refused by name: never by an IndexError from the depths of NumPy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from refimpl import registry
from refimpl.errors import FrugalError
from refimpl.numerics import Array
from refimpl.testing import draw

registry.load()

# Costs take numbers; what ranks exchange is bytes to them, whatever they mean.
RECORDS = [
    record
    for record in registry.TECHNIQUES.values()
    if record.kind in ("function", "identity") and record.family != "parallel"
]
# What a case may not look at: the factor of an update without a rank, the threshold of another policy.
UNREAD = {("moe.gshard.as_coded", "threshold")}
NEVER = ("nothing", "strings", "complex numbers")  # what no technique may take for an array


def wrong(array: Array) -> Iterator[tuple[str, Any]]:
    yield "nothing", None
    yield "strings", array.astype(str)
    yield "complex numbers", array.astype(complex)
    yield "another axis", array[None]
    yield "a scalar", np.ones(())
    for axis, size in enumerate(array.shape):
        if size:
            yield f"axis {axis} doubled", np.concatenate([array, array], axis=axis)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.name)
@pytest.mark.filterwarnings("error")
def test_wrong_arrays_are_refused_by_name(record: registry.Technique) -> None:
    assert record.sample is not None
    shape = {**draw(record, 3)}
    shape |= {axis: max(low, min(high, 2)) for axis, (low, high) in record.axes.items()}
    case = record.sample(np.random.default_rng(3), **shape)
    for place, array in enumerate(case.args):
        if not isinstance(array, np.ndarray) or array.dtype == np.object_:
            continue
        for what, value in wrong(array):
            call = case.replace(*case.args[:place], value, *case.args[place + 1 :])
            try:
                call.call(record.function)
            except FrugalError:
                pass
            except Exception as error:
                pytest.fail(f"argument {place}, {what}: {type(error).__name__}: {error}")
            else:
                assert what not in NEVER, f"argument {place}: {what} were accepted"


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.name)
def test_numbers_are_no_strings_and_one_is_not_true(record: registry.Technique) -> None:
    assert record.sample is not None
    shape = {**draw(record, 3)}
    shape |= {axis: max(low, min(high, 2)) for axis, (low, high) in record.axes.items()}
    case = record.sample(np.random.default_rng(3), **shape)
    for name, value in case.kwargs.items():
        if name == "return_lse" or (record.name, name) in UNREAD:
            continue
        if isinstance(value, bool):
            given: Any = int(value)
        elif isinstance(value, int | float):
            given = str(value)
        elif name == "causal":
            given = 1
        else:
            continue
        with pytest.raises(FrugalError, match="expected "):
            case.replace(**{name: given}).call(record.function)
