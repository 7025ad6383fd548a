"""The target of a model's programs: the platform, and the choice of attention and matmul precision for it.

The target comes from the devices that hold the weights, and is part of the model's config. Traced code reads the target
from the config and never asks jax for its devices, so a program for a GPU can be traced on a machine without a GPU.
"""

import dataclasses
from contextlib import AbstractContextManager

import jax

# The setting's name -> jax's name. jax's "default" is TF32 on NVIDIA GPUs. jax's names between "default" and "highest"
# are TF32 in cuBLAS, but not in Triton.
PRECISIONS = {"highest": "highest", "tf32": "default"}


@dataclasses.dataclass(frozen=True)
class Target:
    """The platform that runs a model's programs, and the choices for it."""

    platform: str = "cpu"  # jax's name: cpu, gpu or tpu
    attention: str = "xla"  # attention over whole sequences: xla or cudnn
    matmul_precision: str = "highest"  # precision of float32 matrix products, a key of PRECISIONS

    @property
    def precision(self) -> str:
        """jax's name of the matmul precision, for the `precision` argument of jax functions."""
        return PRECISIONS[self.matmul_precision]

    def products(self) -> AbstractContextManager:
        """Returns a context in which matrix products are traced with this precision, whatever the caller's default."""
        return jax.default_matmul_precision(self.precision)


ON_CPU = Target()


def target_of(mesh: jax.sharding.Mesh | None = None, matmul_precision: str = "highest") -> Target:
    """Returns the target of programs on this mesh, or on jax's default device if `mesh` is None."""
    device = next(iter(jax.device_put(0.0).devices())) if mesh is None else mesh.devices.flat[0]
    return Target(device.platform, matmul_precision=matmul_precision)
