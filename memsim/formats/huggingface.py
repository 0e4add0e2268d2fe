"""A model's description from the ``config.json`` that its checkpoint on Hugging Face comes with.

>>> found = model_of_config({
...     "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
...     "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
... })
>>> from memsim.parameters import parameters
>>> parameters(model=found).total
7241732096
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memsim import data_files
from memsim.formats.huggingface_decoders import DECODERS
from memsim.formats.huggingface_encoders import ENCODERS
from memsim.formats.huggingface_gpt import GPTS
from memsim.formats.huggingface_mamba import HYBRIDS
from memsim.formats.settings import Settings, shown
from memsim.model import Model
from refimpl.checkpoint import read_object
from refimpl.errors import OptionError

__all__ = ["MODEL_TYPES", "model_of_config", "read_model"]

MODEL_TYPES = dict(sorted({**DECODERS, **GPTS, **HYBRIDS, **ENCODERS}.items()))


def read_model(path: str | os.PathLike[str]) -> Model:
    """Return the model that a ``config.json``, or the directory with one, describes.

    Parameters
    ----------
    path : path
        The file or its directory.

    Returns
    -------
    Model
        Named after the directory; its parameters are those of transformers' ``AutoModelForCausalLM`` (of
        ``AutoModel`` for an encoder, of ``AutoModelForSeq2SeqLM`` for one with a decoder), to the last one.

    Raises
    ------
    CheckpointError
        If there is no such file, or it holds no JSON object.
    OptionError
        If its ``model_type`` is not known here, or a value is missing, of the wrong type or out of range.
    """
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    name = file.resolve().parent.name if file.name == "config.json" else file.stem
    return model_of_config(read_object(file), name=name or "model", where=str(file))


def model_of_config(config: Mapping[str, Any], *, name: str = "model", where: str = "config.json") -> Model:
    """Return the model that the values of a ``config.json`` describe.

    Parameters
    ----------
    config : mapping
        The parsed file.
    name, where : str
        What the model is called, and what errors call the file.

    Returns
    -------
    Model

    Raises
    ------
    OptionError
        If the ``model_type`` is not known here, or a value is missing, of the wrong type or out of range.

    Notes
    -----
    The sizes that make a model must be given: width, layers, heads, network, vocabulary.  Where a file is
    silent about anything else, such as key heads, it holds what transformers' class of the family assumes
    (``memsim/data/huggingface_defaults.toml``).

    Layers that multi-token prediction adds (DeepSeek-V3) are left out, as transformers leaves them out.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        inside = config.get("text_config")
        hint = "; the file has a text_config, which describes its decoder" if isinstance(inside, dict) else ""
        near = difflib.get_close_matches(shown(kind).strip("'"), MODEL_TYPES, 3) or ["gpt2", "llama", "t5"]
        known = f"one of {len(MODEL_TYPES)} families, such as {', '.join(near)}"
        raise OptionError(f"{where}: model_type: expected {known}; got {shown(kind)}{hint}")
    settings = Settings(where, config, data_files.read("huggingface_defaults").get(kind, {}))
    width = settings.whole("hidden_size", "n_embd", "d_model", "n_embed", "dim")
    stacks = tuple(MODEL_TYPES[kind](settings, width))
    source = f"{where}, model_type {kind}"
    if settings.whole("num_nextn_predict_layers", default=0, least=0):
        source += ", without the layers of multi-token prediction"
    return Model(name, source, width, stacks)
