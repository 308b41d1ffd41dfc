"""What a checkpoint holds, that damage to it is found, and which one a run continues from."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from finback.config import InputError
from finback.data.shards import TokenShards
from finback.data.stream import TokenStream
from finback.data.tokenizer import load_tokenizer
from finback.model.checkpoint import load
from finback.train.checkpoint import (
    Progress,
    TrainingState,
    find_damage,
    fresh_state,
    list_checkpoints,
    load_checkpoint,
    newest_sound_checkpoint,
    remove_leftovers,
    save_checkpoint,
)
from finback.train.config import PretrainConfig
from finback.train.optimizer import adam_tensors
from tests.train.runs import micro_config

CPU = torch.device("cpu")


def open_stream(config: PretrainConfig) -> TokenStream:
    return TokenStream(TokenShards(config.data[0]), config.sequence_length, seed=config.seed)


def make_state(config: PretrainConfig, step: int = 7) -> TrainingState:
    """A state in which nothing has its first value any more."""
    state = fresh_state(config, open_stream(config), CPU)
    generator = torch.Generator().manual_seed(step)
    tensors: list[Tensor] = [*adam_tensors(state.adam).values(), *state.model.buffers()]
    tensors += [parameter.detach() for parameter in state.model.parameters()]
    if state.average is not None:
        tensors += state.average.tensors.values()
    for tensor in tensors:
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    state.adam.updates = step - 1
    state.progress = Progress(step=step, tokens=1234, seconds=5.6, nonfinite_steps=1)
    state.stream.next_batch(11)
    return state


def all_tensors(state: TrainingState) -> dict[str, Tensor]:
    average = {} if state.average is None else {f"average.{name}": t for name, t in state.average.tensors.items()}
    return state.model.state_dict() | adam_tensors(state.adam) | average


def save(run: Path, state: TrainingState, config: PretrainConfig, keep: int = 0) -> Path:
    return save_checkpoint(run, state, tokenizer_from=config.tokenizer, keep=keep)


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_round_trip_is_bitwise(tmp_path: Path, micro_data: Path, moments: str, ema_decay: float | None) -> None:
    config = micro_config(micro_data, moments_dtype=moments, ema_decay=ema_decay)
    state = make_state(config)
    torch.manual_seed(99)
    torch.rand(5)
    checkpoint = save(tmp_path, state, config)
    expected_random = torch.rand(3)
    expected_rows = state.stream.next_batch(4)

    again = load_checkpoint(checkpoint, config, open_stream(config), CPU)
    assert torch.equal(torch.rand(3), expected_random)
    assert torch.equal(again.stream.next_batch(4), expected_rows)
    assert again.progress == state.progress
    assert again.adam.updates == 6
    ours, theirs = all_tensors(again), all_tensors(state)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name


def test_each_checkpoint_and_its_average_load_as_they_are(tmp_path: Path, micro_data: Path) -> None:
    config = micro_config(micro_data)
    state = make_state(config)
    assert state.average is not None
    checkpoint = save(tmp_path, state, config)
    assert checkpoint == tmp_path / "checkpoints" / "step-7"
    model, averaged = load(checkpoint), load(checkpoint / "ema")
    for name, parameter in state.model.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)
        assert torch.equal(averaged.get_parameter(name), state.average.tensors[name])
    for ours, theirs in zip(averaged.routers(), state.model.routers(), strict=True):
        assert torch.equal(ours.e_score_correction_bias, theirs.e_score_correction_bias)
    for directory in (checkpoint, checkpoint / "ema"):
        assert load_tokenizer(directory).vocab_size == config.model.vocab_size


def flip_byte(checkpoint: Path) -> None:
    file = checkpoint / "trainer.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def empty(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped bit": (flip_byte, "trainer.safetensors does not match its checksum"),
    "truncated": (truncate, "bytes where"),
    "missing": (lambda c: (c / "ema" / "model.safetensors").unlink(), "ema/model.safetensors is missing"),
    "no manifest": (lambda c: (c / "manifest.json").unlink(), "manifest.json is missing or damaged"),
    "half a manifest": (lambda c: (c / "manifest.json").write_text('{"files": {"a'), "manifest.json is missing or damaged"),
    "empty directory": (empty, "manifest.json is missing or damaged"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_the_checkpoint_before_is_taken(tmp_path: Path, micro_data: Path, kind: str) -> None:
    damage, words = DAMAGE[kind]
    config = micro_config(micro_data)
    for step in (5, 10):
        save(tmp_path, make_state(config, step), config)
    first, second = tmp_path / "checkpoints" / "step-5", tmp_path / "checkpoints" / "step-10"
    assert newest_sound_checkpoint(tmp_path) == (second, [])
    damage(second)
    assert words in str(find_damage(second))
    checkpoint, sentences = newest_sound_checkpoint(tmp_path)
    assert checkpoint == first
    assert len(sentences) == 1
    assert str(second) in sentences[0]
    assert words in sentences[0]
    damage(first)
    with pytest.raises(InputError, match="no sound checkpoint is left"):
        newest_sound_checkpoint(tmp_path)


def test_a_run_without_checkpoints_has_none_and_no_complaint(tmp_path: Path) -> None:
    assert newest_sound_checkpoint(tmp_path) == (None, [])


def test_saving_a_step_again_replaces_it_whole(tmp_path: Path, micro_data: Path) -> None:
    config = micro_config(micro_data)
    checkpoint = save(tmp_path, make_state(config), config)
    (checkpoint / "stray.txt").write_text("from before")
    flip_byte(checkpoint)
    save(tmp_path, make_state(config), config)
    assert find_damage(checkpoint) is None
    assert not (checkpoint / "stray.txt").exists()
    assert [path.name for path in checkpoint.parent.iterdir()] == ["step-7"]


def test_old_checkpoints_are_removed_by_number_not_by_name(tmp_path: Path, micro_data: Path) -> None:
    config = micro_config(micro_data, ema_decay=None)
    for step in (8, 9, 10, 11):
        save(tmp_path, make_state(config, step), config, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-11", "step-10"]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_leftovers_of_a_killed_process_are_removed_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for name in (".step-5.ab12.tmp", "..step-5.ab12.tmp.cd34.tmp", ".step-3.removed", "step-4", "notes"):
        (folder / name).mkdir(parents=True)
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["notes", "step-4"]


def test_a_stream_over_other_data_is_refused(tmp_path: Path, micro_data: Path) -> None:
    config = micro_config(micro_data)
    checkpoint = save(tmp_path, make_state(config), config)
    other = TokenStream(TokenShards(config.data[0]), config.sequence_length, seed=1)
    with pytest.raises(InputError, match="the saved stream position has seed 0, this stream has 1"):
        load_checkpoint(checkpoint, config, other, CPU)
