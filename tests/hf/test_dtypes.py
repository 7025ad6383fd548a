"""The dtype of a base where the settings leave it to the checkpoint: that of its tensors."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrlhf.config import ModelConfig, NewModelConfig, RunConfig
from jaxrlhf.hf.classifiers import load_sequence_classifier, save_sequence_classifier
from jaxrlhf.hf.tensor_files import SINGLE
from jaxrlhf.hf.weights import load_pretrained, save_pretrained
from jaxrlhf.models.decoder import Decoder, named_parameters
from jaxrlhf.stages.roles import load_roles
from jaxrlhf.stages.shapes import model_dtype, resolved


def dtypes(base: Decoder) -> set[str]:
    return {leaf.dtype.name for leaf in named_parameters(base).values()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_base_is_in_the_dtype_of_its_tensors(tiny, roles, tmp_path, dtype):
    save_pretrained(tmp_path / "model", tiny, dtype=dtype)
    assert dtypes(load_pretrained(tmp_path / "model")[0]) == {dtype}
    assert dtypes(load_pretrained(tmp_path / "model", dtype="float32")[0]) == {"float32"}, "one that is given stays"
    assert model_dtype(ModelConfig(path=str(tmp_path / "model"))) == dtype, "a plan reads config.json"
    save_sequence_classifier(tmp_path / "reward", tiny, roles.value, dtype=dtype)
    assert dtypes(load_sequence_classifier(tmp_path / "reward")[0]) == {dtype}


def test_most_of_the_numbers_decide_and_not_config_json(tiny, tmp_path):
    """Norms in float32 beside kernels in bfloat16, under a config.json that says float32."""
    save_pretrained(tmp_path, tiny, dtype="bfloat16")
    tensors = load_file(tmp_path / SINGLE)
    mixed = {name: x.astype(np.float32) if "norm" in name else x for name, x in tensors.items()}
    assert len({x.dtype for x in mixed.values()}) == 2
    save_file(mixed, tmp_path / SINGLE)
    document = json.loads((tmp_path / "config.json").read_text()) | {"dtype": "float32", "torch_dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(document))
    assert dtypes(load_pretrained(tmp_path)[0]) == {"bfloat16"}


def test_a_new_model_is_in_float32_and_plans_say_so(tmp_path):
    model = ModelConfig(new=NewModelConfig(hidden_size=32, layers=1, heads=2, kv_heads=1, intermediate_size=32))
    config = RunConfig.model_validate(
        {"run_dir": str(tmp_path), "model": model.model_dump(), "stages": ["sft"], "sft": {"data": {"path": "x"}}}
    )
    assert dtypes(load_roles(config).base) == {"float32"} and resolved(config).model.dtype == "float32"
    half = config.model_copy(update={"model": model.model_copy(update={"dtype": "bfloat16"})})
    assert dtypes(load_roles(half).base) == {jnp.dtype("bfloat16").name}
