"""`lrlhf verify-resume` tells a config that resumes exactly from one that does not."""

import random

import lightning as L
import pytest
import torch
import yaml

from lrlhf import Checkpoints
from lrlhf.__main__ import main
from lrlhf.cli.verify_resume import differences
from lrlhf.run.checkpoints import load, newest_checkpoint
from tests.integration.soak_resume import write_configs
from tests.modules.helpers import ppo, prompt_data, trainer


class Forgetful(L.Callback):
    """A user's callback with a generator that it does not save."""

    def __init__(self) -> None:
        self.generator = random.Random(1)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        pl_module.log("forgotten", self.generator.random())


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_configs(tmp_path_factory.mktemp("verify"))["PPOPolicy"]


def verify(*arguments: str) -> None:
    main(["verify-resume", *arguments])


def test_a_config_that_resumes_exactly_is_told_so(config, tmp_path, capsys):
    verify("--config", str(config), "--kill-at", "iteration:1", "--iterations=3", "--folder", str(tmp_path / "runs"))
    out = capsys.readouterr().out
    assert "kill -9; newest checkpoint: iteration=00000" in out
    assert "equal, bit for bit: " in out
    compared = int(out.split("equal, bit for bit: ")[1].split()[0])
    assert compared > 1000
    whole, killed = tmp_path / "runs/uninterrupted", tmp_path / "runs/killed"
    assert load(newest_checkpoint(whole))["lrlhf"]["iteration"] == 3
    assert (killed / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()


@pytest.mark.slow
def test_a_callback_that_forgets_its_generator_is_found(config, tmp_path, capsys):
    values = yaml.safe_load(config.read_text())
    values["trainer"]["callbacks"].append({"class_path": "tests.integration.test_verify_resume.Forgetful"})
    forgetful = tmp_path / "forgetful.yaml"
    forgetful.write_text(yaml.safe_dump(values))
    with pytest.raises(SystemExit) as stop:
        verify("--config", str(forgetful), "--kill-at", "iteration:2", "--iterations", "3")
    assert stop.value.code != 0
    assert "the resumed run differs in 1 of" in (error := capsys.readouterr().err)
    assert "metrics.csv" in error


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--kill-at", "later"], "config key kill_at: expected what --help tells, got later"),
        (["--kill-at", "iteration:x"], "config key kill_at: expected what --help tells, got iteration:x"),
        (["--kill-at", "iteration:4"], "must lie before the last of --iterations"),
        (["--kill-at", "iteration:0"], "must lie before the last of --iterations"),
        (["--iterations", "0"], "config key iterations: expected a number >0, got 0"),
        (["--iterations", "some"], "config key iterations: expected a whole number, got some"),
        (["--kill-at"], "--kill-at: expected one argument"),
        (["--no-such-option", "1"], "unknown option --no-such-option"),
        (["--data.train", "nowhere.jsonl"], "the fit failed by itself: lrlhf: error: data file nowhere.jsonl"),
    ],
)
def test_bad_options_are_one_sentence(arguments, named, config, capsys):
    with pytest.raises(SystemExit) as stop:
        verify("--config", str(config), *arguments)
    error = capsys.readouterr().err
    assert stop.value.code != 0
    assert named in error
    assert "Traceback" not in error


def test_a_folder_that_holds_a_verification_is_left_alone(config, tmp_path, capsys):
    (tmp_path / "killed").mkdir()
    with pytest.raises(SystemExit):
        verify("--config", str(config), "--folder", str(tmp_path))
    assert "name another --folder" in capsys.readouterr().err


class Breaking(L.Callback):
    """Fails once, in the fourth iteration."""

    def __init__(self) -> None:
        self.broken = False

    def on_train_batch_end(self, trainer, module, *_) -> None:
        if module.iteration == 4 and not self.broken:
            self.broken = True
            raise ZeroDivisionError


@pytest.mark.parametrize("file", ["newest", "best"])
def test_in_code_a_run_goes_on_from_a_checkpoint(file, tmp_path, tiny_llama, data_files):
    """Lightning's Trainer with `Checkpoints`, without the command line: five iterations, or three and then the rest."""
    breaking = Breaking()

    def run(folder, ckpt_path=None, *callbacks):
        torch.manual_seed(3)
        data = prompt_data(tiny_llama, data_files, val=data_files["prompts"], val_limit=8)
        runner = trainer(
            folder,
            callbacks=[Checkpoints(monitor="val/length"), *callbacks],
            limit_train_batches=5,
            val_check_interval=1,
        )
        runner.fit(ppo(tiny_llama), data, ckpt_path=ckpt_path)

    run(tmp_path / "whole")
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "broken", None, breaking)
    saved = newest_checkpoint(tmp_path / "broken")
    assert saved.stem == "iteration=000003"
    run(tmp_path / "broken", saved if file == "newest" else saved.with_name("best.ckpt"), breaking)
    differing, compared = differences(tmp_path / "whole", tmp_path / "broken")
    assert compared > 500
    assert differing == []
