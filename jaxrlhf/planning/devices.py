"""Devices that are not there: the host's own processor, as many times as it is asked to be."""

import os
import re

import jax

from jaxrlhf.errors import UserError


def virtual_devices(count: int) -> list[jax.Device]:
    """So many virtual CPU devices; `UserError` where this process has begun with fewer."""
    # The older way to ask for them; jax takes one or the other.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = re.sub(r"--xla_force_host_platform_device_count=\d+", "", flags)
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # jax has its devices already
        pass
    found = jax.devices("cpu")
    if len(found) < count:
        raise UserError(
            f"--devices: {count} are more than the {len(found)} that jax has begun with in this process; "
            "plan in a process of its own"
        )
    return found[:count]
