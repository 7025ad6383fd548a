"""Compiles PPO's programs for a GPU that this machine does not have, and prints what XLA made of each program.

    pip install --no-deps jax-cuda12-plugin==VERSION jax-cuda12-pjrt==VERSION    (jaxlib's version; 180 MB)
    python benchmarks/card_programs.py [--card h100] [--cards 1] [--only rollout,update] [--text FOLDER]
        [--trace FOLDER] [--config configs/bench.yaml] [key.path=value ...]

For each program: seconds to trace and to compile, temporaries, and for each loop body the number of kernels, in all and
per layer, the converts, and the copies of arrays of at least 1 MiB. `--text` writes the compiled text of each program.
`--trace` writes a trace of `jax.profiler`, and prints the XLA passes that took longest.
"""

import argparse
import collections
import math
import os
import re
import time
from pathlib import Path

os.environ.update(JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1", TF_CPP_MIN_LOG_LEVEL="3", JAX_PLATFORMS="")

import jax

from jaxrlhf.config.reading import load_config
from jaxrlhf.distributed.jit import compiled_with
from jaxrlhf.plan.compiling import mesh_of_cards, without_cudnn
from jaxrlhf.stages.calls import calls_of
from jaxrlhf.stages.shapes import Shapes, read_model, resolved

TARGETS = Path(__file__).parents[1] / "jaxrlhf" / "plan" / "targets"
# Operations of a computation that launch a kernel, or a library call.
LAUNCHED = (
    "fusion|custom-call|copy|reduce|concatenate|slice|transpose|select|convert|broadcast|dynamic-slice|"
    "dynamic-update-slice|dot|scatter|gather|sort|iota|pad|reduce-window|add|multiply"
)
SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}


def size_of(shape: str) -> int:
    """Bytes of an array such as `bf16[64,8,128,768]`; 0 if it is a tuple."""
    found = re.match(r"(\w+)\[([\d,]*)\]", shape)
    if not found or found[1] not in SIZES:
        return 0
    return SIZES[found[1]] * math.prod(int(n) for n in found[2].split(",") if n)


def bodies(text: str) -> dict[str, str]:
    """The text of each while body, by name, and of the entry."""
    named = dict(re.findall(r"^%?([\w.\-]+) \([^\n]*\) -> [^\n]* \{\n(.*?)^\}", text, re.M | re.S))
    loops = {name for name in re.findall(r"body=%?([\w.\-]+)", text)}
    entry = re.search(r"^ENTRY %?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", text, re.M | re.S)
    return {"entry": entry[2]} | {name: named[name] for name in loops if name in named}


def iterations(text: str, body: str) -> int | None:
    """The number of iterations of the loop with this body, if the text says it."""
    found = re.search(rf"body=%?{re.escape(body)}\b[^\n]*known_trip_count\":\{{\"n\":\"(\d+)\"", text)
    return int(found[1]) if found else None


def callees(body: str, text: str) -> str:
    """The body with the computations that it calls: command buffers and calls, without fusions and loops."""
    named = dict(re.findall(r"^%?([\w.\-]+) \([^\n]*\) -> [^\n]* \{\n(.*?)^\}", text, re.M | re.S))
    called = [name for name in re.findall(r" call\([^\n]*to_apply=%?([\w.\-]+)", body) if name in named]
    return body + "".join(callees(named[name], text) for name in called)


def describe(body: str) -> tuple[int, collections.Counter, list[str]]:
    """(number of kernels, kernels by kind, copies and converts of at least 1 MiB) of a computation."""
    kinds, large = collections.Counter(), []
    for name, shape, kind in re.findall(rf"^\s+(?:ROOT )?%?([\w.\-]+) = (\S+)[^\n=]*? ({LAUNCHED})\(", body, re.M):
        plain = re.sub(r"[._\d]+$", "", name)
        kinds[plain if kind in ("fusion", "custom-call") else kind] += 1
        if ("copy" in plain or "convert" in plain or kind == "transpose") and size_of(shape) >= 2**20:
            large.append(f"{plain} {shape.split('{')[0]}")
    return kinds.total(), kinds, large


def report(name: str, text: str, layers: int) -> None:
    for loop, body in bodies(text).items():
        count, kinds, large = describe(callees(body, text))
        if count < 30:
            continue
        times = iterations(text, loop)
        layered = count if times == layers else count / layers  # a loop over the layers, or over tokens or rows
        often = f", {times} iterations" if times else ""
        converts = sum(number for kind, number in kinds.items() if "convert" in kind)
        print(
            f"    {loop}: {count} kernels, {layered:.1f} a layer{often}; {converts} with convert in their name; "
            f"{len(large)} large copies or converts {dict(collections.Counter(large).most_common(4))}"
        )
        print(f"        {dict(kinds.most_common(14))}", flush=True)


def passes(folder: str) -> None:
    """Prints the XLA passes of the newest trace by their own total time."""
    file = max(Path(folder).rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    seconds = collections.Counter()
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            for event in line.events:
                seconds[re.sub(r"[:#].*", "", event.name) if "XlaPass" not in event.name else event.name[:60]] += (
                    event.duration_ns / 1e9
                )
    for name, total in seconds.most_common(45):
        print(f"        {total:8.2f} s {name}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--card", choices=sorted(file.stem for file in TARGETS.glob("*.txtpb")), default="h100")
    parser.add_argument("--cards", type=int, default=1)
    parser.add_argument("--only", default="rollout,annotate,update")
    parser.add_argument("--config", default="configs/bench.yaml")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--trace")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    config = resolved(load_config(given.config, given.overrides))
    mesh = mesh_of_cards(config.mesh, given.cards, 8, TARGETS / f"{given.card}.txtpb")
    model = read_model(config.model)
    with compiled_with(config.compiler_options), without_cudnn():
        for call in calls_of("ppo", Shapes(config, mesh, model)):
            if call.name not in given.only.split(","):
                continue
            start = time.perf_counter()
            lowered = call.program.lower(*call.args, **call.kwargs)
            traced = time.perf_counter() - start
            if given.trace:
                jax.profiler.start_trace(given.trace)
            start, busy = time.perf_counter(), time.process_time()
            compiled = lowered.compile()
            seconds, busy = time.perf_counter() - start, time.process_time() - busy
            if given.trace:
                jax.profiler.stop_trace()
            text, memory = compiled.as_text(), compiled.memory_analysis()
            print(
                f"{call.name}: {traced:.1f} s to trace, {seconds:.1f} s to compile ({busy:.1f} s of processor time); "
                f"temporaries {memory.temp_size_in_bytes / 2**30:.2f} GiB",
                flush=True,
            )
            if given.text:
                given.text.mkdir(parents=True, exist_ok=True)
                (given.text / f"{call.name}.txt").write_text(text)
            report(call.name, text, model.layers)
            if given.trace:
                passes(given.trace)


if __name__ == "__main__":
    main()
