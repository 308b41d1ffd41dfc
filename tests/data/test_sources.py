"""Documents from files of every kind, and what is said of wrong ones."""

import json
from pathlib import Path

import pytest

from finback.config import InputError
from finback.data.sources import (
    Document,
    documents_from,
    jsonl_documents,
    parquet_documents,
    stdlib_documents,
    text_documents,
)


def test_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeff早上好\r\nline\n".encode())
    assert list(text_documents(tmp_path / "a.txt")) == [Document("早上好\nline\n", "a.txt")]
    (tmp_path / "b.txt").write_bytes("早上".encode("gbk"))
    with pytest.raises(InputError, match=r"b\.txt is not UTF-8 text \(byte 0\)"):
        list(text_documents(tmp_path / "b.txt"))


def test_jsonl(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one\\n\\u4e00\\u2028x"}\n\n{"body": "b", "text": "two"}\n', encoding="utf-8")
    assert [document.text for document in jsonl_documents(file)] == ["one\n一\u2028x", "two"]
    with pytest.raises(InputError, match=r"a\.jsonl, line 1 has no text in field 'body'"):
        list(jsonl_documents(file, "body"))


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (b'{"text": "cut', "line 3 is not valid JSON"),
        (b"\xff\xfe", "line 3 is not valid JSON"),
        (b'["text"]', "line 3 has no text in field 'text'"),
        (b'{"text": 5}', "line 3 has no text in field 'text'"),
        (b'{"text": "a\\ud83d"}', r"line 3 holds half of a surrogate pair \(character 1\)"),
    ],
)
def test_bad_jsonl_lines_are_named(tmp_path: Path, line: bytes, match: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    documents = jsonl_documents(file)
    assert next(documents).text == "fine"
    with pytest.raises(InputError, match=match):
        next(documents)


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "a.parquet"
    texts = [f"text {i} 字" for i in range(2500)]  # more than one batch
    parquet.write_table(pyarrow.table({"text": texts, "n": list(range(2500))}), file, row_group_size=700)
    assert [document.text for document in parquet_documents(file)] == texts
    with pytest.raises(InputError, match="no column 'body'; it has text, n"):
        list(parquet_documents(file, "body"))
    with pytest.raises(InputError, match="row 0: column 'n' holds int, not text"):
        list(parquet_documents(file, "n"))
    whole = file.read_bytes()
    file.write_bytes(whole[:4] + bytes(2000) + whole[2004:])
    with pytest.raises(InputError, match=r"a\.parquet is damaged: "):
        list(parquet_documents(file))
    file.write_bytes(whole[:-20])
    with pytest.raises(InputError, match=r"a\.parquet is not a Parquet file"):
        list(parquet_documents(file))


def test_directories_are_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a"}))
    (tmp_path / "sub" / "c.txt").write_text("c")
    (tmp_path / "fetched.json").write_text("{}")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert [document.text for document in documents_from(tmp_path)] == ["a", "b", "c"]
    assert [document.text for document in documents_from(tmp_path / "b.txt")] == ["b"]
    with pytest.raises(InputError, match=r"suffix '\.png'; give \.txt, \.jsonl or \.parquet"):
        list(documents_from(tmp_path / "picture.png"))
    with pytest.raises(InputError, match="nowhere does not exist"):
        list(documents_from(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty holds no \.txt, \.jsonl or \.parquet file"):
        list(documents_from(tmp_path / "empty"))


def test_stdlib() -> None:
    documents = list(stdlib_documents())
    assert len(documents) > 300
    assert any("def dumps(" in document.text for document in documents)
    assert {document.source for document in documents} == {"python-stdlib"}
