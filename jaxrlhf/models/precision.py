"""XLA's options by the dtype in which a base computes."""

from jaxrlhf.models.decoder import Decoder, named_parameters


def compiler_options(base: Decoder) -> dict[str, bool]:
    """What programs of this base, arrays or shapes, are compiled with: for `jax.jit(..., compiler_options=...)`.

    In bfloat16 and float16 XLA may keep float32 between operations that it fuses, and another program fuses others: the
    same function of the same numbers then gives other logprobs in an update than in scoring, and the ratio of a
    policy to itself is not 1. Without that freedom each operation rounds where the program says so. A float32 base
    needs no option. Quantised layers compute in the dtype of the base's other weights.
    """
    exact = named_parameters(base)["embed_tokens/embedding"].dtype == "float32"
    return {} if exact else {"xla_allow_excess_precision": False}
