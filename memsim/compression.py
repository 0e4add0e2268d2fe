"""What compressed weights take: bits of codebooks, of NF4 with quantised scales, and of ternary codes.

>>> float(nf4_bits().total)
4.126953125
"""

from __future__ import annotations

import math
from fractions import Fraction

from memsim.estimate import Estimate, estimate, term
from memsim.units import Quantity, exact
from refimpl.errors import OptionError
from refimpl.validation import whole

__all__ = ["codebook_bits", "nf4_bits", "nf4_bytes", "palette_bits", "qmoe_bytes", "ternary_bound"]


def nf4_bits(*, block_size: Quantity = 64, scale_block_size: Quantity = 256) -> Estimate:
    """Return the bits a parameter of NF4 with double quantisation.

    Parameters
    ----------
    block_size : int
        Weights that share an absmax.
    scale_block_size : int
        Absmax that share a scale in float32.

    Returns
    -------
    Estimate
        Without the one offset of all absmax.

    References
    ----------
    .. [1] Dettmers et al., 2023, arXiv:2305.14314, section 3.

    Examples
    --------
    >>> [float(part.value) for part in nf4_bits().terms]
    [4.0, 0.125, 0.001953125]
    """
    values = {"B": exact(block_size, "block_size"), "C": exact(scale_block_size, "scale_block_size")}
    if min(values.values()) < 1:
        raise OptionError(f"block sizes: expected at least 1, got {block_size} and {scale_block_size}")
    source = "arXiv:2305.14314, section 3"
    parts = [("codes", "4"), ("codes of absmax", "8/B"), ("scales of those", "32/(B·C)")]
    terms = [term(name, formula, values, "1", source) for name, formula in parts]
    return estimate("bits a parameter", terms, leaves_out="one float32 offset a tensor")


def nf4_bytes(*, n: Quantity, block_size: Quantity = 64, scale_block_size: Quantity = 256) -> Estimate:
    """Return the bytes of one weight in NF4 with double quantisation, ragged last blocks and offset too.

    Parameters
    ----------
    n : int
        Numbers in the weight.
    block_size, scale_block_size : int
        As for `nf4_bits`.

    Returns
    -------
    Estimate
        What `refimpl.quant.qlora_quantize` stores of a float32 weight.

    Raises
    ------
    OptionError
        If a block is empty or `n` negative.

    References
    ----------
    .. [1] Dettmers et al., 2023, arXiv:2305.14314, section 3.

    Examples
    --------
    >>> [int(part.value) for part in nf4_bytes(n=4096 * 4096).terms]
    [8388608, 262144, 4096, 4]
    """
    size = whole("n", n, least=0)
    block, scales = whole("block_size", block_size), whole("scale_block_size", scale_block_size)
    blocks = -(-size // block)
    values = {"pairs": -(-size // 2), "blocks": blocks, "scales": -(-blocks // scales)}
    parts = [
        ("codes", "pairs"),
        ("codes of absmax", "blocks"),
        ("scales of those", "4*scales"),
        ("offset", "4"),
    ]
    return estimate("bytes", [term(a, b, values, "B", "arXiv:2305.14314, section 3") for a, b in parts])


def qmoe_bytes(*, codewords: Quantity, rows: Quantity) -> Estimate:
    """Return the bytes of an expert's weight in QMoE's code; the dictionary is one for all.

    Parameters
    ----------
    codewords : int
        Of all rows: between one for 28 weights and one for two.
    rows : int
        Outputs.

    Returns
    -------
    Estimate
        Codewords of 16 bits, row starts of 32, and a least and a greatest number in bfloat16 for each row.

    Raises
    ------
    OptionError
        If a number is negative.

    References
    ----------
    .. [1] IST-DASLab/qmoe, sub1.py, ``Sub1Linear``.

    Examples
    --------
    >>> qmoe_bytes(codewords=1000, rows=10).total
    2084
    """
    values = {"c": whole("codewords", codewords, least=0), "n": whole("rows", rows, least=0)}
    parts = [("codewords", "2*c"), ("row starts", "4*(n + 1)"), ("levels", "4*n")]
    return estimate("bytes", [term(a, b, values, "B", "IST-DASLab/qmoe, sub1.py") for a, b in parts])


def codebook_bits(*, n: Quantity, k: Quantity, d: Quantity = 1, bits: Quantity = 32) -> Estimate:
    """Return the bits of n codes of k centroids, and of the centroids.

    Parameters
    ----------
    n, k : int
        How many vectors and centroids.
    d, bits : int
        Numbers a centroid, and bits of each.

    Returns
    -------
    Estimate
        ``n ceil(log2 k) + k d bits``.

    References
    ----------
    .. [1] Han et al., 2016, arXiv:1510.00149, section 3, eq. 1.

    Examples
    --------
    >>> codebook_bits(n=10_000, k=16).total
    40512
    """
    count = exact(k, "k")
    if not isinstance(count, int) or count < 1:
        raise OptionError(f"k: expected a whole number of at least 1, got {k}")
    values = {"n": exact(n, "n"), "k": count, "d": exact(d, "d"), "b": exact(bits, "bits"),
              "c": (count - 1).bit_length()}  # fmt: skip
    source = "arXiv:1510.00149, section 3, eq. 1"
    return estimate(
        "bits",
        [term("codes", "n·c", values, "1", source), term("centroids", "k·d·b", values, "1", source)],
    )


def palette_bits(*, k: Quantity, depth: Quantity) -> Estimate:
    """Return the bits a pixel of an image in k colours, its palette left out.

    Parameters
    ----------
    k : int
        Colours.
    depth : int
        Bits of a colour; they count for the palette alone.

    Returns
    -------
    Estimate

    Examples
    --------
    >>> palette_bits(k=16, depth=24).total
    4
    """
    codes = codebook_bits(n=1, k=k, bits=depth)
    return estimate("bits a pixel", [codes.terms[0]], leaves_out="the palette, k depth bits an image")


def ternary_bound(*, zeros: Quantity, bits: Quantity = 16) -> Estimate:
    """Return how many times smaller than `bits` a weight independent ternary weights can be coded.

    Parameters
    ----------
    zeros : float
        Share of zeros, in (0, 1); -1 and 1 share the rest.
    bits : int
        Of an uncompressed weight.

    Returns
    -------
    Estimate
        `bits` over the entropy.

    References
    ----------
    .. [1] Shannon, 1948, doi:10.1002/j.1538-7305.1948.tb01338.x, theorem 4.

    Examples
    --------
    >>> round(float(ternary_bound(zeros=0.885).total), 2)
    25.4
    """
    share = float(exact(zeros, "zeros"))
    if not 0 < share < 1:
        raise OptionError(f"zeros: expected a share in (0, 1), got {zeros}")
    other = (1 - share) / 2
    entropy = Fraction(-(share * math.log2(share) + 2 * other * math.log2(other)))
    values = {"b": exact(bits, "bits"), "H": entropy}
    return estimate("times smaller", [term("bound", "b/H", values, "1", "Shannon 1948, theorem 4")])
