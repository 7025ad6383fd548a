"""Every file of a checkpoint, damaged in turn: the one before counts, or the run stops; other values never go on."""

import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.checkpoint import checksums
from jaxrlhf.checkpoint.checkpoints import Checkpoints
from jaxrlhf.checkpoint.checksums import Damaged, seal, unseal
from jaxrlhf.errors import UserError


def _tree(step: int) -> dict:
    return {
        "adapter": {"q_proj": {"lora_a": jnp.full((4, 2), float(step)), "lora_b": jnp.full((2,), step, jnp.bfloat16)}},
        "position": step,
        "order": np.arange(step, step + 3),
    }


def _same(one: dict, other: dict) -> bool:
    return all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Checkpoints of steps 4 and 9."""
    folder = tmp_path_factory.mktemp("saved") / "sft"
    with Checkpoints(folder) as checkpoints:
        for step in (4, 9):
            checkpoints.save(step, _tree(step), notes={"lines": step})
    return folder


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _garble(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 40)


DAMAGES = {"truncated": _truncate, "one bit flipped": _flip, "removed": Path.unlink, "other bytes": _garble}


def _files(folder: Path, damage) -> list[str]:
    """Every file of the checkpoint of step 9 that can be damaged so; orbax leaves an empty one as a mark."""
    files = [path.relative_to(folder) for path in sorted((folder / "9").rglob("*")) if path.is_file()]
    return [str(path) for path in files if damage in (Path.unlink, _garble) or (folder / path).stat().st_size]


def _restored(folder: Path):
    said = []
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore_latest(_tree(0), said.append), said


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_latest_falls_back_and_says_so(saved, tmp_path, name):
    files = _files(saved, DAMAGES[name])
    assert len(files) > 5
    for number, file in enumerate(files):
        folder = tmp_path / str(number)
        shutil.copytree(saved, folder)
        DAMAGES[name](folder / file)
        found, said = _restored(folder)
        assert found.step == 4 and found.notes == {"lines": 4} and _same(found.tree, _tree(4)), file
        assert len(said) == 1 and str(folder / "9") in said[0] and "step 4" in said[0], file
        assert Path(file).name in said[0] and "\n" not in said[0], file
        assert sorted(p.name for p in folder.iterdir()) == ["4", "9.damaged", "latest.json"]
        again, said = _restored(folder)  # and from here on nothing is missing
        assert again.step == 4 and len(said) == 1 and "step 9 is missing" in said[0]
        with Checkpoints(folder) as checkpoints:
            checkpoints.restore_latest(_tree(0), said.append)
            checkpoints.save(9, _tree(9))
        found, said = _restored(folder)
        assert found.step == 9 and _same(found.tree, _tree(9)) and said == []


@pytest.mark.parametrize("name", DAMAGES)
def test_where_all_are_damaged_it_stops_and_touches_nothing(saved, tmp_path, name):
    for number, file in enumerate(_files(saved, DAMAGES[name])):
        folder = tmp_path / str(number)
        shutil.copytree(saved, folder)
        DAMAGES[name](folder / file)
        (folder / "4" / "record.json").write_text("{")
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        with pytest.raises(UserError, match=r"every checkpoint is damaged \(step 9: .*; step 4: record\.json") as error:
            _restored(folder)
        assert "\n" not in str(error.value) and str(folder) in str(error.value)
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        with Checkpoints(folder) as checkpoints, pytest.raises(UserError, match="9: this checkpoint is damaged: "):
            checkpoints.restore(9, _tree(0))


def test_removed_checkpoints_are_noticed(saved, tmp_path):
    folder = tmp_path / "sft"
    shutil.copytree(saved, folder)
    shutil.rmtree(folder / "9")
    found, said = _restored(folder)
    assert found.step == 4 and len(said) == 1
    assert "the checkpoint of step 9 is missing; the run resumes from step 4" in said[0]
    shutil.rmtree(folder / "4")
    with pytest.raises(UserError, match="a checkpoint of step 9 was saved here, but no checkpoint is left"):
        _restored(folder)
    (folder / "latest.json").write_text("nonsense")
    with pytest.raises(UserError, match="no checkpoint is left"):
        _restored(folder)
    shutil.rmtree(folder)  # as the message says
    assert _restored(folder) == (None, [])


def test_the_record_of_the_latest_may_be_damaged_while_the_checkpoints_are_not(saved, tmp_path):
    for text in ("", "[]", "{}", '{"step": "x"}', '{"step": 4}'):
        folder = tmp_path / "sft"
        shutil.copytree(saved, folder, dirs_exist_ok=True)
        (folder / "latest.json").write_text(text)
        found, said = _restored(folder)
        assert found.step == 9
        assert ["latest.json: this file is" in line for line in said] == ([] if text == '{"step": 4}' else [True])


def test_a_file_that_may_not_be_read_is_no_damage(saved, tmp_path, monkeypatch):
    folder = tmp_path / "sft"
    shutil.copytree(saved, folder)

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checksums, "open", refused, raising=False)
    with pytest.raises(UserError, match="9: the checkpoint cannot be read: Permission denied"):
        _restored(folder)
    assert (folder / "9").is_dir()


def test_a_tree_of_other_settings_is_no_damage(saved, tmp_path):
    folder = tmp_path / "sft"
    shutil.copytree(saved, folder)
    with Checkpoints(folder) as checkpoints, pytest.raises(UserError, match="in the checkpoint, but must be"):
        checkpoints.restore_latest({"adapter": jnp.zeros(3)}, print)
    assert (folder / "9").is_dir()


def test_each_flipped_bit_of_each_file_is_found(tmp_path):
    folder = tmp_path / "sealed"
    (folder / "sub").mkdir(parents=True)
    (folder / "a").write_bytes(b"0123456789")
    (folder / "sub" / "b").write_bytes(bytes(20))
    (folder / "empty").write_bytes(b"")
    seal(folder, {"leaves": {"x": "float32[2]"}})
    assert unseal(folder) == {"leaves": {"x": "float32[2]"}}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        data = path.read_bytes()
        for bit in range(8 * len(data)):
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            with pytest.raises(Damaged, match=path.name):
                unseal(folder)
        path.write_bytes(data)
    unseal(folder)


def test_shares_together_read_every_file(tmp_path):
    for number in range(7):
        (tmp_path / str(number)).write_bytes(bytes(number))
    seal(tmp_path, {})
    for number in range(7):
        path = tmp_path / str(number)
        path.write_bytes(b"x" * (number + 1))
        said = []
        for share in range(3):
            try:
                unseal(tmp_path, share, 3)
            except Damaged as damage:
                said.append(str(damage))
        assert said == [f"{number} has {number + 1} bytes instead of {number}"]
        path.write_bytes(bytes(number))


def test_the_record_is_plain_json(saved):
    sealed = json.loads(json.loads((saved / "9" / "record.json").read_text())["sealed"])
    assert sealed["content"]["values"] == {"position": "9"} and sealed["content"]["notes"] == {"lines": 9}
