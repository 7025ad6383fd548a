"""What a model's programs are for: the kind of device, and how it computes what may be computed in several ways.

The value comes from the devices on which the weights lie and travels in the model's config. Traced code reads it there
and never asks the host: a program for a card can be traced where there is none.
"""

import dataclasses
from contextlib import AbstractContextManager

import jax

# jax's names. "default" is TF32 on NVIDIA GPUs; what lies between it and "highest" is TF32 in cuBLAS but not in Triton.
PRECISIONS = {"highest": "highest", "tf32": "default"}


@dataclasses.dataclass(frozen=True)
class Target:
    """The kind of device that runs a model's programs, and the choices that are made for it."""

    platform: str = "cpu"  # in jax's words: cpu, gpu or tpu
    attention: str = "xla"  # what computes attention over whole sequences: xla or cudnn
    matmul_precision: str = "highest"  # of float32 products, a key of PRECISIONS

    @property
    def precision(self) -> str:
        """The precision of products in jax's words, for its argument `precision`."""
        return PRECISIONS[self.matmul_precision]

    def products(self) -> AbstractContextManager:
        """Gives products that are traced inside this block their precision, whatever the caller's default is."""
        return jax.default_matmul_precision(self.precision)


ON_CPU = Target()


def target_of(mesh: jax.sharding.Mesh | None = None, matmul_precision: str = "highest") -> Target:
    """The target of programs on this mesh; None: on the device where jax puts arrays by default."""
    device = next(iter(jax.device_put(0.0).devices())) if mesh is None else mesh.devices.flat[0]
    return Target(device.platform, matmul_precision=matmul_precision)
