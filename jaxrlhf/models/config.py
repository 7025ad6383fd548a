"""The decoder's config: sizes, constants, and the settings that may differ between layers.

The names of settings are the same for all model families.
"""

import dataclasses

from jaxrlhf.config import NewModelConfig
from jaxrlhf.models.rope import Rope
from jaxrlhf.models.target import ON_CPU, Target


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """The settings that may differ between layers."""

    window: int | None = None  # number of tokens that a query sees, including its own token; None means no limit
    rope: Rope | None = dataclasses.field(default_factory=Rope)  # None means no rotary positions


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The sizes and constants of a decoder. `hf/families.py` reads them from a `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    layer_kinds: tuple[LayerKind, ...] = (LayerKind(),)  # layer i has layer_kinds[i % len(layer_kinds)]
    norm: str = "rms"  # a key of norms.NORMS
    norm_eps: float = 1e-6
    pre_norms: bool = True  # norms before attention and MLP
    post_norms: bool = False  # norms after attention and MLP, before the residual sum
    qk_norm: str | None = None  # norm on queries and keys: of each head ("head"), or of all heads ("projection")
    parallel_residual: bool = False  # attention and MLP read the same input
    learned_positions: bool = False
    activation: str = "silu"  # a key of activations.ACTIVATIONS
    gated_mlp: bool = True
    qkv_bias: bool = False
    output_bias: bool = False  # bias of attention's output projection
    mlp_bias: bool = False
    tie_embeddings: bool = False
    embedding_scale: float = 1.0
    query_scalar: int | None = None  # attention scores are divided by its square root; None means head_dim
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    initializer_range: float = 0.02
    target: Target = ON_CPU  # the device that the model's programs are for; not saved with the model
    family: str = "llama"
    bos_token: int | None = None
    stop_tokens: tuple[int, ...] = ()
    pad_token: int | None = None

    def layer_kind(self, layer: int) -> LayerKind:
        return self.layer_kinds[layer % len(self.layer_kinds)]


def new_decoder_config(new: NewModelConfig, vocab_size: int, eos: int, pad: int) -> DecoderConfig:
    """Returns the config of a new Llama model. `new` sets the layer sizes."""
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=new.hidden_size,
        intermediate_size=new.intermediate_size,
        layers=new.layers,
        heads=new.heads,
        kv_heads=new.kv_heads,
        head_dim=new.hidden_size // new.heads,
        max_positions=new.max_positions,
        tie_embeddings=True,
        initializer_range=new.hidden_size**-0.5,
        stop_tokens=(eos,),
        pad_token=pad,
    )
