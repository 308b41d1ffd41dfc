"""What a reward is: a plain function `(prompt, completion, example) -> float`, named on the command line by its place in the code.

Several rewards compose by their weights: the total is the weighted sum of the components (R1 adds accuracy, format and language
consistency so, R1-N equations 4 and 8). A component that fails counts 0 and says why; it never takes the others with it.

A module of rewards may define `prepare()`: the workers of a `finback.rewards.pool.RewardPool` call it once, before the first
completion and outside every deadline. What is slow to import belongs there.
"""

import difflib
import importlib
import importlib.util
import inspect
import math
import numbers
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

from finback.config import InputError

Example = Mapping[str, Any]
"""One row of the data: "answer", "tests", "language", ... whatever the reward reads."""
RewardFunction = Callable[[str, str, Example], float]
"""(prompt, completion, example) -> float"""

Step = tuple[int, float]
"""The place in the completion where a step ends (characters before it), and its reward."""
StepFunction = Callable[[str, str, Example], Sequence[Step]]
"""(prompt, completion, example) -> the completion's steps, in order: process supervision."""

FailureKind = Literal["raised", "out_of_memory", "not_a_number", "timed_out", "worker_died"]
FAILURE_KINDS: tuple[FailureKind, ...] = get_args(FailureKind)

_SPEC = re.compile(r"(?P<module>[^:]+?\.py|[\w.]+):(?P<function>\w+)(?::(?P<weight>.*))?", re.DOTALL)
_LONGEST_SENTENCE = 300  # characters of an exception's or a value's text that are told


@dataclass(frozen=True)
class Reward:
    """A reward function with its weight in the total; `spec` says where workers find the function again."""

    name: str
    function: RewardFunction
    weight: float = 1.0
    spec: str = ""


@dataclass(frozen=True)
class Score:
    """What one completion got: `total` is the weighted sum of `components`, and a component in `failures` counts 0."""

    total: float
    components: dict[str, float]
    failures: dict[str, str] = field(default_factory=dict)
    """A sentence for each component that failed: "timed out after 5 s", "raised ValueError: ..."."""
    steps: dict[str, tuple[Step, ...]] = field(default_factory=dict)
    """Of components whose functions reward steps; their value is the sum."""


@dataclass(frozen=True)
class Outcome:
    """What one call of a reward function came to: a value, or a kind of failure with its sentence."""

    value: float = 0.0
    failure: FailureKind | None = None
    sentence: str = ""
    steps: tuple[Step, ...] = ()


def load_reward(spec: str) -> Reward:
    """The reward that `module:function[:weight]` names, or `path/to/file.py:function[:weight]`; its name is the function's.

    Modules are looked for where Python looks, and then in the working directory. Raises InputError if there is no such module, file or
    function (the nearest name is told), if the module cannot be imported, if the weight is no finite number, or if the function does
    not take three arguments.
    """
    found = _SPEC.fullmatch(spec)
    if not found:
        raise InputError(f"reward {spec!r} is not of the form module:function[:weight] or path/to/file.py:function[:weight]")
    weight = _weight(found["weight"], spec)
    module = load_module(found["module"], spec)
    return Reward(found["function"], _function(module, found["function"], spec), weight, spec)


def absolute_reward_spec(spec: str) -> str:
    """`spec` with an absolute path where it names a file; what is no spec stays as it is, for `load_reward` to tell."""
    found = _SPEC.fullmatch(spec)
    return (
        f"{os.path.abspath(found['module'])}{spec[found.end('module') :]}" if found and found["module"].endswith(".py") else spec
    )


def load_rewards(specs: Sequence[str]) -> tuple[Reward, ...]:
    """The rewards of several specs, each under a name of its own: functions of one name are called by their modules too."""
    if not specs:
        raise InputError("no reward is given; name at least one as module:function[:weight]")
    rewards = [load_reward(spec) for spec in specs]
    shared = {reward.name for reward in rewards if sum(other.name == reward.name for other in rewards) > 1}
    named = [replace(reward, name=_long_name(reward)) if reward.name in shared else reward for reward in rewards]
    check_names(named)
    return tuple(named)


def check_names(rewards: Sequence[Reward]) -> None:
    """Raise InputError unless there is a reward and each has a name of its own."""
    names = [reward.name for reward in rewards]
    if not names:
        raise InputError("no reward is given; give at least one")
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two rewards are called {name!r}; give each once, with one weight")


def score(rewards: Sequence[Reward], prompt: str, completion: str, example: Example) -> Score:
    """Score one completion in this process, without a deadline: the plain twin of `RewardPool`."""
    check_names(rewards)
    return compose(rewards, [outcome_of(reward.function, prompt, completion, example) for reward in rewards])


def compose(rewards: Sequence[Reward], outcomes: Sequence[Outcome]) -> Score:
    """The score that the outcomes of the rewards' calls, in the same order, add up to."""
    components = {reward.name: outcome.value for reward, outcome in zip(rewards, outcomes, strict=True)}
    failures = {
        reward.name: outcome.sentence for reward, outcome in zip(rewards, outcomes, strict=True) if outcome.failure is not None
    }
    total = sum(reward.weight * outcome.value for reward, outcome in zip(rewards, outcomes, strict=True))
    steps = {reward.name: outcome.steps for reward, outcome in zip(rewards, outcomes, strict=True) if outcome.steps}
    return Score(float(total), components, failures, steps)


def outcome_of(function: RewardFunction, prompt: str, completion: str, example: Example) -> Outcome:
    """Call a reward function; whatever it raises or returns becomes an outcome. Only Ctrl-C passes."""
    try:
        value = function(prompt, completion, example)
    except MemoryError:
        return Outcome(failure="out_of_memory", sentence="needed more memory than a worker may have")
    except (Exception, SystemExit) as error:  # the function is somebody else's, and may raise anything
        return Outcome(failure="raised", sentence=_short(f"raised {type(error).__name__}: {_text(error)}".removesuffix(": ")))
    if (steps := _steps(value)) is not None:
        return Outcome(math.fsum(reward for _, reward in steps), steps=steps)
    if not isinstance(value, numbers.Real):
        sentence = f"gave {type(value).__name__} {_text(value, repr)}, not a number; return a float"
        return Outcome(failure="not_a_number", sentence=_short(sentence))
    try:
        number = float(value)
    except (OverflowError, ValueError):
        number = math.inf
    if not math.isfinite(number):
        return Outcome(failure="not_a_number", sentence=f"gave {number}, not a finite number")
    return Outcome(number)


def _steps(value: object) -> tuple[Step, ...] | None:
    """The steps that a function of process supervision gave; None if it is anything else, a number that is not finite included."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        return None
    steps: list[Step] = []
    for pair in value:
        if not isinstance(pair, Sequence) or len(pair) != 2:
            return None
        end, reward = pair
        if not isinstance(end, numbers.Integral) or not isinstance(reward, numbers.Real) or not math.isfinite(reward):
            return None
        steps.append((int(end), float(reward)))
    return tuple(steps)


def _text(thing: object, how: Callable[[object], str] = str) -> str:
    """What an object says of itself, where it can."""
    try:
        return how(thing)
    except Exception:  # as above: somebody else's __str__ or __repr__
        return "(which cannot be shown)"


def _short(sentence: str) -> str:
    flat = " ".join(sentence.split())
    return flat if len(flat) <= _LONGEST_SENTENCE else f"{flat[: _LONGEST_SENTENCE - 3]}..."


def load_module(name: str, spec: str) -> ModuleType:
    """The module of a reward's spec, by its dotted name or its path."""
    if name.endswith(".py"):
        return _load_file(Path(name), spec)
    _search_in(os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if name == missing or name.startswith(f"{missing}."):
            raise InputError(f"reward {spec!r}: there is no module {missing!r}{_nearest_module(name)}") from None
        raise InputError(f"reward {spec!r} needs the Python package {missing!r}, which is not installed") from None
    except (Exception, SystemExit) as error:  # importing runs somebody else's code
        raise InputError(f"reward {spec!r}: importing {name} raised {type(error).__name__}: {_short(_text(error))}") from None


def _load_file(path: Path, spec: str) -> ModuleType:
    if not path.is_file():
        raise InputError(f"reward {spec!r}: there is no file {str(path)!r}")
    resolved = path.resolve()
    name = f"finback_reward_{re.sub(r'[^0-9A-Za-z_]', '_', str(resolved.with_suffix('')))}"
    if name in sys.modules:
        return sys.modules[name]
    _search_in(str(resolved.parent))
    found = importlib.util.spec_from_file_location(name, resolved)
    assert found is not None
    assert found.loader is not None  # a file that ends in .py has one
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # as dataclasses and pickle expect of a module that runs
    try:
        found.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # importing runs somebody else's code
        del sys.modules[name]
        if isinstance(error, ModuleNotFoundError):
            raise InputError(f"reward {spec!r} needs the Python package {error.name!r}, which is not installed") from None
        raise InputError(f"reward {spec!r}: running {path} raised {type(error).__name__}: {_short(_text(error))}") from None
    return module


def _search_in(directory: str) -> None:
    """Let modules of `directory` be found, after all others; a program that was installed does not look where it is run."""
    if directory not in sys.path:
        sys.path.append(directory)


def _weight(text: str | None, spec: str) -> float:
    if text is None:
        return 1.0
    try:
        weight = float(text)
    except ValueError:
        raise InputError(f"reward {spec!r}: the weight {text!r} is not a number") from None
    if not math.isfinite(weight):
        raise InputError(f"reward {spec!r}: the weight is {text}, it must be finite")
    return weight


def _function(module: ModuleType, name: str, spec: str) -> RewardFunction:
    where = getattr(module, "__file__", None) or module.__name__
    function = getattr(module, name, None)
    if function is None:
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        close = difflib.get_close_matches(name, functions, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise InputError(f"reward {spec!r}: {where} has no function {name!r}{hint}")
    if not callable(function):
        raise InputError(f"reward {spec!r}: {name} of {where} is no function but {type(function).__name__}")
    try:
        inspect.signature(function).bind("", "", {})
    except TypeError:
        raise InputError(f"reward {spec!r}: {name} must take three arguments: prompt, completion, example") from None
    except ValueError:
        pass  # a function of C may have no signature to look at
    checked: RewardFunction = function
    return checked


def _nearest_module(name: str) -> str:
    rooms = [f"finback.rewards.{path.stem}" for path in sorted(Path(__file__).parent.glob("*.py")) if path.stem != "__init__"]
    close = difflib.get_close_matches(name, rooms, n=1, cutoff=0.8)
    return f"; did you mean {close[0]!r}?" if close else " on Python's path or in the working directory"


def _long_name(reward: Reward) -> str:
    module = reward.spec.split(":")[0].removesuffix(".py")
    return f"{re.split(r'[./]', module)[-1]}.{reward.name}"
