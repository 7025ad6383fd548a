"""Compiles programs for cards that are not there: XLA's own memory and collectives.

The wheels `jax-cuda12-plugin` and `jax-cuda12-pjrt` (180 MB, no CUDA library) hold XLA's compiler for NVIDIA cards. It
needs a description of the card (`targets/`) and no card. It cannot try kernels then, and takes its default ones.
"""

import contextlib
import dataclasses
import importlib.metadata
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from jax.experimental import topologies

from jaxrlhf.config import MeshConfig
from jaxrlhf.distributed.mesh import make_mesh
from jaxrlhf.plan.collectives import Exchange, collectives_of, largest_first
from jaxrlhf.stages.calls import Call

WHEELS = (("jax-cuda12-plugin", "jax-cuda12-pjrt"), ("jax-cuda13-plugin", "jax-cuda13-pjrt"))
_CUDNN = "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version"  # has no public name
_CUDNN_VERSION = 91000


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What XLA says of a program; bytes per card."""

    results: float  # that take over no argument's memory
    temporaries: float
    collectives: dict[str, Exchange]
    seconds: float  # of compiling


def missing() -> str | None:
    """What to install where there is no compiler for cards, in a line; None where there is one."""
    own = importlib.metadata.version("jaxlib")
    for wheels in WHEELS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            if {importlib.metadata.version(wheel) for wheel in wheels} == {own}:
                return None
    wanted = " ".join(f"{wheel}=={own}" for wheel in WHEELS[0])
    return f"memory and collectives are XLA's to say, which wants its compiler for cards: pip install {wanted}"


def mesh_of_cards(config: MeshConfig, devices: int, per_host: int, target: str) -> jax.sharding.Mesh:
    """The mesh over cards that are described in the file `target`; `UserError` as from `make_mesh`."""
    hosts = devices // per_host if devices % per_host == 0 else 1
    lines = Path(target).read_text(encoding="utf-8").splitlines()
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="cards",
        target_config="\n".join(line for line in lines if not line.startswith("#")),
        topology=f"{hosts}x1x{devices // hosts}",
    )
    return make_mesh(config, list(topology.devices))


def without_cudnn() -> contextlib.AbstractContextManager[Any]:
    """In this block jax finds a cuDNN: it asks for the version while it traces, but XLA compiles the calls without it.

    `AttributeError` or `ImportError` where jax has another way to ask.
    """
    return mock.patch(_CUDNN, lambda: _CUDNN_VERSION)


def compiled(call: Call, mesh: Mapping[str, int]) -> Compiled:
    """What XLA says of the call, on the mesh of cards with these axes that it was made for."""
    start = time.perf_counter()
    lowered = call.program.lower(*call.args, **call.kwargs)
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError:  # a card would be tried for another kernel; without one Triton's is taken
        program = lowered.compile(compiler_options={"xla_gpu_enable_triton_gemm": False})
    memory = program.memory_analysis()
    return Compiled(
        float(memory.output_size_in_bytes - memory.alias_size_in_bytes),
        float(memory.temp_size_in_bytes),
        collectives_of(program.as_text(), mesh, call.trips),
        time.perf_counter() - start,
    )


def extrapolated(few: Compiled, more: Compiled, depths: tuple[int, int], layers: int) -> Compiled:
    """What a model of `layers` layers has, on the line through two of fewer: all layers have the same shapes."""
    share, none = (layers - depths[0]) / (depths[1] - depths[0]), Exchange(0.0, 0.0)

    def line(x: float, y: float) -> float:
        return max(x + (y - x) * share, 0.0)

    found = {
        key: Exchange(line(before.count, after.count), line(before.sent, after.sent))
        for key, after in more.collectives.items()
        for before in (few.collectives.get(key, none),)
    }
    results, temporaries = line(few.results, more.results), line(few.temporaries, more.temporaries)
    return Compiled(results, temporaries, largest_first(found), few.seconds + more.seconds)
