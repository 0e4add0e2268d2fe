"""Losses that are wrong in one way: the laws of the records must catch each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from refimpl import moe, registry
from refimpl.errors import LawViolation
from refimpl.moe.errata_losses import one_coefficient_for_all, shazeers_coefficients_for_vision
from refimpl.registry import Case
from refimpl.testing import check
from tests.survivors import Mutants

registry.load()

Function = Callable[..., Any]
MUTANTS = Mutants()
mutant = MUTANTS.of


@mutant("moe.importance_loss")
def coefficient_not_squared(gates: Any, /, **options: Any) -> Any:
    return moe.importance_loss(gates, **options) ** 0.5


@mutant("moe.importance_loss")
def unbiased_for_all(gates: Any, /, *, variation: str) -> Any:
    return moe.importance_loss(gates, variation="davidmrau")


@mutant("moe.importance_loss")
def biased_for_all(gates: Any, /, *, variation: str) -> Any:
    return moe.importance_loss(gates, variation="shazeer")


@mutant("moe.importance_loss")
def variance_alone(gates: Any, /, *, variation: str) -> Any:
    return float(np.var(gates.sum(axis=0)))


@mutant("moe.importance_loss")
def each_token_for_itself(gates: Any, /, **options: Any) -> Any:
    return float(np.mean([moe.importance_loss(row[None], **options) for row in gates])) if len(gates) else 0.0


@mutant("moe.importance_loss")
def counts_for_gates(gates: Any, /, **options: Any) -> Any:
    return moe.importance_loss(np.where(gates > 0, 1.0, 0.0), **options)


@mutant("moe.load_loss")
def noise_forgotten(x: Any, h: Any, std: Any, /, **options: Any) -> Any:
    return moe.load_loss(x, x, std, **options)


@mutant("moe.load_loss")
def deviation_forgotten(x: Any, h: Any, std: Any, /, **options: Any) -> Any:
    return moe.load_loss(x, h, np.ones_like(std), **options)


@mutant("moe.load_loss")
def one_expert_more(x: Any, h: Any, std: Any, /, *, k: int, **options: Any) -> Any:
    return moe.load_loss(x, h, std, k=min(k + 1, x.shape[1]), **options)


@mutant("moe.load_loss")
def the_other_threshold(x: Any, h: Any, std: Any, /, *, threshold: str, **options: Any) -> Any:
    other: Any = {"shazeer": "vmoe", "vmoe": "shazeer"}[threshold]
    return moe.load_loss(x, h, std, threshold=other, **options)


@mutant("moe.load_loss")
def noisy_for_clean(x: Any, h: Any, std: Any, /, **options: Any) -> Any:
    return moe.load_loss(h, h, std, **options)


@mutant("moe.load_loss")
def rounded_probabilities(x: Any, h: Any, std: Any, /, *, k: int, threshold: Any, variation: str) -> Any:
    P = np.rint(moe.load_probabilities(x, h, std, k=k, threshold=threshold))
    return moe.importance_loss(P, variation=variation)  # type: ignore[arg-type]


@mutant("moe.balance_loss")
def number_of_experts_forgotten(p: Any, chosen: Any, /, **options: Any) -> Any:
    return moe.balance_loss(p, chosen, **options) / p.shape[1]


@mutant("moe.balance_loss")
def all_choices_counted(p: Any, chosen: Any, /, *, normalization: str, **options: Any) -> Any:
    scale = 1 / p.shape[1] ** 2 if normalization == "gshard" else 1.0
    return scale * moe.balance_loss(p, chosen, normalization="flaxformer", **options)


@mutant("moe.balance_loss")
def first_choices_only(p: Any, chosen: Any, /, **options: Any) -> Any:
    return moe.balance_loss(p, chosen[:, :1], **options)


@mutant("moe.balance_loss")
def one_large_group(p: Any, chosen: Any, /, *, groups: int = 1, **options: Any) -> Any:
    return moe.balance_loss(p, chosen, **options)


@mutant("moe.balance_loss")
def padding_counted(p: Any, chosen: Any, /, *, counted: Any = None, **options: Any) -> Any:
    return moe.balance_loss(p, chosen, **options)


@mutant("moe.balance_loss", "moe.device_balance_loss.expert")
def probabilities_of_selected_only(p: Any, chosen: Any, /, **options: Any) -> Any:
    kept = np.zeros_like(p)
    np.put_along_axis(kept, chosen, np.take_along_axis(p, chosen, axis=1), axis=1)
    f = moe.balance_loss if options or "normalization" in options else moe.expert_balance_loss
    return f(kept, chosen, **options)


@mutant("moe.balance_loss")
def squared_probabilities(
    p: Any, chosen: Any, /, *, normalization: str, groups: int = 1, counted: Any = None
) -> Any:
    return float(p.shape[1] * np.sum(p.mean(axis=0) ** 2)) if len(p) else 0.0


@mutant("moe.device_balance_loss.expert")
def not_divided_by_choices(p: Any, chosen: Any, /) -> Any:
    return moe.expert_balance_loss(p, chosen) * chosen.shape[1]


@mutant("moe.device_balance_loss")
def devices_ignored(p: Any, chosen: Any, /, *, device_of: Any) -> Any:
    return moe.expert_balance_loss(p, chosen)


@mutant("moe.device_balance_loss")
def shares_of_devices_summed(p: Any, chosen: Any, /, *, device_of: Any) -> Any:
    counts = np.bincount(device_of)[device_of]
    return moe.device_balance_loss(p * counts, chosen, device_of=device_of)


@mutant("moe.device_balance_loss")
def contiguous_placement(p: Any, chosen: Any, /, *, device_of: Any) -> Any:
    return moe.device_balance_loss(p, chosen, device_of=np.sort(device_of))


@mutant("moe.device_balance_loss.communication")
def messages_for_each_expert(p: Any, chosen: Any, /, *, device_of: Any, device_limit: int) -> Any:
    devices = np.unique(device_of)
    hits = [np.isin(chosen, np.flatnonzero(device_of == d)).sum() / max(len(p), 1) for d in devices]
    means = [p[:, device_of == d].sum() / max(len(p), 1) for d in devices]
    return float(len(devices) / device_limit * np.dot(hits, means))


@mutant("moe.device_balance_loss.communication")
def limit_ignored(p: Any, chosen: Any, /, *, device_of: Any, device_limit: int) -> Any:
    return moe.communication_balance_loss(p, chosen, device_of=device_of, device_limit=1)


@mutant("moe.z_loss")
def not_squared(x: Any, /, **options: Any) -> Any:
    return abs(moe.z_loss(x, **options)) ** 0.5


@mutant("moe.z_loss")
def square_of_the_mean(x: Any, /, *, counted: Any = None, padding: str) -> Any:
    return float(np.logaddexp.reduce(x, axis=1).mean() ** 2) if len(x) else 0.0


@mutant("moe.z_loss")
def sum_over_tokens(x: Any, /, **options: Any) -> Any:
    return moe.z_loss(x, **options) * len(x)


@mutant("moe.z_loss")
def largest_for_logsumexp(x: Any, /, *, counted: Any = None, padding: str) -> Any:
    return float(np.mean(x.max(axis=1) ** 2)) if len(x) else 0.0


@mutant("moe.z_loss")
def padding_treated_the_other_way(x: Any, /, *, padding: str, counted: Any = None) -> Any:
    other: Any = {"excluded": "flaxformer", "flaxformer": "excluded"}[padding]
    return moe.z_loss(x, padding=other, counted=counted)


@mutant("moe.z_loss")
def padding_not_masked(x: Any, /, *, padding: str, counted: Any = None) -> Any:
    return moe.z_loss(x)


@mutant("moe.mutual_information_loss")
def sign_forgotten(x: Any, /, **options: Any) -> Any:
    return -moe.mutual_information_loss(x, **options)


@mutant("moe.mutual_information_loss")
def marginal_alone(x: Any, /, **options: Any) -> Any:
    p = np.exp(x - np.logaddexp.reduce(x, axis=1, keepdims=True))
    mean = p.mean(axis=0) if len(p) else p.sum(axis=0)
    return float(np.sum(mean * np.log(np.where(mean > 0, mean, 1))))


@mutant("moe.mutual_information_loss")
def the_other_marginal(x: Any, /, *, marginal: str) -> Any:
    other: Any = {"exact": "moduleformer", "moduleformer": "exact"}[marginal]
    return moe.mutual_information_loss(x, marginal=other)


@mutant("moe.mutual_information_loss")
def in_bits(x: Any, /, **options: Any) -> Any:
    return moe.mutual_information_loss(x, **options) / np.log(2)


@mutant("moe.mutual_information_loss")
def summed_over_tokens(x: Any, /, **options: Any) -> Any:
    return moe.mutual_information_loss(x, **options) * len(x)


@mutant("moe.mutual_information_loss.tasks")
def the_other_weights(x: Any, tasks: Any, /, *, task_weights: str) -> Any:
    other: Any = {"equal": "frequency", "frequency": "equal"}[task_weights]
    return moe.task_information_loss(x, tasks, task_weights=other)


@mutant("moe.mutual_information_loss.tasks")
def tokens_for_tasks(x: Any, tasks: Any, /, **options: Any) -> Any:
    return moe.mutual_information_loss(x)


@mutant("moe.mutual_information_loss.tasks")
def sign_of_information(x: Any, tasks: Any, /, **options: Any) -> Any:
    return -moe.task_information_loss(x, tasks, **options)


@mutant("moe.mutual_information_loss.tasks")
def first_choices_for_gates(x: Any, tasks: Any, /, **options: Any) -> Any:
    return moe.task_information_loss(1e3 * np.eye(x.shape[1])[np.argmax(x, axis=1)], tasks, **options)


@mutant("moe.logit_normalization")
def deviation_over_one_less(x: Any, /, **options: Any) -> Any:
    E = x.shape[1]
    return moe.normalize_logits(x, **options) * ((E - 1) / E) ** 0.5


@mutant("moe.logit_normalization")
def temperature_divides(x: Any, /, *, temperature: float) -> Any:
    return moe.normalize_logits(x, temperature=1 / temperature)


@mutant("moe.logit_normalization")
def mean_kept(x: Any, /, *, temperature: float) -> Any:
    deviation = x.std(axis=1, keepdims=True)
    return temperature * x / np.where(deviation > 0, deviation, 1)


@mutant("moe.logit_normalization")
def over_tokens(x: Any, /, **options: Any) -> Any:
    return moe.normalize_logits(x.T.copy(), **options).T.copy() if len(x) else x.copy()


@mutant("moe.adaptive_coefficient")
def not_limited(a: Any, d: Any, /) -> Any:
    return moe.adapt_coefficient(a, d, largest=1e9)


@mutant("moe.adaptive_coefficient")
def no_memory(a: Any, d: Any, /) -> Any:
    return moe.adapt_coefficient(a, d, momentum=0.0)


@mutant("moe.adaptive_coefficient")
def mean_drop_rate(a: Any, d: Any, /) -> Any:
    return moe.adapt_coefficient(a, np.full_like(d, d.mean() if len(d) else 0.0))


@mutant("moe.loss_coefficients")
def device_loss_everywhere(*, model: str) -> Any:
    return moe.loss_coefficients(model=model)._replace(device=0.05)


mutant("moe.loss_coefficients")(one_coefficient_for_all)
mutant("moe.loss_coefficients")(shazeers_coefficients_for_vision)


@mutant("moe.balance_loss.skywork")
def switchs_loss(gates: Any, /) -> Any:
    first = np.argmax(gates, axis=1)[:, None]
    return moe.balance_loss(gates, first) - 1 if len(gates) else 0.0


@mutant("moe.balance_loss.skywork")
def mean_over_experts(gates: Any, /) -> Any:
    return moe.uniformity_loss(gates) / gates.shape[1]


@mutant("moe.balance_loss.skywork")
def shares_of_the_whole(gates: Any, /) -> Any:
    total = gates.sum()
    return float(np.sum((gates.sum(axis=0) / total - 1 / gates.shape[1]) ** 2)) if total else 0.0


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught_by_laws(name: str) -> None:
    MUTANTS.assert_caught(name)


def test_the_lectures_one_coefficient_breaks_its_law() -> None:
    (erratum,) = (item for item in registry.ERRATA if item.name == "one_coefficient_for_all")
    law = registry.LAWS[erratum.breaks]
    with pytest.raises(LawViolation, match=r"0\.01, 0\.01, 0\.01"):
        law.function(erratum.mutant, Case((), {"model": "shazeer"}), None)


@pytest.mark.parametrize(
    ("technique", "vjp"),
    [
        ("moe.balance_loss", "refimpl.moe.losses_balance:balance_loss_vjp"),
        ("moe.balance_loss.skywork", "refimpl.moe.losses_skywork:uniformity_loss_vjp"),
        ("moe.z_loss", "refimpl.moe.losses_z:z_loss_vjp"),
        ("moe.load_loss", "refimpl.moe.losses_load:load_loss_vjp"),
        ("moe.importance_loss", "refimpl.moe.losses_importance:importance_loss_vjp"),
        ("moe.mutual_information_loss", "refimpl.moe.losses_mutual_information:mutual_information_loss_vjp"),
    ],
)
def test_a_wrong_gradient_is_caught(technique: str, vjp: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _, name = vjp.partition(":")
    right = registry.resolve(vjp)

    def half_as_large(*args: Any, **options: Any) -> Any:
        gradients = right(*args, **options)
        return gradients._replace(**{gradients._fields[-1]: 0.5 * gradients[-1]})

    monkeypatch.setattr(f"{module}.{name}", half_as_large)
    assert any(outcome.check == "gradient" for outcome in check(technique, examples=8).failed)
