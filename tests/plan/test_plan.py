"""The command: its errors are one line, its figures scale as they must, and without a compiler it still counts."""

import dataclasses
import json
import math
import os
import re
from pathlib import Path

import jax
import pytest

from jaxrlhf.cli.plan import main
from jaxrlhf.config.reading import load_config
from jaxrlhf.distributed.mesh import AXES, mesh_sizes
from jaxrlhf.errors import UserError
from jaxrlhf.models.decoder import abstract_decoder, named_parameters
from jaxrlhf.plan import planner
from jaxrlhf.plan.cards import CARDS, find_card, parse_memory, target_file
from jaxrlhf.plan.collectives import Exchange
from jaxrlhf.plan.compiling import Compiled, extrapolated, missing
from jaxrlhf.plan.planner import DEPTHS, UPDATE_DEPTHS, Options, links_seconds
from jaxrlhf.plan.quiet import without_driver_warnings
from jaxrlhf.stages.shapes import read_folder

ROOT = Path(__file__).parent.parent.parent
CONFIG = """
run_dir: run
stages: [sft]
model: {new: {hidden_size: 256, layers: 2, heads: 8, kv_heads: 8, intermediate_size: 512, max_positions: 256}}
adapter: {rank: 4}
sft: {data: {path: rows.jsonl}, batch_size: 16, max_length: 128}
"""
MIB = 2**20
DEEP = "model.new.layers=40"


@pytest.fixture
def plan(tmp_path, capsys, monkeypatch):
    """Runs the command; (status, what it printed, what it said of errors)."""
    (tmp_path / "run.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(["--config", "run.yaml", *arguments])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


@pytest.fixture
def without(monkeypatch):
    monkeypatch.setattr(planner, "missing", lambda: "install the compiler")


@pytest.fixture
def card(monkeypatch):
    """Stands for the compiler: temporaries of 1 MiB and 10 more a layer, by remat; the (layers, remat) it was given."""
    asked = []

    def compiled(call, mesh):
        base = call.args[1]
        asked.append((base.config.layers, call.remat))
        each = {"none": 40, "dots": 10, "full": 1, "offload": 1}[call.remat]
        sent = {"all-reduce over tensor": Exchange(2.0 * base.config.layers, 28.0 * base.config.layers)}
        return Compiled(MIB, (1 + each * base.config.layers) * MIB, sent, 1.0)

    def mesh_of_cards(config, devices, *_):
        sizes = mesh_sizes(config, devices)
        return jax.sharding.AbstractMesh(sizes, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))

    monkeypatch.setattr(planner, "missing", lambda: None)
    monkeypatch.setattr(planner, "mesh_of_cards", mesh_of_cards)
    monkeypatch.setattr(planner, "compiled", compiled)
    return asked


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--devices", "512", "mesh.tensor=3"], r"mesh.tensor must be one of 1, 2, 4, .*512 .now 3."),
        (["--devices", "8", "mesh.data=2", "mesh.tensor=2"], "does not fit 8 devices; .*set mesh.data=-1"),
        (["--devices", "0"], "--devices: must be at least 1, not 0"),
        (["--devices", "1", "--per-host", "0"], "--per-host: must be at least 1, not 0"),
        (["--devices", "1", "--card", "h1000"], "--card: must be one of a100, .*l40s, not 'h1000'"),
        (["--devices", "1", "--memory", "much"], "--memory: must be an amount in GiB, such as 80GiB, not 'much'"),
        (["--devices", "8", "sft.batch_size=12"], "sft.batch_size: 12 rows cannot be split over 8 devices"),
        (["--devices", "1", "sft.microbatch_size=5"], "sft.microbatch_size: 16 rows cannot be split"),
        (["--devices", "1", "sft.max_length=300"], "sft.max_length: is 300 tokens, but the model has only 256"),
        (["--devices", "1", "model={path: nowhere/at all}"], "nowhere/at all: no such folder with a config"),
        (["--devices", "16", "mesh.context=16"],
         "mesh.context: mesh.tensor x mesh.context is 16, .* divide the 8 query heads, .*; these fit: 1, 2, 4, 8"),
        (["--devices", "8", "mesh.context=8", "sft.max_length=100"],
         "sft.max_length: 100 tokens cannot be split over mesh.context=8 devices; give 96, or another multiple of 8"),
        (["--devices", "16", "mesh.tensor=16", "model.attention=cudnn", "model.dtype=bfloat16"],
         "model.attention: .*cudnn.*key heads .8., but mesh.tensor is 16"),
        (["--devices", "1", "compiler_options.all.xla_no=1"], "compiler_options.all.xla_no: .*no such option"),
        (["--devices", "1", "sft.batchsize=12"], "sft.batchsize"),
    ],
    ids=["mesh", "product", "devices", "host", "card", "memory", "batch", "microbatch", "length", "model", "heads",
         "positions", "attention", "option", "key"],
)  # fmt: skip
def test_errors_are_one_line(plan, card, arguments, complaint):
    status, out, err = plan(*arguments)
    assert (status, out) == (2, "")
    assert re.search(complaint, err), err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_without_a_compiler_the_closed_form_is_given_and_a_line_says_what_to_install(plan, without):
    status, out, _ = plan("--devices", "1")
    assert status == 0 and "- install the compiler" in out
    found = json.loads(plan("--devices", "1", "--json")[1])
    (stage,) = found["stages"]
    (program,) = stage["programs"]
    assert stage["peak"] is stage["largest_batch"] is program["temporaries"] is None
    assert program["flops"] > 0 and program["seconds"]["least"] > 0 and program["parts"]["weights"] > 0
    assert missing() is None or "pip install jax-cuda12-plugin==" in missing()


def test_shares_of_eight(plan, without):
    meshes = {"one": [], "data": ["mesh.data=8"], "fsdp": ["mesh.fsdp=8"], "tensor": ["mesh.tensor=8"],
              "context": ["mesh.context=8"]}  # fmt: skip
    programs = {}
    for name, mesh in meshes.items():
        devices = "1" if name == "one" else "8"
        found = json.loads(plan("--devices", devices, "--json", *mesh)[1])
        programs[name] = found["stages"][0]["programs"][0]
    one = programs.pop("one")
    assert sum(one["sent"].values()) == 0
    for name, program in programs.items():
        assert program["flops"] == pytest.approx(one["flops"] / 8)
        assert [axis for axis, sent in program["sent"].items() if sent] == [name]
        assert program["seconds"]["least"] >= max(program["seconds"][k] for k in ("arithmetic", "memory", "links"))
    assert programs["data"]["parts"]["weights"] == one["parts"]["weights"]
    for name in ("fsdp", "tensor"):  # norms, and a vocabulary that 8 does not divide, stay whole along an axis
        assert one["parts"]["weights"] / 8 <= programs[name]["parts"]["weights"] < one["parts"]["weights"] / 4, name
    # Rows [16 x 128 tokens, 256] in float32 are summed twice a layer, forward and backward.
    assert programs["tensor"]["sent"]["tensor"] == 2 * 7 / 8 * 2 * 2 * 2 * 16 * 128 * 256 * 4
    # queries, keys, values and outputs change their split in each layer, forward and backward, on an eighth of the rows
    adapters = one["parts"]["adapters"]
    heads = 2 * (8 + 8) * 32
    exchanged = 7 / 8 * 2 * 2 * 16 * 128 * heads * 4 / 8
    assert programs["context"]["sent"]["context"] == pytest.approx(exchanged + 2 * 7 / 8 * adapters, rel=0.01)
    assert programs["data"]["sent"]["data"] == pytest.approx(2 * 7 / 8 * adapters, rel=0.01)


def test_a_deep_model_is_compiled_at_few_layers_and_extrapolated(plan, card):
    found = json.loads(plan("--devices", "8", "--json", "mesh.tensor=8", DEEP)[1])
    assert sorted(card) == [(depth, "dots") for depth in UPDATE_DEPTHS]
    assert found["compiled_layers"] == list(UPDATE_DEPTHS)
    (program,) = found["stages"][0]["programs"]
    assert program["temporaries"] == 401 * MIB
    assert program["peak"] == sum(program["parts"].values()) + 401 * MIB
    assert program["compiled"]["collectives"] == {"all-reduce over tensor": {"count": 80.0, "sent": 1120.0}}
    assert any("extrapolated linearly to 40 layers" in note for note in found["notes"])
    shallow = json.loads(plan("--devices", "8", "--json", "mesh.tensor=8")[1])
    assert card[2:] == [(2, "dots")] and not any("extrapolated" in note for note in shallow["notes"])


def test_text_says_what_fits_and_the_largest_batch(plan, card):
    status, out, _ = plan("--devices", "1", "--memory", "0.1GiB", DEEP)
    assert status == 0 and "0.1 GiB of each card may be filled" in out and "largest batch: none fits; sft_update" in out
    status, out, _ = plan("--devices", "1", DEEP)
    rows = int(re.search(r"largest batch: sft.batch_size=([\d,]+); sft_update", out)[1].replace(",", ""))
    assert 16 * 100 < rows < 16 * 80e9 / (401 * MIB)
    assert "Notes" in out and "was run" in out


def test_extrapolation_is_a_line_through_both_depths():
    def at(layers):
        exchanges = {"all-reduce over data": Exchange(1.0, 4.0), "all-gather over fsdp": Exchange(3.0 * layers, layers)}
        return Compiled(7.0, 11.0 + 2 * layers, exchanges, 0.5)

    found = extrapolated(*map(at, DEPTHS), DEPTHS, 32)
    assert found == dataclasses.replace(at(32), seconds=1.0)
    assert list(found.collectives) == ["all-gather over fsdp", "all-reduce over data"], "the largest first"


@pytest.mark.parametrize(
    ("given", "memory", "compiled", "said"),
    [
        ("none", 2000, ["none"], ""),
        ("none", 800, ["none", "dots"], "none 1.* GiB, too much; dots 0.* GiB$"),
        ("none", 300, ["none", "dots", "full"], "none .*, too much; dots .*, too much; full 0.* GiB$"),
        ("none", 60, ["none", "dots", "full", "offload"], "none .*; dots .*; full .*, too much; offload .*, too much$"),
        ("dots", 300, ["dots", "full"], "dots .*, too much; full 0.* GiB$"),
        ("full", 60, ["full", "offload"], "full .*, too much; offload .*, too much$"),
    ],
)
def test_an_update_that_does_not_fit_is_tried_with_less_that_is_kept(plan, card, given, memory, compiled, said):
    """Temporaries are 1601, 401 and 41 MiB; what no policy changes takes 36 to 150."""
    status, out, _ = plan("--devices", "1", "--memory", f"{memory / 0.9 / 1024}GiB", DEEP, f"sft.remat={given}")
    assert status == 0 and [policy for depth, policy in card if depth == UPDATE_DEPTHS[0]] == compiled
    lines = [line.removeprefix("peak of the update by sft.remat: ") for line in out.splitlines() if "sft.remat" in line]
    assert len(lines) == bool(said) and (not said or re.match(said, lines[0])), out


def test_sizes_and_cards():
    assert (parse_memory("80GiB"), parse_memory("1.5 GiB")) == (80 * 2**30, 1.5 * 2**30)
    for text in ("", "80", "GiB", "-1GiB", "0GiB", "80 Gibi"):
        with pytest.raises(UserError, match="--memory"):
            parse_memory(text)
    assert find_card("H100") is CARDS["h100"]
    for card in CARDS.values():  # the same card in both tables
        told = Path(target_file(card)).read_text()
        for name, value in (("memory_bandwidth", card.bandwidth), ("device_memory_size", card.memory)):
            assert float(re.search(rf"{name}: (\d+)", told)[1]) == pytest.approx(value, rel=0.08)


def test_only_the_warnings_of_a_missing_driver_are_dropped(capfd):
    with pytest.raises(ValueError, match="kept"), without_driver_warnings():
        os.write(2, b"I0000 00:00:1.5 7 cudart_stub.cc:31] Could not find cuda drivers\nE0000 a real error\n")
        raise ValueError("kept")
    assert capfd.readouterr().err == "E0000 a real error\n"


def test_links_take_the_slower_of_link_and_network():
    card, none = CARDS["h100"], {"data": 0.0, "fsdp": 0.0, "context": 0.0, "tensor": 0.0}
    options, alone = Options(8, card, 1.0), {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}
    sent = {**none, "tensor": 8e9}
    assert links_seconds(sent, {**alone, "tensor": 8}, options) == pytest.approx(8e9 / card.link)
    along = {**none, "data": 8e9}
    # each card of a group is on a host of its own
    assert links_seconds(along, {**alone, "data": 2, "tensor": 8}, options) == pytest.approx(8e9 / card.network)
    # the four cards of a host share what goes between hosts
    wide = links_seconds({**none, "fsdp": 8e9}, {**alone, "fsdp": 16, "tensor": 2}, options)
    assert wide == pytest.approx(max(8e9 / card.link, 8e9 / 4 / card.network))


# As their model cards have them.
PARAMETERS = {"llama3-8b": 8_030_261_248, "llama3-70b": 70_553_706_496, "qwen2.5-32b": 32_763_876_352}


@pytest.mark.parametrize("name", list(PARAMETERS))
def test_plans_of_large_models_are_of_those_models(name):
    config = load_config(ROOT / "configs" / "plans" / f"{name}.yaml")
    assert config.model.path.endswith(f"/configs/plans/{name}")
    model = read_folder(str(ROOT / config.model.path))
    leaves = named_parameters(abstract_decoder(model, config.model.dtype)).values()
    assert sum(math.prod(leaf.shape) for leaf in leaves) == PARAMETERS[name]


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason="wants XLA's compiler for cards, which the extra [plan] brings")
def test_the_compiler_of_the_card_says_memory_and_collectives(plan):
    status, out, err = plan("--devices", "8", "--json", "mesh.tensor=4", "mesh.data=2", "model.dtype=bfloat16")
    assert status == 0, err
    (program,) = json.loads(out)["stages"][0]["programs"]
    assert program["temporaries"] > 0
    found = program["compiled"]["collectives"]
    assert "all-reduce over tensor" in found and any("data" in kind for kind in found)
