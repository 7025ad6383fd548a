"""Each stage ends with what it reached, where that is, and a command that works there."""

import shlex
from types import SimpleNamespace

import pytest

from jaxrlhf.cli import export, generate
from jaxrlhf.stages.endings import ending

PPO = {"before": {"reward/score": -0.0001, "kl/k1": 0.0}, "after": {"reward/score": 1.5, "kl/k1": 2.0}}
REACHED = {
    "sft": ({"heldout_loss": 1.25}, "sft: held-out loss 1.250 nats per token; saved in {roles}/sft"),
    "reward_model": (
        {"heldout_accuracy": 0.75, "heldout_pairs": 64},
        "reward_model: accuracy 0.750 on 64 held-out pairs; saved in {roles}/reward",
    ),
    "ppo": (
        PPO,
        "ppo: reward 1.500, before PPO 0.000; KL to the reference 2.000 nats; saved in {roles}/policy, {roles}/value",
    ),
}


@pytest.mark.parametrize("stage", REACHED)
def test_a_stage_ends_with_its_result_its_files_and_the_next_command(stage, tmp_path):
    run = tmp_path / "a run"
    for name in ("sft", "reward", "policy", "value"):
        (run / "roles" / name).mkdir(parents=True)
    reached, text = REACHED[stage]
    result, last = ending(SimpleNamespace(run_dir=str(run), sft_trains_base=False), stage, reached)
    assert result == text.format(roles=run / "roles")
    _, command, *arguments = shlex.split(last.removeprefix(f"{stage}: next: "))
    parsed = {"generate": generate, "export": export}[command].parse(arguments)
    assert parsed.run == str(run)
    names = parsed.role.split(",") if command == "export" else parsed.roles.split(",")
    assert all(name == "base" or (run / "roles" / name).is_dir() for name in names)
