"""A pretrained reward model as a reward: its own base and tokenizer, against transformers and against `ModelReward`."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxrlhf.config import MeshConfig, ModelRewardConfig
from jaxrlhf.data.chats import Chat
from jaxrlhf.data.tokenizers import build_word_tokenizer, load_tokenizer
from jaxrlhf.distributed.mesh import make_mesh
from jaxrlhf.errors import UserError
from jaxrlhf.hf.classifiers import save_sequence_classifier
from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.decoder import abstract_decoder, named_parameters, with_parameters
from jaxrlhf.models.target import target_of
from jaxrlhf.rewards.functions import RewardFault
from jaxrlhf.rewards.load import load_rewards
from jaxrlhf.rewards.model import ModelReward
from jaxrlhf.rewards.pretrained import PretrainedReward
from jaxrlhf.rewards.reading import check_chats, readings

OTHER = ["?", ".", "not", "so", "very", "bad", "good", "it", "is", "<user>", "<assistant>"]  # not the policy's ids
CHAT = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ '<' + m.role + '> ' + m.content + ' <eos>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def make_base(tokenizer):
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=24, layers=1, heads=2, kv_heads=1,
        head_dim=8, max_positions=64, tie_embeddings=True, bos_token=1, stop_tokens=(2,), pad_token=0,
    )  # fmt: skip
    noise = np.random.default_rng(2)
    abstract = abstract_decoder(config)
    values = {
        name: jax.numpy.asarray(0.4 * noise.standard_normal(leaf.shape) + ("norm" in name), leaf.dtype)
        for name, leaf in named_parameters(abstract).items()
    }
    return with_parameters(abstract, values)


def head(seed=3):
    return {"score": {"kernel": jax.numpy.asarray(np.random.default_rng(seed).standard_normal((16, 1)), np.float32)}}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A reward model with words in another order, and a chat template."""
    path = tmp_path_factory.mktemp("reward") / "model"
    tokenizer = build_word_tokenizer(OTHER, chat_template=CHAT)
    save_sequence_classifier(path, make_base(tokenizer), head(), tokenizer)
    return path


@pytest.fixture
def make(mesh):
    return lambda path, **settings: PretrainedReward(ModelRewardConfig(path=str(path), **settings), mesh, "ppo.reward")


def direct(folder, text):
    """The score of one text, special tokens spelt out, by transformers alone."""
    torch = pytest.importorskip("torch", reason="torch is the reference")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ids = load_tokenizer(str(folder)).fast(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(ids).logits[0, 0].item()


def test_an_exported_reward_adapter_scores_as_it_did_in_its_run(make, answered, rows, policy_tokenizer, tmp_path):
    """The same tokens, through text and back: the EOS where an answer ended, none where it did not."""
    base = make_base(policy_tokenizer)
    save_sequence_classifier(tmp_path / "out", base, head(), policy_tokenizer)
    completions = answered(rows)
    expected = np.asarray(ModelReward(base, head())(completions))
    assert expected.std() > 0.1
    scores = make(tmp_path / "out")(completions)
    assert scores.shape == (6,) and scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    without = make(tmp_path / "out", end_at_eos=False)(completions)
    ended = np.asarray(completions.rollout.ended)
    assert (np.abs(without - expected)[ended] > 1e-3).all()
    np.testing.assert_allclose(without[~ended], expected[~ended], atol=1e-5)


def test_its_products_are_as_exact_as_the_run_s(mesh, folder):
    loaded = load_rewards(ModelRewardConfig(path=str(folder)), mesh, "ppo.reward", matmul_precision="tf32")
    assert loaded[""][0].base.config.target == target_of(mesh, "tf32")


def test_another_tokenizer_reads_the_text(make, folder, answered, rows):
    completions = answered(rows)
    expected = [direct(folder, f"<bos> {p} {c}" + " <eos>" * ended) for p, c, ended in rows]
    assert np.std(expected) > 0.1
    for size in (1, 4, 16):
        np.testing.assert_allclose(make(folder, batch_size=size)(completions), expected, atol=1e-4)
    expected = [direct(folder, f"<bos> {c}" + " <eos>" * ended) for p, c, ended in rows]
    np.testing.assert_allclose(make(folder, input="completion")(completions), expected, atol=1e-4)
    spelt = make(folder, template="{completion} ? {prompt}", end_at_eos=False)(completions)
    np.testing.assert_allclose(spelt, [direct(folder, f"<bos> {c} ? {p}") for p, c, _ in rows], atol=1e-4)


def test_a_chat_goes_through_the_models_own_template(make, folder, answered):
    chat = Chat([{"role": "user", "content": "is it bad"}])
    rows = [("is it bad", "not bad", True), ("is it bad", "not", False), ("is it", "good", True)]
    completions = answered(rows, chats=[chat, chat, None])
    texts = ["<user> is it bad <eos> <assistant> not bad <eos>", "<user> is it bad <eos> <assistant> not <eos>"]
    expected = [direct(folder, text) for text in [*texts, "<bos> is it good <eos>"]]
    np.testing.assert_allclose(make(folder)(completions), expected, atol=1e-4)
    np.testing.assert_allclose(make(folder, end_at_eos=True)(completions), expected, atol=1e-4)
    expected[2] = direct(folder, "<user> is it <eos> <assistant> good <eos>")  # a text as a user's turn
    np.testing.assert_allclose(make(folder, input="chat")(completions), expected, atol=1e-4)
    read = [direct(folder, f"<bos> is it bad {c}" + " <eos>" * ended) for _, c, ended in rows[:2]]
    np.testing.assert_allclose(make(folder, input="text")(completions)[:2], read, atol=1e-4)


def test_steps_are_read_in_one_pass_at_their_ends(make, folder, answered, rows):
    """The score at a step's end is that of the text cut there, the last with the EOS of an answer that ended."""
    completions, settings = answered(rows), {"granularity": "step", "step_separator": "."}
    reward = make(folder, **settings)
    rewards = reward(completions)
    bos = "<bos> is it so very very bad"
    ends = "it is so very very very bad .", "it is so very very very bad . so bad . <eos>"
    long = [direct(folder, f"{bos} {text}") for text in ends]
    assert reward.by_step and reward.program.compiles <= 2
    np.testing.assert_allclose(rewards[4].compressed(), long, atol=1e-4)
    assert np.flatnonzero(~np.ma.getmaskarray(rewards)[4]).tolist() == [7, 11]
    whole = make(folder)(completions)
    last = completions.response_mask.sum(axis=1) - 1
    np.testing.assert_allclose(rewards[np.arange(6), last], whole, atol=1e-5)
    progress = make(folder, step_reward="difference", **settings)(completions)
    np.testing.assert_allclose(progress[4].compressed(), [long[0], long[1] - long[0]], atol=1e-4)
    np.testing.assert_allclose(progress.filled(0).sum(axis=1), whole, atol=1e-5)
    short = make(folder, max_length=5, **settings)(completions)[4]  # <bos> so bad . <eos>
    assert short.compressed().tolist() == [pytest.approx(direct(folder, "<bos> so bad . <eos>"), abs=1e-4)]
    template = make(folder, template="{completion} ? {prompt}", **settings)(completions)[4]
    read = f"{ends[1].removesuffix('<eos>')} ? is it so very very bad <eos>"
    read = [direct(folder, f"<bos> {ends[0]}"), direct(folder, f"<bos> {read}")]
    np.testing.assert_allclose(template.compressed(), read, atol=1e-4)


def test_steps_of_a_chat(make, folder, answered):
    chat = Chat([{"role": "user", "content": "is it"}])
    completions = answered([("is it", "so bad . not .", True), ("is it", "good", False)], chats=[chat, chat])
    rewards = make(folder, granularity="step", step_separator=".")(completions)
    texts = ["so bad .", "so bad . not . <eos>"], ["good <eos>"]
    for row, prefixes in zip(rewards, texts):
        scores = [direct(folder, f"<user> is it <eos> <assistant> {text}") for text in prefixes]
        np.testing.assert_allclose(row.compressed(), scores, atol=1e-4)


def test_a_token_classifier_gives_the_probability_of_label_1(make, folder, tmp_path, answered, rows):
    """A process reward model as TRL writes it; without steps it is refused."""
    torch = pytest.importorskip("torch", reason="torch is the reference")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(folder, num_labels=2)
    model = transformers.AutoModelForTokenClassification.from_config(config).eval()
    with torch.no_grad():
        model.score.weight.normal_()
        model.score.bias.normal_()
    model.save_pretrained(tmp_path)
    load_tokenizer(str(folder)).save(str(tmp_path))
    rewards = make(tmp_path, granularity="step", step_separator=".")(answered(rows))
    text = "<bos> is it so very very bad it is so very very very bad . so bad . <eos>"
    ids = load_tokenizer(str(folder)).fast(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        probabilities = model(ids).logits.softmax(-1)[0, [14, -1], 1].numpy()
    assert abs(probabilities - 0.5).min() > 0.05
    np.testing.assert_allclose(rewards[4].compressed(), probabilities, atol=1e-5)
    with pytest.raises(UserError, match=r"architectures must be .*ForSequenceClassification"):
        make(tmp_path)


def test_an_answer_that_goes_on_from_a_beginning_is_one_turn(make, folder, answered):
    chat = Chat([{"role": "user", "content": "is it"}, {"role": "assistant", "content": "it is "}], continued=True)
    completions = answered([("is it it is", "not bad", True)], chats=[chat])
    whole = direct(folder, "<user> is it <eos> <assistant> it is not bad <eos>")
    np.testing.assert_allclose(make(folder)(completions), [whole], atol=1e-4)
    np.testing.assert_allclose(make(folder, end_at_eos=True)(completions), [whole], atol=1e-4)
    with_text = direct(folder, "<bos> is it it is not bad <eos>")
    np.testing.assert_allclose(make(folder, input="text")(completions), [with_text], atol=1e-4)
    reward = make(folder)
    check_chats(SimpleNamespace(texts=["is it"], chats=[chat]), reward.config, reward.chats)


def test_tools_and_template_arguments_reach_the_models_own_template(make, answered, tmp_path):
    more = "{% for t in tools or [] %}{{ t.name + ' ' }}{% endfor %}{% if so %}{{ 'so ' }}{% endif %}" + CHAT
    tokenizer = build_word_tokenizer(OTHER, chat_template=more)
    save_sequence_classifier(tmp_path, make_base(tokenizer), head(), tokenizer)
    messages = [{"role": "user", "content": "is it"}]
    chats = [Chat(messages, [{"name": "?"}], {"so": True}), Chat(messages)]
    whole = "<user> is it <eos> <assistant> good <eos>"
    wanted = [tokenizer.fast(text, add_special_tokens=False)["input_ids"] for text in (f"? so {whole}", whole)]
    completions = answered([("is it", "good", True)] * 2, chats=chats)
    reward = make(tmp_path)
    assert reward.encode(readings(completions, reward.config, True), completions.ended) == wanted


def test_a_template_that_writes_on_after_the_eos(make, answered, tmp_path):
    """It is read to its last character, whatever it opens a turn with; or to the EOS, as in the stage reward_model."""
    written = CHAT.replace("<eos>\n", "<eos> ?\n").replace("'<assistant> '", "'<assistant> so '")
    tokenizer = build_word_tokenizer(OTHER, chat_template=written)
    save_sequence_classifier(tmp_path / "out", make_base(tokenizer), head(), tokenizer)
    completions = answered([("is it", "good", True)], chats=[Chat([{"role": "user", "content": "is it"}])])
    whole = direct(tmp_path / "out", "<user> is it <eos> ? <assistant> good <eos> ?")
    np.testing.assert_allclose(make(tmp_path / "out")(completions), [whole], atol=1e-4)
    tokenizer = build_word_tokenizer(OTHER, chat_template=written.replace(" ?", ""))
    save_sequence_classifier(tmp_path / "blank", make_base(tokenizer), head(), tokenizer)
    prompt, answer = tokenizer.encode_pair(completions.chats[0], "good")
    cut = direct(tmp_path / "blank", " ".join(tokenizer.fast.convert_ids_to_tokens(prompt + answer)))
    np.testing.assert_allclose(make(tmp_path / "blank", end_at_eos=True)(completions), [cut], atol=1e-4)


def test_prompts_that_the_template_refuses_are_found_beforehand(make, folder):
    good, bad = (Chat([{"role": role, "content": "is it"}]) for role in ("user", "tool"))
    prompts = SimpleNamespace(texts=["is it"] * 3, chats=[good, None, bad])
    reward = make(folder)
    with pytest.raises(UserError, match=r"prompt 3: the chat template of .* no tools"):
        check_chats(prompts, reward.config, reward.chats)
    reward = make(folder, input="text")
    check_chats(prompts, reward.config, reward.chats)


def test_a_model_that_pads_with_eos_is_read_before_it(make, folder, answered, rows, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    document = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(document | {"pad_token_id": 2}))
    expected = [direct(tmp_path, f"<bos> {p} {c}" + " <eos>" * ended) for p, c, ended in rows]
    np.testing.assert_allclose(make(tmp_path)(answered(rows)), expected, atol=1e-4)
    np.testing.assert_allclose(make(folder, end_at_eos=False)(answered(rows)), expected, atol=1e-4)


def test_texts_of_about_one_length_share_a_shape(make, folder, answered):
    """At most four lengths, each compiled once; what is too long loses its start, BOS excepted."""
    reward = make(folder)
    assert reward.lengths == [8, 16, 32, 64] and reward.max_length == 64  # the model's positions
    rows = [("is it", "good " * count + "bad", count % 2 == 0) for count in (1, 20, 2, 90, 9, 59, 5, 12)]
    expected = [direct(folder, f"<bos> {p} {c}" + " <eos>" * ended) for p, c, ended in rows if c.count("g") < 90]
    reward.config = reward.config.model_copy(update={"batch_size": 2})
    for _ in range(2):
        scores = reward(answered(rows))
        np.testing.assert_allclose(np.delete(scores, 3), expected, atol=1e-4)
    np.testing.assert_allclose(scores[3], direct(folder, "<bos> " + "good " * 61 + "bad <eos>"), atol=1e-4)
    assert reward.program.compiles == 4
    short = make(folder, max_length=5)
    assert short.lengths == [5]
    np.testing.assert_allclose(short(answered(rows))[2], direct(folder, "<bos> good good bad <eos>"), atol=1e-4)


def test_an_empty_text_is_its_eos(make, folder, answered, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    document = json.loads((tmp_path / "tokenizer.json").read_text()) | {"post_processor": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    assert load_tokenizer(str(tmp_path)).prefix_ids == []
    scores = make(tmp_path, input="completion")(answered([("is it", "", True), ("is it", "good", False)]))
    np.testing.assert_allclose(scores, [direct(folder, "<eos>"), direct(folder, "good")], atol=1e-4)


ON_A_MESH = """
import sys
import jax, numpy as np
from jaxrlhf.config import MeshConfig, ModelRewardConfig
from jaxrlhf.data.tokenizers import build_word_tokenizer
from jaxrlhf.records import Rollout
from jaxrlhf.rewards.completions import Completions
from jaxrlhf.rewards.pretrained import PretrainedReward
from jaxrlhf.rewards.reading import readings
from jaxrlhf.distributed.mesh import make_mesh, shard_batch

assert len(jax.devices()) == 4
words = build_word_tokenizer(["is", "it", "good", "bad"])
tokens, mask = np.arange(4, 8)[None] * np.ones((8, 1), int), np.arange(4)[None] < np.arange(8)[:, None] // 2 + 1
rollout = Rollout(tokens, mask, mask[:, 2:], np.zeros((8, 2)), np.arange(8) % 2 == 0, np.zeros(8))
for shape in ({"data": 1}, {"data": 2, "tensor": 2}, {"data": 2, "fsdp": 2}):
    mesh = make_mesh(MeshConfig(**shape), jax.devices()[: np.prod(list(shape.values()))])
    reward = PretrainedReward(ModelRewardConfig(path=sys.argv[1], batch_size=4), mesh, "ppo.reward")
    split = [not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(reward.base)]
    scores = reward(Completions(shard_batch(mesh, rollout), ["is it"] * 8, [{}] * 8, words))
    print(any(split), *scores)
"""


def test_scores_are_the_same_on_a_mesh(folder, processes):
    done = processes.run("-c", ON_A_MESH, folder, devices=4)
    (split, *one), *others = [line.split() for line in done.output.splitlines()]
    assert split == "False" and np.std(np.float32(one)) > 0.1
    for split, *scores in others:
        assert split == "True"
        np.testing.assert_allclose(np.float32(scores), np.float32(one), atol=1e-5)


def test_folders_that_cannot_be_used(make, folder, tmp_path):
    tokenizer = build_word_tokenizer(OTHER)
    base = make_base(tokenizer)
    save_sequence_classifier(tmp_path / "mute", base, head())
    save_sequence_classifier(tmp_path / "narrow", base, head(), build_word_tokenizer([*OTHER, "more"]))
    save_sequence_classifier(tmp_path / "plain", base, head(), tokenizer)
    for path, settings, words in (
        (tmp_path / "absent", {}, "absent: no such folder"),
        (tmp_path / "mute", {}, "ppo.reward.path: .*mute has no tokenizer"),
        (tmp_path / "narrow", {}, "ppo.reward.path: .* 16 tokens, but the model has only 15"),
        (tmp_path / "plain", {"input": "chat"}, "ppo.reward.input: .* no chat template"),
    ):
        with pytest.raises(UserError, match=words):
            make(path, **settings)


def test_a_score_that_is_no_number_is_a_fault(make, folder, answered, rows):
    reward = make(folder)
    reward.adapter = {"score": {"kernel": reward.adapter["score"]["kernel"] * np.nan}}
    with pytest.raises(RewardFault, match="returned nan for completion 0 of 6"):
        reward(answered(rows))


def test_what_stands_between_prompt_and_answer_is_kept(answered):
    """Words are joined by blanks, which belong to no word: an answer alone has lost the one before it."""
    completions = answered([("is it", "good bad", True), ("", "so", False), ("is  it ", "", True)])
    assert completions.texts == [" good bad", "so", ""]
    assert dataclasses.replace(completions).ended == [True, False, True]
