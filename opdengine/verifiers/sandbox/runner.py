"""The process in which a program runs: forked by :mod:`.inside`, with nothing that could be worth stealing.

Sent into the sandbox as text; the standard library alone. Whatever is said here may be forged by the program:
it shares this process. That is why only values leave it, and they are judged elsewhere.
"""

from __future__ import annotations

import atexit
import builtins
import json
import os
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterator
from typing import Any

ERROR_CHARACTERS = 500


def run(plain: types.ModuleType, request: dict[str, Any], questions: int, answers: int) -> None:
    """Do what is asked and end the process.

    Args:
        plain: the module :mod:`.plain`.
        request: ``mode`` ("program", "functions" or "test"), ``code``, and what belongs to the mode.
        questions, answers: file descriptors of lines of JSON, for functions and tests.
    """
    sys.argv = ["solution.py"]
    vars(builtins).update(exit=sys.exit, quit=sys.exit)  # which the module site adds, and this interpreter runs without
    if request["mode"] == "program":
        _program(request["code"])
    channel = _Channel(plain, questions, answers)
    try:
        if request["mode"] == "functions":
            _functions(channel, request["code"])
        else:
            _test(channel, request["setup"], request["code"], request["names"])
    except BaseException as error:
        channel.say({"raised": _describe(error)})
    os._exit(0)


def _program(code: str) -> None:
    """Run it as a script on standard input and output."""
    status = 0
    try:
        exec(compile(code, "solution.py", "exec"), _module("__main__").__dict__)
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        status = 1
    os._exit(status & 0xFF)


def _functions(channel: _Channel, code: str) -> None:
    """Define what the code defines, then answer ``{"call": [name, args, kwargs]}``."""
    module = _module("solution")
    exec(compile(code, "solution.py", "exec"), module.__dict__)
    channel.say({"ready": True})
    for request in channel.questions():
        name, args, kwargs = request["call"]
        try:
            value = _find(module, name)(*args, **kwargs)
            answer = {"value": channel.plain.encode(value)}
        except BaseException as error:
            answer = {"raised": _describe(error)}
        channel.say(answer)


def _find(module: types.ModuleType, name: str) -> Callable[..., Any]:
    """A function of the module, else a method of its class ``Solution``."""
    if hasattr(module, name) or not hasattr(module, "Solution"):
        return getattr(module, name)  # type: ignore[no-any-return]
    return getattr(module.Solution(), name)  # type: ignore[no-any-return]


def _test(channel: _Channel, setup: str, code: str, names: list[str]) -> None:
    """Run a test whose functions of these names live in another sandbox; every call is a question."""
    module = _module("test")
    exec(compile(setup, "setup.py", "exec"), module.__dict__)
    for name in names:
        setattr(module, name, _Remote(channel, name))
    exec(compile(code, "test.py", "exec"), module.__dict__)
    channel.say({"passed": True})


class _Remote:
    """Stands for a function in another sandbox."""

    def __init__(self, channel: _Channel, name: str) -> None:
        self._channel, self.__name__ = channel, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        plain = self._channel.plain
        self._channel.say({"call": [self.__name__, [plain.encode(a) for a in args], plain.encode(kwargs)["dict"]]})
        answer = next(self._channel.questions())
        if "raised" in answer:
            raise _exception(*map(str, answer["raised"]))
        return answer["value"]


def _exception(name: str, text: str) -> Exception:
    """What a function in another sandbox raised, here.

    Never the end of an iteration: a test that goes over ``map(function, ...)`` would end there, and pass.
    """
    kind = getattr(builtins, name, None)
    ends_iterations = kind in (StopIteration, StopAsyncIteration)
    if isinstance(kind, type) and issubclass(kind, Exception) and not ends_iterations:
        return kind(text)
    return RuntimeError(f"{name}: {text}")


class _Channel:
    """Lines of JSON over two descriptors."""

    def __init__(self, plain: types.ModuleType, questions: int, answers: int) -> None:
        self.plain = plain
        self._questions = os.fdopen(questions, "rb")
        self._answers = answers

    def questions(self) -> Iterator[dict[str, Any]]:
        """What is asked, decoded."""
        for line in self._questions:
            request = json.loads(line)
            if "call" in request:
                name, args, kwargs = request["call"]
                decode = self.plain.decode
                request["call"] = name, [decode(a) for a in args], {k: decode(v) for k, v in kwargs}
            elif "value" in request:
                request["value"] = self.plain.decode(request["value"])
            yield request
        os._exit(0)

    def say(self, answer: dict[str, Any]) -> None:
        """Write one line."""
        data = json.dumps(answer).encode() + b"\n"
        while data:
            data = data[os.write(self._answers, data) :]


def _module(name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    sys.modules[name] = module
    return module


def _describe(error: BaseException) -> list[str]:
    return [type(error).__name__, str(error)[:ERROR_CHARACTERS]]
