"""The host loop with evaluations: an over-optimising stage stops, its peak is kept, and a resume changes nothing.

Programs are numbers here: the state counts steps, and its gold score rises to a peak and falls while the reward rises.
"""

import json

import jax
import jax.numpy as jnp
import pytest

from jaxrlhf.config import MeshConfig, OptimizerConfig, RunConfig
from jaxrlhf.distributed.mesh import make_mesh
from jaxrlhf.rewards.functions import RewardFault
from jaxrlhf.stages.evaluation import Evaluated
from jaxrlhf.stages.loop import Loop, Run
from jaxrlhf.tracking.metrics import MetricsLog

TOTAL, EVERY, PEAK, PATIENCE = 40, 4, 13, 3
GOLD = "evaluation/reward/gold"
STOPPING = {"metric": GOLD, "mode": "highest", "patience": PATIENCE}
PLATEAU = {"metric": GOLD, "mode": "highest", "patience": 1}


def gold(step):
    return 1 - ((step - PEAK) / 20) ** 2


@pytest.fixture
def started(tmp_path):
    """`started(name, **section)`: a run in a folder of that name, with the settings of its ppo section."""

    def start(name="run", checkpoints=None, **section):
        ppo = {"data": {"path": "p.jsonl"}, "gold": "jaxrlhf.toy.world:gold_score", "evaluation": {"every": EVERY}}
        folder = tmp_path / name
        settings = {
            "run_dir": str(folder), "stages": ["ppo"], "model": {"path": "none"}, "ppo": ppo | section,
            "checkpoints": checkpoints or {"best": GOLD, "result": "best"},
        }  # fmt: skip
        logs = [MetricsLog(folder / f"{log}.jsonl") for log in ("metrics", "samples")]
        folder.mkdir(exist_ok=True)
        return Run(RunConfig.model_validate(settings), make_mesh(MeshConfig(), jax.devices()[:1]), *logs)

    return start


def play(run, kill_after=None, fault_at=None, evaluated=None):
    """Runs the stage with a step of `rate` each. Returns (loop, step of the result). `evaluated` gets the steps."""
    plateau = {"learning_rate": 1.0, "schedule": "plateau", "plateau": PLATEAU}
    state = {"step": jnp.int32(0), "x": jnp.float32(0)}

    def evaluate(state):
        step = int(state["step"])
        if evaluated is not None:
            evaluated.append(step)
        if step == fault_at:
            raise RewardFault("the server is gone")
        return Evaluated({"reward/gold": gold(step)}, {"evaluation": {"scores": [step]}}, step)

    optimizers = {"optimizer": OptimizerConfig.model_validate(plateau)}
    with Loop(run, "ppo", state, TOTAL, 5, evaluate, optimizers) as loop:
        for step in loop.steps():
            rate = loop.watch.optimizers["optimizer"].learning_rate
            loop.state = {"step": loop.state["step"] + 1, "x": loop.state["x"] + rate}
            loop.done(step, {"reward/score": step, "x": loop.state["x"]}, {}, 1)
            if step + 1 == kill_after:
                raise KeyboardInterrupt
        result = loop.result()
    return loop, int(loop.evaluated(result).results)


def lines(run, name="metrics"):
    found = [json.loads(line) for line in (run.folder / f"{name}.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "time/evaluation", "time")} for line in found]


def test_an_over_optimising_stage_stops_and_keeps_its_peak(started, capfd):
    run, evaluated = started(early_stopping=STOPPING), []
    loop, best = play(run, evaluated=evaluated)
    peak = max(range(EVERY, TOTAL, EVERY), key=gold)
    assert best == peak == 12 and abs(best - PEAK) <= EVERY
    stopped = peak + PATIENCE * EVERY
    assert loop.reached == stopped == len(lines(run)) == 24
    assert evaluated == [*range(EVERY, stopped + 1, EVERY), peak], "once each, and the best again for the table"
    early = {"step": 24, "of": TOTAL, "metric": GOLD, "best": pytest.approx(gold(peak)), "best_step": peak}
    assert loop.stopped_early() == {"stopped_early": early}
    said = capfd.readouterr().err
    assert f"ppo: stops early, after step 24 of 40: {GOLD} has not improved in 3 values in a row; its best was" in said
    assert "at step 12" in said and "ppo: the result is the checkpoint of step 12" in said
    assert [line["step"] for line in lines(run) if GOLD in line] == [4, 8, 12, 16, 20, 24]
    assert [line["evaluation"]["scores"] for line in lines(run, "samples")] == [[4], [8], [12], [16], [20], [24]]


def test_without_early_stopping_all_steps_are_done_and_the_peak_is_kept(started):
    run, evaluated = started(), []
    loop, best = play(run, evaluated=evaluated)
    assert (loop.reached, best, loop.stopped_early()) == (TOTAL, 12, {})


def test_the_last_step_is_evaluated_once(started):
    run, evaluated = started(checkpoints={"keep": 1}, evaluation={"every": 7}), []
    _, last = play(run, evaluated=evaluated)
    assert last == TOTAL and evaluated == [7, 14, 21, 28, 35, 40]
    assert [line["step"] for line in lines(run) if GOLD in line] == evaluated


def test_without_every_only_the_end_is_evaluated(started):
    run, evaluated = started(checkpoints={"keep": 1}, evaluation={}), []
    play(run, evaluated=evaluated)
    assert evaluated == [TOTAL] and not any(GOLD in line for line in lines(run))


def test_a_metric_of_training_may_stop_the_stage_which_is_then_evaluated(started):
    stopping = {"metric": "reward/score", "mode": "lowest", "patience": 6}
    run, evaluated = started(checkpoints={"keep": 1}, early_stopping=stopping), []
    loop, last = play(run, evaluated=evaluated)
    assert (loop.reached, last, evaluated) == (7, 7, [4, 7])
    assert GOLD in lines(run)[-1]


@pytest.mark.parametrize("kills", [(3, 12, 13), (24,), tuple(range(1, 24, 2))])
def test_killed_and_resumed_it_stops_at_the_same_step(started, kills):
    straight, killed = started("straight", early_stopping=STOPPING), started("killed", early_stopping=STOPPING)
    first, best = play(straight)
    for kill in kills:
        with pytest.raises(KeyboardInterrupt):
            play(killed, kill)
    second, again = play(killed)
    assert (second.reached, again, second.stopped_early()) == (first.reached, best, first.stopped_early())
    for log in ("metrics", "samples"):
        assert lines(killed, log) == lines(straight, log)
    assert first.watch.notes() == second.watch.notes()
    assert lines(straight)[-1]["x"] == 16 + 4 * 0.5 + 4 * 0.25, "the plateau has lowered the rate twice"


def test_a_fault_in_an_evaluation_repeats_the_step(started):
    straight, faulty = started("straight", early_stopping=STOPPING), started("faulty", early_stopping=STOPPING)
    play(straight)
    with pytest.raises(RewardFault):
        play(faulty, fault_at=16)
    assert [line["step"] for line in lines(faulty)] == list(range(1, 16))
    play(faulty)
    assert lines(faulty) == lines(straight) and lines(faulty, "samples") == lines(straight, "samples")


def test_a_stopped_stage_that_is_resumed_does_no_more_steps(started):
    run = started(early_stopping=STOPPING)
    play(run)
    before, evaluated = lines(run), []
    loop, best = play(run, evaluated=evaluated)
    assert (loop.reached, best, evaluated) == (24, 12, [12]) and lines(run) == before
    assert loop.stopped_early()["stopped_early"]["best_step"] == 12
