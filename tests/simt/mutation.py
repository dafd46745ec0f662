"""Kernels with a bug planted in their source."""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import TypeGuard

from tilewise.kernels.cuda.launch import device

# What orders threads, or a thread and its copies: without any one of these a kernel is wrong.
ORDERING = ("cuda.syncthreads", "cuda.syncwarp", "wait_copies", "ptx.wait_copies", "commit_copies", "ptx.commit_copies")


def mutated(function: Callable, old: str, new: str) -> Callable:
    """The function with the one place where its source says `old` saying `new`."""
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{function.__name__} has {old!r} {source.count(old)} times"
    return _function(ast.parse(source.replace(old, new)), function)


def without_ordering(function: Callable) -> Iterator[tuple[str, Callable]]:
    """(what is missing, the function without it) for every barrier, wait and commit in the source.

    Also for those of the device functions that a factory gave it, such as the loop of a product. Where such a function
    does nothing else, each of its calls is one.
    """
    given = {k: v.py_func for k, v in inspect.getclosurevars(function).nonlocals.items() if hasattr(v, "py_func")}
    names = (*ORDERING, *(name for name, inner in given.items() if _only_orders(inner)))
    for name, inner in given.items():
        for what, changed in () if name in names else without_ordering(inner):
            where = f"{inner.__module__.rpartition('.')[2]}.{inner.__name__}"
            yield f"{what} in {where}", _function(_tree(function), function, {name: device(changed)})
    first = function.__code__.co_firstlineno
    for node in sorted(_ordering(_tree(function), names), key=lambda n: n.lineno):
        copy = _Drop(node.lineno, names).visit(_tree(function))
        what = f"{ast.unparse(node)} of line {first + node.lineno - 1}"
        yield what, _function(ast.fix_missing_locations(copy), function)


def _tree(function: Callable) -> ast.Module:
    return ast.parse(textwrap.dedent(inspect.getsource(function)))


def _is_ordering(node: ast.AST, names: tuple[str, ...]) -> TypeGuard[ast.Expr]:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and ast.unparse(node.value.func) in names


def _ordering(tree: ast.AST, names: tuple[str, ...]) -> list[ast.Expr]:
    return [node for node in ast.walk(tree) if _is_ordering(node, names)]


def _only_orders(function: Callable) -> bool:
    definition = _tree(function).body[0]
    assert isinstance(definition, ast.FunctionDef)
    return all(_is_ordering(statement, ORDERING) for statement in definition.body)


class _Drop(ast.NodeTransformer):
    def __init__(self, line: int, names: tuple[str, ...]):
        self.line, self.names = line, names

    def visit_Expr(self, node):
        dropped = node.lineno == self.line and _is_ordering(node, self.names)
        return ast.Pass(lineno=node.lineno, col_offset=0) if dropped else node


def _function(tree: ast.Module, original: Callable, instead: dict | None = None) -> Callable:
    """The tree's function, with what the original sees: its module and its closure, of which some is replaced.

    Annotations are the caller's.
    """
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list = []
    for argument in definition.args.args:
        argument.annotation = None
    definition.returns = None
    closure = inspect.getclosurevars(original)
    names = {**original.__globals__, **closure.nonlocals, **(instead or {})}
    exec(compile(tree, f"<{original.__name__}, mutated>", "exec"), names)  # the kernels' own source
    return names[original.__name__]
