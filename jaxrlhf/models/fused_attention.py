"""cuDNN's fused attention for whole sequences, through `jax.nn.dot_product_attention`; and where it cannot be had.

cuDNN takes float16 and bfloat16, heads of a multiple of 8 up to 128 dimensions (256 from Hopper on), and a mask only as
a bias in that dtype, with even lengths where a gradient follows. It has no soft caps. Rows, heads and nothing else may
be split over devices. Decoding, one query a row, stays with XLA's products.

The bias [B,1,T,S] is read in every layer, and jax 0.10.2 has cuDNN write its gradient too, which nobody wants; 0.12 no
longer does.
"""

import jax
import jax.numpy as jnp

from jaxrlhf.distributed.mesh import BATCH_AXES, constrain
from jaxrlhf.errors import UserError
from jaxrlhf.models.config import DecoderConfig

KEY_PATH = "model.attention"
_HEAD_STEP, _LARGEST_HEAD, _LARGEST_ON_HOPPER = 8, 128, 256


def attend_fused(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array, scale: float | None = None
) -> jax.Array:
    """Grouped-query attention [B,T,N,H] by cuDNN; no query sees a key behind it, the queries being the last T of S.

    A query that sees no key gets finite junk. Where T = S cuDNN skips what stands above the diagonal.
    """
    T, S = mask_BTS.shape[1:]
    odd_T, odd_S = T % 2, S % 2  # a last query that nobody reads and a last key that nobody sees make both even
    q_BTNH = jnp.pad(q_BTNH, ((0, 0), (0, odd_T), (0, 0), (0, 0)))
    k_BSKH, v_BSKH = (jnp.pad(x, ((0, 0), (0, odd_S), (0, 0), (0, 0))) for x in (k_BSKH, v_BSKH))
    mask_B1TS = jnp.pad(mask_BTS, ((0, 0), (0, odd_T), (0, odd_S)))[:, None]
    # All three must lie alike, and whole along length and head.
    q_BTNH, k_BSKH, v_BSKH = (constrain(x, BATCH_AXES, None, "tensor", None) for x in (q_BTNH, k_BSKH, v_BSKH))
    out_BTNH = jax.nn.dot_product_attention(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        mask=constrain(mask_B1TS, BATCH_AXES, None, None, None),
        scale=scale,
        is_causal=T == S,
        implementation="cudnn",
    )
    return out_BTNH[:, :T]


def check_model(model: DecoderConfig, tensor: int) -> None:
    """`UserError` where cuDNN cannot compute such a model's attention, with heads split over so many devices."""
    if model.attention_softcap is not None:
        raise UserError(
            f"{KEY_PATH}: cudnn has no soft cap on attention, and this model has one ({model.attention_softcap:g}); "
            "take xla"
        )
    if model.head_dim % _HEAD_STEP or model.head_dim > _LARGEST_ON_HOPPER:
        raise UserError(
            f"{KEY_PATH}: cudnn takes heads of a multiple of {_HEAD_STEP} and at most {_LARGEST_ON_HOPPER} dimensions, "
            f"and this model's have {model.head_dim}; take xla"
        )
    if model.heads % tensor or model.kv_heads % tensor:
        raise UserError(
            f"{KEY_PATH}: cudnn wants queries, keys and values split alike, and {model.heads} and {model.kv_heads} "
            f"heads cannot both be split over mesh.tensor={tensor}; take xla, or another mesh"
        )


def check_device(model: DecoderConfig, dtype: jax.typing.DTypeLike) -> None:
    """`UserError` where this machine's cuDNN cannot compute such a model's attention: tried, with its gradient."""
    if jnp.dtype(dtype) == jnp.float32:
        raise UserError(f"{KEY_PATH}: cudnn takes no float32, which the base is in; give model.dtype=bfloat16, or xla")
    device = jax.local_devices()[0]
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:
        kind = f"{device.platform} ({device.device_kind})"
        raise UserError(f"{KEY_PATH}: cudnn is for NVIDIA GPUs, and this machine's devices are {kind}; take xla")
    capability = tuple(map(int, str(getattr(device, "compute_capability", "0")).split(".")))
    if model.head_dim > _LARGEST_HEAD and capability < (9, 0):
        raise UserError(
            f"{KEY_PATH}: cudnn takes heads of more than {_LARGEST_HEAD} dimensions from Hopper on (compute capability "
            f"9.0); {device.device_kind} is before, and this model's heads have {model.head_dim}; take xla"
        )
    q, k = (jnp.ones((1, 64, n, model.head_dim), dtype) for n in (model.heads, model.kv_heads))
    mask = jnp.ones((1, 64, 64), bool)

    def loss(q: jax.Array, k: jax.Array) -> jax.Array:
        return attend_fused(q, k, k, mask).astype(jnp.float32).sum()

    try:
        jax.block_until_ready(jax.jit(jax.grad(loss, (0, 1)))(q, k))
    except Exception as error:  # jax, XLA or cuDNN, and in the words of any
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{KEY_PATH}: cudnn does not work on this machine ({reason}); take xla") from None
