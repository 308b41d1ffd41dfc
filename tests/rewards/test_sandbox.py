"""The hostile battery: what a program may try, each within its deadline, and nothing left of it."""

import contextlib
import dataclasses
import os
import pwd
import socket
import subprocess
import sys
import sysconfig
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from finback.config import InputError
from finback.rewards import bubblewrap, sandbox, sandbox_memory
from finback.rewards.sandbox import Ending, Program, bubblewrap_obstacle, run_programs
from finback.rewards.sandbox_config import Limits

ROOT = Path(__file__).parents[2]
GRACE_SECONDS = 20.0  # for a machine under load; the sandbox itself takes a tenth of a second
SMALL = Limits(wall_seconds=60.0, cpu_seconds=5, memory_bytes=2**27, processes=16, output_bytes=10_000, file_bytes=2**20)
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture
def walls() -> None:
    obstacle = bubblewrap_obstacle()
    if obstacle:
        pytest.skip(obstacle)


def run(source: str, limits: Limits = SMALL, *, isolation: str = "bubblewrap", stdin: bytes = b"") -> Ending:
    """Run a Python program, and see that it keeps its deadline and that no process of it is left."""
    marker = f"hostile-{uuid.uuid4().hex}.py"
    program = Program(lambda box, python: [python, "-I", f"{box}/{marker}"], {marker: source.encode()}, stdin=stdin)
    begin = time.monotonic()
    (ending,) = run_programs([program], limits, deadline=begin + limits.wall_seconds, isolation=isolation)
    assert time.monotonic() - begin < limits.wall_seconds + GRACE_SECONDS
    assert processes_named(marker) == []
    return ending


def processes_named(marker: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        found += [str(path)] if any(marker.encode() in word for word in words) else []
    return found


def with_wall(seconds: float) -> Limits:
    return dataclasses.replace(SMALL, wall_seconds=seconds)


# What a program gets


@pytest.mark.usefixtures("walls")
def test_a_program_reads_its_input_and_ends_as_it_likes():
    ending = run("import sys\nprint(sys.stdin.read()[::-1])\nprint('x', file=sys.stderr)\nsys.exit(3)", stdin="aé".encode())
    assert ending == Ending("exited", 3, "éa\n".encode(), b"x\n")
    assert run("import os\nos.kill(os.getpid(), 15)").code == 128 + 15


@pytest.mark.usefixtures("walls")
def test_the_program_sees_no_more_than_it_needs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FINBACK_SECRET", "token-1234")
    ending = run("""
import glob, os
print(sorted(os.environ), os.listdir('/tmp'), os.listdir('/dev/shm'), os.listdir('/box') != [])
print([int(os.path.basename(path)) for path in glob.glob('/proc/[0-9]*')])
print([fd for fd in range(3, 64) if os.path.exists(f'/proc/self/fd/{fd}')])
print(open('/proc/net/dev').read().count(':'), os.cpu_count() > 0)
for path in glob.glob('/proc/*/environ') + glob.glob('/proc/*/cmdline'):
    try:
        print(open(path).read().replace(chr(0), ' '))
    except OSError:
        print('refused', path)
""")
    lines = ending.stdout.decode().splitlines()
    assert lines[0] == "['HOME', 'LANG', 'PATH', 'PWD', 'TMPDIR'] [] [] True"
    assert lines[1:4] == ["[1, 2, 3]", "[]", "1 True"]
    assert "token-1234" not in ending.stdout.decode()


@pytest.mark.usefixtures("walls")
def test_files_of_this_machine_are_out_of_reach():
    home = pwd.getpwuid(os.getuid()).pw_dir
    secrets = ["/etc/shadow", "/etc/passwd", "/etc/hostname", __file__, str(ROOT / "pyproject.toml"), f"{home}/.bashrc"]
    ending = run(f"""
import os
for path in {secrets!r}:
    for trick in (lambda: open(path).read(), lambda: os.symlink(path, '/tmp/s') or open('/tmp/s').read(),
                  lambda: os.link(path, '/tmp/h'), lambda: open('/proc/1/root' + path).read(), lambda: os.listdir(path)):
        try:
            print(path, trick())
        except OSError:
            pass
        if os.path.islink('/tmp/s'):
            os.unlink('/tmp/s')
print('tried')
""")
    assert ending.stdout == b"tried\n"


@pytest.mark.usefixtures("walls")
def test_nothing_can_be_written_but_the_private_folders():
    mine = f"/tmp/{uuid.uuid4().hex}"
    ending = run(f"""
import os
for path in ('{mine}', '/x', '/usr/x', '/usr/bin/x', '/etc/x', '/box/x', '/dev/x', '/dev/shm/x', 'x', '/proc/sys/kernel/core_pattern',
             '/root/x', '/home/x', '/var/tmp/x', '/run/x'):
    try:
        open(path, 'w').write('x')
        print(path)
    except OSError:
        pass
for action in (lambda: os.link('/usr/bin/env', '/tmp/env'), lambda: os.chmod('/usr/bin/env', 0o777), lambda: os.setuid(0),
               lambda: os.chroot('/tmp'), lambda: os.mkdir('/tmp/d') or os.rename('/box', '/tmp/d'), lambda: os.nice(-5)):
    try:
        print('done', action())
    except OSError:
        pass
""")
    assert ending.stdout.decode().split() == [mine, "/dev/shm/x", "x"]
    assert not Path(mine).exists()


@pytest.mark.usefixtures("walls")
def test_there_is_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        ending = run(f"""
import socket
for address in (('127.0.0.1', {server.getsockname()[1]}), ('192.0.2.1', 80), ('8.8.8.8', 53)):
    try:
        socket.create_connection(address, 3)
        print('connected', address)
    except OSError as error:
        print(type(error).__name__)
try:
    print(socket.getaddrinfo('example.org', 80))
except OSError:
    print('no names')
""")
        with pytest.raises(TimeoutError):
            server.accept()
    assert ending.stdout.decode().split("\n") == ["ConnectionRefusedError", "OSError", "OSError", "no names", ""]


@pytest.mark.usefixtures("walls")
def test_doors_into_the_kernel_are_shut():
    ending = run("""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
for name, arguments in (('unshare', (0x10000000,)), ('unshare', (0x20000,)), ('mount', (b'a', b'/tmp', b'tmpfs', 0, None)),
                        ('ptrace', (16, 1, 0, 0)), ('shmget', (0, 1000, 0o1600)), ('memfd_create', (b'a', 0)),
                        ('umount2', (b'/tmp', 2))):
    print(name, getattr(libc, name)(*arguments))
print(open('/proc/self/status').read().count('CapEff:\\t0000000000000000'))
""")
    assert [line.split()[-1] for line in ending.stdout.decode().splitlines()] == ["-1"] * 7 + ["1"]


# Limits


LOOPS = {
    "python": "while True: pass",
    "regular expression": "import re\nre.match(r'(a+)+$', 'a' * 64 + 'b')",
    "sleep": "import time\ntime.sleep(1000)",
    "signals ignored": "import signal, time\n[signal.signal(s, signal.SIG_IGN) for s in (1, 2, 15, 24)]\ntime.sleep(1000)",
    "reading": "import os\nos.read(os.pipe()[0], 1)",
    "closed descriptors": "import os, time\nos.closerange(0, 256)\ntime.sleep(1000)",
    "threads that never end": "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()",
    "fork bomb": "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
}


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.usefixtures("walls")
def test_the_clock_ends_a_program(name: str):
    assert run(LOOPS[name], with_wall(0.8)).cause == "timed out"


@pytest.mark.usefixtures("walls")
def test_cpu_seconds_end_a_program():
    limits = dataclasses.replace(SMALL, cpu_seconds=1)
    assert run("while True: pass", limits) == Ending("exited", 128 + 24, b"", b"")


@pytest.mark.slow
@pytest.mark.usefixtures("walls")
def test_cpu_seconds_end_a_program_that_ignores_the_signal():
    limits = dataclasses.replace(SMALL, cpu_seconds=1)
    assert run("import signal\nsignal.signal(24, signal.SIG_IGN)\nwhile True: pass", limits).code == 128 + 9


@pytest.mark.usefixtures("walls")
def test_processes_and_threads_are_counted_whoever_starts_them():
    """Started as root this is the case that a user namespace alone does not hold."""
    source = (
        "import os, time\nstarted = 0\ntry:\n  while started < 100:\n    if os.fork() == 0: time.sleep(1000)\n    started += 1\n"
    )
    ending = run(source + "except BlockingIOError:\n  print(started)\n")
    assert int(ending.stdout) == SMALL.processes - 1
    source = "import threading\nstop, started = threading.Event(), 0\ntry:\n  while started < 100:\n"
    source += "    threading.Thread(target=stop.wait, daemon=True).start()\n    started += 1\n"
    ending = run(source + "except RuntimeError:\n  print(started)\n", dataclasses.replace(SMALL, memory_bytes=2**32))
    assert int(ending.stdout) == SMALL.processes - 1


@pytest.mark.usefixtures("walls")
def test_processes_that_were_not_waited_for_count_too():
    ending = run("import os\nfor _ in range(100):\n  if os.fork() == 0: os._exit(0)\n")
    assert ending.cause == "exited"
    assert b"BlockingIOError" in ending.stderr


@pytest.mark.parametrize("source", ["bytearray(10**9)", "import mmap\nmmap.mmap(-1, 10**9)", "x = [0]\nwhile True: x += x"])
@pytest.mark.usefixtures("walls")
def test_memory_of_one_process_ends(source: str):
    ending = run(source)
    assert ending.code == 1
    assert ending.stderr.endswith((b"MemoryError\n", b"Cannot allocate memory\n"))


HOARDERS = "import os, time\nfor _ in range(3): os.fork()\nmemory = bytearray(40 * 2**20)\nmemory.count(1)\ntime.sleep(1000)"


@pytest.mark.usefixtures("walls")
def test_memory_of_all_processes_together_ends():
    assert run(HOARDERS).cause == "out of memory"


@pytest.mark.usefixtures("walls")
def test_memory_that_processes_share_counts_once():
    source = (
        "import os, time\nmemory = b'x' * (70 * 2**20)\nfor _ in range(2): os.fork()\ntime.sleep(0.5)\nprint(len(memory) > 0)"
    )
    assert run(source).cause == "exited"


def test_memory_is_counted_as_the_kernel_does():
    mine = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    assert sandbox_memory.exceeds_memory(os.getpid(), mine // 4)
    assert not sandbox_memory.exceeds_memory(os.getpid(), mine * 100)
    assert not sandbox_memory.exceeds_memory(None, 0)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.usefixtures("walls")
def test_output_ends(stream: str):
    ending = run(f"import sys\nwhile True: print('x' * 999, file=sys.{stream})")
    assert ending.cause == "too much output"
    assert len(ending.stdout) + len(ending.stderr) == SMALL.output_bytes
    exact = run(f"import sys\nsys.{stream}.write('x' * {SMALL.output_bytes})")
    assert (exact.cause, len(exact.stdout) + len(exact.stderr)) == ("exited", SMALL.output_bytes)
    assert run(f"import sys\nsys.{stream}.write('x' * {SMALL.output_bytes + 1})").cause == "too much output"


@pytest.mark.usefixtures("walls")
def test_files_end():
    one = run("open('/tmp/a', 'wb').write(bytes(10**8))")
    assert b"File too large" in one.stderr
    many = run("for i in range(1000): open(f'/tmp/{i}', 'wb').write(bytes(2**16))")
    assert b"No space left" in many.stderr
    assert b"Too many open files" in run("files = [open('/usr/bin/env') for _ in range(1000)]").stderr


# What outlives a program elsewhere


@pytest.mark.usefixtures("walls")
def test_a_daemon_dies_with_the_program():
    """It left its session and its parent, and holds the output open."""
    source = "import os, time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0:\n    time.sleep(1000)\n  os._exit(0)\n"
    ending = run(source + "os.wait()\nprint('done')")
    assert (ending.cause, ending.code, ending.stdout) == ("exited", 0, b"done\n")


@pytest.mark.usefixtures("walls")
def test_signals_reach_nobody_outside():
    ending = run("""
import os, signal
for process in (1, os.getppid(), -1, 0):
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            if process:
                os.kill(process, number)
        except OSError:
            pass
print('alive')
""")
    assert ending.cause == "exited"
    assert ending.stdout in (b"", b"alive\n")  # it can end its own sandbox, and does


@pytest.mark.usefixtures("walls")
def test_programs_at_the_same_time_do_not_meet():
    source = "import os, time\nopen('/tmp/mark', 'x').close()\ntime.sleep(0.3)\nprint(len(os.listdir('/tmp')), os.getpid())"
    with ThreadPoolExecutor(6) as pool:
        endings = list(pool.map(run, [source] * 6))
    assert [ending.stdout for ending in endings] == [b"1 3\n"] * 6


def start_worker(marker: str, wall_seconds: float) -> subprocess.Popen[bytes]:
    """A process that runs a sleeping program of that name."""
    script = f"""
import time
from finback.rewards.sandbox import Program, run_programs
from finback.rewards.sandbox_config import Limits
program = Program(lambda box, python: [python, "-I", box + "/{marker}"], {{"{marker}": b"import time; time.sleep(1000)"}})
run_programs([program], Limits(wall_seconds={wall_seconds}), deadline=time.monotonic() + 1000, isolation="bubblewrap")
"""
    return subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.usefixtures("walls")
def test_the_sandbox_dies_with_this_process():
    """A reward worker that is killed takes its programs with it."""
    marker = f"hostile-{uuid.uuid4().hex}.py"
    worker = start_worker(marker, 1000.0)
    try:
        assert wait_until(lambda: python_runs(marker)), "the program did not start"
    finally:
        worker.kill()
        worker.wait()
    assert wait_until(lambda: processes_named(marker) == [])


@pytest.mark.slow
@pytest.mark.usefixtures("walls")
def test_a_worker_killed_while_it_starts_a_program_leaves_none_for_long():
    for delay in range(12):
        marker = f"hostile-{uuid.uuid4().hex}.py"
        worker = start_worker(marker, 2.0)
        assert wait_until(lambda: processes_named(marker) != [])  # noqa: B023
        time.sleep(delay * 0.002)
        worker.kill()
        worker.wait()
        assert wait_until(lambda: processes_named(marker) == [])  # noqa: B023


def python_runs(marker: str) -> bool:
    for path in processes_named(marker):
        with contextlib.suppress(
            FileNotFoundError, ProcessLookupError
        ):  # it has ended meanwhile, as those before bubblewrap's do
            if Path(path).read_bytes().split(b"\0")[0].decode() == bubblewrap.python_program():
                return True
    return False


def wait_until(condition, seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@pytest.mark.usefixtures("walls")
def test_nothing_is_left_open():
    run("print(1)")
    before = os.listdir("/proc/self/fd")
    for limits in (SMALL, with_wall(0.1)):
        run("import time; time.sleep(0.3)", limits)
    assert os.listdir("/proc/self/fd") == before


# Users, and machines where it does not work


@ROOT_ONLY
@pytest.mark.usefixtures("walls")
def test_an_ordinary_user_has_the_same_walls():
    """A process that is not root starts programs; those of its own user outside do not count."""
    if not all(folder.stat().st_mode & 0o001 for folder in (ROOT, *ROOT.parents)):
        pytest.skip("other users cannot read this repository")
    user = 65_000
    script = f"""
import sys, time
sys.path[:0] = [{str(ROOT)!r}, {sysconfig.get_path("purelib")!r}]
from finback.rewards.sandbox import Program, bubblewrap_obstacle, run_programs
from finback.rewards.sandbox_config import Limits
print(bubblewrap_obstacle())
for source in (b"import os; print(os.getuid())", b'''import os, time
for started in range(100):
    try:
        if os.fork() == 0: time.sleep(1000)
    except BlockingIOError:
        print(started)
        break
''', b"import time; time.sleep(1000)"):
    program = Program(lambda box, python: [python, "-I", box + "/a.py"], {{"a.py": source}})
    print(run_programs([program], Limits(wall_seconds=5, processes=8), deadline=time.monotonic() + 5, isolation="bubblewrap"))
"""
    python = bubblewrap.python_program()
    prefix = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
    if bubblewrap.needs_borrowing(user):
        python, prefix = bubblewrap.borrowed_python_program(), bubblewrap.borrowing_command(user)
    done = subprocess.run([*prefix, python, "-I", "-c", script], cwd="/", capture_output=True, text=True, check=False)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0] == "None"
    assert "65000" in lines[1]
    assert "stdout=b'7\\n'" in lines[2]
    assert "cause='timed out'" in lines[3]


def test_a_user_of_its_own_only_for_root(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert bubblewrap.private_user() is None
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    for mapping, low, high in (("0 0 4294967295\n", 1_900_000_000, 2_000_000_000), ("0 100000 65536\n", 61_440, 65_533)):
        monkeypatch.setattr(Path, "read_text", lambda _, mapping=mapping: mapping)
        users = {bubblewrap.private_user() for _ in range(50)}
        assert len(users) > 20
        assert low <= min(users) <= max(users) < high
    monkeypatch.setattr(Path, "read_text", lambda _: "0 1000 1\n")
    assert bubblewrap.private_user() is None


@pytest.mark.parametrize(
    ("machine", "refused", "allowed"),
    [("x86_64", 319, 39), ("aarch64", 279, 172), ("x86_64", 101, 0), ("x86_64", 0x40000000, 1), ("aarch64", 117, 63)],
)
def test_the_call_filter_by_hand(monkeypatch: pytest.MonkeyPatch, machine: str, refused: int, allowed: int):
    """The filter is interpreted here as the kernel does it: memfd_create and ptrace are refused, getpid and read are not."""
    monkeypatch.setattr("platform.machine", lambda: machine)
    program = bubblewrap.call_filter()
    architecture = bubblewrap.ARCHITECTURES[machine]
    assert interpret(program, refused, architecture) == 0x00050001
    assert interpret(program, allowed, architecture) == 0x7FFF0000
    assert interpret(program, allowed, 0x40000003) == 0x80000000  # the 32-bit ABI


def interpret(program: bytes, number: int, architecture: int) -> int:
    place, word = 0, 0
    while True:
        code = int.from_bytes(program[place * 8 : place * 8 + 2], sys.byteorder)
        yes, no = program[place * 8 + 2], program[place * 8 + 3]
        value = int.from_bytes(program[place * 8 + 4 : place * 8 + 8], sys.byteorder)
        place += 1
        if code == 0x20:
            word = {0: number, 4: architecture}[value]
        elif code == 0x06:
            return value
        else:
            place += yes if (word == value if code == 0x15 else word & value) else no


def test_an_unknown_machine_has_no_filter(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert bubblewrap.call_filter() is None


def obstacle_with(monkeypatch: pytest.MonkeyPatch, path: Path) -> str | None:
    monkeypatch.setattr(bubblewrap, "find_bubblewrap", lambda: str(path) if path.exists() else None)
    return bubblewrap_obstacle.__wrapped__()


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (None, "bubblewrap is not installed"),
        ("echo --size", "too old, it has no --disable-userns; install 0.8 or newer"),
        (
            "[ $1 = --help ] && echo --disable-userns --size --json-status-fd --perms || echo 'bwrap: No permissions' >&2",
            "bubblewrap does not work here (",
        ),
    ],
)
def test_why_there_is_no_sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, words: str):
    path = tmp_path / "bwrap"
    if script:
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        tmp_path.chmod(0o755)
    assert words in obstacle_with(monkeypatch, path)


def test_without_a_sandbox_nothing_runs_by_default(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandbox, "bubblewrap_obstacle", lambda: "bubblewrap is not installed")
    with pytest.raises(InputError, match=r"must not run without a sandbox, and bubblewrap is not installed; or accept"):
        run("print(1)")


# The degraded mode


def test_degraded_programs_run_in_a_folder_that_is_removed():
    ending = run("import os\nprint(os.getcwd(), sorted(os.environ))\nos.makedirs('a/b')\nos.chmod('a', 0)", isolation="degraded")
    folder, _, environment = ending.stdout.decode().partition(" ")
    assert environment == "['HOME', 'LANG', 'PATH', 'PWD', 'TMPDIR']\n"
    assert "finback-program-" in folder
    assert not Path(folder).parent.exists()


@pytest.mark.parametrize("name", ["python", "sleep", "fork bomb"])
def test_degraded_programs_keep_their_deadline(name: str):
    assert run(LOOPS[name], with_wall(0.8), isolation="degraded").cause == "timed out"


def test_degraded_output_and_memory_end():
    assert run("while True: print('x' * 999)", isolation="degraded").cause == "too much output"
    assert b"MemoryError" in run("bytearray(10**9)", isolation="degraded").stderr


@ROOT_ONLY
def test_degraded_root_becomes_nobody_and_leaves_nothing():
    source = "import os, time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0: time.sleep(1000)\n  os._exit(0)\n"
    ending = run(source + "os.wait()\nprint(os.getuid())\nopen('/etc/shadow')", isolation="degraded")
    assert int(ending.stdout) > 60_000
    assert b"PermissionError" in ending.stderr


# Limits are checked


@pytest.mark.parametrize(
    ("field", "value"),
    [("wall_seconds", 0.0), ("wall_seconds", float("inf")), ("cpu_seconds", 0), ("memory_bytes", -1), ("processes", True)],
)
def test_bad_limits_are_named(field: str, value: float):
    with pytest.raises(InputError, match=rf"limits: {field} is {value!r}; it must be"):
        Limits(**{field: value})
