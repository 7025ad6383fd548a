"""Gives the commands broken configs, rows, model folders and arguments, and looks for tracebacks.

    python benchmarks/fuzz_inputs.py [--cases 300] [--seed 0] [--only SEED,...]

Each case has its own seed, which is printed when it fails; `--only` runs such cases again. A case passes if the command
ends within a minute with status 0 or 1 without a traceback, or with status 2 and one line that begins with "error:" at
the end of stderr. Exit status 1 if a case fails. Training commands run with --dry-run: nothing is compiled.
"""

import argparse
import collections
import contextlib
import importlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path

from jaxrlhf.config.table import settings, without_kinds

STORIES = Path(__file__).parent.parent / "tests" / "data" / "files" / "stories260K"
SECONDS = 60
VALUES = [
    None, True, False, 0, 1, -1, 2, 10**12, -(10**30), 10**400, 0.5, -0.0, 1e-320, 1e300, float("inf"), float("nan"),
    "", " ", "a", "null", "../x", "~/x", "$HOME/x", "a\0b", "\ud800", "\x1b[31m", "é😀\u202e", "n" * 300,
    "org/name", "builtin:assistant-prompts", "a.py:f", "http://[", [], [[]], [1, "a"], {}, {"a": {}},
    {"kind": "function"},
]  # fmt: skip
TINY = {
    "stages": ["ppo"], "model": {"new": {"hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 1,
                                         "intermediate_size": 32, "max_positions": 128}},
    "sft": {"data": {"path": "builtin:assistant-demonstrations", "limit": 20}},
    "reward_model": {"data": {"path": "builtin:assistant-preferences", "limit": 20}},
    "ppo": {"data": {"path": "builtin:assistant-prompts", "limit": 20}, "max_prompt_tokens": 64, "iterations": 2,
            "batch_size": 4, "evaluation": {"prompts": 4}, "sampling": {"max_new_tokens": 4},
            "reward": {"kind": "function", "function": "jaxrlhf.rewards.library:length", "options": {"target": 3}}},
}  # fmt: skip


def broken_config(pick: random.Random, folder: Path) -> tuple[str, list[str]]:
    """One or two settings with values of any kind, or a file with bytes changed."""
    config = json.loads(json.dumps(TINY | {"run_dir": str(folder / "run"), "stages": pick.choice(
        [["ppo"], ["sft"], ["reward_model"], ["sft", "reward_model", "ppo"]])}))  # fmt: skip
    for _ in range(pick.choice([1, 1, 2])):
        *above, name = without_kinds(pick.choice(list(settings())))
        section = config
        for key in above:
            inner = section.get(key)
            section[key] = inner if isinstance(inner, dict) else {}
            section = section[key]
        section[name] = pick.choice(VALUES)
    text = json.dumps(config).encode("utf-8", "surrogatepass")
    if pick.random() < 0.2:
        text = _damaged(pick, text)
    (folder / "config.yaml").write_bytes(text)
    return "train", ["--config", str(folder / "config.yaml"), "--dry-run"]


def broken_rows(pick: random.Random, folder: Path) -> tuple[str, list[str]]:
    """Rows with missing, nested or wrong fields, or bytes changed."""
    stage = pick.choice(["sft", "reward_model", "ppo"])
    kinds = {"sft": ["prompt", "response"], "reward_model": ["prompt", "chosen", "rejected", "margin"],
             "ppo": ["prompt"]}  # fmt: skip
    fields = [*kinds[stage], "messages", "text", "tools", "chat_template_kwargs"]
    rows = []
    for _ in range(pick.randint(0, 8)):
        row = {name: pick.choice(["once upon", "a cat", 1.0]) for name in kinds[stage]}
        if pick.random() < 0.5:
            row[pick.choice(fields)] = pick.choice([*VALUES, [{"role": "user", "content": "a"}], [{"role": 1}], [{}]])
        if pick.random() < 0.2:
            row.pop(pick.choice(list(row)))
        rows.append(json.dumps(row))
    text = "\n".join(rows).encode("utf-8", "surrogatepass")
    if pick.random() < 0.3:
        text = pick.choice([_damaged(pick, text), b"[" * 10_000, b"\xff\xfe", b"null", b'"a"', b"[" + text + b"]"])
    file = folder / f"rows.{pick.choice([*['jsonl'] * 6, 'json', 'parquet', 'csv', ''])}"
    file.write_bytes(text)
    config = TINY | {"run_dir": str(folder / "run"), "stages": [stage], "model": {"path": str(STORIES)}}
    config[stage] = config[stage] | {"data": {"path": str(file)}}
    (folder / "config.yaml").write_text(json.dumps(config))
    return "train", ["--config", str(folder / "config.yaml"), "--dry-run"]


def broken_model(pick: random.Random, folder: Path) -> tuple[str, list[str]]:
    """A model folder with an entry of a JSON file replaced, bytes changed, or a file missing."""
    model = shutil.copytree(STORIES, folder / "model")
    file = pick.choice([path for path in sorted(model.iterdir()) if path.suffix in (".json", ".safetensors")])
    how = pick.choice(["entry", "entry", "bytes", "missing", "empty"])
    if how == "entry":
        file = model / pick.choice(["config.json", "tokenizer_config.json", "generation_config.json"])
        document = json.loads(file.read_text()) if file.exists() else {}
        document[pick.choice([*document, "chat_template", "rope_scaling"])] = pick.choice(VALUES)
        file.write_text(json.dumps(document))
    elif how == "bytes":
        file.write_bytes(_damaged(pick, file.read_bytes()))
    elif how == "missing":
        file.unlink()
    else:
        file.write_bytes(b"")
    config = TINY | {"run_dir": str(folder / "run"), "model": {"path": str(model)}}
    (folder / "config.yaml").write_text(json.dumps(config))
    return "train", ["--config", str(folder / "config.yaml"), "--dry-run"]


def broken_arguments(pick: random.Random, folder: Path) -> tuple[str, list[str]]:
    """Arguments that would work, with one or two of them replaced, left out or put twice."""
    (folder / "config.yaml").write_text(json.dumps(TINY | {"run_dir": str(folder / "run")}))
    config = ["--config", str(folder / "config.yaml")]
    name, arguments = pick.choice([
        ("generate", ["--model", str(STORIES), "--prompt", "a cat", "--seed", "1", "--temperature", "0.5", "--top-k",
                      "2", "--top-p", "0.9", "--max-new-tokens", "4", "--roles", "base"]),
        ("export", ["--run", str(folder), "--to", str(folder / "to"), "--format", "merged", "--role", "policy",
                    "--step", "latest", "--dtype", "float32", "--max-shard-bytes", "1000"]),
        ("plan", [*config, "--devices", "1", "--card", "h100", "--memory", "80GiB", "--per-host", "1"]),
        ("train", [*config, "--dry-run", "--processes", "1", "--start-timeout", "5", "ppo.kl.coef=0.1", "seed=3"]),
    ])  # fmt: skip
    values = [str(value) for value in VALUES if not isinstance(value, list | dict)]
    for _ in range(pick.choice([1, 1, 2])):
        at = pick.randrange(1, len(arguments))
        how = pick.choice(["replace", "replace", "replace", "remove", "double"])
        key = arguments[at].partition("=")[0] + "=" if "=" in arguments[at] else ""
        part = {"replace": [key + pick.choice(values)], "remove": [], "double": [arguments[at]] * 2}[how]
        arguments = arguments[:at] + part + arguments[at + 1 :]
        if len(arguments) < 2:
            break
    return name, arguments


KINDS = [broken_config, broken_rows, broken_model, broken_arguments]


def _damaged(pick: random.Random, data: bytes) -> bytes:
    """Cut, with bytes changed, or with a part doubled."""
    data = bytearray(data or b"{}")
    if pick.random() < 0.4:
        del data[pick.randrange(len(data)) :]
    for _ in range(pick.randint(0, 4)):
        if data:
            data[pick.randrange(len(data))] = pick.randrange(256)
    return bytes(data)


def outcome(seed: int) -> tuple[str, str | None]:
    """(the kind of case and its exit status, what is wrong with how the command ended or None)."""
    pick = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        kind = pick.choice(KINDS)
        name, arguments = kind(pick, Path(folder))
        out, err, status = io.StringIO(), io.StringIO(), None
        signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(SECONDS)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status = importlib.import_module(f"jaxrlhf.cli.{name}").main(arguments)
        except SystemExit as ended:  # argparse
            status = ended.code
        except BaseException:
            err.write(traceback.format_exc())
        finally:
            signal.alarm(0)
            os.chdir("/")
        text = err.getvalue()
        last = (text.rstrip().splitlines() or [""])[-1]
        ends_well = status in (0, 1) or (status == 2 and "error: " in last[:60])
        bad = "Traceback" in text or not ends_well or "\x1b" in text
        return f"{kind.__name__}: status {status}", f"{name} {arguments}\n{text[-1500:]}" if bad else None


def _too_long(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the next ones follow")
    parser.add_argument("--only", default="", help="seeds of cases to run again")
    given = parser.parse_args()
    seeds = [int(text) for text in given.only.split(",") if text] or range(given.seed, given.seed + given.cases)
    failed, ends = 0, collections.Counter()
    for seed in seeds:
        end, fault = outcome(seed)
        ends[end] += 1
        if fault is not None:
            failed += 1
            print(f"seed {seed}: {end}: {fault}\n", flush=True)
    for end, count in sorted(ends.items()):
        print(f"{count:5}  {end}")
    print(f"{len(seeds)} cases, seeds {seeds[0]} to {seeds[-1]}: {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
