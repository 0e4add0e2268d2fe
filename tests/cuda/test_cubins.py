"""Kernels kept on disk, with a driver that only remembers: keys, whole files, what is broken or refused."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cuda_backend import capture, cubins
from cuda_backend.cubins import Image


class Driver:
    """Loads any cubin but the refused ones, in relaxed mode only; its version and the GPU's can be set."""

    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=75, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=76
    )
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED=2)

    def __init__(self) -> None:
        self.mode = 0
        self.version, self.capability = 13000, (9, 0)
        self.refused: set[bytes] = set()

    def cuDriverGetVersion(self) -> tuple[int, int]:
        return 0, self.version

    def cuDeviceGetAttribute(self, kind: int, _: int) -> tuple[int, int]:
        return 0, self.capability[kind - 75]

    def cuThreadExchangeStreamCaptureMode(self, mode: int) -> tuple[int, int]:
        before, self.mode = self.mode, mode
        return 0, before

    def cuModuleLoadData(self, cubin: bytes) -> tuple[Any, Any]:
        assert self.mode == 2, "the strictest mode refuses modules while anything is under capture"
        return (SimpleNamespace(name="CUDA_ERROR_INVALID_IMAGE") if cubin in self.refused else 0), cubin

    def cuModuleGetFunction(self, module: bytes, entry: bytes) -> tuple[int, tuple[bytes, bytes]]:
        return 0, (module, entry)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Driver:
    fake = Driver()
    for module in (capture, cubins):
        monkeypatch.setattr(module, "driver", fake)
    monkeypatch.setenv("FRUGAL_KERNEL_CACHE", str(tmp_path / "kernels"))
    _forget()
    return fake


def _forget() -> None:
    """Forget what a process knows of its sources, driver and GPUs."""
    cubins._versions.cache_clear()
    cubins._capability.cache_clear()


class Compiler:
    """Counts how often it was asked."""

    def __init__(self, code: bytes = b"\x7fELF\n\x00code") -> None:
        self.calls, self.image = 0, Image("kernel_entry", code)

    def __call__(self) -> Image:
        self.calls += 1
        return self.image


def load(make: Compiler, *variant: object, device: int = 0) -> Any:
    return cubins.load("kernel", variant, device, make)


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "kernels").iterdir())


def test_the_second_process_compiles_nothing(driver: Driver, tmp_path: Path) -> None:
    make = Compiler()
    expected = (make.image.cubin, b"kernel_entry")
    assert load(make, "f16", 128) == expected
    _forget()
    assert load(make, "f16", 128) == expected
    assert make.calls == 1
    assert [path.suffix for path in files(tmp_path)] == [".cubin"]


def test_variant_driver_gpu_and_versions_are_of_the_key(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Compiler()
    load(make, "f16", 128)
    load(make, "f16", 64)
    driver.version = 13010
    _forget()
    load(make, "f16", 128)
    driver.capability = (10, 0)
    _forget()
    load(make, "f16", 128)
    monkeypatch.setattr(cubins.metadata, "version", lambda package: f"{package} 99")
    _forget()
    load(make, "f16", 128)
    assert make.calls == len(files(tmp_path)) == 5


def test_a_change_of_any_source_is_another_key(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "package"
    (package / "ptx").mkdir(parents=True)
    for name in ("cubins.py", "ptx/wgmma.py"):
        (package / name).write_text("one = 1\n")
    monkeypatch.setattr(cubins, "__file__", str(package / "cubins.py"))
    seen = set()
    for change in (
        lambda: None,
        lambda: (package / "ptx/wgmma.py").write_text("one = 2\n"),
        lambda: (package / "ptx/wgmma.py").rename(package / "ptx/mma.py"),
        lambda: (package / "new.py").write_text(""),
    ):
        change()
        _forget()
        seen.add(cubins._place("kernel", (), 0))
    assert len(seen) == 4


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: b"",
        lambda data: data.replace(b"code", b"cod3"),
        lambda data: data.replace(b"kernel_entry", b"kernel_entri"),
        lambda data: data.replace(b"frugal kernel 1", b"frugal kernel 0"),
    ],
)
def test_a_damaged_file_is_compiled_again_and_replaced(driver: Driver, tmp_path: Path, damage: Any) -> None:
    make = Compiler()
    load(make, "f16")
    (path,) = files(tmp_path)
    sound = path.read_bytes()
    path.write_bytes(damage(sound))
    assert load(make, "f16") == (make.image.cubin, b"kernel_entry")
    assert make.calls == 2
    assert path.read_bytes() == sound


def test_a_file_that_the_driver_refuses_is_compiled_again(driver: Driver, tmp_path: Path) -> None:
    load(Compiler(b"old"), "f16")
    driver.refused.add(b"old")
    make = Compiler(b"new")
    assert load(make, "f16") == (b"new", b"kernel_entry")
    assert load(make, "f16") == (b"new", b"kernel_entry")
    assert make.calls == 1


def test_what_cannot_be_loaded_at_all_is_an_error(driver: Driver) -> None:
    driver.refused.add(b"bad")
    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_IMAGE"):
        load(Compiler(b"bad"), "f16")
    assert driver.mode == 0


def test_kernels_are_compiled_and_loaded_under_capture(driver: Driver) -> None:
    """Numba loads what it compiles; afterwards the thread's mode is what it was."""
    modes = []

    class Numba(Compiler):
        def __call__(self) -> Image:
            modes.append(driver.mode)
            return super().__call__()

    load(Numba(), "f16")
    assert driver.mode == 0
    driver.mode = 1
    load(Numba(), "f16")
    assert (modes, driver.mode) == ([2], 1)


def test_off_writes_and_reads_nothing(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FRUGAL_KERNEL_CACHE", "off")
    make = Compiler()
    load(make, "f16")
    load(make, "f16")
    assert make.calls == 2
    assert not (tmp_path / "kernels").exists()


def test_a_folder_that_cannot_be_made_costs_time_only(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FRUGAL_KERNEL_CACHE", str(tmp_path / "file" / "kernels"))
    make = Compiler()
    assert load(make, "f16") == (make.image.cubin, b"kernel_entry")
    assert make.calls == 1


def test_a_write_that_fails_half_way_leaves_nothing(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    load(Compiler(), "f16")
    assert files(tmp_path) == []


def test_readers_never_see_half_a_file(driver: Driver, tmp_path: Path) -> None:
    """Several writers of one large file, and readers meanwhile: what is there is whole."""
    image = Image("kernel_entry", os.urandom(1 << 20))
    place = tmp_path / "kernels" / "kernel.cubin"
    stop, broken = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            if place.exists() and cubins._read(place) != image:
                broken.append(place)

    readers = [threading.Thread(target=read) for _ in range(2)]
    writers = [
        threading.Thread(target=lambda: [cubins._write(place, image) for _ in range(15)]) for _ in range(3)
    ]
    for thread in (*readers, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    for thread in readers:
        thread.join()
    assert not broken
    assert files(tmp_path) == [place]


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_the_folder_is_the_users_alone(driver: Driver, tmp_path: Path) -> None:
    load(Compiler(), "f16")
    assert stat.S_IMODE((tmp_path / "kernels").stat().st_mode) == 0o700


def test_where_the_folder_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FRUGAL_KERNEL_CACHE", raising=False)
    base = "LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME"
    monkeypatch.setenv(base, str(tmp_path))
    assert cubins.folder() == tmp_path / "frugal" / "kernels"
    monkeypatch.setenv(base, "relative")
    assert cubins.folder() == Path("~").expanduser() / ".cache" / "frugal" / "kernels"
    monkeypatch.setenv("FRUGAL_KERNEL_CACHE", str(tmp_path / "mine"))
    assert cubins.folder() == tmp_path / "mine"
