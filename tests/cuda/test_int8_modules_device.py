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
        with torch.cuda.graph(graph, stream=stream):
            out = model(given)
        given.copy_(x)
        graph.replay()
        assert torch.equal(out, found)


@pytest.mark.parametrize("names", ["qkv", "vqk"])
def test_a_graph_of_merged_layers_computes_all(names: str) -> None:
    """On PyTorch's stream or the warm-up's, whatever that has left, in whichever order they are called."""
    from cuda_backend.torch_ops import replace_linear

    model = torch.nn.ModuleDict({
        name: torch.nn.Linear(512, 136, device="cuda", dtype=torch.float16) for name in "qkv"
    })  # fmt: skip
    replace_linear(model, merge=[("q", "k", "v")])
    given = torch.zeros(20, 512, device="cuda", dtype=torch.float16)

    def called() -> list[Any]:
        return [model[name](given) for name in names]

    stream = torch.cuda.Stream()
    for capture in ({}, {"stream": stream}):
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad():
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                called()
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph, **capture):
                outs = called()
            for outliers in (0, 3):
                draw(given, outliers)
                graph.replay()
                same = given.clone()
                expected = [model[name](same) for name in names]
                torch.cuda.synchronize()
                assert all(map(torch.equal, outs, expected))


def small_model() -> Any:
    """Return two layers, the second of few outputs, whose weights are in int8."""
    from cuda_backend.torch_ops import replace_linear

    make = {"device": "cuda", "dtype": torch.float16}
    torch.manual_seed(0)
    layers = (
        torch.nn.Linear(520, 4400, **make),
        torch.nn.ReLU(),
        torch.nn.Linear(4400, 40, bias=False, **make),
    )
    model = torch.nn.Sequential(*layers).eval()
    assert replace_linear(model) == 2
    return model


def draw(x: Any, outliers: int) -> None:
    """Change an input, with as many columns of outliers."""
    x.normal_().clamp_(-5, 5)
    x[..., :outliers] = -9.0


def follows(replay: Any, given: Any, out: Any, model: Any) -> None:
    """Compare replays of a graph with calls, outliers and their number changing between them."""
    for outliers in (0, 1, 30, 400, 0):
        draw(given, outliers)
        expected = model(given)
        for _ in range(2):
            out.fill_(float("nan"))
            replay()
            assert torch.equal(out, expected), outliers


@pytest.mark.parametrize("warm_up", ["side stream", "default stream", "other shapes", "kernels gone"])
@pytest.mark.parametrize("tokens", [3, 20, 700])
def test_graphs_as_pytorch_captures_them(tokens: int, warm_up: str) -> None:
    """On PyTorch's stream, behind calls on another; without such a call kernels are loaded meanwhile."""
    from cuda_backend.int8 import launches_hopper, plan_hopper

    model, given = small_model(), torch.zeros(tokens, 520, device="cuda", dtype=torch.float16)
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.no_grad():
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(torch.cuda.default_stream() if warm_up == "default stream" else side):
            for _ in range(3):
                model(given[:2] if warm_up == "other shapes" else given)
        torch.cuda.current_stream().wait_stream(side)
        if warm_up == "kernels gone":
            launches_hopper.function_of.cache_clear()
            plan_hopper.linear_plan.cache_clear()
        with torch.cuda.graph(graph):
            out = model(given)
        follows(graph.replay, given, out, model)


def test_graphed_callables() -> None:
    """Of two models, whose graphs share PyTorch's pool and our memory; also under inference mode."""
    models = small_model(), small_model()
    samples = tuple(torch.zeros(n, 520, device="cuda", dtype=torch.float16) for n in (700, 20))
    with torch.no_grad():
        graphed = torch.cuda.make_graphed_callables(
            tuple(model.__call__ for model in models), tuple((sample,) for sample in samples)
        )
        for outliers in (0, 30, 400, 0):
            for each, model, sample in zip(graphed, models, samples, strict=True):
                x = torch.empty_like(sample)
                draw(x, outliers)
                expected = model(x)
                assert torch.equal(each(x), expected), outliers
                with torch.inference_mode():
                    assert torch.equal(each(x), expected), outliers


def test_only_kernels_are_captured() -> None:
    """And of these no more than calls launch: memory and descriptors were there before."""
    from cuda.bindings import driver

    import cuda_backend
    from cuda_backend.context import checked

    graph = torch.cuda.CUDAGraph(keep_graph=True)
    x = torch.zeros(700, 520, device="cuda", dtype=torch.float16)
    weight = cuda_backend.prepare_weight(torch.randn(520, 4400, device="cuda", dtype=torch.float16))
    cuda_backend.llm_int8_linear_hopper(x, weight)
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        cuda_backend.llm_int8_linear_hopper(x, weight)
    raw = driver.CUgraph(graph.raw_cuda_graph())
    _, nodes, count = driver.cuGraphGetNodes(raw, 8)
    kinds = [checked(driver.cuGraphNodeGetType(node)).name for node in nodes[:count]]
    assert kinds == ["CU_GRAPH_NODE_TYPE_KERNEL"] * 2


def test_graphs_side_by_side() -> None:
    """Each captured on a stream of its own, beside each other and beside calls on those streams."""
    model, streams = small_model(), [torch.cuda.Stream() for _ in range(2)]
    inputs = [torch.zeros(700, 520, device="cuda", dtype=torch.float16) for _ in streams]
    graphs, outs, beside = [], [], torch.zeros_like(inputs[0])
    draw(beside, 17)
    with torch.no_grad():
        model(inputs[0])
        for stream, x in zip(streams, inputs, strict=True):
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1], stream=stream):
                outs.append(model(x))
        for outliers in (3, 0, 300):
            for x in inputs:
                draw(x, outliers)
            expected = [model(x) for x in (*inputs, beside)]
            torch.cuda.synchronize()
            replaying = [torch.cuda.Stream() for _ in streams]
            found = []
            for _ in range(20):
                for stream, graph in zip(replaying, graphs, strict=True):
                    with torch.cuda.stream(stream):
                        graph.replay()
                with torch.cuda.stream(streams[0]):
                    found.append(model(beside))
            torch.cuda.synchronize()
            for one, other in zip([*outs, *found], [*expected[:2], *expected[2:] * 20], strict=True):
                assert torch.equal(one, other), outliers
