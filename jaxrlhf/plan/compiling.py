"""Compiles programs for cards that this machine does not have. Reads memory and collectives of the compiled programs.

The wheels `jax-cuda12-plugin` and `jax-cuda12-pjrt` (180 MB, no CUDA library) hold XLA's compiler for NVIDIA cards. The
compiler needs only a description of the card, which is in `targets/`. Without the card, the compiler cannot measure
which kernels are fastest, so it uses its default kernels.
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
from jaxrlhf.plan.quiet import without_driver_warnings
from jaxrlhf.stages.calls import Call


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The figures of a compiled program that XLA reports, for one card."""

    results: float  # bytes, without results that reuse the memory of an argument
    temporaries: float  # bytes
    collectives: dict[str, Exchange]
    seconds: float  # time of the compilation


def missing() -> str | None:
    """Returns a line that tells the user how to install XLA's compiler for cards, or None if it is installed."""
    own = importlib.metadata.version("jaxlib")
    for cuda in ("cuda13", "cuda12"):
        wheels = f"jax-{cuda}-plugin", f"jax-{cuda}-pjrt"
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            if {importlib.metadata.version(wheel) for wheel in wheels} == {own}:
                return None
    packages = " ".join(f"{wheel}=={own}" for wheel in wheels)
    return f"memory and collectives need XLA's compiler for cards; run pip install {packages}"


def mesh_of_cards(config: MeshConfig, devices: int, per_host: int, target: Path) -> jax.sharding.Mesh:
    """Returns the mesh over cards that the file `target` describes.

    Raises `UserError` if the mesh does not fit the number of cards, see `make_mesh`.
    """
    hosts = devices // per_host if devices % per_host == 0 else 1
    lines = target.read_text(encoding="utf-8").splitlines()
    with without_driver_warnings():
        topology = topologies.get_topology_desc(
            platform="cuda",
            topology_name="cards",
            target_config="\n".join(line for line in lines if not line.startswith("#")),
            topology=f"{hosts}x1x{devices // hosts}",
        )
    return make_mesh(config, list(topology.devices))


def without_cudnn() -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which a machine without cuDNN can trace cuDNN calls.

    Tracing asks for the version of cuDNN, but XLA compiles the calls without cuDNN. The context replaces a private
    function of jax, because there is no public one. If jax has moved this function, the context raises
    `AttributeError` or `ImportError`.
    """
    return mock.patch("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)


def compiled(call: Call, mesh: Mapping[str, int]) -> Compiled:
    """Compiles a call of a program. `mesh` has the sizes of the mesh axes for which the call was made."""
    start = time.perf_counter()
    lowered = call.program.lower(*call.args, **call.kwargs)
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError:  # XLA times Triton kernels on a card; without Triton, XLA needs no card
        program = lowered.compile(compiler_options={"xla_gpu_enable_triton_gemm": False})
    memory = program.memory_analysis()
    return Compiled(
        float(memory.output_size_in_bytes - memory.alias_size_in_bytes),
        float(memory.temp_size_in_bytes),
        collectives_of(program.as_text(), mesh, call.trips),
        time.perf_counter() - start,
    )


def extrapolated(few: Compiled, more: Compiled, depths: tuple[int, int], layers: int) -> Compiled:
    """Returns the figures for `layers` layers, extrapolated linearly from two models with fewer layers.

    `few` and `more` are the figures of the two models, and `depths` are their numbers of layers.
    """
    share, none = (layers - depths[0]) / (depths[1] - depths[0]), Exchange(0.0, 0.0)

    def line(x: float, y: float) -> float:
        return max(x + (y - x) * share, 0.0)

    collectives = {}
    for key, after in more.collectives.items():
        before = few.collectives.get(key, none)
        collectives[key] = Exchange(line(before.count, after.count), line(before.sent, after.sent))
    results, temporaries = line(few.results, more.results), line(few.temporaries, more.temporaries)
    return Compiled(results, temporaries, largest_first(collectives), few.seconds + more.seconds)
