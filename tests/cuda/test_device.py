"""The portable forward kernel on a GPU: the grid of shapes, every option, arrays of every library."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cuda_backend
from refimpl.attention.samples import EXTRAS, sample_attention
from refimpl.errors import CapacityError, DTypeError, UnsupportedError
from refimpl.numerics import widen
from refimpl.registry import Case
from refimpl.tolerances import cast
from tests.cuda.judge import DTYPES, arrays, difference

pytestmark = pytest.mark.cuda

flash_attention: Any = None


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    """Import the kernels only where they run: the import decides between GPU and simulator."""
    global flash_attention
    reason = cuda_backend.availability("cuda")
    if reason:
        pytest.skip(reason)
    flash_attention = cuda_backend.flash_attention


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("D", [16, 64, 80, 128])
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_grid(dtype: str, D: int, causal: bool) -> None:
    for n in (1, 17, 63, 64, 65, 1000):
        case = Case(arrays((1, n, n, 2, 1, D, D), dtype, seed=n), {"causal": causal, "return_lse": True})
        assert difference(flash_attention, case, dtype) is None, n


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("causal", [False, "bottom_right"])
def test_options(extra: str, causal: Any) -> None:
    axes = {"B": 2, "Tq": 70, "Tk": 131, "Hkv": 2, "group": 2, "D": 40, "Dv": 24}
    drawn = sample_attention(np.random.default_rng(1), **axes, causal=causal, extra=extra, return_lse=True)
    assert difference(flash_attention, cast(drawn, DTYPES["float16"]), "float16") is None


@pytest.mark.parametrize(
    "shape",
    [(1, 0, 3, 1, 1, 4, 4), (2, 3, 0, 1, 1, 4, 4), (1, 70, 90, 1, 1, 256, 256), (1, 5, 70, 1, 1, 8, 256)],
)
def test_odd_shapes(shape: tuple[int, ...]) -> None:
    case = Case(arrays(shape, "float32"), {"return_lse": True})  # type: ignore[arg-type]
    assert difference(flash_attention, case, "float32") is None


@pytest.mark.parametrize("blocks", [(3, 5), (128, 128), (64, 32), (1, 100)])
def test_block_sizes(blocks: tuple[int, int]) -> None:
    options = {"block_sizes": blocks, "causal": "top_left"}
    assert (
        difference(flash_attention, Case(arrays((1, 150, 140, 1, 1, 32, 32), "float32"), options), "float32")
        is None
    )


def test_tiles_that_do_not_fit() -> None:
    q, k, v = arrays((1, 4, 4, 1, 1, 256, 256), "float32")
    with pytest.raises(CapacityError, match=r"tiles of \(128, 128\)"):
        flash_attention(q, k, v, block_sizes=(128, 128))


def on_torch(array: Any) -> Any:
    torch = pytest.importorskip("torch")
    if array.dtype == DTYPES["bfloat16"]:
        return torch.from_numpy(array.view(np.int16)).cuda().view(torch.bfloat16)
    return torch.from_numpy(array).cuda()


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_torch_tensors_on_their_stream(dtype: str) -> None:
    """Inputs that a slow kernel on a side stream still writes are read after it, and a result stays there."""
    torch = pytest.importorskip("torch")
    host = arrays((2, 130, 130, 4, 2, 64, 64), dtype)
    expected = flash_attention(*host, causal=True)
    slopes = np.array([0.5, 0.25, 0.125, 0.0625], np.float32)
    biased = flash_attention(*host, causal="top_left", alibi_slopes=slopes, k_lengths=np.array([100, 130]))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        q, k, v = (on_torch(array) for array in host)
        late = torch.zeros_like(q)
        torch.cuda._sleep(50_000_000)
        late.copy_(q)
        out = flash_attention(late, k, v, causal=True)
        lengths = torch.tensor([100, 130], device="cuda", dtype=torch.int32)
        given = on_torch(slopes)
        other = flash_attention(q, k, v, causal="top_left", alibi_slopes=given, k_lengths=lengths)
    assert isinstance(out, torch.Tensor)
    assert out.dtype == q.dtype
    assert out.is_cuda
    stream.synchronize()
    assert np.array_equal(out.float().cpu().numpy(), widen(expected).astype(np.float32))
    assert np.array_equal(other.float().cpu().numpy(), widen(biased).astype(np.float32))


def test_torch_views_gradients_and_explicit_stream() -> None:
    torch = pytest.importorskip("torch")
    packed = torch.randn(2, 70, 3, 4, 32, device="cuda")
    q, k, v = (packed[:, :, i] for i in range(3))
    mask = (torch.rand(2, 1, 1, 70, device="cuda") < 0.7).expand(2, 4, 70, 70)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with pytest.raises(UnsupportedError, match="requires a gradient"):
        flash_attention(q.requires_grad_(), k, v, attn_mask=mask)
    with torch.no_grad():
        found = [flash_attention(q, k, v, attn_mask=mask, stream=s) for s in (stream, stream.cuda_stream)]
    stream.synchronize()
    host = [x.detach().cpu().numpy() for x in (q, k, v)]
    expected = flash_attention(*host, attn_mask=mask.cpu().numpy())
    for out in found:
        assert np.array_equal(out.cpu().numpy(), expected)


def test_mixed_arrays_are_refused() -> None:
    torch = pytest.importorskip("torch")
    q, k, v = arrays((1, 4, 4, 1, 1, 8, 8), "float32")
    with pytest.raises(DTypeError, match="arrays of one library"):
        flash_attention(on_torch(q), k, v)
    with pytest.raises(DTypeError, match="expected a tensor on the GPU, got one on cpu"):
        flash_attention(*(torch.from_numpy(array) for array in (q, k, v)))
    with pytest.raises(DTypeError, match="expected one dtype, got float16, float32"):
        flash_attention(on_torch(q).half(), on_torch(k), on_torch(v))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_cupy_arrays_on_their_stream(dtype: str) -> None:
    cupy = pytest.importorskip("cupy")
    host = arrays((1, 70, 70, 2, 2, 64, 64), dtype)
    expected = flash_attention(*host, return_lse=True)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        found = flash_attention(*(cupy.asarray(array) for array in host), return_lse=True)
        assert isinstance(found.out, cupy.ndarray)
        stream.synchronize()
    assert np.array_equal(found.out.get(), expected.out)
    assert np.array_equal(found.lse.get(), expected.lse)


def test_numba_arrays() -> None:
    cuda = pytest.importorskip("cuda_backend._numba").cuda
    host = arrays((1, 70, 70, 2, 2, 16, 16), "float32")
    found = flash_attention(*(cuda.to_device(array) for array in host))
    assert np.array_equal(found.copy_to_host(), flash_attention(*host))


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_jax_arrays(dtype: str) -> None:
    jax = pytest.importorskip("jax")
    host = arrays((1, 70, 70, 2, 2, 16, 16), dtype)
    found = flash_attention(*(jax.device_put(array) for array in host))
    assert isinstance(found, jax.Array)
    assert np.array_equal(np.asarray(found).view(np.uint8), flash_attention(*host).view(np.uint8))


class OnlyDLPack:
    """A stranger's array: DLPack, a namespace, and nothing else."""

    def __init__(self, tensor: Any) -> None:
        self.tensor, self.shape, self.dtype, self.device = tensor, tensor.shape, tensor.dtype, tensor.device

    def __dlpack__(self, **options: Any) -> Any:
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.tensor.__dlpack_device__()


def test_dlpack_is_read_without_a_copy() -> None:
    torch = pytest.importorskip("torch")
    from cuda_backend.arrays import view

    tensor = torch.arange(24, device="cuda", dtype=torch.float16).reshape(2, 3, 4).transpose(0, 2)
    given = view("x", OnlyDLPack(tensor), 0)
    assert given.address == tensor.data_ptr()
    assert given.shape == (4, 3, 2)
    assert given.strides == (2, 8, 24)
    assert given.dtype == "float16"


def test_stream_zero_of_the_array_interface_is_refused() -> None:
    from cuda_backend.arrays import view

    interface = {"shape": (1,), "typestr": "<f4", "data": (1, False), "version": 3, "stream": 0}
    bad = type(
        "Bad", (), {"shape": (1,), "dtype": np.dtype("float32"), "__cuda_array_interface__": interface}
    )
    with pytest.raises(DTypeError, match="stream 0, which is not allowed"):
        view("x", bad(), 0)
