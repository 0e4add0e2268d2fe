"""Where merges must stop: the chunks that text is cut into before byte-pair encoding.

>>> chunks_of(["I'm 99 years", b"old"], split="gpt2")
[b'I', b"'m", b' 99', b' years', b'old']
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Literal, TypeAlias

from refimpl.errors import DTypeError, OptionError

__all__ = ["Split", "Text", "chunks_of", "split_gpt2"]

Split = Literal["none", "gpt2"]
Text: TypeAlias = str | bytes | Sequence[str | bytes]

# Unicode's White_Space; Python's str.isspace also has the separators U+001C to U+001F.
_WHITE_SPACE = frozenset("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | {
    chr(code) for code in range(0x2000, 0x200B)
}
_CONTRACTION = re.compile(r"'(?:[stmd]|re|ve|ll)")
# GPT-2's pattern with each character replaced by its class: letter, number, space, other white space, other.
_WORD = re.compile(r"s?L+|s?N+|s?O+|[sw]+(?![LNO])|[sw]+")


def split_gpt2(text: str) -> list[str]:
    """Return the pieces of `text` by GPT-2's rule: contractions, words, numbers and punctuation, spaces.

    A piece takes one space in front of it.  Of a longer run of white space the last character is left for
    the piece that follows.

    References
    ----------
    .. [1] openai/gpt-2 @9b63575, src/encoder.py, ``Encoder.pat``.

    Examples
    --------
    >>> split_gpt2("we'll  go to  B2!")
    ['we', "'ll", ' ', ' go', ' to', ' ', ' B', '2', '!']
    """
    classes = "".join(map(_class_of, text))
    pieces, start = [], 0
    while start < len(text):
        match = _CONTRACTION.match(text, start) or _WORD.match(classes, start)
        end = len(text) if match is None else match.end()  # a class always matches
        pieces.append(text[start:end])
        start = end
    return pieces


def _class_of(character: str) -> str:
    if character in _WHITE_SPACE:
        return "s" if character == " " else "w"
    category = unicodedata.category(character)[0]
    return category if category in "LN" else "O"


def chunks_of(text: Text, *, split: Split = "none") -> list[bytes]:
    r"""Return `text` as chunks of bytes that no merge crosses.

    Parameters
    ----------
    text : str, bytes, or a sequence of them
        Strings stand for their UTF-8 bytes.  The items of a sequence are chunks, or are split further.
    split : {"none", "gpt2"}
        What to split each item by (`split_gpt2`); bytes that are no UTF-8 count as punctuation.

    Returns
    -------
    list of bytes
        Joined they are the bytes of `text`.

    Raises
    ------
    DTypeError
        If something is neither text nor bytes.
    OptionError
        If `split` is unknown.

    Examples
    --------
    >>> chunks_of("naïve")
    [b'na\xc3\xafve']
    """
    if split not in ("none", "gpt2"):
        raise OptionError(f"split: expected 'none' or 'gpt2', got {split!r}")
    chunks: list[bytes] = []
    for item in text if isinstance(text, list | tuple) else [text]:
        if not isinstance(item, str | bytes):
            raise DTypeError(f"text: expected str, bytes or a sequence of them, got {type(item).__name__}")
        # "surrogateescape" carries any byte through a string and back.
        string = item if isinstance(item, str) else item.decode("utf-8", "surrogateescape")
        pieces = split_gpt2(string) if split == "gpt2" else [string]
        chunks += [piece.encode("utf-8", "surrogateescape") for piece in pieces]
    return [chunk for chunk in chunks if chunk]
