"""Rewards inside completions: steps of a text, and the tokens at which their rewards stand."""

import dataclasses
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest

from jaxrlhf.data.tokenizers import Tokenizer, load_tokenizer
from jaxrlhf.records import Rollout
from jaxrlhf.rewards.completions import Completions, abstained_rows, summed
from jaxrlhf.rewards.composed import ComposedReward
from jaxrlhf.rewards.functions import FunctionReward, RewardFault
from jaxrlhf.rewards.load import FirstProcessReward
from jaxrlhf.rewards.model import ModelReward
from jaxrlhf.rewards.remote import HTTPReward
from jaxrlhf.rewards.steps import Granularity, split_steps

STEP, TOKEN, OFFSET = Granularity("step"), Granularity("token"), Granularity("offset")
PIECES = ["one\n", "t", "wo", "\nth", "ree", "\n", "🙂", "\n\n", "x\ny\nz", "é"]


def pieces() -> Tokenizer:
    """A token for each piece, which may reach over line ends, a token for each byte, and an EOS."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    wide = [split.pre_tokenize_str(piece)[0][0] for piece in PIECES]
    letters = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(wide))
    backend = Backend(models.BPE(vocab={word: i for i, word in enumerate([*letters, *wide, "<end>"])}, merges=[]))
    backend.pre_tokenizer, backend.decoder = split, decoders.ByteLevel()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>"), "pieces")


TOKENIZER = pieces()
VOCABULARY = TOKENIZER.fast.get_vocab()


def ids_of(*parts):
    """The token of each piece; the text of a piece in brackets is written byte by byte."""
    from tokenizers import pre_tokenizers

    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ids = []
    for part in parts:
        letters = split.pre_tokenize_str(part[0] if isinstance(part, list) else part)[0][0]
        ids += [VOCABULARY[letter] for letter in letters] if isinstance(part, list) else [VOCABULARY[letters]]
    return ids


def completions_of(*rows, ended=True):
    """Completions of these ids after a prompt of one token; an EOS ends each if `ended`."""
    eos = [TOKENIZER.eos_id] if ended else []
    rows = [[*row, *eos] for row in rows]
    R = max(map(len, rows)) + 1
    tokens, mask = np.zeros((len(rows), 1 + R), np.int32), np.zeros((len(rows), 1 + R), bool)
    for i, row in enumerate(rows):
        tokens[i, 1 : 1 + len(row)], mask[i, : 1 + len(row)] = row, True
    zeros = np.zeros(len(rows), np.float32)
    rollout = Rollout(tokens, mask, mask[:, 1:], np.zeros((len(rows), R)), zeros.astype(bool) | ended, zeros)
    return Completions(rollout, ["q"] * len(rows), [{}] * len(rows), TOKENIZER)


def placed(granularity, returned, completions):
    parts = granularity.texts(completions).values()
    read = granularity.read(returned, completions.texts, *parts, source="it")
    return granularity.at_tokens(read, completions)


def by_characters(granularity, returned, completions):
    """The plain reference: every prefix of the tokens is decoded. A prefix that ends within a character lacks it.

    The reward stands at the longest prefix that ends between the words and the end of the step, else at the first that
    reaches the end.
    """
    steps = granularity.texts(completions).get("steps")
    found = np.full(completions.response_mask.shape, np.nan)
    for i, row in enumerate(returned):
        if row is None:
            continue
        prompt, ids = completions._ids[i]
        text, triples = completions.texts[i], [(pair[0], *pair) for pair in row if steps is None]
        if steps is not None:
            ends = [sum(map(len, steps[i][: k + 1])) for k in range(len(row))]
            triples = [(len(text[:end].rstrip("\n ")), end, reward) for end, reward in zip(ends, row)]
        lengths = [len(TOKENIZER.decode_after(prompt, ids[: n + 1]).rstrip("\ufffd")) for n in range(len(ids))]
        found[i, len(ids) - 1] = 0
        for words, end, reward in triples:
            fits = [n for n in range(len(ids)) if words <= lengths[n] <= end]
            reach = [n for n in range(len(ids)) if lengths[n] >= end]
            at = max(fits, key=lambda n: (lengths[n], -n)) if fits else reach[0]
            at = len(ids) - 1 if end == len(text) else at
            found[i, at] = np.nan_to_num(found[i, at]) + reward
    return np.ma.masked_invalid(np.float32(found))


@pytest.mark.parametrize(
    ("text", "separator", "steps"),
    [
        ("a\nb", "\n", ["a\n", "b"]),
        ("a\nb\n", "\n", ["a\n", "b\n"]),
        ("a\n\nb", "\n", ["a\n\n", "b"]),
        ("a\n \n b", "\n", ["a\n \n", " b"]),
        ("\n\na\nb", "\n", ["\n\na\n", "b"]),
        ("", "\n", [""]),
        (" \n", "\n", [" \n"]),
        ("a; b;c", ";", ["a;", " b;", "c"]),
        ("one Step two Step ", "Step", ["one Step", " two Step "]),
        ("a.b\nc", "\n\n", ["a.b\nc"]),
    ],
)
def test_steps_of_a_text(text, separator, steps):
    assert split_steps(text, separator) == steps and "".join(steps) == text


def test_a_reward_stands_at_the_last_token_of_its_step():
    """One\\n|two\\n|three: the second line end is in a token that begins the third step, so its step ends before."""
    completions = completions_of(ids_of("one\n", "t", "wo", "\nth", "ree"))
    assert STEP.texts(completions) == {"steps": [["one\n", "two\n", "three"]]}
    rewards = placed(STEP, [[1, 2, 3]], completions)
    assert rewards.tolist() == [[1, None, 2, None, None, 3, None]]  # the last step ends with the stop token
    cut = completions_of(ids_of("one\n", "t", "wo", "\nth", "ree"), ended=False)
    assert placed(STEP, [[1, 2, 3]], cut).tolist() == [[1, None, 2, None, 3, None]]


def test_several_steps_in_one_token_add_up():
    completions = completions_of(ids_of("t", "x\ny\nz", "\n\n", "wo"))
    assert STEP.texts(completions)["steps"] == [["tx\n", "y\n", "z\n\n", "wo"]]
    assert placed(STEP, [[1, 2, 4, 8]], completions).tolist() == [[None, 3, 4, None, 8, None]]


def test_a_character_of_several_tokens_is_complete_at_the_last():
    completions = completions_of(ids_of(["🙂"], "\n", ["é"], "t"))
    assert completions.texts == ["🙂\nét"]
    pairs = [(1, 1.0), (2, 2.0), (3, 4.0), (0, 8.0)]
    assert placed(OFFSET, [pairs], completions).tolist() == [[8, None, None, 1, 2, None, 4, None, 0, None]]


def test_any_text_equals_the_reference():
    rng = np.random.default_rng(0)
    fragments = [*map(ids_of, PIECES), *(ids_of([piece]) for piece in PIECES), [TOKENIZER.eos_id]]
    rows = [[i for at in rng.integers(0, len(fragments), 8) for i in fragments[at]] for _ in range(60)]
    completions = completions_of(*rows)
    steps = [rng.integers(1, 9, len(of_row)).tolist() for of_row in STEP.texts(completions)["steps"]]
    for granularity, given in (
        (STEP, steps),
        (OFFSET, [[(int(e), int(r)) for e, r in rng.integers(0, [len(t) + 1, 9], (3, 2))] for t in completions.texts]),
    ):
        ours, reference = placed(granularity, given, completions), by_characters(granularity, given, completions)
        np.testing.assert_array_equal(np.ma.getmaskarray(ours), np.ma.getmaskarray(reference))
        np.testing.assert_array_equal(ours.filled(0), reference.filled(0))
        np.testing.assert_array_equal(summed(ours), [sum(np.reshape(row, (len(row), -1))[:, -1]) for row in given])


def test_one_number_per_token_special_tokens_included():
    completions = completions_of(ids_of("one\n", ["é"]), ids_of("t"))
    assert TOKEN.texts(completions) == {"tokens": [["one\n", "", "é", ""], ["t", ""]]}
    rewards = placed(TOKEN, [[0.5, None, 2, 3], [1, -1]], completions)
    assert rewards.tolist() == [[0.5, None, 2, 3, None], [1, -1, None, None, None]]


@pytest.mark.parametrize(
    ("granularity", "returned", "message"),
    [
        (STEP, [[1.0]], "it returned 1 entries for 2 completions; it must return one list of numbers, one per step"),
        (STEP, {"a": 1}, "it returned a dict; it must return one list of numbers, one per step, for each completion"),
        (STEP, [[1, 2], [1, 2]], "returned 2 numbers for completion 1 of 2, which has 1 step; it must return one"),
        (STEP, [[1], [1]], "returned 1 number for completion 0 of 2, which has 2 steps"),
        (STEP, [1.0, 2.0], "must return a list of numbers, one per step, for completion 0 of 2, not 1.0"),
        (STEP, [[1, float("nan")], [1]], "returned nan for step 1 of completion 0 of 2"),
        (STEP, [[1, 1e300], [1]], "returned inf for step 1 of completion 0 of 2"),
        (STEP, [["a", "b"], [1]], "must return a list of numbers, one per step, for completion 0 of 2: "),
        (TOKEN, [[1, 2, 3], [1]], "returned 1 number for completion 1 of 2, which has 2 tokens"),
        (OFFSET, [[(99, 1.0)], []], "returned the end 99 for completion 0 of 2, whose text has 5 characters; an end"),
        (OFFSET, [[(-1, 1.0)], []], "returned the end -1 for"),
        (OFFSET, [[(1.5, 1.0)], []], "returned the end 1.5 for"),
        (OFFSET, [[(True, 1.0)], []], "returned the end True for"),
        (OFFSET, [[(1, float("inf"))], []], "returned inf for pair 0 of completion 0 of 2"),
        (OFFSET, [[1, 2], []], "must return a list of (end, reward) pairs for completion 0 of 2, not [1, 2]"),
        (OFFSET, [0.5, 0.5], "must return a list of (end, reward) pairs for completion 0 of 2, not 0.5"),
    ],
)
def test_bad_returns_are_one_line(granularity, returned, message):
    completions = completions_of(ids_of("one\n", "t"), ids_of("t"))
    with pytest.raises(RewardFault) as fault:
        placed(granularity, returned, completions)
    assert message in str(fault.value) and "\n" not in str(fault.value)


FUNCTIONS = """
import numpy as np
def by_step(completions, steps, **columns):
    assert all("".join(row) == text for row, text in zip(steps, completions))
    out = [[len(step) / 2 for step in row] for row in steps]
    out[1] = None
    steps[0].append("this list is a copy")
    return out
def number(completions):
    return [None if i == 2 else 10.0 + i for i in range(len(completions))]
def needs_steps(completions, steps):
    return [1.0] * len(steps)
"""


@pytest.fixture
def reward(tmp_path):
    """`reward(name, granularity=None)`: a FunctionReward of `FUNCTIONS`."""
    (tmp_path / "of_steps.py").write_text(FUNCTIONS)
    return lambda name, granularity=None: FunctionReward(
        f"{tmp_path / 'of_steps.py'}:{name}", "here", granularity=granularity
    )


THREE = completions_of(ids_of("one\n", "wo"), ids_of("t", "wo"), ids_of("\n", "t"))


def test_a_function_scores_steps_and_abstains_on_rows(reward):
    score = reward("by_step", STEP)
    rewards = score(THREE)
    assert score.by_step and rewards.tolist() == [[2, None, 1, None], [None] * 4, [None, None, 1, None]]
    assert rewards.dtype == np.float32 and abstained_rows(rewards).tolist() == [False, True, False]
    assert summed(rewards).tolist() == [3, None, 1]
    score.check_columns(set(), "here")
    shared = FirstProcessReward(score)
    np.testing.assert_array_equal(np.ma.getmaskarray(shared(THREE)), np.ma.getmaskarray(rewards))
    np.testing.assert_array_equal(shared(THREE).filled(0), rewards.filled(0))
    with pytest.raises(Exception, match="requires the keywords steps; the given keywords are: completions, prompts"):
        reward("needs_steps").check_columns(set(), "here")


def test_a_sum_adds_steps_and_scores_at_the_end(reward):
    """A part that abstains adds 0. A row without a part that scores it has no score."""
    parts = {"steps": (reward("by_step", STEP), 2.0), "end": (reward("number"), 0.5), "seen": (reward("number"), 0.0)}
    whole = ComposedReward(parts)
    rewards, scores = whole.scores_and_parts(THREE)
    assert whole.by_step and rewards.tolist() == [[4, None, 7, None], [None, None, 5.5, None], [None, None, 2, None]]
    assert scores["steps"].tolist() == [3, None, 1] and scores["end"].tolist() == [10, 11, None]
    silent = ComposedReward({"a": (reward("by_step", STEP), 1.0), "b": (reward("by_step", STEP), 1.0)})
    assert abstained_rows(silent(THREE)).tolist() == [False, True, False]
    only_seen = ComposedReward({"end": (reward("number"), 1.0), "seen": (reward("by_step", STEP), 0.0)})
    scores, by_name = only_seen.scores_and_parts(THREE)
    assert not only_seen.by_step and scores.tolist() == [10, 11, None] and by_name["seen"].tolist() == [3, None, 1]


def test_a_server_gets_the_steps_of_its_rows():
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            scores = [[len(step) for step in row] for row in requests[-1]["steps"]]
            body = json.dumps({"scores": [*scores[:-1], None] if len(scores) == 2 else scores}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        reward = HTTPReward(f"http://127.0.0.1:{server.server_address[1]}/", batch_size=2, granularity=STEP, retries=0)
        rewards = reward(THREE)
    finally:
        server.shutdown()
        server.server_close()
    assert rewards.tolist() == [[4, None, 2, None], [None] * 4, [None, None, 2, None]]
    assert sorted(request["steps"] for request in requests) == [[["\nt"]], [["one\n", "wo"], ["two"]]]


def test_the_runs_reward_adapter_scores_the_end_of_each_step(tiny, make_adapter, sampled):
    """The score at a step's end is that of the completion cut there."""

    class Letters:
        """A tokenizer of single letters; tokens 7 and 11 are line ends."""

        def decode_after(self, prompt, ids):
            return "".join("\n" if i in (7, 11) else chr(97 + i) for i in ids)

        def token_texts(self, prompt, ids, text):
            return list(text)

    completions = Completions(sampled, ["q"] * 8, [{}] * 8, Letters())
    adapter = make_adapter(tiny, 4, head="reward")
    of_whole, of_steps = ModelReward(tiny, adapter), ModelReward(tiny, adapter, microbatch_size=4, granularity=STEP)
    whole, rewards = np.asarray(of_whole(completions)), of_steps(completions)
    mask, steps = np.array(sampled.mask), 0
    for i in range(8):
        ends = np.flatnonzero(~np.ma.getmaskarray(rewards)[i])
        steps += len(ends)
        for end in ends:
            cut = mask.copy()
            cut[i, 5 + end + 1 :] = False
            scores = of_whole(Completions(sampled.replace(mask=cut), ["q"] * 8, [{}] * 8, Letters()))
            assert rewards[i, end] == pytest.approx(float(scores[i]), abs=1e-5)
    assert steps > 10
    last = mask[:, 5:].sum(axis=1) - 1
    np.testing.assert_allclose(rewards.filled(0)[np.arange(8), last], whole, atol=1e-5)
    of_steps.step_reward = "difference"
    progress = of_steps(completions)
    assert of_steps.program.compiles == of_whole.program.compiles == 1
    np.testing.assert_allclose(summed(progress), whole, atol=1e-5)


def test_rewards_of_steps_from_the_scores_of_tokens():
    completions = completions_of(ids_of("one\n", "t", "wo"), ids_of("x\ny\nz"))
    scores = np.float32([[1, 9, 3, 4, 9], [5, 7, 9, 9, 9]])
    of_scores, of_differences = (STEP.take(scores, completions, kind).tolist() for kind in ("score", "difference"))
    assert of_scores == [[1, None, None, 4, None], [5 + 5, 7, None, None, None]]  # two steps end inside one token
    assert of_differences == [[1, None, None, 3, None], [5, 2, None, None, None]]


def test_sentencepiece_steps(stories260k):
    tokenizer = load_tokenizer(str(stories260k))
    _, ids = tokenizer.encode_pair("Once", " upon a time.\nThe end.")
    completions = dataclasses.replace(completions_of(ids, ended=False), tokenizer=tokenizer)
    (steps,) = STEP.texts(completions)["steps"]
    assert [step.strip() for step in steps] == ["upon a time.", "The end."]
    texts = tokenizer.token_texts([0], ids, completions.texts[0])
    at = np.flatnonzero(~np.ma.getmaskarray(placed(STEP, [[1, 2]], completions))[0])
    assert "".join(texts[: at[0] + 1]) == steps[0] and at[1] == len(ids) - 1
