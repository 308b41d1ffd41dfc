"""A small model that several tests talk with, once with the template of each of DeepSeek's chat models."""

from dataclasses import replace
from pathlib import Path

import pytest

from finback.data.chat import published_template
from finback.data.tokenizer import Tokenizer, save_tokenizer, train_tokenizer
from finback.model.checkpoint import save
from tests.checkpoint_samples import BASE, build


@pytest.fixture(scope="session")
def chat_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """deepseek_v3/ and deepseek_r1/: one model of random weights and one vocabulary, with the two published templates."""
    root = tmp_path_factory.mktemp("chat-models")
    trained = train_tokenizer(["The fox saw the grapes. 狐狸看见葡萄。"] * 50, 300)
    model = build(replace(BASE, vocab_size=trained.vocab_size))
    for template in ("deepseek_v3", "deepseek_r1"):
        tokenizer = Tokenizer(trained.backend, trained.config, published_template(template))
        save_tokenizer(tokenizer, root / f"{template}-tokenizer")
        save(model, root / template, tokenizer_from=root / f"{template}-tokenizer")
    return root
