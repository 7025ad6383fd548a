"""XLA compiler options by the dtype of the base."""

from jaxrlhf.models.decoder import Decoder, named_parameters


def compiler_options(base: Decoder) -> dict[str, bool]:
    """Returns the `compiler_options` of `jax.jit` for programs that run this base; the base may hold arrays or shapes.

    In bfloat16 and float16, XLA may keep float32 values between operations that it fuses, and each program fuses other
    operations. The same tokens would then get different logprobs in scoring and in the update, so the first importance
    ratio would not be 1. The option makes every operation round to its own dtype. A float32 base needs no option.
    Quantised layers compute in the dtype of the base's other weights.
    """
    exact = named_parameters(base)["embed_tokens/embedding"].dtype == "float32"
    return {} if exact else {"xla_allow_excess_precision": False}
