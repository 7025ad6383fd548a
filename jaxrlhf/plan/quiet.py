"""Hides log lines of the CUDA wheels while they are loaded. jax is not imported here, because jax loads some wheels."""

import contextlib
import os
import tempfile
from collections.abc import Iterator

# TF_CPP_MIN_LOG_LEVEL does not hide lines with these texts.
_NOISE = (b"before absl::InitializeLog() is called", b"cudart_stub.cc")


@contextlib.contextmanager
def without_driver_warnings() -> Iterator[None]:
    """Removes lines about a missing CUDA driver from stderr. Other lines are printed when the block ends."""
    with tempfile.TemporaryFile() as log:
        stderr = os.dup(2)
        os.dup2(log.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            log.seek(0)
            os.write(2, b"".join(line for line in log if not any(noise in line for noise in _NOISE)))
