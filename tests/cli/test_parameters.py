import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.parameters import AXES, COUNT, COUNTS, DTYPES, SIZES, axis_text

NAMES = st.from_regex(r"[A-Za-z][A-Za-z0-9_]{0,8}", fullmatch=True)
VALUES = st.one_of(
    st.integers(-(10**6), 10**6),
    st.booleans(),
    st.none(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["top_left", "3x5", "bottom_right"]),
)


@pytest.mark.parametrize(
    ("text", "value"),
    [("64", 64), ("7.5e9", 7_500_000_000), ("7.5B", 7_500_000_000), ("1T", 10**12), ("125M", 125_000_000),
     ("4K", 4000), ("1.5k", 1500), ("1_000", 1000)],
)  # fmt: skip
def test_count_reads_scales(text, value):
    assert COUNT.convert(text, None, None) == value


@pytest.mark.parametrize(
    "text", ["-1", "0", "nan", "inf", "-inf", "1e999x", "", "x", "1.5", "4KB", "1,2", "0x10"]
)
def test_count_refuses_with_a_message_about_the_value(text):
    with pytest.raises(click.BadParameter, match="expected a") as caught:
        COUNT.convert(text, None, None)
    assert repr(text) in caught.value.message


def test_lists():
    assert COUNTS.convert("1, 4,16", None, None) == (1, 4, 16)
    assert SIZES.convert("192KiB,40GB,512", None, None) == (196608, 40 * 10**9, 512)
    assert DTYPES.convert("fp16,bfloat16,fp64", None, None) == ("float16", "bfloat16", "float64")
    for bad in ("1,", ",1", "1,,2"):
        with pytest.raises(click.BadParameter):
            COUNTS.convert(bad, None, None)


@pytest.mark.parametrize("text", ["0", "-1", "1.5B", "12furlongs", "nan"])
def test_sizes_refuse(text):
    with pytest.raises(click.BadParameter):
        SIZES.convert(text, None, None)


@given(
    st.dictionaries(
        st.from_regex(r"[A-Za-z][A-Za-z0-9_]{0,8}", fullmatch=True), VALUES, min_size=1, max_size=5
    )
)
def test_axes_read_what_a_reproducer_writes(axes):
    text = ",".join(f"{name}={axis_text(value)}" for name, value in axes.items())
    parsed = AXES.convert(text, None, None)
    assert parsed == axes
    assert [type(value) for value in parsed.values()] == [type(value) for value in axes.values()]


@pytest.mark.parametrize("text", ["", "Tq", "Tq=", "=3", "Tq=1,Tq=2", "Tq=1,,D=2", "T q=1"])
def test_axes_refuse(text):
    with pytest.raises(click.BadParameter):
        AXES.convert(text, None, None)


@pytest.mark.parametrize("text", ["nan", "inf"])
def test_an_axis_is_never_a_number_that_is_none(text):
    assert AXES.convert(f"x={text}", None, None) == {"x": text}
