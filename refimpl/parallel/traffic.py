"""What ranks send, counted by rank and phase."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Sent", "Traffic"]


class Sent(NamedTuple):
    """What a rank sent."""

    messages: int
    bytes: int


class Traffic:
    """What ranks sent, by rank and phase; pass one to a distributed reference, as a `Memory` to a tiled one.

    Examples
    --------
    >>> traffic = Traffic()
    >>> traffic.add(1, "gradients", 80)
    >>> traffic.sent(1, "gradients"), traffic.sent(0), traffic.phases
    (Sent(messages=1, bytes=80), Sent(messages=0, bytes=0), ['gradients'])
    """

    def __init__(self) -> None:
        self.counts: dict[int, dict[str, Sent]] = {}

    @property
    def ranks(self) -> list[int]:
        """The ranks that took part."""
        return sorted(self.counts)

    @property
    def phases(self) -> list[str]:
        """The labels under which something was sent; "" where no phase was named."""
        return sorted({phase for counts in self.counts.values() for phase in counts})

    def join(self, rank: int) -> None:
        """Say that `rank` takes part, even if it sends nothing."""
        self.counts.setdefault(rank, {})

    def add(self, rank: int, phase: str, size: int, messages: int = 1) -> None:
        """Count `messages` of `size` bytes together."""
        counts = self.counts.setdefault(rank, {})
        before = counts.get(phase, Sent(0, 0))
        counts[phase] = Sent(before.messages + messages, before.bytes + size)

    def sent(self, rank: int, phase: str | None = None) -> Sent:
        """Return what `rank` sent, in one phase or in all."""
        counts = self.counts.get(rank, {})
        chosen = [sent for name, sent in counts.items() if phase in (None, name)]
        return Sent(sum(sent.messages for sent in chosen), sum(sent.bytes for sent in chosen))

    def totals(self) -> dict[str, int]:
        """Return messages and bytes of each rank by name: what a model of communication must predict."""
        return {
            f"rank {rank} {name}": value
            for rank in self.ranks
            for name, value in self.sent(rank)._asdict().items()
        }
