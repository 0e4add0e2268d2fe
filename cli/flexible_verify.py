"""``frugal verify attention.flexible --mod FILE:FUNCTION``: a mask or score of the user's, held to the rules.

The function is judged alone, then attention with it: a gradient of a score against differences of the score,
what it says of whole arrays against what it says of one score, and the kernels against the definition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from cli.flexible_compiled import compiler_says
from cli.flexible_forms import Form
from cli.foreign import blame
from refimpl.attention.user_functions import Mod, as_mod, modified_scores, where_allowed
from refimpl.errors import BackendUnavailableError, Inconclusive
from refimpl.numerics import Array

if TYPE_CHECKING:
    from refimpl.testing import Outcome, Status

__all__ = ["mod_outcomes"]

Check: TypeAlias = Callable[[], "str | None"]

TECHNIQUE = "attention.flexible"
POINTS = 96
SPREADS = (1.0, 8.0, 40.0)  # of scores: where a cap begins to matter nobody knows
SEQUENCES, HEADS, TOKENS = 2, 4, 64
STEP = float(np.finfo(np.float64).eps ** (1 / 3))
# A central difference of that step errs by some 1e-10 of score and slope where the score is smooth.
TOLERANCE = 1e-6
# Slopes ahead and behind that differ by more than this belong to a kink or a jump between them.
KINK = 1e-3
# B, H, Hkv, N, D: heads in groups, ragged tiles.
SHAPES = {"cudasim": (1, 2, 1, 18, 8), "cuda": (2, 4, 2, 300, 64)}


def mod_outcomes(
    form: Form,
    target: str,
    backend: str,
    dtypes: Sequence[str] | None,
    seed: int,
    examples: int,
    poisoned: Callable[[], AbstractContextManager[None]],
) -> list[Outcome]:
    """Return what came of every check of a mask or score, up to the first at which it raises.

    Parameters
    ----------
    form, target
        What `users_form` gives, and was given.
    backend
        With "cuda" or "cudasim" kernels run as well; the simulator takes all of Python, so with "cudasim" the
        functions are compiled for a GPU, too, where there is a compiler.
    dtypes
        Of the kernels.  Default: float32, forward alone, float16 and bfloat16.
    seed, examples
        The first seed, and how many cases the function sees.
    poisoned
        In which kernels run.
    """
    from refimpl.testing import Outcome

    again = f"frugal verify {TECHNIQUE} --mod {target} --backend {backend} --seed {seed}"
    path = target.rpartition(":")[0]
    found: list[Outcome] = []
    for where, what, action, more in _checks(form, target, backend, dtypes, seed, examples, poisoned):
        status, detail, raised = _verdict(action, path)
        found.append(Outcome(TECHNIQUE, *where, what, status, detail, again + more))
        if raised:
            break  # other checks would say the same
    return found


def _verdict(action: Check, path: str) -> tuple[Status, str, bool]:
    """Return a status, what is to be said, and whether a function in the file `path` raised."""
    try:
        problem = action()
    except BackendUnavailableError:
        raise
    except Exception as error:  # a verdict on somebody's function
        said = blame(error, path)
        if said is not None:
            return "failed", said, True
        if isinstance(error, Inconclusive):
            return "invalid", str(error), False
        if isinstance(error, NotImplementedError):
            return "refused", str(error), False
        return "failed", f"raised {type(error).__name__}: {error}", False
    return ("failed", problem, False) if problem else ("passed", "", False)


def _checks(
    form: Form,
    target: str,
    backend: str,
    dtypes: Sequence[str] | None,
    seed: int,
    examples: int,
    poisoned: Callable[[], AbstractContextManager[None]],
) -> Iterator[tuple[tuple[str, str, str], str, Check, str]]:
    """Yield function, backend and format of each check, its name, what runs it, options that repeat it."""
    from refimpl.testing import LOW_PRECISION

    for what, action in _of_the_function(form, seed, examples):
        yield (target, "numpy", "float64"), what, action, ""
    if backend == "cudasim":
        yield (target, "sm_80", ""), "compiles", partial(compiler_says, target), ""
    for dtype in (dtypes or LOW_PRECISION) if backend in SHAPES else ():
        for name, what, action in _of_kernels(form, backend, dtype, seed, poisoned):
            yield (name, backend, dtype), what, action, f" --dtype {dtype}"


def _of_the_function(form: Form, seed: int, examples: int) -> Iterator[tuple[str, Check]]:
    options = form.options
    score = as_mod("score_mod", options["score_mod"], ("score",)) if "score_mod" in options else None
    vjp: Mod | None = None
    if "score_mod_vjp" in options:
        vjp = as_mod("score_mod_vjp", options["score_mod_vjp"], ("gradient", "score"))
    for case in range(seed, seed + examples):
        if score is None:
            yield "one by one", partial(_mask_one_by_one, as_mod("mask_mod", options["mask_mod"]), case)
            continue
        yield "one by one", partial(_score_one_by_one, score, case)
        if vjp is None:
            if case == seed:
                yield "score_mod_vjp", partial(_without_gradient, form.name)
            continue
        yield "score_mod_vjp", partial(_against_differences, score, vjp, case)
        yield "linear in the gradient", partial(_linear, vjp, score, case)
        yield "gradient", partial(_gradient_of_attention, form, case)


def _points(seed: int) -> tuple[Array, tuple[Array, ...]]:
    """Return scores, and b, h, i, j for each."""
    rng = np.random.default_rng([seed, 0x5C03E])
    scores = rng.standard_normal(POINTS) * np.resize(SPREADS, POINTS)
    limits = (SEQUENCES, HEADS, TOKENS, TOKENS)
    return scores, tuple(rng.integers(0, limit, POINTS) for limit in limits)


def _where(indices: tuple[Array, ...], n: int) -> str:
    return ", ".join(f"{name} {index[n]}" for name, index in zip("bhij", indices, strict=True))


def _mask_one_by_one(mod: Mod, seed: int) -> str | None:
    """Say where a mask of arrays of indices is not that of the indices alone, which kernels compile."""
    _, indices = _points(seed)
    together = where_allowed(mod, indices, ())
    for n in range(POINTS):
        alone = bool(mod.call((), tuple(int(index[n]) for index in indices), ()))
        if alone != together[n]:
            return f"at {_where(indices, n)}: {alone}, but {together[n]} among arrays of indices"
    return None


def _score_one_by_one(mod: Mod, seed: int) -> str | None:
    scores, indices = _points(seed)
    together = modified_scores(mod, (scores,), indices, ())
    for n in range(POINTS):
        alone = float(mod.call((float(scores[n]),), tuple(int(index[n]) for index in indices), ()))
        if not np.isclose(alone, together[n], rtol=1e-12, atol=1e-12, equal_nan=True):
            return (
                f"at score {scores[n]:.4g}, {_where(indices, n)}: {alone:.6g}, among arrays {together[n]:.6g}"
            )
    return None


def _without_gradient(name: str) -> str | None:
    raise NotImplementedError(f"the file has no {name}_vjp, so there are no gradients to check")


def _against_differences(score: Mod, vjp: Mod, seed: int) -> str | None:
    """Hold a gradient of a score to central differences, where the score has a slope."""
    scores, indices = _points(seed)
    gradient = np.random.default_rng([seed, 0x6]).standard_normal(POINTS)
    step = STEP * np.maximum(1.0, np.abs(scores))
    behind, at, ahead = (modified_scores(score, (scores + d,), indices, ()) for d in (-step, 0 * step, step))
    with np.errstate(all="ignore"):
        sides = (at - behind) / step, (ahead - at) / step
        slope = (ahead - behind) / (2 * step)
        size = 1.0 + np.abs(at) + np.abs(sides[0]) + np.abs(sides[1])
        smooth = np.isfinite(slope) & (np.abs(sides[0] - sides[1]) <= KINK * size)
    if not smooth.any():
        raise Inconclusive("score_mod has a slope at none of the scores")
    found = modified_scores(vjp, (gradient, scores), indices, ())
    with np.errstate(all="ignore"):
        wrong = smooth & ~(
            np.abs(found - gradient * slope) <= TOLERANCE * size * np.maximum(1, np.abs(gradient))
        )
    if not wrong.any():
        return None
    n = int(np.argmax(wrong))
    return (
        f"at score {scores[n]:.4g}, {_where(indices, n)}, gradient {gradient[n]:.4g}: got {found[n]:.6g}, "
        f"differences of score_mod say {gradient[n] * slope[n]:.6g} ({wrong.sum()} of {smooth.sum()} scores)"
    )


def _linear(vjp: Mod, score: Mod, seed: int) -> str | None:
    """Hold a gradient to being proportional to what comes in: Hopper kernels ask it for a slope."""
    scores, indices = _points(seed)
    asked = np.isfinite(modified_scores(score, (scores,), indices, ()))  # elsewhere nobody asks
    one, other = (modified_scores(vjp, (np.full(POINTS, x), scores), indices, ()) for x in (1.0, -2.5))
    wrong = asked & ~np.isclose(other, -2.5 * one, rtol=TOLERANCE, atol=1e-30)
    if not wrong.any():
        return None
    n = int(np.argmax(wrong))
    return f"at score {scores[n]:.4g}, {_where(indices, n)}: {one[n]:.6g} for 1, {other[n]:.6g} for -2.5"


def _gradient_of_attention(form: Form, seed: int) -> str | None:
    """Hold dQ, dK and dV of the definition with these functions to differences along random directions."""
    from refimpl import registry
    from refimpl.attention.samples_flexible import sample_flexible
    from refimpl.consistency import check_vjp

    rng = np.random.default_rng(seed)
    case = sample_flexible(rng, B=2, Tq=7, Tk=9, Hkv=1, group=2, D=4, Dv=3).replace(**form.options)
    return check_vjp(registry.get(TECHNIQUE), case, seed)


def _of_kernels(
    form: Form, backend: str, dtype: str, seed: int, poisoned: Callable[[], AbstractContextManager[None]]
) -> Iterator[tuple[str, str, Check]]:
    """Yield each tier, the pass, and what runs it: attention, as ``frugal bench flexible`` verifies it."""
    from cli.contest import supply_of
    from cli.flexible_problems import flexible_problem

    draw, to_host, _ = supply_of(backend)
    # Limits of gradients are those of rounded operands, which says too little of float32.
    both = dtype != "float32" and ("score_mod" not in form.options or "score_mod_vjp" in form.options)
    for backward in (False, True) if both else (False,):
        what = "backward" if backward else "forward"
        try:
            problem = flexible_problem(form, SHAPES[backend], dtype, backward=backward)
        except Exception as error:  # of the mask, which is asked for dead tiles
            yield "frugal portable", what, partial(_again, error)
            return
        functions = {} if problem.functions is None else problem.functions(backend)
        for name, function in functions.items():

            def action(problem: Any = problem, function: Callable[..., Any] = function) -> str | None:
                with poisoned():
                    operands, _ = problem.operands(draw, seed)
                    wrong: str | None = problem.check(operands, function(*operands), to_host)
                return wrong

            yield name, what, action


def _again(error: Exception) -> None:
    raise error
