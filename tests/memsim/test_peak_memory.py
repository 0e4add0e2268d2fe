"""Peaks of training steps: what PyTorch's tracker sees on the host, and the file of a session with a GPU."""

from __future__ import annotations

from typing import Any

import pytest

from memsim.formats.huggingface import model_of_config
from memsim.measured import peak_memory, validation
from memsim.measured.measured_files import document
from memsim.measured.peak_memory import memory_rows, predicted_memory
from memsim.memory.run import Run
from memsim.memory.step_memory import step_memory

NAMES = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads",
    "num_key_value_heads",
)  # fmt: skip


def config(*sizes: int) -> dict[str, Any]:
    return {"model_type": "llama", **dict(zip(NAMES, sizes, strict=True))}


NETWORK = config(2, 64, 1000, 64, 4, 4), 1, 256  # where its memory goes to
SCORES = config(4, 64, 172, 64, 4, 4), 1, 512


@pytest.mark.parametrize(
    ("sizes", "attention", "recompute", "within"),
    [
        (NETWORK, "standard", "none", 0.003),
        (NETWORK, "flash", "full", 0.003),
        (NETWORK, "standard", "full", 0.003),
        (SCORES, "flash", "full", 0.01),
        # Gradients of queries and keys are counted beside those of the scores, which are gone by then.
        (SCORES, "standard", "none", 0.02),
        (SCORES, "standard", "full", 0.05),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_the_model_that_is_measured_is_the_one_described(
    sizes: Any, attention: str, recompute: str, within: float
) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from torch.distributed._tools.mem_tracker import MemTracker

    from tests.cuda.measure_memory import built, trained

    described, batch, tokens = sizes
    case = {"config": described, "batch": batch, "attention": attention, "recompute": recompute}
    model = built(case, "cpu")
    adam = torch.optim.Adam(model.parameters(), foreach=False)
    ids = torch.zeros((batch, tokens), dtype=torch.int64)
    tracker = MemTracker()
    tracker.track_external(model, adam)
    with tracker:
        trained(model, adam, ids)  # makes the optimizer's states
        tracker.reset_mod_stats()
        trained(model, adam, ids)
    ((_, seen),) = tracker.get_tracker_snapshot("peak").items()
    run: dict[str, Any] = {"attention": attention, "recompute": recompute}
    ours = step_memory(
        model=model_of_config(described),
        run=Run(batch=batch, sequence=tokens, convention="bf16", fused_norm=False, **run),
    )
    assert ours.peak == pytest.approx(seen["Total"], rel=within)


def test_from_a_file_to_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    training = {"config": SCORES[0], "batch": 1, "sequence": 512, "attention": "flash", "recompute": "full"}
    serving = {"config": SCORES[0], "batch": 2, "prompt": 100, "generated": 28}
    predicted = predicted_memory(training)
    cases = [
        {**training, "allocated": 2 * predicted["allocated"], "reserved": predicted["reserved"]},
        {**serving, "allocated": 1000, "reserved": 2000},
    ]
    found = document("memory", "h200", "PyTorch", case=cases)
    monkeypatch.setattr(peak_memory, "of_kind", lambda _: [found])
    rows = {row.id: row for row in memory_rows()}
    assert {name: row.error for name, row in rows.items() if "training" in name} == {
        "memory.h200.training.4x64.1x512.flash.full.allocated": -0.5,
        "memory.h200.training.4x64.1x512.flash.full.reserved": 0.0,
    }
    # bf16: embedding and head, layers of four matrices of attention, three of the network and two norms, a
    # last norm; keys and values of the prompts; in the last layer four streams, and three as wide as inside.
    weights = 2 * (2 * 64 * 64 + 4 * (4 * 64**2 + 3 * 64 * 172 + 2 * 64) + 64)
    served = rows["memory.h200.serving.4x64.2x100+28.allocated"].predicted * 1e6
    prompts = 2 * 2 * 100 * 2 * 4 * 64 + 2 * 2 * 100 * (4 * 64 + 3 * 172)
    assert served == pytest.approx(weights + prompts + (64 << 20), abs=1)
    # With a long answer it is the cache that sets the peak, of all tokens.
    longer = predicted_memory({**serving, "prompt": 1, "generated": 127})["allocated"]
    assert longer == weights + 2 * 2 * 128 * 2 * 4 * 64 + (64 << 20)
    assert {row.id for row in validation.validate(only="memory.*")} == set(rows)


def test_the_product_in_the_gradient_of_softmax() -> None:
    """With scores in memory one more matrix of them; without, nothing."""
    model, (_, batch, tokens) = model_of_config(SCORES[0]), SCORES
    for attention, more in (("standard", 2 * batch * 4 * tokens**2), ("flash", 0)):
        run: dict[str, Any] = {
            "batch": batch,
            "sequence": tokens,
            "attention": attention,
            "recompute": "full",
        }
        without, beside = (
            step_memory(model=model, run=Run(**run, softmax_product=product)).peak
            for product in (False, True)
        )
        assert beside - without == more


@pytest.mark.filterwarnings("ignore")
def test_a_pass_over_prompts_on_the_host() -> None:
    """What transformers' Llama keeps at most beside its weights, as the model of serving has it."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from torch.distributed._tools.mem_tracker import MemTracker

    from tests.cuda.measure_memory import built

    described, batch, tokens = NETWORK
    case = {"config": described, "batch": batch, "prompt": tokens, "generated": 1}
    model = built(case, "cpu").eval()
    ids = torch.zeros((batch, tokens), dtype=torch.int64)
    cache = transformers.DynamicCache(config=model.config)
    tracker = MemTracker()
    tracker.track_external(model)
    with torch.no_grad(), tracker:
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    ((_, seen),) = tracker.get_tracker_snapshot("peak").items()
    assert predicted_memory(case)["allocated"] - (64 << 20) == pytest.approx(seen["Total"], rel=0.03)
