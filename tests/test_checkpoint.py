"""Checkpoints: what is written is read back, also by safetensors itself, and each lie is one clear error."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.checkpoint import CheckpointError, encode, load_tensors, load_tokenizer, read_config, save
from refimpl.errors import DTypeError
from refimpl.safetensors_format import DTYPES, read_header, read_tensors, write_tensors

ITEM = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DATA = b"\0" * 8


def file_of(header: Any, data: bytes = DATA, *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


GOOD = file_of({"w": ITEM})
LIES = {
    "empty file": (b"", "cut off: 0 bytes"),
    "half a length": (GOOD[:5], "cut off: 5 bytes"),
    "header cut off": (GOOD[:20], "cut off: its header claims"),
    "data cut off": (GOOD[:-1], "cut off: it ends at byte"),
    "data missing": (GOOD[:-8], "cut off: it ends at byte"),
    "bytes too many": (GOOD + b"\0", "1 bytes after the last tensor belong to none"),
    "header of an exabyte": (file_of({"w": ITEM}, length=2**60), "at most 100000000 are allowed"),
    "header longer than the file": (file_of({"w": ITEM}, length=10**6), "its header claims 1000000 bytes"),
    "header shorter than it is": (file_of({"w": ITEM}, length=9), "expected JSON"),
    "no JSON": (file_of(b"hello world"), "expected JSON"),
    "no UTF-8": (file_of(b'{"\xff": 1}'), "expected UTF-8, byte 2"),
    "no object": (file_of([ITEM]), "expected an object, got list"),
    "a pickle": (b"\x80\x04\x95" + b"\xff" * 100, "are allowed"),
    "brackets without end": (file_of(b"[" * 10**6), "nested too deeply"),
    "objects without end": (file_of(b'{"a":' * 10**5), "nested too deeply"),
    "NaN": (file_of(b'{"w": NaN}'), "which has no NaN"),
    "a huge integer": (file_of(b'{"w": ' + b"9" * 10**5 + b"}"), "expected JSON"),
    "key twice": (file_of(b'{"w": %s, "w": %s}' % (2 * (json.dumps(ITEM).encode(),))), "'w' stands twice"),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}, "w": ITEM}), "__metadata__"),
    "metadata a list": (file_of({"__metadata__": [], "w": ITEM}), "__metadata__"),
    "entry no object": (file_of({"w": 3}), "w: expected an object with dtype"),
    "entry without offsets": (file_of({"w": {"dtype": "F32", "shape": [2]}}), "data_offsets"),
    "entry with more": (file_of({"w": {**ITEM, "code": "x"}}), "expected an object with dtype, shape"),
    "unknown dtype": (file_of({"w": {**ITEM, "dtype": "O"}}), "expected a dtype of U64, I64"),
    "dtype of NumPy": (file_of({"w": {**ITEM, "dtype": "<f4"}}), "expected a dtype of"),
    "dtype a list": (file_of({"w": {**ITEM, "dtype": []}}), "got list"),
    "another dtype": (file_of({"w": {**ITEM, "dtype": "F64"}}), "takes 16 bytes, its offsets span 8"),
    "offsets too wide": (file_of({"w": {**ITEM, "shape": [1]}}), "takes 4 bytes, its offsets span 8"),
    "negative axis": (file_of({"w": {**ITEM, "shape": [-2]}}), "shape: expected"),
    "axes that cancel": (file_of({"w": {**ITEM, "shape": [-1, -2]}}), "shape: expected"),
    "fractional axis": (file_of({"w": {**ITEM, "shape": [2.0]}}), "shape: expected"),
    "axis true": (file_of({"w": {**ITEM, "shape": [True]}}), "shape: expected"),
    "shape a number": (file_of({"w": {**ITEM, "shape": 2}}), "shape: expected"),
    "too many axes": (file_of({"w": {**ITEM, "shape": [1] * 40 + [2]}}), "at most 32"),
    "shape of an exabyte": (file_of({"w": {**ITEM, "shape": [2**58]}}), "takes 1152921504606846976 bytes"),
    "shape that wraps to 2": (file_of({"w": {**ITEM, "shape": [2**62, 4, 2]}}), "its offsets span 8"),
    "extent of an exabyte": (
        file_of({"w": {"dtype": "U8", "shape": [2**60], "data_offsets": [0, 2**60]}}),
        "cut off: it ends at byte",
    ),
    "offsets beyond the file": (file_of({"w": {**ITEM, "data_offsets": [8, 16]}}), "cut off: it ends"),
    "offsets reversed": (file_of({"w": {**ITEM, "data_offsets": [8, 0]}}), "the first not the larger"),
    "offsets negative": (file_of({"w": {**ITEM, "data_offsets": [-8, 0]}}), "data_offsets: expected"),
    "offsets of three": (file_of({"w": {**ITEM, "data_offsets": [0, 4, 8]}}), "data_offsets: expected"),
    "overlap": (
        file_of({"a": ITEM, "b": {**ITEM, "data_offsets": [4, 12]}}, b"\0" * 12),
        "a and b overlap, at bytes",
    ),
    "same place": (file_of({"a": ITEM, "b": ITEM}), "a and b overlap"),
    "gap": (file_of({"a": ITEM, "b": {**ITEM, "data_offsets": [9, 17]}}, b"\0" * 17), "leave a gap"),
    "gap at the start": (file_of({"w": {**ITEM, "data_offsets": [4, 12]}}, b"\0" * 12), "the header and w"),
    "boolean of 2": (
        file_of({"w": {"dtype": "BOOL", "shape": [8], "data_offsets": [0, 8]}}, b"\0\1\2\0\0\0\0\0"),
        "a boolean is byte 0 or 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_one_clear_error(name: str, tmp_path: Path) -> None:
    content, message = LIES[name]
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as caught:
            read_tensors(file)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert message in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert peak < 3e6 + 20 * len(content), f"{peak} bytes allocated for a file of {len(content)}"


@given(st.data())
def test_damage_is_an_error_or_harmless_but_never_a_crash(data: Any) -> None:
    """Any byte of a small file changed, cut or added: tensors of the claimed shapes, or `CheckpointError`."""
    import tempfile

    content = bytearray(file_of({"w": ITEM, "b": {"dtype": "I16", "shape": [2, 1], "data_offsets": [8, 12]}},
                                b"\0" * 12))  # fmt: skip
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(("change", "cut", "insert"))):
            case "change":
                content[place] = data.draw(st.integers(0, 255))
            case "cut":
                del content[place]
            case "insert":
                content.insert(place, data.draw(st.integers(0, 255)))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "damaged.safetensors"
        file.write_bytes(bytes(content))
        try:
            found = read_tensors(file)
        except CheckpointError:
            return
        assert sum(array.nbytes for array in found.values()) <= len(content)


def test_the_good_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(GOOD)
    np.testing.assert_array_equal(read_tensors(tmp_path / "a")["w"], np.zeros(2, np.float32))


def _every_dtype() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    found: dict[str, Any] = {}
    for name, code in DTYPES.items():
        if name != "BF16":
            found[name] = rng.integers(0, 2, (3, 2)).astype(np.dtype(code).newbyteorder("="))
    return found | {"scalar": np.array(2.5), "empty": np.zeros((0, 4), np.float16)}


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    tensors = _every_dtype()
    tensors["fortran"] = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    tensors["big_endian"] = np.arange(3, dtype=">i4")
    write_tensors(tmp_path / "a", tensors)
    found = read_tensors(tmp_path / "a")
    assert set(found) == set(tensors)
    for name, array in found.items():
        assert array.dtype == tensors[name].dtype.newbyteorder("=")
        np.testing.assert_array_equal(array, tensors[name])
        assert array.flags.writeable
    assert list(read_tensors(tmp_path / "a", names=["F32"])) == ["F32"]
    with pytest.raises(CheckpointError, match="there is no tensor 'nope'"):
        read_tensors(tmp_path / "a", names=["nope"])


def test_bfloat16_is_read_exactly_as_float32(tmp_path: Path) -> None:
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    x = np.array([[1.0, -3.140625], [np.inf, 1e-40]]).astype(bfloat16)
    write_tensors(tmp_path / "a", {"x": x})
    assert read_header(tmp_path / "a")["x"].dtype == "BF16"
    found = read_tensors(tmp_path / "a")["x"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, x.astype(np.float32))


def test_safetensors_itself_reads_and_writes_the_same_bytes(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.numpy")
    tensors = _every_dtype()
    write_tensors(tmp_path / "ours", tensors, metadata={"format": "np"})
    for name, array in library.load_file(tmp_path / "ours").items():
        np.testing.assert_array_equal(array, tensors[name])
    library.save_file(tensors, tmp_path / "theirs", metadata={"format": "np"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    for name, array in read_tensors(tmp_path / "theirs").items():
        np.testing.assert_array_equal(array, tensors[name])


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a", {"w": np.ones(2)})
    before = (tmp_path / "a").read_bytes()
    with pytest.raises(DTypeError, match="z: safetensors holds"):
        write_tensors(tmp_path / "a", {"w": np.zeros(2), "z": np.zeros(1, complex)})
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_tensors(tmp_path / "no such folder" / "a", {"w": np.zeros(2)})
    assert (tmp_path / "a").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_a_directory_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    tensors = {"w": np.eye(3, dtype=np.float16)}
    save(tmp_path / "m", tensors, config={"model_type": "bert"}, files={"vocab.txt": b"a\n"})
    assert read_config(tmp_path / "m") == {"model_type": "bert"}
    np.testing.assert_array_equal(load_tensors(tmp_path / "m")["w"], tensors["w"])
    with pytest.raises(CheckpointError, match="something stands there already"):
        save(tmp_path / "m", tensors, config={})
    with pytest.raises(CheckpointError, match="plain file names"):
        save(tmp_path / "n", tensors, config={}, files={"../x": b""})
    with pytest.raises(DTypeError):
        save(tmp_path / "n", {"w": np.zeros(1, complex)}, config={})
    assert [file.name for file in tmp_path.iterdir()] == ["m"]


def _sharded(folder: Path, weight_map: Any) -> Path:
    write_tensors(folder / "one.safetensors", {"a": np.ones(2), "b": np.zeros(1)})
    write_tensors(folder / "two.safetensors", {"c": np.arange(3)})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_shards_are_put_together(tmp_path: Path) -> None:
    one, two = "one.safetensors", "two.safetensors"
    found = load_tensors(_sharded(tmp_path, {"a": one, "c": two, "b": one}))
    assert sorted(found) == ["a", "b", "c"]
    np.testing.assert_array_equal(found["c"], [0, 1, 2])


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ([], "weight_map"),
        ({"a": 3}, "weight_map"),
        ({"a": "../../one.safetensors"}, "plain file names"),
        ({"a": "/etc/passwd"}, "plain file names"),
        ({"a": "one.safetensors"}, "disagree on whether 'b'"),
        ({"a": "one.safetensors", "b": "two.safetensors"}, "disagree on whether"),
        ({"a": "three.safetensors"}, "cannot be read"),
    ],
)
def test_an_index_that_lies_is_one_error(weight_map: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_tensors(_sharded(tmp_path, weight_map))


def test_what_is_no_checkpoint_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a directory"):
        load_tensors(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"there is no model\.safetensors"):
        load_tensors(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_config(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match="pickle"):
        load_tensors(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="expected a JSON object, got list"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(" " * (10**6 + 1))
    with pytest.raises(CheckpointError, match="expected at most 1000000 bytes"):
        read_config(tmp_path)
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="expected a regular file"):
        load_tensors(tmp_path)


def test_a_tokenizer_of_a_vocabulary(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = load_tokenizer(tmp_path)
    ids, mask = encode(tokenizer, ["The cats", "the", ""])
    assert ids.tolist() == [[2, 5, 6, 7, 3], [2, 5, 3, 0, 0], [2, 3, 0, 0, 0]]
    assert mask.sum(axis=1).tolist() == [5, 3, 2]
    assert encode(tokenizer, ["The cats"], length=3).ids.tolist() == [[2, 5, 3]]
    assert encode(tokenizer, []).ids.shape == (0, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{}", "tokenizer cannot be read"),
        (b'{"model": {"type": "Code"}}', "tokenizer cannot be read"),
        (b"[" * 10**5, "nested too deeply"),
        (b"\xff", "expected UTF-8"),
    ],
)
def test_a_tokenizer_that_lies_is_one_error(content: bytes, message: str, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path / "elsewhere")
