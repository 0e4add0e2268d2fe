"""`cuda_backend.ptx.wgmma` and `wgmma_halves` on a machine: their own source runs, and so does the PTX in it.

Accumulators hold garbage from the first product that is issued until a wait that names them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from cuda_backend.ptx import wgmma, wgmma_halves
from cuda_backend.ptx.assembly import types
from tests.cuda.divergence import rewritten
from tests.cuda.happens_before import Clocked, Watch, cells_of
from tests.cuda.hopper_machine import KINDS, fragment, one, operand, operand_bytes

GARBAGE = 0x5EADBEEF
ASSEMBLY = "cuda_backend.ptx.assembly"
DESCRIPTOR = re.compile(r".*shr\.b32 a, \$1, 4;.* or\.b64 \$0, \$0, (0x[0-9a-f]+);")
PRODUCT = re.compile(
    r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(16|32)\.(s32|f32)\.(s8|f16|bf16)\.\4 "
    r"\{(.*)\}, (\S+), (\S+), (.*)"
)


@functools.lru_cache(256)
def operand_cells(descriptor: int, rows: int) -> Any:
    """Return the cells of an operand."""
    return cells_of(operand_bytes(descriptor, rows, False))


class Sums:
    """Accumulators to which products add."""

    def __init__(self, array: Any) -> None:
        self.array, self.value, self.running = array, array.copy(), 0
        array[...] = GARBAGE

    def untouched(self) -> None:
        assert np.all(self.array == GARBAGE), "accumulators have been written while products run"


class Issued:
    """A product: what it adds is known when it is issued, or when it is waited for."""

    def __init__(self, machine: Clocked, sums: Sums, n: int, kind: str, descriptors: tuple[int, int]) -> None:
        self.sums, self._kind, self._block = sums, kind, machine.block
        self._descriptors, self._rows = descriptors, (64, n)
        watch: Watch = machine.block.watch
        self.cells = [operand_cells(each, rows) for each, rows in zip(descriptors, self._rows, strict=True)]
        for cells in self.cells:
            watch.read(cells, under_way=True)
        self._operands = None if machine.late else self._read()

    def _read(self) -> Any:
        kind = np.dtype(np.int8) if self._kind == "s8" else KINDS[self._kind]
        return [
            operand(self._block, each, rows, False, kind).astype(np.float64)
            for each, rows in zip(self._descriptors, self._rows, strict=True)
        ]

    def finish(self) -> None:
        """Add to the sums; those of floats are rounded once."""
        a, b = self._operands or self._read()
        added = (a @ b.T)[fragment(self._rows[1])]
        value = self.sums.value
        if self._kind == "s8":
            value += added.astype(np.int32)
        else:
            value[...] = (value.view(np.float32) + added).astype(np.float32).view(np.int32)
        self.sums.running -= 1


def run(machine: Clocked, text: str, pointers: list[Any], others: list[Any], first: int) -> None:
    """Run lines of PTX whose operands are registers of accumulators, and from ``$first`` on, `others`."""
    own, fenced = machine.own, False
    held: dict[int, Sums] = vars(own).setdefault("held", {})
    values: dict[str, int] = {}

    def value(name: str) -> int:
        return values[name] if name in values else one(others[int(name[1:]) - first])

    def accumulators(listed: str) -> Any:
        found = [pointers[int(each[1:])] for each in listed.split(", ")]
        array = found[0][0]
        assert [(id(a), i) for a, i in found] == [(id(array), i) for i in range(len(array))]
        return array

    for line in (each.strip(" \n{}") for each in text.split(";")):
        product, word = PRODUCT.match(line), line.split(" ")[0]
        if product:
            assert fenced, "a product without a fence"
            n, depth, _, kind, listed, a, b, rest = product.groups()
            assert rest == ("add" if kind == "s8" else "1, 1, 1, 0, 0")
            assert depth == ("32" if kind == "s8" else "16")
            array = accumulators(listed)
            assert array.shape == (int(n) // 2, 128)
            if id(array) not in held:
                held[id(array)] = Sums(array)
            sums = held[id(array)]
            sums.untouched()
            sums.running += 1
            own.open.append(Issued(machine, sums, int(n), kind, (value(a), value(b))))
        elif word == "wgmma.fence.sync.aligned":
            fenced = True
        elif word == "wgmma.commit_group.sync.aligned":
            own.groups.append(own.open)
            own.open = []
        elif word == "wgmma.wait_group.sync.aligned":
            wait(machine, int(line.split(" ")[1]))
            for array in {id(a): a for a, _ in pointers}.values():
                if id(array) in held:
                    sums = held.pop(id(array))
                    sums.untouched()
                    assert not sums.running, "accumulators are read while products run"
                    array[...] = sums.value
        elif word == "add.s64":
            target, source, offset = line.removeprefix("add.s64 ").split(", ")
            values[target] = value(source) + int(offset)
        else:
            assert word in ("", ".reg", "setp.eq.b32"), f"{line!r} is not played"


def wait(machine: Clocked, pending: int) -> None:
    """Finish all groups of products but the last so many."""
    groups, ended = machine.own.groups, []
    while len(groups) > pending:
        for product in groups.pop(0):
            product.finish()
            ended += product.cells
    still = [cells for group in [*groups, machine.own.open] for product in group for cells in product.cells]
    machine.block.watch.end_reads(ended, still)


def products(machine: Clocked, mutant: Mapping[str, tuple[str, str]]) -> dict[str, ModuleType]:
    """Return `wgmma` and `wgmma_halves`, with a part of their source exchanged."""

    def declare(_name: str, _parameters: Any, _doc: str, lower: Any) -> Any:
        def called(*values: Any) -> None:
            signature, codegen = lower(*[types.int32] * len(values))
            codegen(context, builder, signature, values)

        return called

    def instruction(_name: str, _result: Any, _arguments: Any, text: str, *_: Any, **__: Any) -> Any:
        described = DESCRIPTOR.match(text)
        if described:
            return lambda address: np.uint64(int(described[1], 16) | int(address) >> 4)
        return lambda: run(machine, text, [], [], 0)

    def element_pointers(_context: Any, _builder: Any, _kind: Any, array: Any, count: int) -> list[Any]:
        assert len(array) == count
        return [(array, i) for i in range(count)]

    def passed_at(
        _builder: Any, _kind: Any, pointers: Any, text: str, others: Any = (), _constraints: Any = ()
    ) -> None:
        run(machine, text, pointers, list(others), 2 * len(pointers))

    def passed(_context: Any, _builder: Any, kind: Any, array: Any, count: int, *rest: Any) -> None:
        passed_at(None, kind, element_pointers(None, None, kind, array, count), *rest)

    context = SimpleNamespace(get_dummy_value=lambda: None)
    builder = SimpleNamespace(load=lambda pointer: pointer[0][pointer[1]])
    given = {
        "types": types, "declare": declare, "instruction": instruction, "passed": passed,
        "passed_at": passed_at, "element_pointers": element_pointers, "Intrinsic": Any, "Lowering": Any,
    }  # fmt: skip
    return {
        name: rewritten(module, *mutant.get(name, ("", "")), given=given, left_out=ASSEMBLY)
        for name, module in (("wgmma", wgmma), ("wgmma_halves", wgmma_halves))
    }
