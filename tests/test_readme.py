"""The README's programmatic page runs as it is printed, and its commands name what is there."""

import re
from pathlib import Path

import jax
import pytest

import jaxrlhf
from jaxrlhf.config.reading import load_config
from jaxrlhf.data.tokenizers import build_word_tokenizer
from jaxrlhf.data.world import VOCABULARY
from jaxrlhf.models.decoder import Decoder, DecoderConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """A working directory where the page's model folder holds a small model of the assistant world."""
    tokenizer = build_word_tokenizer(VOCABULARY)
    config = DecoderConfig(tokenizer.vocab_size, 32, 64, 1, 4, 2, 8, 64, stop_tokens=(tokenizer.eos_id,), pad_token=0)
    base = Decoder(config, jax.random.key(0))
    jaxrlhf.save_pretrained(tmp_path / "runs/quickstart/roles/base", base, tokenizer=tokenizer)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_programmatic_page_runs_as_printed(run_folder, capsys):
    page = re.search(r"<!-- executed by tests/test_readme.py -->\n```python\n(.*?)```", README, re.DOTALL).group(1)
    names = {}
    exec(compile(page, "README.md", "exec"), names)
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert names["advantages"].shape == names["answers"].response_mask.shape
    for path, leaves in names["again"].items():
        for leaf, value in leaves.items():
            assert (value == names["state"].policy[path][leaf]).all(), (path, leaf)
    merged, _ = jaxrlhf.load_pretrained(run_folder / "my-policy")
    prompts = names["prompts"]
    assert abs(merged(prompts.tokens, prompts.mask) - names["logits"]).max() < 1e-4


def test_page_names_the_whole_api():
    page = re.search(r"<!-- executed by tests/test_readme.py -->(.*?)```\n\n", README, re.DOTALL).group(1)
    stable = ["load_pretrained", "init_adapter", "load_adapter", "bind", "rollout", "annotate", "gae", "init_ppo"]
    stable += ["ppo_update", "save_pretrained"]
    assert [name for name in stable if f"jaxrlhf.{name}" not in page] == []


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "configs").glob("*.yaml")))
def test_every_config_is_valid_and_named(name):
    assert load_config(ROOT / "configs" / name).stages
    assert f"configs/{name}" in README
