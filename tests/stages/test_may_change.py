"""Which settings may change on resume: those that leave the remaining steps as they were."""

import pytest

from jaxrlhf.checkpoint.run_dir import check_run, open_run
from jaxrlhf.config import RunConfig
from jaxrlhf.config.reading import dump_config
from jaxrlhf.stages.resuming import change_text, may_change

CONFIG = {
    "run_dir": "run",
    "stages": ["ppo"],
    "model": {"path": "model"},
    "ppo": {"data": {"path": "prompts.jsonl"}, "iterations": 20},
}
ON_KL = {"metric": "kl/k1", "mode": "lowest"}
ON_EVALUATION = {"metric": "evaluation/kl/k1", "mode": "lowest"}
SLOWS = {"schedule": "plateau", "plateau": ON_EVALUATION}
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
        (("ppo.sampling.slots", None, 3), {}, True),
        (("ppo.update.packed", False, True), {}, True),
        (("sft.remat", "none", "full"), {}, True),
        (("ppo.update.remat", "full", "none"), {}, True),
        (("compiler_options", "absent", {}), {}, True),
        (("model.attention", "absent", "xla"), {}, True),
        (("model.attention", "xla", "cudnn"), {}, True),
        (("model.matmul_precision", "highest", "tf32"), {}, True),
        (("model.decode_kernels", False, True), {}, True),
        (("ppo.sampling.merge_adapter", False, True), {}, False),
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
        (("ppo.iterations", 10, 20), {"ppo.update.optimizer": {"schedule": "cosine", "total_steps": 99}}, True),
        (("ppo.iterations", 10, 20), {"checkpoints": BEST}, False),
        (("ppo.iterations", 10, 20), {"ppo.update.optimizer": {"schedule": "plateau", "plateau": ON_KL}}, True),
        (("ppo.evaluation.every", 10, 5), {}, True),
        (("ppo.evaluation.every", None, 5), {"ppo.early_stopping": ON_KL}, True),  # of training: not of evaluations
        (("ppo.evaluation.every", 10, 5), {"checkpoints": BEST}, False),
        (("ppo.evaluation.every", 10, 5), {"ppo.early_stopping": ON_EVALUATION}, False),
        (("ppo.evaluation.every", 10, 5), {"ppo.update.optimizer": SLOWS}, False),
        (("ppo.early_stopping.patience", 3, 5), {"ppo.early_stopping": ON_KL}, False),
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
        (("ppo.sampling.slots", 4, 2), True),
        (("ppo.update.packed", False, True), True),
        (("compiler_options.update.xla_a", 1, 2), True),
        (("model.attention", "xla", "cudnn"), True),
        (("checkpoints.keep", 2, 5), False),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_a_change_that_may_round_differently_says_so(change, rounds):
    assert ("round differently" in change_text(change)) is rounds


def test_a_changed_run_has_the_new_settings_in_its_file(tmp_path):
    config = _with("run_dir", str(tmp_path))
    open_run(tmp_path, dump_config(config))
    changed = config.model_copy(update={"compiler_options": {"update": {"xla_gpu_triton_gemm_any": True}}})
    for other, was in ((changed, "absent"), (config, "a section")):
        (line,) = map(change_text, check_run(tmp_path, dump_config(other), may_change(other)))
        assert line.startswith(f"compiler_options.update was {was}") and "bit for bit" in line
        open_run(tmp_path, dump_config(other), may_change=may_change(other))
        assert (tmp_path / "config.yaml").read_text() == dump_config(other)
