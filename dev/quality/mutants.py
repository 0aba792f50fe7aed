"""Small faults in a module's source: what mutation testing puts in, one at a time.

Left alone are annotations, docstrings, decorators and what users are told, none of which computes
anything (the sentences are compared with ``docs/messages.md`` anyway), and ``zip``'s ``strict``,
which only checks.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import NamedTuple

SWAPPED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
OPPOSITES = {"min": "max", "any": "all", "amin": "amax", "cat": "stack", "append": "extend"}
OPPOSITES |= {after: before for before, after in OPPOSITES.items()}
SAID_BY = ("Omini2Error", "warn")  # what is said to users


class Place(NamedTuple):
    """Where a node hangs: a field of its parent, or an item of a field that is a list."""

    parent: ast.AST
    field: str
    index: int | None

    @contextmanager
    def holding(self, node: ast.AST | None) -> Iterator[None]:
        """Another node hangs there for a while; None takes an optional one out."""
        before = getattr(self.parent, self.field)
        if self.index is None:
            setattr(self.parent, self.field, node)
        else:
            others = [] if node is None else [node]
            now = [*before[: self.index], *others, *before[self.index + 1 :]]
            setattr(self.parent, self.field, now)
        yield
        setattr(self.parent, self.field, before)


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        lines: of the statement that it is in, so that tests that never run them needn't be asked.
        code: the whole module with the fault.
        deferred: whether the fault is in a function, which importing the module doesn't run.
    """

    path: Path
    line: int
    was: str
    now: str
    lines: range
    code: CodeType
    deferred: bool

    def __str__(self) -> str:
        return f"{self.path.name}:{self.line}: {self.was}  ->  {self.now}"


def mutants(path: Path) -> Iterator[Mutant]:
    """Every fault that this knows, in a module's order."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for place, node, lines, deferred in _places(tree, range(0), False):
        for other in _others(node, place.field):
            if other is not None:
                ast.copy_location(other, node)
                ast.fix_missing_locations(other)
            with place.holding(other):
                code = compile(tree, str(path), "exec")
            was, now = (_shown(each) for each in (node, other))
            yield Mutant(path, node.lineno, was, now, lines, code, deferred)


def _places(
    parent: ast.AST, lines: range, deferred: bool
) -> Iterator[tuple[Place, ast.AST, range, bool]]:
    for field, value in ast.iter_fields(parent):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        inside = deferred or (field == "body" and isinstance(parent, ast.FunctionDef | ast.Lambda))
        for index, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(node, ast.AST) or _computes_nothing(node, inside):
                continue
            own = _lines(node) if isinstance(node, ast.stmt) else lines
            if hasattr(node, "lineno"):
                yield Place(parent, field, index), node, own, inside
            if isinstance(node, ast.Call) and _name(node.func) in SAID_BY:
                continue
            yield from _places(node, own, inside)


def _computes_nothing(node: ast.AST, deferred: bool) -> bool:
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)  # a docstring
    if isinstance(node, ast.Assign):
        return not deferred and isinstance(node.value, ast.Subscript)  # names a type
    if isinstance(node, ast.keyword):
        return node.arg == "strict"
    return isinstance(node, ast.Import | ast.ImportFrom)


def _lines(statement: ast.stmt) -> range:
    """A statement's lines; of one with a body, those of its head."""
    body = getattr(statement, "body", None)
    end = body[0].lineno - 1 if body else statement.end_lineno
    return range(statement.lineno, max(end or 0, statement.lineno) + 1)


def _name(node: ast.AST) -> str | None:
    return getattr(node, "id", None) or getattr(node, "attr", None)


def _shown(node: ast.AST | None) -> str:
    return "nothing" if node is None else ast.unparse(node).splitlines()[0]


def _others(node: ast.AST, field: str) -> Iterator[ast.AST | None]:
    """What may stand in a node's place; None stands for nothing at all."""
    if field in ("test", "ifs") and not _has_opposite(node):
        yield ast.UnaryOp(ast.Not(), node)
    match node:
        case ast.Compare():
            for i, operator in enumerate(node.ops):
                ops: list[ast.AST] = [*node.ops]
                ops[i] = SWAPPED[type(operator)]()
                yield ast.Compare(node.left, ops, node.comparators)
        case ast.BinOp() | ast.BoolOp() | ast.AugAssign() if type(node.op) in SWAPPED:
            fields = {**dict(ast.iter_fields(node)), "op": SWAPPED[type(node.op)]()}
            yield type(node)(**fields)
        case ast.UnaryOp():
            yield node.operand
        case ast.Constant(value=bool()):
            yield ast.Constant(not node.value)
        case ast.Constant(value=int() | float()):
            yield ast.Constant(node.value + 1)
        case ast.Constant(value=str()):
            yield ast.Constant(node.value + "X")
        case ast.Return(value=ast.expr()) if ast.unparse(node.value) != "None":
            yield ast.Return(ast.Constant(None))
        case ast.Expr() | ast.Raise():
            yield ast.Pass()
        case ast.keyword():
            yield None
        case ast.Slice():
            if node.lower is not None:
                yield ast.Slice(None, node.upper, node.step)
            if node.upper is not None:
                yield ast.Slice(node.lower, None, node.step)
        case ast.Continue():
            yield ast.Break()
        case ast.Break():
            yield ast.Continue()
        case ast.Name() if field == "func" and node.id in OPPOSITES:
            yield ast.Name(OPPOSITES[node.id], node.ctx)
        case ast.Attribute() if field == "func" and node.attr in OPPOSITES:
            yield ast.Attribute(node.value, OPPOSITES[node.attr], node.ctx)


def _has_opposite(test: ast.AST) -> bool:
    """Whether swapping its operator, or leaving it out, negates it."""
    if isinstance(test, ast.UnaryOp):
        return isinstance(test.op, ast.Not)
    exact = ast.Eq | ast.NotEq | ast.Is | ast.IsNot | ast.In | ast.NotIn
    return isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], exact)
