"""cuDNN's attention without a GPU: what would be given to it, where, and what is refused before anything runs.

Its kernels run nowhere here. Two things stand in for them: XLA computes what `jax.nn.dot_product_attention` was
asked of cuDNN, which shows that what was asked is the same attention; and jax lowers programs for CUDA, which passes
jax's own checks of shapes and dtypes and shows where cuDNN would be called. What its kernels give, how fast they are
and how XLA splits their calls over devices is not tested.
"""

import dataclasses
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo  # jax has no other name for the check of what is installed

from jaxrlhf.config import Sampling
from jaxrlhf.errors import UserError
from jaxrlhf.hf.weights import load_pretrained, save_pretrained
from jaxrlhf.models.adapters import bind
from jaxrlhf.models.attention import attend, attend_causal, causal_mask
from jaxrlhf.models.config import DecoderConfig, LayerKind
from jaxrlhf.models.decoder import Decoder, with_target
from jaxrlhf.models.fused_attention import check_device, check_model
from jaxrlhf.models.scoring import response_logprobs, response_logprobs_and_values, sequence_scores
from jaxrlhf.models.target import Target
from jaxrlhf.records import Prompts
from jaxrlhf.rollout.decode import rollout

L = 2
SHAPE = DecoderConfig(32, 32, 48, L, 4, 2, 8, 64, stop_tokens=(1,), pad_token=0)
CUDNN = Target(attention="cudnn")
asked_of_jax = jax.nn.dot_product_attention


@pytest.fixture
def asked(monkeypatch):
    """What is asked of cuDNN, and computed by XLA."""
    seen = []

    def by_xla(q, k, v, implementation=None, **how):
        if implementation == "cudnn":
            seen.append(dict(how, T=q.shape[1], S=k.shape[1]))
            if "mask" in how:
                how["mask"] = jnp.broadcast_to(how["mask"], (q.shape[0], 1, q.shape[1], k.shape[1]))
        return asked_of_jax(q, k, v, implementation="xla", **how)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    return seen


@pytest.fixture
def as_if_installed(monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91100)


@pytest.fixture(scope="module")
def plain():
    return Decoder(SHAPE, jax.random.key(0), jnp.bfloat16)


def calls(function, *args) -> list[str]:
    """Names of the calls of cuDNN in the program for CUDA, in order."""
    text = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    return re.findall(r"stablehlo.custom_call @__cudnn\$(\w+)", text)


@pytest.mark.parametrize(("T", "S"), [(40, 40), (41, 41), (7, 40), (8, 41), (7, 41)])
def test_what_cudnn_is_asked_is_the_same_attention(asked, T, S):
    """Values and gradients: padding, several segments, queries that see nothing, odd lengths, the last queries."""
    generator = np.random.default_rng(0)
    q = generator.standard_normal((2, T, 4, 8)).astype(np.float32)
    k, v = generator.standard_normal((2, 2, S, 2, 8)).astype(np.float32)
    mask = causal_mask(np.sort(generator.integers(0, 3, (2, S))))[:, S - T :]
    weight = generator.standard_normal(q.shape).astype(np.float32) * np.asarray(mask.any(-1))[..., None, None]

    def loss(run, q, k, v):
        return jnp.sum(run(q, k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3), mask, 0.3) * weight)

    def fused(*given):
        return attend_causal(*given, target=CUDNN)

    both = [jax.value_and_grad(lambda *x, run=run: loss(run, *x), (0, 1, 2)) for run in (attend, fused)]
    found = [jax.jit(compute)(q, k, v) for compute in both]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *found)
    (how,) = asked
    assert how["T"] % 2 == how["S"] % 2 == 0, "cuDNN has no gradient of odd lengths with a mask"
    assert how["is_causal"] == (T == S)


def test_a_query_that_sees_nothing_stays_finite(asked):
    q, k, v = np.random.default_rng(2).standard_normal((3, 1, 4, 1, 8)).astype(np.float32)
    keys = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
    out = attend_causal(q, *keys, np.zeros((1, 4, 4), bool), target=CUDNN)
    assert asked and np.isfinite(out).all()


def test_a_model_computes_whole_sequences_with_it_and_nothing_else_changes(asked, plain):
    fused, tokens = with_target(plain, CUDNN), np.random.default_rng(0).integers(0, 32, (2, 9))
    mask = np.arange(9) >= np.array([0, 3])[:, None]
    expected = plain(tokens, mask)
    assert not asked, "another model's attention is what it was"
    np.testing.assert_allclose(np.where(mask[..., None], fused(tokens, mask) - expected, 0), 0, atol=0.05)  # bfloat16
    assert len(asked) == L
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(fused), strict=True):
        assert one is other
    assert plain.config.target == Target() and dataclasses.replace(fused.config, target=Target()) == plain.config


@pytest.fixture(scope="module")
def windowed():
    """A layer that sees four slots, and one that sees all."""
    kinds = (LayerKind(window=4), LayerKind())
    return Decoder(dataclasses.replace(SHAPE, layer_kinds=kinds), jax.random.key(0), jnp.float32)


def test_scoring_asks_for_no_mask_and_gives_the_same(asked, windowed):
    """Logprobs, values, scores and gradients of rows with padding on both sides, and of an empty completion."""
    P, R, prompts, answers = 5, 4, np.array([5, 2, 1]), np.array([4, 1, 0])
    mask = (np.arange(P + R) >= P - prompts[:, None]) & (np.arange(P + R) < P + answers[:, None])
    tokens = np.random.default_rng(0).integers(0, 32, (3, P + R))
    kernel = np.random.default_rng(1).standard_normal((32, 1)).astype(np.float32)

    def outputs(factor, target):
        model = bind(with_target(windowed, target), {"score": {"kernel": factor * kernel}})
        logprobs, _, values = response_logprobs_and_values(model, tokens, mask, mask[:, P:], np.ones(3, np.float32))
        return jnp.sum(values) + jnp.sum(logprobs), (logprobs, values, sequence_scores(model, tokens, mask))

    run = jax.jit(jax.value_and_grad(outputs, has_aux=True), static_argnums=1)
    expected = run(1.0, Target())
    assert not asked
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), run(1.0, CUDNN), expected)
    assert len(asked) == 2 * L and not any("mask" in how or "bias" in how for how in asked)
    assert [how["local_window_size"] for how in asked] == [(3, 0), None] * 2


def test_programs_for_cuda_build_no_bias_in_scoring(as_if_installed, plain):
    fused, tokens = with_target(plain, CUDNN), np.ones((2, 9), np.int32)
    mask = np.ones((2, 9), bool)

    def loss(model):
        return response_logprobs(model, tokens, mask, mask[:, 4:], np.ones(2, np.float32))[0].sum()

    found = calls(jax.grad(loss, allow_int=True), fused)
    assert found == ["fmhaSoftmax"] * L + ["fmhaSoftmaxBackward"] * L


def test_it_is_a_matter_of_the_run_and_not_saved_with_the_model(plain, tmp_path):
    save_pretrained(tmp_path / "model", with_target(plain, CUDNN))
    assert load_pretrained(tmp_path / "model", "bfloat16")[0].config.target.attention == "xla"


@pytest.mark.parametrize("first", [0, 4])
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_programs_for_cuda_call_it_forward_and_backward(as_if_installed, plain, first, remat):
    fused, tokens = with_target(plain, CUDNN), np.ones((2, 9), np.int32)

    def loss(model):
        return model.logits(model.encode(tokens, tokens, remat, first)).sum()

    forward, backward = "fmhaScaleBiasSoftmax", "fmhaScaleBiasSoftmaxBackward"
    found = calls(jax.grad(loss, allow_int=True), fused)
    assert found.count(backward) == L
    assert found.count(forward) == (L if remat == "none" else 2 * L)  # computed again
    assert calls(loss, fused) == [forward] * L
    assert not calls(loss, plain)


def test_decoding_calls_it_for_the_prompts_alone(as_if_installed, plain):
    prompts = Prompts(np.ones((2, 6), np.int32), np.ones((2, 6), bool))
    given = prompts, jax.random.key(0), Sampling(max_new_tokens=4)
    found = calls(lambda base: rollout(base, None, *given), with_target(plain, CUDNN))
    assert found == ["fmhaScaleBiasSoftmax"] * (L - 1), "the last layer has but the last query of the prompt"


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "tensor", "said"),
    [
        ({"attention_softcap": 50.0}, 1, "does not support a soft cap .*50; use xla"),
        ({"head_dim": 20}, 1, "multiple of 8 .*head_dim is 20; use xla"),
        ({"head_dim": 512}, 1, "at most 256, .*head_dim is 512; use xla"),
        ({}, 4, "mesh.tensor must divide .*query heads .4. .*key heads .2., but mesh.tensor is 4"),
        ({}, 2, None),
        ({"head_dim": 256}, 1, None),
    ],
    ids=["softcap", "multiple", "large", "split", "split evenly", "fits"],
)
def test_a_model_that_cudnn_cannot_compute_is_one_line(change, tensor, said):
    model = dataclasses.replace(SHAPE, **change)
    if said is None:
        return check_model(model, tensor)
    with pytest.raises(UserError, match=f"model.attention: .*cudnn.* .*{said}") as error:
        check_model(model, tensor)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("device", "head_dim", "said"),
    [
        (("cpu", "cpu", None), 64, "needs an NVIDIA GPU, but this machine has cpu"),
        (("gpu", "rocm 6", "gfx942"), 64, "needs an NVIDIA GPU"),
        (("gpu", "PJRT C API\ncuda 12080", "8.0"), 256, "head_dim is 256; .* or newer"),
        (("gpu", "PJRT C API\ncuda 12080", "9.0"), 64, "does not work on this machine .cuDNN is not detected"),
    ],
    ids=["cpu", "amd", "ampere", "no cudnn"],
)
def test_a_machine_without_it_is_one_line(monkeypatch, device, head_dim, said):
    platform, version, capability = device
    found = SimpleNamespace(platform=platform, device_kind="one", compute_capability=capability,
                            client=SimpleNamespace(platform_version=version))  # fmt: skip
    monkeypatch.setattr(jax, "local_devices", lambda: [found])
    with pytest.raises(UserError, match=f"model.attention: .*cudnn.* .*{said}") as error:
        check_device(dataclasses.replace(SHAPE, head_dim=head_dim), "bfloat16")
    assert "\n" not in str(error.value)


def test_a_machine_with_it_is_tried_forward_and_backward(monkeypatch, asked):
    """XLA stands for cuDNN: what is tried runs."""
    found = SimpleNamespace(platform="gpu", device_kind="one", compute_capability="9.0",
                            client=SimpleNamespace(platform_version="cuda 12080"))  # fmt: skip
    monkeypatch.setattr(jax, "local_devices", lambda: [found])
    check_device(SHAPE, "bfloat16")
    assert len(asked) == 2, "with a mask and without one"
