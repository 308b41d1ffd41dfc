"""The documentation says what is: its links, names, verbs, options, tables and examples are held against the code."""

import ast
import contextlib
import functools
import io
import json
import re
import shlex
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from finback import cli
from finback.commands.doctor import QUICKSTART_DISK_BYTES, QUICKSTART_MEMORY_BYTES
from finback.config import ModelConfig, count_params
from finback.data.problems import generate_problems
from finback.data.tokenizer import save_tokenizer, train_tokenizer
from finback.model.checkpoint import save
from finback.model.transformer import Transformer, init_weights
from finback.presets import nano
from finback.recipes.config import QuickstartConfig
from tests.test_import_rules import PURE, ROOMS

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README.zh.md")
DOCUMENTS = sorted(str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")) if path.is_file())
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"(!?)\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^(#+) (.+)$", re.MULTILINE)
MACHINE_PATH = re.compile(r"(?<![\w.~/-])/(?:work|tmp|root|home|mnt|opt|srv|Users)(?![\w-])")
CITATION = re.compile(r"\b(?:V[23]|R1) (?:section|equation|appendix)")
MARKERS = ("quickstart", "bench")


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def prose(text: str) -> str:
    """The text without its code blocks."""
    return FENCE.sub("", text)


def spans(text: str) -> list[str]:
    return SPAN.findall(prose(text))


def blocks(text: str, language: str) -> list[str]:
    return [code for name, code in FENCE.findall(text) if name == language]


def code_words(code: str) -> list[str]:
    """Lines of a code block without comments and indentation at the end; those are translated."""
    return [re.split(r"\s*#\s", line)[0].rstrip() for line in code.splitlines()]


def sections(text: str) -> list[str]:
    """The text cut before each heading; headings inside code blocks are none."""
    hidden = FENCE.sub(lambda found: found[0].replace("\n#", "\n\0"), text)
    return [part.replace("\0", "#") for part in re.split(r"^(?=#+ )", hidden, flags=re.MULTILINE)]


def between(text: str, marker: str) -> str:
    begin, end = f"<!-- {marker}:begin -->", f"<!-- {marker}:end -->"
    assert text.count(begin) == text.count(end) == 1, f"the markers of {marker} must stand once"
    return text.partition(begin)[2].partition(end)[0].strip()


def anchors(text: str) -> set[str]:
    """What a heading is called in a link, as GitHub makes it."""
    titles = (title.lower() for _, title in HEADING.findall(prose(text)))
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


# Links


def broken_links(document: Path, text: str) -> list[str]:
    """Targets of relative links in `text`, which stands in `document`, that lead nowhere; pictures apart."""
    broken = []
    for picture, target in LINK.findall(SPAN.sub("", prose(text))):
        if picture or re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = document.parent / name if name else document
        if not file.exists() or (anchor and anchor not in anchors(text if file == document else file.read_text("utf-8"))):
            broken.append(target)
    return broken


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_relative_link_resolves(document: str) -> None:
    assert broken_links(ROOT / document, read(document)) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("# A title, `here`\n", encoding="utf-8")
    text = "[a](there.md) [b](there.md#a-title-here) [c](gone.md) [d](there.md#gone) [e](https://example.org) `[f](gone)`\n"
    assert broken_links(tmp_path / "page.md", text) == ["gone.md", "there.md#gone"]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_no_path_of_somebodys_machine(document: str) -> None:
    assert MACHINE_PATH.findall(read(document)) == []


def test_a_path_of_a_machine_is_found() -> None:
    assert MACHINE_PATH.findall("see /home/x, (/tmp/y) and `/work/z`") == ["/home", "/tmp", "/work"]
    assert not MACHINE_PATH.search("docs/home/x, ~/tmp/x and /workshop")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_is_named_exists(document: str) -> None:
    named = [span.partition(":")[0] for span in spans(read(document)) if re.match(r"(?:finback|tests|docs|bench)/", span)]
    assert [name for name in named if not (ROOT / name).exists()] == []


# The paper map


def defined_names(path: Path) -> set[str]:
    """Functions, classes and variables of a module, and those of its classes as Class.name."""
    return set(_names(ast.parse(path.read_text(encoding="utf-8")).body, ""))


def _names(body: list[ast.stmt], prefix: str) -> list[str]:
    found = []
    for node in body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                found.append(prefix + name)
            case ast.ClassDef(name=name):
                found += [prefix + name, *_names(node.body, f"{prefix}{name}.")]
            case ast.Assign(targets=targets):
                found += [prefix + target.id for target in targets if isinstance(target, ast.Name)]
            case ast.AnnAssign(target=ast.Name(id=name)):
                found.append(prefix + name)
    return found


def missing_names(text: str) -> list[str]:
    """Entries `path.py:name` of `text` whose file or name does not exist."""
    missing = []
    for entry in spans(text):
        file, _, name = entry.partition(":")
        if file.startswith("finback/") and (not (ROOT / file).is_file() or name not in defined_names(ROOT / file)):
            missing.append(entry)
    return missing


def test_every_name_of_the_paper_map_exists() -> None:
    assert missing_names(read("docs/paper_map.md")) == []


def test_a_wrong_name_in_the_paper_map_is_found() -> None:
    right = "`finback/model/mla.py:MLA.forward` `finback/ops/router.py:select_experts` `finback/model/mla.py:LATENT_NORM_EPS`"
    wrong = ["finback/model/mla.py:MLA.backward", "finback/ops/router.py:MLA", "finback/ops/gone.py:x", "finback/ops/norm.py"]
    assert missing_names(right + " ".join(f"`{entry}`" for entry in wrong)) == wrong


def test_every_module_that_cites_a_paper_is_in_the_paper_map() -> None:
    text = read("docs/paper_map.md")
    modules = {path.relative_to(ROOT) for path in (ROOT / "finback").rglob("*.py") if CITATION.search(path.read_text("utf-8"))}
    assert len(modules) > 10
    assert sorted(str(module) for module in modules if f"`{module}:" not in text) == []


def test_every_equation_is_in_the_paper_map() -> None:
    first_cells = (line.split("|")[1] for line in read("docs/paper_map.md").splitlines() if line.startswith("| eq"))
    named: set[int] = set()
    for cell in first_cells:
        numbers = [int(number) for number in re.findall(r"\d+", cell)]
        named |= set(range(numbers[0], numbers[1] + 1)) if " to " in cell else set(numbers)
    assert named == set(range(1, 26))


# The architecture page and the tree of the READMEs


def test_the_import_table_is_the_one_that_is_enforced() -> None:
    (table,) = [code for code in blocks(read("docs/architecture.md"), "text") if "->" in code]
    rows = dict(re.split(r"\s*->\s*", line, maxsplit=1) for line in table.splitlines())
    written = {room: set() if allowed == "nothing of ours" else set(allowed.split(", ")) for room, allowed in rows.items()}
    for room, allowed in written.items():
        if room == "parallel" or "parallel" in allowed:
            allowed |= set(PURE)  # the room and its two pure modules
    everything = {"recipes", "claims", "presets", "commands", "cli", "root", "__main__"}
    assert written == {room: set(allowed) for room, allowed in ROOMS.items() if room not in everything}


@pytest.mark.parametrize("document", READMES)
def test_the_tree_names_what_exists(document: str) -> None:
    (tree,) = [code for code in blocks(read(document), "text") if code.startswith("finback/")]
    folder, paths = "", []
    for line in code_words(tree):
        name = line.strip()
        paths.append(folder + name if line.startswith(" ") else name)
        folder = name if not line.startswith(" ") else folder
    assert [path for path in paths if not (ROOT / path).exists()] == []
    rooms = {f"finback/{path.name}/" for path in (ROOT / "finback").iterdir() if (path / "__init__.py").is_file()}
    assert rooms <= set(paths)


# The two READMEs


def test_readmes_have_the_same_shape() -> None:
    english, chinese = (read(document) for document in READMES)
    levels = [[len(marks) for marks, _ in HEADING.findall(prose(text))] for text in (english, chinese)]
    assert levels[0] == levels[1]
    pairs = list(zip(sections(english), sections(chinese), strict=True))
    assert len(pairs) > 8
    for one, other in pairs:
        where = f"{one.splitlines()[:1]} and {other.splitlines()[:1]}"
        assert [name for name, _ in FENCE.findall(one)] == [name for name, _ in FENCE.findall(other)], where
        assert [code_words(code) for _, code in FENCE.findall(one)] == [code_words(code) for _, code in FENCE.findall(other)], (
            where
        )
        assert set(spans(one)) == set(spans(other)), where
        links = [{target for _, target in LINK.findall(part) if not target.startswith(("#", "README"))} for part in (one, other)]
        assert links[0] == links[1], where
        assert [marker in one for marker in MARKERS] == [marker in other for marker in MARKERS], where


def test_the_numbers_of_the_quickstart_are_those_of_the_code() -> None:
    defaults, memory, disk = QuickstartConfig(), QUICKSTART_MEMORY_BYTES / 1e9, QUICKSTART_DISK_BYTES / 1e9
    assert defaults.tokens == 3_000_000
    assert round(count_params(nano().model).active / 1e6) == 1
    for document, tokens, parameters in (
        ("README.md", "on 3 million tokens", "one million active parameters"),
        ("README.zh.md", "300 万个 token", "激活参数约一百万"),
    ):
        text = read(document)
        for words in (tokens, parameters, f"{defaults.vocab_size:,}", f"{memory:.0f} GB", f"{disk:.0f} GB"):
            assert words in text, f"{document} does not say {words}"


def test_readmes_link_to_each_other() -> None:
    assert "(README.zh.md)" in read("README.md")
    assert "(README.md)" in read("README.zh.md")


@pytest.mark.parametrize("marker", MARKERS)
def test_measured_parts_of_the_readmes_are_filled_and_agree(marker: str) -> None:
    parts = [between(read(document), marker) for document in READMES]
    assert all(parts), f"{marker} has no content between its markers"
    numbers = [re.findall(r"\d(?:[\d,.]*\d)?", part) for part in parts]
    assert numbers[0] == numbers[1] != []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_picture_is_there(document: str) -> None:
    pictures = [target for picture, target in LINK.findall(prose(read(document))) if picture]
    assert [target for target in pictures if not (ROOT / document).parent.joinpath(target).is_file()] == []


# Commands


def commands(lines: Iterable[str]) -> list[list[str]]:
    """The words of every `finback ...` in shell lines."""
    parts = (part for line in lines for part in line.split(" | "))
    return [shlex.split(part, comments=True) for part in parts if part.startswith("finback ")]


def shell_commands(text: str) -> list[list[str]]:
    """Those of the shell blocks of a page."""
    return commands(line for code in blocks(text, "bash") for line in code.replace("\\\n", " ").splitlines())


@functools.cache
def help_text(*words: str) -> str:
    page = io.StringIO()
    with contextlib.redirect_stdout(page), contextlib.suppress(SystemExit):
        cli.main([*words, "--help"])
    return page.getvalue()


def unknown_words(text: str) -> list[str]:
    """Verbs and options in the commands and code spans of `text` that the program does not have."""
    unknown = []
    for _, *words in (*shell_commands(text), *commands(spans(text))):
        if words[0] not in cli.VERBS and words[0] not in ("VERB", "--help", "--version"):
            unknown.append(words[0])
        elif words[0] in cli.VERBS:
            unknown += [word for word in words if word.startswith("--") and not _is_option(word, help_text(words[0]))]
    every = "".join(help_text(verb) for verb in cli.VERBS)
    unknown += [span for span in spans(text) if span.startswith("--") and not _is_option(span.split()[0], every)]
    return unknown


def _is_option(word: str, page: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(word.partition('=')[0])}(?![\w.-])", page) is not None


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_verb_and_option_exists(document: str) -> None:
    assert unknown_words(read(document)) == []


def test_a_wrong_verb_or_option_is_found() -> None:
    block = "```bash\nfinback doctor --jsonn  # x\nx | finback chatt y\n```\n"
    text = f"`finback pretran tiny` `finback pretrain --lr 1` `--seeed`\n{block}"
    assert unknown_words(text) == ["--jsonn", "chatt", "pretran", "--seeed"]


# Examples


@pytest.fixture
def run_directory(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of an example; runs/quickstart/final in it is a model with its tokenizer, as a quickstart leaves it, and
    models/smollm2 one to fetch."""
    for directory in ("runs/quickstart/final", "models/smollm2"):
        shutil.copytree(small_model, tmp_path / directory)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("examples")
    tokenizer = train_tokenizer((problem.text for problem in generate_problems(400)), 512)
    save_tokenizer(tokenizer, directory / "tokenizer")
    config = ModelConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        n_routed_experts=8,
        num_experts_per_tok=2,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        max_position_embeddings=1024,
        n_group=2,
        topk_group=1,
        num_nextn_predict_layers=1,
    )
    model = Transformer(config, dtype=torch.float32)
    init_weights(model, seed=0)
    save(model, directory / "final", tokenizer_from=directory / "tokenizer")
    return directory / "final"


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        *(f"docs/howto/{name}.md" for name in ("evaluate", "load-and-convert", "rewards", "run-the-engine", "students")),
    ],
)
@pytest.mark.usefixtures("run_directory")
def test_python_examples_run(document: str) -> None:
    """Those of a page are one session."""
    examples = blocks(read(document), "python")
    assert examples
    namespace = {"__name__": "example"}
    for example in examples:
        exec(compile(example, document, "exec"), namespace)


@pytest.mark.parametrize("name", ["load-and-convert", "gguf"])
@pytest.mark.usefixtures("run_directory")
def test_shell_examples_run(name: str) -> None:
    examples = [words for _, *words in shell_commands(read(f"docs/howto/{name}.md"))]
    assert "convert" in {words[0] for words in examples} <= {"generate", "convert"}
    for words in examples:
        if "-" not in words:  # that one reads standard input
            assert cli.main(words) == 0


@pytest.mark.usefixtures("run_directory")
def test_the_page_on_rewards_runs() -> None:
    """Its commands, after the program that writes their files."""
    text = read("docs/howto/rewards.md")
    exec(compile(next(code for code in blocks(text, "python") if "mine.py" in code), "rewards.md", "exec"), {})
    examples = [words for _, *words in shell_commands(text)]
    assert [words[:2] for words in examples] == [["rewards", "test"]] * 2
    for words in examples:
        assert cli.main(words) == 0


def test_the_page_on_fine_tuning_runs(run_directory: Path) -> None:
    """Its rows, commands and program, in the order of the page."""
    text = read("docs/howto/fine-tune.md")
    (run_directory / "chat.jsonl").write_text("".join(blocks(text, "json")))
    answers = [("A whale.", "A fish."), ("The fin whale.", "No."), ("A whale.", "A very large fish, or so they say.")]
    pairs = [{"prompt": "What is a finback?", "chosen": better, "rejected": worse} for better, worse in answers * 4]
    (run_directory / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    verbs = []
    for _, *words in shell_commands(text):
        assert cli.main(words) == 0
        verbs.append(words[0])
    assert verbs == ["sft", "generate", "sft", "reward-model"]
    for example in blocks(text, "python"):
        exec(compile(example, "fine-tune.md", "exec"), {"__name__": "example"})


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_examples_import_what_exists(document: str) -> None:
    for example in blocks(read(document), "python"):
        for node in ast.walk(ast.parse(example)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("finback."):
                names = defined_names(ROOT / f"{node.module.replace('.', '/')}.py")
                assert {alias.name for alias in node.names} <= names
