"""Episodes of several turns: their tokens, logprobs and masks, without a run."""

import contextlib
import functools
import itertools

import jax
import numpy as np
import pytest

from jaxrlhf.config import MeshConfig, PPOStageConfig
from jaxrlhf.data.tokenizers import build_word_tokenizer
from jaxrlhf.distributed.mesh import fetch, make_mesh
from jaxrlhf.errors import Fault, UserError
from jaxrlhf.models.adapters import bind
from jaxrlhf.stages.episodes import Player, context_lengths, episode_seeds, make_environments
from jaxrlhf.stages.programs import rollout_program

WORDS = ["a", "b", "c", "user", "assistant", "end", "go", "on", "now", "stay", "x", "y"]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
EOS = 2


class Talk:
    """Ends after a number of turns that follows from the seed; what it says depends on what it heard."""

    def __init__(self, chat=False, long=0):
        self.chat, self.long = chat, long

    def reset(self, seed=None, options=None):
        self.random = np.random.default_rng(seed)
        self.left, self.heard = int(self.random.integers(1, 5)), []
        text = " ".join(self.random.choice(WORDS[:3], self.random.integers(1, 4)))
        return ([{"role": "user", "content": text}] if self.chat else text), {}

    def step(self, action):
        self.heard.append(action)
        self.left -= 1
        text = "go on " + ("now " if "a" in action.split() else "") + "x " * self.long
        message = [{"role": "user", "content": text.strip()}]
        return (message if self.chat else text.strip()), float(len(self.heard)), self.left == 0, False, {}


def make(**arguments):
    return Talk(**arguments)


class Late(Talk):
    """Says only at the end that it was a success, and changes the row that it is given."""

    def reset(self, seed=None, options=None):
        options["words"].append(options.pop("first"))
        return super().reset(seed)

    def step(self, action):
        *result, _ = super().step(action)
        return *result, {"success": True} if result[2] else {}


@pytest.fixture(scope="module")
def tokenizer():
    return build_word_tokenizer(WORDS, chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def decoder(make_decoder):
    return make_decoder(layers=2, vocabulary=len(WORDS) + 4, stop_tokens=(EOS,))


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def program(decoder, mesh):
    return rollout_program(mesh, decoder)


@pytest.fixture
def player_of(tokenizer, decoder, program, mesh):
    with contextlib.ExitStack() as stack:

        def make(rows=8, factory="test_episodes:make", say=lambda line: None, max_new_tokens=3, **environment):
            given = {"factory": factory, "max_turns": 4, "max_episode_tokens": 24, "mode": "sequential"} | environment
            config = PPOStageConfig.model_validate(
                {"environment": given, "max_prompt_tokens": 8, "sampling": {"max_new_tokens": max_new_tokens}}
            )
            environments = make_environments(config, decoder, tokenizer, rows, say)
            stack.enter_context(contextlib.closing(environments))
            return Player(config, mesh, program, decoder, tokenizer, environments)

        yield make


def play(player, rows=8, seed=0):
    key = jax.random.key(seed)
    return player.play(None, [{}] * rows, episode_seeds(key, rows).tolist(), key)


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_logprobs_of_an_episode_are_those_of_one_forward_pass(player_of, decoder, chat):
    """Over its tokens alone, without padding: 1e-5."""
    episodes = play(player_of(arguments={"chat": chat}))
    rollout = fetch(episodes.rollout)
    forward, R = jax.jit(lambda tokens, mask: jax.nn.log_softmax(bind(decoder, None)(tokens, mask))), 24
    turns = 0
    for i in range(8):
        real = rollout.mask[i]
        ids = rollout.tokens[i][real]
        padded = np.zeros((1, 40), np.int32)
        padded[0, : len(ids)] = ids
        logprobs = np.asarray(forward(padded, np.arange(40)[None] < len(ids)))[0]
        wanted = logprobs[np.arange(len(ids) - 1), ids[1:]]
        own = rollout.response_mask[i]
        places = np.cumsum(real)[-R:][own] - 2
        np.testing.assert_allclose(rollout.sample_logprobs[i][own], wanted[places], atol=1e-5)
        assert not rollout.sample_logprobs[i][~own].any()
        turns = max(turns, (~np.ma.getmaskarray(episodes.turn_rewards)[i]).sum())
    assert turns >= 3, "some episode must have several turns"


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_tokens_of_an_episode_are_those_of_its_conversation(player_of, tokenizer, chat):
    """The words of both sides in turn; in a chat exactly what the template writes, if every turn ended itself."""
    player, compared = player_of(arguments={"chat": chat}), {"whole": 0, "unfinished": 0}
    draws = [play(player, seed=seed) for seed in range(60)]
    fetched = [fetch(episodes.rollout) for episodes in draws]
    for (episodes, rollout), i in itertools.product(zip(draws, fetched), range(8)):
        given, conversation, own = episodes.turn_rewards[i], episodes.conversations[i], rollout.response_mask[i]
        ids = rollout.tokens[i][rollout.mask[i]].tolist()
        sides, texts = ([turn[name] for turn in conversation] for name in ("role", "text"))
        assert sides == ["environment", *["policy", "environment"] * (len(sides) // 2)]
        rewards = [turn["reward"] for turn in conversation if turn["role"] == "policy"]
        assert rewards == given.compressed().tolist() == list(range(1, len(rewards) + 1))
        ends = np.flatnonzero(~np.ma.getmaskarray(given))
        assert own[ends].all() and not np.append(own, False)[ends + 1].any()
        stopped = [rollout.tokens[i, 8 + end] == EOS for end in ends]
        assert rollout.ended[i] == (stopped[-1] and episodes.metrics["environment/truncated"][i] == 0)
        if not chat:
            assert tokenizer.decode(ids).split() == [word for text in texts[:-1] for word in text.split()]
        elif not all(stopped[:-1]):  # an unfinished turn is ended by the environment's tokens
            first = ends[stopped.index(False)]
            assert rollout.tokens[i, 8 + first + 1] == EOS and not own[first + 1]
            compared["unfinished"] += 1
        elif all(stopped) and min(rollout.tokens[i, 8:][own]) >= EOS and len(ends) > 1:
            names = {"environment": "user", "policy": "assistant"}
            messages = [
                {"role": names[side], "content": text.removeprefix("user: ").strip()}
                for side, text in zip(sides[:-1], texts)
            ]
            assert ids == next(tokenizer.encode_chats([messages]))
            compared["whole"] += 1
    assert all(compared.values()) or not chat


def test_rows_do_not_depend_on_each_other(player_of):
    """Neither on rows whose episode is over, nor on how many rows there are; two draws differ."""
    eight, four, again, other = (
        play(player_of(rows), rows, seed) for rows, seed in ((8, 0), (4, 0), (8, 0), (8, 1))
    )
    one, two, three, four_ = (fetch(episodes.rollout) for episodes in (eight, four, again, other))
    jax.tree.map(np.testing.assert_array_equal, one, three)
    for name in ("tokens", "response_mask", "ended"):
        np.testing.assert_array_equal(getattr(one, name)[:4], getattr(two, name))
    np.testing.assert_allclose(one.sample_logprobs[:4], two.sample_logprobs, atol=1e-5)
    assert not np.array_equal(one.tokens, four_.tokens)


def test_an_episode_without_room_is_truncated(player_of):
    """The turn is cut to the room; an observation that leaves no room for a token is left out."""
    episodes = play(player_of(max_episode_tokens=5, arguments={"long": 1}))
    rollout = fetch(episodes.rollout)
    assert rollout.response_mask.shape == (8, 5)
    cut = episodes.metrics["environment/truncated"] == 1
    assert cut.any() and not rollout.ended[cut].any()
    for i in np.flatnonzero(cut):
        real = rollout.mask[i, 8:]
        assert rollout.response_mask[i][real.sum() - 1], "an episode ends with a token of the policy"


FAULTS = ("raises", "hangs", "prints", "no tuple", "reward", "observation", "reset", "long", "exits", "flag")


class Faulty(Talk):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def reset(self, seed=None, options=None):
        if self.how == "reset":
            raise OSError("no connection")
        observation, info = super().reset(seed)
        return ("a " * 20 if self.how == "long" else observation), info

    def step(self, action):
        observation, reward, *rest = super().step(action)
        if self.how == "raises":
            raise RuntimeError("no more")
        if self.how == "hangs":
            import time

            while True:
                time.sleep(0.01)
        if self.how == "exits":
            raise SystemExit(3)
        if self.how == "prints":
            observation = "x" * 2_000_000
        if self.how == "observation":
            observation = 7
        if self.how == "reward":
            reward = float("nan")
        if self.how == "flag":
            rest[0] = "yes"
        return "nonsense" if self.how == "no tuple" else (observation, reward, *rest)


counted = iter(range(10**9))


def make_mixed():
    number = next(counted) % 100
    return Faulty(FAULTS[number // 10]) if number % 10 == 5 else Talk()


def test_a_hundred_environments_of_which_ten_fail(player_of):
    """Their episodes have no token to learn, the others are as good as alone, and each failure is named once."""
    global counted
    counted, said = iter(range(10**9)), []
    mixed = {"factory": "test_episodes:make_mixed", "mode": "threads", "step_timeout": 2.0}
    player = player_of(100, say=said.append, **mixed)
    episodes = play(player, 100)
    bad = np.arange(5, 100, 10)
    rollout = fetch(episodes.rollout)
    np.testing.assert_array_equal(np.flatnonzero(episodes.metrics["environment/failed"]), bad)
    assert not rollout.response_mask[bad].any() and not rollout.sample_logprobs[bad].any()
    assert rollout.mask[bad].any(axis=1).all(), "a row without a real token would have no logits"
    assert rollout.response_mask[np.delete(np.arange(100), bad)].any(axis=1).all()
    assert len(said) == 10 and all("\n" not in line for line in said)
    for i, how in zip(bad, FAULTS):
        (line,) = (line for line in said if f"environment {i} (make_mixed)" in line)
        words = {"raises": "no more", "hangs": "more than 2 s", "reset": "no connection", "long": "max_prompt_tokens"}
        assert words.get(how, "step") in line
    alone = fetch(play(player_of(100), 100).rollout)
    kept = np.delete(np.arange(100), bad)
    np.testing.assert_array_equal(rollout.tokens[kept], alone.tokens[kept])
    counted = iter(range(10**9))
    again = fetch(play(player, 100).rollout)  # nothing of the first draw is left
    np.testing.assert_array_equal(again.response_mask[kept], rollout.response_mask[kept])


def make_bad():
    return Faulty("reset")


def test_if_all_fail_the_reason_is_given(player_of):
    player = player_of(4, factory="test_episodes:make_bad")
    for _ in range(4):  # more often than a pool retires
        with pytest.raises(Fault, match=r"all 4 episodes of a rollout failed.*no connection"):
            play(player, 4)
    with pytest.raises(UserError, match=r"first observation cannot be used.*no connection"):
        player.environments.try_out(0, None)


def test_a_template_that_changes_what_it_wrote_is_refused(player_of, decoder, program):
    changing = "{{ messages|length }} " + TEMPLATE
    tokenizer = build_word_tokenizer([*WORDS, "1", "3"], chat_template=changing)
    config = player_of(arguments={"chat": True}).config
    environments = make_environments(config, decoder, tokenizer, 1, lambda line: None)
    with pytest.raises(UserError, match="writes a chat differently when later messages follow: after '' comes '3 user"):
        environments.try_out(0, None)


def test_lengths_of_contexts_grow_geometrically():
    assert context_lengths(64, 512) == [64, 128, 256, 512, 575]
    assert context_lengths(8, 1) == [8]
    lengths = context_lengths(5, 1000)
    assert lengths[-1] == 1004 and all(b <= 2 * a for a, b in itertools.pairwise(lengths))


def test_seeds_follow_from_key_and_row():
    key = functools.partial(jax.random.fold_in, jax.random.key(3))
    one, two = episode_seeds(key(0), 5), episode_seeds(key(1), 5)
    assert len({*one, *two}) == 10 and (one >= 0).all()
    np.testing.assert_array_equal(episode_seeds(key(0), 3), one[:3])


def test_an_episode_that_was_cut_is_no_success_and_rows_stay_as_they_are(player_of):
    row, key = {"first": "a", "words": []}, jax.random.key(0)
    for turns in (2, 4):
        player = player_of(factory="test_episodes:Late", max_turns=turns)
        metrics = player.play(None, [row] * 8, episode_seeds(key, 8).tolist(), key).metrics
        assert not metrics["environment/failed"].any() and row == {"first": "a", "words": []}
        success = metrics["environment/success"]
        assert not np.ma.getmaskarray(success).any()
        np.testing.assert_array_equal(success, 1 - metrics["environment/truncated"])
        assert success.mean() > 0 and (turns == 4 or success.mean() < 1)
    silent = play(player_of()).metrics["environment/success"]
    assert np.ma.getmaskarray(silent).all(), "nothing is known of it"
