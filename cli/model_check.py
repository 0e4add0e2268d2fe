"""``frugal verify --model DIR``: the references on the weights and activations of a real encoder.

Three questions: does the NumPy encoder compute what transformers computes; do all attentions agree on the
queries, keys and values that really occur; and how many outliers does LLM.int8() find there, at what error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cli.result import Column, Result, View
from cli.sentences import SENTENCES
from refimpl.checkpoint import Encoded, encode, load_tensors, load_tokenizer, read_config
from refimpl.errors import BackendUnavailableError, UnsupportedError
from refimpl.registry import Case
from refimpl.transformer.bert import (
    BertConfig,
    LayerTrace,
    bert_config,
    bert_encoder,
    bert_params,
    bert_traces,
    sentence_embeddings,
)

if TYPE_CHECKING:
    from refimpl.numerics import FloatArray

__all__ = ["LENGTH", "check_model", "read_model"]

LENGTH = 128  # longer texts are cut
# Attentions that compute what `attention.dense` computes, and linear layers like LLM.int8()'s.
ATTENTION = ("attention.dense", "attention.standard", "attention.flash", "attention.block_sparse_flash")
INT8 = ("quant.llm_int8", "quant.llm_int8_fused")
MATRICES = ("w_q", "w_k", "w_v", "w_o", "w_1", "w_2")
# Two evaluations in float64 differ by rounding only; measured are 5e-15 for six layers.
LARGEST_FLOAT64 = 1e-11
# Of two evaluations in float32 one may err twice as much as the other, so they are three errors apart.
APART = 3.0
STATUSES = ("passed", "failed", "refused", "invalid")


class Model(NamedTuple):
    """A checkpoint that was read, and the sentences in its tokens."""

    params: Mapping[str, FloatArray]
    config: BertConfig
    text: Encoded
    rows: tuple[list[int], ...]  # the ids of each sentence, without padding


@dataclass(slots=True)
class Row:
    """What came of one function; errors are relative, the largest over its cases."""

    technique: str
    implementation: str
    against: str
    backend: str
    dtype: str
    matrix: str | None = None
    features: int | None = None
    outlier_features: list[int] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STATUSES, 0))
    details: list[str] = field(default_factory=list)

    def add(self, status: str, detail: str = "") -> None:
        """Count one case."""
        self.counts[status] += 1
        if detail and detail not in self.details:
            self.details.append(detail)

    def data(self) -> dict[str, Any]:
        """Return the row as JSON has it."""
        return {
            "technique": self.technique, "implementation": self.implementation, "against": self.against,
            "backend": self.backend, "dtype": self.dtype, "matrix": self.matrix, **self.counts,
            "relative_error_max": max(self.errors, default=None), "relative_error_by_case": self.errors,
            "features": self.features, "outlier_features_by_layer": self.outlier_features,
            "outlier_features_max": max(self.outlier_features, default=None), "details": self.details,
        }  # fmt: skip


def read_model(directory: str) -> Model:
    """Return the checkpoint in `directory`, and the sentences as it cuts them.

    Raises
    ------
    CheckpointError
        If a file is damaged or missing.
    UnsupportedError
        If the model is no BERT.
    BackendUnavailableError
        If the package tokenizers is missing.
    """
    config = bert_config(read_config(directory))
    params = bert_params(load_tensors(directory), config)
    text = encode(load_tokenizer(directory), SENTENCES, length=min(LENGTH, config.max_length))
    return Model(params, config, text, tuple(ids[kept].tolist() for ids, kept in zip(*text, strict=True)))


def check_model(directory: str, model: Model, backend: str, dtypes: Sequence[str]) -> Result:
    """Return what came of all checks on the checkpoint that was read from `directory`.

    Raises
    ------
    UnsupportedError
        If there is nothing to check on `backend`.
    """
    encoder = _check_encoder(directory, model) if backend == "numpy" else []
    traces = list(bert_traces(model.params, model.text.ids, config=model.config, mask=model.text.mask))
    attention = list(_check_attention(model, traces, backend, dtypes))
    int8 = list(_check_int8(model, traces, backend))
    rows = [*encoder, *attention, *int8]
    if not rows:
        raise UnsupportedError(f"--model: nothing is registered for the backend {backend}")
    totals = {status: sum(row.counts[status] for row in rows) for status in STATUSES}
    problem = f"{totals['failed']} checks failed" if totals["failed"] else ""
    if not totals["passed"]:
        problem = problem or "nothing was checked: all was refused"
    B, T = model.text.ids.shape
    heading = (
        f"{directory}: {model.config.layers} layers, {B} sentences of {int(model.text.mask.sum())} tokens"
    )
    return Result(
        [row.data() for row in rows],
        COLUMNS,
        totals={"layers": model.config.layers, "sentences": B, "longest": T, **totals},
        views=[
            View(heading, COLUMNS, [row.data() for row in (*encoder, *attention)]),
            View(
                "LLM.int8() on the inputs of each matrix, threshold 6", INT8_COLUMNS, [r.data() for r in int8]
            ),
        ],
        details=[f"{row.technique} {row.implementation}: {text}" for row in rows for text in row.details],
        problem=problem,
        exit_code=1 if problem else 0,
    )


def _error_text(value: Any) -> str:
    return "" if value is None else f"{value:.1e}"


COLUMNS = (
    Column("technique"),
    Column("implementation"),
    Column("against"),
    Column("backend"),
    Column("dtype"),
    *(Column(status, right=True) for status in STATUSES),
    Column("relative_error_max", "largest relative error", right=True, text=_error_text),
)
INT8_COLUMNS = (
    Column("implementation"),
    Column("matrix"),
    Column("passed", right=True),
    Column("failed", right=True),
    Column("refused", right=True),
    Column("features", right=True),
    Column("outlier_features_by_layer", "with outliers, by layer"),
    Column("relative_error_max", "largest relative error (rms)", right=True, text=_error_text),
)


# The encoder, against transformers


def _check_encoder(directory: str, model: Model) -> list[Row]:
    from cli.transformers_model import TransformersModel

    mine = "refimpl.transformer.bert:bert_encoder"
    try:
        theirs = TransformersModel(directory)
    except BackendUnavailableError as error:
        row = Row("transformer.encoder", mine, "transformers", "numpy", "")
        row.add("refused", str(error))
        return [row]
    tokens = Row("tokenizer", "refimpl.checkpoint:encode", theirs.name, "numpy", "int64")
    same = theirs.ids(SENTENCES, min(LENGTH, model.config.max_length)) == list(model.rows)
    tokens.add("passed" if same else "failed", "" if same else "the token ids differ")
    wide = model._replace(params={name: array.astype(np.float64) for name, array in model.params.items()})
    rows = [Row("transformer.encoder", mine, theirs.name, "numpy", dtype) for dtype in ("float64", "float32")]
    batches = list(_batches(model))
    exact, rounded = ([theirs.states(*batch, dtype) for batch in batches] for dtype in ("float64", "float32"))
    for (ids, mask), wide_states, states in zip(batches, exact, rounded, strict=True):
        truth = _states(wide, ids, mask)
        _judge_states(rows[0], truth, wide_states, mask, LARGEST_FLOAT64)
        _judge_states(rows[1], _states(model, ids, mask), states, mask, APART * _apart(states, truth, mask))
    return [tokens, *rows]


def _batches(model: Model) -> Iterator[tuple[Any, Any]]:
    """Yield all sentences at once, padded, and then each by itself, without padding."""
    yield model.text.ids, model.text.mask
    for row in model.rows:
        ids = np.array([row])
        yield ids, np.ones(ids.shape, bool)


def _states(model: Model, ids: Any, mask: Any) -> FloatArray:
    return bert_encoder(model.params, ids, config=model.config, mask=mask)


def _apart(a: FloatArray, b: FloatArray, mask: Any) -> float:
    """Return the largest difference of states or of sentence embeddings, relative to the largest of them."""
    states = float(np.max(np.abs(a - b)[mask]) / np.max(np.abs(b[mask])))
    one, other = (sentence_embeddings(rows, mask) for rows in (a, b))
    return max(states, float(np.max(np.abs(one - other)) / np.max(np.abs(other))))


def _judge_states(row: Row, mine: FloatArray, theirs: FloatArray, mask: Any, most: float) -> None:
    error = _apart(mine, theirs, mask)
    row.errors.append(error)
    fine = error <= most
    row.add("passed" if fine else "failed", "" if fine else f"error {error:.2e}, allowed {most:.2e}")


# All attentions, on real queries, keys and values


def _functions(names: Sequence[str], backend: str) -> Iterator[tuple[str, str, Callable[..., Any] | str]]:
    """Yield technique, target, and the function or why there is none."""
    from refimpl import registry

    registry.load()
    records = [registry.get(name) for name in names]
    seen = {record.home for record in records}
    if backend == "numpy":
        yield from ((record.name, record.home, record.function) for record in records)
    for record in records:
        for item in registry.implementations_of(record.name):
            if backend in item.backends and item.target not in seen:
                seen.add(item.target)
                try:
                    yield record.name, item.target, item.load()
                except (ImportError, BackendUnavailableError) as error:
                    yield record.name, item.target, str(error)


def _check_attention(
    model: Model, traces: Sequence[LayerTrace], backend: str, dtypes: Sequence[str]
) -> Iterator[Row]:
    from refimpl import registry
    from refimpl.candidate import guarded
    from refimpl.testing import dtype_named
    from refimpl.tolerances import baseline_limits, cast, mismatch

    dense = registry.get("attention.dense")
    functions = list(_functions(ATTENTION, backend))
    for name in dtypes:
        dtype = dtype_named(name)
        rows = [
            Row(technique, target, "attention.dense", backend, name) for technique, target, _ in functions
        ]
        for case in _attention_cases(model, traces, small=backend == "cudasim"):
            given = cast(case, dtype)
            truth, _, limits, invalid = baseline_limits(dense, given, dtype)
            wanted = truth["output"]
            for row, (*_, f) in zip(rows, functions, strict=True):
                if isinstance(f, str):
                    row.add("refused", f)
                    continue
                if invalid:
                    row.add("invalid", invalid)
                    continue
                try:
                    found = np.asarray(given.call(guarded(f)))
                except NotImplementedError as error:
                    row.add("refused", str(error))
                    continue
                wrong = mismatch(found, wanted, limits["output"])
                row.add("failed" if wrong else "passed", wrong or "")
                if found.shape == wanted.shape:
                    row.errors.append(float(np.max(np.abs(found - wanted)) / np.max(np.abs(wanted))))
        yield from rows


def _attention_cases(model: Model, traces: Sequence[LayerTrace], *, small: bool) -> Iterator[Case]:
    """Yield a case of each layer with padding, and one of its longest sentence; few cells if `small`."""
    lengths = model.text.mask.sum(axis=1)
    longest = int(np.argmax(lengths))
    for trace in traces[:1] if small else traces:
        parts = tuple(np.ascontiguousarray(part[:2, :6, :1] if small else part) for part in trace[:3])
        yield Case(parts, {"k_lengths": np.minimum(lengths[: len(parts[0])], parts[0].shape[1])})
        if not small:
            yield Case(tuple(part[longest : longest + 1] for part in parts))


# LLM.int8(), on real activations


def _check_int8(model: Model, traces: Sequence[LayerTrace], backend: str) -> Iterator[Row]:
    if backend == "cudasim":  # its arithmetic would take hours
        return
    from refimpl.candidate import guarded

    mask = model.text.mask
    for technique, target, f in _functions(INT8, backend):
        for matrix in MATRICES:
            row = Row(technique, target, "x @ w in float64", backend, "float32", matrix=matrix)
            for layer, trace in enumerate(traces):
                x = np.ascontiguousarray(trace.inputs[matrix][mask])
                weight = model.params[f"layers.{layer}.{matrix}"]
                bias = model.params[f"layers.{layer}.b_{matrix[2:]}"]
                if isinstance(f, str):
                    row.add("refused", f)
                    continue
                try:
                    found = np.asarray(guarded(f)(x, np.ascontiguousarray(weight), bias=bias), np.float64)
                except NotImplementedError as error:
                    row.add("refused", str(error))
                    continue
                _judge_int8(row, found, *(array.astype(np.float64) for array in (x, weight, bias)))
            yield row


def _judge_int8(row: Row, found: FloatArray, x: FloatArray, weight: FloatArray, bias: FloatArray) -> None:
    """Hold the output to the bound of rounding each code by half a step, and note outliers and error."""
    outliers = (np.abs(x) >= 6.0).any(axis=0)
    inside = np.where(np.abs(x) >= 6.0, 0, np.abs(x))
    step_x, step_w = inside.max(axis=1, keepdims=True) / 127, np.abs(weight).max(axis=0) / 127
    exact = x @ weight + bias
    kept, w = np.abs(x[:, ~outliers]), np.abs(weight[~outliers])
    bound = kept.sum(axis=1, keepdims=True) * step_w / 2 + step_x * w.sum(axis=0) / 2
    bound += len(w) * step_x * step_w / 4 + np.abs(x[:, outliers]).sum(axis=1, keepdims=True) * step_w / 2
    bound += 1e-5 * (np.abs(x) @ np.abs(weight) + np.abs(bias))  # float32
    excess = float(np.max(np.abs(found - exact) - bound))
    row.features = x.shape[1]
    row.outlier_features.append(int(outliers.sum()))
    row.errors.append(float(np.sqrt(np.mean((found - exact) ** 2) / np.mean(exact**2))))
    row.add(
        "failed" if excess > 0 else "passed",
        f"{row.matrix}: {excess:.2e} above the bound" if excess > 0 else "",
    )
