"""Reading run directories: finished, killed, old, damaged; and what the report says of them."""

import json
import math
import random

import pytest

from jaxrlhf.errors import UserError
from jaxrlhf.report.health import warnings
from jaxrlhf.report.page import build, embedded, write_report
from jaxrlhf.report.reading import POINTS, read_run


def test_lines_that_cannot_be_read_are_left_out_and_counted(write_run):
    half = '{"stage": "ppo", "step": 4, "reward/sc'
    scores = [{"reward/score": score} for score in (1, math.nan, 3)]
    folder = write_run(ppo=scores, extra="nonsense\n[1]\n" + half)
    run = read_run(folder)
    curve = run["stages"]["ppo"]["metrics"]["reward/score"]
    assert (curve["x"], curve["y"]) == ([1, 3], [1.0, 3.0]), "a value that is no number leaves a gap"
    assert run["unread"] == 2, "the half line of a killed run is no fault"
    assert any("2 lines" in text for text in warnings(run))
    json.dumps(run, allow_nan=False)


@pytest.mark.parametrize("settings", [None, "a: [", "5"])
def test_a_run_without_valid_settings_still_has_curves(write_run, settings):
    run = read_run(write_run(ppo=[{"kl/k1": 1.0}], settings=settings))
    assert run["settings"] == {} and run["stages"]["ppo"]["metrics"]["kl/k1"]["y"] == [1.0]


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="give the directory of a run"):
        read_run(tmp_path)


def test_a_long_curve_is_averaged_over_equal_parts(write_run):
    values = [random.Random(0).random() for _ in range(3 * POINTS)]
    curve = read_run(write_run(ppo=[{"x": value} for value in values]))["stages"]["ppo"]["metrics"]["x"]
    assert curve["every"] == 3 and len(curve["y"]) == POINTS and curve["x"][-1] == 3 * POINTS
    assert curve["y"][5] == pytest.approx(sum(values[15:18]) / 3, rel=1e-4)


@pytest.mark.parametrize(("tokens", "lines"), [(10, 60), (4000, 5)])
def test_a_report_has_room_for_some_samples(write_run, tokens, lines):
    arrays = {"tokens": ["text"] * 8 * tokens, "values": [0.1234] * 8 * tokens}
    sample = {"prompt": "p", "completion": "c", "score": 0, **arrays}
    samples = [{"stage": "ppo", "step": i, "samples": [sample]} for i in range(1, 101)]
    found = read_run(write_run(samples=samples))["samples"]
    assert abs(len(found) - lines) <= 1 and [found[0]["step"], found[-1]["step"]] == [1, 100]


def test_a_stage_is_over_when_the_next_has_begun(write_run):
    line = json.dumps({"stage": "sft", "step": 3}) + "\n"
    folder = write_run(ppo=[{"kl/k1": 1.0}])
    log = folder / "metrics.jsonl"
    log.write_text(line + log.read_text())
    stages = read_run(folder)["stages"]
    assert [(name, stage["finished"]) for name, stage in stages.items()] == [("sft", True), ("ppo", False)]


def test_no_text_can_end_the_script():
    texts = ["</script><script>x()</script>", "<!--", "]]>", "\u2028 \ud800 \x00", "&lt;"]
    found = embedded({"texts": texts})
    assert "<" not in found and ">" not in found and "&" not in found and "\u2028" not in found
    assert json.loads(found)["texts"] == texts


def data_of(page):
    start = page.index('id="data">') + len('id="data">')
    return json.loads(page[start : page.index("</script>", start)])


def test_runs_that_differ_by_seed_are_one_group(write_run):
    kl = "ppo: {kl: {coef: %s}}\nseed: %d\nrun_dir: %s\n"
    folders = [write_run(f"r{i}", [{"kl/k1": i}], settings=kl % (coef, i, i)) for i, coef in enumerate([0.1, 0.1, 0.2])]
    data = data_of(build([read_run(folder) for folder in folders]))
    assert [group["runs"] for group in data["groups"]] == [[0, 1], [2]]
    assert [group["label"] for group in data["groups"]] == ["ppo.kl.coef=0.1 (2 seeds)", "ppo.kl.coef=0.2"]
    rows = {row["key"]: row for row in data["settings"]}
    assert rows["ppo.kl.coef"]["values"] == ["0.1", "0.1", "0.2"] and rows["ppo.kl.coef"]["differs"]


def test_names_of_runs_are_distinct(write_run):
    names = [run["name"] for run in data_of(build([read_run(write_run(name)) for name in ("a/run", "b/run")]))["runs"]]
    assert names == ["a/run", "b/run"]


def test_the_file_of_a_report_that_cannot_be_written(write_run, tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        write_report([write_run()], tmp_path / "missing" / "report.html")


def test_only_reports_are_replaced(write_run, tmp_path):
    run = write_run()
    (tmp_path / "notes.md").write_text("mine")
    (tmp_path / "link.html").symlink_to(tmp_path / "there.html")
    with pytest.raises(UserError, match="this file is not a report; remove it, or give another file"):
        write_report([run], tmp_path / "notes.md")
    with pytest.raises(UserError, match="this is a folder"):
        write_report([run], tmp_path)
    for _ in range(2):
        assert write_report([run], tmp_path / "link.html") == []
    assert (tmp_path / "link.html").is_symlink() and "jaxrlhf report" in (tmp_path / "there.html").read_text()


STEPS = 40
FINE = {
    "kl/k1": 4.0, "length/mean": 8.0, "length/eos_share": 1.0, "policy/entropy": 0.5, "value/explained_variance": 0.7,
    "optimizer/skipped": 0.0, "compiles/update": 1.0, "health/paused": 0.0,
}  # fmt: skip
FAULTS = {
    "alarm kl_runs_away began at step 8 and still holds (kl/per_token, above 0.8): raise ppo.kl.coef":
        lambda t: {"alarm/kl_runs_away": 1.0} if t >= 7 else {},
    "alarm entropy_collapses began at step 4 and ended after step 12, 2 times (policy/entropy, falls by 95%)":
        lambda t: {"alarm/entropy_collapses": float(t in (3, 4, 10, 11))},
    "alarm my_own began at step 1 and ended after step 1.": lambda t: {"alarm/my_own": float(t == 0)},
    "1 iterations made no update": lambda t: {"health/paused": float(t == 7)},
    "not finite": lambda t: {"optimizer/skipped": float(t == 7)},
    "compiled more than once: update": lambda t: {"compiles/update": 1.0 + (t > 9)},
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_has_its_warning(write_run, fault):
    found = warnings(read_run(write_run(ppo=[FINE | FAULTS[fault](t) for t in range(STEPS)])))
    assert len(found) == 1 and fault in found[0]


def test_a_run_without_faults_has_no_warning(write_run):
    rising = [FINE | {"reward/score": t, "reward/gold": 1 - math.exp(-t / 9)} for t in range(STEPS)]
    for steps in (rising, rising[:3], []):
        assert warnings(read_run(write_run(f"run{len(steps)}", ppo=steps))) == []
