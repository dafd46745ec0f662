"""Kernels with a bug planted in their source."""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator

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

    Also for those of the device functions that a factory gave it, such as the loop of a product.
    """
    for name, value in inspect.getclosurevars(function).nonlocals.items():
        for what, changed in without_ordering(value.py_func) if hasattr(value, "py_func") else ():
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
            where = f"{value.py_func.__module__.rpartition('.')[2]}.{value.py_func.__name__}"
            yield f"{what} in {where}", _function(tree, function, {name: device(changed)})
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    lines = [node.lineno for node in ast.walk(tree) if _is_ordering(node)]
    first = function.__code__.co_firstlineno
    for line in sorted(lines):
        copy = _Drop(line).visit(ast.parse(textwrap.dedent(inspect.getsource(function))))
        what = ast.unparse(next(n for n in ast.walk(tree) if _is_ordering(n) and n.lineno == line))
        yield f"{what} of line {first + line - 1}", _function(ast.fix_missing_locations(copy), function)


def _is_ordering(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and ast.unparse(node.value.func) in ORDERING


class _Drop(ast.NodeTransformer):
    def __init__(self, line: int):
        self.line = line

    def visit_Expr(self, node):
        return ast.Pass(lineno=node.lineno, col_offset=0) if _is_ordering(node) and node.lineno == self.line else node


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
