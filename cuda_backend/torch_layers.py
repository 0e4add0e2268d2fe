"""Layers of PyTorch that compute in int8, and their way into a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cuda_backend.torch_modules import check_linear, classes
from cuda_backend.torch_weight_only import Form, check_weight_only, weight_only_linear
from refimpl.errors import OptionError

__all__ = ["int8_linear", "merged_int8_linear", "replace_linear"]

HEAD = ("lm_head",)  # what `replace_linear` keeps where there is such a child


def int8_linear(
    layer: Any, *, threshold: float | None = 6.0, compute: Callable[..., Any] | None = None
) -> Any:
    """Return a module that computes what `torch.nn.Linear` `layer` does, by LLM.int8(), for inference.

    Parameters
    ----------
    layer : torch.nn.Linear
        On the GPU, in float16 or bfloat16; it is quantised now and not kept.
    threshold : float or None
        As for `refimpl.quant.llm_int8_linear`.
    compute : callable, optional
        A function of the reference's signature.  Default: `cuda_backend.llm_int8_linear_hopper`.

    Returns
    -------
    torch.nn.Module
        With buffers ``codes`` [out_features, in_features padded to 16] and ``absmax``, and the layer's bias.
        It loads its own state, or that of a `torch.nn.Linear`, whose ``weight`` is quantised then.  Casts of
        the model leave both as they are.  Of a layer on the meta device it is there too, until a state from
        the GPU is loaded with ``assign=True``.

    Raises
    ------
    OptionError
        If `layer` is no `torch.nn.Linear`.
    DTypeError
        If it is on the CPU, or in another format, or its bias is not where and what its weight is.
    BackendUnavailableError
        If there is no GPU.
    ShapeError, UnsupportedError
        From its forward pass: if x has other features; if a gradient is wanted, or with the reasons of
        `compute`.

    Notes
    -----
    It is faster than float16 for many tokens; which layers are, for how many, stands in docs/performance.md.
    Forward passes may be captured in a CUDA graph, by ``torch.cuda.graph(graph)`` on any stream or by
    `torch.cuda.make_graphed_callables`; best after one of the same shapes, which compiles and loads kernels.
    Graphs captured on one stream (PyTorch's own, if none is given) share memory: replay one after another,
    or capture those that are to run at once each on a stream of its own.

    References
    ----------
    .. [1] Dettmers et al., 2022, arXiv:2208.07339, section 3.
    """
    check_linear("layer", layer, compute)
    module = classes().Int8Linear(layer.in_features, layer.out_features, threshold, compute)
    return module.replace(layer)


def merged_int8_linear(
    layers: Sequence[Any], *, threshold: float | None = 6.0, compute: Callable[..., Any] | None = None
) -> Any:
    """Return one module for layers that read the same input, such as q, k and v: it returns a tuple.

    Parameters
    ----------
    layers : sequence of torch.nn.Linear
        With one ``in_features``, dtype and device; they are quantised now and not kept.
    threshold, compute
        As for `int8_linear`.

    Returns
    -------
    torch.nn.ModuleList
        Of what `int8_linear` makes of each, whose codes lie side by side; what it returns are views of each
        layer's outputs.  So is its state, with names that begin with 0., 1. and so on, and it loads that of a
        `torch.nn.ModuleList` of the layers as well; ``merged[0].load_state_dict(k_proj.state_dict())``
        loads one.

    Raises
    ------
    OptionError
        If there are no layers, or they differ in ``in_features``, dtype or device.
    DTypeError, BackendUnavailableError, ShapeError, UnsupportedError
        As `int8_linear`.

    Notes
    -----
    Rows of the input and columns of a weight are quantised each for itself, and outliers belong to the input:
    merging changes no output by more than the order in which outliers are summed.  The input is quantised
    once in place of once a layer, which is much of the time of a layer with few outputs.  The model has to
    call the merged module, and its own layers can go: nothing in it is changed here, as it is by
    `replace_linear` with `merge`.  If ``out_features`` are multiples of 8, views begin at multiples of 16
    bytes, as `llm_int8_linear_hopper` wants its input.

    References
    ----------
    .. [1] Dettmers et al., 2022, arXiv:2208.07339, section 3.
    """
    if not hasattr(layers, "__len__"):
        raise OptionError(f"layers: expected a sequence of torch.nn.Linear, got one {type(layers).__name__}")
    for place, layer in enumerate(layers):
        check_linear(f"layers[{place}]", layer, compute)
    _check_alike("layers", layers)
    parts = [int8_linear(layer, threshold=threshold, compute=compute) for layer in layers]
    return classes().MergedInt8Linear(parts).train(layers[0].training)


def _check_alike(name: str, layers: Sequence[Any]) -> None:
    """Raise for linear layers that cannot be computed in one call."""
    kinds = {(layer.in_features, layer.weight.dtype, layer.weight.device) for layer in layers}
    if len(kinds) != 1:
        found = "; ".join(sorted(map(str, kinds))) or "no layers"
        raise OptionError(f"{name}: expected one in_features, dtype and device, got {found}")


def replace_linear(
    model: Any,
    *,
    keep: Sequence[str] = HEAD,
    merge: Sequence[Sequence[str]] = (),
    weight_only: Form | None = None,
    **options: Any,
) -> int:
    """Put `int8_linear` in the place of every `torch.nn.Linear` of a model but those named in `keep`.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place, if nothing is raised.
    keep : sequence of str
        Names of children, at any depth, or whole names as of ``named_modules``, that stay as they are, with
        all that is in them.  Default: ``lm_head``, if there is one.
    merge : sequence of sequences of str
        Names of layers that a module calls with one and the same tensor, in the order of these calls, such as
        ``[("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]``: wherever a module has all of them they
        are computed in one call, as by `merged_int8_linear`.  The model's code stays as it is, and so do the
        names in its state.
    weight_only : {"nf4", "int8"}, optional
        Take `weight_only_linear` with this `weight` in place of `int8_linear`; nothing is merged then.
    **options
        Those of `int8_linear`, or of `weight_only_linear`.

    Returns
    -------
    int
        How many were replaced.

    Raises
    ------
    OptionError
        If `model` is a linear layer itself, or has no child of a name that was given, or layers cannot be
        merged.
    DTypeError, UnsupportedError, BackendUnavailableError
        As `int8_linear`, or `weight_only_linear`, with the layer's name.

    Notes
    -----
    A model that is called with few tokens at a time gets slower in LLM.int8() where its layers are small, and
    its host has more to do: see docs/performance.md, and `weight_only` for up to 8 tokens.

    Of layers that are merged the first computes all, and the others find what it left for them if they are
    given the same tensor, unwritten since, on the same stream; given any other, a layer computes its own.
    What is not fetched stays in memory until the next call, and outputs are views of one array, which stays
    as long as any of them.  Written is what PyTorch counts (``_version``): not what ``x.data``, a replayed
    graph or a kernel with an address writes, so call the first of `merge` first after these.  Tensors of
    ``torch.inference_mode`` are not counted at all: with them nothing is merged, so call the model under
    ``torch.no_grad``.  Nor is it in the replicas of ``torch.nn.DataParallel``.
    """
    import torch

    if isinstance(keep, str):
        raise OptionError(f"keep: expected names, got one string, {keep!r}")
    if isinstance(model, torch.nn.Linear):
        raise OptionError("model: it is a linear layer itself; use int8_linear")
    known = {name for path, _ in model.named_modules() for name in (path, path.rpartition(".")[2])}
    unknown = sorted(set(keep) - known)
    if unknown and keep is not HEAD:
        raise OptionError(f"keep: the model has no child named {', '.join(unknown)}")
    if weight_only is not None and merge:
        raise OptionError("merge: expected none with weight_only, whose inputs are not quantised")
    found = list(_linear_children(model, "", keep, set()))
    groups = list(_groups(found, merge))
    for path, parent, name in found:
        if weight_only is None:
            check_linear(path, getattr(parent, name), options.get("compute"))
        else:
            check_weight_only(path, getattr(parent, name), weight_only, options.get("compute"))
    for _, parent, name in found:  # no layer is held here: each can go as soon as it has been replaced
        if weight_only is None:
            setattr(parent, name, int8_linear(getattr(parent, name), **options))
        else:
            setattr(parent, name, weight_only_linear(getattr(parent, name), weight=weight_only, **options))
    for parent, names in groups:
        first, *rest = [getattr(parent, name) for name in names]
        first.lead(rest)
    return len(found)


def _linear_children(
    module: Any, prefix: str, keep: Sequence[str], seen: set[int]
) -> Iterator[tuple[str, Any, str]]:
    """Yield whole name, parent and name of each linear layer that is not kept, each parent once."""
    import torch

    if id(module) in seen:
        return
    seen.add(id(module))
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if name in keep or path in keep:
            continue
        if type(child) is torch.nn.Linear:
            yield path, module, name
        else:
            yield from _linear_children(child, f"{path}.", keep, seen)


def _groups(
    found: Sequence[tuple[str, Any, str]], merge: Sequence[Sequence[str]]
) -> Iterator[tuple[Any, Sequence[str]]]:
    """Yield parent and names of layers that are to be merged; raise for those that do not merge."""
    named: list[str] = []
    for names in merge:
        if isinstance(names, str) or len(names) < 2:
            raise OptionError(f"merge: expected groups of two names or more, got {names!r}")
        named.extend(names)
    if len(set(named)) != len(named):
        raise OptionError(f"merge: expected each name once, got {', '.join(named)}")
    children: dict[int, tuple[str, Any, set[str]]] = {}
    for path, parent, name in found:
        children.setdefault(id(parent), (path.rpartition(".")[0], parent, set()))[2].add(name)
    for names in merge:
        having = [(path, parent) for path, parent, own in children.values() if own.issuperset(names)]
        if not having:
            raise OptionError(f"merge: no module has all of {', '.join(names)} to replace")
        for path, parent in having:
            layers = [getattr(parent, name) for name in names]
            _check_alike(f"merge: {', '.join(names)} of {path or 'the model'}", layers)
            yield parent, names
