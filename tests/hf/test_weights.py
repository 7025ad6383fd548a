import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrlhf.config import AdapterConfig
from jaxrlhf.data.tokenizers import build_word_tokenizer
from jaxrlhf.errors import UserError
from jaxrlhf.hf.adapter_files import load_adapter, save_adapter
from jaxrlhf.hf.families import address_of
from jaxrlhf.hf.folders import HUB_FILES, MARK
from jaxrlhf.hf.tensor_files import INDEX, SINGLE, read_checkpoint
from jaxrlhf.hf.weights import load_pretrained, save_pretrained
from jaxrlhf.models.adapters import SCORE, bind, init_adapter, merge
from jaxrlhf.models.decoder import named_parameters

BIASED = dict(hidden_size=24, num_attention_heads=3, num_key_value_heads=1, attention_bias=True, mlp_bias=True)
TIED = dict(hidden_size=40, num_attention_heads=5, num_key_value_heads=5, tie_word_embeddings=True)


def stored_bytes(folder):
    """Name -> (dtype, shape, bytes) of all tensors of a folder."""
    tensors = read_checkpoint(Path(folder))
    return {name: (tensor.dtype, tensor.shape, tensor.view().tobytes()) for name, tensor in tensors.items()}


def same_arrays(one, other):
    one, other = named_parameters(one), named_parameters(other)
    assert set(one) == set(other)
    return all(
        leaf.dtype == other[name].dtype and np.asarray(leaf).tobytes() == np.asarray(other[name]).tobytes()
        for name, leaf in one.items()
    )


@pytest.fixture
def folder(small, tmp_path):
    """The small decoder, saved by us."""
    save_pretrained(tmp_path / "model", small)
    return tmp_path / "model"


@pytest.fixture(scope="module")
def lora(small):
    """A LoRA adapter that changes the base, with a reward head."""
    adapter = init_adapter(small, AdapterConfig(rank=2), jax.random.key(0), head="reward")
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf) + 0.05), adapter)


# ---------------------------------------------------------------- to and from transformers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("settings", [BIASED, TIED], ids=["biased", "tied"])
def test_there_and_back_is_bit_identical(make_llama, torch_logits, tmp_path, dtype, settings):
    transformers = pytest.importorskip("transformers")
    make_llama(tmp_path / "theirs", dtype=dtype, **settings)
    ours, _ = load_pretrained(tmp_path / "theirs", dtype=dtype)
    assert all(leaf.dtype == dtype for leaf in named_parameters(ours).values())
    save_pretrained(tmp_path / "ours", ours)
    assert stored_bytes(tmp_path / "ours") == stored_bytes(tmp_path / "theirs")
    again, _ = load_pretrained(tmp_path / "ours", dtype=dtype)
    assert again.config == ours.config and same_arrays(again, ours)
    # transformers opens our folder as it opens its own, in the stored dtype, and computes the same.
    opened, theirs = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("ours", "theirs"))
    assert opened.dtype == theirs.dtype and type(opened) is type(theirs)
    assert str(opened.dtype) == f"torch.{dtype}" and opened.generation_config.eos_token_id == 2
    tokens, mask = np.random.default_rng(0).integers(0, 61, (2, 7)), np.ones((2, 7))
    np.testing.assert_array_equal(torch_logits(opened, tokens, mask), torch_logits(theirs, tokens, mask))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_checkpoints_compute_in_float32(make_llama, torch_logits, forward, tmp_path, dtype):
    make_llama(tmp_path, dtype=dtype, **BIASED)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype="float32")
    ours, _ = load_pretrained(tmp_path, dtype="float32")
    tokens, mask = np.random.default_rng(0).integers(0, 61, (2, 7)), np.arange(7)[None] >= np.array([[0], [3]])
    expected = torch_logits(theirs, tokens, mask)[mask]
    np.testing.assert_allclose(forward(ours, tokens, mask)[mask], expected, atol=1e-4)


def test_shards_in_and_out(make_llama, torch_logits, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = make_llama(tmp_path / "theirs", shard="8KB", **BIASED)
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 2
    ours, _ = load_pretrained(tmp_path / "theirs")
    save_pretrained(tmp_path / "ours", ours, max_shard_bytes=10_000)
    shards = list((tmp_path / "ours").glob("*.safetensors"))
    assert len(shards) > 2 and all(shard.stat().st_size < 12_000 for shard in shards)
    assert stored_bytes(tmp_path / "ours") == stored_bytes(tmp_path / "theirs")
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    tokens = np.arange(14).reshape(2, 7)
    np.testing.assert_array_equal(
        torch_logits(opened, tokens, np.ones((2, 7))), torch_logits(theirs, tokens, np.ones((2, 7)))
    )


def test_an_exported_adapter_computes_what_it_did_bound(small, lora, batch, torch_logits, forward, tmp_path):
    transformers = pytest.importorskip("transformers")
    save_pretrained(tmp_path / "merged", small, lora)
    tokens, mask = batch
    bound = forward(bind(small, lora), tokens, mask)[mask]
    assert np.abs(bound - forward(small, tokens, mask)[mask]).max() > 0.1
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(torch_logits(opened, tokens, mask)[mask], bound, atol=1e-4)
    reloaded, _ = load_pretrained(tmp_path / "merged")
    assert same_arrays(reloaded, merge(small, lora))


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_each_tensor_lands_where_the_table_says_in_the_dtype_asked_for(small, folder, dtype):
    loaded, tokenizer = load_pretrained(folder, dtype=dtype)
    assert tokenizer is None
    stored = load_file(folder / SINGLE)
    for name, leaf in named_parameters(loaded).items():
        theirs, transposed = address_of(small.config, name).tensor, address_of(small.config, name).transposed
        value = stored[theirs].T if transposed else stored[theirs]
        assert leaf.dtype == dtype
        assert np.asarray(leaf).tobytes() == value.astype(leaf.dtype).tobytes()


def test_weights_do_not_hang_on_the_file(small, folder):
    loaded, _ = load_pretrained(folder)
    file = folder / SINGLE
    with file.open("r+b") as stream:  # in place, as the map would see it
        stream.write(b"\0" * file.stat().st_size)
    assert same_arrays(loaded, small)


def test_an_older_checkpoint_with_constants_and_copies_loads(make_llama, tmp_path):
    make_llama(tmp_path, older=True, **TIED)
    plain, _ = load_pretrained(tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(tensors, tmp_path / SINGLE)
    assert same_arrays(load_pretrained(tmp_path)[0], plain)


ON_A_MESH = """
import sys
import jax, numpy as np
from jaxrlhf.config import MeshConfig
from jaxrlhf.models.decoder import Decoder, named_parameters
from jaxrlhf.hf.weights import load_pretrained, save_pretrained
from jaxrlhf.distributed.mesh import make_mesh
from jaxrlhf.models.sharding import parameter_sharding
mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
model, _ = load_pretrained(sys.argv[1], mesh=mesh)
split = 0
for name, leaf in named_parameters(model).items():
    assert leaf.sharding == parameter_sharding(mesh, name, leaf.shape), name
    split += leaf.addressable_shards[0].data.size < leaf.size
assert split > 10, split
given = np.load(sys.argv[3])
logits = jax.jit(Decoder.__call__)(model, given["tokens"], given["mask"])
np.testing.assert_allclose(logits, given["logits"], atol=1e-5)
save_pretrained(sys.argv[2], model)
"""


def test_onto_a_mesh_and_back(small, batch, forward, folder, processes, tmp_path):
    np.savez(tmp_path / "expected.npz", tokens=batch[0], mask=batch[1], logits=forward(small, *batch))
    processes.run("-c", ON_A_MESH, folder, tmp_path / "again", tmp_path / "expected.npz", devices=4)
    assert stored_bytes(tmp_path / "again") == stored_bytes(folder)


# ---------------------------------------------------------------- tokenizer, stop and pad tokens


@pytest.mark.parametrize(
    "config, generation, tokenizer, stops, pad",
    [
        ({"eos_token_id": 4}, None, False, (4,), 4),
        ({"eos_token_id": [4, 5]}, {}, False, (4, 5), 4),
        ({"eos_token_id": 4, "pad_token_id": 9}, {"eos_token_id": [7, 8]}, False, (7, 8, 4), 9),
        ({"eos_token_id": 4, "pad_token_id": 9}, {"eos_token_id": 7, "pad_token_id": 6}, True, (7, 4, 2), 6),
        ({"eos_token_id": 4, "pad_token_id": None}, {"eos_token_id": None}, True, (4, 2), 0),
        ({"eos_token_id": 4, "pad_token_id": -1}, None, False, (4,), 4),
        ({"eos_token_id": 4, "pad_token_id": 31}, None, False, (4,), 4),
        ({"eos_token_id": None, "pad_token_id": None}, None, False, (), 0),
        ({"eos_token_id": None, "pad_token_id": None}, None, True, (2,), 0),
    ],
)
def test_where_stop_and_pad_tokens_come_from(folder, config, generation, tokenizer, stops, pad):
    file = folder / "config.json"
    document = json.loads(file.read_text()) | {"pad_token_id": None} | config
    file.write_text(json.dumps(document))
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    if tokenizer:
        build_word_tokenizer([f"w{i}" for i in range(27)]).save(str(folder))
    loaded, found = load_pretrained(folder)
    assert (found is not None) == tokenizer
    assert (loaded.config.stop_tokens, loaded.config.pad_token) == (stops, pad)


def test_the_tokenizer_travels_with_the_model(small, tmp_path):
    tokenizer = build_word_tokenizer(["blue", "sky"])
    save_pretrained(tmp_path / "model", small, tokenizer=tokenizer)
    loaded, found = load_pretrained(tmp_path / "model")
    assert found.encode_prompt("sky blue") == tokenizer.encode_prompt("sky blue")
    assert loaded.config == small.config


# ---------------------------------------------------------------- what cannot be used


def refused(call, *words):
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def edit(change):
    """A mutation of the folder that rewrites its tensors."""

    def apply(folder):
        tensors = load_file(folder / SINGLE)
        change(tensors)
        save_file(tensors, folder / SINGLE, metadata={"format": "pt"})

    return apply


GENERATION = "generation_config.json"
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    "spoil, words",
    [
        (edit(lambda t: t.pop(Q)), [f"tensor {Q} is missing", "config.json"]),
        (edit(lambda t: t.update({Q: t[Q][:8]})), [SINGLE, f"tensor {Q}", "[8, 24]", "[24, 24]"]),
        (edit(lambda t: t.update({Q: t[Q].astype(np.int32)})), [SINGLE, f"tensor {Q}", "I32"]),
        (lambda f: os.truncate(f / SINGLE, (f / SINGLE).stat().st_size - 1), [SINGLE, "tensor", "truncated"]),
        (lambda f: (f / SINGLE).unlink(), ["no weights"]),
        (lambda f: (f / SINGLE).rename(f / "pytorch_model.bin"), ["pytorch_model.bin", "pickle", "safetensors"]),
        (lambda f: (f / "config.json").unlink(), ["no config.json"]),
        (lambda f: (f / "config.json").write_text("{"), ["config.json", "JSON"]),
        (lambda f: (f / "config.json").write_text('{"model_type": "bert"}'), ["config.json", "'bert'", "llama"]),
        (lambda f: (f / GENERATION).write_text('{"eos_token_id": "x"}'), [GENERATION, "eos_token_id", "'x'"]),
        (lambda f: (f / GENERATION).write_text('{"eos_token_id": 31}'), ["31", "vocabulary of 31"]),
    ],
)
def test_a_spoiled_folder_is_named_in_one_line(folder, spoil, words):
    spoil(folder)
    refused(lambda: load_pretrained(folder), str(folder), *words)


def test_an_index_that_names_an_absent_shard(small, tmp_path):
    save_pretrained(tmp_path / "model", small, max_shard_bytes=10_000)
    gone = sorted((tmp_path / "model").glob("*.safetensors"))[1]
    gone.unlink()
    refused(lambda: load_pretrained(tmp_path / "model"), INDEX, gone.name, "not in the folder")


def test_nothing_is_built_before_everything_is_checked(folder, monkeypatch):
    edit(lambda t: t.pop("model.norm.weight"))(folder)
    monkeypatch.setattr("jaxrlhf.hf.decoder_tensors.load_parameter", lambda *_: pytest.fail("a tensor was read"))
    refused(lambda: load_pretrained(folder), "model.norm.weight")


def test_float16_that_overflows_and_unknown_dtypes(folder):
    edit(lambda t: t[Q].__setitem__((0, 0), 70000.0))(folder)
    refused(lambda: load_pretrained(folder, dtype="float16"), Q, "float16", "bfloat16")
    refused(lambda: load_pretrained(folder, dtype="int8"), "dtype", "'int8'", "bfloat16")


def test_no_folder_and_no_hub(tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    refused(lambda: load_pretrained(tmp_path / "none"), str(tmp_path / "none"), "no such folder")
    refused(lambda: load_pretrained("./none"), "./none: no such folder")
    refused(lambda: load_pretrained(Path(__file__)), "no such folder")

    def unreachable(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nand more about it")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    refused(lambda: load_pretrained("owner/name"), "owner/name: no such folder", "hub cannot provide it: no connection")


def test_a_hub_id_fetches_no_pickles_and_no_code(folder, small, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    files = ["config.json", "model-1.safetensors", "tokenizer.json", "pytorch_model.bin", "modeling_x.py",
             "original/params.json", "onnx/model.safetensors", "chat_template.jinja"]  # fmt: skip

    def download(name, allow_patterns, ignore_patterns):
        assert name == "owner/name" and allow_patterns == HUB_FILES
        patterns = dict(allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        wanted = list(huggingface_hub.utils.filter_repo_objects(files, **patterns))
        assert wanted == ["config.json", "model-1.safetensors", "tokenizer.json", "chat_template.jinja"]
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert same_arrays(load_pretrained("owner/name")[0], small)


def test_saving_replaces_a_model_and_nothing_else(small, folder, tmp_path):
    changed = dataclasses.replace(small.config, pad_token=5)
    other = jax.tree.map(lambda leaf: leaf, small)
    other.config = changed
    save_pretrained(folder, other)
    assert load_pretrained(folder)[0].config == changed
    (folder / "README.md").write_text("notes")
    before = stored_bytes(folder)
    refused(lambda: save_pretrained(folder, small), str(folder), "README.md", "empty folder")
    refused(lambda: save_adapter(folder, {}), str(folder), "empty folder")
    foreign = tmp_path / "foreign"  # a model that somebody else wrote, with files of a model's endings beside it
    shutil.copytree(folder, foreign, ignore=shutil.ignore_patterns("README.md", MARK))
    (foreign / "precious.json").write_text("[]")
    refused(lambda: save_pretrained(foreign, small), str(foreign), "writing would delete")
    shutil.rmtree(foreign)
    assert stored_bytes(folder) == before and (folder / "README.md").read_text() == "notes"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.json").write_text("[]")
    refused(lambda: save_pretrained(tmp_path / "data", small), "rows.json")
    (tmp_path / "empty").mkdir()
    save_pretrained(tmp_path / "empty", small)
    refused(lambda: save_adapter(tmp_path / "empty", {}), "empty folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "empty", "model"]  # nothing temporary is left


# ---------------------------------------------------------------- adapters


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("head", [False, True], ids=["plain", "head"])
def test_an_adapter_comes_back_as_it_was(small, lora, tmp_path, kind, head):
    if kind == "full":
        adapter = init_adapter(small, AdapterConfig(kind="full"), jax.random.key(0))
        adapter |= {SCORE: lora[SCORE]} if head else {}
    else:
        adapter = {path: leaves for path, leaves in lora.items() if head or path != SCORE}
    save_adapter(tmp_path / "adapter", adapter)
    loaded = load_adapter(tmp_path / "adapter", small)
    assert jax.tree.structure(loaded) == jax.tree.structure(adapter)
    for ours, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(adapter)):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        np.testing.assert_array_equal(ours, theirs)
    info = json.loads((tmp_path / "adapter" / "adapter.json").read_text())
    assert (info["kind"], info["rank"], info["head"]) == (kind, 2 if kind == "lora" else None, head)


def test_a_heads_bias_comes_back_and_one_without_is_of_bias_0(small, lora, tmp_path):
    value = {"score": {"kernel": lora["score"]["kernel"], "bias": jnp.float32([0.25])}}
    save_adapter(tmp_path / "value", lora | value)
    save_adapter(tmp_path / "old", lora | {"score": {"kernel": lora["score"]["kernel"]}})
    hidden = jnp.ones((1, 3, 24))
    scores = [bind(small, load_adapter(tmp_path / name, small)).scores(hidden) for name in ("value", "old")]
    np.testing.assert_allclose(scores[0], scores[1] + 0.25, rtol=1e-6)


def edit_adapter(change):
    def apply(folder):
        tensors = load_file(folder / "adapter.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter.safetensors")

    return apply


A = "layers.0.attention.q_proj/lora_a"
B = "layers.0.attention.q_proj/lora_b"


@pytest.mark.parametrize(
    "spoil, words",
    [
        (edit_adapter(lambda t: t.pop(B)), ["q_proj", "LoRA pair"]),
        (edit_adapter(lambda t: t.update({A: t[A][:20]})), [f"tensor {A}", "[20, 2]", "[24, 2]"]),
        (edit_adapter(lambda t: t.update({B: t[B][:1]})), [f"tensor {B}", "[1, 24]", "[2, 24]"]),
        (edit_adapter(lambda t: t.update({A: t[A][0]})), [f"tensor {A}"]),
        (edit_adapter(lambda t: t.update({"layers.0.attention.r_proj/kernel": t[A]})), ["r_proj", "another model"]),
        (edit_adapter(lambda t: t.update({"stray": t[A]})), ["tensor stray", "another model"]),
        (edit_adapter(lambda t: t.update({"score/kernel": t["score/kernel"][:3]})), ["score/kernel", "[24, 1]"]),
        (edit_adapter(lambda t: t.update({"score/bias": t["score/kernel"]})), ["score/bias", "[24, 1]", "[1]"]),
        (edit_adapter(lambda t: t.update({"score/scale": t["score/kernel"]})), ["score/scale", "another model"]),
        (lambda f: os.truncate(f / "adapter.safetensors", 5000), ["adapter.safetensors", "truncated"]),
        (lambda f: (f / "adapter.safetensors").unlink(), ["adapter.safetensors"]),
        (lambda f: (f / "adapter.json").unlink(), ["no adapter.json"]),
        (lambda f: (f / "adapter.json").write_text('{"format": "other"}'), ["adapter.json", "'other'"]),
        (lambda f: (f / "adapter.json").rename(f / "adapter_config.json"), ["adapter_config.json", "peft_type"]),
    ],
)
def test_a_spoiled_adapter_is_named_in_one_line(small, lora, tmp_path, spoil, words):
    folder = tmp_path / "adapter"
    save_adapter(folder, lora)
    spoil(folder)
    refused(lambda: load_adapter(folder, small), str(folder), *words)


def test_an_adapter_of_another_model_is_refused(small, lora, tmp_path):
    wide = {path: {**leaves, "lora_a": jnp.ones((48, 2))} for path, leaves in lora.items() if "lora_a" in leaves}
    save_adapter(tmp_path / "wide", wide)
    refused(lambda: load_adapter(tmp_path / "wide", small), "[48, 2]", "[24, 2]")
    deep = {"layers.7.mlp.up_proj": lora["layers.0.mlp.up_proj"]}
    save_adapter(tmp_path / "deep", deep)
    refused(lambda: load_adapter(tmp_path / "deep", small), "layers.7.mlp.up_proj", "another model")
    part = init_adapter(small, AdapterConfig(kind="full"), jax.random.key(0))
    del part["final_norm"]
    save_adapter(tmp_path / "part", part)
    refused(lambda: load_adapter(tmp_path / "part", small), "final_norm/scale", "missing")
    refused(lambda: load_adapter(tmp_path / "none", small), "no such folder")
