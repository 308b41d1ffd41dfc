"""Pipeline schedules as data, and their simulator: pure Python, nothing of ours, no torch.

A schedule is one list of `Action` per rank, in the order in which that rank executes them; whoever runs it (the simulator here, an
executor with tensors) needs nothing else. `num_stages` is the PP of V3's table (section 3.2.1): the number of equal parts the
model is cut into. Ranks are as many, but for DualPipeV, which puts two stages on each rank and so needs half as many.

| schedule      | ranks | a rank r holds                 | enters at             | sizes                                              |
|---------------|-------|--------------------------------|-----------------------|----------------------------------------------------|
| `one_f_one_b` | PP    | stage r                        | rank 0                | any                                                |
| `zb1p`        | PP    | stage r                        | rank 0                | any                                                |
| `interleaved` | PP    | `chunks` stages of PP x chunks | rank 0                | micro-batches a multiple of PP                     |
| `dualpipe`    | PP    | stages r and PP - 1 - r        | rank 0 and rank PP-1  | PP even, micro-batches even and at least 2 PP      |
| `dualpipe_v`  | PP/2  | stages r and PP - 1 - r        | rank 0, twice over it | PP even, at least PP micro-batches                 |

V3's table of bubbles holds exactly where a forward takes as long as an input gradient and a weight gradient no longer than either
(1F1B's always): (PP-1)(F+B), (PP-1)(F+B-2W), and for the last two (PP/2-1)(F&B+B-3W) on the rank that waits most.

Impossible sizes are a ValueError that says what must divide what, and names the nearest size that does.
"""

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from math import isfinite


class Kind(StrEnum):
    """What an action computes."""

    FORWARD = "F"
    BACKWARD = "B"
    """The gradients of inputs and weights at once."""
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"
    """Needs its micro-batch's `BACKWARD_INPUT` before it, on the same stage."""
    OVERLAPPED = "F&B"
    """A forward and a full backward of two micro-batches, interleaved so that each hides the other's communication."""


@dataclass(frozen=True, slots=True)
class Action:
    """One thing for a rank to do: `kind` for one micro-batch on one stage.

    `stage` counts the parts of the model from its input; `chunk` is the place of that stage among those that the rank holds, 0 being
    the one held by all schedules. An overlapped pair is described by its forward and carries the backward in `backward`.
    """

    kind: Kind
    microbatch: int
    stage: int
    chunk: int = 0
    backward: "Action | None" = None

    @property
    def parts(self) -> "tuple[Action, ...]":
        """The single actions: itself, or forward and backward of a pair."""
        if self.backward is None:
            return (self,)
        return (Action(Kind.FORWARD, self.microbatch, self.stage, self.chunk), self.backward)


Schedule = list[list[Action]]


def one_f_one_b(num_stages: int, num_microbatches: int) -> Schedule:
    """1F1B: rank r runs PP - r forwards ahead, then one backward and one forward in turn, then the backwards that are left."""
    _check_positive(num_stages=num_stages, num_microbatches=num_microbatches)
    schedule = []
    for rank in range(num_stages):
        ahead = min(num_stages - rank, num_microbatches)
        actions = [Action(Kind.FORWARD, microbatch, rank) for microbatch in range(ahead)]
        for microbatch in range(num_microbatches):
            actions.append(Action(Kind.BACKWARD, microbatch, rank))
            if microbatch + ahead < num_microbatches:
                actions.append(Action(Kind.FORWARD, microbatch + ahead, rank))
        schedule.append(actions)
    return schedule


def zb1p(num_stages: int, num_microbatches: int) -> Schedule:
    """ZB1P (ZB-H1 of the zero-bubble paper): 1F1B whose backward is cut in two. Rank r lets r weight gradients wait, and fills with
    them the gaps at the end; no rank holds more than PP micro-batches."""
    _check_positive(num_stages=num_stages, num_microbatches=num_microbatches)
    schedule = []
    for rank in range(num_stages):
        ahead = min(num_stages - rank, num_microbatches)
        waiting: deque[int] = deque()
        actions = [Action(Kind.FORWARD, microbatch, rank) for microbatch in range(ahead)]
        for microbatch in range(num_microbatches):
            actions.append(Action(Kind.BACKWARD_INPUT, microbatch, rank))
            waiting.append(microbatch)
            if len(waiting) > rank:
                actions.append(Action(Kind.BACKWARD_WEIGHT, waiting.popleft(), rank))
            if microbatch + ahead < num_microbatches:
                actions.append(Action(Kind.FORWARD, microbatch + ahead, rank))
        actions += [Action(Kind.BACKWARD_WEIGHT, microbatch, rank) for microbatch in waiting]
        schedule.append(actions)
    return schedule


def interleaved(num_stages: int, num_microbatches: int, chunks: int = 2) -> Schedule:
    """Interleaved 1F1B: each of `num_stages` ranks holds `chunks` smaller stages, rank r those r, r + PP, r + 2 PP, ...

    Micro-batches pass in groups of PP through one chunk after the other, so their number must be a multiple of PP.
    """
    _check_positive(num_stages=num_stages, num_microbatches=num_microbatches, chunks=chunks)
    if num_microbatches % num_stages:
        raise ValueError(
            f"interleaved: num_microbatches is {num_microbatches}, it must be a multiple of num_stages ({num_stages}); "
            f"the nearest is {nearest_multiple(num_microbatches, num_stages)}"
        )
    total = num_microbatches * chunks

    def position(index: int, is_forward: bool) -> tuple[int, int]:
        """Micro-batch and chunk of a rank's index-th forward or backward."""
        group, within = divmod(index, num_stages * chunks)
        chunk = within // num_stages
        return group * num_stages + within % num_stages, chunk if is_forward else chunks - 1 - chunk

    schedule = []
    for rank in range(num_stages):

        def forward(index: int, rank: int = rank) -> Action:
            microbatch, chunk = position(index, True)
            return Action(Kind.FORWARD, microbatch, chunk * num_stages + rank, chunk)

        def backward(index: int, rank: int = rank) -> Action:
            microbatch, chunk = position(index, False)
            return Action(Kind.BACKWARD, microbatch, chunk * num_stages + rank, chunk)

        ahead = min(total, 2 * (num_stages - rank - 1) + (chunks - 1) * num_stages)
        actions = [forward(index) for index in range(ahead)]
        for index in range(total - ahead):
            actions += [forward(ahead + index), backward(index)]
        actions += [backward(index) for index in range(total - ahead, total)]
        schedule.append(actions)
    return schedule


def dualpipe(num_stages: int, num_microbatches: int) -> Schedule:
    """DualPipe (V3 section 3.2.1): micro-batches enter at both ends, the first half at rank 0 and the other at rank PP - 1, and in the
    middle of the run each forward is overlapped with a backward of the opposite direction. The eight steps are the open code's."""
    _check_positive(num_stages=num_stages, num_microbatches=num_microbatches)
    _check_even("dualpipe", num_stages=num_stages, num_microbatches=num_microbatches)
    _check_enough("dualpipe", num_microbatches, 2 * num_stages, "2 x num_stages")
    half, per_direction = num_stages // 2, num_microbatches // 2
    schedule = []
    for rank in range(num_stages):
        inward = min(rank, num_stages - 1 - rank)
        # On the second half of the ranks the near end is the other one: what is phase 0 there enters at rank PP - 1.
        mirrored = rank >= half
        stages = (rank, num_stages - 1 - rank)
        writer = _Writer(
            stage=stages[::-1] if mirrored else stages,
            chunk=(1, 0) if mirrored else (0, 1),
            first=(per_direction, 0) if mirrored else (0, per_direction),
        )
        middle = inward == half - 1
        _eight_steps(writer, half - inward - 1, inward + 1, per_direction - num_stages + inward + 1, middle)
        schedule.append(writer.actions)
    return schedule


def dualpipe_v(num_stages: int, num_microbatches: int) -> Schedule:
    """DualPipeV ("cut in half"): each of PP / 2 ranks holds stages r and PP - 1 - r, so that a micro-batch goes down the ranks and up
    again; input and loss are both on rank 0, and no parameter is held twice. The same eight steps as DualPipe's."""
    _check_positive(num_stages=num_stages, num_microbatches=num_microbatches)
    _check_even("dualpipe_v", num_stages=num_stages)
    _check_enough("dualpipe_v", num_microbatches, num_stages, "num_stages")
    ranks = num_stages // 2
    schedule = []
    for rank in range(ranks):
        writer = _Writer(stage=(rank, num_stages - 1 - rank), chunk=(0, 1), first=(0, 0))
        _eight_steps(writer, ranks - rank - 1, rank + 1, num_microbatches - num_stages + rank + 1, rank == ranks - 1)
        schedule.append(writer.actions)
    return schedule


@dataclass
class _Writer:
    """Writes one rank's list in terms of phases 0 and 1; micro-batches of a phase are taken in order, weight gradients first in, first
    out over both phases."""

    stage: tuple[int, int]
    chunk: tuple[int, int]
    first: tuple[int, int]
    actions: list[Action] = field(default_factory=list)
    waiting: deque[Action] = field(default_factory=deque)
    forwards: list[int] = field(default_factory=lambda: [0, 0])
    backwards: list[int] = field(default_factory=lambda: [0, 0])

    def forward(self, phase: int) -> None:
        self.actions.append(self._next_forward(phase))

    def backward(self, phase: int, *, split: bool = False) -> None:
        action = self._next_backward(phase, Kind.BACKWARD_INPUT if split else Kind.BACKWARD)
        self.actions.append(action)
        if split:
            self.waiting.append(action)

    def weight(self) -> None:
        action = self.waiting.popleft()
        self.actions.append(Action(Kind.BACKWARD_WEIGHT, action.microbatch, action.stage, action.chunk))

    def pair(self, forward_phase: int, backward_phase: int) -> None:
        ahead = self._next_forward(forward_phase)
        behind = self._next_backward(backward_phase, Kind.BACKWARD)
        self.actions.append(Action(Kind.OVERLAPPED, ahead.microbatch, ahead.stage, ahead.chunk, behind))

    def _next_forward(self, phase: int) -> Action:
        self.forwards[phase] += 1
        return Action(Kind.FORWARD, self.first[phase] + self.forwards[phase] - 1, self.stage[phase], self.chunk[phase])

    def _next_backward(self, phase: int, kind: Kind) -> Action:
        self.backwards[phase] += 1
        return Action(kind, self.first[phase] + self.backwards[phase] - 1, self.stage[phase], self.chunk[phase])


def _eight_steps(writer: _Writer, outward: int, inward: int, steady: int, middle: bool) -> None:
    """The steps of the open DualPipe code for a rank with `outward` ranks between it and the middle, `inward` up to the near end
    (itself counted); the middle rank does not overlap its first pair, whose backward would wait for its own forward."""
    for _ in range(2 * outward):
        writer.forward(0)
    for _ in range(inward):
        writer.forward(0)
        writer.forward(1)
    for _ in range(outward):
        writer.backward(1, split=True)
        writer.weight()
        writer.forward(1)
    for index in range(steady):
        if index == 0 and middle:
            writer.forward(0)
            writer.backward(1)
        else:
            writer.pair(0, 1)
        writer.pair(1, 0)
    for _ in range(outward):
        writer.backward(1)
        writer.pair(1, 0)
    for index in range(inward):
        writer.backward(1, split=2 * index >= inward)
        writer.backward(0, split=2 * index + 1 >= inward)
    for _ in range(outward):
        writer.weight()
        writer.backward(0, split=True)
    while writer.waiting:
        writer.weight()


@dataclass(frozen=True)
class Costs:
    """How long actions take, in any one unit of time.

    A full backward is `backward_input + backward_weight`. `overlapped` is the time of a pair; None means that overlapping gains
    nothing, and a pair takes as long as its parts. `send` is added between an action and what waits for its output on another rank.
    All stages take as long as each other, or `stage_scale` has a factor for each: 61 layers on 16 stages are not even. A pair of two
    stages is stretched by what its parts are stretched by together.
    """

    forward: float = 1.0
    backward_input: float = 1.0
    backward_weight: float = 1.0
    overlapped: float | None = None
    send: float = 0.0
    stage_scale: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("forward", "backward_input", "backward_weight", "overlapped", "send"):
            _check_time(name, getattr(self, name))
        for scale in self.stage_scale or ():
            _check_time("stage_scale", scale)
        if not (self.forward or self.backward_input or self.backward_weight):
            raise ValueError("costs: forward, backward_input and backward_weight are all 0; give one of them a time")

    @property
    def backward(self) -> float:
        """A full backward."""
        return self.backward_input + self.backward_weight

    def of(self, kind: Kind) -> float:
        """The time of one action."""
        match kind:
            case Kind.FORWARD:
                return self.forward
            case Kind.BACKWARD:
                return self.backward
            case Kind.BACKWARD_INPUT:
                return self.backward_input
            case Kind.BACKWARD_WEIGHT:
                return self.backward_weight
            case Kind.OVERLAPPED:
                return self.forward + self.backward if self.overlapped is None else self.overlapped

    def of_action(self, action: Action) -> float:
        """The time of one action on its stage."""
        even = self.of(action.kind)
        if self.stage_scale is None:
            return even
        if action.backward is None:
            return even * self.stage_scale[action.stage]
        ahead, behind = (self.stage_scale[part.stage] for part in action.parts)
        parts = self.forward + self.backward
        return even * (self.forward * ahead + self.backward * behind) / parts if parts else 0.0


@dataclass(frozen=True)
class Simulation:
    """What a schedule does in time; every list is by rank.

    `timeline` has start and end of each action, in the order of the schedule. `bubbles` is the time that a rank waits between the
    start of the first action anywhere and the end of the last; V3's table gives the largest of them. `peak_live_activations` counts
    activations of one micro-batch on one stage that are held at once, from the start of the forward to the end of the last part of
    the backward. `parameter_copies` is the number of stages whose parameters the rank holds, which is how V3's table counts.
    """

    makespan: float
    busy: list[float]
    bubbles: list[float]
    peak_live_activations: list[int]
    parameter_copies: list[int]
    timeline: list[list[tuple[float, float]]]

    @property
    def bubble_fraction(self) -> float:
        """The share of all ranks' time that is spent waiting."""
        return sum(self.bubbles) / (self.makespan * len(self.bubbles))


Key = tuple[str, int, int]  # "forward", "input" or "weight"; micro-batch; stage


def simulate(schedule: Sequence[Sequence[Action]], costs: Costs | None = None) -> Simulation:
    """Run a schedule in time: each rank its own list in order, each action as soon as what it needs has arrived.

    A forward needs the forward of the stage before; a backward needs its own forward and the backward of the stage after; a weight
    gradient needs its input gradient. Sends are buffered and never wait. What a rank receives from another one kind (outputs or
    gradients) must be asked for in the order in which it is sent, as point-to-point messages arrive.

    Raises:
        ValueError: factors that are not one for each stage, an action missing or done twice, a stage on several ranks for one
            micro-batch, messages crossing, or a deadlock (ranks that wait for each other), with the rank and the action.
    """
    costs = costs or Costs()
    gives = [[[key for part in action.parts for key in _gives(part)] for action in actions] for actions in schedule]
    produced = _check_complete(schedule, gives)
    stages = 1 + max(key[2] for key in produced)
    needs = [[[key for part in action.parts for key in _needs(part, stages)] for action in actions] for actions in schedule]
    _check_message_order(gives, needs, produced)
    if costs.stage_scale is not None and len(costs.stage_scale) != stages:
        raise ValueError(f"costs: stage_scale has {len(costs.stage_scale)} factors for {stages} stages; give one for each")
    times = [[costs.of_action(action) for action in actions] for actions in schedule]
    finished: dict[Key, float] = {}
    position = [0] * len(schedule)
    timeline: list[list[tuple[float, float]]] = [[] for _ in schedule]
    waiting = deque(range(len(schedule)))
    waiters: dict[Key, list[int]] = {}
    while waiting:
        rank = waiting.popleft()
        while position[rank] < len(schedule[rank]):
            place = position[rank]
            needed = needs[rank][place]
            missing = [key for key in needed if key not in finished]
            if missing:
                waiters.setdefault(missing[0], []).append(rank)
                break
            arrivals = [finished[key] + (costs.send if produced[key] != rank else 0.0) for key in needed]
            start = max([timeline[rank][-1][1] if timeline[rank] else 0.0, *arrivals])
            end = start + times[rank][place]
            timeline[rank].append((start, end))
            position[rank] += 1
            for key in gives[rank][place]:
                finished[key] = end
                waiting.extend(waiters.pop(key, ()))
    stuck = [rank for rank, actions in enumerate(schedule) if position[rank] < len(actions)]
    if stuck:
        told = ", ".join(f"rank {rank} at {_name(schedule[rank][position[rank]])}" for rank in stuck[:4])
        raise ValueError(f"schedule: deadlock, ranks wait for each other: {told}; reorder their actions")
    return _summary(schedule, timeline)


def _summary(schedule: Sequence[Sequence[Action]], timeline: list[list[tuple[float, float]]]) -> Simulation:
    makespan = max((end for spans in timeline for _, end in spans), default=0.0)
    busy = [sum(end - start for start, end in spans) for spans in timeline]
    return Simulation(
        makespan=makespan,
        busy=busy,
        bubbles=[makespan - time for time in busy],
        peak_live_activations=[_peak_live(actions) for actions in schedule],
        parameter_copies=[len({part.stage for action in actions for part in action.parts}) for actions in schedule],
        timeline=timeline,
    )


def _peak_live(actions: Sequence[Action]) -> int:
    """Activations held at once. An overlapped pair holds both of its own."""
    live = peak = 0
    for action in actions:
        live += action.kind in (Kind.FORWARD, Kind.OVERLAPPED)
        peak = max(peak, live)
        live -= action.kind in (Kind.BACKWARD, Kind.BACKWARD_WEIGHT, Kind.OVERLAPPED)
    return peak


def _gives(part: Action) -> list[Key]:
    match part.kind:
        case Kind.FORWARD:
            names = ["forward"]
        case Kind.BACKWARD_INPUT:
            names = ["input"]
        case Kind.BACKWARD_WEIGHT:
            names = ["weight"]
        case _:
            names = ["input", "weight"]
    return [(name, part.microbatch, part.stage) for name in names]


def _needs(part: Action, stages: int) -> list[Key]:
    microbatch, stage = part.microbatch, part.stage
    if part.kind == Kind.FORWARD:
        return [("forward", microbatch, stage - 1)] if stage else []
    if part.kind == Kind.BACKWARD_WEIGHT:
        return [("input", microbatch, stage)]
    own: list[Key] = [("forward", microbatch, stage)]
    return own if stage == stages - 1 else [*own, ("input", microbatch, stage + 1)]


def _check_complete(schedule: Sequence[Sequence[Action]], gives: list[list[list[Key]]]) -> dict[Key, int]:
    """The rank that produces each result; every micro-batch must pass every stage once, forward and both parts of the backward."""
    produced: dict[Key, int] = {}
    for rank, actions in enumerate(schedule):
        for place, action in enumerate(actions):
            if (action.kind == Kind.OVERLAPPED) != (action.backward is not None):
                raise ValueError(f"schedule: rank {rank}, {_name(action)}: a pair, and only a pair, carries its backward")
            if any(part.microbatch < 0 or part.stage < 0 for part in action.parts):
                raise ValueError(f"schedule: rank {rank}, {_name(action)}: micro-batches and stages count from 0")
            for key in gives[rank][place]:
                if key in produced:
                    raise ValueError(f"schedule: {_tell(key)} is computed twice, on ranks {produced[key]} and {rank}; keep one")
                produced[key] = rank
    if not produced:
        raise ValueError("schedule: it holds no action; give at least one micro-batch")
    stages, microbatches = 1 + max(key[2] for key in produced), 1 + max(key[1] for key in produced)
    for microbatch in range(microbatches):
        for stage in range(stages):
            names = ("forward", "input", "weight")
            missing = [name for name in names if (name, microbatch, stage) not in produced]
            if missing:
                raise ValueError(f"schedule: {_tell((missing[0], microbatch, stage))} is missing; add its action")
            if len({produced[name, microbatch, stage] for name in names}) > 1:
                raise ValueError(
                    f"schedule: micro-batch {microbatch} passes stage {stage} forward and backward on different ranks; its activations "
                    "are on the first"
                )
    return produced


def _check_message_order(gives: list[list[list[Key]]], needs: list[list[list[Key]]], produced: Mapping[Key, int]) -> None:
    """Between two ranks, messages of one kind must be received in the order in which they are sent."""
    sent: dict[tuple[int, int, str], list[Key]] = {}
    received: dict[tuple[int, int, str], list[Key]] = {}
    consumer: dict[Key, int] = {}
    for rank, actions in enumerate(needs):
        for key in (key for keys in actions for key in keys):
            if produced[key] != rank:
                consumer[key] = rank
                received.setdefault((produced[key], rank, key[0]), []).append(key)
    for rank, actions in enumerate(gives):
        for key in (key for keys in actions for key in keys):
            if key in consumer:
                sent.setdefault((rank, consumer[key], key[0]), []).append(key)
    for channel, keys in received.items():
        for one, other in zip(sent[channel], keys, strict=True):
            if one != other:
                raise ValueError(
                    f"schedule: rank {channel[1]} waits for {_tell(other)} of rank {channel[0]}, which sends {_tell(one)} first; "
                    "reorder one of the two"
                )


def _tell(key: Key) -> str:
    what = {"forward": "the forward", "input": "the input gradient", "weight": "the weight gradient"}[key[0]]
    return f"{what} of micro-batch {key[1]} on stage {key[2]}"


def _name(action: Action) -> str:
    return f"{action.kind} of micro-batch {action.microbatch} on stage {action.stage}"


def kind_counts(actions: Sequence[Action]) -> dict[Kind, int]:
    """How many actions of each kind a rank has."""
    return dict(Counter(action.kind for action in actions))


def _check_time(name: str, value: float | None) -> None:
    if value is not None and not (value >= 0 and isfinite(value)):
        raise ValueError(f"costs: {name} is {value}, it must be a finite number of at least 0")


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise ValueError(f"{name} is {size!r}, it must be a whole number")
        if size < 1:
            raise ValueError(f"{name} is {size}, it must be at least 1")


def _check_even(schedule: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if size % 2:
            raise ValueError(f"{schedule}: {name} is {size}, it must be divisible by 2; the nearest is {size + 1}")


def _check_enough(schedule: str, num_microbatches: int, least: int, formula: str) -> None:
    if num_microbatches < least:
        raise ValueError(
            f"{schedule}: num_microbatches is {num_microbatches}, it must be at least {formula} = {least}; use {least}"
        )


def nearest_multiple(size: int, unit: int) -> int:
    """The multiple of `unit` that is nearest to `size`, at least `unit` itself: what an error offers where a size does not divide."""
    return max(unit, round(size / unit) * unit)


SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {
    "one_f_one_b": one_f_one_b,
    "interleaved": interleaved,
    "zb1p": zb1p,
    "dualpipe": dualpipe,
    "dualpipe_v": dualpipe_v,
}
"""The schedules by the names of the command line."""
