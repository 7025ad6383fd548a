"""Options reach the program under whose name they stand, and no other; one that XLA does not know is one line."""

import ast
import re
from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxrlhf.config.reading import load_config
from jaxrlhf.config.run import PROGRAMS
from jaxrlhf.distributed.compiler_options import ALL, check_options, compiled_with, options_of
from jaxrlhf.distributed.programs import Program
from jaxrlhf.errors import UserError

ROOT = Path(__file__).parent.parent.parent


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
    """Read from the source: the name with which each `Program` is made."""
    names = set()
    for file in sorted((ROOT / "jaxrlhf").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            if node.func.id == "Program" or (node.func.id == "_rows" and file.name == "programs.py"):
                names.add(getattr(node.args[1], "value", None))
            elif node.func.id == "_training":  # under the name of its step
                names.add(node.args[0].id)
    names = {name for name in names if isinstance(name, str)}  # without the helpers that hand a name on
    assert names | {ALL} == set(PROGRAMS)
