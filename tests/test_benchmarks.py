"""The benchmark of algorithms: its rows are settings of this package, fair to each other, and read back as measured."""

import importlib
import json
from pathlib import Path

import pytest

from jaxrlhf.algorithms.advantages import ADVANTAGES
from jaxrlhf.algorithms.policy_losses import POLICY_LOSSES
from jaxrlhf.config.reading import dump_config, load_config
from jaxrlhf.stages.metric_names import check_metrics

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("algorithms")


@pytest.fixture
def plan(benchmark, tmp_path):
    return benchmark.Plan(tmp_path, [0, 1], 70)


def config_of(benchmark, run):
    return load_config(str(benchmark.CONFIG), run.arguments)


def finish(benchmark, run, seconds, gold=(0.4, 0.9)):
    """The files that a finished run leaves, as far as the benchmark reads them."""
    (run.folder / "roles").mkdir(parents=True)
    (run.folder / "config.yaml").write_text(dump_config(config_of(benchmark, run)))
    reached = [{"reward/gold": score, "reward/score": 2 * score, "kl/k1": 10 * score} for score in gold]
    (run.folder / "roles/finished.json").write_text(json.dumps({"ppo": {"before": reached[0], "after": reached[1]}}))
    steps = [{"stage": "ppo", "step": i + 1, "seconds": s, **reached[1]} for i, s in enumerate(seconds)]
    lines = [{"stage": "sft", "step": 1, "seconds": 1000.0}, *steps]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_every_row_can_be_run_on_the_same_budget(benchmark, plan):
    for name in benchmark.ALGORITHMS:
        ppo = config_of(benchmark, plan.algorithm(name, 0)).ppo
        group = ppo.sampling.samples_per_prompt
        assert ppo.batch_size * group == benchmark.COMPLETIONS, name
        assert ppo.evaluation.prompts * group == benchmark.EVALUATED and ppo.evaluation.prompts % ppo.batch_size == 0
        assert ppo.iterations == 70 and (group > 1 or not ADVANTAGES[ppo.advantage.estimator].needs_group), name


def test_every_estimator_and_every_loss_has_a_row(benchmark, plan):
    rows = [config_of(benchmark, plan.algorithm(name, 0)).ppo for name in benchmark.ALGORITHMS]
    assert {row.advantage.estimator for row in rows} == set(ADVANTAGES)
    assert {row.update.loss for row in rows} == set(POLICY_LOSSES)
    assert len({str(row) for row in rows}) == len(rows), "no two rows are the same run"


def test_all_runs_have_folders_of_their_own_and_start_from_one_before(benchmark, plan):
    runs = [run for _, _, run in plan.todo([benchmark.OVER, *benchmark.ALGORITHMS])]
    assert len({run.folder for run in runs}) == len(runs)
    for number, run in enumerate(runs):
        run.check()
        origin = config_of(benchmark, run).model.run
        assert origin is None or origin in {str(earlier.folder) for earlier in runs[:number]}


def test_a_finished_run_becomes_a_row_and_one_with_other_settings_does_not(benchmark, plan, tmp_path):
    for seed, gold in enumerate((0.8, 0.9)):
        finish(benchmark, plan.algorithm("grpo", seed), [60.0, 50.0, 0.5, 0.7, 0.6], (0.4, gold))
    found = benchmark.results(plan)
    assert list(found) == ["grpo"]
    figures = found["grpo"]["seeds"][0]
    assert figures["seconds per iteration"] == 0.6, "compilation is not an iteration"
    assert figures["seconds"] == pytest.approx(111.8), "but it is time, and other stages are not"
    assert "0.850 (0.800 to 0.900)" in benchmark.write_table(plan)
    assert json.loads((tmp_path / "algorithms.json").read_text())["algorithms"]["grpo"]["seeds"]["1"]["KL"] == 9.0
    assert not benchmark.results(benchmark.Plan(tmp_path, [0, 1], 71))


def test_what_is_not_known_stops_the_command(benchmark, capsys):
    for wrong in (["--only", "ppo,nonsense"], ["--seeds", "0;1"]):
        with pytest.raises(SystemExit) as left:
            benchmark.parse(wrong)
        assert left.value.code == 2 and wrong[0] in capsys.readouterr().err


def test_smoothing_keeps_lines_and_their_length(benchmark):
    overoptimisation = importlib.import_module("overoptimisation")
    rising = [float(i) for i in range(20)]
    smooth = overoptimisation.smoothed(rising)
    assert len(smooth) == 20 and smooth[5:15] == rising[5:15]
    assert overoptimisation.smoothed([0.3] * 7) == pytest.approx([0.3] * 7)


def test_the_figure_is_drawn_from_the_runs(benchmark, plan, tmp_path):
    pytest.importorskip("matplotlib")
    for penalty, gold in zip(benchmark.PENALTIES, (0.1, 0.7)):
        for seed in plan.seeds:
            finish(benchmark, plan.over(penalty, seed), [1.0] * 12, (0.4, gold))
    said = benchmark.write_figure(plan)
    assert "no KL penalty: gold at most 0.100" in said and "\nKL penalty: gold at most 0.700" in said
    drawn = (tmp_path / "overoptimisation.svg").read_bytes()
    benchmark.write_figure(plan)
    assert drawn == (tmp_path / "overoptimisation.svg").read_bytes(), "the same runs give the same file"
    curves = json.loads((tmp_path / "overoptimisation.json").read_text())["curves"]
    assert curves["KL penalty"]["1"]["gold"] == [0.7] * 12


def test_the_runs_of_early_stopping_differ_in_it_alone(benchmark, plan):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        stopping = importlib.import_module("early_stopping")
    runs = stopping.runs_of(plan, 1)
    whole, stopped = (config_of(benchmark, run) for run in runs.values())
    for config in (whole, stopped):
        check_metrics(config)
    assert whole.ppo == stopped.ppo.model_copy(update={"early_stopping": None}) != stopped.ppo
    run = runs["stopped early"]
    finish(benchmark, run, [1.0] * 6)
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    for line, gold in zip(lines[1::2], (0.5, 0.9, 0.7)):
        line |= {stopping.GOLD: gold, "time/evaluation": 0.25}
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert stopping.figures(run) == {
        "iterations": 6, "peak at": 3, "gold at the peak": 0.9, "gold at the last evaluation": 0.7,
        "gold of the saved policy": 0.9, "seconds of evaluations": 0.75, "seconds of steps": 6.0,
    }  # fmt: skip
