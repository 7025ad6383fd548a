"""Settings of the step functions.

Fields made with `number` are traced, nested sections are pytrees of their own, and all other fields are static:
`records.py` registers the sections so.
"""

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from jaxrlhf.config.base import (
    ROUNDING,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Remat,
    Settings,
    UnitFloat,
    number,
)


class AdapterConfig(Settings):
    """The trainable part on top of the frozen base."""

    kind: Literal["lora", "full"] = Field("lora", description="lora trains low-rank pairs; full trains a copy of every weight")
    rank: PositiveInt = Field(16, description="rank of each LoRA pair")
    alpha: PositiveFloat = Field(32.0, description="scale of LoRA: a pair's product is multiplied by alpha / rank")
    rank_stabilised: bool = Field(False, description="multiplies by alpha / sqrt(rank) instead (rsLoRA, 2312.03732), so that higher ranks do not learn more slowly")
    target_modules: tuple[str, ...] = Field(("all-linear",), strict=False, min_length=1, description="modules with a LoRA pair, by last name (q_proj, ...) or path; all-linear is every linear layer of every block")


class Sampling(Settings):
    """How completions are sampled."""

    max_new_tokens: PositiveInt = Field(64, description="longest completion, in tokens")
    temperature: NonNegativeFloat = number(1.0, "divides the logits, in sampling and in training; 0 is greedy")
    top_k: NonNegativeInt = Field(0, description="samples from the k most likely tokens; 0 disables it")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = number(None, "samples from the most likely tokens with this total probability, see top_p_rule; null disables it")
    top_p_rule: Literal["reach", "within"] = Field("reach", description="reach keeps the fewest tokens with at least top_p, like Hugging Face and vLLM; within keeps the most tokens with at most top_p, and at least one, like openai/lm-human-preferences")
    min_p: UnitFloat | None = number(None, "samples from tokens with at least this probability relative to the most likely one; null disables it")
    stop_tokens: tuple[int, ...] | None = Field(None, strict=False, description="token ids that end a completion; null takes those of the model, the tokenizer and the chat template")
    pad_token: NonNegativeInt | None = Field(None, description="token id that fills rows after the end; null takes the model's own")
    samples_per_prompt: PositiveInt = Field(1, description="completions per prompt (a group), sampled after one prefill")
    max_compactions: NonNegativeInt = Field(4, description="how many times the active batch is halved when half its rows have finished; each size compiles one more decode loop; 0 disables it", json_schema_extra=ROUNDING)


class LearningRates(NamedTuple):
    """Default learning rates of a role."""

    full: float  # every weight of a model of width `RATED_WIDTH` or more
    lora: float  # low-rank pairs, or a scalar head only


# A step of Adam changes every weight by about the learning rate, so a layer's output changes in proportion to its number
# of inputs: rates for small models break large ones. The rates of full fine-tunes are those of TRL, OpenRLHF and verl.
# LoRA gets 10 times as much or more, as their guides recommend, because lora_a shrinks with the width. See docs/defaults.md.
LEARNING_RATES = {
    "sft": LearningRates(full=2e-5, lora=2e-4),
    "reward_model": LearningRates(full=1e-5, lora=1e-4),
    "policy": LearningRates(full=1e-6, lora=2e-5),
    "value": LearningRates(full=1e-5, lora=1e-4),
}


RATED_WIDTH = 896  # width of a 0.5B model, the smallest that the rates suit; narrower ones get more (2203.03466)


class OptimizerConfig(Settings):
    """AdamW as in PyTorch, with a schedule and gradient clipping."""

    learning_rate: NonNegativeFloat | None = number(None, "peak learning rate; null, for LoRA and for a full fine-tune: sft 2e-4 and 2e-5, reward_model 1e-4 and 1e-5, policy 2e-5 and 1e-6, value model 1e-4 and 1e-5; full fine-tunes of models narrower than 896 get proportionally more")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="learning rate after warm-up: constant, or decaying to 0 at the last step")
    warmup_steps: NonNegativeInt = number(0, "optimizer steps of linear warm-up", lt=2**31)
    total_steps: PositiveInt | None = number(None, "optimizer steps until the learning rate reaches 0; null is the length of the stage", lt=2**31)
    weight_decay: NonNegativeFloat = number(0.0, "decoupled weight decay of matrices")
    max_grad_norm: PositiveFloat = number(1.0, "global norm to which the gradient is clipped")
    beta1: float = number(0.9, "Adam's decay of the first moment", ge=0, lt=1)
    beta2: float = number(0.999, "Adam's decay of the second moment", ge=0, lt=1)
    epsilon: PositiveFloat = number(1e-8, "Adam's epsilon, added outside the root; the default is far below typical gradients, which are about 1e-6 at 8B parameters")


# Defaults that depend on the loss. gspo: the bounds of its paper (2507.18071); its mean over tokens keeps ratios near 1.
# cispo: no lower bound (2506.13585), and weights up to 5 as in ScaleRL (2510.13786). pg: its gradient is unbiased only on
# samples of the current policy, so one step per iteration.
BY_LOSS: dict[str, dict[str, Any]] = {
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4},
    "cispo": {"clip_low": 1.0, "clip_high": 4.0},
    "pg": {"epochs": 1, "minibatches": 1},
}


class PPOConfig(Settings):
    """The update of one iteration: PPO (1707.06347) as applied to language models (2403.17031)."""

    epochs: PositiveInt = Field(1, description="passes over the samples of an iteration; more than 1 moves large models out of the clip range")
    minibatches: PositiveInt | None = Field(None, description="optimizer steps per pass; null is 4, or the largest smaller number that divides the completions")
    microbatch_size: PositiveInt | None = Field(None, description="rows per forward and backward pass, in scoring too; null is a full minibatch; smaller values save memory")
    loss: Literal["clip", "gspo", "cispo", "pg"] = Field("clip", description="policy loss: PPO's clipped surrogate (clip), one ratio per completion (gspo), clipped weights (cispo), or plain policy gradient with one step per iteration (pg)")
    clip_low: NonNegativeFloat = number(0.2, "clips the ratio below 1 - clip_low; the default is 3e-4 with gspo, and 1 with cispo, which is no bound")
    clip_high: NonNegativeFloat = number(0.2, "clips the ratio above 1 + clip_high; the default is 4e-4 with gspo and 4 with cispo")
    dual_clip: Annotated[float, Field(gt=1)] | None = number(None, "limits the loss of a token with a negative advantage to this many times the advantage's size; null disables it")
    importance_cap: PositiveFloat | None = number(None, "cap of the importance weights that correct the gap between sampling and training logprobs; null uses no weights")
    importance_level: Literal["token", "sequence"] = Field("token", description="one importance weight per token or per completion")
    kl_loss: Literal["k1", "k2", "k3"] | None = Field(None, description="estimator of a KL term in the loss, weighted by kl.coef (prefer k2 or k3: k1's gradient is 0 in expectation); null makes the KL part of the reward, by kl.estimator. With advantage.estimator grpo the default is k3, because it divides by a group's deviation, and in a group with equal scores only the KL would remain")
    mask_truncated: bool = Field(False, description="excludes completions that did not end from the update: from all losses, the entropy bonus and whitening, but not from the baselines of groups (overlong filtering, 2503.14476), because a truncated completion is neither right nor wrong")
    kl_bound: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = number(10.0, "steepest slope of one token's KL estimate, in loss, reward and metrics: k2 beyond |r| = 10 and k3 beyond r = log(11) continue as straight lines, so that one token far from the reference cannot outweigh a batch (verl and OpenRLHF clip the estimate at 10); null sets no bound")
    log_ratio_bound: PositiveFloat | None = number(20.0, "clips log-ratios of policies to +- this before exp, in losses, importance weights and metrics (20 as in verl); null sets no bound, so that ratios may be infinite, and their steps are skipped")
    value_clip: NonNegativeFloat = number(0.5, "clips values to the old ones +- this, in the scale of the scores, so an iteration moves them at most this far")
    value_coef: NonNegativeFloat = number(0.1, "weight of the value loss")
    value_trunk: Literal["own", "policy"] = Field("own", description="own gives the value model its own adapter; policy makes it a head on the policy's trunk, with one forward pass for both")
    value_warmup: NonNegativeInt = Field(0, description="number of first iterations that train the value model only")
    kl_stop: PositiveFloat | None = number(None, "approximate KL to the old policy, in nats per token, above which a minibatch and the rest of its iteration are skipped; skipped steps do not advance schedules; null disables it")
    pretraining_coef: NonNegativeFloat = number(1.0, "weight of the language-model loss on the rows of ppo.pretraining (PPO-ptx, 2203.02155)")
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | None = number(None, "keeps a moving average of the policy's adapter, with this share of the old one per optimizer step; null keeps none")
    entropy_coef: NonNegativeFloat = number(0.0, "weight of the entropy bonus")
    aggregation: Literal["token", "sequence", "constant"] = Field("token", description="aggregation of the loss: mean over tokens (token), mean of the completions' means (sequence), or sum over response length x rows (constant)")
    buckets: Annotated[int, Field(ge=1, le=8)] = Field(1, description="number of lengths that completions are cut to in scoring and update; rows of similar length share a microbatch, which runs at the shortest length that fits; each length compiles the passes once more; 1 runs all at full length", json_schema_extra=ROUNDING)
    remat: Remat = "dots"
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="optimizer of the policy")
    value_optimizer: OptimizerConfig = Field(OptimizerConfig(), description="optimizer of the value model")

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_loss(cls, section: Any) -> Any:
        loss = section.get("loss") if isinstance(section, dict) else None
        return BY_LOSS.get(loss, {}) | section if isinstance(loss, str) else section


class ScoreConfig(Settings):
    """How scores become rewards: normalisation first, then penalties in the normalised scale."""

    normalise: Literal["none", "initial", "running", "batch"] = Field("none", description="scales scores to mean 0 and deviation 1, by those of completions before the first iteration (initial, 1909.08593), of all so far (running), or of the iteration (batch, whitening)")
    initial_completions: PositiveInt = Field(256, description="least number of completions that gain and bias are fitted on, with normalise initial")
    clip: PositiveFloat | None = number(None, "clips normalised scores to +- this; null disables it")
    missing_eos: Literal["subtract", "replace"] = Field("subtract", description="for completions that did not end: subtract takes missing_eos_penalty off the score; replace makes the score -missing_eos_penalty")
    missing_eos_penalty: NonNegativeFloat = number(0.0, "penalty for completions that did not end, see missing_eos")
    length_penalty: NonNegativeFloat = number(0.0, "subtracted from the score for each token beyond length_free")
    length_free: NonNegativeInt = number(0, "tokens without length_penalty", lt=2**31)
    overlong_penalty: NonNegativeFloat = number(0.0, "subtracted from the score at max_new_tokens, rising from 0 over overlong_buffer tokens before it (2503.14476, equation 13)")
    overlong_buffer: NonNegativeInt = number(0, "tokens before max_new_tokens over which overlong_penalty rises", lt=2**31)

    @model_validator(mode="after")
    def _complete(self) -> "ScoreConfig":
        if bool(self.overlong_penalty) != bool(self.overlong_buffer):
            raise ValueError("overlong_penalty and overlong_buffer belong together: give both, or neither")
        if self.length_free and not self.length_penalty:
            raise ValueError("length_free has no effect without length_penalty")
        return self


class KLConfig(Settings):
    """The penalty for the KL divergence from the reference, and its adaptive coefficient (1909.08593, section 2.2)."""

    coef: NonNegativeFloat = number(0.05, "initial weight of the per-token KL in the reward")
    estimator: Literal["k1", "k2", "k3"] = Field("k1", description="per-token KL estimator, with r = ref - policy: -r (k1), r^2/2 (k2), or exp(r)-1-r (k3)")
    target: PositiveFloat | None = number(None, "KL per completion, in nats, that the adaptive coefficient aims at; null keeps the coefficient fixed")
    horizon: PositiveInt = number(10000, "number of completions over which the coefficient adapts", lt=2**31)


class AdvantageConfig(Settings):
    """How rewards become advantages."""

    estimator: Literal[
        "gae", "reinforce", "rloo", "grpo", "dr_grpo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "remax"
    ] = Field("gae", description="advantage estimator; rloo, grpo, dr_grpo and reinforce_plus_plus_baseline compare the sampling.samples_per_prompt completions of a prompt; only gae has a value model")
    gamma: UnitFloat = number(1.0, "discount per token")
    lam: UnitFloat = number(1.0, "lambda of generalised advantage estimation; below 1 a final score reaches the first tokens of a long completion only through the value model: 0.95^320 is 7e-8")
    whiten_rewards: bool = Field(False, description="with gae, scales rewards to deviation 1 over the global batch before estimation")
    whiten_advantages: bool | None = Field(None, description="scales advantages to mean 0 and deviation 1 over the global batch; null does so with gae and reinforce")
