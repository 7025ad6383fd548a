"""What several processes decide together. Each calls alike; a process that is alone decides at once."""

import jax
import numpy as np
from jax.experimental import multihost_utils


def largest(value: int) -> int:
    """The largest of what the processes give."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.process_allgather(np.int32(value)).max())


def of_first(value: int) -> int:
    """What process 0 gives."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))
