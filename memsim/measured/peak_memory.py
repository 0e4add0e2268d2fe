"""Peak memory that PyTorch's allocator counted, beside that of the same step tensor by tensor, played.

A case is a training step of a decoder, or serving with a cache; the files are
``memsim/data/measured/memory-*.toml``, written by ``python -m tests.cuda.measure_memory``.

>>> case = {
...     "config": {
...         "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 172,
...         "vocab_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4,
...     },
...     "batch": 2, "sequence": 512, "attention": "flash", "recompute": "none",
... }
>>> predicted = predicted_memory(case)
>>> 0 < predicted["allocated"] <= predicted["reserved"]
True
"""  # fmt: skip

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memsim import data_files
from memsim.formats.huggingface import model_of_config
from memsim.inference import Serving, inference
from memsim.measured.checked import Checked
from memsim.measured.measured_files import of_kind
from memsim.memory.allocator import play
from memsim.memory.run import Run
from memsim.memory.step_memory import step_memory
from memsim.model import Model

__all__ = ["KIND", "memory_rows", "predicted_memory"]

KIND = "memory"


def predicted_memory(case: Mapping[str, Any], hardware: str = "h200") -> dict[str, int]:
    """Return the bytes that a case takes at most: allocated, and of a training step also reserved.

    A training step is that of bf16 weights, gradients and both moments, stepped by PyTorch's fused Adam, with
    norms operator by operator.  Serving has the weights, and the cache of all tokens; or, before the last
    layer's network is through with all prompts together, theirs and what that network works with.  Both come
    with the workspaces of cuBLAS.
    """
    described = model_of_config(dict(case["config"]))
    workspaces = data_files.read("memory", "validation")["workspaces"]["value"]
    if "generated" in case:
        return {"allocated": _served(case, described, hardware) + workspaces}
    run = Run(
        batch=case["batch"], sequence=case["sequence"], attention=case["attention"],
        recompute=case["recompute"], convention="bf16", fused_norm=False, softmax_product=True, adam="fused",
    )  # fmt: skip
    played = play(step_memory(model=described, run=run))
    return {"allocated": played.allocated + workspaces, "reserved": played.reserved + workspaces}


def _served(case: Mapping[str, Any], described: Model, hardware: str) -> int:
    sizes = {name: case[name] for name in ("batch", "prompt", "generated")}
    found = inference(Serving(described, hardware, **sizes))
    weights, cache = found.value("weights"), found.value("cache")
    prompts = cache * case["prompt"] / (case["prompt"] + case["generated"])
    # The embeddings that the model was called with, what enters the layer and its network, and the network's
    # input; its gate, what that scales, and their product.
    width, inner = (case["config"][name] for name in ("hidden_size", "intermediate_size"))
    work = 2 * case["batch"] * case["prompt"] * (4 * width + 3 * inner)
    return int(weights + max(cache, prompts + work))


def memory_rows() -> tuple[Checked, ...]:
    """Return all peaks that were measured beside the predicted ones."""
    rows = []
    for document in of_kind(KIND):
        card = document["hardware"]
        for case in document["case"]:
            for counter, predicted in predicted_memory(case, card).items():
                measured = case[counter]
                rows.append(
                    Checked(
                        id=f"memory.{card}.{_name(case)}.{counter}",
                        source=f"measured here, {document['tool']}, {document['date']}",
                        published=f"{measured / 1e6:.1f}",
                        unit="MB",
                        predicted=predicted / 1e6,
                        error=predicted / measured - 1,
                        use="held out",
                        stack=f"peak memory, {counter}",
                        hardware=card,
                        belongs=f"peak memory, {counter}",
                    )
                )
    return tuple(rows)


def _name(case: Mapping[str, Any]) -> str:
    config = case["config"]
    size = f"{config['num_hidden_layers']}x{config['hidden_size']}.{case['batch']}"
    if "generated" in case:
        return f"serving.{size}x{case['prompt']}+{case['generated']}"
    return f"training.{size}x{case['sequence']}.{case['attention']}.{case['recompute']}"
