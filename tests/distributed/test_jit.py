"""A program's count tells every compilation, also those that trace nothing; options reach the program they name."""

import ast
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.config.reading import load_config
from jaxrlhf.config.run import PROGRAMS
from jaxrlhf.distributed.jit import ALL, Program, check_options, compiled_with, options_of, peak_memory_bytes
from jaxrlhf.errors import UserError

ROOT = Path(__file__).parent.parent.parent


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
from jaxrlhf.distributed.jit import Program
program = Program(lambda x: x * 2, "program")
mesh = Mesh(np.array(jax.devices()), ("data",))
x = np.ones(8, np.float32)
counts = []
for sharding in (P(), P(), P("data"), P("data")):
    program(jax.device_put(x, NamedSharding(mesh, sharding)))
    counts.append(program.compiles)
print(program.traces, counts)
"""


def test_another_sharding_compiles_without_tracing_and_is_counted(processes):
    assert processes.run("-c", PLACEMENT, devices=8).output == "1 [1, 1, 2, 2]\n"


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="devices keep their own count")
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's own count to compare with")
def test_peak_memory_is_the_process_s_high_water_mark():
    held = np.ones(1 << 24)  # 128 MiB
    found = peak_memory_bytes()
    kib = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1))
    assert found == pytest.approx(kib * 1024, rel=0.05) and found > held.nbytes


def _dumped(folder: Path) -> set[str]:
    """Which of these programs XLA has written out there."""
    return {name for name in ("one", "other") if list(folder.glob(f"*jit_{name}.*"))}


@pytest.mark.parametrize(("under", "found"), [("one", {"one"}), (ALL, {"one", "other"}), ("third", set())])
@pytest.mark.parametrize("call", [lambda program, x: program(x), lambda program, x: program.lower(x).compile()],
                         ids=["called", "lowered"])  # fmt: skip
def test_xla_gets_the_options_of_the_program(tmp_path, under, found, call):
    """A real option, with something to see: XLA writes out what it compiles."""
    with compiled_with({under: {"xla_dump_to": str(tmp_path / "dump")}}):
        programs = [Program(lambda x: jnp.sin(x) * 2, name) for name in ("one", "other")]
    for program in programs:  # also when they are called, and compiled, after the block
        call(program, jnp.ones(3))
    assert _dumped(tmp_path / "dump") == found


def test_a_program_s_own_options_come_before_those_of_all():
    options = {ALL: {"xla_cpu_enable_fast_math": True, "xla_gpu_autotune_level": 0}}
    options["update"] = {"xla_cpu_enable_fast_math": False}
    with compiled_with(options):
        assert options_of("update") == {"xla_cpu_enable_fast_math": False, "xla_gpu_autotune_level": 0}
        assert options_of("rollout") == options[ALL]
        with compiled_with({}):
            assert options_of("update") is None
        assert options_of("rollout") == options[ALL]
    assert options_of("rollout") is None


def test_a_program_s_given_options_come_before_those_it_is_made_with():
    own = {"xla_allow_excess_precision": False}
    assert options_of("update", own) == own and options_of("update", {}) is None
    with compiled_with({ALL: {"xla_gpu_autotune_level": 0}, "update": {"xla_allow_excess_precision": True}}):
        assert options_of("update", own) == {"xla_allow_excess_precision": True, "xla_gpu_autotune_level": 0}
        assert options_of("rollout", own) == {**own, "xla_gpu_autotune_level": 0}


def test_xla_gets_the_options_that_a_program_is_made_with(tmp_path):
    Program(lambda x: jnp.sin(x), "one", compiler_options={"xla_dump_to": str(tmp_path / "dump")})(jnp.ones(3))
    assert _dumped(tmp_path / "dump") == {"one"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"update": {"xla_no_such_option": 1}}, "compiler_options.update.xla_no_such_option: .* no such option"),
        ({"all": {"xla_cpu_enable_fast_math": "maybe"}}, "compiler_options.all.xla_cpu_enable_fast_math: .*'maybe'"),
        ({"all": {"xla_gpu_enable_command_buffer": "FOO"}}, "compiler_options.all.xla_gpu_enable_command_buffer: "),
    ],
    ids=["unknown", "bool", "enum"],
)
def test_what_xla_does_not_take_is_one_line(options, said):
    with pytest.raises(UserError, match=said) as error, compiled_with(options):
        raise AssertionError("never reached")
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    assert options_of("update") is None


def test_options_that_the_docs_name_are_known_and_take_such_values():
    """XLA's table of options is the same on every backend; what they do on a GPU is not tested here."""
    values = {
        "xla_allow_excess_precision": False,
        "xla_gpu_enable_latency_hiding_scheduler": True,
        "xla_gpu_all_reduce_combine_threshold_bytes": 1 << 27,
        "xla_gpu_all_gather_combine_threshold_bytes": 1 << 27,
        "xla_gpu_reduce_scatter_combine_threshold_bytes": 1 << 27,
        "xla_gpu_triton_gemm_any": True,
        "xla_gpu_deterministic_ops": True,
        "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,WHILE",
    }
    check_options({"all": values})
    section = (ROOT / "docs" / "gpu.md").read_text()
    assert set(re.findall(r"\bxla_\w+", section)) == set(values)
    (command,) = re.findall(r"'(compiler_options\S+=.*)'", section)
    config = load_config(ROOT / "configs" / "bench.yaml", [command])
    assert config.compiler_options == {"rollout": {k: v for k, v in values.items() if k in command}}


def test_the_setting_knows_every_program_of_the_package():
    """Read from the source: the name with which each `Program` of a run is made."""
    names = set()
    for file in sorted((ROOT / "jaxrlhf").rglob("*.py")):
        if file.name in ("evaluating.py", "answering.py"):  # of the command evaluate, which has no compiler options
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            if node.func.id == "Program" or (node.func.id == "_by_rows" and file.name == "programs.py"):
                names.add(getattr(node.args[1], "value", None))
            elif node.func.id == "train_adapter":  # the program has the name of its step
                names |= {a.id for a in node.args if isinstance(a, ast.Name) and a.id.endswith("_update")}
    names = {name for name in names if isinstance(name, str)}  # without the helpers that hand a name on
    assert names | {ALL} == set(PROGRAMS)
