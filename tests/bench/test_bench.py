"""The bench: figures that fit together, arithmetic that equals a count by hand and what the compiler was given."""

import importlib
import json
import math
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxrlhf.bench import machine
from jaxrlhf.bench.filling import Filler
from jaxrlhf.bench.measure import with_lengths
from jaxrlhf.bench.timing import slowest
from jaxrlhf.cli import bench
from jaxrlhf.config import PPOConfig
from jaxrlhf.config.reading import load_config
from jaxrlhf.distributed.mesh import make_mesh
from jaxrlhf.models.config import DecoderConfig, LayerKind
from jaxrlhf.models.decoder import abstract_decoder
from jaxrlhf.models.target import Target
from jaxrlhf.plan import work
from jaxrlhf.plan.work import Rates
from jaxrlhf.stages.shapes import Shapes

ROOT = Path(__file__).parent.parent.parent
CONFIG = str(ROOT / "configs" / "bench.yaml")
V, D, F, N, K, H, L = 64, 16, 24, 2, 1, 8, 1
B, P, R, S = 4, 4, 8, 12
RANK = 2
TINY = [f"ppo.batch_size={B}", f"ppo.max_prompt_tokens={P}", f"ppo.sampling.max_new_tokens={R}", "adapter.rank=2"]
TINY += ["ppo.update.microbatch_size=null"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a config.json and no weights."""
    folder = tmp_path_factory.mktemp("model")
    given = json.loads((ROOT / "configs" / "bench" / "config.json").read_text())
    given |= {"vocab_size": V, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": L}
    given |= {"num_attention_heads": N, "num_key_value_heads": K, "max_position_embeddings": 32}
    (folder / "config.json").write_text(json.dumps(given))
    return folder


@pytest.fixture(scope="module")
def small_machine():
    """Rates are measured on small arrays: what they are does not matter here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxrlhf.bench.machine._SIZES", {"cpu": (128, 2**16)})
        yield


@pytest.fixture(scope="module")
def measured(model, small_machine, tmp_path_factory):
    """What the command wrote of the tiny work, in bfloat16, where LoRA pairs are products of their own."""
    target = tmp_path_factory.mktemp("bench") / "bench.json"
    arguments = ["--config", CONFIG, "--json", str(target), "--repeats", "3", "--iterations", "2"]
    arguments += [f"model.path={model}", "model.dtype=bfloat16", "ppo.update.epochs=2", *TINY]
    assert bench.main([*arguments, f"compiler_options.experience.xla_dump_to={target.parent / 'dump'}"]) == 0
    return json.loads(target.read_text())


def numbers_in(value, where=""):
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from numbers_in(inner, f"{where}/{name}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from numbers_in(inner, f"{where}/{i}")
    elif isinstance(value, int | float):
        yield where, value


# ---------------------------------------------------------------- the command


def test_every_program_of_an_iteration_is_there_with_finite_positive_figures(measured):
    (stage,) = measured["stages"]
    assert [p["name"] for p in stage["programs"]] == ["rollout", "reward", "annotate", "experience", "update"]
    assert measured["model"]["parameters"] == 2 * V * D + L * (2 * D * N * H + 2 * D * K * H + 3 * D * F + 2 * D) + D
    for where, value in numbers_in(measured):
        assert math.isfinite(value) and (value > 0 or where.endswith(("results", "flops", "flops_per_second"))), where
    tokens = {p["name"]: p["tokens"] for p in stage["programs"]}
    assert tokens == dict.fromkeys(("rollout", "reward", "annotate", "experience"), B * R) | {"update": 2 * B * R}
    without_products = [p["name"] for p in stage["programs"] if not p["flops"]]
    assert without_products == ["experience"]


def test_a_program_is_timed_with_the_options_of_its_name(measured):
    (options,) = measured["model"]["compiler_options"].values()
    dumped = {file.name.split(".")[1] for file in Path(options["xla_dump_to"]).glob("*jit_*")}
    assert dumped == {"jit_neg", "jit_experience"}  # the first checks that XLA has the option


def test_shares_fit_their_parts(measured):
    (stage,) = measured["stages"]
    rates = measured["machine"]
    for p in stage["programs"]:
        assert p["share"] == pytest.approx(p["least_seconds"] / p["seconds"])
        alone = max(p["flops"] / rates["flops_per_second"], p["bytes"] / rates["bytes_per_second"])
        assert p["least_seconds"] >= alone * (1 - 1e-9), "phases cannot overlap"
        if p["name"] != "rollout":
            assert p["least_seconds"] == pytest.approx(alone)
        assert sorted(p["all_seconds"])[1] == p["seconds"] and len(p["all_seconds"]) == 3
        assert p["cpu_seconds"] <= 1.5 * measured["machine"]["cores"] * max(p["all_seconds"]) + 0.05
        assert p["memory"]["peak"] == sum(p["memory"][part] for part in ("arguments", "results", "temporaries"))
    assert stage["seconds"] == pytest.approx(sum(p["seconds"] for p in stage["programs"]))
    assert stage["least_seconds"] == pytest.approx(sum(p["least_seconds"] for p in stage["programs"]))
    loop = stage["loop"]
    assert len(loop["all_seconds"]) == 2 and loop["programs_seconds"] < loop["seconds"]
    assert set(loop["by_program"]) == {p["name"] for p in stage["programs"]}


def test_one_program_is_timed_alone_with_the_kernels_that_took_most(model, small_machine, tmp_path, capsys):
    target = tmp_path / "bench.json"
    arguments = ["--config", CONFIG, "--json", str(target), "--repeats", "2", "--only", "annotate"]
    assert bench.main([*arguments, "--profile", str(tmp_path / "traces"), f"model.path={model}", *TINY]) == 0
    (stage,) = json.loads(target.read_text())["stages"]
    (program,) = stage["programs"]
    assert program["name"] == "annotate" and "loop" not in stage and program["tokens"] == B * R
    assert "seconds" not in stage, "sums over some of the programs are of nothing"
    assert program["kernels"] and program["kernels"] == sorted(program["kernels"], key=lambda k: -k["seconds"])
    assert all(k["seconds"] > 0 and k["calls"] >= 1 for k in program["kernels"])
    said = capsys.readouterr().out
    assert said.index("\nannotate ") < said.index("peak memory") and program["kernels"][0]["name"] in said
    assert slowest(tmp_path / "none", 1) == []


def test_json_is_written_after_each_program_and_lines_come_as_they_are_known(model, small_machine, tmp_path, capsys):
    target, seen = tmp_path / "bench.json", []
    real = bench.json.dumps

    def dumps(found, **more):
        seen.append([p["name"] for stage in found["stages"] for p in stage["programs"]])
        return real(found, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.json, "dumps", dumps)
        only = ["--only", "reward,experience", "--repeats", "1"]
        assert bench.main(["--config", CONFIG, "--json", str(target), *only, f"model.path={model}", *TINY]) == 0
    assert seen == [[], ["reward"], ["reward", "experience"], ["reward", "experience"]]
    names = [line.split(" ")[0] for line in capsys.readouterr().out.splitlines()]
    assert [name for name in names if name in ("ppo", "program", "reward", "experience", "iteration,")] == [
        "ppo", "program", "reward", "experience",
    ]  # fmt: skip


def test_rates_of_products_have_the_precision_of_the_run(monkeypatch):
    """jax's own default for float32 on a GPU is TF32, which is several times as fast."""
    monkeypatch.setattr(machine, "_LARGE", (8, 64))
    texts = []
    monkeypatch.setattr(machine, "_seconds", lambda step, x: texts.append(jax.jit(step).lower(x).as_text()) or 1.0)
    for precision, written in (("highest", "HIGHEST"), ("tf32", "DEFAULT")):
        rates = machine.measure_rates("float32", 2, Target("gpu", matmul_precision=precision))
        assert f"precision = [{written}, {written}]" in texts[-2]
        assert rates == Rates(2 * 2.0 * 8**3, 2 * 3.0 * 64), "of both cards"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--repeats", "0"], "--repeats: must be at least 1, not 0"),
        (["--only", "rolout"], "--only: this run has no program 'rolout'; the programs are rollout, reward"),
        (["--json", "nowhere/at/all.json"], "nowhere/at/all.json' cannot be written: No such"),
        (["--json", "tests"], "/tests' cannot be written: Is a directory"),
        (["--json", ""], "--json: the path is empty; give a path"),
        (["--profile", "README.md"], "README.md' cannot be written"),
        (["model.path=./absent"], "/absent: no such folder with a config.json"),
        (["ppo.update.minibatches=7"], "ppo.update.minibatches"),
        (["ppo.sampling.max_new_tokens=1000"], "512 positions"),
        (["ppo.sampling.temperature=0"], "ppo.sampling.temperature"),
        (["ppo.advantage.estimator=rloo"], "ppo.sampling.samples_per_prompt"),
        (["ppo.sampling.pad_token=99999"], "ids from 0 to 4095"),
        (["--json", "/proc/version"], "--json: '/proc/version' cannot be written"),
        (["model.attention=cudnn", "model.dtype=bfloat16"], "model.attention: cudnn needs an NVIDIA GPU"),
        (["compiler_options.rollout.xla_no=1"], "compiler_options.rollout.xla_no"),
        (["ppo.bach_size=3"], "ppo.batch_size"),
    ],
    ids=["repeats", "only", "json", "folder", "nothing", "profile", "model", "minibatches", "positions", "greedy",
         "group", "token", "unwritable", "attention", "option", "key"],
)
def test_bad_input_stops_with_one_line(arguments, complaint, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("jaxrlhf.bench.measure.measure_rates", lambda *_: pytest.fail("stopped too late"))
    assert bench.main(["--config", CONFIG, *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and complaint in said.err and said.err.startswith("error: ") and said.err.count("\n") == 1


# ---------------------------------------------------------------- arithmetic and bytes


def lora(paths, head=False):
    leaf = {(i, o): {"lora_a": np.zeros((i, RANK)), "lora_b": np.zeros((RANK, o))} for i, o in set(paths.values())}
    score = {"score": {"kernel": np.zeros((D, 1))}} if head else {}
    return {path: leaf[shape] for path, shape in paths.items()} | score


LINEAR = {
    "layers.0.attention.q_proj": (D, N * H), "layers.0.attention.k_proj": (D, K * H),
    "layers.0.attention.v_proj": (D, K * H), "layers.0.attention.o_proj": (N * H, D),
    "layers.0.mlp.gate_proj": (D, F), "layers.0.mlp.up_proj": (D, F), "layers.0.mlp.down_proj": (F, D),
}  # fmt: skip
W = 2 * D * N * H + 2 * D * K * H + 3 * D * F
PAIRS = RANK * sum(i + o for i, o in LINEAR.values())
LATE = 2 * D * N * H + 3 * D * F  # what only a position itself reads: q, o, MLP
LATE_PAIRS = RANK * sum(i + o for path, (i, o) in LINEAR.items() if path[-6:] not in ("k_proj", "v_proj"))
QKV_IN = D * (N + 2 * K) * H + 3 * D * RANK  # what the gradient of the embedding would go through


def decoder(dtype="bfloat16", **more):
    """In bfloat16 LoRA pairs are products of their own."""
    return abstract_decoder(DecoderConfig(V, D, F, L, N, K, H, 64, **more), dtype)


def test_a_step_of_training_is_the_count_by_hand():
    base, policy, value = decoder(), lora(LINEAR), lora(LINEAR, head=True)
    lengths, answers = np.full(B, S), np.full(B, R)
    tokens, wanted, seen = B * S, B * R, B * (S * (S - 1) / 2 - (S - R) * (S - R - 1) / 2)
    late, q_in = LATE * (tokens - wanted), (D * N * H + D * RANK) * (tokens - wanted)
    trunk = 6 * (W + PAIRS) * tokens - 2 * W * tokens - 2 * QKV_IN * tokens + 3 * 4 * N * H * seen
    trunk -= 4 * late + 6 * LATE_PAIRS * (tokens - wanted) - 2 * q_in  # of the prompts the last layer is not read
    hand = 2 * trunk + 4 * D * V * wanted + 6 * D * wanted
    found = work.update(base, policy, value, lengths, answers, PPOConfig(epochs=3, minibatches=1))
    assert found.flops.sum() == 3 * hand and found.tokens == 3 * wanted
    one_trunk = PPOConfig(epochs=4, minibatches=1, value_trunk="policy")
    shared = work.update(base, policy, {"score": value["score"]}, lengths, answers, one_trunk)
    assert shared.flops.sum() == 4 * (trunk + 4 * D * V * wanted + 6 * D * wanted)


@pytest.mark.parametrize(("steps", "part"), [(0.0, 1 / 6), (2.0, 3 / 6), (6.0, 1)])
def test_steps_that_are_left_out_are_no_part_of_the_least(steps, part):
    """`kl_stop` ends an update after the step whose KL was too much."""
    mask = np.ones((B, S), bool)
    rows = SimpleNamespace(mask=mask, response_mask=mask)
    given = (SimpleNamespace(policy=lora(LINEAR), value=None), decoder(), rows)
    config = SimpleNamespace(ppo=SimpleNamespace(update=PPOConfig(epochs=3, minibatches=2, kl_stop=0.1)))
    found = work.work_of("update", given, {}, (None, {"policy/steps": steps}), config)
    whole = work.work_of("update", given, {}, (None, {}), config)
    assert found.flops.sum() == pytest.approx(part * whole.flops.sum())
    assert found.tokens == pytest.approx(part * whole.tokens)


def test_training_the_whole_model_has_the_gradient_of_every_weight():
    base, lengths = decoder(), np.full(B, S)
    whole = {path: {"kernel": np.zeros(shape)} for path, shape in (LINEAR | {"lm_head": (D, V)}).items()}
    tokens, logits, seen = B * S, B * (S - 1), B * S * (S + 1) / 2
    found = work.train_step(base, whole, lengths, logits, 0.0)
    assert found.flops.sum() == 6 * W * tokens + 6 * D * V * logits + 3 * 4 * N * H * seen
    pairs = work.train_step(base, lora(LINEAR, head=True), lengths, 0.0, B)
    assert pairs.flops.sum() == (4 * W + 6 * PAIRS - 2 * QKV_IN) * tokens + 6 * D * B + 3 * 4 * N * H * seen


def test_a_step_of_decoding_reads_weights_and_what_is_filled():
    base, policy = decoder(), lora(LINEAR)
    found = work.rollout(base, policy, np.full(B, P), np.full(B, R))
    assert len(found.flops) == R, "one for the prompts, and one for each token but the first"
    assert found.flops[1] == 2 * (W + PAIRS + D * V) * B + 4 * N * H * (P + 1) * B
    pairs_bytes = 8 * PAIRS  # of float64 arrays
    weights = 2 * (W + 2 * D + D + D * V + B * D) + pairs_bytes
    assert found.bytes[1] == weights + 2 * K * H * 2 * (P + 1) * B
    assert (np.diff(found.bytes[1:]) == 2 * K * H * 2 * B).all(), "the cache grows by a token of each row"


def test_in_float32_a_pair_is_added_to_its_kernel_where_that_is_less():
    lengths, answers, minibatches, policy = np.full(B, S), np.full(B, R), 2, lora(LINEAR)
    tokens, wanted = B * S, B * R
    own, merged, saved = 0, 0, 0
    for path, (i, o) in LINEAR.items():
        of = tokens if path[-6:] in ("k_proj", "v_proj") else wanted
        own += 2 * RANK * (i + o) * of
        less = i * o * minibatches < (i + o) * of
        merged += 2 * RANK * (i * o * minibatches if less else (i + o) * of)
        saved += 2 * RANK * i * of if less and path[-6:] in ("q_proj", "k_proj", "v_proj") else 0
    assert merged < own, "or the sizes show nothing"
    settings = PPOConfig(epochs=3, minibatches=minibatches)
    found = {
        kind: work.update(decoder(kind), policy, None, lengths, answers, settings) for kind in ("bfloat16", "float32")
    }
    # What goes into the first layer wants no gradient: of a pair on its own that spares a product.
    assert (found["float32"].flops - found["bfloat16"].flops).sum() == 3 * (merged - own + saved)
    few = work.train_step(decoder("float32"), policy, np.array([2]), 0.0, 1.0)
    assert few.flops == work.train_step(decoder(), policy, np.array([2]), 0.0, 1.0).flops
    steps = work.rollout(decoder("float32"), policy, np.full(B, P), np.full(B, R))
    assert steps.flops[1] == 2 * (W + D * V) * B + 4 * N * H * (P + 1) * B
    assert steps.bytes[1] == 4 * (W + 2 * D + D + D * V + B * D) + 2 * K * H * 4 * (P + 1) * B


def test_rows_that_ended_cost_nothing_and_the_longest_says_when_to_stop():
    base, policy, prompts = decoder(), lora(LINEAR), np.full(B, P)
    full = work.rollout(base, policy, prompts, np.full(B, 5))
    ragged = work.rollout(base, policy, prompts, np.array([5, 1, 1, 1]))
    assert len(ragged.flops) == len(full.flops) == 5
    assert (ragged.flops[0], ragged.bytes[0]) == (full.flops[0], full.bytes[0])
    assert ragged.flops[1] == full.flops[1] / B
    assert ragged.tokens == 8 and (ragged.bytes[1:] < full.bytes[1:]).all()


def test_a_window_and_a_group_see_and_read_less():
    policy, prompts = lora(LINEAR), np.full(B, P)
    wide = work.rollout(decoder(), policy, prompts, np.full(B, R))
    narrow = work.rollout(decoder(layer_kinds=(LayerKind(window=3),)), policy, prompts, np.full(B, R))
    assert narrow.flops[-1] - wide.flops[-1] == -4 * N * H * B * (P + R - 1 - 3)
    group = work.rollout(decoder(), policy, prompts, np.full(3 * B, R))
    assert (group.flops[0], group.bytes[0]) == (wide.flops[0], wide.bytes[0]), "prompts are read once"
    assert group.flops[1] == 3 * wide.flops[1]


def test_what_binds_is_the_larger_of_both():
    made = work.Work(np.array([10.0, 1.0]), np.array([1.0, 3.0]), np.array([0.0, 5.0]), 1.0)
    assert made.least_seconds(Rates(1.0, 1.0)) == 18.0 and made.bound_by(Rates(1.0, 1.0)) == "arithmetic"
    assert made.least_seconds(Rates(10.0, 1.0)) == 9.0 and made.bound_by(Rates(10.0, 1.0)) == "memory"


# ---------------------------------------------------------------- arguments


def test_full_and_geometric_answers_come_from_stop_tokens_alone(model):
    config = load_config(CONFIG, [f"model.path={model}"])
    assert with_lengths(config, "full", V).ppo.sampling.stop_tokens == ()
    geometric = with_lengths(config, "geometric", 4096).ppo.sampling
    assert geometric.stop_tokens == tuple(range(0, 4096, 64 // 4)), "of 64 tokens the mean is 16"

    def stop_tokens(limit):
        changed = load_config(CONFIG, [f"model.path={model}", f"ppo.sampling.max_new_tokens={limit}"])
        return with_lengths(changed, "geometric", 8).ppo.sampling.stop_tokens

    assert stop_tokens(10**6) == (0,), "an answer can always end"
    assert len(stop_tokens(1)) < 8, "and need not"


def test_shapes_become_arrays_once_and_hold_what_their_names_say(model):
    config = load_config(CONFIG, [f"model.path={model}", *TINY])
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    shapes = Shapes(config, mesh, decoder().config)
    filler, adapter = Filler(shapes.model, 0), shapes.adapter(config.adapter, "value")
    made, again = filler.fill(adapter), filler.fill({"again": adapter})["again"]
    for given, one, two in zip(*map(jax.tree.leaves, (adapter, made, again))):
        assert one is two and one.shape == given.shape and one.dtype == given.dtype and one.sharding == given.sharding
        assert np.isfinite(one).all() and (np.asarray(one).any() or one.shape == (1,))  # a head begins without bias
    with pytest.raises(ValueError, match="wurzel"):
        filler.fill({"wurzel": jax.ShapeDtypeStruct((2,), np.float32)})


# ---------------------------------------------------------------- benchmarks/


@pytest.fixture(scope="module")
def scripts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield SimpleNamespace(compare=importlib.import_module("compare"), regress=importlib.import_module("regress"))


def test_a_program_that_became_slower_is_named(scripts):
    stored = {"ppo": {"rollout": 0.5, "update": 0.3}}
    assert scripts.regress.slower({"ppo": {"rollout": 0.45, "update": 0.4}}, stored) == []
    (line,) = scripts.regress.slower({"ppo": {"rollout": 0.3, "update": 0.3}}, stored)
    assert "rollout" in line and "1.67 times" in line
    (line,) = scripts.regress.slower({"ppo": {"update": 0.3}}, stored)
    assert "rollout" in line and "no longer measured" in line


def test_shares_are_of_the_best_rates_and_the_fastest_call_of_all_rounds(scripts):
    def found(flops_rate, share):
        programs = [
            {"name": "update", "flops": 1.0, "bound_by": "arithmetic", "best_share": share},
            {"name": "rollout", "flops": 1.0, "bound_by": "memory", "best_share": share},
            {"name": "experience", "flops": 0.0, "bound_by": "memory", "best_share": share},
        ]
        machine = {"flops_per_second": flops_rate, "bytes_per_second": 10.0}
        return {"machine": machine, "stages": [{"programs": programs}]}

    rounds = [{"ppo": found(100.0, 0.8)}, {"ppo": found(200.0, 0.5)}]
    assert scripts.regress.shares(rounds) == {"ppo": {"update": 0.5, "rollout": 0.8}}


def test_regress_stores_and_compares_per_machine(scripts, measured, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(scripts.regress, "RATIOS", tmp_path / "ratios.json")
    monkeypatch.setattr(scripts.regress, "measure", lambda overrides: measured)
    assert scripts.regress.main([]) == 2 and "--store" in capsys.readouterr().err
    assert scripts.regress.main(["--store"]) == 0 and scripts.regress.main([]) == 0
    slow = json.loads(json.dumps(measured))
    slow["stages"][0]["programs"][0]["best_share"] /= 2
    monkeypatch.setattr(scripts.regress, "measure", lambda overrides: slow)
    capsys.readouterr()
    assert scripts.regress.main([]) == 1
    named = [line for line in capsys.readouterr().out.splitlines() if "times as long" in line]
    times = [float(re.search(r"rollout takes ([\d.]+) times", line)[1]) for line in named]
    assert len(times) == 2 and all(1.8 < time < 2.2 for time in times), "of both works; shares are stored rounded"


def test_peers_are_read_and_set_beside_ours(scripts, measured, tmp_path):
    compare, mine = scripts.compare, scripts.compare.ours(measured)
    assert set(mine) == set(compare.PARTS)
    assert mine["sampling"] + mine["scoring"] + mine["update"] <= mine["whole"] * 1.5
    split = {"generation": 2.0, "scoring": 3.0, "update_fwd_bwd_opt": 4.0}
    trl = {"sec_per_iteration_median": 10.0, "split_median_sec": split, "peak_rss_mib": 100}
    line = ("median s/iter 1.410 | generate 0.310 | old logp 0.100 | ref logp 0.090 | values 0.080 | "
            "experience total 0.300 | actor update 0.400 | critic update 0.500\npeak RSS 1.50 GiB")  # fmt: skip
    printed = {"trl": "noise\nJSON " + json.dumps(trl), "tunix": line, "other": 'JSON {"whole": 3.0}'}
    read = {name: compare.PEERS[name].read(text) for name, text in printed.items()}
    assert read["trl"]["update"] == 4.0 and read["other"] == {"whole": 3.0}
    assert read["tunix"]["scoring"] == pytest.approx(0.27) and read["tunix"]["update"] == pytest.approx(0.9)
    text = compare.table("trl", [{"whole": 2.0}, {"whole": 4.0}], [{"whole": 6.0}, {"whole": 9.0}])
    assert "| whole | 3.000 (2.000 to 4.000) | 7.500 (6.000 to 9.000) | 2.50 (2.25 to 3.00) |" in text
    script = tmp_path / "peer.py"
    script.write_text("import sys\nprint('JSON {\"whole\": %s}' % sys.argv[1])\n")
    assert compare.run_peer(compare.PEERS["other"], sys.executable, script, "7") == {"whole": 7.0}
    script.write_text("print('nothing')\n")
    with pytest.raises(compare.Unusable, match="cannot be read"):
        compare.run_peer(compare.PEERS["other"], sys.executable, script, "")
    shutil.copy(script, tmp_path / "fails.py")
    (tmp_path / "fails.py").write_text("raise SystemExit('no such device')\n")
    with pytest.raises(compare.Unusable, match="no such device"):
        compare.run_peer(compare.PEERS["other"], sys.executable, tmp_path / "fails.py", "")
    for line in ("JSON [1, 2]", 'JSON {"whole": null}', 'JSON {"wholes": 1}', 'JSON {"whole": 0}'):
        (tmp_path / "odd.py").write_text(f"print({line!r})\n")
        with pytest.raises(compare.Unusable, match=r"odd\.py"):
            compare.run_peer(compare.PEERS["other"], sys.executable, tmp_path / "odd.py", "")
    with pytest.raises(compare.Unusable, match="cannot be run"):
        compare.run_peer(compare.PEERS["other"], str(tmp_path / "absent"), script, "")
