"""The shape of a decoder that is made from settings instead of a checkpoint."""

from jaxrlhf.config import NewModelConfig
from jaxrlhf.data.tokenizers import Tokenizer
from jaxrlhf.models.decoder import DecoderConfig


def new_decoder_config(new: NewModelConfig, tokenizer: Tokenizer) -> DecoderConfig:
    """A Llama of these sizes for the tokenizer's vocabulary, with its end and pad tokens."""
    return DecoderConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=new.hidden_size,
        intermediate_size=new.intermediate_size,
        layers=new.layers,
        heads=new.heads,
        kv_heads=new.kv_heads,
        head_dim=new.hidden_size // new.heads,
        max_positions=new.max_positions,
        tie_embeddings=True,
        initializer_range=new.hidden_size**-0.5,
        stop_tokens=(tokenizer.eos_id,),
        pad_token=tokenizer.pad_id,
    )
