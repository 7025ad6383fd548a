"""The command: its errors are one line, its figures scale as they must. One process plays up to 512 devices."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxrlhf.config_io import load_config
from jaxrlhf.errors import UserError
from jaxrlhf.models.decoder import abstract_decoder, named_parameters
from jaxrlhf.planning.cards import CARDS, find_card, parse_memory
from jaxrlhf.planning.count import Collective
from jaxrlhf.planning.planner import exchange_seconds
from jaxrlhf.planning.shapes import read_folder

ROOT = Path(__file__).parent.parent.parent
CONFIG = """
run_dir: run
stages: [sft]
model: {new: {hidden_size: 256, layers: 2, heads: 8, kv_heads: 8, intermediate_size: 512, max_positions: 256}}
adapter: {rank: 4}
sft: {data: {path: rows.jsonl}, batch_size: 16, max_length: 128}
"""
MANY = """
import contextlib, io, json, sys
from jaxrlhf.plan import main
found = []
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments)
    found.append([status, out.getvalue(), err.getvalue()])
print(json.dumps(found))
"""
ERRORS = {
    "mesh": (["--devices", "512", "mesh.tensor=3"], r"mesh.tensor is 3 and must be one of 1, 2, 4, .*512"),
    "mesh-product": (["--devices", "8", "mesh.data=2", "mesh.tensor=2"], "is 4, but there are 8 devices: .* would fit"),
    "devices-0": (["--devices", "0"], "--devices: must be at least 1, not 0"),
    "per-host-0": (["--devices", "1", "--per-host", "0"], "--per-host: must be at least 1, not 0"),
    "card": (["--devices", "1", "--card", "h1000"], "--card: 'h1000' is not known; known are a100, .*l40s"),
    "memory": (["--devices", "1", "--memory", "much"], "--memory: 'much' is no amount of memory; .*80GiB"),
    "batch": (["--devices", "8", "sft.batch_size=12"], "sft.batch_size: 12 rows cannot be split over 8 devices"),
    "microbatch": (["--devices", "1", "sft.microbatch_size=5"], "sft.microbatch_size: 16 rows cannot be split"),
    "length": (["--devices", "1", "sft.max_length=300"], "sft.max_length: 300 tokens, but the model has 256 positions"),
    "no-model": (["--devices", "1", "model={path: nowhere/at all}"], "nowhere/at all: no such folder with a config"),
    "attention": (
        ["--devices", "16", "mesh.tensor=16", "model.attention=cudnn", "model.dtype=bfloat16"],
        "model.attention: cudnn .* 8 and 8 heads cannot both be split over mesh.tensor=16",
    ),
    "option": (["--devices", "1", "compiler_options.all.xla_no=1"], "compiler_options.all.xla_no: .*no such option"),
    "key": (["--devices", "1", "sft.batchsize=12"], "sft.batchsize"),
}
PLANS = {
    "one": ["--devices", "1"],
    "data": ["--devices", "8"],
    "fsdp": ["--devices", "8", "mesh.fsdp=8"],
    "tensor": ["--devices", "8", "mesh.tensor=8"],
    "fsdp-32-weak": ["--devices", "32", "mesh.fsdp=8", "sft.batch_size=64"],
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    (folder / "run.yaml").write_text(CONFIG)
    asked = [arguments for arguments, _ in ERRORS.values()]
    asked += [["--json", "--no-largest-batch", *arguments] for arguments in PLANS.values()]
    asked.append(["--devices", "1", "--memory", "20MiB"])
    given = json.dumps([["--config", "run.yaml", *arguments] for arguments in asked])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(
        [sys.executable, "-c", MANY, given], capture_output=True, text=True, cwd=folder, env=env
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return dict(zip([*ERRORS, *PLANS, "text"], json.loads(result.stdout)))


@pytest.mark.parametrize("name", list(ERRORS))
def test_errors_are_one_line(answers, name):
    status, out, err = answers[name]
    assert (status, out) == (2, "")
    assert re.search(ERRORS[name][1], err), err
    assert err.startswith("error: ") and err.count("\n") == 1


@pytest.fixture(scope="module")
def plans(answers):
    assert all(answers[name][0] == 0 for name in PLANS), answers
    return {name: json.loads(answers[name][1])["stages"][0]["programs"][0] for name in PLANS}


def test_shares_of_eight(plans):
    one = plans["one"]
    for name in ("data", "fsdp"):
        assert plans[name]["flops"] == pytest.approx(one["flops"] / 8, rel=0.05), name
    # the head, with a vocabulary that 8 does not divide, is computed whole by each, and so are the pairs' first halves
    assert one["flops"] / 8 < plans["tensor"]["flops"] < one["flops"] / 8 * 1.35
    assert plans["data"]["parts"]["weights"] == one["parts"]["weights"]
    for name in ("fsdp", "tensor"):
        # norms, and a vocabulary that 8 does not divide, stay whole along an axis
        assert one["parts"]["weights"] / 8 <= plans[name]["parts"]["weights"] < one["parts"]["weights"] / 4, name
    assert one["sent"] == 0 and all(plans[name]["sent"] > 0 for name in ("data", "fsdp", "tensor"))
    for plan in plans.values():
        assert plan["peak"] == sum(plan["parts"].values()) and min(plan["parts"].values()) >= 0
        assert plan["seconds"]["least"] == max(plan["seconds"][k] for k in ("arithmetic", "memory", "exchange"))


def test_what_is_sent_grows_no_faster_than_a_ring(plans):
    """Weights and rows per device stay, devices are four times as many."""
    few, many = plans["fsdp"], plans["fsdp-32-weak"]
    assert many["parts"]["weights"] == few["parts"]["weights"]
    assert many["flops"] == pytest.approx(few["flops"], rel=0.05)
    for c in many["collectives"]:
        passes = 2 if c["kind"] == "all-reduce" else 1
        assert c["wire"] <= passes * c["bytes"] * max((c["size"] - 1) / c["size"], c["kind"] == "collective-permute")
    gathered = [sum(c["wire"] for c in p["collectives"] if c["axes"] == "fsdp") for p in (few, many)]
    assert gathered[1] == pytest.approx(gathered[0], rel=0.05)


def test_text_says_what_fits(answers):
    status, out, _ = answers["text"]
    assert status == 0
    assert "18.0 MiB" in out or "0.0 GiB of each may be filled" in out
    assert re.search(r"largest batch: sft.batch_size=\d+|largest batch: none fits", out)
    assert "Notes" in out and "nothing was run" in out


def test_sizes_and_cards():
    assert (parse_memory("80GiB"), parse_memory("1.5 GB"), parse_memory("7b")) == (80 * 2**30, 1.5e9, 7)
    for text in ("", "80", "GiB", "-1GiB", "0GiB", "80 Gibi"):
        with pytest.raises(UserError, match="--memory"):
            parse_memory(text)
    assert find_card("H100") is CARDS["h100"]


def test_exchange_takes_the_slower_of_link_and_network():
    card, size = CARDS["h100"], 8e9
    within = Collective("all-gather", "tensor", 8, 1, 1.0, size, size * 7 / 8)
    assert exchange_seconds(within, card) == pytest.approx(size * 7 / 8 / card.link)
    across = Collective("all-gather", "fsdp", 16, 2, 1.0, size, size * 15 / 16)
    # each host lacks half, and takes it in through 8 adapters
    assert exchange_seconds(across, card) == pytest.approx(max(size * 15 / 16 / card.link, size / 2 / 8 / card.network))
    alone = Collective("all-gather", "data", 2, 2, 1.0, size, size / 2)
    assert exchange_seconds(alone, card) == pytest.approx(size / 2 / card.network)


# As their model cards have them.
PARAMETERS = {"llama3-8b": 8_030_261_248, "llama3-70b": 70_553_706_496, "qwen2.5-32b": 32_763_876_352}


@pytest.mark.parametrize("name", list(PARAMETERS))
def test_plans_of_large_models_are_of_those_models(name):
    config = load_config(ROOT / "configs" / "plans" / f"{name}.yaml")
    assert config.model.path == f"configs/plans/{name}"
    model = read_folder(str(ROOT / config.model.path))
    leaves = named_parameters(abstract_decoder(model, config.model.dtype)).values()
    assert sum(math.prod(leaf.shape) for leaf in leaves) == PARAMETERS[name]
