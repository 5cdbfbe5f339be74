"""A run folder's copy elsewhere: enough to go on from on an empty machine, at every moment."""

import shutil

import fsspec
import pytest
import torch
import yaml

from lrlhf import Checkpoints, UserError
from lrlhf.__main__ import main
from lrlhf.run.checkpoints import all_checkpoints, newest_checkpoint
from lrlhf.run.mirror import Mirror
from tests.integration.soak_resume import write_configs
from tests.modules.helpers import ppo, prompt_data, trainer


@pytest.fixture
def memory():
    files = fsspec.filesystem("memory")
    yield files
    files.rm("/bucket", recursive=True) if files.exists("/bucket") else None


def run_ppo(base, files, folder, batches, mirror=None, ckpt_path=None):
    module = ppo(base)
    callbacks = [Checkpoints(mirror=mirror)]
    runner = trainer(folder, callbacks=callbacks, max_epochs=1, limit_train_batches=batches)
    runner.fit(module, prompt_data(base, files), ckpt_path=ckpt_path)
    return module


class Dies(Exception):
    pass


def die_in_iteration(module, number):
    step = module.training_step

    def training_step(batch, batch_idx):
        if module.iteration == number:
            raise Dies
        step(batch, batch_idx)

    module.training_step = training_step


def test_an_empty_machine_goes_on_like_the_uninterrupted_run(tmp_path, tiny_llama, data_files, memory):
    torch.manual_seed(1)
    whole = run_ppo(tiny_llama, data_files, tmp_path / "whole", 4)
    torch.manual_seed(1)
    module = ppo(tiny_llama)
    die_in_iteration(module, 2)
    lost = trainer(tmp_path / "lost", callbacks=[Checkpoints(mirror="memory://bucket/run")], limit_train_batches=4)
    with pytest.raises(Dies):
        lost.fit(module, prompt_data(tiny_llama, data_files))
    shutil.rmtree(tmp_path / "lost")
    Mirror("memory://bucket/run").fetch(tmp_path / "new")
    newest = newest_checkpoint(tmp_path / "new")
    assert newest.name == "iteration=000002.ckpt"
    resumed = run_ppo(tiny_llama, data_files, tmp_path / "new", 4, "memory://bucket/run", str(newest))
    assert all(map(torch.equal, whole.backbone.trainable(), resumed.backbone.trainable()))
    names = Mirror("memory://bucket/run").checkpoints()
    assert names == sorted(f"checkpoints/{p.name}" for p in all_checkpoints(tmp_path / "new"))  # old ones are removed
    assert memory.exists("/bucket/run/handover/manifest.json")


def test_a_new_run_does_not_write_over_another_s_copy(tmp_path, tiny_llama, data_files, memory):
    run_ppo(tiny_llama, data_files, tmp_path / "a", 1, "memory://bucket/run")
    before = {name: memory.cat(f"/bucket/run/{name}") for name in Mirror("memory://bucket/run").names()}
    with pytest.raises(UserError, match="holds the checkpoints of a run, and this one starts anew"):
        run_ppo(tiny_llama, data_files, tmp_path / "b", 1, "memory://bucket/run")
    assert {name: memory.cat(f"/bucket/run/{name}") for name in Mirror("memory://bucket/run").names()} == before


def test_logs_are_copied_before_the_checkpoint_that_counts_on_them(tmp_path, memory, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/iteration=000001.ckpt").write_text("1")
    (tmp_path / "metrics.csv").write_text("a")
    mirror, order = Mirror("memory://bucket/run"), []
    put = mirror._files.put_file
    monkeypatch.setattr(mirror._files, "put_file", lambda a, b: (order.append(b), put(a, b)))
    mirror.push(tmp_path)
    assert [name.rpartition("/")[2] for name in order] == ["metrics.csv", "iteration=000001.ckpt"]
    order.clear()
    mirror.push(tmp_path)
    assert order == []  # nothing has changed
    (tmp_path / "checkpoints/iteration=000001.ckpt.part").write_text("half")
    (tmp_path / "notes.txt").write_text("not of the run")
    mirror.push(tmp_path)
    assert order == []


def test_a_store_that_cannot_be_reached_does_not_end_the_run(tmp_path, memory, monkeypatch):
    (tmp_path / "metrics.csv").write_text("a")
    mirror = Mirror("memory://bucket/run")

    def broken(*_):
        raise OSError("no route to host")

    with monkeypatch.context() as patch:
        patch.setattr(mirror._files, "put_file", broken)
        with pytest.warns(UserWarning, match="no route to host"):
            mirror.push(tmp_path)
    mirror.push(tmp_path)
    assert memory.cat("/bucket/run/metrics.csv") == b"a"


def test_a_folder_with_checkpoints_is_left_as_it_is(tmp_path, memory):
    memory.pipe("/bucket/run/checkpoints/iteration=000009.ckpt", b"9")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/iteration=000001.ckpt").write_text("1")
    Mirror("memory://bucket/run").fetch(tmp_path)
    assert [p.name for p in all_checkpoints(tmp_path)] == ["iteration=000001.ckpt"]


@pytest.mark.parametrize(("url", "why"), [("nowhere://run", "nowhere"), ("s3://bucket/run", "s3fs")])
def test_a_place_of_an_unknown_kind_is_refused(url, why):
    with pytest.raises(UserError, match=why):
        Checkpoints(mirror=url)


def test_fit_fetches_what_its_config_names(tmp_path, capsys):
    (tmp_path / "configs").mkdir()
    config = write_configs(tmp_path / "configs")["SFT"]
    values = yaml.safe_load(config.read_text())
    saving = [c for c in values["trainer"]["callbacks"] if c["class_path"] == "lrlhf.Checkpoints"]
    saving[0].setdefault("init_args", {})["mirror"] = f"file://{tmp_path}/store"
    config.write_text(yaml.safe_dump(values))
    fit = ["fit", "--config", str(config)]
    main([*fit, "--trainer.default_root_dir", str(tmp_path / "a"), "--trainer.max_epochs", "1"])
    shutil.rmtree(tmp_path / "a")
    capsys.readouterr()
    main([*fit, "--trainer.default_root_dir", str(tmp_path / "b"), "--trainer.max_epochs", "2"])
    assert "Going on from" in capsys.readouterr().out
