"""The two programs of an assertion test: one holds the solution and serves calls to it, the other holds the tests and makes them.

Each runs in a sandbox of its own, as `python remote.py serve|check DESCRIPTOR FILE`, and imports nothing but the standard library.
They share one socket. What crosses it are frames of JSON, from which the tests' side builds new values of built-in types and nothing
else: no pickles, no code, no class of the solution. Whatever the solution does to its own interpreter, it does not reach the tests'.

Plain values (None, bool, int, float, complex, str, bytes, range and lists, tuples, sets, dicts of them) cross as copies, those of a
subclass as the built-in type. Any other value of the solution is a `Remote` in the tests: it can be called, iterated, indexed, measured
by len and printed, and its attributes read, all of which the solution answers with plain values or more of its kind. It equals nothing
but itself, has no truth value and no arithmetic, so it cannot pass for the value that a test expects. Functions of the tests
cross as functions that call back. Nothing else crosses.
"""

import ast
import builtins
import importlib
import itertools
import json
import os
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

FRAME_BYTES = 2**26
DETAIL_CHARACTERS = 800
EXACT_INTEGER = 2**53
# The first two, raised inside a test, would end its loops early; the others are made from more than a message.
NOT_FOR_THE_TESTS = (StopIteration, StopAsyncIteration, UnicodeError, BaseExceptionGroup)

Encode = Callable[[Any], Any]
Decode = Callable[[dict[str, Any]], Any]


class SolutionGone(BaseException):
    """The solution ended or broke the rules of the wire. No test can catch it as an Exception."""


class SolutionError(Exception):
    """What the solution raised, where that is no built-in exception."""


def to_wire(value: Any, other: Encode) -> Any:
    """`value` as JSON; `other` makes the dict that stands for a value that is not plain."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if abs(value) <= EXACT_INTEGER else {"int": hex(value)}
    if isinstance(value, float | str):
        return float(value) if isinstance(value, float) else str.__str__(value)
    if isinstance(value, list):
        return [to_wire(item, other) for item in list.__iter__(value)]
    if isinstance(value, tuple | set | frozenset):
        name = next(kind.__name__ for kind in (tuple, set, frozenset) if isinstance(value, kind))
        return {name: [to_wire(item, other) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[to_wire(key, other), to_wire(item, other)] for key, item in dict.items(value)]}
    if isinstance(value, bytes | bytearray):
        return {type(value).__name__ if type(value) in (bytes, bytearray) else "bytes": value.decode("latin-1")}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, range):
        return {"range": [to_wire(part, other) for part in (value.start, value.stop, value.step)]}
    return other(value)


def from_wire(message: Any, other: Decode) -> Any:
    """The value that `to_wire` made `message` from; ValueError or TypeError if it did not."""
    if isinstance(message, list):
        return [from_wire(item, other) for item in message]
    if not isinstance(message, dict):
        return message
    if len(message) != 1:
        raise ValueError("a value on the wire has one tag")
    ((tag, content),) = message.items()
    if tag in ("tuple", "set", "frozenset") and isinstance(content, list):
        return {"tuple": tuple, "set": set, "frozenset": frozenset}[tag](from_wire(item, other) for item in content)
    if tag == "dict" and isinstance(content, list):
        return {from_wire(key, other): from_wire(item, other) for key, item in content}
    if tag == "int" and isinstance(content, str):
        return int(content, 16)
    if tag in ("bytes", "bytearray") and isinstance(content, str):
        return {"bytes": bytes, "bytearray": bytearray}[tag](content.encode("latin-1"))
    if tag == "complex" and isinstance(content, list):
        return complex(*map(float, content))
    if tag == "range" and isinstance(content, list):
        return range(*(from_wire(part, other) for part in content))
    return other(message)


class Wire:
    """Frames of JSON over a socket, each behind its length in four bytes."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.broken = False

    def send(self, message: Any) -> None:
        content = json.dumps(message).encode("ascii")
        if len(content) > FRAME_BYTES:
            raise ValueError(f"a value of more than {FRAME_BYTES} bytes does not cross between solution and tests")
        try:
            self.connection.sendall(struct.pack("!I", len(content)) + content)
        except OSError as error:
            raise self.broke("the solution ended before its tests did") from error

    def receive(self) -> Any:
        """The next message; SolutionGone at the end of the stream, or if it is no frame of ours."""
        (size,) = struct.unpack("!I", self._exactly(4))
        if size > FRAME_BYTES:
            raise self.broke()
        try:
            return json.loads(self._exactly(size))
        except (ValueError, RecursionError) as error:
            raise self.broke() from error

    def broke(self, words: str = "the solution broke into its wire") -> SolutionGone:
        self.broken = True
        return SolutionGone(words)

    def _exactly(self, size: int) -> bytes:
        content = bytearray()
        while len(content) < size:
            try:
                chunk = self.connection.recv(min(size - len(content), 2**20))
            except OSError:
                chunk = b""
            if not chunk:
                raise self.broke("the solution ended before its tests did")
            content += chunk
        return bytes(content)


# The solution's side


class Server:
    """Answers the tests' requests about the objects of the solution, which they know by number."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.objects: list[Any] = []
        self.numbers: dict[int, int] = {}

    def serve(self, path: str) -> None:
        """Run the solution, and answer until the tests hang up. Its first answer says whether it ran."""
        solution = ModuleType("solution")
        sys.modules["solution"] = solution
        try:
            with open(path, encoding="utf-8") as file:
                exec(compile(file.read(), "solution.py", "exec"), vars(solution))
            self.wire.send({"value": None})
        except BaseException as error:
            self.wire.send({"raise": _describe(error)})
            return
        while True:
            request = self.wire.receive()
            try:
                if request["do"] == "names":
                    found = [[name, self.encode(vars(solution)[name])] for name in request["names"] if name in vars(solution)]
                    answer = {"dict": found}
                else:
                    answer = self.encode(self.act(request))
                self.wire.send({"value": answer})
            except SolutionGone:
                return
            except BaseException as error:
                self.wire.send({"raise": _describe(error)})

    def act(self, request: dict[str, Any]) -> Any:
        subject = self.objects[request["object"]]
        match request["do"]:
            case "call":
                arguments = [self.decode(value) for value in request["args"]]
                return subject(*arguments, **{name: self.decode(value) for name, value in request["kwargs"].items()})
            case "get":
                return getattr(subject, request["name"])
            case "item":
                return subject[self.decode(request["key"])]
            case "iterate":
                return _Iterator(iter(subject))
            case "next":
                return list(itertools.islice(subject.items, 1))
            case "length":
                return len(subject)
            case "text":
                return str(subject) if request["name"] == "str" else repr(subject)

    def encode(self, value: Any) -> Any:
        return to_wire(value, self._number)

    def _number(self, value: Any) -> dict[str, int]:
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.objects)
            self.objects.append(value)
        return {"object": self.numbers[id(value)]}

    def decode(self, message: Any) -> Any:
        return from_wire(message, self._other)

    def _other(self, message: dict[str, Any]) -> Any:
        return self.objects[message["object"]] if "object" in message else self._callback(message["function"])

    def _callback(self, number: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            arguments = {"args": [self.encode(value) for value in args], "kwargs": {k: self.encode(v) for k, v in kwargs.items()}}
            self.wire.send({"function": number, **arguments})
            answer = self.wire.receive()
            if "raise" in answer:
                raise _rebuild(answer["raise"])
            return self.decode(answer["value"])

        return call


class _Iterator:
    def __init__(self, items: Iterator[Any]) -> None:
        self.items = items


def _describe(error: BaseException) -> list[str]:
    try:
        return [type(error).__name__, str(error)[:DETAIL_CHARACTERS]]
    except BaseException:
        return ["Exception", "without a message"]


def _rebuild(description: Any) -> Exception:
    """The built-in exception of that name and message, or a SolutionError that tells both."""
    name, message = map(str, description)
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, NOT_FOR_THE_TESTS):
        return kind(message)
    return SolutionError(f"{name}: {message}")


# The tests' side


class Remote:
    """A value of the solution that is not plain; see the head of this file for what it can do."""

    __slots__ = ("_client", "_number")

    def __init__(self, client: "Client", number: int) -> None:
        self._client = client
        self._number = number

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        encode = self._client.encode
        arguments = {"args": [encode(value) for value in args], "kwargs": {key: encode(value) for key, value in kwargs.items()}}
        return self._client.ask({"do": "call", "object": self._number, **arguments})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"{name} of the solution's objects is not for the tests")
        return self._client.ask({"do": "get", "object": self._number, "name": name})

    def __getitem__(self, key: Any) -> Any:
        return self._client.ask({"do": "item", "object": self._number, "key": self._client.encode(key)})

    def __iter__(self) -> Iterator[Any]:
        items = self._client.ask({"do": "iterate", "object": self._number})
        while found := self._client.ask({"do": "next", "object": items._number}):
            yield found[0]

    def __len__(self) -> int:
        length: int = self._client.ask({"do": "length", "object": self._number})
        return length

    def __str__(self) -> str:
        text: str = self._client.ask({"do": "text", "object": self._number, "name": "str"})
        return text

    def __repr__(self) -> str:
        text: str = self._client.ask({"do": "text", "object": self._number, "name": "repr"})
        return text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and other._number == self._number

    def __hash__(self) -> int:
        return hash(self._number)

    def __bool__(self) -> bool:
        raise TypeError("an object of the solution's own class is neither true nor false to the tests")


class Client:
    """Asks the solution on behalf of the tests."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.functions: list[Callable[..., Any]] = []

    def ask(self, request: dict[str, Any]) -> Any:
        """The answer as a value, or raise what the solution raised. Meanwhile the solution may call functions of the tests."""
        self.wire.send(request)
        return self.answer()

    def answer(self) -> Any:
        while True:
            message = self.wire.receive()
            try:
                if "function" in message:
                    call = (self.functions[message["function"]], *self._arguments(message))
                elif "raise" in message:
                    error = _rebuild(message["raise"])
                    break
                else:
                    return self.decode(message["value"])
            except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as reason:
                raise self.wire.broke() from reason
            self._call_back(*call)
        raise error

    def encode(self, value: Any) -> Any:
        return to_wire(value, self._other)

    def _other(self, value: Any) -> dict[str, int]:
        if isinstance(value, Remote):
            return {"object": value._number}
        if not callable(value) or isinstance(value, type):
            raise TypeError(
                f"a {type(value).__name__} of the tests cannot cross to the solution, only plain values and functions do"
            )
        self.functions.append(value)
        return {"function": len(self.functions) - 1}

    def decode(self, message: Any) -> Any:
        return from_wire(message, self._remote)

    def _remote(self, message: dict[str, Any]) -> Remote:
        if type(message["object"]) is not int:
            raise ValueError("objects are known by number")
        return Remote(self, message["object"])

    def _arguments(self, message: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        named = {name: self.decode(value) for name, value in message["kwargs"].items()}
        return [self.decode(value) for value in message["args"]], named

    def _call_back(self, function: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> None:
        try:
            answer = {"value": self.encode(function(*args, **kwargs))}
        except Exception as error:
            answer = {"raise": _describe(error)}
        self.wire.send(answer)


def is_test(statement: ast.stmt, checks: set[str]) -> bool:
    """Whether a statement of the tests' module is a test: it asserts, or calls one of the module's functions that do."""
    return any(
        isinstance(node, ast.Assert)
        or (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in checks)
        for node in _run_by(statement)
    )


def asserting_functions(tree: ast.Module) -> set[str]:
    """The functions of the tests' module with an `assert` in them."""
    functions = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    return {function.name for function in functions if any(isinstance(node, ast.Assert) for node in ast.walk(function))}


def _run_by(statement: ast.stmt) -> Iterator[ast.AST]:
    """The nodes of a statement without the bodies that it only defines."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return
    waiting: list[ast.AST] = [statement]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += [
            child
            for child in ast.iter_child_nodes(node)
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda)
        ]


def free_names(tree: ast.Module) -> tuple[set[str], set[str]]:
    """Names that the tests use without binding them: the standard library's modules among them, and those left to the solution.

    Built-in functions stay the tests' own, whatever the solution calls its functions.
    """
    bound, used, modules = set(dir(builtins)), set(), set()
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                used.add(name)
            case ast.Name(id=name) | ast.arg(arg=name) | ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                bound.add(name)
            case ast.alias(name=name, asname=alias):
                bound.add(alias or name.partition(".")[0])
            case ast.ExceptHandler(name=str(name)):
                bound.add(name)
        match node:
            case ast.Attribute(value=ast.Name(id=name)) if name in sys.stdlib_module_names:
                modules.add(name)
    return (modules - bound), (used - bound - modules)


def check(wire: Wire, path: str) -> None:
    """Run the tests; for each one line of JSON on standard output, where nothing else is then printed."""
    with open(path, encoding="utf-8") as file:
        source = file.read()
    report = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    tree = ast.parse(source, "tests.py")
    checks = asserting_functions(tree)
    modules, names = free_names(tree)
    client = Client(wire)
    namespace: dict[str, Any] = {"__name__": "tests", **{name: importlib.import_module(name) for name in modules}}
    failure: dict[str, str] | None = None
    try:
        client.answer()
        found = client.ask({"do": "names", "names": sorted(names)})
        namespace |= {name: found[name] for name in names & found.keys()}
    except (Exception, SolutionGone) as error:
        failure = _failure(error, "")
    for statement in tree.body:
        counted = is_test(statement, checks)
        outcome = failure or _run(statement, namespace, wire, source)
        if counted:
            print(json.dumps(outcome or {"verdict": "passed", "detail": ""}), file=report, flush=True)
        else:
            failure = outcome  # nothing behind a broken preparation says anything about the solution


def _run(statement: ast.stmt, namespace: dict[str, Any], wire: Wire, source: str) -> dict[str, str] | None:
    """How the statement failed, or None."""
    try:
        exec(compile(ast.Module([statement], []), "tests.py", "exec"), namespace)
    except (Exception, SolutionGone, SystemExit) as error:
        traceback, line = error.__traceback__, statement.lineno
        while traceback is not None:
            line = traceback.tb_lineno if traceback.tb_frame.f_code.co_filename == "tests.py" else line
            traceback = traceback.tb_next
        return _failure(error, source.splitlines()[line - 1].strip())
    return _failure(SolutionGone("the solution ended before its tests did"), "") if wire.broken else None


def _failure(error: BaseException, place: str) -> dict[str, str]:
    verdicts = {AssertionError: "failed", MemoryError: "out of memory", SyntaxError: "compile error"}
    verdict = next((verdict for kind, verdict in verdicts.items() if isinstance(error, kind)), "crashed")
    name, message = _describe(error)
    words = [place, message if isinstance(error, SolutionGone | SolutionError) else name + f": {message}" * bool(message)]
    return {"verdict": verdict, "detail": ": ".join(filter(None, words))[:DETAIL_CHARACTERS]}


def main(role: str, descriptor: str, path: str) -> None:
    wire = Wire(socket.socket(fileno=int(descriptor)))
    if role == "check":
        check(wire, path)
    else:
        Server(wire).serve(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
