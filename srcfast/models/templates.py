"""Render chat templates as transformers does, within bounds of time and memory: a checkpoint's template is foreign code."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, wraps
from types import GeneratorType
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer
from transformers.utils.chat_template_utils import _compile_jinja_template

MOST_CHARACTERS = 1 << 20  # of a template
MOST_VALUES = 1 << 24  # characters and elements of all values that a rendering makes, in a hundred megabytes at most
SECONDS = 2.0  # of the thread's time on a processor, checked in each pass of a loop and each call
# Of texts, lists and mappings, the methods whose results are no longer than they and their arguments together.
_BOTH = "capitalize count items join lower replace title upper "
METHODS = frozenset(
    f"{_BOTH} append copy endswith find get index isalnum isalpha isdecimal isdigit islower isnumeric isspace istitle isupper"
    " keys lstrip partition pop removeprefix removesuffix rfind rindex rpartition rsplit rstrip split splitlines startswith strip"
    " swapcase values".split()
)
FILTERS = frozenset(  # of which the same holds
    f"{_BOTH} abs attr d default dictsort e escape first float groupby int last length list map max min reject rejectattr reverse"
    " round safe select selectattr sort string tojson trim truncate unique".split()
)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """jinja's sandbox, which counts what a template makes before it makes it."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, like: Any) -> None:
        """Take transformers' environment's functions, filters and extensions."""
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[type(extension) for extension in like.extensions.values()]
        )
        self.begin()
        self.globals = {name: value for name, value in like.globals.items() if name != "lipsum"}
        self.filters = {name: self._counted(name, f) for name, f in like.filters.items() if name in FILTERS}
        self.finalize = lambda value: (self.count(value), value)[1]  # type: ignore[func-returns-value]

    def begin(self) -> None:
        """Start to count a rendering."""
        self.left, self.end = MOST_VALUES, time.thread_time() + SECONDS

    def count(self, *values: Any, times: int = 1) -> None:
        """Count the characters and elements of values, at any depth. Raises SecurityError beyond the bounds."""
        pending = list(values)
        while pending and self.left >= 0:
            value = pending.pop()
            self.left -= times * (1 + (len(value) if isinstance(value, str | list | tuple | dict) else 0))
            parts = [*value, *value.values()] if isinstance(value, dict) else value
            pending += parts if isinstance(parts, list | tuple) else []
        if self.left < 0 or time.thread_time() > self.end:
            raise SecurityError(f"more than {MOST_VALUES:,} characters, or {SECONDS:g} seconds")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        is_number = [isinstance(value, int | float) for value in (left, right)]
        if operator == "*" and is_number[0] != is_number[1]:
            self.count(right if is_number[0] else left, times=int(left if is_number[0] else right))
        elif operator == "+" and not any(is_number):
            self.count(left, right)
        elif not all(is_number) or operator == "**" and abs(right) > 64:
            raise SecurityError(f"an operation {operator} other than of numbers")
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int) and result.bit_length() > 64:
            raise SecurityError("a number of more than 64 bits")
        return result

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(owner, str | bytes | int | float | list | tuple | dict) and name not in METHODS:
            raise SecurityError(f"a call of {name}")
        self._count_widened(name, (owner, *args) if name == "replace" else (*args, owner))
        self.count(*args, *kwargs.values())
        result = super().call(context, function, *args, **kwargs)
        self.count(result)
        return result

    def wrap_str_format(self, value: Any) -> None:
        if getattr(value, "__name__", "") in ("format", "format_map"):  # a format's width may be any
            raise SecurityError("a call of format")

    def getitem(self, obj: Any, argument: Any) -> Any:
        result = super().getitem(obj, argument)
        if isinstance(argument, slice):
            self.count(result)
        return result

    def _count_widened(self, name: str, args: Sequence[Any]) -> None:
        """Count what a text's replacements (text, old, new), or the text between a list's elements, add."""
        if name == "replace" and len(args) > 2:
            self.count(str(args[2]), times=str(args[0]).count(str(args[1])))
        elif name == "join" and len(args) > 1 and hasattr(args[0], "__len__"):
            self.count(str(args[1]), times=len(args[0]))

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a filter that counts its arguments and its result."""

        @wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            args = tuple(list(value) if isinstance(value, GeneratorType) else value for value in args)
            given = [*args, *kwargs.values()]
            self.count(*given)
            if name == "tojson" and any(isinstance(value, int) and value > 8 for value in given):
                raise SecurityError("an indent of more than 8")
            self._count_widened(name, given[1:] if hasattr(function, "jinja_pass_arg") else given)
            result = function(*args, **kwargs)
            self.count(result)
            return result

        return counted

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Parse a template, with a call of `count` in each loop and macro, and the filter `join` for each `~`."""
        tree: nodes.Template = _FilterForConcat().visit(super()._parse(source, name, filename))
        for node in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
            written = nodes.Const("".join(data.data for data in node.find_all(nodes.TemplateData)))
            counted = nodes.Call(nodes.EnvironmentAttribute("count"), [written], [], None, None)
            node.body.insert(0, nodes.ExprStmt(counted, lineno=node.lineno))  # type: ignore[attr-defined]
        return tree.set_environment(self)  # type: ignore[return-value]


class _FilterForConcat(NodeTransformer):
    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return nodes.Filter(nodes.List(node.nodes), "join", [], [], None, None).set_lineno(node.lineno)


@lru_cache(maxsize=16)
def _compiled(template: str) -> tuple[BoundedEnvironment, Template]:
    if len(template) > MOST_CHARACTERS:
        raise SecurityError(f"a template of more than {MOST_CHARACTERS:,} characters")
    environment = BoundedEnvironment(_compile_jinja_template("").environment)
    return environment, environment.from_string(template)


def render(template: str, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
    """Render messages as transformers' `apply_chat_template` does.

    Raises:
        Exception: of jinja's classes or Python's, where the template fails or exceeds the bounds.
    """
    environment, compiled = _compiled(template)
    environment.begin()
    return compiled.render(messages=messages, tools=None, documents=None, **variables)
