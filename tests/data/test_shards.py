"""Documents to token files and back; files that are damaged."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from finback.config import InputError
from finback.data.config import DataConfig
from finback.data.shards import TokenShards, document_digest, write_shards
from finback.data.sources import Document
from finback.data.tokenizer import Tokenizer, train_tokenizer

PLAIN = DataConfig(validation_fraction=0.1, fim_rate=0, boundary_split_rate=0, tokens_per_shard=1000)


def _texts(tokenizer: Tokenizer, shards: TokenShards) -> list[str]:
    texts = []
    for number in range(shards.num_documents):
        ids = shards.document(number)
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        texts.append(tokenizer.decode(ids[1:-1].tolist()))
    return texts


def test_documents_come_back(tokenizer: Tokenizer, documents: list[Document], tmp_path: Path) -> None:
    index = write_shards([*documents, *documents[:50]], tokenizer, tmp_path / "shards", PLAIN)
    train, validation = TokenShards(tmp_path / "shards"), TokenShards(tmp_path / "shards", "validation")
    kept = list(dict.fromkeys(document.text for document in documents))
    assert index["duplicates"] == len(documents) + 50 - len(kept)
    trained, held = _texts(tokenizer, train), _texts(tokenizer, validation)
    assert sorted(trained + held) == sorted(kept)
    assert trained == [text for text in kept if text in set(trained)]  # in the order of the source
    assert not set(trained) & set(held)
    assert 0.03 < len(held) / len(kept) < 0.2
    assert train.text_bytes == sum(len(text.encode()) for text in trained)
    assert len(index["splits"]["train"]["shards"]) > 3
    run = np.concatenate([train.document(number) for number in range(train.num_documents)])
    assert (train.tokens(0, train.num_tokens) == run).all()
    assert (train.tokens(990, 2100) == run[990:2100]).all()  # across two file ends
    assert (train.rows([3, 0], 100) == np.stack([run[300:401], run[0:101]])).all()
    with pytest.raises(IndexError):
        train.tokens(0, train.num_tokens + 1)


def test_the_split_depends_on_the_text_alone(tokenizer: Tokenizer, documents: list[Document], tmp_path: Path) -> None:
    write_shards(documents, tokenizer, tmp_path / "a", PLAIN)
    write_shards(reversed(documents[:200]), tokenizer, tmp_path / "b", PLAIN)
    first = set(_texts(tokenizer, TokenShards(tmp_path / "a", "validation")))
    second = set(_texts(tokenizer, TokenShards(tmp_path / "b", "validation")))
    assert second == first & {document.text for document in documents[:200]}


def test_byte_lengths_measure_the_text_also_under_fim(tokenizer: Tokenizer, documents: list[Document], tmp_path: Path) -> None:
    config = DataConfig(validation_fraction=0.1, fim_rate=1, boundary_split_rate=1)
    write_shards(documents, tokenizer, tmp_path / "shards", config)
    lengths = tokenizer.token_byte_lengths()
    hole = tokenizer.token_to_id("<｜fim▁hole｜>")
    for split, holes in (("train", True), ("validation", False)):
        shards = TokenShards(tmp_path / "shards", split)
        tokens = shards.tokens(0, shards.num_tokens)
        assert lengths[tokens].sum() == shards.text_bytes
        assert (np.count_nonzero(tokens == hole) == shards.num_documents) == holes  # held-out text is left as it is


def test_writing_is_deterministic(tokenizer: Tokenizer, documents: list[Document], tmp_path: Path) -> None:
    config = DataConfig(fim_rate=0.5, boundary_split_rate=0.5, seed=7)
    first = write_shards(documents, tokenizer, tmp_path / "a", config)
    assert first == write_shards(documents, tokenizer, tmp_path / "b", config)
    other = write_shards(documents, tokenizer, tmp_path / "c", DataConfig(fim_rate=0.5, boundary_split_rate=0.5, seed=8))
    assert other["splits"] != first["splits"]


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    small = train_tokenizer(["plain text"], 276)
    small.backend.add_tokens([f"<extra {i}>" for i in range(2**16)])
    tokenizer = Tokenizer(small.backend, small.config)
    index = write_shards([Document("<extra 65535> and text", "x")], tokenizer, tmp_path / "s", PLAIN)
    assert index["dtype"] == "uint32"
    assert TokenShards(tmp_path / "s").document(0)[1] == 276 + 2**16 - 1


def test_nothing_is_left_of_a_failed_write(tokenizer: Tokenizer, documents: list[Document], tmp_path: Path) -> None:
    write_shards(documents[:100], tokenizer, tmp_path / "shards", PLAIN)
    before = TokenShards(tmp_path / "shards").fingerprint

    def failing() -> Iterator[Document]:
        yield from documents
        raise InputError("the source broke")

    with pytest.raises(InputError, match="the source broke"):
        write_shards(failing(), tokenizer, tmp_path / "shards", PLAIN)
    with pytest.raises(InputError, match="the source broke"):
        write_shards(failing(), tokenizer, tmp_path / "new", PLAIN)
    with pytest.raises(InputError, match=r"no document is left for training in .*: the sources hold no text"):
        write_shards([Document("", "empty")], tokenizer, tmp_path / "new", PLAIN)
    with pytest.raises(InputError, match="all of its 3 are held out, chosen by a hash of their text; give the text as several"):
        write_shards(documents[:3], tokenizer, tmp_path / "new", replace(PLAIN, validation_fraction=1.0))
    assert [entry.name for entry in tmp_path.iterdir()] == ["shards"]
    assert TokenShards(tmp_path / "shards").fingerprint == before
    write_shards(documents[:150], tokenizer, tmp_path / "shards", PLAIN)  # a good one replaces it
    assert TokenShards(tmp_path / "shards").fingerprint != before


@pytest.mark.parametrize("name", ["train-00001.bin", "train-00000.offsets.npy", "validation-00000.bin"])
def test_damage_is_named(tokenizer: Tokenizer, documents: list[Document], tmp_path: Path, name: str) -> None:
    write_shards(documents, tokenizer, tmp_path, PLAIN)
    split = "validation" if name.startswith("validation") else "train"
    file = tmp_path / name
    content = file.read_bytes()
    file.write_bytes(content[:-2])
    with pytest.raises(InputError, match=f"{name} (has .* .truncated|does not match its checksum)"):
        TokenShards(tmp_path, split)
    file.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    with pytest.raises(InputError, match=f"{name} does not match its checksum"):
        TokenShards(tmp_path, split)
    file.unlink()
    with pytest.raises(InputError, match=f"{name} is missing"):
        TokenShards(tmp_path, split, verify=False)


def test_other_mistakes(tokenizer: Tokenizer, documents: list[Document], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"index\.json does not exist"):
        TokenShards(tmp_path)
    (tmp_path / "index.json").write_text('{"weight_map": {}}')
    with pytest.raises(InputError, match="is not the index of a token shard directory"):
        TokenShards(tmp_path)
    write_shards(documents, tokenizer, tmp_path, PLAIN)
    TokenShards(tmp_path).check_tokenizer(tokenizer)
    with pytest.raises(InputError, match="written with another tokenizer"):
        TokenShards(tmp_path).check_tokenizer(train_tokenizer(["other text"], 276))
    for field in ("validation_fraction", "fim_rate", "boundary_split_rate"):
        with pytest.raises(InputError, match=f"{field} is 1.5, it must lie between 0 and 1"):
            DataConfig(**{field: 1.5})
    with pytest.raises(InputError, match="tokens_per_shard is 0"):
        DataConfig(tokens_per_shard=0)


def test_digests_differ() -> None:
    assert document_digest("a") != document_digest("b")
    assert len({document_digest(str(i)) for i in range(1000)}) == 1000
