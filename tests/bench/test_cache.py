"""What the benchmark of the compressed cache counts and says; the toy run in test_bench.py goes through the rest."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import cache, cli
from finback.ops.compressed import compressed_rows
from tests.checkpoint_samples import LLAMA, build


def test_bytes_of_the_published_sizes() -> None:
    rows = {row.name.split(":")[0]: row for row in cache.byte_rows(cache.FULL.steps)}
    assert {name: (row.value, row.peer_value, row.met) for name, row in rows.items()} == {
        "V3's attention, 16 heads": (656, 1152, True),
        "SmolLM2-135M": (408, 768, True),
    }


@torch.no_grad()
def test_perplexity_over_plain_rows_is_that_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """In steps that do not divide the window; compressed rows give another number, near by."""
    monkeypatch.setattr(cache, "STEP", 8)
    model = build(replace(LLAMA, rope_scaling=None))
    ids = torch.randint(LLAMA.vocab_size, (41,))
    heard = cache.hear(model, ids, 20, None)
    logits, targets = model(ids[:-1].view(-1, 20)), ids[1:].view(-1, 20)
    for context in (5, 20):
        loss = torch.nn.functional.cross_entropy(logits[:, :context].flatten(0, 1), targets[:, :context].flatten())
        assert heard.perplexity(context) == pytest.approx(math.exp(loss), rel=1e-4)
    assert torch.equal(heard.likeliest, logits.argmax(-1))
    compressed = cache.hear(model, ids, 20, compressed_rows(model.config, "int8"))
    assert compressed.perplexity(20) != heard.perplexity(20)
    assert compressed.perplexity(20) == pytest.approx(heard.perplexity(20), rel=0.05)


def test_what_is_missing_is_named_with_the_way_to_get_it(tmp_path: Path) -> None:
    text = tmp_path / "austen" / "text.jsonl"
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}", encoding="utf-8")
    readings = (
        replace(cache.QUICKSTART, directory=tmp_path / "none"),
        replace(cache.TRAINED_SMOLLM2, directory=tmp_path / "model", text=text),
    )
    rows, notes = cache.run(cache.Size(readings, {}))
    assert rows == []
    assert "make quickstart" in notes[-2]
    assert "--model" in notes[-2]
    assert "finback fetch austen" in notes[-1]


def test_the_command_line_names_the_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []
    monkeypatch.setattr(cli, "run", lambda names, sizes, out, quick: seen.append(sizes["cache"].readings))
    cli.main(("cache",), model=tmp_path)
    assert seen == [(replace(cache.QUICKSTART, directory=tmp_path), cache.TRAINED_SMOLLM2)]
