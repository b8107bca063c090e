"""Runs an untrusted expression over a list `xs` within fixed bounds.

A whitelist of syntax, walked by our own interpreter: no names but `xs`, `x` and six functions, no
attributes, no strings, no `eval`. Text length, work, list length and value magnitude are bounded,
so a hostile answer costs at most some tens of milliseconds.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable

MAX_CHARS = 512
MAX_WORK = 20_000
MAX_ITEMS = 256
MAX_MAGNITUDE = 10**9

Value = int | bool | list[int]

_ALLOWED_TEXT = re.compile(r"[a-z0-9\[\]():,+\-*%<>=! ]+")
# A number that runs into a letter ("1if") makes Python's tokenizer warn; no valid program has one.
_NUMBER_INTO_NAME = re.compile(r"\d[a-z]")
_BINARY: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Mod: operator.mod,
}
_COMPARE: dict[type, Callable[[int, int], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_CALLS: dict[str, Callable[[list[int]], Value]] = {
    "sum": sum,
    "max": max,
    "min": min,
    "len": len,
    "sorted": sorted,
    "list": list,
}


class EvalError(ValueError):
    """The expression is not of the language, goes over a bound, or has no value."""


def evaluate(text: str, xs: tuple[int, ...]) -> Value:
    """The value of the expression `text` with `xs` bound to a list of those items.

    Raises EvalError for anything that is not a small valid expression; raises nothing else.
    """
    return _Interpreter(xs).run(parse(text))


def parse(text: str) -> ast.expr:
    """The syntax tree of one expression; raises EvalError where the text is none."""
    if len(text) > MAX_CHARS or not _ALLOWED_TEXT.fullmatch(text) or _NUMBER_INTO_NAME.search(text):
        raise EvalError("text is too long or has characters outside the language")
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise EvalError("not an expression") from error


class _Interpreter:
    """Walks one tree once; `work` counts visited nodes and touched items."""

    def __init__(self, xs: tuple[int, ...]) -> None:
        self._names: dict[str, Value] = {"xs": list(xs)}
        self._work = 0

    def run(self, node: ast.expr) -> Value:
        try:
            return self._bounded(self._eval(node))
        except (RecursionError, ZeroDivisionError, TypeError, ValueError) as error:
            raise EvalError(str(error)) from error

    def _spend(self, amount: int) -> None:
        self._work += amount
        if self._work > MAX_WORK:
            raise EvalError("too much work")

    def _bounded(self, value: Value) -> Value:
        if isinstance(value, list):
            self._spend(len(value))
            if len(value) > MAX_ITEMS:
                raise EvalError("list too long")
        elif abs(value) > MAX_MAGNITUDE:
            raise EvalError("value too large")
        return value

    def _eval(self, node: ast.expr | None) -> Value:
        self._spend(1)
        match node:
            case ast.Constant(value=int() as value) if not isinstance(value, bool):
                return self._bounded(value)
            case ast.Name(id=name) if name in self._names:
                return self._names[name]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                return self._bounded(_BINARY[type(op)](self._int(left), self._int(right)))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self._int(operand)
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARE:
                return _COMPARE[type(op)](self._int(left), self._int(right))
            case ast.Call(func=ast.Name(id=name), args=[arg], keywords=[]) if name in _CALLS:
                return self._bounded(_CALLS[name](self._list(arg)))
            case ast.Subscript(value=base, slice=ast.Slice() as cut):
                return self._list(base)[self._slice(cut)]
            case ast.Subscript(value=base, slice=index):
                return self._item(self._list(base), self._int(index))
            case ast.ListComp(elt=elt, generators=[loop]):
                return self._comprehension(elt, loop)
        raise EvalError(f"{type(node).__name__} is outside the language")

    def _int(self, node: ast.expr) -> int:
        value = self._eval(node)
        if isinstance(value, bool) or not isinstance(value, int):
            raise EvalError("an integer is needed")
        return value

    def _list(self, node: ast.expr) -> list[int]:
        value = self._eval(node)
        if not isinstance(value, list):
            raise EvalError("a list is needed")
        self._spend(len(value))
        return value

    def _item(self, values: list[int], index: int) -> int:
        if not -len(values) <= index < len(values):
            raise EvalError("index out of range")
        return values[index]

    def _slice(self, cut: ast.Slice) -> slice:
        ends = (cut.lower, cut.upper, cut.step)
        return slice(*(None if end is None else self._int(end) for end in ends))

    def _comprehension(self, elt: ast.expr, loop: ast.comprehension) -> list[int]:
        if not isinstance(loop.target, ast.Name) or loop.target.id != "x" or loop.is_async:
            raise EvalError("only `for x in` is in the language")
        items = self._list(loop.iter)
        outer = self._names.get("x")
        kept: list[int] = []
        for item in items:
            self._names["x"] = item
            if all(self._truth(test) for test in loop.ifs):
                kept.append(self._int(elt))
        if outer is None:
            self._names.pop("x", None)
        else:
            self._names["x"] = outer
        return kept

    def _truth(self, node: ast.expr) -> bool:
        value = self._eval(node)
        if not isinstance(value, bool):
            raise EvalError("a condition is needed")
        return value
