"""Kernels whose branches differ from lane to lane, run for all lanes of a warp or warpgroup at once.

A register is a vector with a number for each lane.  The source of a kernel's module is rewritten so that a
branch on a vector runs with a mask: what it assigns changes for the lanes that take it, and instructions ask
`MASKS` who they are.  What all lanes agree on stays a scalar, and its branches are Python's.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import threading
from collections.abc import Callable
from copy import deepcopy
from types import ModuleType
from typing import Any

import numpy as np


def differs(value: Any) -> bool:
    """Return whether a value is a vector."""
    return isinstance(value, np.ndarray) and value.ndim > 0


def least(*values: Any) -> Any:
    """Return ``min(*values)``, of each lane if they differ."""
    return functools.reduce(np.minimum, values) if any(map(differs, values)) else min(*values)


class Branch:
    """What a ``with`` says of a branch: whether anybody takes it, and while it runs, who."""

    def __init__(self, masks: Masks, taken: bool, mask: Any) -> None:
        self._masks, self._taken, self._mask = masks, taken, mask

    def __enter__(self) -> Any:
        self._before, self._masks.mask = self._masks.mask, self._mask
        return self._taken

    def __exit__(self, *_: object) -> None:
        self._masks.mask = self._before


class Loop(Branch):
    """A loop, which lanes leave one by one."""

    def __enter__(self) -> Any:
        super().__enter__()
        return self._test

    def _test(self, test: Any) -> bool:
        if not differs(test):
            return bool(test)
        mask = self._masks.narrowed(test.astype(bool))
        if not mask.any():
            return False
        self._masks.mask = mask
        return True


class Masks(threading.local):
    """Which lanes of the calling thread are active: a vector, or None if all are."""

    mask: Any = None

    def active(self, lanes: int) -> Any:
        """Return the numbers of active lanes."""
        return np.arange(lanes) if self.mask is None else np.flatnonzero(self.mask)

    def narrowed(self, chosen: Any) -> Any:
        """Return the lanes that are active and chosen."""
        return chosen if self.mask is None else chosen & self.mask

    def where(self, test: Any, wanted: bool) -> Branch:
        """Return the branch of those for whom a test is as wanted."""
        if not differs(test):
            return Branch(self, bool(test) is wanted, self.mask)
        mask = self.narrowed(test.astype(bool) == wanted)
        everybody = mask.all() if self.mask is None else (mask == self.mask).all()
        return Branch(self, bool(mask.any()), self.mask if everybody else mask)

    def loop(self) -> Loop:
        """Return a loop, which restores the mask."""
        return Loop(self, True, self.mask)

    def merge(self, new: Any, old: Callable[[], Any], base: Any = None) -> Any:
        """Return what a variable becomes; a function's own variables exist for its caller's lanes only."""
        if self.mask is None or self.mask is base:
            return new
        try:
            before = old()
        except NameError:
            return new
        return np.where(self.mask, new, before)

    def returned(self, value: Any, base: Any) -> Any:
        """Return a value that all lanes return together."""
        assert self.mask is base, "some lanes return, others do not"
        return value

    @staticmethod
    def choose(test: Any, then: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
        """Return ``then if test else otherwise``."""
        if differs(test):
            return np.where(test.astype(bool), then(), otherwise())
        return then() if test else otherwise()

    @staticmethod
    def joined(all_of: bool, *parts: Callable[[], Any]) -> Any:
        """Return ``and`` (or ``or``) of the parts, of which those are asked that matter."""
        value: Any = all_of
        for part in parts:
            found = part()
            if differs(found) or differs(value):
                value = np.logical_and(value, found) if all_of else np.logical_or(value, found)
            elif bool(found) is not all_of:
                return not all_of
        return value

    @staticmethod
    def opposite(value: Any) -> Any:
        """Return ``not value``."""
        return ~value.astype(bool) if differs(value) else not value


MASKS = Masks()


class Rewriter(ast.NodeTransformer):
    """From branches of one lane to branches of many."""

    def __init__(self, left_out: str) -> None:
        self._left_out, self._numbers, self._depth = left_out, itertools.count(), 0

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | None:
        return None if node.module == self._left_out else node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        outside, self._depth = self._depth, 0
        node.decorator_list = [
            each for each in node.decorator_list if getattr(each, "id", "") != "device_function"
        ]
        node.body = [_statement("_base = _lanes.mask"), *self._block(node.body)]
        self._depth = outside
        return node

    def _block(self, body: list[ast.stmt]) -> list[ast.stmt]:
        found: list[ast.stmt] = []
        for each in body:
            made = self.visit(each)
            found += made if isinstance(made, list) else [made]
        return found

    def _inside(self, body: list[ast.stmt]) -> list[ast.stmt]:
        self._depth += 1
        found = self._block(body)
        self._depth -= 1
        return found

    def visit_If(self, node: ast.If) -> list[ast.stmt]:
        name = f"_test{next(self._numbers)}"
        found = [_assigned(ast.Name(name, ast.Store()), self.visit(node.test))]
        for wanted, body in ((True, node.body), (False, node.orelse)):
            if body:
                taken = _statement(f"with _lanes.where({name}, {wanted}) as _taken:\n if _taken:\n  pass")
                taken.body[0].body = self._inside(body)
                found.append(taken)
        return found

    def visit_While(self, node: ast.While) -> Any:
        name = f"_go{next(self._numbers)}"
        loop = _statement(f"with _lanes.loop() as {name}:\n while {name}(0):\n  pass")
        loop.body[0].test.args = [self.visit(node.test)]
        loop.body[0].body = self._inside(node.body)
        return loop

    def visit_IfExp(self, node: ast.IfExp) -> Any:
        self.generic_visit(node)
        return _call("choose", node.test, _later(node.body), _later(node.orelse))

    def visit_BoolOp(self, node: ast.BoolOp) -> Any:
        self.generic_visit(node)
        all_of = ast.Constant(isinstance(node.op, ast.And))
        return _call("joined", all_of, *(_later(each) for each in node.values))

    def visit_UnaryOp(self, node: ast.UnaryOp) -> Any:
        self.generic_visit(node)
        return _call("opposite", node.operand) if isinstance(node.op, ast.Not) else node

    def visit_Return(self, node: ast.Return) -> ast.AST:
        self.generic_visit(node)
        if self._depth and node.value is not None:
            node.value = _call("returned", node.value, ast.Name("_base", ast.Load()))
        return node

    def visit_AugAssign(self, node: ast.AugAssign) -> Any:
        changed = ast.BinOp(_read(node.target), node.op, node.value)
        return self.visit_Assign(_assigned(node.target, changed))

    def visit_Assign(self, node: ast.Assign) -> Any:
        self.generic_visit(node)
        (target,) = node.targets
        if not isinstance(target, ast.Tuple):
            node.value = self._merged(target, node.value)
            return node
        name = f"_value{next(self._numbers)}"
        found = [_assigned(ast.Name(name, ast.Store()), node.value)]
        for i, each in enumerate(target.elts):
            item = ast.Subscript(ast.Name(name, ast.Load()), ast.Constant(i), ast.Load())
            found.append(_assigned(each, self._merged(each, item)))
        return found

    def _merged(self, target: Any, value: Any) -> Any:
        if isinstance(target, ast.Subscript):  # an array may be the caller's
            return _call("merge", value, _later(_read(target)))
        if not self._depth:
            return value
        return _call("merge", value, _later(_read(target)), ast.Name("_base", ast.Load()))


def _statement(text: str) -> Any:
    return ast.parse(text).body[0]


def _assigned(target: Any, value: Any) -> Any:
    return ast.Assign([target], value)


def _read(target: Any) -> Any:
    found = deepcopy(target)
    found.ctx = ast.Load()
    return found


def _later(value: Any) -> Any:
    found = ast.parse("lambda: 0", mode="eval").body
    found.body = value  # type: ignore[attr-defined]
    return found


def _call(name: str, *arguments: Any) -> Any:
    found: Any = ast.parse(f"_lanes.{name}()", mode="eval").body
    found.args = list(arguments)
    return found


def rewritten(
    module: ModuleType,
    old: str = "",
    new: str = "",
    *,
    given: dict[str, Any] | None = None,
    left_out: str = "",
) -> ModuleType:
    """Return a module for many lanes: a part of its source exchanged, names given, an import left out."""
    source = inspect.getsource(module)
    if old and source.count(old) != 1:  # not an assertion, as what a mistake is to raise
        raise ValueError(f"{old!r} stands {source.count(old)} times in {module.__name__}")
    tree = Rewriter(left_out).visit(ast.parse(source.replace(old, new) if old else source))
    made = ModuleType(module.__name__)
    vars(made).update(given or {}, _lanes=MASKS, min=least)
    exec(compile(ast.fix_missing_locations(tree), str(module.__file__), "exec"), vars(made))
    return made
