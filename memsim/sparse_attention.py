"""How many scores a sparse attention uses: closed forms for each pattern, for one head.

>>> print(window_pairs(N=1000, radius=3).explain()[-1])
total: N*(2h + 1) - h*(h + 1) = 1000*(2*3 + 1) - 3*(3 + 1) = 6988 elements
"""

from __future__ import annotations

from typing import Literal

from memsim.estimate import Estimate, estimate, term
from memsim.units import Number
from refimpl.errors import OptionError
from refimpl.validation import whole

__all__ = ["bigbird_pairs", "dilated_pairs", "global_pairs", "group_pairs", "window_pairs"]

_LONGFORMER = "arXiv:2004.05150, section 3.1, counted"
_BIGBIRD = "arXiv:2007.14062, appendix D, counted"
_LONGLORA = "arXiv:2309.12307, section 3.2, counted"


def window_pairs(*, N: int, radius: int, causal: bool = False) -> Estimate:
    """Return the scores of a sliding window.

    Parameters
    ----------
    N : int
        Tokens.
    radius : int
        Tokens seen on each side.
    causal : bool
        Whether only those before are.

    Returns
    -------
    Estimate
        In elements.

    Examples
    --------
    >>> window_pairs(N=10, radius=2).total, window_pairs(N=10, radius=2, causal=True).total
    (44, 27)
    """
    values: dict[str, Number] = {"N": whole("N", N, 0), "h": max(min(whole("radius", radius, 0), N - 1), 0)}
    across, lost = ("N*(2h + 1)", "-h*(h + 1)") if not causal else ("N*(h + 1)", "-h*(h + 1)/2")
    terms = [("windows", across), ("cut off at the ends", lost)]
    return estimate(
        "scores of a sliding window",
        [term(name, formula, values, "elements", _LONGFORMER) for name, formula in terms],
        formula=f"{across} - {lost[1:]}",
        values=values,
    )


def dilated_pairs(*, N: int, radius: int, dilation: int) -> Estimate:
    """Return the scores of a dilated window: a window for each class of positions modulo the dilation.

    Parameters
    ----------
    N, radius : int
        As for `window_pairs`.
    dilation : int
        Distance between two keys.

    Returns
    -------
    Estimate
        In elements.

    Examples
    --------
    >>> dilated_pairs(N=10, radius=2, dilation=3).total, window_pairs(N=10, radius=2).total
    (32, 44)
    """
    length, rest = divmod(whole("N", N, 0), whole("dilation", dilation))
    classes = [("longer classes", rest, length + 1), ("shorter classes", dilation - rest, length)]
    terms = []
    for name, count, tokens in classes:
        reach = max(min(whole("radius", radius, 0), tokens - 1), 0)
        values: dict[str, Number] = {"c": count, "n": tokens, "h": reach}
        terms.append(term(name, "c*(n*(2h + 1) - h*(h + 1))", values, "elements", _LONGFORMER))
    return estimate("scores of a dilated window", terms)


def global_pairs(*, N: int, radius: int, global_tokens: int) -> Estimate:
    """Return the scores of a window with global tokens at the start of the sequence.

    Parameters
    ----------
    N, radius : int
        As for `window_pairs`.
    global_tokens : int
        g, of the first tokens: [CLS], or a question.

    Returns
    -------
    Estimate
        In elements.

    Examples
    --------
    >>> [global_pairs(N=10, radius=2, global_tokens=g).total for g in (0, 1, 10)]
    [44, 58, 100]
    """
    if whole("global_tokens", global_tokens, 0) > whole("N", N, 0):
        raise OptionError(f"global_tokens: expected at most N = {N}, got {global_tokens}")
    rest = N - global_tokens
    reach = max(min(whole("radius", radius, 0), rest - 1), 0)
    values: dict[str, Number] = {"N": N, "g": global_tokens, "h": reach}
    terms = [
        ("global queries", "g*N"),
        ("global keys of local queries", "g*(N - g)"),
        ("windows of local queries", "(N - g)*(2h + 1) - h*(h + 1)"),
    ]
    return estimate(
        "scores of a window with global tokens",
        [term(name, formula, values, "elements", _LONGFORMER) for name, formula in terms],
        leaves_out="global tokens elsewhere, which cut windows in two",
    )


def bigbird_pairs(
    *, N: int, block_size: int = 64, window_blocks: int = 3, random_blocks: int = 3
) -> Estimate:
    """Return the scores of BigBird whose first and last block are global.

    Parameters
    ----------
    N : int
        Tokens, a multiple of the block size.
    block_size, window_blocks, random_blocks : int
        b, w, which is odd, and r.

    Returns
    -------
    Estimate
        In elements.

    Raises
    ------
    OptionError
        If b does not divide N, w is even, or there are too few blocks to draw from.

    Examples
    --------
    >>> bigbird_pairs(N=4096).total, 4096**2
    (2547712, 16777216)
    """
    blocks, ragged = divmod(whole("N", N), whole("block_size", block_size))
    if ragged or whole("window_blocks", window_blocks) % 2 == 0:
        raise OptionError(
            f"bigbird: b must divide N and w be odd; got N={N}, b={block_size}, w={window_blocks}"
        )
    if blocks < 2 + window_blocks + whole("random_blocks", random_blocks, 0):
        raise OptionError(f"bigbird: expected at least 2 + w + r blocks, got {blocks}")
    values: dict[str, Number] = {
        "n": blocks, "b": block_size, "w": window_blocks, "r": random_blocks, "p": (window_blocks - 1) // 2,
    }  # fmt: skip
    terms = [
        ("global queries", "2b²*n"),
        ("other queries", "b²*(n - 2)*(2 + w + r)"),
        ("window blocks that are global or beyond the ends", "-b²*p*(p + 1)"),
    ]
    return estimate(
        "scores of BigBird", [term(name, formula, values, "elements", _BIGBIRD) for name, formula in terms]
    )


def group_pairs(
    *, N: int, group_size: int, shifted: bool = False, ends: Literal["roll", "no_wrap"] = "roll",
    causal: bool = False,
) -> Estimate:  # fmt: skip
    """Return the scores of a head that attends in groups.

    Parameters
    ----------
    N, group_size : int
        Tokens, and g, which is even and divides them.
    shifted : bool
        Whether the head is one of those that are shifted.
    ends : {"roll", "no_wrap"}
        As for `refimpl.attention.shifted_groups_attention`.
    causal : bool
        Whether a token sees only those before it in its group.

    Returns
    -------
    Estimate
        In elements.

    Examples
    --------
    >>> [group_pairs(N=8, group_size=4, shifted=True, ends=ends).total for ends in ("roll", "no_wrap")]
    [32, 24]
    """
    if whole("group_size", group_size) % 2 or whole("N", N, 0) % group_size:
        raise OptionError(f"group_size: expected an even divisor of N = {N}, got {group_size}")
    values: dict[str, Number] = {"N": N, "g": group_size}
    terms = [("groups", "N*(g + 1)/2" if causal else "N*g")]
    if shifted and ends == "no_wrap" and N:
        terms.append(("the group at the ends, cut in two", "-g²/4" if causal else "-g²/2"))
    return estimate(
        "scores of a head in groups",
        [term(name, formula, values, "elements", _LONGLORA) for name, formula in terms],
    )
