"""Oracles of ranks and shards: sums by NumPy, optimizers and autograd by PyTorch, rounds one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl.registry import oracle
from tests.oracles import library


@oracle("parallel.collectives")
def summed(x: Any, *, algorithm: str) -> Any:
    return np.tile(np.sum(x, axis=0), (len(x), 1))


@oracle("parallel.collectives.reduce_scatter")
def summed_chunks(x: Any) -> Any:
    total = np.sum(x, axis=0)
    while len(total) % len(x):
        total = np.append(total, 0.0)
    return total.reshape(len(x), -1)


@oracle("parallel.collectives.reduce")
def summed_once(x: Any, *, root: int) -> Any:
    return np.sum(x, axis=0)


@oracle("parallel.collectives.all_gather")
def tiled(x: Any) -> Any:
    return np.array([[value for row in x for value in row] for _ in x]).reshape(len(x), x.size)


@oracle("parallel.collectives.all_to_all")
def transposed(x: Any) -> Any:
    return np.swapaxes(x, 0, 1)


@oracle("parallel.collectives.broadcast")
def repeated(x: Any, *, root: int) -> Any:
    return np.repeat(x[root : root + 1], len(x), axis=0)


def options_of(settings: Any) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in ("lr", "betas", "eps", "weight_decay")}


def torch_step(kind: str, p: Any, g: Any, m: Any, v: Any, step: int, settings: Any) -> tuple[Any, ...]:
    torch = library("torch")
    parameter = torch.nn.Parameter(torch.tensor(p))
    optimizer = getattr(torch.optim, kind)(
        [parameter],
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )
    optimizer.state[parameter] = {
        "step": torch.tensor(float(step - 1)),
        "exp_avg": torch.tensor(m),
        "exp_avg_sq": torch.tensor(v),
    }
    parameter.grad = torch.tensor(g)
    optimizer.step()
    state = optimizer.state[parameter]
    return parameter.detach().numpy(), state["exp_avg"].numpy(), state["exp_avg_sq"].numpy()


@oracle("parallel.mixed_precision.adamw")
def torch_adamw(p: Any, g: Any, m: Any, v: Any, *, step: int, optimizer: Any) -> Any:
    return torch_step("AdamW", p, g, m, v, step, optimizer)


@oracle("parallel.mixed_precision.adam")
def torch_adam(p: Any, g: Any, m: Any, v: Any, *, step: int, optimizer: Any) -> Any:
    return torch_step("Adam", p, g, m, v, step, optimizer)


@oracle("parallel.mixed_precision")
def torch_grad_scaler(
    parameters: Any, gradients: Any, *, model_dtype: str, optimizer: Any, loss_scale: Any,
    growth_interval: int, max_norm: float | None = None,
) -> Any:  # fmt: skip
    """PyTorch's AdamW under its own GradScaler, which finds overflow, skips steps and sets the scale."""
    torch = library("torch")
    if not parameters.size:
        raise NotImplementedError("GradScaler refuses a step without gradients")
    master = torch.nn.Parameter(torch.tensor(parameters))
    adamw = torch.optim.AdamW(
        [master],
        lr=optimizer.lr,
        betas=optimizer.betas,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=loss_scale.scale, growth_interval=growth_interval)
    scaler.scale(torch.zeros(()))  # the scaler makes its state at the first use
    scaler._growth_tracker.fill_(loss_scale.good_steps)
    low = getattr(torch, model_dtype)
    for gradient in gradients:
        scaled = torch.tensor(gradient) * scaler.get_scale()
        master.grad = scaled.to(low).to(master.dtype)
        scaler.unscale_(adamw)
        if max_norm is not None:
            norm = torch.linalg.vector_norm(master.grad)
            if norm > max_norm:
                master.grad *= max_norm / norm
        scaler.step(adamw)
        scaler.update()
    state = adamw.state.get(master) or {"exp_avg": torch.zeros_like(master), "step": 0}
    second = state.get("exp_avg_sq", torch.zeros_like(master))
    return {
        "parameters": master.detach().to(low).numpy(),
        "master": master.detach().numpy(),
        "momentum": state["exp_avg"].detach().numpy(),
        "variance": second.detach().numpy(),
        "step": np.asarray(int(state["step"])),
        "scale": np.asarray(scaler.get_scale()),
        "good_steps": np.asarray(scaler._get_growth_tracker()),
    }


def torch_training(
    parameters: Any, tokens: Any, mask: Any, network: Any, optimizer: Any, max_norm: Any
) -> Any:
    """Train the network on one device, all sequences in one batch, by autograd and PyTorch's AdamW."""
    torch = library("torch")
    shapes = [shape for unit in network for shape in unit.shapes]
    if len(shapes) != 6:
        raise NotImplementedError("one attention block")
    sizes = [int(np.prod(shape)) for shape in shapes]
    flat = torch.nn.Parameter(torch.tensor(parameters))
    adamw = torch.optim.AdamW([flat], **options_of(optimizer))
    losses = []
    for words, counts in zip(tokens, mask, strict=True):
        words, counts = (torch.tensor(x.reshape(-1, x.shape[-1])) for x in (words, counts))
        pieces = torch.split(flat, sizes)
        weights = [piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)]
        embedding, w_q, w_k, w_v, w_o, head = weights
        x = embedding[words[:, :-1]]
        q, k, v = (x @ w for w in (w_q, w_k, w_v))  # one head
        scores = q @ k.transpose(1, 2) / np.sqrt(q.shape[-1])
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        x = x + torch.softmax(scores.masked_fill(later, -torch.inf), -1) @ v @ w_o
        each = torch.nn.functional.cross_entropy((x @ head).transpose(1, 2), words[:, 1:], reduction="none")
        loss = each[counts].sum() / max(int(counts.sum()), 1)
        adamw.zero_grad()
        loss.backward()
        norm = torch.linalg.vector_norm(flat.grad)
        if max_norm is not None and norm > max_norm:
            flat.grad *= max_norm / norm
        adamw.step()
        losses.append(float(loss.detach()))
    return flat.detach().numpy(), np.array(losses)


@oracle("parallel.data")
def torch_single_device(
    parameters: Any, tokens: Any, mask: Any, *, network: Any, optimizer: Any, max_norm: Any = None
) -> Any:
    trained, losses = torch_training(parameters, tokens, mask, network, optimizer, max_norm)
    return {"parameters": np.tile(trained, (tokens.shape[2], 1)), "losses": losses}


@oracle("parallel.zero")
def torch_single_device_and_a_count(
    parameters: Any, tokens: Any, mask: Any, *, network: Any, stage: int, optimizer: Any, max_norm: Any = None
) -> Any:
    """The same training; and the elements that each rank keeps, counted one by one by who owns them."""
    trained, losses = torch_training(parameters, tokens, mask, network, optimizer, max_norm)
    ranks = tokens.shape[2]
    held = np.zeros(ranks, int)
    for unit in network:
        size = unit.size
        while size % ranks:
            size += 1
        for element in range(size):  # float64: parameters, gradients, and master, momentum, variance
            owner = element // (size // ranks)
            held[owner] += 3 * 8
            real = element < unit.size
            for divided_from, exists in ((3, True), (2, len(tokens) > 0)):
                if exists and stage >= divided_from:
                    held[owner] += 8
                elif exists and real:
                    held += 8
    return {"parameters": trained, "losses": losses, "held_bytes": held}


@dataclass
class Rounds:
    """Time of rounds that follow one another: the longest message of each, and what is added after it."""

    latency: Any
    byte_time: Any
    reduce_time: Any
    total: Any = 0

    def round(self, messages: list[int], *, reduces: bool) -> None:
        if messages:
            longest = max(messages)
            self.total += (
                self.latency + longest * self.byte_time + (longest * self.reduce_time if reduces else 0)
            )


@oracle("cost.collectives")
def timed_round_by_round(
    *, operation: str, algorithm: str, elements: int, itemsize: int, ranks: int, latency: int, byte_time: int,
    reduce_time: int,
) -> Any:  # fmt: skip
    rounds = Rounds(latency, byte_time, reduce_time)
    chunk = (elements + ranks - 1) // ranks * itemsize
    whole = elements * itemsize
    if algorithm in ("ring", "pairwise"):
        for phase in {"all_reduce": (True, False), "reduce_scatter": (True,)}.get(operation, (False,)):
            for _ in range(1, ranks):
                rounds.round([chunk] * ranks, reduces=phase)
    elif algorithm == "tree":
        for phase in {"all_reduce": (True, False), "reduce": (True,)}.get(operation, (False,)):
            reached = 1
            while reached < ranks:
                rounds.round([whole] * min(reached, ranks - reached), reduces=phase)
                reached *= 2
    elif algorithm == "bruck":
        distance = 1
        while distance < ranks:
            if operation == "all_gather":
                blocks = min(distance, ranks - distance)
            else:
                blocks = sum(1 for block in range(ranks) if block // distance % 2)
            rounds.round([chunk * blocks] * ranks, reduces=False)
            distance *= 2
    elif algorithm == "doubling":
        power, distance = 1, 1
        while 2 * power <= ranks:
            power *= 2
        rounds.round([whole] * (ranks - power), reduces=True)
        while distance < power:
            rounds.round([whole] * power, reduces=True)
            distance *= 2
        rounds.round([whole] * (ranks - power), reduces=False)
    else:
        power = 1
        while 2 * power <= ranks:
            power *= 2
        part = (elements + power - 1) // power * power * itemsize
        rounds.round([whole] * (ranks - power), reduces=True)
        widths = []
        while part > (elements + power - 1) // power * itemsize:
            part //= 2
            widths.append(part)
            rounds.round([part] * power, reduces=True)
        for width in reversed(widths):
            rounds.round([width] * power, reduces=False)
        rounds.round([whole] * (ranks - power), reduces=False)
    return np.asarray(rounds.total, dtype=object)
