"""From the name of a reward to the function that computes it, with all that can be wrong with it
found before training."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, get_args, get_origin, get_type_hints

from recap_fast.config import RewardSpec
from recap_fast.rewards.functions import BUILTIN
from recap_fast.types import UserError

RewardFunction = Callable[..., Any]


class RewardError(UserError):
    """A reward that cannot be used, or that failed too often."""


def resolve(spec: RewardSpec | str) -> tuple[RewardFunction, dict[str, Any]]:
    """The function and the parameters that an entry of a source's `rewards` stands for.

    A "module:function" is looked for where Python looks for modules and in the current folder.

    Raises:
        RewardError: no built-in of that name, a module that cannot be imported, a name that is not
            in it, cannot be called, is async or a generator, or does not take the parameters.
    """
    if isinstance(spec, str):
        spec = RewardSpec(function=spec)
    name = spec.function
    if ":" in name:
        function = _import_function(name)
    elif name in BUILTIN:
        function = BUILTIN[name]
    else:
        close = difflib.get_close_matches(name, BUILTIN, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"built in are {', '.join(BUILTIN)};"
        raise RewardError(f"no reward {name!r}; {hint} your own are written module:function")
    _check_parameters(function, name, spec.parameters)
    if name in BUILTIN:
        _check_words(function, name, spec.parameters)
    return function, spec.parameters


def _import_function(name: str) -> RewardFunction:
    module_name, _, attribute = name.partition(":")
    try:
        module = _import_module(module_name)
    except Exception as error:  # a user's module may raise anything while it is imported
        raise RewardError(
            f"reward {name!r}: module {module_name!r} cannot be imported: {describe(error)}"
        ) from error
    if not hasattr(module, attribute):
        public = [key for key in vars(module) if not key.startswith("_")]
        close = difflib.get_close_matches(attribute, public, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise RewardError(f"reward {name!r}: {module_name} has no {attribute!r}{hint}")
    function: RewardFunction = getattr(module, attribute)
    if not callable(function):
        raise RewardError(f"reward {name!r} is {type(function).__name__}, which cannot be called")
    if what := _returns_later(function):
        raise RewardError(
            f"reward {name!r} is {what}, which returns no number when called: write a plain "
            f"function (asyncio.run(...) inside of it runs what is async)"
        )
    return function


def _returns_later(function: RewardFunction) -> str | None:
    """What a function is that only begins to work when something else is done with its result."""
    while isinstance(function, partial):
        function = function.func
    for called in (function, type(function).__call__):
        if inspect.iscoroutinefunction(called) or inspect.isasyncgenfunction(called):
            return "async"
        if inspect.isgeneratorfunction(called):
            return "a generator"
    return None


def _import_module(name: str) -> Any:
    if not name:
        raise ImportError("the name is empty")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A console script does not have the current folder on its path, `python -m` has.
        if error.name != name.partition(".")[0] or os.getcwd() in sys.path:
            raise
        sys.path.append(os.getcwd())
        importlib.invalidate_caches()
        return importlib.import_module(name)


def _check_parameters(function: RewardFunction, name: str, parameters: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # a function written in C that does not say what it takes
        return
    try:
        signature.bind(None, **parameters)
    except TypeError as error:
        takes = ", ".join(list(signature.parameters)[1:]) or "none"
        raise RewardError(
            f"reward {name!r} cannot be called with a sample and the parameters "
            f"{dict(parameters)}: {error}; its parameters are: {takes}"
        ) from None


def _check_words(function: RewardFunction, name: str, parameters: Mapping[str, Any]) -> None:
    """Raises `RewardError` for a word that a built-in function does not know. Others' annotations
    cannot be relied on."""
    for key, hint in get_type_hints(function).items():
        words = get_args(hint) if get_origin(hint) is Literal else None
        if words is not None and key in parameters and parameters[key] not in words:
            raise RewardError(
                f"reward {name!r}: parameter {key} is one of {', '.join(words)}; got "
                f"{parameters[key]!r}"
            )


def describe(error: BaseException) -> str:
    """Type, text and place of an error, on one line."""
    text = " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text[:300]}{place}"
