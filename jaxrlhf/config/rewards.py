"""Where scores come from."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from jaxrlhf.config.base import FiniteFloat, NonNegativeInt, PositiveFloat, PositiveInt, Settings


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
    end_at_eos: bool | None = Field(None, description="kind model: answers that ended end as in the stage reward_model, with the turn's end of the reward model's chat template, or its EOS; null: in texts yes, chats as their template ends them")
    batch_size: PositiveInt = Field(16, description="answers per forward pass of a model at path")
    max_length: PositiveInt = Field(512, description="tokens that a model at path reads at most, within its positions; longer: the start is cut off")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="kind model: dtype of the weights at path in memory; auto: that of its tensors")

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
