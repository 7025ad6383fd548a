"""Tiny hub folders, each written once, as a run finds them."""

import functools
import json
from types import SimpleNamespace

import pytest

pytest.importorskip("torch", reason="transformers' models are the reference")

import tokenizers
import transformers
from hub_folders import FOLDERS, make

from jaxrlhf.config import RunConfig
from jaxrlhf.stages.roles import load_roles


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """`hub(name, layers=None)` writes a folder and loads it. Holds `path`; `about`, the row of FOLDERS; `base`,
    `tokenizer` and `stops` (the token ids that end answers) as runs have them; `file`, `tokenizers.Tokenizer` of its
    tokenizer.json; `theirs`, transformers' own tokenizer."""

    @functools.cache
    def opened(name, layers=None):
        path = make(name, tmp_path_factory.mktemp("hub") / name, layers=layers)
        model, data = {"path": str(path), "dtype": "float32"}, {"path": "builtin:assistant-demonstrations"}
        settings = {"run_dir": str(path.parent / "run"), "stages": ["sft"], "model": model, "sft": {"data": data}}
        roles = load_roles(RunConfig.model_validate(settings))
        file = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        return SimpleNamespace(
            name=name, path=path, file=file, base=roles.base, tokenizer=roles.tokenizer, about=FOLDERS[name],
            stops={*roles.base.config.stop_tokens},
            theirs=transformers.AutoTokenizer.from_pretrained(str(path)),
        )  # fmt: skip

    return opened


@pytest.fixture(params=FOLDERS)
def folder(hub, request):
    return hub(request.param)


@pytest.fixture(params=[name for name, about in FOLDERS.items() if about.template is not None])
def chatting(hub, request):
    """A folder with a chat template."""
    return hub(request.param)


@pytest.fixture
def rows(tmp_path):
    """`rows(name, items)`: the path of a JSON Lines file with these rows."""

    def write(name, items):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(item) + "\n" for item in items))
        return str(path)

    return write
