"""The one door to the optional package transformers: what it computes from a checkpoint, to be compared with.

Only safetensors are loaded, from the directory alone: no pickle, no code of the checkpoint, no network.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refimpl.numerics import BoolArray, FloatArray, IntArray

__all__ = ["TransformersModel"]


class TransformersModel:
    """A model of transformers in evaluation mode, and its tokenizer.

    Parameters
    ----------
    directory : str
        A checkpoint.

    Raises
    ------
    BackendUnavailableError
        If transformers, or PyTorch under it, is not installed.
    CheckpointError
        If transformers cannot read the directory.
    """

    def __init__(self, directory: str) -> None:
        from refimpl.errors import BackendUnavailableError
        from refimpl.safetensors_format import CheckpointError

        try:
            self._library: Any = importlib.import_module("transformers")
            self._library.utils.logging.disable_progress_bar()
            self._library.utils.logging.set_verbosity_error()
            self._model = self._library.AutoModel.from_pretrained(
                directory, local_files_only=True, use_safetensors=True, trust_remote_code=False
            ).eval()
            self._tokenizer = self._library.AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
        except ImportError as error:
            missing = str(error).strip().partition("\n")[0]
            raise BackendUnavailableError(f"transformers is not to be had: {missing}") from None
        except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
            raise CheckpointError(f"{directory}: transformers cannot read it: {error}") from None

    @property
    def name(self) -> str:
        """The package with its version."""
        return f"transformers {self._library.__version__}"

    def ids(self, texts: Sequence[str], length: int) -> list[list[int]]:
        """Return the token ids of each text, cut to `length`."""
        rows: list[list[int]] = self._tokenizer(list(texts), truncation=True, max_length=length)["input_ids"]
        return rows

    def states(self, ids: IntArray, mask: BoolArray, dtype: str) -> FloatArray:
        """Return the states of the last layer, computed in `dtype`, "float32" or "float64"."""
        given = {"input_ids": ids.tolist(), "attention_mask": mask.astype(int).tolist()}
        model = self._model.double() if dtype == "float64" else self._model.float()
        found = model(**self._library.BatchEncoding(given, tensor_type="pt")).last_hidden_state
        states: FloatArray = found.detach().numpy()
        return states
