"""What a run may be continued with: only what leaves the steps to come as they were."""

import pytest

from jaxrlhf.config import RunConfig
from jaxrlhf.stages.continuing import may_change

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
