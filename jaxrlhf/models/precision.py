"""The XLA compiler options for the dtype of the base."""

from jaxrlhf.models.decoder import Decoder, named_parameters


def compiler_options(base: Decoder) -> dict[str, bool]:
    """Returns the `compiler_options` of `jax.jit` for programs that run this base. The base holds arrays or shapes.

    If the dtype is bfloat16 or float16, XLA may keep float32 values between the operations that it fuses. Each program
    fuses different operations. Without the option, scoring and update would compute different logprobs of the same
    tokens, and the first importance ratio would not be 1. The option makes every operation round to its own dtype. A
    float32 base needs no option. Quantised layers compute in the dtype of the base's other weights.
    """
    exact = named_parameters(base)["embed_tokens/embedding"].dtype == "float32"
    return {} if exact else {"xla_allow_excess_precision": False}
