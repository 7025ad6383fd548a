"""The target of a model's programs: the platform, the kind of attention and the matmul precision.

The devices that hold the weights decide the target. The target is part of the model's config. Traced code reads the
target from the config, and does not ask jax for devices. So a program for a GPU can be traced on a machine without a
GPU.
"""

import dataclasses
from contextlib import AbstractContextManager

import jax

# Name of a precision in the settings -> its name in jax. jax's "default" is TF32 on NVIDIA GPUs. jax also has names
# between "default" and "highest". These names mean TF32 in cuBLAS, but not in Triton, and are not used.
PRECISIONS = {"highest": "highest", "tf32": "default"}


@dataclasses.dataclass(frozen=True)
class Target:
    """The platform that runs a model's programs, with its kind of attention and its matmul precision."""

    platform: str = "cpu"  # cpu, gpu or tpu, as in jax
    attention: str = "xla"  # xla or cudnn computes attention over whole sequences
    matmul_precision: str = "highest"  # precision of float32 matrix products; a key of PRECISIONS
    # Whether scoring, updates and the pass over prompts run the layers in a loop over stacked weights (see
    # `layer_scan`). None means on a GPU, if the stacked copy is small.
    scan_layers: bool | None = None
    decode_kernels: bool = False  # on a GPU, decoding uses kernels of its own (Pallas)

    @property
    def precision(self) -> str:
        """The matmul precision by its name in jax, for the argument `precision` of jax functions."""
        return PRECISIONS[self.matmul_precision]

    def products(self) -> AbstractContextManager:
        """Returns a context that traces matrix products with this precision. The caller's default does not count."""
        return jax.default_matmul_precision(self.precision)


ON_CPU = Target()


def target_of(
    mesh: jax.sharding.Mesh | None = None,
    matmul_precision: str = "highest",
    scan_layers: bool | None = None,
    decode_kernels: bool = False,
) -> Target:
    """Returns the target of programs on the mesh. If `mesh` is None, the programs run on jax's default device."""
    device = next(iter(jax.device_put(0.0).devices())) if mesh is None else mesh.devices.flat[0]
    own = {"scan_layers": scan_layers, "decode_kernels": decode_kernels}
    return Target(device.platform, matmul_precision=matmul_precision, **own)
