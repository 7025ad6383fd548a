"""JudgeReward against a local chat server: what is asked, how judgements are read, and the cache."""

import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from jaxrlhf.config import JudgeRewardConfig, RewardConfig
from jaxrlhf.data.chats import Chat
from jaxrlhf.data.prompts import PromptSet
from jaxrlhf.data.tokenizers import build_word_tokenizer
from jaxrlhf.errors import UserError
from jaxrlhf.rewards.completions import Completions, abstained_rows
from jaxrlhf.rewards.functions import RewardFault
from jaxrlhf.rewards.judge import Cache, JudgeReward
from jaxrlhf.rewards.trial import try_rewards


class Server(ThreadingHTTPServer):
    """`reply(text of the user's message)` returns the content, (content, logprobs), or a status."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.requests, self.keys, self.paths = lambda text: "7", [], [], []
        self.now = self.most = 0
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append(request)
            server.paths.append(self.path)
            server.keys.append(self.headers.get("Authorization"))
            server.now += 1
            server.most = max(server.most, server.now)
        answer = server.reply(request["messages"][-1]["content"])
        with server.lock:
            server.now -= 1
        if isinstance(answer, int):
            self.send_response(answer)
            self.end_headers()
            return
        content, logprobs = answer if isinstance(answer, tuple) else (answer, None)
        choice = {"message": {"role": "assistant", "content": content}}
        choice |= {} if logprobs is None else {"logprobs": {"content": logprobs}}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [choice]} if content != "broken" else {"choices": []}).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


RUBRIC = "Question: {{ prompt }}\nAnswer: {{ completion }}\nScore from 1 to 10:"
PAIR = "Question: {{ prompt }}\nA: {{ first }}\nB: {{ second }}\nWhich is better?"


def judge_of(server, **settings):
    settings = {"model": "m", "rubric": PAIR if "against" in settings else RUBRIC, "cache": None} | settings
    reward = JudgeReward(JudgeRewardConfig(url=server.url, **settings), "ppo.reward")
    reward.client.backoff = 0.001
    return reward


def of(texts, rows=None, chats=()):
    completions = Completions(None, [f"q{i}" for i in range(len(texts))], rows or [{}] * len(texts), None, chats)
    completions.__dict__["texts"] = list(texts)
    return completions


def read(server, contents, **settings):
    """The scores of judgements with these contents, None for each that cannot be read."""
    given = {f"t{i}": content for i, content in enumerate(contents)}
    server.reply = lambda text: given[text.split("Answer: ")[1].split("\n")[0]]
    scores = judge_of(server, **settings)(of(list(given)))
    return [None if gone else score for score, gone in zip(np.asarray(scores).tolist(), abstained_rows(scores))]


def test_what_is_asked(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "k-secret")
    rubric = "{% for fact in facts %}- {{ fact }}\n{% endfor %}" + RUBRIC
    settings = {"system": "Be fair.", "token_env": "JUDGE_KEY", "extra": {"seed": 3}, "max_tokens": None}
    reward = judge_of(server, rubric=rubric, **settings)
    assert reward(of([" green {{ prompt }}"], [{"facts": ["a", "b"]}])).tolist() == [7.0]
    assert server.requests == [
        {
            "model": "m",
            "messages": [
                {"role": "system", "content": "Be fair."},
                {"role": "user", "content": "- a\n- b\nQuestion: q0\nAnswer: green {{ prompt }}\nScore from 1 to 10:"},
            ],
            "temperature": 0.0,
            "seed": 3,
        }
    ]
    assert server.keys == ["Bearer k-secret"] and server.paths == ["/v1/chat/completions"]


def test_a_chat_is_written_with_its_roles(server):
    chat = Chat([{"role": "system", "content": "Short."}, {"role": "user", "content": "Hi"}])
    judge_of(server)(of(["yes"], chats=[chat]))
    assert server.requests[0]["messages"][0]["content"].startswith("Question: system: Short.\n\nuser: Hi\nAnswer: yes")


def test_the_last_number_of_a_text(server):
    contents = ["7", "It has 2 faults. Score: 6.5", "**8**/10", "9 out of 10.", "Score: 3 / 10", "5."]
    unreadable = ["none", "", None, "11", "0", "-3", "v2", "8,5", "1,000", "7-8", "on 2024-01-01"]
    assert read(server, contents + unreadable) == [7, 6.5, 8, 9, 3, 5] + [None] * 11
    assert read(server, ["-3", "0.25"], low=-5.0, high=0.5) == [-3, 0.25]


def test_a_field_of_json(server):
    contents = ['{"score": 4, "a": "x"}', 'So:\n```json\n{"score": "5"}\n```', '{"score": 1}, no: {"score": 2.5}']
    unreadable = ["4", '{"score": true}', '{"other": 3}', "[1]", '{"score": 1' + "0" * 400 + "}"]
    assert read(server, contents + unreadable, read="json") == [4, 5, 2.5] + [None] * 5
    assert read(server, ['{"grade": 4}'], read="json", field="grade") == [4]


def token(text, **top):
    pairs = [{"token": name, "logprob": math.log(p)} for name, p in top.items()]
    return {"token": text, "logprob": -0.1, "top_logprobs": pairs}


def test_the_mean_of_the_scores_by_probability(server):
    certain, unsure = [token("4", **{"4": 1.0})], [token(" 5", **{"5": 0.5, " 4": 0.3, "x": 0.1, "9": 0.1})]
    longer = [token("3", **{"3": 1.0}), token(" so"), token("2", **{"2": 0.75, "1": 0.25}), token(".")]
    marked = [token(" **4", **{" **4": 0.6, "**2": 0.2, "2": 0.2})]
    odd = [{"token": "4", "top_logprobs": [{"token": "4", "logprob": "abc"}]}]
    contents = [("4", certain), (" 5", unsure), ("3 so 2.", longer), (" **4**", marked)]
    contents += [("x", [token("x", x=1.0)]), ("", []), ("4", odd)]
    settings = {"read": "logprobs", "low": 1.0, "high": 5.0}
    expected = [4, (0.5 * 5 + 0.3 * 4) / 0.8, 1.75, 3.2, None, None, None]
    assert read(server, contents, **settings) == [None if x is None else pytest.approx(x) for x in expected]
    assert server.requests[0]["logprobs"] is True and server.requests[0]["top_logprobs"] == 20
    with pytest.raises(RewardFault, match="has no logprobs; use a server that has them, or set read: text"):
        read(server, ["4"], **settings)


def test_pairs_are_judged_in_both_orders(server):
    def first_is_better_if_longer(text):
        first, second = text.split("A: ")[1].split("\nWhich")[0].split("\nB: ")
        return "A" if len(first) > len(second) else "B" if len(first) < len(second) else "tie"

    rows = [{"gold": "four"}, {"gold": "four"}, {"gold": "four"}, {"gold": None}]
    server.reply = first_is_better_if_longer
    scores = judge_of(server, against="gold")(of(["longer", "two", "same", "none"], rows))
    assert np.asarray(scores).tolist() == [1, 0, 0.5, 0] and abstained_rows(scores).tolist() == [False] * 3 + [True]
    assert len(server.requests) == 6
    # A judge that prefers a place gives no preference.
    server.reply = lambda text: "My answer is [[A]]"
    assert judge_of(server, against="gold")(of(["longer"], rows[:1])).tolist() == [0.5]
    server.reply = lambda text: "A" if text.index("longer") < text.index("four") else "neither is"
    assert abstained_rows(judge_of(server, against="gold")(of(["longer"], rows[:1]))).tolist() == [True]
    server.reply = lambda text: '{"winner": "B"}' if text.index("good") > text.index("four") else '{"winner": "tie"}'
    assert judge_of(server, against="gold", read="json", field="winner")(of(["good"], rows[:1])).tolist() == [0.75]


def test_pairs_by_probability(server):
    def reply(text):
        good_first = text.index("good") < text.index("four")
        return "A", [token("A", A=0.6, B=0.2)] if good_first else [token("B", A=0.1, B=0.9)]

    server.reply = reply
    scores = judge_of(server, against="gold", read="logprobs")(of(["good"], [{"gold": "four"}]))
    assert scores.tolist() == [pytest.approx((0.75 + 0.9) / 2)]


def test_requests_run_at_the_same_time_and_keep_their_order(server):
    def reply(text):
        number = int(text.split("Answer: t")[1].split("\n")[0])
        time.sleep(0.03 if number == 1 else 0.01)
        return str(number)

    server.reply = reply
    assert judge_of(server, concurrency=3)(of([f"t{i}" for i in range(1, 9)])).tolist() == list(range(1, 9))
    assert 1 < server.most <= 3


def test_retries_and_faults(server):
    replies = [500, 429, "7"]
    server.reply = lambda text: replies.pop(0)
    assert judge_of(server)(of(["a"])).tolist() == [7.0] and len(server.requests) == 3
    faults = {404: "the status must be 200, not 404", "broken": "not a chat completion", 503: "tried 2 times"}
    for reply, words in faults.items():
        server.reply = lambda text, reply=reply: reply
        with pytest.raises(RewardFault) as fault:
            judge_of(server, retries=1)(of(["a"]))
        message = str(fault.value)
        assert words in message and message.startswith("judge http://") and "\n" not in message


def test_the_cache_answers_equal_requests(server, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "k-secret")
    settings = {"cache": str(tmp_path / "cache"), "token_env": "JUDGE_KEY"}
    answers = iter("123456789")
    server.reply = lambda text: "unreadable" if "bad" in text else next(answers)
    first = judge_of(server, **settings)(of(["a", "bad", "c"]))
    assert len(server.requests) == 3
    again = judge_of(server, **settings)(of(["a", "bad", "c"]))  # a resumed run, also where it abstained
    assert len(server.requests) == 3
    np.testing.assert_array_equal(np.asarray(first), np.asarray(again))
    np.testing.assert_array_equal(abstained_rows(first), abstained_rows(again))
    changes = [{"model": "n"}, {"rubric": RUBRIC + "!"}, {"temperature": 0.5}, {"system": "s"}, {"extra": {"seed": 1}}]
    for change in changes:
        before = len(server.requests)
        judge_of(server, **settings, **change)(of(["a"]))
        assert len(server.requests) == before + 1, change
    assert not any(b"k-secret" in path.read_bytes() for path in (tmp_path / "cache").rglob("*.json"))
    # Equal requests of one batch are sent once.
    same = Completions(None, ["q", "q"], [{}, {}], None)
    same.__dict__["texts"] = ["x", "x"]
    before = len(server.requests)
    judge_of(server, **settings)(same)
    assert len(server.requests) == before + 1


def test_a_damaged_file_of_the_cache_is_replaced(server, tmp_path):
    judge = judge_of(server, cache=str(tmp_path))
    judge(of(["a"]))
    (path,) = tmp_path.rglob("*.json")
    path.write_text("{")
    server.reply = lambda text: "3"
    assert judge(of(["a"])).tolist() == [3.0] and judge(of(["a"])).tolist() == [3.0] and len(server.requests) == 2


def test_processes_may_share_a_cache(tmp_path):
    caches = [Cache(tmp_path, "key") for _ in range(4)]
    requests = [f"request {i}".encode() for i in range(20)]

    def work(cache):
        for request in requests:
            cache.put(request, {"content": request.decode() * 100, "logprobs": None})
            found = cache.get(request)
            assert found is not None and found["content"] == request.decode() * 100

    threads = [threading.Thread(target=work, args=(cache,)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(tmp_path.rglob("*.json"))) == 20 == len([p for p in tmp_path.rglob("*") if p.is_file()])


def test_what_is_wrong_is_named(server, tmp_path, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    (tmp_path / "file").write_text("")
    for settings, words in (
        ({"rubric": "{{ prompt"}, "ppo.reward.rubric, line 1: not valid jinja"),
        ({"token_env": "JUDGE_KEY"}, "ppo.reward.url: .*JUDGE_KEY is not set"),
        ({"cache": str(tmp_path / "file" / "x")}, "ppo.reward.cache: cannot write to "),
    ):
        with pytest.raises(UserError, match=rf"\A{words}[^\n]*\Z"):
            judge_of(server, **settings)
    rows = [{"gold": "x"}, {"gold": "y"}]
    for settings, words in (
        (
            {"rubric": "{{ fact }}"},
            "ppo.reward.rubric: prompt 1: the rubric fails: 'fact' is undefined; "
            "the variables are: prompt, completion, gold",
        ),
        ({"rubric": "{{ prompt.__class__.__mro__ }}"}, "ppo.reward.rubric: prompt 1: the rubric fails: .*unsafe"),
        ({"rubric": "rate {{ prompt }}"}, r"ppo.reward.rubric: does not show what is judged; it must contain \{\{ com"),
        (
            {"against": "gold", "rubric": "{{ first }} or not"},
            r"ppo.reward.rubric: does not show what is judged; it must contain \{\{ first \}\} and",
        ),
        ({"against": "answer"}, "ppo.reward.against: the data has no column answer; the columns are: gold"),
    ):
        with pytest.raises(UserError, match=rf"\A{words}[^\n]*\Z"):
            judge_of(server, **settings).check_rows(["p", "q"], rows, "ppo.reward")
    with pytest.raises(RewardFault, match="row 0: the rubric fails"):
        judge_of(server, rubric="{{ fact }}")(of(["a"]))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, r"kind=judge\.url\n.*required"),
        ({"low": 5.0, "high": 5.0}, "low must be less than high"),
        ({"read": "logprobs"}, "needs whole numbers from 0 to 9 as low and high"),
        ({"read": "words"}, r"kind=judge\.read"),
    ],
)
def test_settings_that_do_not_go_together(settings, words):
    given = {"url": "http://x/v1", "model": "m", "rubric": "{{ completion }}"} if settings else {}
    with pytest.raises(ValidationError, match=words):
        TypeAdapter(RewardConfig).validate_python({"kind": "judge"} | given | settings)


def test_two_rows_are_tried_before_the_run(server):
    tokenizer = build_word_tokenizer(["is", "it", "good", "."])
    ids = [tokenizer.encode_prompt("is it good"), tokenizer.encode_prompt("is it")]
    ids = [np.array(row, np.int32) for row in ids]
    prompts = PromptSet(ids, ["is it good", "is it"], [None, None], [{}, {}], 8, 0, None)
    try_rewards({"ppo.reward": judge_of(server)}, prompts, tokenizer)
    assert len(server.requests) == 2
    server.reply = lambda text: 401
    with pytest.raises(UserError, match=r"\Appo\.reward: the reward failed on the first 2 rows: judge [^\n]*401"):
        try_rewards({"ppo.reward": judge_of(server)}, prompts, tokenizer)
