"""Commands of settings are declarations: each calls the function of its name, which has to take what is declared."""

from __future__ import annotations

import ast
from importlib import import_module
from inspect import signature
from pathlib import Path

import pytest

from srcfast.cli import app


def declared() -> dict[str, tuple[str, list[str]]]:
    """Return by command the module of its function and its parameters, as `app` spells them."""
    found = {}
    for node in ast.parse(Path(app.__file__).read_text(encoding="utf-8")).body:
        for call in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "settings_command":
                found[node.name] = (ast.literal_eval(call.args[0]), [argument.arg for argument in node.args.args])
    return found


def test_there_are_declarations() -> None:
    assert {"calibrate", "dpo", "evaluate", "logprob", "estimate", "merge"} <= declared().keys()


@pytest.mark.parametrize("name", declared())
def test_a_command_s_function_takes_what_is_declared(name: str) -> None:
    module, parameters = declared()[name]
    assert sorted(signature(getattr(import_module(f"srcfast.cli.{module}"), name)).parameters) == sorted(parameters)
