"""Settings of the base model."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from jaxrlhf.config.base import MAX_LAYERS, ROUNDING, PositiveInt, Settings
from jaxrlhf.config.paths import FolderPath, SourcePath


class NewModelConfig(Settings):
    """A decoder with random weights."""

    vocabulary: str = Field("assistant", description="words of the tokenizer: assistant (the builtin assistant world) or the name of a builtin task or game, such as intent")
    hidden_size: PositiveInt = Field(128, description="width of the residual stream")
    layers: Annotated[int, Field(ge=1, le=MAX_LAYERS)] = Field(3, description="number of layers")
    heads: PositiveInt = Field(4, description="number of query heads")
    kv_heads: PositiveInt = Field(2, description="number of key and value heads")
    intermediate_size: PositiveInt = Field(384, description="width of the MLP")
    max_positions: PositiveInt = Field(512, description="longest sequence, in tokens")

    @model_validator(mode="after")
    def _divisible(self) -> "NewModelConfig":
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"hidden_size ({self.hidden_size}) must be a multiple of 2 * heads ({2 * self.heads})")
        return self


class ModelConfig(Settings):
    """The base model: exactly one of path, run and new."""

    path: SourcePath | None = Field(None, description="Hugging Face folder or hub id of a pretrained model")
    run: FolderPath | None = Field(None, description="directory of a finished run, whose base, tokenizer and adapters this run uses")
    new: NewModelConfig | None = Field(None, description="creates a decoder with random weights")
    tokenizer: SourcePath | None = Field(None, description="tokenizer folder or hub id; null uses the model's own")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="dtype of the base in memory; auto keeps the dtype of the files, and is float32 for a new model")
    attention: Literal["xla", "cudnn"] = Field("xla", description="implementation of attention over full sequences; cudnn is a fused implementation for NVIDIA GPUs in bfloat16 or float16", json_schema_extra=ROUNDING)
    decode_kernels: bool = Field(False, description="on NVIDIA GPUs, decoding uses kernels of its own (Pallas) for attention over the filled part of the cache, for products with LoRA pairs and for draws; false uses XLA's kernels, because these have not run on a card yet; a head_dim that is not 32, 64, 128 or 256 always has XLA's attention", json_schema_extra=ROUNDING)
    matmul_precision: Literal["highest", "tf32"] = Field("highest", description="precision of float32 matrix products on NVIDIA GPUs, in every program; highest is float32, which is needed for a ratio of exactly 1 in the first minibatch; tf32 is faster and has a 10-bit mantissa. With a bfloat16 or float16 base the setting affects only scalar heads and LoRA pairs on lm_head; a CPU ignores the setting", json_schema_extra=ROUNDING)
    scan_layers: bool | None = Field(None, description="scoring, PPO updates with LoRA adapters, and the pass over prompts of a rollout whose rows all enter at once run the layers in a loop over stacked weights, so that the time to compile does not grow with the number of layers; the stacked weights are a second copy of the layers while a program runs; null means on a GPU if the copy takes at most 8 GiB on each device", json_schema_extra=ROUNDING)
    quantize: Literal["int8", "nf4"] | None = Field(None, description="stores the base's linear layers in 8 or 4 bits, for training LoRA adapters; null keeps the precision of the files, or the quantization of model.run")

    @model_validator(mode="after")
    def _one_origin(self) -> "ModelConfig":
        origins = [name for name in ("path", "run", "new") if getattr(self, name) is not None]
        if len(origins) != 1:
            raise ValueError(f"give exactly one of path, run, new; given: {', '.join(origins) or 'none'}")
        if self.attention == "cudnn" and self.dtype == "float32":
            raise ValueError(
                "attention cudnn does not support float32; give dtype bfloat16 or float16, or attention xla"
            )
        if self.quantize is not None and self.new is not None:
            raise ValueError(
                "quantize needs a base that is not trained, but a base made with new must be trained in full"
            )
        return self
