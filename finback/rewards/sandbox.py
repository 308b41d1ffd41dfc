"""Untrusted programs, run within limits: started, watched, and ended with everything that they started.

What holds them, and against what:

- wall time: this process watches the clock and kills the process namespace, in which nothing outlives its first process.
- CPU, address space, processes and threads, file size, open files: rlimits, set inside by `prlimit`, which nothing inside can raise.
- resident memory of all processes together: read every 50 ms while they run, shared pages counted once. The kinds of memory
  that it would miss are refused by the system call filter or have a size (/tmp, /dev/shm). No cgroup is used: most containers
  and all unprivileged users are denied one.
- output: read as it comes, up to the limit; one byte more ends the program. Nothing is ever written on this machine.

`finback.rewards.bubblewrap` says what the program sees. Where bubblewrap cannot run there is the degraded mode, for the caller to ask
for by name: the limits alone, with the network, this machine's files and, unless started as root, this user's processes in reach.
"""

import fcntl
import functools
import json
import os
import platform
import re
import resource
import select
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from finback.config import InputError
from finback.rewards import bubblewrap
from finback.rewards.bubblewrap import BOX, ENVIRONMENT
from finback.rewards.sandbox_config import Isolation, Limits
from finback.rewards.sandbox_memory import exceeds_memory

WATCH_SECONDS = 0.05
LAST_WORDS_SECONDS = 5.0  # for the kernel to take a killed namespace down, on a machine under load
DYING_SECONDS = 1.0  # the same in the degraded mode, where it is watched
PROBE_SECONDS = 30.0
OPEN_FILES = 128
CHUNK = 2**16

Cause = Literal["exited", "timed out", "out of memory", "too much output", "no longer needed"]


@dataclass(frozen=True)
class Program:
    """A command to run: `command` is given the folder that `files` lie in, read-only, and the Python interpreter to use. The
    working directory is empty and writable."""

    command: Callable[[str, str], Sequence[str]]
    files: Mapping[str, bytes]
    stdin: bytes = b""
    channel: socket.socket | None = None
    """Open in the program under the same number, and closed here once it has started."""
    output_bytes: int | None = None
    """In place of the limit, for a program that is trusted to print more."""


@dataclass(frozen=True)
class Ending:
    """How a program ended: by itself, with an exit code (128 + n for signal n), or by a limit, and what it printed until then."""

    cause: Cause
    code: int
    stdout: bytes
    stderr: bytes


def run_programs(programs: Sequence[Program], limits: Limits, *, deadline: float, isolation: Isolation) -> list[Ending]:
    """Run all programs at once, each in a sandbox of its own; when the first of them has ended, the others are killed.

    `deadline` is a time of `time.monotonic()`. When this returns (or raises) no process is left, in the degraded mode at least none
    that is found. InputError where `isolation` cannot be had, or where the sandbox does not start.
    """
    require(isolation)
    with ExitStack() as stack:
        running: list[_Running] = []
        for program in programs:
            start = _start_behind_walls if isolation == "bubblewrap" else _start_degraded
            running.append(stack.enter_context(start(program, limits)))
        for program in programs:
            if program.channel is not None:
                program.channel.close()  # so that one end of it sees the other one's end
        _watch(running, limits, deadline)
    return [_ending(box) for box in running]


def require(isolation: Isolation) -> None:
    """InputError, with the remedy, unless programs can be run in this isolation here."""
    reason = obstacle(isolation)
    if reason is None:
        return
    if isolation == "degraded" or obstacle("degraded") is not None:
        raise InputError(f"programs cannot be run here: {reason}")
    raise InputError(
        f"programs must not run without a sandbox, and {reason}; or accept that they reach the network and this machine's "
        "files: run_code(..., isolation='degraded'), or the reward finback.rewards.code_unsandboxed:unit_tests_unsandboxed"
    )


def obstacle(isolation: Isolation) -> str | None:
    """Why programs cannot be run in this isolation here, with the remedy, or None."""
    if sys.platform != "linux":
        return f"it takes Linux, and this is {sys.platform}"
    for tool, package in (("prlimit", "util-linux"), ("setpriv", "util-linux"), ("timeout", "coreutils")):
        if shutil.which(tool, path=bubblewrap.PATH) is None:
            return f"{tool} is not on this machine (Debian, Ubuntu: apt-get install {package})"
    return bubblewrap_obstacle() if isolation == "bubblewrap" else None


@functools.cache
def bubblewrap_obstacle() -> str | None:
    """Why programs cannot be run in bubblewrap here, with the remedy, or None; found by running one, once per process."""
    program = bubblewrap.find_bubblewrap()
    if program is None:
        return "bubblewrap is not installed (Debian, Ubuntu: apt-get install bubblewrap)"
    options = subprocess.run([program, "--help"], capture_output=True, text=True, errors="replace", check=False).stdout
    missing = [option for option in bubblewrap.NEEDED_OPTIONS if option not in options]
    if missing:
        return f"bubblewrap at {program} is too old, it has no {missing[0]}; install 0.8 or newer"
    if Path.home().is_relative_to(bubblewrap.python_home()):
        return f"the Python installation {bubblewrap.python_home()} holds this user's home; use a Python outside it"
    probe = Program(lambda _, python: [python, "-I", "-c", "print(6 * 7)"], {})
    try:
        with _start_behind_walls(probe, Limits()) as box:
            _watch([box], Limits(), time.monotonic() + PROBE_SECONDS)
        ending = _ending(box)
    except InputError as error:
        return f"bubblewrap does not work here ({error}); allow unprivileged user namespaces"
    if ending.stdout != b"42\n":
        words = _last_line(ending.stderr) or ending.cause
        return (
            f"bubblewrap does not work here ({words}); allow unprivileged user namespaces, and a Python that every user can read"
        )
    return None


@dataclass
class _Running:
    """A started program, what it has printed, and how to kill it."""

    process: subprocess.Popen[bytes]
    output_bytes: int
    streams: dict[int, bytearray]
    """By descriptor: standard output, standard error and, behind walls, bubblewrap's status."""
    kill: Callable[[], None]
    status: int | None
    """The descriptor of bubblewrap's status; None in the degraded mode."""
    namespace: int | None = None
    """A descriptor of the first process of its namespace, which ends when the last one has; None until bubblewrap tells its number."""
    cause: Cause = "exited"
    open_streams: set[int] = field(default_factory=set)

    @property
    def walls(self) -> bool:
        return self.status is not None

    @property
    def texts(self) -> list[bytes]:
        return [bytes(text) for text in self.streams.values()]


@contextmanager
def _start_behind_walls(program: Program, limits: Limits) -> Iterator[_Running]:
    user = bubblewrap.private_user()
    with ExitStack() as stack:
        files = {name: stack.enter_context(_sealed(content)) for name, content in program.files.items()}
        stdin = stack.enter_context(_sealed(program.stdin))
        content = bubblewrap.call_filter()
        filter_fd = None if content is None else stack.enter_context(_sealed(content))
        status, status_fd = os.pipe()
        stack.callback(os.close, status)
        inner = [*_limiting(limits, 2 + _others(user)), *program.command(BOX, bubblewrap.python_program())]
        command = bubblewrap.sandbox_command(
            inner, files=files, file_bytes=limits.file_bytes, filter_fd=filter_fd, status_fd=status_fd, user=user
        )
        passed = [*files.values(), status_fd, *([] if filter_fd is None else [filter_fd])]
        try:
            process = _popen(command, program, stdin, passed, user, "/", {"PATH": bubblewrap.PATH})
        finally:
            os.close(status_fd)
        stack.callback(_close_pipes, process)
        box = _running(process, program, limits, status)
        box.kill = lambda: _kill_namespace(box)
        try:
            yield box
        finally:
            _end(box)


@contextmanager
def _start_degraded(program: Program, limits: Limits) -> Iterator[_Running]:
    user = bubblewrap.private_user()
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="finback-program-"))
        stack.callback(_remove, folder)
        box_folder, work = folder / "box", folder / "work"
        box_folder.mkdir()
        work.mkdir(mode=0o700)
        for name, content in program.files.items():
            (box_folder / name).write_bytes(content)
            (box_folder / name).chmod(0o555)
        if user is not None:
            for path in (folder, work):
                os.chown(path, user, user)  # and nobody else's: the tests' program lies in such a folder, too
        stdin = stack.enter_context(_sealed(program.stdin))
        python, prefix = bubblewrap.python_program(), []
        if bubblewrap.needs_borrowing(user) and user is not None:
            python, prefix = bubblewrap.borrowed_python_program(), bubblewrap.borrowing_command(user)
        limiting = _limiting(limits, 1 + _others(user, degraded=True))
        command = [*prefix, *limiting, *program.command(str(box_folder), python)]
        environment = {**ENVIRONMENT, "HOME": str(work), "TMPDIR": str(work)}
        process = _popen(command, program, stdin, [], user, str(work), environment)
        stack.callback(_close_pipes, process)
        box = _running(process, program, limits, None)
        box.kill = lambda: _kill_degraded(box, user)
        try:
            yield box
        finally:
            _end(box)


def _popen(
    command: list[str],
    program: Program,
    stdin: int,
    passed: list[int],
    user: int | None,
    folder: str,
    environment: dict[str, str],
) -> subprocess.Popen[bytes]:
    if program.channel is not None:
        passed = [*passed, program.channel.fileno()]
    becomes = None if bubblewrap.needs_borrowing(user) else user  # the borrowing command changes the user itself
    try:
        return subprocess.Popen(
            command,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            pass_fds=passed,
            cwd=folder,
            env=environment,
            start_new_session=True,
            user=becomes,
            group=becomes,
            extra_groups=None if becomes is None else [],
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise InputError(f"the sandbox did not start ({error}); see finback doctor") from error


def _close_pipes(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


def _running(process: subprocess.Popen[bytes], program: Program, limits: Limits, status: int | None) -> _Running:
    assert process.stdout is not None
    assert process.stderr is not None
    descriptors = [process.stdout.fileno(), process.stderr.fileno(), *([] if status is None else [status])]
    return _Running(
        process=process,
        output_bytes=limits.output_bytes if program.output_bytes is None else program.output_bytes,
        streams={descriptor: bytearray() for descriptor in descriptors},
        kill=process.kill,
        status=status,
        open_streams=set(descriptors),
    )


def _limiting(limits: Limits, other_processes: int) -> list[str]:
    """The command that sets the limits inside; one that this process has already lower stays as it is.

    `timeout` ends a program whose watcher was killed before bubblewrap had tied it to the watcher's life.
    """
    wanted = {
        "nproc": (resource.RLIMIT_NPROC, limits.processes + other_processes),
        "as": (resource.RLIMIT_AS, limits.memory_bytes),
        "fsize": (resource.RLIMIT_FSIZE, limits.file_bytes),
        "nofile": (resource.RLIMIT_NOFILE, OPEN_FILES),
        "core": (resource.RLIMIT_CORE, 0),
    }
    options = []
    for name, (kind, value) in wanted.items():
        ceiling = resource.getrlimit(kind)[1]
        allowed = value if ceiling == resource.RLIM_INFINITY else min(value, ceiling)
        options.append(f"--{name}={allowed}:{allowed}")
    # At the first the process gets a signal that tells its end from others, a second later the one that it cannot catch.
    last = f"{limits.wall_seconds + LAST_WORDS_SECONDS:.3f}"
    return ["timeout", "--signal=KILL", last, "prlimit", *options, f"--cpu={limits.cpu_seconds}:{limits.cpu_seconds + 1}", "--"]


def _others(user: int | None, *, degraded: bool = False) -> int:
    """Threads that the kernel counts with the program's own: those of this user, unless the program has a user of its own.

    Since Linux 5.14 it counts those of a user namespace apart.
    """
    release = re.match(r"(\d+)\.(\d+)", platform.release())
    apart = release is not None and (int(release[1]), int(release[2])) >= (5, 14)
    if user is not None or (apart and not degraded):
        return 0
    return sum(_threads_of_mine(Path("/proc")))


def _threads_of_mine(proc: Path) -> Iterator[int]:
    for entry in proc.iterdir():
        if entry.name.isdigit():
            try:
                if entry.stat().st_uid == os.getuid():
                    yield len(os.listdir(entry / "task"))
            except OSError:
                continue  # it has just ended


@contextmanager
def _sealed(content: bytes) -> Iterator[int]:
    """A descriptor of a file in memory that holds `content` and can no longer be changed."""
    descriptor = os.memfd_create("finback", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        os.lseek(descriptor, 0, os.SEEK_SET)
        fcntl.fcntl(
            descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        )
        yield descriptor
    finally:
        os.close(descriptor)


def _watch(running: Sequence[_Running], limits: Limits, deadline: float) -> None:
    """Read what the programs print until all have ended, and end those that overstep a limit or outlive the first."""
    looked = time.monotonic()
    with selectors.DefaultSelector() as selector:
        for box in running:
            for descriptor in box.open_streams:
                selector.register(descriptor, selectors.EVENT_READ, box)
        while any(box.process.poll() is None for box in running):
            for key, _ in selector.select(WATCH_SECONDS):
                if not _take(key.data, key.fd):
                    selector.unregister(key.fd)
            now = time.monotonic()
            for box in running:
                if box.process.poll() is not None or box.cause != "exited":
                    continue
                if now > deadline:
                    _stop(box, "timed out")
                elif box is not running[0] and running[0].process.poll() is not None:
                    _stop(box, "no longer needed")
                elif now > looked + WATCH_SECONDS and exceeds_memory(_first_process(box), limits.memory_bytes):
                    _stop(box, "out of memory")
            if now > looked + WATCH_SECONDS:
                looked = now
            if now > deadline + LAST_WORDS_SECONDS:
                break  # the kernel holds on to one of them


def _take(box: _Running, descriptor: int) -> bool:
    """Read once; whether there may be more. The first byte over the limit ends the program."""
    chunk = os.read(descriptor, CHUNK)
    if descriptor == box.status:
        box.streams[descriptor] += chunk
        first = _first_process(box)
        if box.namespace is None and first is not None:
            with suppress(ProcessLookupError):  # it has ended
                box.namespace = os.pidfd_open(first)
        if not chunk:
            _wait(box)  # bubblewrap closes it when it ends
    else:
        room = box.output_bytes - sum(len(text) for text in box.texts[:2])
        box.streams[descriptor] += chunk[:room]
        if len(chunk) > room:
            _stop(box, "too much output")
    if not chunk:
        box.open_streams.discard(descriptor)
    return bool(chunk)


def _stop(box: _Running, cause: Cause) -> None:
    if box.cause == "exited":
        box.cause = cause
        box.kill()


def _end(box: _Running) -> None:
    """Kill what is left of the program, wait for it, and read what was still in its pipes."""
    box.kill()
    _wait(box)
    if box.process.poll() is None:
        box.process.kill()
        _wait(box)
    for descriptor in list(box.open_streams):
        os.set_blocking(descriptor, False)
        with suppress(BlockingIOError):  # degraded: something that escaped still holds the pipe
            while _take(box, descriptor):
                pass
        box.open_streams.discard(descriptor)
    if box.namespace is not None:
        _kill_namespace(box)
        select.select([box.namespace], [], [], LAST_WORDS_SECONDS)
        os.close(box.namespace)


def _wait(box: _Running) -> None:
    with suppress(subprocess.TimeoutExpired):
        box.process.wait(LAST_WORDS_SECONDS)


def _first_process(box: _Running) -> int | None:
    """The number of the program's first process; behind walls it is known a moment after the start."""
    return _status(box).get("child-pid") if box.walls else box.process.pid


def _kill_namespace(box: _Running) -> None:
    """Kill the first process of the namespace, and with it all. Bubblewrap itself may have returned before they have ended."""
    if box.namespace is None:
        _kill_group(box)  # which the first process leaves only later
        return
    with suppress(ProcessLookupError):  # it has ended
        signal.pidfd_send_signal(box.namespace, signal.SIGKILL)


def _kill_degraded(box: _Running, user: int | None) -> None:
    """Kill the program's session and, where it had a user of its own, all that this user runs."""
    _kill_group(box)
    if user is not None:
        command = ["kill", "-KILL", "--", "-1"]
        subprocess.run(command, user=user, group=user, extra_groups=[], cwd="/", capture_output=True, check=False)
    give_up = time.monotonic() + DYING_SECONDS
    while _lives(box.process.pid, user) and time.monotonic() < give_up:
        time.sleep(0.002)  # killed is not gone: a fork bomb's processes take a while to end


def _lives(session: int, user: int | None) -> bool:
    """Whether something of this session or user has not ended yet; what waits for its parent to look (a zombie) has."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields, owner = path.read_text("utf-8", "replace").rpartition(")")[2].split(), path.stat().st_uid
        except OSError:
            continue  # it has ended meanwhile
        state, of_session = fields[0], int(fields[3])
        if state not in "ZX" and (of_session == session or (user is not None and owner == user)):
            return True
    return False


def _kill_group(box: _Running) -> None:
    with suppress(ProcessLookupError):  # all of it has ended
        os.killpg(box.process.pid, signal.SIGKILL)


def _status(box: _Running) -> dict[str, int]:
    """What bubblewrap has said so far: `child-pid`, and `exit-code` if the program itself was started and has ended."""
    status: dict[str, int] = {}
    for line in box.texts[2].splitlines(keepends=True):
        if line.endswith(b"\n"):
            status |= json.loads(line)
    return status


def _ending(box: _Running) -> Ending:
    stdout, stderr = box.texts[:2]
    code = box.process.poll()
    if code is None:
        raise InputError("a program does not end although it was killed; the machine may be out of memory or its disk may hang")
    if box.walls:
        started = "exit-code" in _status(box)
        code = _status(box).get("exit-code", code)
        words = _last_line(stderr)
        if box.cause == "exited" and not started and words.startswith(("bwrap:", "unshare:", "mount:", "setpriv:")):
            raise InputError(f"the sandbox did not start ({words}); see finback doctor")
    return Ending(box.cause, code if code >= 0 else 128 - code, stdout, stderr)


def _last_line(text: bytes) -> str:
    lines = text.decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else ""


def _remove(folder: Path) -> None:
    """Remove the folder of a program that may have taken its own permissions from what it left there."""
    for path, folders, _ in os.walk(folder):
        for name in folders:
            if not os.path.islink(os.path.join(path, name)):
                os.chmod(os.path.join(path, name), 0o700)
    shutil.rmtree(folder)
