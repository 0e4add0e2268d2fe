"""Modules of PyTorch with a quantised weight beside float16: ``python -m tests.cuda.int8_modules_table``.

First q, k and v of a 70B block by LLM.int8(), apart and merged; then a layer whose weight alone is quantised.
Outputs are compared with float16 before they are timed.  Microseconds on the GPU, the host's in brackets.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from tests.cuda.need_gpu import need_gpu

PROJECTIONS = {"q": 8192, "k": 1024, "v": 1024}
WIDTH, OUTPUTS = 8192, 28_672
MERGED = {"apart": (), "k v": [("k", "v")], "q k v": [("q", "k", "v")]}
BLOCK_TOKENS, LAYER_TOKENS = (1, 16, 256, 4096), (1, 16, 32, 64, 128, 256, 512, 1024, 4096)
LARGEST_ERROR, OF_NF4 = 0.05, 0.2  # of outputs, relative; NF4 of such weights has about 0.1


def block() -> Any:
    """Return q, k and v as a module that returns all three."""
    import torch

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, outputs in PROJECTIONS.items():
                layer = torch.nn.Linear(WIDTH, outputs, bias=False, device="cuda", dtype=torch.float16)
                self.add_module(name, layer)

        def forward(self, x: Any) -> Any:
            return tuple(getattr(self, name)(x) for name in PROJECTIONS)

    return Block()


def row(calls: Mapping[str, Callable[[Any], Any]], tokens: int) -> str:
    """Return times of functions of x [tokens, WIDTH], the first of which is float16."""
    import torch

    from cuda_backend.timing import interleaved

    x = torch.randn(tokens, WIDTH, device="cuda", dtype=torch.float16)

    def outputs(call: Callable[[Any], Any]) -> Any:
        found = call(x)  # joined only to be compared: parts of a merged layer lie side by side
        return torch.cat(found if isinstance(found, tuple) else (found,), 1).float()

    exact = outputs(next(iter(calls.values())))
    words = [f"{tokens:6}"]
    timed: dict[str, Callable[[int], Any]] = {}
    for name, call in calls.items():
        error = float((outputs(call) - exact).norm() / exact.norm())
        if error > (OF_NF4 if name == "nf4" else LARGEST_ERROR):
            return f"{tokens:6} WRONG {name}: relative error {error:.3f}"
        timed[name] = lambda _, call=call: call(x)
    for name, found in interleaved(timed, rounds=9).items():
        words.append(f"{name} {1e6 * found.device_s:.1f} ({1e6 * found.host_s:.0f})")
    return "  ".join(words)


def main() -> None:
    """Print both tables."""
    import torch

    from cuda_backend.torch_ops import replace_linear, weight_only_linear

    sys.stdout.write(f"{torch.cuda.get_device_name()}\nq, k, v of {WIDTH} features\n")
    with torch.no_grad():
        plain = block()
        modules: dict[str, Any] = {"fp16": plain}
        for name, merge in MERGED.items():
            modules[name] = block()
            modules[name].load_state_dict(plain.state_dict())
            replace_linear(modules[name], merge=merge)
        for tokens in BLOCK_TOKENS:
            sys.stdout.write(row(modules, tokens) + "\n")
            sys.stdout.flush()
        del modules
        sys.stdout.write(f"weights alone, {WIDTH} x {OUTPUTS}\n")
        layer = torch.nn.Linear(WIDTH, OUTPUTS, bias=False, device="cuda", dtype=torch.float16)
        forms: dict[str, Any] = {"fp16": layer}
        forms |= {form: weight_only_linear(layer, weight=form) for form in ("int8", "nf4")}
        for tokens in LAYER_TOKENS:
            sys.stdout.write(row(forms, tokens) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    need_gpu("torch")
    main()
