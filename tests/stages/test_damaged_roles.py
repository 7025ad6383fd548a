"""What a run has left is checked before it goes on: a role that is gone, or other bytes than were written, stop it."""

import json
import shutil

import jax
import pytest

from jaxrlhf.checkpoint.run_dir import check_run
from jaxrlhf.config import RunConfig
from jaxrlhf.errors import UserError
from jaxrlhf.models.adapters import init_adapter
from jaxrlhf.stages.roles import check_none_missing, load_roles, mark_finished, save_base, save_role
from jaxrlhf.tracking.metrics import MetricsLog

SMALL = {"hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 16, "max_positions": 32}


def config(run_dir):
    data = {"path": "builtin:assistant-demonstrations"}
    return RunConfig.model_validate({
        "run_dir": str(run_dir), "stages": ["sft", "reward_model"], "model": {"new": SMALL}, "sft": {"data": data},
        "reward_model": {"data": {"path": "builtin:assistant-preferences"}},
    })  # fmt: skip


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """A run that has made its base, finished SFT and left a checkpoint of the next stage."""
    folder = tmp_path_factory.mktemp("roles") / "run"
    roles = load_roles(config(folder))
    save_base(str(folder), roles.base, roles.tokenizer)
    save_role(str(folder), "sft", init_adapter(roles.base, config(folder).adapter, jax.random.key(0)))
    mark_finished(str(folder), "sft", {"heldout_loss": 1.0})
    (folder / "checkpoints" / "reward_model").mkdir(parents=True)
    return folder


@pytest.fixture
def run(left, tmp_path):
    shutil.copytree(left, tmp_path / "run")
    return tmp_path / "run"


def files(left):
    return sorted(path.relative_to(left).as_posix() for path in (left / "roles").glob("*/*"))


def test_what_is_sound_is_loaded(run):
    check_none_missing(config(run))
    assert set(load_roles(config(run)).adapters) == {"sft"}
    assert len(files(run)) >= 6


@pytest.mark.parametrize("role", ["base", "sft"])
@pytest.mark.parametrize("harm", ["flipped", "truncated", "removed"])
def test_every_file_of_a_role_that_is_damaged_is_named(run, role, harm):
    for path in sorted((run / "roles" / role).iterdir()):
        whole = path.read_bytes()
        if harm == "flipped":
            middle = len(whole) // 2
            path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :])
        elif harm == "truncated":
            path.write_bytes(whole[:-1])
        else:
            path.unlink()
        if path.name == "record.json" and harm == "removed":  # as a kill leaves it
            load_roles(config(run))
        else:
            with pytest.raises(UserError, match=rf"roles/{role}.*{path.name}.*restore it") as caught:
                load_roles(config(run))
            assert "\n" not in str(caught.value)
        path.write_bytes(whole)
    load_roles(config(run))


@pytest.mark.parametrize("role, why", [("base", "the run made it"), ("sft", "the stage sft saved it")])
def test_a_role_that_is_gone_is_not_made_anew(run, role, why):
    shutil.rmtree(run / "roles" / role)
    with pytest.raises(UserError, match=f"roles/{role}: is missing, but {why}"):
        check_none_missing(config(run))


def test_a_role_that_is_written_again_is_sound(run):
    other = init_adapter(load_roles(config(run)).base, config(run).adapter, jax.random.key(1))
    save_role(str(run), "sft", other)
    load_roles(config(run))


@pytest.mark.parametrize("name", ["checkpoints", "roles", "metrics.jsonl"])
def test_a_run_without_its_settings_is_not_taken_over(tmp_path, name):
    (tmp_path / name).mkdir() if "." not in name else (tmp_path / name).write_text("{}\n")
    with pytest.raises(UserError, match=rf"has {name} of a run, but no config.yaml"):
        check_run(tmp_path, "seed: 0")


def test_settings_that_are_no_text_are_refused_in_one_line(tmp_path):
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(UserError, match="the file must hold the settings of a run"):
        check_run(tmp_path, "seed: 0")


def test_lines_that_are_lost_are_counted(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written = [json.dumps({"stage": "ppo", "step": step}) + "\n" for step in (1, 2, 3)]
    for kept, lines, gone in ((3, 2, 0), (2, 2, 0), (1, 2, 1), (0, 2, 2)):
        path.write_text("".join(written[:kept]))
        assert MetricsLog(path).truncate("ppo", 2, lines) == gone
        assert len(path.read_text().splitlines()) == min(kept, 2)
    path.unlink()
    assert MetricsLog(path).truncate("ppo", 2, 2) == 2
    path.write_text('{"stage": 3, "step": "q"}\n')
    with pytest.raises(UserError, match="not a line of this log"):
        MetricsLog(path).truncate("ppo", 2, 1)
