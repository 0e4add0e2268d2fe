"""Peak memory of training steps and of serving, written for `frugal validate`: ``... measure_memory FOLDER``.

The model is transformers' Llama in bfloat16, the one that `memsim.formats.huggingface` describes from the
same numbers; a step is a forward and a backward pass and Adam's fused step, measured once its states
are there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memsim.measured.measured_files import document, file_name, toml_text
from memsim.measured.peak_memory import KIND
from tests.cuda.need_gpu import need_arguments, need_gpu

__all__ = ["built", "cases", "trained"]

# Layers, width, inner width, heads, key heads; vocabulary; batch, tokens of the training step.
SIZES = (
    (12, 768, 2048, 12, 12, 32000, 8, 1024),
    (24, 1024, 2816, 16, 16, 32000, 4, 2048),
    (16, 2048, 5632, 32, 8, 32000, 4, 2048),
    (8, 4096, 11008, 32, 32, 32000, 2, 2048),
)
KERNELS = {"flash": "sdpa", "standard": "algorithm_0"}


def cases() -> Iterator[dict[str, Any]]:
    """Yield what to run: every size with and without recomputation, with both attentions, and served."""
    for layers, width, inner, heads, keys, rows, batch, tokens in SIZES:
        config = {
            "model_type": "llama", "num_hidden_layers": layers, "hidden_size": width,
            "intermediate_size": inner, "vocab_size": rows, "num_attention_heads": heads,
            "num_key_value_heads": keys,
        }  # fmt: skip
        for attention in KERNELS:
            for recompute in ("none", "full"):
                sizes = {"batch": batch, "sequence": tokens, "attention": attention, "recompute": recompute}
                yield {"config": config, **sizes}
        yield {"config": config, "batch": 4 * batch, "prompt": tokens, "generated": 64}


def algorithm_0(
    module: Any, q: Any, k: Any, v: Any, _mask: Any, scaling: float, **_: Any
) -> tuple[Any, None]:
    """Return attention with its scores in memory, all in the format of the inputs.

    The library's own eager attention has a softmax in fp32 between casts, and keeps its result twice.
    """
    import torch

    k, v = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (k, v))
    batch, heads, tokens, width = q.shape
    q, k, v = (x.reshape(batch * heads, -1, width) for x in (q, k, v))
    later = torch.full((tokens, tokens), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
    scores = torch.baddbmm(later, q, k.transpose(1, 2), alpha=scaling)
    out = torch.softmax(scores, -1) @ v
    return out.view(batch, heads, tokens, width).transpose(1, 2).contiguous(), None


def built(case: dict[str, Any], device: str) -> Any:
    """Return the model of a case, with random weights."""
    import torch
    import transformers as library

    transformers: Any = library
    transformers.AttentionInterface.register("algorithm_0", algorithm_0)
    sizes = {name: value for name, value in case["config"].items() if name != "model_type"}
    config = transformers.LlamaConfig(
        **sizes, tie_word_embeddings=False, attn_implementation=KERNELS[case.get("attention", "flash")]
    )
    with torch.device(device):  # a CPU needs minutes for as many random numbers
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if case.get("recompute") == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    return model


def trained(model: Any, adam: Any, ids: Any) -> None:
    """Go one step."""
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    adam.step()
    adam.zero_grad()


def _measured(case: dict[str, Any]) -> dict[str, int]:
    import torch

    torch.cuda.empty_cache()
    model = built(case, "cuda")
    if "generated" in case:
        ids = torch.zeros((case["batch"], case["prompt"]), dtype=torch.int64, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            model.eval().generate(
                ids, max_new_tokens=case["generated"], min_new_tokens=case["generated"], do_sample=False
            )
    else:
        adam = torch.optim.Adam(model.parameters(), fused=True)
        ids = torch.zeros((case["batch"], case["sequence"]), dtype=torch.int64, device="cuda")
        trained(model, adam, ids)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        trained(model, adam, ids)
    torch.cuda.synchronize()
    return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}


def main(folder: Path) -> None:
    """Measure every case, and write the file; a case that fails is left out, and says why."""
    import torch

    from cli.commands.bench import recognised
    from memsim.hardware import hardware_names

    folder.mkdir(parents=True, exist_ok=True)  # one that cannot be is known before anything is measured
    found = []
    for case in cases():
        try:
            found.append({**case, **_measured(case)})
        except torch.OutOfMemoryError as error:
            sys.stderr.write(f"{case}: {error}\n")
            continue
        sys.stdout.write(f"{found[-1]}\n")
        sys.stdout.flush()
    card = recognised(torch.cuda.get_device_name(), hardware_names()) or "unknown"
    result = document(KIND, card, f"PyTorch {torch.__version__}", case=found)
    (folder / file_name(result)).write_text(toml_text(result), encoding="utf-8")


if __name__ == "__main__":
    (named,) = need_arguments("FOLDER")
    need_gpu("transformers")
    main(Path(named))
