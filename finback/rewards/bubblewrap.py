"""The walls around untrusted programs: a bubblewrap command line, its system call filter, and a user of its own.

Inside there are /usr and the Python installation, read-only; a private /tmp and /dev/shm of limited size; /proc of a process
namespace of its own, with which every process ends; and no network, no environment, no home, nothing else of the machine.

Started as root, the program gets a user id that nothing else has, before bubblewrap makes its namespaces: the kernel exempts
root from RLIMIT_NPROC, and goes by the real user, whatever a user namespace calls him.
"""

import functools
import os
import platform
import secrets
import shutil
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

PATH = "/usr/local/bin:/usr/bin:/bin"
ENVIRONMENT = {"PATH": PATH, "HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8"}
BOX = "/box"
NEEDED_OPTIONS = ("--disable-userns", "--size", "--json-status-fd", "--perms")  # all there since bubblewrap 0.8
BORROWED_MOUNT_POINT = "/mnt"

# Memory that none of the limits counts, and doors into the kernel or into other processes: number on x86-64, on 64-bit ARM
REFUSED_CALLS = {
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "io_uring_setup": (425, 425),
    "userfaultfd": (323, 282),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
}
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_* of linux/audit.h
X32_BIT = 0x40000000  # calls of the x32 ABI, which has numbers of its own


def find_bubblewrap() -> str | None:
    return shutil.which("bwrap")


def python_program() -> str:
    """The interpreter that programs run under: the one that made this process's virtual environment, without its packages."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def borrowed_python_program() -> str:
    return os.path.join(BORROWED_MOUNT_POINT, os.path.relpath(python_program(), python_home()))


def python_home() -> str:
    return os.path.realpath(sys.base_prefix)


def call_filter() -> bytes | None:
    """A seccomp program that refuses REFUSED_CALLS with EPERM and kills callers of another ABI; None on other machines."""
    machine = platform.machine()
    if machine not in ARCHITECTURES:
        return None
    load, equal, bits, answer = 0x20, 0x15, 0x45, 0x06  # BPF: load a word, jump if equal, jump if bits are set, return
    allow, refuse, kill = 0x7FFF0000, 0x00050001, 0x80000000
    numbers = [pair[list(ARCHITECTURES).index(machine)] for pair in REFUSED_CALLS.values()]
    program = [(load, 0, 0, 4), (equal, 1, 0, ARCHITECTURES[machine]), (answer, 0, 0, kill), (load, 0, 0, 0)]
    program.append((bits, len(numbers) + 1, 0, X32_BIT))
    program += [(equal, len(numbers) - index, 0, number) for index, number in enumerate(numbers)]
    program += [(answer, 0, 0, allow), (answer, 0, 0, refuse)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def private_user() -> int | None:
    """A user id that nothing else has, if this process may take one: it is root, and other ids exist where it runs."""
    if os.geteuid() != 0:
        return None
    ends = [int(first) + int(count) for first, _, count in map(str.split, Path("/proc/self/uid_map").read_text().splitlines())]
    if max(ends) >= 2_000_000_000:
        return 1_900_000_000 + secrets.randbelow(100_000_000)  # past the ids that systemd gives to containers
    if max(ends) < 2**16:
        return None
    return max(ends) - 4096 + secrets.randbelow(4000)


def sandbox_command(
    program: Sequence[str], *, files: dict[str, int], file_bytes: int, filter_fd: int | None, status_fd: int, user: int | None
) -> list[str]:
    """The command that runs `program` behind the walls.

    `files` are names under /box and descriptors that their contents are read from; `status_fd` receives bubblewrap's status as
    JSON lines. Where root's own directory hides the Python installation from `user`, the command must start as root: it lends
    the installation to /mnt of a mount namespace of its own and only then becomes `user`.
    """
    home, borrowed = python_home(), needs_borrowing(user)
    walls = [
        *(find_bubblewrap() or "bwrap", "--unshare-all", "--unshare-user", "--disable-userns", "--cap-drop", "ALL"),
        *("--die-with-parent", "--new-session", "--clearenv", "--json-status-fd", str(status_fd)),
        *("--ro-bind", "/usr", "/usr", "--ro-bind-try", "/etc/alternatives", "/etc/alternatives"),
        *("--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"),
    ]
    for name in ("bin", "lib", "lib32", "lib64", "sbin"):
        if os.path.islink(f"/{name}"):
            walls += ["--symlink", os.readlink(f"/{name}"), f"/{name}"]
        elif os.path.isdir(f"/{name}"):
            walls += ["--ro-bind", f"/{name}", f"/{name}"]
    if not _is_below(home, "/usr"):
        walls += ["--ro-bind", BORROWED_MOUNT_POINT if borrowed else home, home]
    walls += ["--proc", "/proc", "--dev", "/dev"]
    for place in ("/dev/shm", "/tmp"):
        walls += ["--size", str(file_bytes), "--perms", "0700", "--tmpfs", place]
    for name, descriptor in files.items():
        walls += ["--perms", "0555", "--ro-bind-data", str(descriptor), f"{BOX}/{name}"]
    walls += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp"]
    for name, value in ENVIRONMENT.items():
        walls += ["--setenv", name, value]
    if filter_fd is not None:
        walls += ["--seccomp", str(filter_fd)]
    prefix = borrowing_command(user) if borrowed and user is not None else ["setpriv", "--pdeathsig", "KILL"]
    return [*prefix, *walls, *program]


def needs_borrowing(user: int | None) -> bool:
    """Whether `user`, an id of its own, cannot reach the Python installation where it lies."""
    return user is not None and not _everyone_reads(python_home())


def borrowing_command(user: int) -> list[str]:
    """What root puts before a command so that it runs as `user`, with the Python installation seen at /mnt, too."""
    become = f"setpriv --reuid {user} --regid {user} --clear-groups --pdeathsig KILL"
    return ["unshare", "--mount", "sh", "-c", f'mount --bind "$0" {BORROWED_MOUNT_POINT} && exec {become} "$@"', python_home()]


@functools.cache
def _everyone_reads(path: str) -> bool:
    folders = [Path(path), *Path(path).parents]
    return all(folder.stat().st_mode & 0o001 for folder in folders) and bool(Path(path).stat().st_mode & 0o004)


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")
