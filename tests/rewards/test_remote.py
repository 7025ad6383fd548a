"""HTTPReward against a real server in a thread, which can do everything wrong that a server can."""

import json
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from jaxrlhf.errors import UserError
from jaxrlhf.rewards.client import _seconds, retry_delay
from jaxrlhf.rewards.completions import Completions, abstained_rows
from jaxrlhf.rewards.functions import RewardFault
from jaxrlhf.rewards.remote import HTTPReward


def completions_of(texts, rows=None):
    completions = Completions(None, [f"prompt {i}" for i in range(len(texts))], rows or [{}] * len(texts), None)
    completions.__dict__["texts"] = list(texts)
    return completions


class Server(ThreadingHTTPServer):
    """`behaviours`: one function of the handler and the request per call; the last one stays."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behaviours, self.requests, self.headers_seen, self.sent = [scores_of_length], [], [], 0
        self.released = threading.Event()

    def handle_error(self, request, client_address):
        pass  # a client that hangs up is what some tests want

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/score"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        server.requests.append(request)
        server.headers_seen.append(dict(self.headers))
        behaviour = server.behaviours.pop(0) if len(server.behaviours) > 1 else server.behaviours[0]
        behaviour(self, request)

    def reply(self, body, status=200, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

    def log_message(self, *_):
        pass


def scores_of_length(handler, request):
    handler.reply({"scores": [len(text) for text in request["completions"]]})


def status(code, **headers):
    return lambda handler, _: handler.reply({"detail": "no"}, code, **headers)


def body(content, **headers):
    return lambda handler, _: handler.reply(content, **headers)


def sleeping(handler, _):
    handler.server.released.wait(5)


def dripping(handler, _):
    """One byte of header at a time: no single read is slow."""
    for byte in b"HTTP/1.0 200 OK\r\nX-Long: " + b"x" * 1000:
        handler.wfile.write(bytes([byte]))
        if handler.server.released.wait(0.01):
            return


def endless(handler, _):
    handler.send_response(200)
    handler.end_headers()
    while not handler.server.released.is_set():  # ends when the client hangs up
        handler.wfile.write(b" " * 65536)
        handler.server.sent += 65536


def dropping(handler, _):
    handler.connection.close()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.released.set()
        server.shutdown()


def reward_of(server, **settings):
    return HTTPReward(server.url, **{"backoff": 0.001, "max_wait": 0.01, "timeout": 5.0, "retries": 2} | settings)


def test_what_is_sent_and_what_comes_back(server):
    rows = [{"level": 1, "tags": ["a"]}, {"level": 2.5}, {"level": "é"}]
    scores = reward_of(server)(completions_of(["one", "", "thrée"], rows))
    np.testing.assert_array_equal(scores, np.float32([3, 0, 5]))
    assert scores.dtype == np.float32
    assert server.requests == [
        {
            "prompts": ["prompt 0", "prompt 1", "prompt 2"],
            "completions": ["one", "", "thrée"],
            "columns": {"level": [1, 2.5, "é"], "tags": [["a"], None, None]},
        }
    ]
    assert server.headers_seen[0]["Content-Type"] == "application/json"


def test_null_abstains_whatever_batch_it_is_in(server):
    def none_of_two(handler, request):
        lengths = [len(text) for text in request["completions"]]
        body({"scores": [None if n == 2 else n for n in lengths]})(handler, request)

    server.behaviours = [none_of_two]
    scores = reward_of(server, batch_size=2)(completions_of(["x" * n for n in (2, 3, 1, 5, 2)]))
    np.testing.assert_array_equal(np.asarray(scores), np.float32([0, 3, 1, 5, 0]))
    np.testing.assert_array_equal(abstained_rows(scores), [True, False, False, False, True])


def test_batches_keep_their_order_however_fast_each_is(server):
    def first_is_last(handler, request):
        time.sleep(0.05 if request["prompts"][0] == "prompt 0" else 0.0)
        scores_of_length(handler, request)

    server.behaviours = [first_is_last]
    texts = ["x" * n for n in (5, 3, 8, 1, 9, 2, 7)]
    np.testing.assert_array_equal(reward_of(server, batch_size=2)(completions_of(texts)), [5, 3, 8, 1, 9, 2, 7])
    assert sorted(len(request["prompts"]) for request in server.requests) == [1, 2, 2, 2]
    # The columns of a batch are its own rows'.
    rows = [{"n": n} for n in range(7)]
    reward_of(server, batch_size=4, concurrency=1)(completions_of(texts, rows))
    assert [request["columns"]["n"] for request in server.requests[-2:]] == [[0, 1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_requests_at_once_than_allowed(server, concurrency):
    lock, now, most = threading.Lock(), [0], [0]

    def counting(handler, request):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.02)
        with lock:
            now[0] -= 1
        scores_of_length(handler, request)

    server.behaviours = [counting]
    reward_of(server, batch_size=1, concurrency=concurrency)(completions_of(["a"] * 6))
    assert most[0] == concurrency


@pytest.mark.parametrize("trouble", [status(500), status(503), status(429, Retry_After="100"), dropping])
def test_what_may_pass_is_tried_again(server, trouble):
    server.behaviours = [trouble, trouble, scores_of_length]
    said = []
    np.testing.assert_array_equal(reward_of(server, say=said.append)(completions_of(["four"])), [4])
    assert len(server.requests) == 3
    assert len(said) == 2 and all(server.url in line and "trying again in 0.0 s" in line for line in said)
    assert all(request == server.requests[0] for request in server.requests)


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (status(500), "status 500"),
        (status(429), "status 429"),
        (sleeping, "no answer within 0.05 s"),
        (dripping, "no answer within 0.05 s"),
        (dropping, "RemoteProtocolError"),
    ],
)
def test_what_does_not_pass_ends_in_a_fault(server, trouble, words):
    server.behaviours = [trouble]
    timeout = 0.05 if trouble in (sleeping, dripping) else 5.0
    fault = fault_of(reward_of(server, retries=1, timeout=timeout))
    assert words in fault and "(tried 2 times)" in fault
    deadline = time.monotonic() + 10  # the server may see a request after its sender has given up
    while len(server.requests) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(server.requests) == 2


def test_a_server_that_is_down(server):
    reward = reward_of(server)
    server.shutdown()
    server.server_close()
    fault = fault_of(reward)
    assert "ConnectError" in fault and "(tried 3 times)" in fault and reward.name in fault


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (status(400), "the status must be 200, not 400"),
        (status(404), "the status must be 200, not 404"),
        (status(204), "the status must be 200, not 204"),
        (status(302, Location="http://elsewhere.invalid/score"), "status 302, a redirect"),
        (status(307, Location="http://127.0.0.1:9/score"), "status 307, a redirect"),
        (body(b"<html>\nsorry</html>"), "not JSON"),
        (body(b"\xff\xfe\x00"), "not JSON"),
        (body(b""), "not JSON"),
        (body(b"[" * 100_000), "not JSON"),
        (body([1.0, 2.0, 3.0]), 'must be {"scores": [numbers]}'),
        (body({"score": [1.0, 2.0, 3.0]}), 'must be {"scores": [numbers]}'),
        (body({"scores": "123"}), 'must be {"scores": [numbers]}'),
        (body({"scores": [1.0, 2.0]}), "shape (2,) for 3 completions"),
        (body({"scores": [[1.0], [2.0], [3.0]]}), "shape (3, 1) for 3 completions"),
        (body({"scores": [1.0, float("nan"), 2.0]}), "returned nan for completion 1 of 3"),
        (body({"scores": [1.0, 2.0, float("-inf")]}), "returned -inf for completion 2 of 3"),
        (body(b'{"scores": [1, 2, 1' + b"0" * 400 + b"]}"), "no list of numbers"),
        (body({"scores": ["1", "2", "3"]}), "no list of numbers"),
        (body({"scores": [1.0, {}, 3.0]}), "no list of numbers"),
        (body(b"{}", Content_Encoding="gzip"), "encoded as 'gzip'"),
    ],
)
def test_what_is_wrong_for_good_is_a_fault_at_once(server, trouble, words):
    server.behaviours = [trouble]
    fault = fault_of(reward_of(server), 3)
    assert words in fault and server.url in fault
    assert len(server.requests) == 1


def test_an_endless_answer_is_not_read(server):
    server.behaviours = [endless]
    fault = fault_of(reward_of(server, max_bytes=100_000))
    assert "longer than 100000 bytes" in fault and len(server.requests) == 1
    assert server.sent < 50_000_000  # what fits into the sockets' buffers, and no more
    # An answer of exactly the limit is read.
    answer = b'{"scores": [1.5]}'
    server.behaviours = [body(answer)]
    assert reward_of(server, max_bytes=len(answer))(completions_of(["a"])) == [1.5]
    assert "longer than" in fault_of(reward_of(server, max_bytes=len(answer) - 1))


@pytest.mark.parametrize(("variable", "words"), [("HTTP_PROXY", "nowhere"), ("SSL_CERT_FILE", "FileNotFoundError")])
def test_what_the_environment_spoils_is_a_fault_that_names_the_server(server, monkeypatch, variable, words):
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.setenv(variable, "ftp://nowhere")
    assert words in fault_of(reward_of(server))
    assert not server.requests


def test_one_bad_batch_is_a_fault_of_all(server):
    server.behaviours = [scores_of_length, status(400)]
    assert "the status must be 200, not 400" in fault_of(reward_of(server, batch_size=1), 5)


def test_secrets_are_sent_and_never_shown(server, monkeypatch):
    monkeypatch.setenv("SCORE_TOKEN", "abc-secret")
    reward = HTTPReward(server.url + "?key=hidden", headers_env="SCORE_TOKEN", retries=0)
    assert reward(completions_of(["four"])) == [4]
    assert server.headers_seen[-1]["Authorization"] == "Bearer abc-secret"
    with_login = HTTPReward(server.url.replace("//", "//me:p%40ss@"), retries=0)
    assert with_login(completions_of(["four"])) == [4]
    assert server.headers_seen[-1]["Authorization"] == "Basic bWU6cEBzcw=="
    server.behaviours = [status(401)]
    for one in (reward, with_login):
        message = fault_of(one) + one.name
        assert server.url in message
        assert not any(secret in message for secret in ("secret", "hidden", "me:", "p%40ss", "p@ss"))


def test_a_column_that_is_no_json_is_named(server):
    for odd in ({1, 2}, b"bytes", float("nan")):
        with pytest.raises(RewardFault, match="column extra cannot be sent as JSON"):
            reward_of(server)(completions_of(["a", "b"], [{"extra": 1}, {"extra": odd}]))
    assert not server.requests


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ftp://host/score", "scheme is ftp; a URL must begin with http:// or https://"),
        ("file:///etc/hosts", "scheme is file"),
        ("localhost:8000", "scheme is localhost"),
        ("host/score", "scheme is missing"),
        ("http:///score", "has no host"),
        ("http://host:port/score", "port"),
        ("http://host:99999/", "out of range"),
        ("http://[::1", "reward URL http://[::1"),
        ("http://ho st/", "has blanks"),
        ("ftp://me:secret@host/?key=secret", "scheme is ftp"),
        ("http://me:secret@host:port/?key=secret", "port"),
        ("http://a\nb/", "non-printable"),
        ("http://a/\x00", "reward URL"),
        ("", "scheme is missing"),
    ],
)
def test_a_url_that_cannot_be_asked(url, words):
    with pytest.raises(UserError) as error:
        HTTPReward(url)
    message = str(error.value)
    assert words in message and "secret" not in message and "\n" not in message


def test_tokens_that_cannot_be_sent(monkeypatch):
    url = "http://localhost:1/score"
    monkeypatch.delenv("SCORE_TOKEN", raising=False)
    with pytest.raises(UserError, match="SCORE_TOKEN is not set; set it to the token"):
        HTTPReward(url, headers_env="SCORE_TOKEN")
    monkeypatch.setenv("SCORE_TOKEN", "secret\nHost: evil")
    with pytest.raises(UserError, match="the token in SCORE_TOKEN has blanks") as error:
        HTTPReward(url, headers_env="SCORE_TOKEN")
    assert "evil" not in str(error.value)
    with pytest.raises(UserError, match="has a user, and SCORE_TOKEN has a token; use only one"):
        HTTPReward("http://me@localhost:1/score", headers_env="SCORE_TOKEN")


def test_pauses_double_up_to_a_bound_and_obey_the_server_up_to_it():
    pauses = [retry_delay(tried, None, 0.5, 30.0, 0.0) for tried in (0, 1, 2, 6, 2000)]
    assert pauses == [0.5, 1.0, 2.0, 30.0, 30.0]
    assert 0.5 < retry_delay(1, None, 0.5, 30.0, 0.999) < 0.501
    assert retry_delay(0, 7.0, 0.5, 30.0, 0.0) == 7.0
    assert retry_delay(0, 3600.0, 0.5, 30.0, 0.0) == 30.0
    assert retry_delay(3, 1.0, 0.5, 30.0, 0.0) == 4.0


def test_retry_after_is_seconds_or_a_date():
    now = 1_700_000_000.0
    assert _seconds("7", now) == 7.0
    assert _seconds(formatdate(now + 90, usegmt=True), now) == 90.0
    assert _seconds(formatdate(now - 90, usegmt=True), now) == 0.0
    assert [_seconds(odd, now) for odd in (None, "soon", "-5", "nan", "inf", "")] == [None] * 6


def fault_of(reward, count=1):
    with pytest.raises(RewardFault) as fault:
        reward(completions_of(["text"] * count))
    message = str(fault.value)
    assert message.startswith(f"reward server {reward.name}") and "\n" not in message
    return message
