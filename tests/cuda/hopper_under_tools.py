"""Calls of the Hopper attention kernels for tools that watch: ``python -m tests.cuda.hopper_under_tools``.

``small``: ragged lengths, masks, widths and grouped heads, each held to PyTorch in float32, as in
``compute-sanitizer --tool memcheck --report-api-errors no python -m tests.cuda.hopper_under_tools small``
(the switch hides look-ups of functions that the driver lacks), and the same with ``--tool racecheck``.

``traffic``: two calls for B, H, N, D = 64, 16, 1024, 64, full and causal, as in ``ncu --clock-control none
--metrics dram__bytes_read.sum,dram__bytes_write.sum --kernel-name regex:forward python -m
tests.cuda.hopper_under_tools traffic``; reading each input and writing the output once is 402.7 and 134.2 MB.

``gradients`` and ``gradient_traffic`` are the same for the backward kernels, fast and deterministic.
"""

from __future__ import annotations

import sys

from tests.cuda.need_gpu import need_arguments, need_gpu

# B, Tq, Tk, Hq, Hkv, D, Dv, causal
SMALL = (
    (1, 130, 130, 2, 1, 64, 64, "top_left"),
    (1, 700, 257, 2, 2, 64, 64, False),
    (2, 65, 300, 2, 2, 128, 128, "bottom_right"),
    (1, 300, 65, 2, 2, 128, 128, "bottom_right"),
    (1, 129, 200, 1, 1, 192, 128, False),
    (1, 100, 170, 2, 2, 256, 256, "top_left"),
    (1, 70, 70, 2, 2, 60, 33, False),
)


def small() -> None:
    """Run every small case twice, one launch behind the other."""
    import torch

    from cuda_backend import flash_attention_hopper

    generator = torch.Generator("cuda").manual_seed(1)
    for B, Tq, Tk, Hq, Hkv, D, Dv, causal in SMALL:
        shapes = (B, Tq, Hq, D), (B, Tk, Hkv, D), (B, Tk, Hkv, Dv)
        q, k, v = (torch.randn(shape, device="cuda", generator=generator).half() for shape in shapes)
        first, second = (flash_attention_hopper(q, k, v, causal=causal) for _ in range(2))
        rows, columns = torch.arange(Tq, device="cuda")[:, None], torch.arange(Tk, device="cuda")
        offset = Tk - Tq if causal == "bottom_right" else 0
        k, v = (x.float().transpose(1, 2).repeat_interleave(Hq // Hkv, 1) for x in (k, v))
        scores = q.float().transpose(1, 2) @ k.transpose(-1, -2) * D**-0.5
        if causal:
            scores = scores.masked_fill(columns > rows + offset, float("-inf"))
        expected = (torch.softmax(scores, -1).nan_to_num() @ v).transpose(1, 2)
        error = (first.float() - expected).abs().max().item()
        same = torch.equal(first, second)
        sys.stdout.write(f"{(B, Tq, Tk, Hq, Hkv, D, Dv, causal)}: error {error:.1e}, repeats {same}\n")


def traffic() -> None:
    """Run the case whose traffic is known."""
    import torch

    from cuda_backend import flash_attention_hopper

    q, k, v = torch.randn(3, 64, 1024, 16, 64, device="cuda").half()
    for causal in (False, True):
        for _ in range(2):
            flash_attention_hopper(q, k, v, causal=causal)
    torch.cuda.synchronize()


def gradients() -> None:
    """Run the small cases that the backward kernels take, in both ways, held to autograd in float32."""
    import torch

    from cuda_backend import flash_attention_hopper, flash_attention_vjp_hopper

    generator = torch.Generator("cuda").manual_seed(1)
    for B, Tq, Tk, Hq, Hkv, D, Dv, causal in SMALL:
        shapes = (B, Tq, Hq, D), (B, Tk, Hkv, D), (B, Tk, Hkv, Dv), (B, Tq, Hq, Dv)
        q, k, v, do = (torch.randn(shape, device="cuda", generator=generator).half() for shape in shapes)
        out, lse = flash_attention_hopper(q, k, v, causal=causal, return_lse=True)
        leaves = [x.detach().float().requires_grad_() for x in (q, k, v)]
        rows, columns = torch.arange(Tq, device="cuda")[:, None], torch.arange(Tk, device="cuda")
        offset = Tk - Tq if causal == "bottom_right" else 0
        keys, values = (x.transpose(1, 2).repeat_interleave(Hq // Hkv, 1) for x in leaves[1:])
        scores = leaves[0].transpose(1, 2) @ keys.transpose(-1, -2) * D**-0.5
        hidden = columns > rows + offset if causal else columns < 0 * rows
        # A large negative number, so that a row without keys has weights and no NaN; they are taken away.
        weights = torch.softmax(scores.masked_fill(hidden, -1e30), -1) * ~hidden
        truth = torch.autograd.grad((weights @ values).transpose(1, 2), leaves, do.float())
        for deterministic in (False, True):
            how = {"causal": causal, "deterministic": deterministic}
            first, second = (flash_attention_vjp_hopper(q, k, v, out, lse, do, **how) for _ in range(2))
            errors = [(x.float() - y).abs().max().item() for x, y in zip(first[:3], truth, strict=True)]
            same = all(torch.equal(x, y) for x, y in zip(first[:3], second[:3], strict=True))
            case = (B, Tq, Tk, Hq, Hkv, D, Dv, causal)
            sys.stdout.write(f"{case} {how}: errors {max(errors):.1e}, repeats {same}\n")


def gradient_traffic() -> None:
    """Run the backward pass of the case whose traffic is known."""
    import torch

    from cuda_backend import flash_attention_hopper, flash_attention_vjp_hopper

    q, k, v, do = torch.randn(4, 64, 1024, 16, 64, device="cuda").half()
    for causal in (False, True):
        out, lse = flash_attention_hopper(q, k, v, causal=causal, return_lse=True)
        for deterministic in (False, True):
            flash_attention_vjp_hopper(q, k, v, out, lse, do, causal=causal, deterministic=deterministic)
    torch.cuda.synchronize()


COMMANDS = {"small": small, "traffic": traffic, "gradients": gradients, "gradient_traffic": gradient_traffic}

if __name__ == "__main__":
    (name,) = need_arguments(*COMMANDS)
    need_gpu()
    COMMANDS[name]()
