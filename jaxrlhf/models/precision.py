"""XLA compiler options by the dtype of the base."""

from jaxrlhf.models.decoder import Decoder, named_parameters


def compiler_options(base: Decoder) -> dict[str, bool]:
    """Options for `jax.jit(..., compiler_options=...)` of programs that run this base, given as arrays or as shapes.

    In bfloat16 and float16, XLA may keep float32 between the operations that it fuses, and each program fuses others.
    The same tokens would then get other logprobs in scoring than in an update, and the first ratio would not be 1.
    The option makes each operation round as the program says. A float32 base needs none. Quantised layers compute in
    the dtype of the base's other weights.
    """
    exact = named_parameters(base)["embed_tokens/embedding"].dtype == "float32"
    return {} if exact else {"xla_allow_excess_precision": False}
