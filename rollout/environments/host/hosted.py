"""The user's tools or environment in an episode's own process: makes it, calls it, and checks what it gives.

pickled requests ──> ask(what, ...) ──> function or method of the user's ──> a line of JSON: no class of theirs leaves
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import os
import pickle
import random
import re
import reprlib
import sys
import typing
from collections.abc import Awaitable, Callable
from socket import socket
from typing import Any

from steerl.rollout.common.errors import said, visible

MOST = 1_000_000
"""Most characters of a text that goes back."""
MOST_LINE = 16 * MOST
"""Most bytes that go back at once."""
OWN = ("reset", "get_reward")
"""Public methods of TRL's environments that are no tools."""


class Wrong(Exception):
    """What the user's code gave is nothing that an episode can go on with."""


def serve(handle: int, sources: list[str], functions: list[Callable[..., Any]], seed: int | None) -> None:
    """Answer request by request until the other end closes. `sources`: as the user named the functions."""
    seed_all(seed)
    there, process = socket(fileno=handle), os.getpid()
    requests = there.makefile("rb")
    hosted = Hosted(sources, functions)
    while True:
        try:
            what, *arguments = pickle.load(requests)
        except EOFError:
            return
        line = _answer(hosted, what, arguments)
        if os.getpid() != process:  # the user's code forked, and this is the other one
            return
        there.sendall(line + b"\n")


def _answer(hosted: Hosted, what: str, arguments: list[Any]) -> bytes:
    try:
        line = json.dumps(["gave", getattr(hosted, what)(*arguments)], allow_nan=False).encode()
        if len(line) > MOST_LINE:
            raise Wrong(f"gave {len(line):,} bytes, more than the {MOST_LINE:,} that are taken")
    except Wrong as wrong:
        line = _raised(str(wrong), str(wrong))
    except BaseException as error:  # noqa: BLE001  whatever the user's code raises, exits included, is an answer
        message = " ".join(_text(error).split()) or "no message"
        place = rf" \(line \d+ of {os.path.basename(__file__)}\)$"  # it could not be called at all
        line = _raised(re.sub(place, "", said(error)), f"{type(error).__name__}: {message:.1000}")
    return line


def seed_all(seed: int | None) -> None:
    """The generators that a fork copies: without a seed of its own each process takes one from the system."""
    number = random.SystemRandom().getrandbits(32) if seed is None else seed % 2**32
    random.seed(number)
    for module, name in (("numpy.random", "seed"), ("torch", "manual_seed")):
        if module in sys.modules:
            getattr(sys.modules[module], name)(number)


def _raised(line: str, told: str) -> bytes:
    return json.dumps(["raised", visible(" ".join(line.split())), told]).encode()


def _text(value: object) -> str:
    try:
        return str(value)
    except Exception:  # noqa: BLE001  the user's own __str__
        return f"<{type(value).__name__}>"


class Hosted:
    """One episode's tools or environment."""

    def __init__(self, sources: list[str], functions: list[Callable[..., Any]]):
        self.sources, self.functions = sources, functions
        self.tools = {getattr(function, "__name__", ""): function for function in functions}
        self.environment: Any = None
        self.kind = ""
        self.runner = asyncio.Runner()

    # -- what a job asks once -------------------------------------------------------------------------------------

    def describe_tools(self) -> tuple[list[dict[str, Any]], list[str]]:
        """The schemas, or the problems."""
        named: dict[str, Any] = {}
        problems = []
        for place, (source, function) in enumerate(zip(self.sources, self.functions, strict=True)):
            where = f"environment.tools[{place}]: {source}"
            if not inspect.isroutine(function):
                problems.append(f"{where} is a {type(function).__name__}; name a function")
            elif self.tools[function.__name__] is not function:
                problems.append(f"{where}: another tool is called {function.__name__} too; rename one")
            else:
                named[where] = function
        schemas, more = _schemas(named)
        return schemas, problems + more

    def make(self) -> str:
        """Make the environment, and say of which kind it is."""
        self.environment = self.wait(self.functions[0]())
        self.kind, problem = _kind(self.environment)
        if problem:
            raise Wrong(f"environment.factory: {self.sources[0]} {problem}")
        self.tools = _methods(self.environment) if self.kind == "trl" else {}
        return self.kind

    def describe_environment(self) -> tuple[list[dict[str, Any]], list[str]]:
        name = f"environment.factory: {type(self.environment).__name__}"
        return _schemas({f"{name}.{method}": function for method, function in self.tools.items()})

    # -- what an episode asks -------------------------------------------------------------------------------------

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        result = self.wait(self.tools[name](**arguments))
        if isinstance(result, str):
            return cut(result)
        try:
            return cut(json.dumps(result, ensure_ascii=False, default=_item))
        except (TypeError, ValueError, AttributeError):
            return cut(str(result))

    def reset(self, row: dict[str, Any]) -> Any:
        reset = self.environment.reset
        if self.kind == "trl":
            given = reset(**_named(reset, row))
        else:
            given = reset(row) if _row_taken(reset) == "row" else reset(options=row)
        given = self.wait(given)
        if isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], dict):  # gymnasium's, with its info
            given = given[0]
        return _observation(given, blocks=self.kind == "trl")

    def step(self, completion: str) -> tuple[Any, float | None, bool]:
        given = self.wait(self.environment.step(completion))
        if not isinstance(given, tuple | list) or len(given) not in (3, 5):
            raise Wrong(f"gave {_short(given)}, not (text or messages or None, reward, done)")
        observation, reward, *ends = given[:4]  # gymnasium's: terminated, truncated, and its info
        done = [_item(end) if not isinstance(end, bool) else end for end in ends if _is_flag(end)]
        if len(done) < len(ends):
            raise Wrong(f"gave {_short(ends[len(done)])} for done; expected true or false")
        return _observation(observation), _number(reward), any(done)

    def end(self) -> dict[str, Any]:
        """Its reward and its state, before it goes."""
        reward, problem = None, ""
        if hasattr(self.environment, "get_reward"):
            try:
                reward = _number(self.wait(self.environment.get_reward()))
            except BaseException as error:  # noqa: BLE001  as in _answer: the state is told all the same
                problem = f"get_reward: {error if isinstance(error, Wrong) else said(error)}"
        return {"reward": reward, "state": _state(self.environment), "failure": problem}

    def wait(self, result: Any) -> Any:
        """What it gives in the end, where the code is asynchronous."""

        async def whole(awaitable: Awaitable[Any]) -> Any:
            return await awaitable

        return self.runner.run(whole(result)) if inspect.isawaitable(result) else result


def cut(text: str) -> str:
    if len(text) > MOST:
        text = f"{text[:MOST]} [cut here: {len(text):,} characters]"
    return text.encode("utf-8", "replace").decode()  # half a surrogate pair is no text


def _schemas(named: dict[str, Callable[..., Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    if not named:
        return [], []
    from transformers.utils import chat_template_utils

    if "torch" not in sys.modules:  # then no type hint names its tensors, and importing it would take seconds
        chat_template_utils.is_torch_available = lambda: False
    schemas, problems = [], []
    for where, function in named.items():
        try:
            schemas.append(chat_template_utils.get_json_schema(function))
        except Exception as error:  # noqa: BLE001  type hints may raise anything
            problems.append(f"{where}: no schema can be made of it: {' '.join(_text(error).split())}")
    return schemas, problems


# -- of which kind an environment is ------------------------------------------------------------------------------------


def _kind(environment: Any) -> tuple[str, str]:
    """gym or trl; or what it lacks."""
    name = type(environment).__name__
    if not callable(getattr(environment, "reset", None)):
        return "", f"makes a {name}, which has no reset(); give an object with reset and step, or with reset and tools"
    methods = _methods(environment)
    if callable(step := getattr(environment, "step", None)) and not ("step" in methods and _is_tool(step)):
        taken = _row_taken(environment.reset)
        return ("gym", "") if taken else ("", f"makes a {name}, whose reset() takes no row; give it one: reset(row)")
    return ("trl", "") if methods else ("", f"makes a {name}, which has neither step() nor a method that is a tool")


def _methods(environment: Any) -> dict[str, Callable[..., Any]]:
    """The public methods, found on the class: a property is not evaluated."""
    names = [name for name, _ in inspect.getmembers(type(environment), inspect.isfunction)]
    return {name: getattr(environment, name) for name in names if name not in OWN and not name.startswith("_")}


def _is_tool(step: Callable[..., Any]) -> bool:
    """A `step` that says it returns anything but a tuple is one of TRL's tools."""
    try:
        given = typing.get_type_hints(step).get("return", tuple)
    except Exception:  # noqa: BLE001  type hints may raise anything
        return False
    origin = typing.get_origin(given) or given
    return not (origin is Any or (isinstance(origin, type) and issubclass(origin, tuple)))


def _named(function: Callable[..., Any], row: dict[str, Any]) -> dict[str, Any]:
    """Of the row's columns those that a function names; everything where it takes **kwargs."""
    taken = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        return row
    return {name: value for name, value in row.items() if name in taken}


def _row_taken(reset: Callable[..., Any]) -> str:
    """Which argument of a Gym-like reset takes the row; gymnasium's has all that is no seed in `options`, by name."""
    for name, parameter in inspect.signature(reset).parameters.items():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD, parameter.VAR_POSITIONAL):
            return "row"
        if name == "options":
            return name
    return ""


# -- what it gives ----------------------------------------------------------------------------------------------------


def _observation(given: Any, blocks: bool = False) -> Any:
    """Text, messages or None. `blocks`: TRL's may give parts of a message, which have a type instead of a role."""
    if given is None:
        return None
    if isinstance(given, str):
        return cut(given)
    if isinstance(given, list | tuple) and all(_is_message(one) or (blocks and _is_block(one)) for one in given):
        try:
            return [json.loads(json.dumps(_texts_cut(one), allow_nan=False, default=_item)) for one in given]
        except (TypeError, ValueError, AttributeError) as error:
            raise Wrong(f"gave messages that are no JSON: {_text(error)}") from error
    raise Wrong(f"gave {_short(given)}; expected a text, messages (role, content) or None")


def _is_message(given: Any) -> bool:
    is_dict = isinstance(given, dict)
    return is_dict and isinstance(given.get("role"), str) and isinstance(given.get("content"), str | list)


def _is_block(given: Any) -> bool:
    return isinstance(given, dict) and isinstance(given.get("type"), str)


def _texts_cut(message: dict[str, Any]) -> dict[str, Any]:
    return {key: cut(value) if isinstance(value, str) else value for key, value in message.items()}


def _number(given: Any) -> float | None:
    try:
        number = None if given is None else float(_item(given) if hasattr(given, "item") else given)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if isinstance(given, str | bytes) or (number is not None and not math.isfinite(number)):
        raise Wrong(f"gave {_short(given)} for its reward; expected a number")
    return number


def _is_flag(given: Any) -> bool:
    return isinstance(given, bool) or (hasattr(given, "item") and isinstance(_item(given), bool))


def _item(value: Any) -> Any:
    """The number in what numpy or torch wrap one in; an AttributeError of anything else."""
    return value.item()


def _short(value: object) -> str:
    return f"{reprlib.repr(value)} ({type(value).__name__})" if value is not None else "None"


def _state(environment: Any) -> dict[str, Any]:
    """Its public attributes that are JSON values."""
    state = {}
    for name in dir(environment):
        if name.startswith("_"):
            continue
        try:
            value = json.dumps(getattr(environment, name), allow_nan=False, default=_item)
        except Exception:  # noqa: BLE001  no JSON value, or a property of the user's that raises
            continue
        if len(value) <= MOST:
            state[name] = json.loads(value)
    return state
