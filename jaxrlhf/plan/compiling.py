"""Compiles a run's programs for cards that are not there, in a process of its own: XLA's own memory and collectives.

The wheels `jax-cuda12-plugin` and `jax-cuda12-pjrt` (180 MB, no CUDA library) hold XLA's compiler for NVIDIA cards. It
needs a description of the card (`targets/`) and no card. It cannot try kernels then, and takes its default ones.

The process reads a line of JSON that says what the run and its cards are, then lines of `Ask`s, and answers each line
with one `Compiled` a program. It is its own, because jax decides once in a process what its devices are.
"""

import dataclasses
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jaxrlhf.config import RunConfig
from jaxrlhf.errors import Fault
from jaxrlhf.plan.collectives import Collective, collectives_of, merged

WHEELS = (("jax-cuda12-plugin", "jax-cuda12-pjrt"), ("jax-cuda13-plugin", "jax-cuda13-pjrt"))


@dataclasses.dataclass(frozen=True)
class Ask:
    """A program of a stage, on a model of so many layers; `remat` None: as the settings have it."""

    stage: str
    name: str
    layers: int
    remat: str | None = None


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What XLA says of a program; bytes per card."""

    arguments: float
    results: float  # that take over no argument's memory
    temporaries: float
    collectives: list[Collective]
    seconds: float  # of compiling


def missing() -> str | None:
    """What to install where there is no compiler for cards, in a line; None where there is one."""
    own = importlib.metadata.version("jaxlib")
    for wheels in WHEELS:
        try:
            versions = {importlib.metadata.version(wheel) for wheel in wheels}
        except importlib.metadata.PackageNotFoundError:
            continue
        if versions == {own}:
            return None
    wanted = " ".join(f"{wheel}=={own}" for wheel in WHEELS[0])
    return f"memory and collectives are XLA's to say, which wants its compiler for cards: pip install {wanted}"


class Compiler:
    """The process that compiles, as a context: `compiled(asks)` answers in the order of the asks."""

    def __init__(self, config: RunConfig, devices: int, per_host: int, target: str, say: Callable[[str], None]):
        whole = devices % per_host == 0 and devices > per_host
        topology = f"{devices // per_host}x1x{per_host}" if whole else f"1x1x{devices}"
        self.about = {"config": config.model_dump(mode="json"), "target": target, "topology": topology}
        self.say = say

    def __enter__(self) -> "Compiler":
        # No card is touched where there is one, and what is compiled is not kept: XLA's answers are wanted.
        env = os.environ | {
            "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "",
            "JAX_ENABLE_COMPILATION_CACHE": "0", "JAX_PLATFORMS": "cpu",
        }  # fmt: skip
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jaxrlhf.plan.compiling"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.errors, text=True, env=env,
        )  # fmt: skip
        self._send(self.about)
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()

    def compiled(self, asks: Sequence[Ask]) -> list[Compiled]:
        """Raises `Fault` where XLA or the process fails."""
        self._send([dataclasses.asdict(ask) for ask in asks])
        found: dict[int, Compiled] = {}
        while len(found) < len(asks):
            line = self.process.stdout.readline()
            if not line:
                raise Fault(f"the process that compiles for the card ended: {self._why()}")
            number, answer = json.loads(line)
            collectives = [Collective(**c) for c in answer.pop("collectives")]
            found[number] = Compiled(**answer, collectives=collectives)
            ask = asks[number]
            which = f"{ask.layers} layers" + (f" and remat={ask.remat}" if ask.remat else "")
            self.say(f"{ask.stage}: {ask.name} with {which} compiled in {found[number].seconds:.0f} s")
        return [found[number] for number in range(len(asks))]

    def _send(self, what: Any) -> None:
        try:
            print(json.dumps(what), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            raise Fault(f"the process that compiles for the card ended: {self._why()}") from None

    def _why(self) -> str:
        self.process.wait()
        self.errors.seek(0)
        noise = re.compile(r"[IWE]\d{4} |WARNING: All log messages")
        lines = [line.strip() for line in self.errors.read().splitlines() if line.strip() and not noise.match(line)]
        return lines[-1][:300] if lines else f"exit status {self.process.returncode}"


def extrapolated(few: Compiled, more: Compiled, depths: tuple[int, int], layers: int) -> Compiled:
    """What a model of `layers` layers has, on the line through two of fewer: all layers have the same shapes."""

    def line(x: float, y: float) -> float:
        return max(x + (y - x) * (layers - depths[0]) / (depths[1] - depths[0]), 0.0)

    share = (layers - depths[0]) / (depths[1] - depths[0])
    parts = [
        dataclasses.replace(c, count=c.count * factor, bytes=c.bytes * factor, wire=c.wire * factor)
        for side, factor in ((few, 1 - share), (more, share))
        for c in side.collectives
    ]
    return Compiled(
        line(few.arguments, more.arguments),
        line(few.results, more.results),
        line(few.temporaries, more.temporaries),
        [c for c in merged(parts) if c.count > 0],
        few.seconds + more.seconds,
    )


# ---------------------------------------------------------------- the process


def _main() -> None:
    """Answers asks on standard output until standard input ends."""
    from jax.experimental import topologies

    from jaxrlhf.distributed.compiler_options import compiled_with
    from jaxrlhf.distributed.mesh import make_mesh
    from jaxrlhf.stages.shapes import Shapes, read_model

    answers = os.fdopen(os.dup(1), "w")  # what libraries print goes elsewhere
    os.dup2(2, 1)
    about = json.loads(sys.stdin.readline())
    config = RunConfig.model_validate(about["config"])
    target = Path(about["target"]).read_text(encoding="utf-8")
    target = "\n".join(line for line in target.splitlines() if not line.startswith("#"))
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="cards", target_config=target, topology=about["topology"]
    )
    shapes = Shapes(config, make_mesh(config.mesh, list(topology.devices)), read_model(config.model))
    with compiled_with(config.compiler_options), ThreadPoolExecutor(2) as threads:
        for line in sys.stdin:
            asks = [Ask(**ask) for ask in json.loads(line)]
            for number, answer in enumerate(threads.map(lambda ask: _compile(ask, shapes), asks)):
                print(json.dumps([number, dataclasses.asdict(answer)]), file=answers, flush=True)


def _compile(ask: Ask, shapes: Any) -> Compiled:
    from jaxrlhf.stages.calls import calls_of

    (call,) = (call for call in calls_of(ask.stage, shapes.with_layers(ask.layers)) if call.name == ask.name)
    if ask.remat is not None:
        call = call.with_remat(ask.remat)
    start = time.perf_counter()
    compiled = call.program.lower(*call.args, **call.kwargs).compile()
    memory = compiled.memory_analysis()
    return Compiled(
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        collectives_of(compiled.as_text(), shapes.mesh.shape, call.turns),
        time.perf_counter() - start,
    )


if __name__ == "__main__":
    _main()
