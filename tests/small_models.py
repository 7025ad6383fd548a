"""Small random models: made here, or by transformers, which is the reference."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.decoder import Decoder, abstract_decoder, named_parameters, with_parameters

# Llamas that differ in what a decoder can get wrong. Sizes are small; hidden_size is a multiple of the heads,
# which transformers asks for.
LLAMAS = {
    "3 heads, 1 kv": dict(hidden_size=24, num_attention_heads=3, num_key_value_heads=1),
    "5 heads, 5 kv, tied": dict(
        hidden_size=40, num_attention_heads=5, num_key_value_heads=5, tie_word_embeddings=True
    ),
    "6 heads, 2 kv": dict(hidden_size=48, num_attention_heads=6, num_key_value_heads=2, num_hidden_layers=3),
    "wide heads": dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=16),
    "narrow heads, tied": dict(
        hidden_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=6, tie_word_embeddings=True
    ),
    "attention bias": dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, attention_bias=True),
    "mlp bias": dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=4, mlp_bias=True),
    "all biases, high theta": dict(
        hidden_size=30, num_attention_heads=3, num_key_value_heads=3, attention_bias=True, mlp_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
    "low theta, large epsilon": dict(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=1, rms_norm_eps=0.05,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    ),
}  # fmt: skip


CASES = {name: (settings, False) for name, settings in LLAMAS.items()} | {
    "older config.json": (LLAMAS["low theta, large epsilon"], True)
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def llama_case(request):
    """Settings for `make_llama`."""
    settings, older = request.param
    return {**settings, "older": older}


@pytest.fixture(scope="session")
def make_llama():
    """`make_llama(folder, dtype="float32", older=False, shard="1GB", **settings)` saves a random Llama made by
    transformers and returns it. `older` rewrites its config.json as transformers 4 wrote it."""
    torch = pytest.importorskip("torch", reason="torch is the reference")
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()

    def make(folder, dtype="float32", older=False, shard="1GB", **settings):
        settings = dict(vocab_size=61, intermediate_size=44, num_hidden_layers=2, eos_token_id=2) | settings
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            # transformers starts with zero biases, unit norms and small kernels, which hide mistakes.
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.2 * noise)
        model = model.to(getattr(torch, dtype)).eval()
        model.save_pretrained(folder, max_shard_size=shard)
        if older:
            document = json.loads((folder / "config.json").read_text())
            document["rope_theta"] = document.pop("rope_parameters")["rope_theta"]
            document["rope_scaling"] = None
            document["torch_dtype"] = document.pop("dtype")
            (folder / "config.json").write_text(json.dumps(document))
        return model

    return make


@pytest.fixture(scope="session")
def make_model():
    """`make_model(folder, model_type, settings, head="CausalLM")` saves a random small model made by transformers,
    whose weights hide no mistake, and returns it."""
    torch = pytest.importorskip("torch", reason="torch is the reference")
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()

    def make(folder, model_type, settings, head="CausalLM", **more):
        settings = {key: dict(value) if isinstance(value, dict) else value for key, value in settings.items()}
        small = dict(vocab_size=61, intermediate_size=44, num_hidden_layers=2, eos_token_id=2, bos_token_id=1)
        if model_type == "gpt2":
            small = dict(vocab_size=61, n_layer=2, n_positions=64, eos_token_id=2, bos_token_id=1)
        config = transformers.AutoConfig.for_model(model_type, **small | dict(pad_token_id=0) | settings | more)
        model = getattr(transformers, f"AutoModelFor{head}").from_config(config, attn_implementation="eager")
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                norm = "norm" in name or ".ln_" in name
                scale = 0.3 if norm else 0.2
                around = 1 if norm and "bias" not in name and not model_type.startswith("gemma") else 0
                parameter.copy_(around + scale * noise)
        model.eval().save_pretrained(folder)
        return model

    return make


@pytest.fixture(scope="session")
def torch_logits():
    """Logits of a transformers model as float32 numpy, positions counted as ours are."""
    torch = pytest.importorskip("torch", reason="torch is the reference")

    def logits(model, tokens, mask):
        real = torch.tensor(np.asarray(mask), dtype=torch.long)
        positions = (real.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            ids = torch.tensor(np.asarray(tokens), dtype=torch.long)
            out = model(input_ids=ids, attention_mask=real, position_ids=positions)
        return out.logits.float().numpy()

    return logits


@pytest.fixture(scope="session")
def small():
    """A random decoder with biases, an lm_head and grouped queries, whose weights hide no mistake."""
    return random_decoder(SMALL)


@pytest.fixture(scope="session")
def forward():
    """The jitted model: (model, tokens, mask) -> logits f32[B,T,V], in numpy, whose indexing compiles nothing."""
    run = jax.jit(Decoder.__call__)
    return lambda model, tokens, mask: np.asarray(run(model, tokens, mask))


SMALL = DecoderConfig(
    vocab_size=31, hidden_size=24, intermediate_size=20, layers=2, heads=3, kv_heads=1, head_dim=8, max_positions=64,
    qkv_bias=True, output_bias=True, mlp_bias=True, bos_token=1, stop_tokens=(2, 3), pad_token=0,
)  # fmt: skip


def random_decoder(config, seed=11, scale=0.2):
    """A decoder whose every leaf is drawn by numpy; norms around 1, biases not zero."""
    generator = np.random.default_rng(seed)
    abstract, values = abstract_decoder(config), {}
    for name, leaf in named_parameters(abstract).items():
        noise = scale * generator.standard_normal(leaf.shape)
        values[name] = jnp.asarray(1 + noise if "norm" in name else noise, leaf.dtype)
    return with_parameters(abstract, values)


@pytest.fixture(scope="session")
def batch():
    """Left-padded tokens i32[3,9] below 31 and their mask: 9, 6 and 2 real tokens."""
    tokens = np.random.default_rng(5).integers(0, 31, (3, 9)).astype(np.int32)
    return tokens, np.arange(9)[None] >= np.array([0, 3, 7])[:, None]


# Choices with prefixes of each other and forced tokens; 4 is the stop token.
ANSWERS = ((5, 4), (5, 6, 4), (7, 3, 4), (7, 8, 4), (7, 8, 6, 4), (10, 4))
