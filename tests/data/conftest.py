"""One small tokenizer for all tests of the data room, and the texts it was trained on."""

import pytest

from finback.data.problems import problem_documents
from finback.data.sources import Document
from finback.data.tokenizer import Tokenizer, train_tokenizer

PROSE = [
    "The fox looked up.\n\nIt was late, and the grapes hung high!\nShe jumped; she jumped again.\n\n",
    "狐狸抬头看。\n天色已晚，葡萄挂得很高！\n它跳了又跳。\n\n",
    "def area(width: int, height: int) -> int:\n    return width * height\n\n\nprint(area(3, 4))\n",
    "Prices rose 12.5% in 2024 (from $1,200 to $1,350): see chapter 7, page 301.\n",
    "naïve café, Größe, ελληνικά, русский, 日本語のテキスト, 한국어, 🐋🌊 ½ ² Ⅷ ٣\n",
]


@pytest.fixture(scope="session")
def documents() -> list[Document]:
    """A few hundred short documents in two languages."""
    return [*problem_documents(400, seed=1), *(Document(text, "prose") for text in PROSE)]


@pytest.fixture(scope="session")
def tokenizer(documents: list[Document]) -> Tokenizer:
    """700 tokens trained on them."""
    return train_tokenizer((document.text for document in documents for _ in range(3)), 700)
