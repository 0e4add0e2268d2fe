"""Laws of preference losses and of metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.numerics import in_float64
from refimpl.registry import Case, law
from refimpl.testing import Close, require

Function = Callable[..., Any]


# Bradley-Terry (objectives.bradley_terry)


@law("objectives.bradley_terry")
def rewards_have_no_zero(f: Function, case: Case, close: Close) -> None:
    """A number added to all rewards changes nothing."""
    moved = case.map_arrays(lambda array: array + 2 if array.dtype == np.float64 else array)
    close.on(moved)(moved.call(f), case.call(f), "loss after a shift of all rewards")


@law("objectives.bradley_terry")
def equal_rewards_cost_log_two(f: Function, case: Case, close: Close) -> None:
    """A coin costs log 2."""
    chosen, _ = case.args
    equal = case.replace(chosen, chosen)
    if chosen.size:
        close.on(equal)(equal.call(f), np.log(2.0), "loss of equal rewards")


@law("objectives.bradley_terry")
def one_of_two_wins(f: Function, case: Case, close: Close) -> None:
    """Each answer wins with the probability that the other loses: swapping adds the mean margin."""
    chosen, rejected = case.args
    if "rankings" in case.kwargs or not chosen.size:
        return
    swapped = float(case.replace(rejected, chosen).call(f))
    margin = float(np.mean(in_float64(chosen) - in_float64(rejected)))
    close(swapped - float(case.call(f)), margin, "loss of the other outcome", factor=2.0)


@law("objectives.bradley_terry")
def a_wrong_pair_costs_its_margin(f: Function, case: Case, close: Close) -> None:
    """Far on the wrong side the loss is the margin, and far on the right side nothing: no overflow."""
    chosen, _ = case.args
    if chosen.size and chosen.dtype == np.float64:
        low, high = np.full_like(chosen, -5e3), np.full_like(chosen, 5e3)
        wrong = case.replace(low, high)
        close.on(wrong)(wrong.call(f), 1e4, "loss of a margin of -1e4")
        close.on(wrong)(case.replace(high, low).call(f), 0.0, "loss of a margin of 1e4")


@law("objectives.bradley_terry")
def falls_with_the_margin_and_is_convex(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """The loss falls as winners gain reward, ever more slowly."""
    chosen, rejected = (np.clip(array, -4, 4) for array in case.args)
    if not chosen.size:
        return
    costs = [float(case.replace(chosen + step, rejected).call(f)) for step in (0, 1, 2)]
    falls = [costs[0] - costs[1], costs[1] - costs[2]]
    require(falls[0] > falls[1] > 0, f"rewards 1 and 2 higher lower the loss by {falls}")


@law("objectives.bradley_terry")
def a_ranking_counts_once(f: Function, case: Case, close: Close) -> None:
    """With rankings given, a ranking whose pairs are all repeated weighs as before."""
    rankings = case.kwargs.get("rankings")
    if rankings is None or not rankings.size:
        return
    index = np.concatenate([np.arange(rankings.size), np.flatnonzero(rankings == rankings[0])])
    more = case.map_arrays(lambda array: array[index])
    close(more.call(f), case.call(f), "loss with the pairs of a ranking repeated", factor=2.0)


# Perplexity and bits per byte (objectives.metrics)


@law("objectives.metrics")
def documents_may_be_joined(f: Function, case: Case, close: Close) -> None:
    """A corpus as one document has the same metrics: no mean of means."""
    nats, tokens, n_bytes = case.args
    # Whole numbers up to 40, whose sum every format holds exactly: what is joined is not rounded.
    corpus = case.replace(np.clip(np.rint(nats), 1, 40).astype(nats.dtype), tokens, n_bytes)
    joined = corpus.map_arrays(lambda array: np.sum(array, keepdims=True, dtype=array.dtype))
    close.on(corpus)(joined.call(f), corpus.call(f), "metrics of the joined corpus", factor=2.0)


@law("objectives.metrics")
def uniform_guesses_have_known_metrics(f: Function, case: Case, close: Close) -> None:
    """Guessing among V tokens has perplexity V; guessing bytes costs 8 bits."""
    _, tokens, n_bytes = case.args
    guessing = case.replace(tokens * np.log(17.0), tokens, n_bytes)
    close.on(guessing)(guessing.call(f)[0], 17.0, "perplexity of 17 equal choices")
    by_bytes = case.replace(n_bytes * np.log(256.0), n_bytes, n_bytes)
    close.on(by_bytes)(by_bytes.call(f)[1], 8.0, "bits of a random byte", of="bits_per_byte")


@law("objectives.metrics")
def bits_do_not_depend_on_tokens(f: Function, case: Case, close: Close) -> None:
    """At equal nats, half the tokens square the perplexity and leave bits per byte as they are."""
    nats, tokens, n_bytes = case.args
    fine = case.replace(nats, 2 * tokens, n_bytes)
    coarse_ppl, coarse_bits = case.call(f)
    fine_ppl, fine_bits = fine.call(f)
    close(fine_bits, coarse_bits, "bits per byte with twice the tokens", of="bits_per_byte")
    close(fine_ppl**2, coarse_ppl, "squared perplexity with twice the tokens", factor=4.0, of="perplexity")


@law("objectives.metrics")
def perplexity_is_at_least_one(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """A perplexity is at least 1, and 1 without any loss."""
    nats, tokens, n_bytes = case.args
    require(case.call(f)[0] >= 1, "a perplexity below 1")
    require(case.replace(np.zeros_like(nats), tokens, n_bytes).call(f)[0] == 1, "no loss, not 1")


# pass@k (objectives.metrics.pass_at_k)


@law("objectives.metrics.pass_at_k")
def one_sample_is_the_share_of_correct_ones(f: Function, case: Case, close: Close) -> None:
    """pass@1 is c / n."""
    correct, samples = case.args
    once = case.replace(k=1)
    close.on(once)(once.call(f), correct / samples, "pass@1")


@law("objectives.metrics.pass_at_k")
def all_samples_pass_if_one_does(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """pass@n is 1 if any sample is correct, else 0; with fewer than k wrong ones it is exactly 1."""
    correct, samples = case.args
    k = case.kwargs["k"]
    for c, n in zip(correct.tolist(), samples.tolist(), strict=True):
        whole = float(np.asarray(case.replace(np.array([c]), np.array([n]), k=n).call(f))[0])
        require(whole == (c > 0), f"pass@{n} of {c} correct in {n} is {whole}")
    require((case.call(f) == 1) | (samples - correct >= k), f"not 1 with fewer than {k} wrong samples")


@law("objectives.metrics.pass_at_k")
def more_tries_pass_more(f: Function, case: Case, close: Close) -> None:
    """A miss of k tries is a miss of one and of k - 1 among the rest."""
    correct, samples = case.args
    k = case.kwargs["k"]
    if k < 2 or not samples.size:
        return
    rest = case.replace(np.minimum(correct, samples - 1), samples - 1, k=k - 1)
    miss = (samples - correct) / samples * (1 - np.asarray(rest.call(f)))
    close(1 - np.asarray(case.call(f)), miss, "probability of a miss", factor=4.0)


@law("objectives.metrics.pass_at_k")
def more_correct_samples_pass_more(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Another correct sample never lowers the estimate."""
    correct, samples = case.args
    better = case.replace(np.minimum(correct + 1, samples), samples)
    require(np.asarray(better.call(f)) >= np.asarray(case.call(f)), "one more correct sample lowers pass@k")


# Standard error (objectives.metrics.standard_error)


@law("objectives.metrics.standard_error")
def two_values_err_by_half_their_distance(f: Function, case: Case, close: Close) -> None:
    """The standard error of two values is half of what they differ by."""
    values = case.args[0]
    pair = case.replace(values[:2])
    expected = abs(float(values[0]) - float(values[1])) / 2
    close.on(pair)(pair.call(f), expected, "standard error of two values")


@law("objectives.metrics.standard_error")
def copies_are_no_new_runs(f: Function, case: Case, close: Close) -> None:
    """Values listed r times have the standard error times sqrt((n - 1) / (r n - 1))."""
    values = case.args[0]
    thrice = case.replace(np.tile(values, 3))
    shrink = np.sqrt((values.size - 1) / (3 * values.size - 1))
    close.on(thrice)(thrice.call(f), shrink * float(case.call(f)), "standard error of copies")


@law("objectives.metrics.standard_error")
def scales_and_ignores_offsets(f: Function, case: Case, close: Close) -> None:
    """Values times -4 have 4 times the error, and values moved by a number the same."""
    values = case.args[0]
    larger = case.replace((values * -4).astype(values.dtype))
    close.on(larger)(larger.call(f), 4 * float(case.call(f)), "standard error of larger values")
    # Sixteenths below 8 stay exact when 8 is added, in 8 significant bits too: the law moves what it says.
    placed = case.replace((np.rint(values * 16) / 16).astype(values.dtype))
    moved = case.replace(placed.args[0] + values.dtype.type(8))
    close.on(moved)(moved.call(f), placed.call(f), "standard error of moved values", factor=2.0)
