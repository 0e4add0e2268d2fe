"""Modules of PyTorch that compute in int8, on a Hopper GPU: in place of linear layers, merged, in graphs."""

from __future__ import annotations

from typing import Any

import pytest

from refimpl.errors import UnsupportedError
from tests.cuda.hopper_torch import hopper_torch

pytestmark = pytest.mark.cuda
torch: Any = None


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    """Import PyTorch only where the kernels run."""
    global torch
    torch = hopper_torch()


def test_a_module_in_the_place_of_a_linear_layer() -> None:
    from cuda_backend.torch_ops import int8_linear, replace_linear

    make = {"device": "cuda", "dtype": torch.float16}
    model = torch.nn.Sequential(
        torch.nn.Linear(100, 300, **make), torch.nn.ReLU(), torch.nn.Linear(300, 7, bias=False, **make)
    )
    x = torch.randn(2, 9, 100, **make)
    with torch.no_grad():
        exact_out = model(x)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        single = int8_linear(model[0])
        assert replace_linear(model) == 2
        found = model(x)
        assert found.shape == (2, 9, 7)
        assert (found - exact_out).float().norm() < 0.05 * exact_out.float().norm()
        fresh = torch.nn.Sequential(
            torch.nn.Linear(100, 300, **make), torch.nn.ReLU(), torch.nn.Linear(300, 7, bias=False, **make)
        )
        replace_linear(fresh)
        fresh.load_state_dict(state)
        assert torch.equal(fresh(x), found)
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(fresh(x), found)
        assert single.codes.dtype == torch.int8
    with pytest.raises(UnsupportedError, match="no gradient"):
        model(x.requires_grad_())


@pytest.mark.parametrize("tokens", [3, 700])
def test_layers_of_one_input_merged(tokens: int) -> None:
    from cuda_backend.torch_ops import int8_linear, merged_int8_linear

    make = {"device": "cuda", "dtype": torch.float16}
    layers = [torch.nn.Linear(512, size, bias=size != 40, **make) for size in (1024, 40, 1024)]
    x = torch.randn(2, tokens, 512, **make)
    x[..., 7] = 20
    with torch.no_grad():
        found = merged_int8_linear(layers)(x)
        for one, layer in zip(found, layers, strict=True):
            # Kernels for few and for many outputs sum outliers in another order: before one rounding.
            alone = int8_linear(layer)(x)
            torch.testing.assert_close(one, alone, rtol=2**-10, atol=2**-10)
            assert (one - layer(x)).float().norm() < 0.05 * layer(x).float().norm()


@pytest.mark.parametrize("tokens", [3, 700])
def test_layers_of_a_model_merged(tokens: int) -> None:
    """Called one after another, also in a graph; after a state was loaded and layers have moved."""
    from cuda_backend.torch_ops import int8_linear, replace_linear

    make = {"device": "cuda", "dtype": torch.float16}

    class Block(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.q = torch.nn.Linear(512, 1024, bias=False, **make)
            self.k, self.v = (torch.nn.Linear(512, n, **make) for n in (40, 1024))

        def forward(self, x: Any) -> Any:
            return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)

    source, model = Block(), Block()
    x = torch.randn(2, tokens, 512, **make)
    x[..., 7] = 20
    with torch.no_grad():
        expected = torch.cat([int8_linear(layer)(x) for layer in (source.q, source.k, source.v)], dim=-1)
        assert replace_linear(model, merge=[("q", "k", "v")]) == 3
        model.load_state_dict(source.state_dict())
        for _ in range(2):
            # Kernels for few and for many outputs sum outliers in another order: before one rounding.
            found = model(x)
            torch.testing.assert_close(found, expected, rtol=2**-10, atol=2**-10)
            starts = {
                part.untyped_storage().data_ptr() for part in (model.q.codes, model.k.codes, model.v.codes)
            }
            assert len(starts) == 1
            assert model.v.ahead is None
            model.cpu().cuda()
        assert torch.equal(model(x), found)
        stream, graph, given = torch.cuda.Stream(), torch.cuda.CUDAGraph(), torch.zeros_like(x)
        with torch.cuda.stream(stream):
            model(given)
            stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            out = model(given)
        given.copy_(x)
        graph.replay()
        assert torch.equal(out, found)
