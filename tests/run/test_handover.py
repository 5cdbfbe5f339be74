"""A hand-over is the role that was trained, named by what it works with, and whole whenever it is there."""

import dataclasses
import hashlib
import json
import os
import shutil
import sys

import pytest
import torch

from lrlhf import LoRA, UserError
from lrlhf.model.backbone import Backbone
from lrlhf.model.pretrained import fingerprint_tokenizer, load_tokenizer
from lrlhf.run.handover import Handover

STACKS = {"sft": ("sft",), "reward": ("sft", "reward"), "policy": ("sft", "policy")}


@pytest.fixture(scope="module")
def backbone(tiny_llama) -> Backbone:
    """A stack of two adapters with a head, one of two without, and one of one."""
    torch.manual_seed(0)
    made = Backbone(tiny_llama, lora=LoRA(r=2, alpha=4)).eval()
    for role, stack in STACKS.items():
        made.add_role(role, stack, trainable=True, head="random" if role == "reward" else None)
    for parameter in made.trainable():
        torch.nn.init.normal_(parameter, std=0.1)
    return made


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    return load_tokenizer(tiny_llama)


@pytest.fixture
def write(backbone, tokenizer, tmp_path):
    """Hands a role over to a folder."""

    def write(role: str, folder=tmp_path / "handover", template: str | None = "0123456789abcdef") -> Handover:
        settings = {"base_model": "the/base", "dtype": "float32", "template": template}
        Handover.write(folder, backbone, role, tokenizer, **settings)
        return Handover.read(folder)

    return write


def digest(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def files(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("role", "more"),
    [("sft", []), ("reward", ["head.safetensors"]), ("policy", ["adapter/adapter_model.safetensors"])],
)
def test_the_folder_holds_the_stack_a_head_only_for_a_role_with_one_and_one_adapter_only_for_a_policy(
    write, tmp_path, role, more
):
    write(role)
    weights = [f"{adapter}/adapter_model.safetensors" for adapter in STACKS[role]]
    assert [name for name in files(tmp_path / "handover") if name.endswith("safetensors")] == sorted(weights + more)
    assert [path.name for path in tmp_path.iterdir()] == ["handover"], "nothing is left beside it"


def test_the_manifest_names_what_the_role_was_trained_on_and_the_digests_of_its_files(write, backbone, tmp_path):
    write("reward")
    folder = tmp_path / "handover"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert isinstance(score := manifest.pop("probe_score"), float)
    assert score != 0
    assert len(manifest.pop("tokenizer")) == 16
    assert manifest == {
        "role": "reward",
        "stack": ["sft", "reward"],
        "head": True,
        "base_model": "the/base",
        "base": backbone.fingerprint,
        "template": "0123456789abcdef",
        "adapters": {name: digest(folder / name / "adapter_model.safetensors") for name in ("sft", "reward")},
        "dtype": "float32",
    }


@pytest.mark.parametrize("role", STACKS)
def test_what_is_read_is_what_was_written(write, backbone, tokenizer, tmp_path, role):
    read = write(role)
    assert (read.folder, read.role, read.stack) == (tmp_path / "handover", role, STACKS[role])
    assert (read.base_model, read.dtype, read.template) == ("the/base", "float32", "0123456789abcdef")
    assert (read.base, set(read.adapters)) == (backbone.fingerprint, set(STACKS[role]))
    assert read.tokenizer == fingerprint_tokenizer(tokenizer)
    assert (read.head, read.probe_score is not None) == (role == "reward",) * 2


# Refused


def test_another_base_or_tokenizer_is_refused_with_the_folder_and_both_fingerprints(write, backbone):
    handover = write("sft")
    handover.check(backbone, handover.tokenizer)
    base = f"another base model .fingerprint other, here {backbone.fingerprint}.*use base_model: the/base"
    with pytest.raises(UserError, match=f"{handover.folder} was trained with {base}"):
        dataclasses.replace(handover, base="other").check(backbone, handover.tokenizer)
    with pytest.raises(UserError, match=f"{handover.folder} was trained with another tokenizer .*here other"):
        handover.check(backbone, "other")


def test_a_full_model_is_a_base_itself_and_needs_no_other_but_its_tokenizer(write, backbone):
    """Trained without LoRA: no adapters, so no base below."""
    handover = dataclasses.replace(write("sft"), stack=(), adapters={}, base="other")
    handover.check(backbone, handover.tokenizer)
    with pytest.raises(UserError, match="another tokenizer"):
        handover.check(backbone, "other")


def test_another_template_is_refused_with_the_folder_and_none_on_either_side_passes(write):
    handover = write("sft")
    with pytest.raises(UserError, match=f"{handover.folder} was trained with another prompt template .*here other"):
        handover.check_template("other")
    handover.check_template("0123456789abcdef")
    handover.check_template(None)
    write("sft", template=None).check_template("other")


@pytest.mark.parametrize("adapter", ["sft", "reward"])
def test_one_bit_of_an_adapter_is_enough_to_refuse_it(write, tmp_path, adapter):
    write("reward")
    file = tmp_path / "handover" / adapter / "adapter_model.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(UserError, match=f"handover: the adapter {adapter} is not the one that was handed over"):
        Handover.read(tmp_path / "handover")
    file.unlink()
    with pytest.raises(UserError, match=f"{file} is missing; run its stage again"):
        Handover.read(tmp_path / "handover")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"stack": 3}', '{"stack": [], "color": "red"}'])
def test_a_manifest_that_is_none_is_one_sentence(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json is damaged .*; run its stage again"):
        Handover.read(tmp_path)


def test_a_folder_without_a_manifest_is_no_handover(tmp_path):
    with pytest.raises(UserError, match="is no hand-over folder"):
        Handover.read(tmp_path)


# Written in one piece


def killed_at(moment: int, folder, work) -> bool:
    """Run `work` in a process that dies before its so-many-th change of files; whether it died."""
    child = os.fork()
    if child == 0:
        steps = [0]

        def count(event: str, arguments: tuple) -> None:
            opens = event == "open" and str(folder.parent) in str(arguments[0])
            steps[0] += opens or event in ("os.mkdir", "os.remove", "os.rename", "os.rmdir")
            if steps[0] == moment:
                os._exit(9)

        sys.addaudithook(count)
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def content(folder) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files(folder)}


def test_a_kill_at_any_moment_leaves_the_old_one_until_the_new_one_is_whole_and_never_a_mixture(write, tmp_path):
    folder = tmp_path / "run/handover"
    folder.parent.mkdir()
    old, new = (content(write(role, tmp_path / role).folder) for role in ("sft", "reward"))
    states = []
    while True:
        shutil.rmtree(folder.parent)
        shutil.copytree(tmp_path / "sft", folder)
        if not killed_at(len(states) + 1, folder, lambda: write("reward", folder)):
            break
        found = content(folder)
        states.append("old" if found == old else "new" if found == new else "half")
        if states[-1] == "half":
            beside = [content(path) for path in folder.parent.iterdir() if path != folder]
            assert found == {}, "what is read is the old one or the new one, or there is none to read"
            assert new in beside, "the old one was touched before the new one was whole"
    assert states[:10] == ["old"] * 10
    assert states == sorted(states, key=["old", "half", "new"].index)
    assert content(folder) == new


def test_what_fails_while_it_is_written_leaves_the_old_one_and_nothing_beside_it(write, tmp_path):
    write("sft")
    before = content(tmp_path / "handover")
    with pytest.raises(TypeError, match="not JSON serializable"):
        write("reward", template=b"")  # found when everything else is written
    assert content(tmp_path / "handover") == before
    assert [path.name for path in tmp_path.iterdir()] == ["handover"]
