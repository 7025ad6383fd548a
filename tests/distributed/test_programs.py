"""A program's count tells every compilation, also those that trace nothing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.distributed.programs import Program, peak_memory_bytes


def _scaled(x, scale=2.0):
    return (x * scale).sum() + jnp.asarray(np.arange(3)).sum()  # the constant compiles small programs of its own


def test_same_shapes_compile_once():
    program = Program(_scaled, "scaled")
    assert program.compiles == 0
    for value in (1.0, 2.0, 3.0):
        assert float(program(jnp.full(4, value, jnp.float32))) == 8 * value + 3
    assert float(program(np.full(4, 1.0, np.float32))) == 11.0
    assert program.compiles == 1


def test_new_shape_dtype_or_static_value_compiles_again():
    program = Program(_scaled, "scaled", static_argnames="scale")
    program(jnp.ones(4))
    program(jnp.ones(5))
    assert program.compiles == 2
    program(jnp.ones(5, jnp.bfloat16))
    assert program.compiles == 3
    assert float(program(jnp.ones(5), scale=3.0)) == 18.0
    assert program.compiles == 4


def test_programs_count_apart_though_named_alike_and_nested():
    inner = Program(lambda x: x + 1, "same")
    outer = Program(lambda x: inner(x) * 2, "same")
    assert int(outer(jnp.int32(1))) == 4
    assert outer.compiles == 1 and inner.compiles == 1  # traced into outer
    outer(jnp.int32(2))
    assert outer.compiles == 1 and inner.compiles == 1


def test_other_jit_outside_is_not_counted():
    program = Program(lambda x: x * 3, "program")
    program(jnp.ones(3))
    other = jax.jit(lambda x: x - 1)
    other(jnp.ones((3, 7)))
    assert program.compiles == 1


def test_error_in_the_function_leaves_the_program_usable():
    def function(x):
        if x.shape[0] == 2:
            raise ValueError("two")
        return x

    program = Program(function, "program")
    with pytest.raises(ValueError, match="two"):
        program(jnp.ones(2))
    program(jnp.ones(3))
    assert program.compiles == 2


def test_options_and_name_reach_jit():
    program = Program(lambda state, x: state + x, "update", donate_argnums=0)
    state = jnp.ones(3)
    program(state, jnp.ones(3))
    assert state.is_deleted()
    assert "jit_update" in program.lower(jnp.ones(3), jnp.ones(3)).as_text()


PLACEMENT = """
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxrlhf.distributed.programs import Program
program = Program(lambda x: x * 2, "program")
mesh = Mesh(np.array(jax.devices()), ("data",))
x = np.ones(8, np.float32)
counts = []
for sharding in (P(), P(), P("data"), P("data")):
    program(jax.device_put(x, NamedSharding(mesh, sharding)))
    counts.append(program.compiles)
print(program.traces, counts)
"""


def test_another_sharding_compiles_without_tracing_and_is_counted():
    # In a fresh process, for several devices.
    result = subprocess.run(
        [sys.executable, "-c", PLACEMENT],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"},
    )
    assert result.stdout == "1 [1, 1, 2, 2]\n", result.stderr


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="devices keep their own count")
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's own count to compare with")
def test_peak_memory_is_the_process_s_high_water_mark():
    held = np.ones(1 << 24)  # 128 MiB
    found = peak_memory_bytes()
    kib = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1))
    assert found == pytest.approx(kib * 1024, rel=0.05) and found > held.nbytes
