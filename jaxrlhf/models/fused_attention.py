"""cuDNN's fused attention for whole sequences, through `jax.nn.dot_product_attention`, and the checks of its limits.

cuDNN's limits: the dtype is float16 or bfloat16; the head size is a multiple of 8, up to 128 (256 from Hopper on);
lengths are even if a gradient is computed; there is no soft cap; only rows and heads may be split over devices. cuDNN
takes a mask only as a bias in the dtype of the queries. Decoding, with one query per row, uses XLA instead.

Every layer reads the bias [B,1,T,S]. In jax 0.10.2 cuDNN also writes the bias' gradient, which is unused; in jax 0.12
it does not.
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
    """Causal grouped-query attention [B,T,N,H], computed by cuDNN; the queries are in the last T of S slots.

    Outputs of a query that sees no key are arbitrary finite numbers. If T = S, cuDNN skips the blocks above the
    diagonal.
    """
    T, S = mask_BTS.shape[1:]
    odd_T, odd_S = T % 2, S % 2  # odd lengths become even: by an unused last query, and by a masked last key
    q_BTNH = jnp.pad(q_BTNH, ((0, 0), (0, odd_T), (0, 0), (0, 0)))
    k_BSKH, v_BSKH = (jnp.pad(x, ((0, 0), (0, odd_S), (0, 0), (0, 0))) for x in (k_BSKH, v_BSKH))
    mask_B1TS = jnp.pad(mask_BTS, ((0, 0), (0, odd_T), (0, odd_S)))[:, None]
    # cuDNN requires the same sharding of queries, keys and values, not split along length and head dimension.
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
    """Raises `UserError` if cuDNN cannot compute the attention of this model with heads split over `tensor` devices."""
    if model.attention_softcap is not None:
        raise UserError(
            f"{KEY_PATH}: cudnn has no soft cap on attention, but this model has one ({model.attention_softcap:g}); "
            "use xla"
        )
    if model.head_dim % _HEAD_STEP or model.head_dim > _LARGEST_ON_HOPPER:
        raise UserError(
            f"{KEY_PATH}: cudnn supports a head_dim that is a multiple of {_HEAD_STEP} and at most "
            f"{_LARGEST_ON_HOPPER}, but this model's is {model.head_dim}; use xla"
        )
    if model.heads % tensor or model.kv_heads % tensor:
        raise UserError(
            f"{KEY_PATH}: cudnn needs queries, keys and values split alike, but {model.heads} query heads and "
            f"{model.kv_heads} key heads do not both divide by mesh.tensor={tensor}; use xla, or another mesh"
        )


def check_device(model: DecoderConfig, dtype: jax.typing.DTypeLike) -> None:
    """Runs cuDNN attention and its gradient once; `UserError` if this machine cannot compute them for this model."""
    if jnp.dtype(dtype) == jnp.float32:
        raise UserError(f"{KEY_PATH}: cudnn does not support a float32 base; give model.dtype=bfloat16, or use xla")
    device = jax.local_devices()[0]
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:
        kind = f"{device.platform} ({device.device_kind})"
        raise UserError(f"{KEY_PATH}: cudnn needs an NVIDIA GPU, but this machine's devices are {kind}; use xla")
    capability = tuple(map(int, str(getattr(device, "compute_capability", "0")).split(".")))
    if model.head_dim > _LARGEST_HEAD and capability < (9, 0):
        raise UserError(
            f"{KEY_PATH}: cudnn supports a head_dim above {_LARGEST_HEAD} only from Hopper on (capability 9.0), "
            f"but this model's is {model.head_dim} and the device is {device.device_kind}; use xla"
        )
    q, k = (jnp.ones((1, 64, n, model.head_dim), dtype) for n in (model.heads, model.kv_heads))
    mask = jnp.ones((1, 64, 64), bool)

    def loss(q: jax.Array, k: jax.Array) -> jax.Array:
        return attend_fused(q, k, k, mask).astype(jnp.float32).sum()

    try:
        jax.block_until_ready(jax.jit(jax.grad(loss, (0, 1)))(q, k))
    except Exception as error:  # from jax, XLA or cuDNN
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{KEY_PATH}: cudnn does not work on this machine ({reason}); use xla") from None
