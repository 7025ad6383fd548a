"""Programs that are kept: the next process loads them; a folder that is no good, or a damaged file, stops nothing."""

import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxrlhf.checkpoint import compilation_cache as module
from jaxrlhf.checkpoint.compilation_cache import AUTO, cached_programs
from jaxrlhf.distributed.jit import Program

PROGRAM = """
import sys
import jax, jax.numpy as jnp
from jaxrlhf.checkpoint.compilation_cache import cached_programs
from jaxrlhf.distributed.jit import Program

found = []
jax.monitoring.register_event_listener(lambda event, **_: found.append(event))
setting = None if sys.argv[1] == "null" else sys.argv[1]
with cached_programs(setting, print):
    program = Program(lambda x: jnp.sin(x) @ x.T, "program")
    values = [float(program(jnp.ones((n, 8))).sum()) for n in (4, 4, 6)]
hits = found.count("/jax/compilation_cache/cache_hits")
print(values, program.compiles, hits)
"""


@pytest.fixture
def start(processes):
    """`start(setting, **environment)`: what a fresh process prints, and says."""

    def run(setting, **environment):
        own = {"JAX_COMPILATION_CACHE_DIR": None, "JAX_PLATFORMS": "cpu"} | environment
        done = processes.run("-c", PROGRAM, setting, environment=own)
        return done.output.splitlines(), done.errors

    return run


def entries(folder):
    return sorted(Path(folder).rglob("*-cache"))


@pytest.fixture
def events():
    """Names of jax's events while the test runs."""
    found = []

    def note(event, **_):
        found.append(event)

    jax.monitoring.register_event_listener(note)
    yield found
    jax.monitoring.unregister_event_listener(note)


@pytest.fixture
def no_cache_of_jax(monkeypatch):
    """jax's own setting is not there, as for a person who knows nothing of it."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def compiled(factor):
    """Compiles a program that no other test has, whose constant is `factor`."""
    jax.clear_caches()
    return Program(lambda x: x * factor + 1, f"times_{factor}")(jnp.ones(3))


def test_the_next_process_loads_what_this_one_compiled_and_counts_the_same(start, tmp_path):
    (cold,), said = start(str(tmp_path / "kept"))
    assert said == "" and cold.endswith(" 2 0")
    (warm,), said = start(str(tmp_path / "kept"))
    assert said == ""
    values, compiles, hits = warm.rsplit(" ", 2)
    assert (values, compiles) == tuple(cold.rsplit(" ", 2)[:2]), "the same numbers, and as many compilations told"
    assert int(hits) == len(entries(tmp_path)) > 2
    (off,), _ = start("null", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "kept"))
    assert off == cold, "null: nothing is loaded, whatever jax is told"


@pytest.mark.parametrize("named", ["JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME", "HOME"])
def test_auto_keeps_where_the_environment_says(start, tmp_path, named):
    _, said = start(AUTO, **{"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": "", named: str(tmp_path / "own")})
    assert said == ""
    below = {"JAX_COMPILATION_CACHE_DIR": "own", "XDG_CACHE_HOME": "own/jaxrlhf/xla", "HOME": "own/.cache/jaxrlhf/xla"}
    folder = tmp_path / below[named]
    assert entries(folder) == entries(tmp_path) != []
    if named != "JAX_COMPILATION_CACHE_DIR":
        assert folder.stat().st_mode & 0o077 == 0, "what lies there is run: it is the owner's alone"


def test_a_folder_that_cannot_be_used_is_said_in_one_line(tmp_path, no_cache_of_jax, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    said = []
    with cached_programs(str(tmp_path / "file" / "kept"), said.append) as folder:
        assert folder is None
        assert compiled(2.5).tolist() == [3.5] * 3
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with cached_programs(AUTO, said.append) as folder:
        assert folder is None
    assert len(said) == 2 and all("\n" not in line and "compilation_cache=FOLDER" in line for line in said), said
    assert f"{tmp_path / 'file' / 'kept'}: Not a directory" in said[0] and "user's cache folder" in said[1]
    assert (tmp_path / "file").read_text() == "in the way"


def test_settings_of_jax_are_as_before_afterwards(tmp_path, monkeypatch):
    names = (module._DIRECTORY, module._ENABLED, module._MAX, *module._KEEP_ALL)
    before = {name: getattr(jax.config, name) for name in names}
    with cached_programs(str(tmp_path), print) as folder:
        assert folder == str(tmp_path) and jax.config.jax_compilation_cache_dir == folder
        assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
        with cached_programs(None, print):
            compiled(3.5)
            with cached_programs(str(tmp_path), print) as inner:
                assert inner is None, "whoever compiles anew does so in all that it calls"
        assert entries(tmp_path) == []
        compiled(3.5)
        assert entries(tmp_path) != []
    assert {name: getattr(jax.config, name) for name in names} == before
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "5")
    with cached_programs(str(tmp_path), print):
        kept = jax.config.jax_persistent_cache_min_compile_time_secs
        assert kept == before["jax_persistent_cache_min_compile_time_secs"], "what a person has set stays"


def test_what_a_kill_cut_off_goes_and_is_made_again(tmp_path, events, recwarn):
    with cached_programs(str(tmp_path), print):
        expected = compiled(4.5)
    whole = {file: file.read_bytes() for file in entries(tmp_path)}
    cut_off, *others = entries(tmp_path)
    cut_off.write_bytes(whole[cut_off][:-5])
    cut_off.with_name(cut_off.name.replace("-cache", "-atime")).unlink()  # which jax writes last
    with cached_programs(str(tmp_path), print):
        assert entries(tmp_path) == others
        assert compiled(4.5).tolist() == expected.tolist()
    assert {file.name for file in entries(tmp_path)} == {file.name for file in whole}
    assert all(zlib.decompress(file.read_bytes()) for file in entries(tmp_path))
    with cached_programs(str(tmp_path), print):
        del events[:]
        compiled(4.5)
        assert events.count("/jax/compilation_cache/cache_hits") == len(whole)
    assert not recwarn.list


def test_a_file_that_is_damaged_while_the_run_goes_costs_a_compilation_only(tmp_path, recwarn):
    with cached_programs(str(tmp_path), print):
        expected = compiled(5.5)
        for file in entries(tmp_path):
            file.write_bytes(file.read_bytes()[:20])
        assert compiled(5.5).tolist() == expected.tolist()
    assert not recwarn.list, "nothing that a person has to know"


def test_beyond_the_limit_what_was_used_longest_ago_goes(tmp_path, monkeypatch):
    with cached_programs(str(tmp_path), print):
        for factor in (6.5, 7.5):
            compiled(factor)
        before = entries(tmp_path)
        monkeypatch.setattr(module, "LIMIT", sum(file.stat().st_size for file in before))
    oldest = next(file for file in before if "times_7" in file.name)
    oldest.with_name(oldest.name.replace("-cache", "-atime")).write_bytes((1).to_bytes(8, "little"))  # ns since 1970
    with cached_programs(str(tmp_path), print):
        compiled(8.5)
        after = entries(tmp_path)
    assert oldest not in after and set(after) - set(before), "the program used longest ago made room for the new one"
    assert sum(file.stat().st_size for file in after) <= module.LIMIT
