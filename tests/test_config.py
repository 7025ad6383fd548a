"""Settings in, settings out; and every way to get them wrong ends in one line that says what would be right."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

import jaxrlhf.config
from jaxrlhf.config import HTTPRewardConfig, KLConfig, ModelRewardConfig, OptimizerConfig, RunConfig
from jaxrlhf.config.data import MIX_WITH
from jaxrlhf.config.differences import differences
from jaxrlhf.config.reading import dump_config, load_config, parse_yaml
from jaxrlhf.config.table import settings_help
from jaxrlhf.errors import UserError

FULL = """\
# a run of all stages
run_dir: runs/a
model:
  new: {layers: 2}
sft:
  data:
    path: builtin:assistant-demonstrations
  optimizer:
    learning_rate: 1e-4
reward_model:
  data: {path: builtin:assistant-preferences}
ppo:
  data:
    path: builtin:assistant-prompts
  kl:
    coef: 0.1
  update:
    minibatches: 2
"""


# Eight aliases of eight aliases, and so on: a file of a few lines that would take gigabytes.
ALIASES = "a: &a0 [x]\n" + "".join(f"b{i}: &a{i + 1} [{', '.join([f'*a{i}'] * 8)}]\n" for i in range(9))
REWARDS = "model | function | classifier | http | code_tests | judge | sum"


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> str:
        (tmp_path / "run.yaml").write_text(text)
        return "run.yaml"

    return write


def _error(path: str, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load_config(path, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------- what is right


def test_file_and_defaults(write):
    config = load_config(write(FULL))
    assert config.sft.optimizer.learning_rate == 1e-4
    assert config.ppo.kl.coef == 0.1 and config.ppo.kl.horizon == KLConfig().horizon
    assert config.stages == ("sft", "reward_model", "ppo")
    assert config.sft.data.path == "builtin:assistant-demonstrations"


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("ppo.kl.coef=1e-4", lambda c: c.ppo.kl.coef, 1e-4),
        ("ppo.kl.coef=1", lambda c: c.ppo.kl.coef, 1.0),
        ("ppo.kl.coef=.5", lambda c: c.ppo.kl.coef, 0.5),
        ("ppo.iterations=1_000", lambda c: c.ppo.iterations, 1000),
        ("seed=012", lambda c: c.seed, 12),
        ("sft.packing=false", lambda c: c.sft.packing, False),
        ("sft.remat=dots", lambda c: c.sft.remat, "dots"),
        ("ppo.sampling.top_p=0.9", lambda c: c.ppo.sampling.top_p, 0.9),
        ("stages=[sft]", lambda c: c.stages, ("sft",)),
        ("sft.adapter.target_modules=[q_proj, v_proj]", lambda c: c.sft.adapter.target_modules, ("q_proj", "v_proj")),
        ("ppo.sampling.stop_tokens=[1, 2]", lambda c: c.ppo.sampling.stop_tokens, (1, 2)),
        ("ppo.gold=my.module:function", lambda c: c.ppo.gold, "my.module:function"),
        ("compiler_options.all.xla_a=true", lambda c: c.compiler_options, {"all": {"xla_a": True}}),
        ("compiler_options={merge: {xla_a: B}}", lambda c: c.compiler_options, {"merge": {"xla_a": "B"}}),
        ("alarms=[]", lambda c: c.alarms, ()),
        ("alarms=[{metric: kl/k1, above: 5, stage: null}]", lambda c: c.alarms[0].for_, 1),
        ("alarms=[{metric: kl/k1, falls_by: 5%}]", lambda c: c.alarms[0].falls_by, "5%"),
        ("run_dir=a=b", lambda c: Path(c.run_dir).name, "a=b"),
        ("run_dir=2024-01-01", lambda c: Path(c.run_dir).name, "2024-01-01"),
        ("run_dir=no", lambda c: Path(c.run_dir).name, "no"),
        ('run_dir="1e5"', lambda c: Path(c.run_dir).name, "1e5"),
        ("sft.optimizer={warmup_steps: 5}", lambda c: c.sft.optimizer, OptimizerConfig(warmup_steps=5)),
        ("ppo.reward={kind: http, url: 'http://x'}", lambda c: c.ppo.reward, HTTPRewardConfig(url="http://x")),
        ("ppo.reward.path=folder", lambda c: c.ppo.reward, ModelRewardConfig(path="folder")),
    ],
)
def test_override(write, override, read, value):
    found = read(load_config(write(FULL), [override]))
    assert found == value and type(found) is type(value)


def test_overrides_apply_in_order_and_make_sections(write):
    path = write("run_dir: r\nstages: [sft]\nmodel:\nsft:\n")
    config = load_config(path, ["model.new.layers=3", "sft.data.path=a", "sft.data.path=b", "mesh.fsdp=2"])
    assert config.model.new.layers == 3 and config.sft.data.path == "b" and config.mesh.fsdp == 2


def test_null_switches_off_what_is_on_by_default(write):
    """Where a setting takes null, null is its value, also in a config that was written out."""
    off = load_config(write(FULL), ["ppo.update.kl_bound=null", "compilation_cache=null"])
    assert off.ppo.update.kl_bound is None and off.compilation_cache is None
    assert load_config(write(dump_config(off))) == off


def test_a_section_of_the_file_without_keys_has_its_defaults(write):
    assert load_config(write(FULL + "  sampling:\n    # top_k: 3\n")) == load_config(write(FULL))


def test_null_in_the_file_is_refused_where_it_is_no_value(write):
    error = "run.yaml:19: ppo.iterations must be int >= 1, not null; leave it out for its default"
    assert _error(write(FULL + "  iterations:\n")) == _error(write(FULL + "  iterations: null\n")) == error


@pytest.mark.parametrize("value", ["", " ", "  # 0.2"])
@pytest.mark.parametrize("key", ["ppo.kl.coef", "ppo.kl", "run_dir", "stages", "ppo.sampling.top_p", "zzz"])
def test_an_override_without_a_value_is_refused(write, key, value):
    assert "': the value is missing; give key.path=value" in _error(write(FULL), f"{key}={value}")


def test_sections_that_share_an_anchor_are_overridden_apart(write):
    shared = "data: &d {path: p}\n  evaluation: {data: *d}"
    path = write(FULL.replace("data: {path: builtin:assistant-preferences}", shared))
    config = load_config(path, ["reward_model.data.limit=5"])
    assert config.reward_model.data.limit == 5 and config.reward_model.evaluation.data.limit is None


def test_dump_loads_back_to_an_equal_config(write):
    odd = ["run_dir='1e-4'", "model.tokenizer='no'", "sft.optimizer.learning_rate=1e-5", "ppo.gold='null:f'",
           "sft.data.text_field='12:30'", "sft.data.split='é: # x'", "ppo.kl.coef=1e16",
           "compiler_options={all: {xla_a: true}, update: {xla_b: '1'}}",
           "ppo.async=1", "mesh.rollout.data=2", "mesh.update={fsdp: 2, tensor: 3}"]  # fmt: skip
    config = load_config(write(FULL), odd)
    assert config.ppo.async_ == 1 and config.ppo.update.importance_cap == 2
    text = dump_config(config)
    assert load_config(write(text)) == config
    assert dump_config(load_config(write(text))) == text
    assert "&id" not in text  # nothing by reference


def difference(old, new):
    return differences(parse_yaml(dump_config(old), "old"), parse_yaml(dump_config(new), "new"))


def test_what_changed_is_named_by_what_is_dumped(write):
    path = write(FULL)
    old = load_config(path)
    assert difference(old, load_config(path)) == []
    new = load_config(path, ["ppo.kl.coef=0.2", "stages=[sft]", "model.new.heads=8"])
    assert difference(old, new) == [
        ("stages", ["sft", "reward_model", "ppo"], ["sft"]),
        ("model.new.heads", 4, 8),
        ("ppo.kl.coef", 0.1, 0.2),
    ]
    without = load_config(write(FULL.split("ppo:")[0]), ["stages=[sft]"])
    assert [path for path, _, _ in difference(old, without)] == ["stages", "ppo"]


def test_help_lists_every_setting_with_type_default_and_description():
    lines = settings_help().splitlines()
    bound = "clips the ratio below 1 - clip_low; the default is 3e-4 for gspo; for cispo it is 1, which means no bound"
    assert f"ppo.update.clip_low  float >= 0 = 0.2  {bound}" in lines
    assert "run_dir  text, required  directory of the run; the same command resumes it" in lines
    assert any(line.startswith("ppo.sampling.top_p  float > 0 and <= 1 or null = null  samples") for line in lines)
    modules = "adapter.target_modules  non-empty list of text = [all-linear]  modules"
    assert any(line.startswith(modules) for line in lines)
    assert any(line.startswith("adapter.kind  lora | full = lora  lora trains low-rank") for line in lines)
    assert "sft  section or null = null  settings of the sft stage" in lines
    keys = [line.split("  ")[0] for line in lines]
    assert len(keys) == len(set(keys))

    def fields(model: type[BaseModel]) -> int:
        # The sections within a mapping of names have no key paths of their own.
        # The sources of a mixture have the settings of the section that holds them.
        own = [f for name, f in model.model_fields.items() if name != MIX_WITH]
        annotations = [str(f.annotation) for f in own if "dict[" not in str(f.annotation)]
        sections = re.findall(r"jaxrlhf\.config\.\w+\.(\w+)", " ".join(annotations))
        return len(model.model_fields) + sum(fields(getattr(jaxrlhf.config, name)) for name in sections)

    entries = sum(key.endswith("[]") for key in keys)  # of lists of sections, which have a line of their own
    assert len(keys) == fields(RunConfig) + entries and entries == 1
    assert all(len(line.split("  ")) == 3 and line.split("  ")[2] for line in lines)


# ---------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # the key
        ("ppo.update.clip_lo=0.1", "unknown key ppo.update.clip_lo; did you mean ppo.update.clip_low?"),
        ("sead=1", "unknown key sead; did you mean seed?"),
        ("sft.learning_rate=1", "unknown key sft.learning_rate; did you mean sft.optimizer.learning_rate?"),
        ("mesh.zzz=1", "unknown key mesh.zzz; the keys of mesh are data, fsdp, context, tensor"),
        ("zzz=null", "unknown key zzz; the keys at the top level are run_dir, seed, stages, model, mesh, adapter, "),
        ("seed.x=1", "seed must be int >= 0 and < 4294967296, not a section"),
        ("run_dir.x=1", 'run_dir must be a section with keys, not the text "runs/a"'),
        ("seed", "must have the form key.path=value, such as ppo.kl.coef=0.1"),
        ("=3", "must have the form key.path=value, such as ppo.kl.coef=0.1"),
        ("a..b=3", "must have the form key.path=value, such as ppo.kl.coef=0.1"),
        # the type
        ("seed=1.5", "seed must be int >= 0 and < 4294967296, not 1.5"),
        ("seed=true", "seed must be int >= 0 and < 4294967296, not true"),
        ("seed=abc", 'seed must be int >= 0 and < 4294967296, not the text "abc"'),
        ("ppo.kl.coef=true", "ppo.kl.coef must be float >= 0, not true"),
        ("sft.packing=yes", 'sft.packing must be true | false, not the text "yes"'),
        ("run_dir=1e5", "run_dir must be text, not 100000.0; put a text that looks like a number in quotes"),
        ("sft=3", "sft must be a section with keys or null, not 3"),
        ("sft.optimizer=[1]", "sft.optimizer must be a section with keys, not the list [1]"),
        ("sft.remat=1", "sft.remat must be none | dots | full | offload, not 1"),
        ("sft.optimizer.warmup_steps=2.5", "sft.optimizer.warmup_steps must be int >= 0, not 2.5"),
        ("stages=sft", 'stages must be non-empty list of sft | reward_model | ppo, not the text "sft"'),
        ("stages=[]", "stages must be non-empty list of sft | reward_model | ppo, not the list []"),
        ("stages=[dpo]", 'stages[0] must be sft | reward_model | ppo, not the text "dpo"'),
        ("sft.adapter.kind=qlora", 'sft.adapter.kind must be lora | full, not the text "qlora"'),
        # the bound
        ("ppo.update.clip_low=-1", "ppo.update.clip_low must be float >= 0, not -1"),
        ("ppo.sampling.top_p=0", "ppo.sampling.top_p must be float > 0 and <= 1 or null, not 0"),
        ("ppo.kl.coef=.inf", "ppo.kl.coef must be float >= 0, not .inf"),
        ("ppo.sampling.top_p=.nan", "ppo.sampling.top_p must be float > 0 and <= 1 or null, not .nan"),
        ("ppo.batch_size=0", "ppo.batch_size must be int >= 1, not 0"),
        ("ppo.async=2", "ppo.async must be int >= 0 and <= 1, not 2"),
        ("ppo.async=true", "ppo.async must be int >= 0 and <= 1, not true"),
        ("ppo.async_=1", "unknown key ppo.async_; did you mean ppo.async?"),
        # what is missing
        ("ppo.data.path=null", "ppo.data.path must be text, not null"),
        ("model=null", "model must be a section with keys, not null"),
        ("ppo.kl.coef=null", "ppo.kl.coef must be float >= 0, not null; leave it out for its default"),
        ("ppo.kl=~", "ppo.kl must be a section with keys, not null; leave it out for its default"),
        ("compiler_options=null", "compiler_options must be mapping of names, not null; leave it out for"),
        ("ppo.reward.function=r.py:", "unknown key ppo.reward.function; it belongs to kind: function"),
        ("ppo.gold=r.py:", "ppo.gold must be text or null, not a section; YAML reads a text with a colon at its end"),
        ("ppo.gold='r.py:'", "ppo.gold: 'r.py:' names no function; give module:function or path.py:function"),
        ("ppo.sampling.stop_tokens=[null]", "ppo.sampling.stop_tokens[0] must be int, not null"),
        ("ppo.gold=r.py", "ppo.gold: 'r.py' names no function; give module:function or path.py:function"),
        # what belongs together
        ("model.path=x", "model: give exactly one of path, run, new; given: path, new"),
        ("stages=[ppo, sft]", "stages must be in the order sft, reward_model, ppo, each at most once, not ['ppo'"),
        ("model.new.heads=3", "model.new: heads (3) must be a multiple of kv_heads (2)"),
        ("mesh.update.data=2", "mesh: rollout and update are the two meshes of PPO; give both sections, or neither"),
        ("mesh.tensor=-1", "mesh: each axis must be at least 1, or -1 on at most one axis; given"),
        ("compiler_options.rolout.xla_a=1", "compiler_options: there is no program rolout; did you mean rollout?"),
        ("compiler_options={zzz: {xla_a: 1}}", "compiler_options: there is no program zzz; programs are all, roll"),
        ("compiler_options.update=fast", "compiler_options: update must be a mapping of option names, such as {"),
        ("compiler_options.update.xla_a=[1]", "compiler_options: update.xla_a must be true, false, a number or text"),
        ("compiler_options=fast", 'compiler_options must be mapping of names, not the text "fast"'),
        # of several kinds
        ("ppo.reward.kind=htp", "ppo.reward.kind must be " + REWARDS + ", not htp"),
        ("ppo.reward.kind=3", "ppo.reward.kind must be " + REWARDS + ", not 3"),
        ("ppo.reward={kind: http}", "ppo.reward.url is missing; give text: URL that receives {prompts, "),
        ("ppo.reward={kind: function}", "ppo.reward.function is missing; give text: module:function or path.py:"),
        ("ppo.reward={kind: sum, parts: {}}", "ppo.reward.parts must have at least one entry"),
        ("ppo.reward={kind: http, url: x, path: y}", "unknown key ppo.reward.path; it belongs to kind: model and "),
        ("ppo.reward.url=http://x", "unknown key ppo.reward.url; it belongs to kind: http and kind: judge; kind: "),
        ("ppo.reward.paht=x", "unknown key ppo.reward.paht; did you mean ppo.reward.path?"),
        ("ppo.reward.max_length=0", "ppo.reward.max_length must be int >= 1, not 0"),
        ("ppo.reward.template=x", "ppo.reward: template must contain {completion}, may contain {prompt}, "),
        ("ppo.reward={kind: sum, parts: {a: {kind: sum}}}", "ppo.reward.parts.a.kind must be model | function | "),
        ("ppo.reward={kind: sum, parts: {a: {weight: x}}}", 'ppo.reward.parts.a.weight must be float, not the'),
        ("ppo.reward={kind: sum, parts: {a: {url: x}}}", "unknown key ppo.reward.parts.a.url; it belongs to kind: "),
        ("ppo.reward=3", "ppo.reward must be a section with keys, not 3"),
        # entries of a list
        ("trackers=[wandb, tensorbord]", "trackers[1] must be tensorboard | wandb | mlflow | trackio, not the text "
         '"tensorbord"; did you mean tensorboard?'),
        ("profile={steps: [3]}", "profile.steps must have 2 entries, not 1"),
        ("alarms=[{name: a/b, metric: kl/k1, above: 1}]", "alarms[0].name must have only letters, digits"),
        ("trackers=[wandb, wandb]", "trackers: names wandb twice; give each tracker once"),
        ("alarms=[pop]", 'alarms[0] must be ppo | a section with keys, not the text "pop"'),
        ("alarms=ppo", 'alarms must be list of ppo | a section with keys, not the text "ppo"'),
        ("alarms=[ppo, 3]", "alarms[1] must be ppo | a section with keys, not 3"),
        ("alarms=[{metrc: a}]", "unknown key alarms[0].metrc; did you mean alarms[0].metric?"),
        ("alarms=[{above: 1}]", "alarms[0]: metric is missing; give the metric that the alarm watches"),
        ("alarms=[{name: kl, do: stop}]", "alarms[0]: metric is missing; give the metric that the alarm watches; the "),
        ("alarms=[ppo, {metric: a}]", "alarms[1]: give exactly one of above, below, rises_by, falls_by; given: none"),
        ("alarms=[{metric: a, above: x}]", 'alarms[0].above must be float or null, not the text "x"'),
        ("alarms=[{metric: a, falls_by: -1}]", "alarms[0].falls_by: must be a number above 0, or a percentage such as"),
        ("alarms=[{metric: a, above: 1, for: 0}]", "alarms[0].for must be int >= 1, not 0"),
        ("alarms=[{metric: a, above: 1, do: run}]", "alarms[0]: do: run needs command, and command needs do: run;"),
        ("alarms=[{metric: a, above: 1, against: b}]", "alarms[0]: against needs rises_by or falls_by"),
        ("alarms.0.do=stop", "alarms must be list of ppo | a section with keys, not a section"),
        # the value
        ("seed=[1", "not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("seed=!!python/object:os.system x", "not valid YAML: could not determine a constructor"),
        ("seed=!!int x", "not valid YAML: invalid literal for int()"),
    ],
)
def test_wrong_override(write, override, message):
    error = _error(write(FULL), override)
    assert error.startswith(f"override '{override}':")
    assert message in error and "more)" not in error


def test_wrong_file_says_the_line(write):
    assert _error(write(FULL.replace("coef", "ceof"))) == (
        "run.yaml:16: unknown key ppo.kl.ceof; did you mean ppo.kl.coef?"
    )
    assert _error(write(FULL.replace("coef: 0.1", "coef: many"))) == (
        'run.yaml:16: ppo.kl.coef must be float >= 0, not the text "many"'
    )
    assert _error(write(FULL.replace("{layers: 2}", "{heads: 3}"))).startswith("run.yaml:4: model.new: heads (3) must")
    missing = FULL.replace("    path: builtin:assistant-prompts\n", "    limit: 5\n")
    assert _error(write(missing)).startswith("run.yaml:13: ppo.data.path is missing; give text")
    error = "stages names ppo, but the section ppo is missing; add the section, or leave ppo out of stages"
    assert _error(write(FULL.split("ppo:")[0])) == f"run.yaml: {error}"


def test_a_wrong_entry_of_a_list_says_its_own_line(write):
    alarms = "alarms:\n  - ppo\n  - {metric: kl/k1, above: 3}\n  - metric: kl/k1\n    above: high\n"
    wrong = 'alarms[2].above must be float or null, not the text "high"'
    assert _error(write(alarms + FULL)) == f"run.yaml:5: {wrong}"
    missing = _error(write(alarms.replace("    above: high\n", "") + FULL))
    assert missing.startswith("run.yaml:4: alarms[2]: give exactly one of above, below, rises_by, falls_by")
    assert _error(write(alarms.replace("high", "1\n    above: 2") + FULL)).startswith(
        "run.yaml:6: alarms[2].above is given twice, first in line 5; remove one of them"
    )


def test_alarms_are_written_and_read_again(write, tmp_path):
    config = load_config(write(FULL), ["alarms=[ppo, {metric: kl/k1, above: 5, for: 3, do: run, command: [mail, me]}]"])
    assert load_config(write(dump_config(config))) == config


def test_an_override_is_not_blamed_for_what_the_file_says(write):
    assert _error(write(FULL.split("ppo:")[0]), "run_dir=x", "seed=3").startswith("run.yaml: stages names ppo")
    assert _error(write(FULL.replace("0.1", "-1")), "ppo.kl.horizon=3").startswith("run.yaml:16: ppo.kl.coef must")


def test_several_faults_are_counted_and_a_misspelt_key_comes_first(write):
    error = _error(write(FULL.replace("run_dir", "rundir").replace("0.1", "-1")), "seed=x")
    assert error == "run.yaml:2: unknown key rundir; did you mean run_dir? (and 3 more)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run_dir: a\n  b: c\n", "run.yaml:2:4: not valid YAML: mapping values are not allowed here"),
        ("run_dir: [a\n", "run.yaml:2:1: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("a: \x01", "run.yaml: not valid YAML: unacceptable character"),
        ("a: 1\n---\nb: 2\n", "run.yaml:2:1: not valid YAML: but found another document"),
        ("- a\n", "run.yaml: the file must hold settings as `key: value`, not the list [a]"),
        ("seed: 1\nppo:\n  a: 1\n  b: 1\n  a: 2\n", "run.yaml:5: ppo.a is given twice, first in line 3; remove one"),
        ("1: 2\n", "run.yaml:1: a key must be the name of a setting, not 1"),
        ("? [a]\n: 2\n", "run.yaml:1: a key must be the name of a setting; put a text that begins"),
        ("ppo: &a\n  kl: *a\n", "run.yaml:1: ppo.kl contains itself"),
        (ALIASES, "more than 100,000 values after the expansion of aliases; use at most 100,000"),
        ("seed: " + "[" * 60 + "]" * 60, "run.yaml:1: more than 50 nested sections and lists; use at most 50"),
        ("seed: " + "[" * 5000, "run.yaml: more than 50 nested sections and lists; use at most 50"),
        ("", "run.yaml: run_dir is missing; give text: directory of the run; the same command resumes it (and"),
    ],
)
def test_wrong_file(write, text, message):
    assert message in _error(write(text))


def test_file_that_cannot_be_read(write, tmp_path):
    write("")
    assert _error("none.yaml") == "none.yaml: no such config file"
    assert _error(str(tmp_path)).endswith("this is a directory; give the YAML file in this directory")
    (tmp_path / "binary.yaml").write_bytes(b"a: \xff\xfe")
    assert _error("binary.yaml") == "binary.yaml: not UTF-8 text (byte 3); give a YAML file"
    assert _error("run.yaml/x").startswith("run.yaml/x: the file cannot be read: Not a directory")
