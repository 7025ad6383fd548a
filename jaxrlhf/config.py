"""Every setting: its type, default, bounds and one line of description. No jax import.

Three groups stand here, in this order: what the step functions take (`AdapterConfig`, `Sampling`,
`OptimizerConfig`, `PPOConfig`), what the data room takes, and what a run is made of (`RunConfig` and one
section per stage). Files, overrides and messages are read in `config_io.py`.

In the settings that enter compiled steps, floats are numbers (traced: changing one compiles nothing) and
everything else is structure (static). `records.py` registers them as pytrees by that rule.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
UnitFloat = Annotated[float, Field(ge=0, le=1)]
Overflow = Literal["cut", "drop", "stop"]


class Settings(BaseModel):
    """Base of all sections: immutable, strict types, no unknown keys; hashable where they enter compiled steps."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


def names(default: tuple[str, ...] | None, description: str, **kwargs: Any) -> Any:
    """A field for a list of names; a YAML list becomes a tuple, so that the section stays hashable."""
    return Field(default, description=description, strict=False, **kwargs)


# ---------------------------------------------------------------- what the step functions take


class AdapterConfig(Settings):
    """What is trained on top of the frozen base."""

    kind: Literal["lora", "full"] = Field("lora", description="lora: low-rank pairs; full: a copy of every weight")
    rank: PositiveInt = Field(16, description="rank of each LoRA pair")
    alpha: PositiveFloat = Field(32.0, description="LoRA scale: the pair's product is multiplied by alpha / rank")
    target_modules: tuple[str, ...] = names(
        ("all-linear",), "modules with a LoRA pair, by last name (q_proj, ...) or path; all-linear: every layer's"
    )


class Sampling(Settings):
    """How answers are sampled."""

    max_new_tokens: PositiveInt = Field(64, description="tokens sampled per prompt at most")
    temperature: NonNegativeFloat = Field(1.0, description="divides the logits, in training too; 0: greedy")
    top_k: NonNegativeInt = Field(0, description="keep the k most likely tokens; 0: off")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="keep the likeliest tokens that together have at most this probability, always one; null: off"
    )
    min_p: UnitFloat | None = Field(
        None, description="keep tokens at least this likely relative to the most likely; null: off"
    )
    stop_tokens: tuple[int, ...] | None = Field(
        None, strict=False, description="token ids that end an answer; null: the model's own"
    )
    pad_token: NonNegativeInt | None = Field(None, description="token id after the end; null: the model's own")
    samples_per_prompt: PositiveInt = Field(1, description="answers to each prompt: a group, from one prefill")


class OptimizerConfig(Settings):
    """AdamW as PyTorch computes it, with a schedule and a clipped gradient norm."""

    learning_rate: NonNegativeFloat = Field(1e-4, description="peak learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="after warm-up: constant, or decay to 0 at the last step")
    warmup_steps: NonNegativeFloat = Field(0.0, description="optimizer steps of linear warm-up")
    total_steps: PositiveFloat | None = Field(None, description="optimizer steps until decay reaches 0; null: the stage's")
    weight_decay: NonNegativeFloat = Field(0.0, description="decoupled weight decay")
    max_grad_norm: PositiveFloat = Field(1.0, description="the gradient's global norm is clipped here")
    beta1: float = Field(0.9, ge=0, lt=1, description="Adam's first decay")
    beta2: float = Field(0.999, ge=0, lt=1, description="Adam's second decay")
    epsilon: PositiveFloat = Field(1e-5, description="Adam's epsilon, added outside the root")


class PPOConfig(Settings):
    """The update of one iteration: schulman et al. 1707.06347 as applied to language models in 2403.17031."""

    epochs: PositiveInt = Field(4, description="passes over the samples of an iteration")
    minibatches: PositiveInt = Field(1, description="optimizer steps per pass")
    microbatch_size: PositiveInt | None = Field(None, description="rows per forward and backward pass; null: a whole minibatch")
    loss: Literal["clip", "gspo", "cispo", "pg"] = Field(
        "clip", description="clip: PPO; gspo: one ratio per answer; cispo: clipped weights; pg: plain policy gradient"
    )
    clip_low: NonNegativeFloat = Field(0.2, description="the ratio is clipped below 1 - clip_low")
    clip_high: NonNegativeFloat = Field(0.2, description="the ratio is clipped above 1 + clip_high")
    dual_clip: Annotated[float, Field(gt=1)] | None = Field(
        None, description="where the advantage is negative, the loss is at most this times its size; null: off"
    )
    importance_cap: PositiveFloat | None = Field(
        None, description="weights for the gap between sampling and training logprobs, cut off here; null: no weights"
    )
    importance_level: Literal["token", "sequence"] = Field("token", description="one such weight per token or per answer")
    kl_loss: Literal["k1", "k2", "k3"] | None = Field(
        None, description="estimator of a KL term in the loss, weighted by kl.coef; null: the KL is part of the reward"
    )
    value_clip: NonNegativeFloat = Field(0.2, description="values are clipped to the old ones +- this")
    value_coef: NonNegativeFloat = Field(0.1, description="weight of the value loss")
    entropy_coef: NonNegativeFloat = Field(0.0, description="weight of the entropy bonus")
    aggregation: Literal["token", "sequence", "constant"] = Field(
        "token", description="mean over tokens; mean of the answers' means; or sum over response length x rows"
    )
    remat: bool = Field(False, description="recompute each layer in the backward pass: less memory, more time")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="optimizer of the policy")
    value_optimizer: OptimizerConfig = Field(OptimizerConfig(), description="optimizer of the value model")


class KLConfig(Settings):
    """The penalty for leaving the reference, and its coefficient's controller (1909.08593, section 2.2)."""

    coef: NonNegativeFloat = Field(0.05, description="initial weight of the per-token KL in the reward")
    estimator: Literal["k1", "k2", "k3"] = Field("k1", description="per-token KL estimator on r = ref - policy: -r, r^2/2, exp(r)-1-r")
    target: PositiveFloat | None = Field(None, description="KL per answer that an adaptive coefficient aims at; null: fixed coefficient")
    horizon: PositiveFloat = Field(10000.0, description="answers over which the adaptive coefficient reacts")


class AdvantageConfig(Settings):
    """How rewards become advantages."""

    estimator: Literal[
        "gae", "reinforce", "rloo", "grpo", "dr_grpo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "remax"
    ] = Field("gae", description="rloo, grpo, dr_grpo and reinforce_plus_plus_baseline compare sampling.samples_per_prompt answers; only gae has a value model")
    gamma: UnitFloat = Field(1.0, description="discount")
    lam: UnitFloat = Field(0.95, description="lambda of generalised advantage estimation")
    whiten_rewards: bool = Field(False, description="rewards are scaled to deviation 1, over the whole batch, before GAE")
    whiten_advantages: bool | None = Field(None, description="advantages are scaled to mean 0 and deviation 1 over the whole batch; null: gae's and reinforce's are")


# ---------------------------------------------------------------- data


class SourceConfig(Settings):
    """Where rows come from."""

    path: str = Field(description="file, folder, hub id, or builtin:assistant-demonstrations, -preferences, -prompts")
    format: Literal["auto", "json", "jsonl", "parquet", "datasets", "builtin"] = Field(
        "auto", description="auto: by the path's ending; datasets: a folder or hub id for the datasets library"
    )
    split: str = Field("train", description="split of a datasets folder or hub id; of a builtin set: train or test")
    subset: str | None = Field(None, description="configuration name of a hub id")
    limit: PositiveInt | None = Field(None, description="use the first rows only; of a builtin set: how many to make")


class DemonstrationsConfig(SourceConfig):
    """Rows to imitate: prompt and response, chat messages, or plain text."""

    prompt_field: str = Field("prompt", description="text or chat messages of the prompt")
    response_field: str = Field("response", description="text or chat message of the response")
    messages_field: str = Field("messages", description="a whole chat; the last assistant turn is the response")
    text_field: str = Field("text", description="plain text, all of it learnt")


class PreferencesConfig(SourceConfig):
    """Pairs: prompt, chosen, rejected; or two whole dialogues as in hh-rlhf; or two chats."""

    prompt_field: str = Field("prompt", description="text or chat messages of the prompt; absent: whole dialogues")
    chosen_field: str = Field("chosen", description="the better answer or dialogue")
    rejected_field: str = Field("rejected", description="the worse answer or dialogue")
    margin_field: str = Field("margin", description="optional number: by how much the better one is better")


class PromptsConfig(SourceConfig):
    """Prompts to answer; a row's other columns go to the reward function."""

    prompt_field: str = Field("prompt", description="text or chat messages of the prompt")
    messages_field: str = Field("messages", description="a chat; a last assistant turn is left out")
    text_field: str = Field("text", description="plain text whose beginning is the prompt")
    text_tokens: PositiveInt = Field(8, description="how many tokens of a plain text are the prompt")


# ---------------------------------------------------------------- a run


class NewModelConfig(Settings):
    """A decoder from random weights, in place of a pretrained one."""

    vocabulary: Literal["assistant"] = Field("assistant", description="whose words the tokenizer knows: the builtin assistant world's")
    hidden_size: PositiveInt = Field(128, description="width of the residual stream")
    layers: PositiveInt = Field(3, description="number of blocks")
    heads: PositiveInt = Field(4, description="query heads")
    kv_heads: PositiveInt = Field(2, description="key and value heads")
    intermediate_size: PositiveInt = Field(384, description="width of the MLP")
    max_positions: PositiveInt = Field(512, description="longest sequence")

    @model_validator(mode="after")
    def _divisible(self) -> "NewModelConfig":
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"hidden_size ({self.hidden_size}) must be a multiple of twice heads ({self.heads})")
        return self


class ModelConfig(Settings):
    """The base: exactly one of path, run and new."""

    path: str | None = Field(None, description="Hugging Face folder or hub id")
    run: str | None = Field(None, description="directory of a finished run: its base, tokenizer and adapters")
    new: NewModelConfig | None = Field(None, description="make a new decoder from random weights")
    tokenizer: str | None = Field(None, description="tokenizer folder or hub id; null: the model's own")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="dtype of the base in memory")
    quantize: Literal["int8", "nf4"] | None = Field(None, description="keep the base's linear layers as 8-bit or 4-bit codes, under LoRA adapters; null: no, or as in run")

    @model_validator(mode="after")
    def _one_origin(self) -> "ModelConfig":
        given = [name for name in ("path", "run", "new") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of path, run, new; given: {', '.join(given) or 'none'}")
        if self.quantize is not None and self.new is not None:
            raise ValueError("quantize is for a base that stays as it is; one made with new is to be trained whole")
        return self


class MeshConfig(Settings):
    """Devices along each axis; -1 takes what is left."""

    data: int = Field(-1, ge=-1, description="copies of the base, each with its share of the batch")
    fsdp: int = Field(1, ge=-1, description="base split by rows, gathered layer by layer; batch split too")
    tensor: int = Field(1, ge=-1, description="layers split by heads and MLP width")

    @model_validator(mode="after")
    def _one_filler(self) -> "MeshConfig":
        sizes = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}
        if 0 in sizes.values() or list(sizes.values()).count(-1) > 1:
            raise ValueError(f"axes are at least 1, and one of them may be -1; given {sizes}")
        return self


class SFTConfig(Settings):
    """Supervised fine-tuning: cross-entropy on the response only."""

    data: DemonstrationsConfig = Field(description="rows to imitate")
    heldout: NonNegativeInt = Field(64, description="rows kept aside to measure the loss on; at most a tenth of all")
    adapter: AdapterConfig = Field(AdapterConfig(), description="what is trained; full: the result is the new base")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="optimizer")
    epochs: PositiveInt = Field(1, description="passes over the rows")
    batch_size: PositiveInt = Field(16, description="sequences per optimizer step")
    microbatch_size: PositiveInt | None = Field(None, description="sequences per forward and backward pass; null: batch_size")
    max_length: PositiveInt = Field(512, description="tokens per sequence")
    overflow: Overflow = Field("cut", description="rows longer than max_length: cut their end, drop them, or stop")
    packing: bool = Field(True, description="several rows share a sequence, each attending to itself; false: length buckets")
    remat: bool = Field(False, description="recompute each layer in the backward pass")
    save_every: PositiveInt = Field(100, description="steps between checkpoints")


class RewardModelConfig(Settings):
    """Reward model: pairwise log-sigmoid on the score at the last real token."""

    data: PreferencesConfig = Field(description="pairs to learn from")
    test_data: PreferencesConfig | None = Field(None, description="pairs to measure accuracy on; null: hold some out")
    heldout: PositiveInt = Field(128, description="pairs held out where test_data is null; at most a tenth of all")
    start: Literal["sft", "fresh"] = Field("sft", description="sft: start from a copy of the SFT adapter, if any; fresh: a new adapter")
    adapter: AdapterConfig = Field(AdapterConfig(), description="what is trained, where it does not start from SFT")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="optimizer")
    epochs: PositiveInt = Field(1, description="passes over the pairs")
    batch_size: PositiveInt = Field(32, description="pairs per optimizer step")
    microbatch_size: PositiveInt | None = Field(None, description="pairs per forward and backward pass; null: batch_size")
    max_length: PositiveInt = Field(512, description="tokens per sequence")
    overflow: Overflow = Field("cut", description="sequences longer than max_length: cut the prompt's start, drop the pair, or stop")
    buckets: PositiveInt = Field(4, description="sequence lengths that batches are padded to, each compiled once")
    centring: NonNegativeFloat = Field(0.01, description="weight of (chosen + rejected)^2, which keeps scores around 0")
    remat: bool = Field(False, description="recompute each layer in the backward pass")
    save_every: PositiveInt = Field(100, description="steps between checkpoints")


class RewardConfig(Settings):
    """Where scores come from: the run's reward adapter, a pretrained model, a text classifier, Python, a server, a sum."""

    kind: Literal["model", "function", "transformers", "http", "sum"] = Field(
        "model", description="model: the run's reward adapter, or the decoder at path; function: Python; transformers: a text classifier of any architecture at path, with torch on the CPU; http: a server at url; sum: of parts"
    )
    parts: dict[str, "RewardPart"] | None = Field(None, description="kind sum: name -> weight and reward; each is logged as reward/NAME")
    options: dict[str, Any] = Field({}, description="kind function: keywords of every call, such as {pattern: '####'}")
    columns: dict[str, str] = Field({}, description="kind function: keyword of the function -> column of the data that it gets")
    url: str | None = Field(None, description="kind http: gets {prompts, completions, columns} as JSON, answers {scores: [numbers]}")
    timeout: PositiveFloat = Field(30.0, description="kind http, and async functions: seconds for one call")
    retries: NonNegativeInt = Field(4, description="kind http: further tries after time-outs, lost connections, 429 and 5xx")
    token_env: str | None = Field(None, description="kind http: environment variable with a bearer token")
    function: str | None = Field(None, description="module:function or path.py:function, called with prompts=, completions= and the row's other columns=")
    path: str | None = Field(None, description="folder or hub id of a *ForSequenceClassification model with its own tokenizer; kind model: one label; null: the run's reward adapter")
    label: Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)] | None = Field(
        None, description="kind transformers: name or number of the label that is scored; null: the only one"
    )
    score: Literal["logit", "probability", "log_probability"] = Field("logit", description="kind transformers: what of the label is the score")
    input: Literal["auto", "text", "completion", "pair", "chat"] = Field(
        "auto", description="what a model at path reads. text: prompt and answer as one; completion: the answer alone; pair: two segments (kind transformers); chat: its chat template; auto: chat for chats if it has a template, else text"
    )
    template: str | None = Field(None, description="spells input text, with {prompt} and {completion} in it; null: the answer right behind the prompt")
    end_at_eos: bool | None = Field(None, description="kind model: answers that ended end with the reward model's EOS, as in the stage reward_model; null: in texts yes, chats as their template ends them")
    batch_size: PositiveInt = Field(16, description="answers per forward pass of a model at path")
    max_length: PositiveInt = Field(512, description="tokens that a model at path reads at most, within its positions; longer: the start is cut off")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="kind model: dtype of the weights at path in memory")

    @model_validator(mode="after")
    def _complete(self) -> "RewardConfig":
        if (self.kind == "function") != (self.function is not None):
            raise ValueError("kind: function needs function: module:name or path.py:name, and only that kind takes one")
        if (self.kind == "sum") != bool(self.parts):
            raise ValueError("kind: sum needs parts: name -> {weight, kind, ...}, and only that kind takes them")
        if any(part.kind == "sum" for part in (self.parts or {}).values()):
            raise ValueError("parts: a sum within a sum is one sum: list its parts")
        if (self.kind == "http") != (self.url is not None):
            raise ValueError("kind: http needs url: http(s)://..., and only that kind takes one")
        if self.kind != "function" and (self.options or self.columns):
            raise ValueError("options and columns are for kind: function")
        if self.kind == "transformers" and self.path is None:
            raise ValueError("kind: transformers needs path: folder or hub id of a text classifier")
        if self.kind in ("function", "http", "sum") and self.path is not None:
            raise ValueError(f"kind: {self.kind} takes no path; kind: model or transformers does")
        if self.kind != "transformers" and (self.label is not None or self.score != "logit" or self.input == "pair"):
            raise ValueError("label, score and input: pair are for kind: transformers; a reward model has one score")
        if self.template is not None and (self.input not in ("auto", "text") or "{completion}" not in self.template):
            raise ValueError("template holds {completion}, and {prompt} where that is wanted; it needs input: text")
        return self


class RewardPart(RewardConfig):
    """One reward of a sum."""

    weight: FiniteFloat = Field(1.0, description="the part's scores are multiplied by it; 0: only measured")


RewardConfig.model_rebuild()


class PPOStageConfig(Settings):
    """PPO: sample, score, update, again."""

    data: PromptsConfig = Field(description="prompts to answer")
    max_prompt_tokens: PositiveInt = Field(64, description="prompts are padded on the left to this length")
    overflow: Overflow = Field("stop", description="longer prompts: cut their start, drop them, or stop")
    iterations: PositiveInt = Field(100, description="rollouts")
    batch_size: PositiveInt = Field(64, description="prompts per rollout; times sampling.samples_per_prompt answers")
    sampling: Sampling = Field(Sampling(), description="how answers are sampled")
    policy: str | None = Field(None, description="adapter folder (ours or PEFT's) that the policy starts from; null: the reference")
    reference: str | None = Field(None, description="adapter folder of the reference; null: the SFT adapter, else the base")
    reward: RewardConfig = Field(RewardConfig(), description="the reward that is maximised")
    gold: str | None = Field(None, description="function that is measured but never trained on: module:function or path.py:function")
    missing_eos_penalty: NonNegativeFloat = Field(0.0, description="taken off the score of an answer that did not end")
    kl: KLConfig = Field(KLConfig(), description="penalty for leaving the reference")
    advantage: AdvantageConfig = Field(AdvantageConfig(), description="how rewards become advantages")
    adapter: AdapterConfig = Field(AdapterConfig(), description="the policy's, where SFT left none to start from")
    value_adapter: AdapterConfig = Field(AdapterConfig(), description="the value model's, where it does not start from the reward model")
    value_from: Literal["reward", "fresh"] = Field("reward", description="reward: start from the reward adapter, if any; fresh: a new adapter")
    update: PPOConfig = Field(PPOConfig(), description="the update of one iteration")
    save_every: PositiveInt = Field(10, description="iterations between checkpoints")
    sample_every: PositiveInt = Field(10, description="iterations between samples written to samples.jsonl")
    evaluation_data: PromptsConfig | None = Field(None, description="held-out prompts for the final table; null: of data")
    evaluation_prompts: PositiveInt = Field(128, description="prompts for the final table, before and after training; taken in turn")


class RunConfig(Settings):
    """A whole run: which stages, on which model, into which directory."""

    run_dir: str = Field(description="directory of the run; the same command continues it")
    seed: int = Field(0, ge=0, lt=2**32, description="the one seed")
    stages: tuple[Literal["sft", "reward_model", "ppo"], ...] = Field(
        ("sft", "reward_model", "ppo"), strict=False, min_length=1, description="stages in order"
    )
    model: ModelConfig = Field(description="the base model")
    mesh: MeshConfig = Field(MeshConfig(), description="devices along each axis")
    sft: SFTConfig | None = Field(None, description="settings of the sft stage")
    reward_model: RewardModelConfig | None = Field(None, description="settings of the reward_model stage")
    ppo: PPOStageConfig | None = Field(None, description="settings of the ppo stage")

    @model_validator(mode="after")
    def _sections(self) -> "RunConfig":
        for stage in self.stages:
            if getattr(self, stage) is None:
                raise ValueError(f"stages names {stage}, but there is no section {stage}")
        order = [s for s in ("sft", "reward_model", "ppo") if s in self.stages]
        if list(self.stages) != order:
            raise ValueError(f"stages run in the order sft, reward_model, ppo, each once; given {list(self.stages)}")
        return self
