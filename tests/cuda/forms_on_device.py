"""Block masks, packed sequences and models of transformers on the GPU at hand: checked, then timed.

``FRUGAL_TEST_GPU=1 python -m tests.cuda.forms_on_device [masks] [varlen] [models]``; each part says what is
off and goes on.  On an H200 all three were right.
"""

from __future__ import annotations

import importlib
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

import cuda_backend
from refimpl.attention import block_mask, mods
from tests.cuda.int8_benchmark import milliseconds
from tests.cuda.need_gpu import need_gpu

WINDOW = mods.both(mods.causal, mods.sliding(1024))
CLOSE = {"float16": 4e-3, "float32": 2e-5}  # outputs of size 1


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)  # noqa: T201


def seconds(call: Callable[[], Any]) -> float:
    """Return the time of one call and all the work that it queued."""
    import torch

    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def masks() -> None:
    """Compare states of tiles with the host's, then time those of 32k x 32k scores."""
    documents = (np.arange(4096, dtype=np.int32)[None] // 700,)
    for name, mask, aux in (("window", WINDOW, ()), ("documents", mods.documents(), documents)):
        for sizes in ((128, 128), (128, 176), (64, 64)):
            wanted = block_mask(mask, 1, 1, 4096, 4096, block_sizes=sizes, aux=aux)
            found = cuda_backend.block_mask(mask, 1, 1, 4096, 4096, block_sizes=sizes, aux=aux)
            say(f"states of {name}, tiles {sizes}: {np.array_equal(found.states, wanted.states)}")
    for sizes in ((128, 128), (128, 176)):
        for N in (32640, 32768, 32768):
            took = seconds(lambda N=N, s=sizes: cuda_backend.block_mask(WINDOW, 1, 1, N, N, block_sizes=s))  # type: ignore[misc]
            say(f"states of {N} x {N}, tiles {sizes}: {1e3 * took:.2f} ms (compiled first, remembered last)")


def packed() -> None:
    """Compare packed sequences with SDPA of each, both passes; time them beside the padded batch."""
    from cuda_backend import torch_ops

    torch: Any = importlib.import_module("torch")
    sdpa, varlen_attention = torch.nn.functional.scaled_dot_product_attention, torch_ops.varlen_attention

    for dtype, lengths in (
        ("float32", [5, 0, 70, 129]),
        ("float16", [700, 1, 2300, 4096, 900, 3000, 1500, 3887]),
    ):
        starts = torch.tensor(np.cumsum([0, *lengths]), device="cuda", dtype=torch.int32)
        total, longest = int(starts[-1]), max(lengths)
        kind, generator = getattr(torch, dtype), torch.Generator("cuda").manual_seed(0)
        q, k, v, do = (
            torch.randn(total, heads, 64, device="cuda", generator=generator).to(kind)
            for heads in (16, 4, 4, 16)
        )
        ours = [x.clone().requires_grad_() for x in (q, k, v)]

        def call(x: Any = ours, s: Any = starts, n: int = longest) -> Any:
            return varlen_attention(x[0], x[1], x[2], s, s, n, n, causal=True)

        out = call()
        out.backward(do)
        worst = [0.0] * 4
        for a, b in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            exact = [x[a:b].float().transpose(0, 1)[None].requires_grad_() for x in (q, k, v)]
            wanted = sdpa(*exact, is_causal=True, enable_gqa=True) if b > a else exact[0]
            wanted.backward(do[a:b].float().transpose(0, 1)[None])
            if b == a:
                continue
            pairs = [(out[a:b], wanted), *((x.grad[a:b], y.grad) for x, y in zip(ours, exact, strict=True))]
            for index, (found, truth) in enumerate(pairs):
                error = (
                    found.float() - truth[0].transpose(0, 1)
                ).detach().abs().max() / truth.abs().max().clamp(min=1)
                worst[index] = max(worst[index], float(error))
        off = [f"{x:.1e}" for x in worst]
        say(
            f"packed {dtype}, {total} tokens: off by {off} of the largest or of 1 (out, dq, dk, dv): "
            f"{max(worst) < CLOSE[dtype]}"
        )
        if dtype == "float16":
            with torch.no_grad():
                padded = [
                    torch.randn(len(lengths), h, longest, 64, device="cuda", dtype=kind) for h in (16, 4, 4)
                ]
                say(
                    f"  forward {milliseconds(call):.3f} ms; SDPA of the padded batch "
                    f"{milliseconds(lambda: sdpa(*padded, is_causal=True, enable_gqa=True)):.3f} ms"  # noqa: B023
                )


def models() -> None:
    """Compare logits, tokens and gradients of tiny models; time one of a few layers."""
    from cuda_backend.transformers_attention import register

    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    name = register()
    tiny: dict[str, Any] = {
        "vocab_size": 67, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
        "pad_token_id": 0,
    }  # fmt: skip
    gemma = {"sliding_window": 32, "attn_logit_softcapping": 0.5, "head_dim": 16}
    for kind, further, rival in (
        ("Llama", {}, "sdpa"),
        ("Mistral", {"sliding_window": 32}, "sdpa"),
        ("Gemma2", gemma, "eager"),
    ):
        pair = []
        for implementation in (rival, name):
            torch.manual_seed(0)
            config = getattr(transformers, f"{kind}Config")(
                **tiny, **further, attn_implementation=implementation, initializer_range=0.2
            )
            pair.append(getattr(transformers, f"{kind}ForCausalLM")(config).cuda().eval())
        ids = torch.randint(1, 67, (2, 100), device="cuda")
        mask = torch.ones_like(ids)
        mask[0, :9] = 0
        found = []
        for model in pair:
            out = model(
                ids, attention_mask=mask, labels=ids.masked_fill(torch.arange(100, device="cuda") < 10, -100)
            )
            out.loss.backward()
            found.append(out.logits.detach())
        live = mask.bool()
        logits = float((found[0] - found[1])[live].abs().max() / found[0].abs().max())
        gradients = max(
            float((a.grad - b.grad).abs().max() / a.grad.abs().max().clamp(min=1e-6))
            for a, b in zip(*(m.parameters() for m in pair), strict=True)
        )
        given = {"max_new_tokens": 24, "do_sample": False, "attention_mask": mask}
        same = torch.equal(*(m.generate(ids, **given) for m in pair))
        say(f"{kind}: logits off by {logits:.1e}, gradients by {gradients:.1e}, same tokens: {same}")

    sizes: dict[str, Any] = {
        "vocab_size": 1000, "hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 4,
        "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 16384,
        "pad_token_id": 0,
    }  # fmt: skip
    for kind, further in (("Llama", {}), ("Mistral", {"sliding_window": 1024})):
        rates = {}
        for implementation in ("sdpa", name):
            config = getattr(transformers, f"{kind}Config")(
                **sizes, **further, attn_implementation=implementation, dtype=torch.float16
            )
            with torch.device("cuda"):
                model = getattr(transformers, f"{kind}ForCausalLM")(config).half().eval()
            ids = torch.randint(1, 1000, (1, 8192), device="cuda")
            with torch.no_grad():
                model(ids)
                rates[implementation] = min(seconds(lambda m=model, i=ids: m(i)) for _ in range(3))  # type: ignore[misc]
                more = {"max_new_tokens": 17, "min_new_tokens": 17, "do_sample": False}
                model.generate(ids, **more)
                whole = seconds(lambda m=model, i=ids, o=more: m.generate(i, **o))  # type: ignore[misc]
            say(
                f"{kind}, {implementation}: prefill of 8192 {1e3 * rates[implementation]:.1f} ms, "
                f"a token {1e3 * (whole - rates[implementation]) / 16:.1f} ms"
            )


if __name__ == "__main__":
    need_gpu()
    parts = {"masks": masks, "varlen": packed, "models": models}
    for part in sys.argv[1:] or parts:
        begin = time.perf_counter()
        try:
            parts[part]()
        except Exception:
            traceback.print_exc(limit=4)
        say(f"-- {part}: {time.perf_counter() - begin:.1f} s")
