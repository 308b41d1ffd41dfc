"""Most of the room needs no torch: fetching, chatting and tokenising start at once."""

import subprocess
import sys

PROGRAM = """
import sys
sys.modules["torch"] = None
from finback.commands import fetch
from finback.data import boundary, chat, config, detokenizer, fetch, fim, gym, hub, packing, problems, shards, sources
from finback.data import tokenizer, unpack
for name in ("transformers", "pyarrow", "reasoning_gym", "huggingface_hub"):
    assert name not in sys.modules, name
"""


def test_imports_without_torch() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=300)
