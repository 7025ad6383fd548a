"""A tiny decoder with weights that hide no mistake, unevenly padded prompts, and the programs, each compiled once."""

import atexit
import os
import shutil
import signal
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

# Before jax is imported: whatever the tests compile stays out of the home folder, and what two of them compile, also in
# processes of their own, is compiled once.
if "PYTEST_XDIST_WORKER" not in os.environ:  # else the first process has done so
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxrlhf-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
    # Programs are small and run a few times: compiling them takes the time. XLA's own passes stay, LLVM's slow ones go,
    # and LLVM's code for fusions is written directly, where XLA can still do so: that halves the time.
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    if version("jaxlib").startswith("0.10."):  # newer ones end at a flag that they do not know
        quick += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}".strip()

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import Processes

from jaxrlhf.config import AdapterConfig, OptimizerConfig, PPOConfig, Sampling
from jaxrlhf.models.adapters import init_adapter
from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.decoder import abstract_decoder, named_parameters, with_parameters
from jaxrlhf.models.scoring import response_logprobs
from jaxrlhf.models.target import target_of
from jaxrlhf.records import Prompts
from jaxrlhf.rollout.decode import rollout
from jaxrlhf.steps.annotate import annotate, build_experience
from jaxrlhf.steps.ppo import init_ppo, ppo_update

# Under nohup, or as a shell's background job, signals are ignored that the tests send to what they start.
for number, usual in {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}.items():
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, usual)

V, P, R = 12, 5, 6
PROMPT_LENGTHS = (5, 3, 1, 4, 2, 5, 3, 1)
STOPS, PAD = (4, 9), 0


@pytest.fixture(autouse=True, scope="module")
def few_maps():
    """Lets go of compiled programs where they are many: Linux kills a process that maps more than 65,530 areas."""
    yield
    maps = "/proc/self/maps"
    if os.path.exists(maps):
        with open(maps) as lines:
            if sum(1 for _ in lines) > 25_000:
                jax.clear_caches()


@pytest.fixture(scope="session")
def processes(tmp_path_factory):
    """Starts processes: see `processes.Processes`. They end with the test that started them, or with the session."""
    started = Processes(lambda: tmp_path_factory.mktemp("process"))
    yield started
    started.end()


@pytest.fixture(autouse=True)
def no_process_is_left(processes):
    before = processes.count()  # those of fixtures with a wider scope
    yield
    processes.end(beyond=before)


@pytest.fixture(scope="session")
def texts():
    """The folder with rows of public sets: tinystories.jsonl, preferences.jsonl, gsm8k/{train,test}.jsonl."""
    return Path(__file__).parent / "data" / "files"


@pytest.fixture(scope="session")
def stories260k(texts):
    """The folder of a small Llama that was trained on stories, as Hugging Face stores models."""
    return texts / "stories260K"


@pytest.fixture(scope="session")
def make_decoder():
    """`make_decoder(layers=1, vocabulary=V, stop_tokens=STOPS, dtype=float32, scale=0.4, **more)`: weights drawn by
    numpy; logits have a deviation of about 1.5; `more` goes into the config."""

    def make(layers=1, vocabulary=V, stop_tokens=STOPS, dtype=jnp.float32, scale=0.4, seed=3, **more):
        more = {"target": target_of(), **more}  # on a GPU the tests run a GPU's programs
        config = DecoderConfig(
            vocab_size=vocabulary, hidden_size=16, intermediate_size=24, layers=layers, heads=2, kv_heads=1,
            head_dim=8, max_positions=64, stop_tokens=stop_tokens, pad_token=PAD, **more,
        )  # fmt: skip
        generator = np.random.default_rng(seed)
        abstract, values = abstract_decoder(config, dtype), {}
        for name, leaf in named_parameters(abstract).items():
            noise = scale * generator.standard_normal(leaf.shape)
            values[name] = jnp.asarray(1 + noise if "norm" in name else noise, leaf.dtype)
        return with_parameters(abstract, values)

    return make


@pytest.fixture(scope="session")
def tiny(make_decoder):
    """One layer, V tokens; an answer ends with token 4 or 9, pad is 0."""
    return make_decoder()


@pytest.fixture(scope="session")
def make_adapter():
    """`make_adapter(base, seed, head=None, moved=True)`: a LoRA adapter; `moved` away from what the base computes.
    `targets` fewer than all layers compile faster."""

    def make(base, seed, head=None, moved=True, rank=2, targets=("all-linear",)):
        config = AdapterConfig(rank=rank, alpha=2.0 * rank, target_modules=targets)
        adapter = init_adapter(base, config, jax.random.key(seed), head)
        if not moved:
            return adapter
        generator = np.random.default_rng(seed)
        return {
            path: {
                name: leaf if name == "lora_scale" else leaf + jnp.float32(0.15 * generator.standard_normal(leaf.shape))
                for name, leaf in leaves.items()
            }
            for path, leaves in adapter.items()
        }

    return make


@pytest.fixture(scope="session")
def prompts():
    """Eight prompts of 1 to 5 tokens, padded on the left with 0."""
    tokens = np.random.default_rng(8).integers(3, V, (len(PROMPT_LENGTHS), P)).astype(np.int32)
    mask = np.arange(P) >= P - np.array(PROMPT_LENGTHS)[:, None]
    return Prompts(tokens=jnp.asarray(np.where(mask, tokens, PAD)), mask=jnp.asarray(mask))


@pytest.fixture(scope="session")
def sampling():
    return Sampling(max_new_tokens=R)


@pytest.fixture(scope="session")
def programs():
    """The package's functions under `jax.jit`, shared so that equal shapes compile once."""
    return SimpleNamespace(
        rollout=jax.jit(rollout),
        annotate=jax.jit(annotate, static_argnames=("microbatches", "recompute_policy", "value_trunk", "packed")),
        experience=jax.jit(build_experience, static_argnames=("estimator", "whiten_rewards", "whiten_advantages")),
        update=jax.jit(ppo_update),
        logprobs=jax.jit(response_logprobs),
        forward=jax.jit(lambda base, tokens, mask: base(tokens, mask)),
    )


@pytest.fixture(scope="session")
def roles(tiny, make_adapter):
    """Policy and value on `tiny`, both moved away from the base; the reference is the base."""
    return SimpleNamespace(policy=make_adapter(tiny, 1), value=make_adapter(tiny, 2, head="value"), reference=None)


@pytest.fixture(scope="session")
def scores():
    """Eight scores, fractional and of both signs."""
    return jnp.asarray(np.random.default_rng(4).standard_normal(8), jnp.float32)


@pytest.fixture(scope="session")
def sampled(programs, tiny, roles, prompts, sampling):
    """A rollout at temperature 1: answers of one to six tokens, not all ended."""
    return programs.rollout(tiny, roles.policy, prompts, jax.random.key(5), sampling)


@pytest.fixture(scope="session")
def experience(programs, tiny, roles, sampled, scores):
    """What PPO learns from `sampled`."""
    noted = programs.annotate(tiny, roles.policy, roles.value, roles.reference, sampled)
    return programs.experience(sampled, noted, scores, 0.1)[0]


@pytest.fixture(scope="session")
def sixteen():
    """Four epochs of four minibatches."""
    rate = OptimizerConfig(learning_rate=1e-4)
    return PPOConfig(epochs=4, minibatches=4, optimizer=rate, value_optimizer=rate)


@pytest.fixture(scope="session")
def start(roles, sixteen):
    """The PPO state before the first update."""
    return init_ppo(roles.policy, roles.value, sixteen)


@pytest.fixture(scope="module")
def choices():
    from small_models import ANSWERS

    from jaxrlhf.models.choices import Choices

    return Choices.of(ANSWERS)
