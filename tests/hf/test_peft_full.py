"""What PEFT keeps beside plain pairs, read and written again; PEFT is the reference."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.errors import UserError
from jaxrlhf.hf.adapter_files import load_adapter, save_adapter
from jaxrlhf.hf.peft import PEFT_INFO, save_peft
from jaxrlhf.hf.weights import load_pretrained, save_pretrained
from jaxrlhf.models.adapters import HEAD, as_kind, bare, bind, merge

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BOTH = ["embed_tokens", "lm_head"]
GROUPED = dict(hidden_size=24, num_attention_heads=6, num_key_value_heads=2)
BASES = {
    "llama": ("llama", GROUPED),
    "tied": ("llama", GROUPED | dict(tie_word_embeddings=True)),
    "gpt2": ("gpt2", dict(n_embd=24, n_head=3, n_inner=31)),
    "gpt_neox": ("gpt_neox", dict(hidden_size=24, num_attention_heads=3)),
}
# name: (base, LoraConfig, what save_pretrained gets, modules with whole weights or None: some in every block)
CASES = {
    "saved beside the pairs": ("llama", dict(target_modules=ALL), dict(save_embedding_layers=True), set()),
    "saved beside the pairs, tied": ("tied", dict(target_modules=ALL), dict(save_embedding_layers=True), set()),
    "trained": ("llama", dict(target_modules=ALL, modules_to_save=BOTH), {}, set(BOTH)),
    "trained embedding": ("llama", dict(target_modules=ALL, modules_to_save=BOTH[:1]), {}, set(BOTH[:1])),
    "trained, tied": ("tied", dict(target_modules=ALL, modules_to_save=BOTH), {}, set(BOTH)),
    "trained embedding, tied": ("tied", dict(target_modules=ALL, modules_to_save=BOTH[:1]), {}, set(BOTH)),
    "trained head, tied": ("tied", dict(target_modules=ALL, modules_to_save=BOTH[1:]), {}, {HEAD}),
    "trained as one": (
        "tied", dict(target_modules=ALL, modules_to_save=BOTH[:1], ensure_weight_tying=True), {}, set(BOTH[:1])
    ),
    "trained, GPT-2": ("gpt2", dict(target_modules=["c_attn"], modules_to_save=["wte"]), {}, set(BOTH)),
    "trained, GPT-NeoX": (
        "gpt_neox", dict(target_modules=["query_key_value"], modules_to_save=["embed_in", "lm_head"]), {}, set(BOTH)
    ),
    "pair on the head": ("llama", dict(target_modules=[*ALL, HEAD]), {}, set()),
    "pair on the head, tied": ("tied", dict(target_modules=[*ALL, HEAD]), {}, set()),
    "pair on the embedding": ("llama", dict(target_modules=["q_proj", "embed_tokens"]), {}, {"embed_tokens"}),
    "pair on the embedding, tied": ("tied", dict(target_modules=["embed_tokens"]), {}, set(BOTH)),
    "pairs on both, tied": ("tied", dict(target_modules=["q_proj", *BOTH]), {}, {"embed_tokens"}),
    "norms": ("llama", dict(target_modules=ALL, modules_to_save=["model.norm"]), {}, {"final_norm"}),
    "DoRA": ("llama", dict(target_modules=ALL, use_dora=True), {}, None),
    "DoRA, GPT-2": ("gpt2", dict(target_modules=["c_attn", "c_fc"], use_dora=True, use_rslora=True), {}, None),
    "DoRA, GPT-NeoX": ("gpt_neox", dict(target_modules=["query_key_value"], use_dora=True), {}, None),
    "DoRA on the head": ("tied", dict(target_modules=["v_proj", HEAD], use_dora=True), {}, None),
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(make_model, tmp_path_factory):
    """`bases(name)`: a folder and what we read of it, each made once."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            make_model(folder, *BASES[name])
            made[name] = folder, load_pretrained(folder)[0]
        return made[name]

    return get


@pytest.fixture(scope="session")
def text():
    mask = np.arange(9)[None] >= np.array([0, 3, 7])[:, None]
    return np.random.default_rng(1).integers(3, 61, (3, 9)).astype(np.int32), mask


def opened(folder):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


def wrapped(folder, **settings):
    """A PEFT model whose every trained number is random."""
    peft, torch = pytest.importorskip("peft", reason="PEFT is the reference"), pytest.importorskip("torch")
    model = peft.get_peft_model(opened(folder), peft.LoraConfig(r=3, task_type="CAUSAL_LM", **settings)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = 0.2 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise if "lora_A" in name or "lora_B" in name or "embedding_" in name else
                                parameter + noise)
    return model


@pytest.mark.parametrize("base, settings, save, whole", CASES.values(), ids=CASES.keys())
def test_what_peft_saves_computes_the_same_here_and_back_there(
    bases, text, forward, torch_logits, tmp_path, base, settings, save, whole
):
    import peft

    folder, ours = bases(base)
    theirs = wrapped(folder, **settings)
    theirs.save_pretrained(tmp_path / "theirs", **save)
    expected = torch_logits(theirs, *text)[text[1]]
    assert np.abs(expected - forward(ours, *text)[text[1]]).max() > 0.1
    adapter = load_adapter(tmp_path / "theirs", ours)
    if whole is not None:
        assert {path for path, leaves in adapter.items() if "lora_a" not in leaves} == whole
    merged = merge(ours, adapter)
    for model in (bind(ours, adapter), merged, bind(ours, as_kind(ours, adapter, "full"))):
        np.testing.assert_allclose(forward(model, *text)[text[1]], expected, atol=1e-4)
    np.testing.assert_allclose(
        forward(bind(ours, bare(ours, adapter)), *text)[text[1]], forward(ours, *text)[text[1]], atol=1e-5
    )
    # Our own format, a merged folder that transformers opens, and PEFT's.
    save_adapter(tmp_path / "ours", adapter)
    assert jax.tree.all(jax.tree.map(np.array_equal, load_adapter(tmp_path / "ours", ours), adapter))
    save_pretrained(tmp_path / "merged", ours, adapter)
    np.testing.assert_allclose(torch_logits(opened(tmp_path / "merged").eval(), *text)[text[1]], expected, atol=1e-4)
    if whole is None or "final_norm" in adapter or not any("lora_a" in leaves for leaves in adapter.values()):
        with pytest.raises(UserError, match=r"full weights|no LoRA pair"):
            save_peft(tmp_path / "back", ours, adapter, str(folder))
        return
    save_peft(tmp_path / "back", ours, adapter, str(folder))
    back = peft.PeftModel.from_pretrained(opened(folder), tmp_path / "back").eval()
    np.testing.assert_allclose(torch_logits(back, *text)[text[1]], expected, atol=1e-4)
    names = json.loads((tmp_path / "back" / PEFT_INFO).read_text())["modules_to_save"]
    assert bool(names) == bool(whole)


def test_saved_embeddings_that_are_rounded_equal_a_rounded_base(bases, tmp_path):
    folder, _ = bases("llama")
    theirs = wrapped(folder, target_modules=ALL)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    half, _ = load_pretrained(folder, dtype="bfloat16")
    assert not {"embed_tokens", HEAD} & set(load_adapter(tmp_path, half))


def test_the_head_of_gpt_neox_under_its_older_name(bases, tmp_path):
    from safetensors.numpy import load_file, save_file

    folder, ours = bases("gpt_neox")
    settings = dict(target_modules=["query_key_value"], modules_to_save=["embed_in", "lm_head"])
    wrapped(folder, **settings).save_pretrained(tmp_path)
    adapter = load_adapter(tmp_path, ours)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name.replace("lm_head", "embed_out"): t for name, t in load_file(file).items()}, file)
    config = (tmp_path / PEFT_INFO).read_text()
    assert "lm_head" in config
    (tmp_path / PEFT_INFO).write_text(config.replace("lm_head", "embed_out"))
    assert jax.tree.all(jax.tree.map(np.array_equal, load_adapter(tmp_path, ours), adapter))


def test_dora_is_said_and_has_no_codes(bases, tmp_path, capsys):
    folder, ours = bases("llama")
    wrapped(folder, target_modules=["q_proj"], use_dora=True).save_pretrained(tmp_path)
    adapter = load_adapter(tmp_path, ours)
    assert "2 modules are merged into full weights" in capsys.readouterr().err
    assert set(adapter) == {f"layers.{i}.attention.q_proj" for i in (0, 1)}
    coded, _ = load_pretrained(folder, quantize="int8")
    with pytest.raises(UserError, match=r"use_dora.*int8"):
        load_adapter(tmp_path, coded)


def test_gradients_reach_the_heads_pair(bases, text, tmp_path):
    folder, ours = bases("tied")
    wrapped(folder, target_modules=["q_proj", HEAD]).save_pretrained(tmp_path)
    adapter = load_adapter(tmp_path, ours)

    def loss(adapter):
        return jnp.square(bind(ours, adapter)(*map(jnp.asarray, text))).mean()

    gradient = jax.jit(jax.grad(loss))(adapter)[HEAD]
    assert all(np.abs(gradient[name]).max() > 0 for name in ("lora_a", "lora_b")) and not gradient["lora_scale"].any()
