"""Checkpoint files: whole or not there, verified, and free of code."""

import errno
import os
import pickle
import random
import resource
from pathlib import Path

import pytest
import torch

from lrlhf.errors import UserError
from lrlhf.run.checkpoints import SafeCheckpointIO, all_checkpoints, checkpoint_path, is_whole, load, newest_checkpoint

STATE = {"weights": torch.arange(1000.0), "epoch": 3}


def save(path: Path, state: dict = STATE) -> Path:
    SafeCheckpointIO().save_checkpoint(state, path)
    return path


def test_what_is_saved_is_loaded(tmp_path):
    loaded = load(save(tmp_path / "a.ckpt"))
    assert torch.equal(loaded["weights"], STATE["weights"])
    assert loaded["epoch"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_flipped_bit_is_noticed_or_changes_nothing(tmp_path):
    path = save(tmp_path / "a.ckpt")
    whole, moments = path.read_bytes(), random.Random(0)
    noticed = 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[moments.randrange(len(whole))] ^= 1 << moments.randrange(8)
        path.write_bytes(damaged)
        try:
            loaded = load(path)
        except UserError:
            noticed += 1
        else:
            assert torch.equal(loaded["weights"], STATE["weights"])
            assert loaded["epoch"] == 3
    assert noticed > 200  # the file's 4,000 of 5,000 bytes are data; the rest is padding and names


@pytest.mark.parametrize("length", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_file_is_noticed(tmp_path, length):
    path = save(tmp_path / "a.ckpt")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(length * len(whole)) if isinstance(length, float) else length])
    assert not is_whole(path)


def test_the_newest_whole_checkpoint_is_used_and_the_damaged_one_named(tmp_path, capsys):
    for iteration in (8, 9, 10):
        save(checkpoint_path(tmp_path, iteration), {"iteration": iteration})
    checkpoint_path(tmp_path, 10).write_bytes(b"PK")
    assert newest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 9)
    assert "iteration=000010.ckpt is damaged" in capsys.readouterr().out


def test_checkpoints_are_in_order_past_a_million_iterations(tmp_path):
    for iteration in (999_999, 1_000_000, 1_000_001):
        save(checkpoint_path(tmp_path, iteration))
    assert all_checkpoints(tmp_path) == [checkpoint_path(tmp_path, n) for n in (1_000_001, 1_000_000, 999_999)]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over_in_silence(tmp_path):
    save(checkpoint_path(tmp_path, 1)).write_bytes(b"")
    with pytest.raises(UserError, match="--fresh"):
        newest_checkpoint(tmp_path)
    assert newest_checkpoint(tmp_path / "elsewhere") is None


class Dying:
    """A file whose process dies in the middle of its so-many-th write."""

    def __init__(self, file, survive: int):
        self.file, self.left = file, survive

    def write(self, data):
        if self.left == 0:
            self.file.write(bytes(data)[: len(data) // 2])
            self.file.flush()
            os._exit(9)
        self.left -= 1
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


@pytest.mark.parametrize("survive", range(6))
def test_a_kill_while_writing_leaves_the_checkpoint_before(tmp_path, monkeypatch, survive):
    """The process dies at a write call; the file is the old one, whole."""
    path = save(tmp_path / "a.ckpt")
    opened = Path.open
    child = os.fork()
    if child == 0:
        try:
            monkeypatch.setattr(Path, "open", lambda self, *a, **k: Dying(opened(self, *a, **k), survive))
            SafeCheckpointIO().save_checkpoint({"weights": torch.ones(5000)}, path)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert torch.equal(load(path)["weights"], STATE["weights"])
    save(path, {"weights": torch.ones(2)})
    assert len(load(path)["weights"]) == 2


def test_a_full_disk_is_one_sentence_and_leaves_the_checkpoint_before(tmp_path):
    path = save(tmp_path / "a.ckpt")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match="could not be written .*; the checkpoints before it are whole") as refused:
            save(path, {"weights": torch.randn(50_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.strerror(errno.EFBIG) in str(refused.value)
    assert torch.equal(load(path)["weights"], STATE["weights"])
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


class Attack:
    """Whoever unpickles it makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    mark = tmp_path / "executed"
    torch.save({"state_dict": Attack(mark)}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="more than tensors and plain values"):
        load(tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="more than tensors"):
        SafeCheckpointIO().load_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    assert not mark.exists()
    torch.load(tmp_path / "a.ckpt", weights_only=False)
    assert mark.exists(), "the file would have done it"
    (tmp_path / "b.ckpt").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UserError, match="no checkpoint, or damaged"):
        load(tmp_path / "b.ckpt")
