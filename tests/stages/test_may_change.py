"""What a run may be continued with: only what leaves the steps to come as they were."""

import pytest

from jaxrlhf.checkpoint.run_dir import check_run, open_run
from jaxrlhf.config import RunConfig
from jaxrlhf.config_io import dump_config
from jaxrlhf.stages.continuing import may_change, told

CONFIG = {
    "run_dir": "run",
    "stages": ["ppo"],
    "model": {"path": "model"},
    "ppo": {"data": {"path": "prompts.jsonl"}, "iterations": 20},
}
BEST = {"best": "reward/gold", "result": "best"}


def _with(path: str, value) -> RunConfig:
    """The settings with one of them changed; no path: as they are."""
    config = {**CONFIG, "ppo": dict(CONFIG["ppo"])}
    *above, name = path.split(".")
    section = config
    for key in above:
        section[key] = dict(section.get(key, {}))
        section = section[key]
    section[name] = value
    return RunConfig.model_validate(config)


@pytest.mark.parametrize(
    ("change", "settings", "allowed"),
    [
        (("run_dir", "old", "run"), {}, True),
        (("compilation_cache", "auto", None), {}, True),
        (("compilation_cache", "absent", "auto"), {}, True),  # a run that was begun before there was such a setting
        (("checkpoints.keep", 2, 5), {}, True),
        (("checkpoints.grace", 60.0, 20.0), {}, True),
        (("ppo.sample_every", 10, 1), {}, True),
        (("ppo.sampling.halvings", None, 3), {}, True),
        (("ppo.update.buckets", 1, 4), {}, True),
        (("sft.remat", "none", "full"), {}, True),
        (("ppo.update.remat", False, "none"), {}, True),  # as it was once spelled
        (("compiler_options", "absent", {}), {}, True),
        (("model.attention", "absent", "xla"), {}, True),
        (("model.attention", "xla", "cudnn"), {}, True),
        (("model.matmul_precision", "highest", "tf32"), {}, True),
        (("compiler_options.update", "absent", {"xla_a": 1}), {}, True),
        (("compiler_options.update.xla_a", 1, 2), {}, True),
        (("mesh.data", 8, 4), {}, True),
        (("ppo.save_every", 10, 5), {}, True),
        (("ppo.save_every", 10, 5), {"checkpoints": BEST}, False),  # other checkpoints to choose from
        (("checkpoints.best", None, "reward/gold"), {}, True),
        (("checkpoints.best", None, "reward/gold"), {"checkpoints": BEST}, False),
        (("checkpoints.result", "last", "best"), {"checkpoints": BEST}, False),
        (("checkpoints", "absent", {}), {}, False),
        (("ppo.iterations", 10, 20), {}, True),
        (("ppo.iterations", 30, 20), {}, False),
        (("ppo.iterations", "absent", 20), {}, False),
        (("ppo.iterations", 10, 20), {"ppo.update.optimizer": {"schedule": "cosine"}}, False),  # falls more slowly
        (("ppo.iterations", 10, 20), {"ppo.update.value_optimizer": {"schedule": "linear"}}, False),
        (("ppo.iterations", 10, 20), {"ppo.update.optimizer": {"schedule": "cosine", "total_steps": 99.0}}, True),
        (("ppo.iterations", 10, 20), {"checkpoints": BEST}, False),
        (("seed", 0, 1), {}, False),
        (("ppo.kl.coef", 0.1, 0.2), {}, False),
        (("ppo.batch_size", 64, 32), {}, False),
        (("model.dtype", "float32", "bfloat16"), {}, False),
        (("sft", None, "a section"), {}, False),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_a_change_is_allowed_or_not(change, settings, allowed):
    (path, value), *_ = [*settings.items(), ("run_dir", "run")]
    assert may_change(_with(path, value))(change) is allowed


@pytest.mark.parametrize(
    ("change", "rounds"),
    [
        (("ppo.sampling.halvings", 4, 0), True),
        (("ppo.update.buckets", 1, 4), True),
        (("ppo.update.buckets", "absent", 1), False),  # as all runs went before there was a choice
        (("checkpoints.keep", 2, 5), False),
    ],
    ids=["halvings", "buckets", "of-old", "keep"],
)
def test_what_may_round_otherwise_is_said(change, rounds):
    assert ("round otherwise" in (told(change) or "")) is rounds


@pytest.mark.parametrize(("before", "after", "said"), [("false", "none", False), ("true", "full", False),
                                                       ("false", "full", True), ("none", "dots", True)])  # fmt: skip
def test_a_run_from_before_remat_had_policies_goes_on(tmp_path, before, after, said):
    """Its `config.yaml` says true or false: that is no change, and is written anew as it is called now."""
    config = _with("ppo.update", {"remat": after}).model_copy(update={"run_dir": str(tmp_path)})
    text = dump_config(config)
    assert text.count(f"remat: {after}") == 1
    (tmp_path / "config.yaml").write_text(text.replace(f"remat: {after}", f"remat: {before}"))
    changes = check_run(tmp_path, text, may_change(config))
    lines = [line for line in map(told, changes) if line]
    assert len(changes) == 1 and len(lines) == said
    assert all("ppo.update.remat was" in line and "bit for bit" in line for line in lines)
    open_run(tmp_path, text, may_change=may_change(config))
    assert (tmp_path / "config.yaml").read_text() == text


def test_a_run_from_before_attention_and_compiler_options_goes_on_and_other_ones_are_told(tmp_path):
    config = _with("run_dir", str(tmp_path))
    text = dump_config(config)
    older = text
    for line in ("compiler_options: {}\n", "  attention: xla\n", "  matmul_precision: highest\n"):
        older = older.replace(line, "")
    (tmp_path / "config.yaml").write_text(older)
    changes = check_run(tmp_path, text, may_change(config))
    assert [key for key, *_ in changes] == ["model.attention", "model.matmul_precision", "compiler_options"]
    assert list(map(told, changes)) == [None, None, None]
    assert "bit for bit" in told(("model.attention", "absent", "cudnn"))
    assert "bit for bit" in told(("model.matmul_precision", "absent", "tf32"))
    open_run(tmp_path, text, may_change=may_change(config))
    config = config.model_copy(update={"compiler_options": {"update": {"xla_gpu_triton_gemm_any": True}}})
    changes = check_run(tmp_path, dump_config(config), may_change(config))
    (line,) = map(told, changes)
    assert line.startswith("compiler_options.update was absent") and "bit for bit" in line
    open_run(tmp_path, dump_config(config), may_change=may_change(config))
    (line,) = map(told, check_run(tmp_path, text, may_change(config)))  # and back
    assert line.startswith("compiler_options.update was a section, is now absent") and "bit for bit" in line
