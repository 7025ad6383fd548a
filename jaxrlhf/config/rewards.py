"""Settings of rewards. Each kind of reward has one section."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from jaxrlhf.config.base import FiniteFloat, NonNegativeFloat, PositiveInt, Seconds, Settings
from jaxrlhf.config.paths import CachePath, FolderPath, FunctionPath, SourcePath


class _Inside(Settings):
    """Settings of rewards that may score inside completions (process rewards)."""

    step_separator: str = Field("\n", min_length=1, description="text that ends a step, for granularity: step")

    @model_validator(mode="after")
    def _check_separator(self) -> "_Inside":
        if self.step_separator != "\n" and self.granularity != "step":
            raise ValueError(f"step_separator has no effect with granularity: {self.granularity}; set granularity: step, or leave step_separator out")
        return self


class FunctionRewardConfig(_Inside):
    """A Python function."""

    kind: Literal["function"] = Field("function", description="a Python function")
    function: FunctionPath = Field(description="module:function or path.py:function, called with prompts=, completions= and the row's other columns as keywords")
    options: dict[str, Any] = Field({}, description="keyword arguments of every call, such as {pattern: '####'}")
    columns: dict[str, str] = Field({}, description="keyword of the function -> column of the data that this keyword receives, if the names differ")
    timeout: Seconds = Field(30.0, description="longest time of one call of an async function, in seconds")
    granularity: Literal["completion", "step", "token", "offset"] = Field("completion", description="what the function returns for each completion: a number (completion), a list with one number per step or per token, or a list of (end, reward) pairs, where end is a number of characters of the completion (offset); with step or token the function also gets the keyword steps or tokens")


class HTTPRewardConfig(_Inside):
    """An HTTP server."""

    kind: Literal["http"] = Field("http", description="an HTTP server")
    url: str = Field(description="URL that receives {prompts, completions, columns} as JSON and returns {scores: [numbers]}")
    timeout: Seconds = Field(30.0, description="longest time of one request, in seconds")
    retries: Annotated[int, Field(ge=0, le=1000)] = Field(4, description="number of retries of a request after a timeout, a lost connection, or a status 429 or 5xx")
    token_env: str | None = Field(None, description="name of the environment variable that holds a bearer token; null sends no token")
    batch_size: PositiveInt = Field(16, description="completions per request")
    granularity: Literal["completion", "step", "token", "offset"] = Field("completion", description="what the server returns for each completion: a number (completion), a list with one number per step or per token, or a list of [end, reward] pairs, where end is a number of characters of the completion (offset); with step or token the request also has the list steps or tokens")


class CodeTestsRewardConfig(Settings):
    """Unit tests of the row, run on the completion's Python code in a sandbox."""

    kind: Literal["code_tests"] = Field("code_tests", description="unit tests of the row, run on the completion's Python code in a sandbox (Linux)")
    column: str = Field("tests", description="column with the tests of a row: Python text with asserts or test functions, a list of asserts, or a list of {input, output} for programs that read and write text")
    prefix: str | None = Field(None, description="column with Python code that precedes the completion's code, such as imports or the head of a function; prompt is the prompt's text; null has none")
    entry_point: str | None = Field(None, description="column with the name of the function that tests call as candidate, as in HumanEval; null has none")
    score: Literal["share", "all"] = Field("share", description="score of a completion: the share of its tests that pass (share), or 1 only if all pass (all)")
    sandbox: Literal["auto", "bubblewrap", "process"] = Field("auto", description="bubblewrap (no network, a root of its own), or a process of another user id with limits, which is weaker; auto is bubblewrap where it works")
    python: FolderPath | None = Field(None, description="Python interpreter of the tested code, which gets the standard library only; null is the interpreter of the run, or /usr/bin/python3 if other users cannot read that")
    seconds: Annotated[float, Field(gt=0, le=3600)] = Field(10.0, description="longest time of all tests of one completion, in seconds")
    memory_mb: Annotated[int, Field(ge=64, le=2**20)] = Field(512, description="largest address space of one process of a completion, in MiB")
    disk_mb: Annotated[int, Field(ge=1, le=2**16)] = Field(16, description="size of the folder /tmp of a completion, in MiB; only bubblewrap has such a folder, other sandboxes allow no writing")
    output_mb: Annotated[int, Field(ge=1, le=1024)] = Field(1, description="longest output of one program, and longest result of one call, in MiB; more fails the test")
    processes: Annotated[int, Field(ge=1, le=1000)] = Field(8, description="largest number of processes and threads of a completion")
    workers: PositiveInt | None = Field(None, description="completions that are tested at the same time; null is the number of processor cores")
    batch_seconds: Seconds = Field(600.0, description="longest time of all completions of a batch, in seconds; completions that are not tested by then have no score")


class JudgeRewardConfig(Settings):
    """A language model that judges completions, behind an OpenAI-compatible chat server."""

    kind: Literal["judge"] = Field("judge", description="a language model that judges completions, behind an OpenAI-compatible chat server")
    url: str = Field(description="base URL of the server's API, such as http://localhost:8000/v1")
    model: str = Field(min_length=1, description="name of the judge's model on the server")
    rubric: str = Field(description="jinja template of the judge's user message; variables: prompt, completion and the row's columns; with against: prompt, first, second and the columns")
    system: str | None = Field(None, description="system message; null sends none")
    against: str | None = Field(None, description="column with a reference answer; the judge then answers A (first is better), B or tie, in both orders, and the score is 1 for a win, 0.5 for a tie and 0 for a loss, averaged over the orders; null judges the completion alone")
    read: Literal["text", "json", "logprobs"] = Field("text", description="how a judgement is read: the last number (with against the last A, B or tie) of the text, a field of a JSON object, or the mean of the scores weighted by the probabilities of their tokens")
    field: str = Field("score", description="field of the JSON object, for read: json")
    low: FiniteFloat = Field(1.0, description="lowest score; a lower number is not read")
    high: FiniteFloat = Field(10.0, description="highest score; a higher number is not read; read: logprobs needs whole scores from 0 to 9, which are one token")
    temperature: NonNegativeFloat = Field(0.0, description="sampling temperature of the judge; 0 gives equal scores to equal completions")
    max_tokens: PositiveInt | None = Field(512, description="longest judgement, in tokens; null sends no limit")
    extra: dict[str, Any] = Field({}, description="further fields of each request, such as {seed: 0}")
    token_env: str | None = Field(None, description="name of the environment variable that holds the API key; null sends none")
    timeout: Seconds = Field(120.0, description="longest time of one request, in seconds")
    retries: Annotated[int, Field(ge=0, le=1000)] = Field(4, description="number of retries of a request after a timeout, a lost connection, or a status 429 or 5xx")
    concurrency: Annotated[int, Field(ge=1, le=1000)] = Field(16, description="number of simultaneous requests")
    cache: CachePath | None = Field("auto", description="folder in which replies are saved, so that a resumed run gets the same scores; auto is jaxrlhf/judge in the user's cache folder; null saves none")

    @model_validator(mode="after")
    def _check_scores(self) -> "JudgeRewardConfig":
        if self.low >= self.high:
            raise ValueError("low must be less than high")
        whole = self.low == int(self.low) and self.high == int(self.high)
        if self.read == "logprobs" and self.against is None and not (whole and self.low >= 0 and self.high <= 9):
            raise ValueError("read: logprobs needs whole numbers from 0 to 9 as low and high, because a score must be one token")
        return self


class _Reader(Settings):
    """Settings of the kinds of reward that score text with another model and another tokenizer."""

    kind: Literal["model", "classifier"]
    template: str | None = Field(None, description="input of the model as a text with {prompt} and {completion}; null appends the completion to the prompt")
    batch_size: PositiveInt = Field(16, description="completions per forward pass of the model at path")
    max_length: PositiveInt = Field(512, description="longest input of the model at path, in tokens; the model's number of positions is also a limit; a longer input loses its start")

    @model_validator(mode="after")
    def _check_template(self) -> "_Reader":
        if self.template is not None and (self.input not in ("auto", "text") or "{completion}" not in self.template):
            raise ValueError("template must contain {completion}, may contain {prompt}, and needs input: text")
        return self


class ModelRewardConfig(_Inside, _Reader):
    """The run's reward adapter, or a reward model in a folder."""

    kind: Literal["model"] = Field("model", description="the run's reward adapter, or the reward model at path")
    path: SourcePath | None = Field(None, description="folder or hub id of a *ForSequenceClassification decoder with one label and its own tokenizer, or with granularity: step of a *ForTokenClassification decoder with two labels; null uses the run's reward adapter")
    input: Literal["auto", "text", "completion", "chat"] = Field("auto", description="input of the model at path: prompt and completion as one text (text), the completion only (completion), or a chat in its chat template (chat); auto is chat for chat prompts if the model has a chat template, else text")
    end_at_eos: bool | None = Field(None, description="whether an end token is appended to a completion that ended, as in the stage reward_model; the end token is the end-of-turn token of the reward model's chat template, else its EOS; null appends the end token to texts, and in chats only the chat template decides")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="dtype in memory of the weights at path; auto keeps the dtype of the files")
    granularity: Literal["completion", "step"] = Field("completion", description="where the score is read: at the last token of the completion (completion), or at the last token of each step (step)")
    step_reward: Literal["score", "difference"] = Field("score", description="reward of a step: the score at its end, as a process reward model gives it, or the difference from the score at the end of the step before; differences add up to the score of the completion, so they suit a model of whole completions")

    @model_validator(mode="after")
    def _check_steps(self) -> "ModelRewardConfig":
        if self.step_reward == "difference" and self.granularity != "step":
            raise ValueError("step_reward has no effect without granularity: step; give both, or neither")
        if self.granularity == "step" and self.end_at_eos:
            raise ValueError("end_at_eos: true has no effect with granularity: step; leave end_at_eos out")
        return self


class ClassifierRewardConfig(_Reader):
    """A text classifier of any architecture, run by transformers with torch on the CPU."""

    kind: Literal["classifier"] = Field("classifier", description="a text classifier of any architecture, run by transformers with torch on the CPU")
    path: SourcePath = Field(description="folder or hub id of a *ForSequenceClassification model with its own tokenizer")
    label: Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)] | None = Field(None, description="name or number of the label that gives the score; null is allowed if the model has one label")
    score: Literal["logit", "probability", "log_probability"] = Field("logit", description="output for the label that is the score")
    input: Literal["auto", "text", "completion", "pair", "chat"] = Field("auto", description="input of the classifier: prompt and completion as one text (text), the completion only (completion), two segments (pair), or a chat in its chat template (chat); auto is chat for chat prompts if the model has a chat template, else text")


def _tag(section: Any) -> str | None:
    """Returns the kind of a section as "kind=NAME". No setting has a name of this form. The default kind is model."""
    if isinstance(section, dict):
        return f"kind={section.get('kind', 'model')}"
    return f"kind={section.kind}" if isinstance(section, Settings) else None


class _Weighted(Settings):
    """The additional setting of a reward that is one part of a weighted sum."""

    weight: FiniteFloat = Field(1.0, description="factor of this part's scores in the sum; a part with weight 0 is only logged")


class FunctionPart(_Weighted, FunctionRewardConfig):
    """A Python function as one part of a weighted sum."""


class HTTPPart(_Weighted, HTTPRewardConfig):
    """An HTTP server as one part of a weighted sum."""


class ModelPart(_Weighted, ModelRewardConfig):
    """A reward model as one part of a weighted sum."""


class CodeTestsPart(_Weighted, CodeTestsRewardConfig):
    """Unit tests as one part of a weighted sum."""


class JudgePart(_Weighted, JudgeRewardConfig):
    """A judge as one part of a weighted sum."""


class ClassifierPart(_Weighted, ClassifierRewardConfig):
    """A classifier as one part of a weighted sum."""


RewardPart = Annotated[
    Annotated[ModelPart, Tag("kind=model")]
    | Annotated[FunctionPart, Tag("kind=function")]
    | Annotated[ClassifierPart, Tag("kind=classifier")]
    | Annotated[HTTPPart, Tag("kind=http")]
    | Annotated[CodeTestsPart, Tag("kind=code_tests")]
    | Annotated[JudgePart, Tag("kind=judge")],
    Discriminator(_tag),
]


class SumRewardConfig(Settings):
    """A weighted sum of rewards."""

    kind: Literal["sum"] = Field("sum", description="a weighted sum of rewards")
    parts: dict[str, RewardPart] = Field(min_length=1, description="name -> a reward of another kind with a weight (default 1; 0 only logs it); each part is logged as reward/NAME")


RewardConfig = Annotated[
    Annotated[ModelRewardConfig, Tag("kind=model")]
    | Annotated[FunctionRewardConfig, Tag("kind=function")]
    | Annotated[ClassifierRewardConfig, Tag("kind=classifier")]
    | Annotated[HTTPRewardConfig, Tag("kind=http")]
    | Annotated[CodeTestsRewardConfig, Tag("kind=code_tests")]
    | Annotated[JudgeRewardConfig, Tag("kind=judge")]
    | Annotated[SumRewardConfig, Tag("kind=sum")],
    Discriminator(_tag),
]
ReadingRewardConfig = ModelRewardConfig | ClassifierRewardConfig
