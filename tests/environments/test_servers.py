"""Environment servers: OpenEnv by HTTP and WebSocket, NeMo Gym, and TextArena's games, each against a local one."""

import json
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from jaxrlhf.environments.check import find_problems
from jaxrlhf.environments.nemo_gym import NeMoGym
from jaxrlhf.environments.openenv import OpenEnv
from jaxrlhf.environments.textarena import TextArena
from jaxrlhf.environments.tools import NO_CALLS_LEFT
from jaxrlhf.errors import Fault, UserError
from jaxrlhf.toy.games.number_guessing import NumberGuessing


@pytest.fixture
def serve():
    """`serve(answer)` starts a server. `answer(path, body, session)` returns (status, value)."""
    servers = []

    def start(answer):
        sessions = {}

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                session = (self.headers.get("Cookie") or "").partition("session=")[2].partition(";")[0]
                session = session if session in sessions else uuid.uuid4().hex
                status, value = answer(self.path, json.loads(body or b"null"), sessions.setdefault(session, {}))
                text = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.send_header("Set-Cookie", f"session={session}; Path=/")
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *arguments):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


# ---------------------------------------------------------------- OpenEnv


class OpenEnvGame:
    """Number guessing in the form of an OpenEnv environment: results are {observation, reward, done}."""

    def __init__(self):
        self.game, self.metadata = NumberGuessing(), {}

    def reset(self, seed=None, **parameters):
        (message,), _ = self.game.reset(seed=seed)
        self.parameters = parameters
        return {"observation": {"prompt": message["content"]}, "reward": None, "done": False}

    def step(self, action):
        (message,), reward, done, _, info = self.game.step(action["message"])
        observation = {"prompt": message["content"]}
        return {"observation": observation, "reward": reward, "done": done} | ({"metadata": info} if info else {})


def play(env, seed=5):
    messages, _ = env.reset(seed=seed, options={"level": "easy"})
    texts, done = [messages[0]["content"]], False
    low, high = 1, 30
    while not done:
        guess = (low + high) // 2
        (message,), reward, done, truncated, info = env.step(str(guess))
        low, high = (guess + 1, high) if message["content"] == "higher" else (low, guess - 1)
        texts.append(message["content"])
    return texts, reward, truncated, info


def test_openenv_by_http(serve):
    game = OpenEnvGame()

    def answer(path, body, session):
        if path == "/reset":
            return 200, game.reset(**body)
        return (200, game.step(body["action"])) if path == "/step" else (404, {"detail": "Not Found"})

    env = OpenEnv(serve(answer))
    texts, reward, truncated, info = play(env)
    assert texts[0] == "guess a number from 1 to 30" and texts[-1] == "right"
    assert (reward, truncated, info) == (1.0, False, {"success": True, "metadata": {"success": True}})
    assert game.parameters == {"level": "easy"}
    assert find_problems(env) == ([], [])
    env.close()


def test_openenv_by_websocket_keeps_a_session_for_each_client():
    server_of = pytest.importorskip("websockets.sync.server")

    def handle(socket):
        game = OpenEnvGame()
        for line in socket:
            message = json.loads(line)
            if message["type"] == "reset":
                answer = {"type": "observation", "data": game.reset(**message["data"])}
            elif "message" in message["data"]:
                answer = {"type": "observation", "data": game.step(message["data"])}
            else:
                answer = {"type": "error", "data": {"message": "no field message", "code": "VALIDATION_ERROR"}}
            socket.send(json.dumps(answer))

    with server_of.serve(handle, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"ws://127.0.0.1:{server.socket.getsockname()[1]}/ws"
        env, other = OpenEnv(url), OpenEnv(url)
        env.reset(seed=5)
        other.reset(seed=6)
        assert play(env)[1] == 1.0 == play(other, seed=7)[1]
        wrong = OpenEnv(url, action_field="code")
        with pytest.raises(Fault, match="call reset"):
            wrong.step("x")
        wrong.reset()
        with pytest.raises(Fault, match="step was answered with"):
            wrong.step("x")
        for each in (env, other, wrong):
            each.close()
        server.shutdown()


def test_observations_of_openenv_become_text(serve):
    observations = iter(
        [
            {"prompt": "Wordle", "messages": [{"sender_id": -1, "content": "begin", "category": "PROMPT"}]},
            {"prompt": "Wordle", "messages": [{"sender_id": -1, "content": "GYXXX", "category": "MESSAGE"}]},
            {"stdout": "3\n", "exit_code": 0},
            {"board": [1, 2]},
        ]
    )
    env = OpenEnv(serve(lambda *_: (200, {"observation": next(observations), "reward": 0, "done": False})))
    assert env.reset()[0][0]["content"] == "Wordle\nbegin"
    assert [env.step("x")[0][0]["content"] for _ in range(3)] == ["GYXXX", "3\n", '{"board": [1, 2]}']


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((500, {"detail": "broken"}), r"/reset: status 500: '\{\"detail\": \"broken\"\}'"),
        ((200, b"<html>"), "the response is not a JSON object: '<html>'"),
        ((200, b"[" * 100_000), "the response is not a JSON object"),
        ((200, {"observation": "text"}), "the observation must be an object, not 'text'"),
        ((302, {}), "status 302"),
    ],
)
def test_answers_in_another_form_are_faults(serve, answer, message):
    with pytest.raises(Fault, match=message):
        OpenEnv(serve(lambda *_: answer)).reset()


def test_urls_and_fields_are_checked(serve):
    for url in ("ftp://host", "host", "http://", 5):
        with pytest.raises(UserError, match="url: "):
            NeMoGym(url)
    for scheme in ("http", "ws"):
        with pytest.raises(Fault, match=r"\A(http|ws)://127.0.0.1:9.*(ConnectError|Refused)") as caught:
            OpenEnv(f"{scheme}://me:secret@127.0.0.1:9").reset()
        assert "secret" not in str(caught.value)
    url = serve(lambda *_: (200, {"observation": {"text": "a"}, "reward": "much", "done": False}))
    env = OpenEnv(url, observation_field="board")
    with pytest.raises(Fault, match="the observation has no board; its fields are: text"):
        env.reset()
    with pytest.raises(Fault, match="the reward must be a number or null, not 'much'"):
        OpenEnv(url).step("x")


# ---------------------------------------------------------------- NeMo Gym

ROW = {
    "responses_create_params": {
        "input": [{"role": "user", "content": "what is 2 + 3 ?"}],
        "tools": [{"type": "function", "name": "add", "description": "Adds.", "strict": True,
                   "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}],
    },
    "expected": "5",
}  # fmt: skip


def nemo_gym(seen):
    """A resources server: a counter for each session, one tool, and a verifier that reads the transcript."""

    def answer(path, body, session):
        seen.append((path, body))
        if path == "/seed_session":
            session.update(calls=0, expected=body["expected"])
            return 200, {}
        if not session:
            return 400, {"detail": "no session"}
        if path == "/add":
            session["calls"] += 1
            return (200, {"sum": body["a"] + body["b"]}) if "b" in body else (422, {"detail": "b is missing"})
        if path == "/verify":
            last = body["response"]["output"][-1]
            right = last["type"] == "message" and session["expected"] in last["content"][0]["text"]
            return 200, body | {"reward": float(right and session["calls"] > 0)}
        return 404, {"detail": "Not Found"}

    return answer


def call(name, **arguments):
    return f'<tool_call>\n{json.dumps({"name": name, "arguments": arguments})}\n</tool_call>'


def test_nemo_gym_runs_calls_and_verifies_the_transcript(serve):
    seen = []
    env = NeMoGym(serve(nemo_gym(seen)))
    messages, info = env.reset(options=ROW)
    assert messages == ROW["responses_create_params"]["input"]
    (tool,) = ROW["responses_create_params"]["tools"]
    function = {name: tool[name] for name in ("name", "description", "parameters")}
    assert info["tools"] == [{"type": "function", "function": function}]
    (message,), *_ = env.step(call("add", a=2, b=3))
    assert message["role"] == "tool" and json.loads(message["content"]) == {"sum": 5}
    (message,), *_ = env.step(call("add", a=2))
    assert message["content"].startswith("error: status 422")
    (message,), *_ = env.step(call("verify", response={}))
    assert message["content"] == "error: no tool 'verify'; the tools are: add"
    assert env.step("it is 5")[1:] == (1.0, True, False, {"success": True, "calls": 3})
    assert [path for path, _ in seen] == ["/seed_session", "/add", "/add", "/verify"]
    output = seen[-1][1]["response"]["output"]
    kinds = ["function_call", "function_call_output"] * 3 + ["message"]
    assert [item["type"] for item in output] == kinds and output[0]["call_id"] == output[1]["call_id"]
    assert json.loads(output[0]["arguments"]) == {"a": 2, "b": 3}
    # Another episode has another session: no call was made in it.
    env.reset(options=ROW)
    assert env.step("5")[1:3] == (0.0, True)
    with pytest.raises(RuntimeError, match="call reset"):
        env.step("5")


def test_nemo_gym_bounds_the_calls_and_names_rows_without_a_question(serve):
    env = NeMoGym(serve(nemo_gym([])), max_calls=0)
    env.reset(options=ROW)
    assert env.step(call("add", a=1, b=1))[0][0]["content"] == NO_CALLS_LEFT
    assert env.step("the call is 5 " + call("add", a=1, b=1))[1:4] == (0.0, False, True)
    with pytest.raises(UserError, match="needs responses_create_params with an input; its columns are: expected"):
        env.reset(options={"expected": "5"})
    with pytest.raises(UserError, match="parser: must be one of"):
        NeMoGym("http://127.0.0.1", parser="gpt")
    with pytest.raises(UserError, match=r"parser: must be one of hermes, .*, not 'plain'"):
        NeMoGym("http://127.0.0.1", parser="plain")


# ---------------------------------------------------------------- TextArena


class Nim:
    """A game with TextArena's methods: 7 stones, each player takes 1 or 2, and who takes the last one wins."""

    def reset(self, num_players, seed=None):
        self.stones, self.turn, self.players, self.rewards, self.seen = 7, 0, num_players, None, {}

    def get_observation(self):
        return self.turn, [(-1, f"{self.stones} stones", "GAME_BOARD"), (-1, "take 1 or 2", "PROMPT")]

    def step(self, action):
        number = int(action) if action in ("1", "2") else None
        winner = None if number else 1 - self.turn
        self.stones -= number or 0
        winner = self.turn if self.stones <= 0 else winner
        if winner is not None:
            self.rewards = {player: 1 if player == winner else -1 for player in range(self.players)}
        self.turn = 1 - self.turn
        return winner is not None, {}

    def close(self):
        return self.rewards, {player: {"turn_count": 3} for player in range(self.players)}


def test_textarena_games_are_played_against_functions():
    seen = []

    def greedy(text):
        seen.append(text)
        return "2" if not text.startswith("1 ") else "1"

    env = TextArena(Nim(), [greedy], player=0)
    assert env.reset(seed=1)[0] == [{"role": "user", "content": "7 stones\ntake 1 or 2"}]
    assert env.step("1")[0][0]["content"] == "4 stones\ntake 1 or 2"  # 6 left, the other takes 2
    assert seen == ["6 stones\ntake 1 or 2"]
    env.step("1")
    _, reward, terminated, truncated, info = env.step("1")
    assert (reward, terminated, truncated) == (1.0, True, False)
    assert info == {"success": True, "game": {"turn_count": 3}}
    env = TextArena(Nim(), [greedy])
    assert {env.reset(seed=seed)[1]["player"] for seed in range(20)} == {0, 1}
    env = TextArena(Nim(), [greedy], player=1)
    assert env.reset(seed=0)[0][0]["content"].startswith("5 stones")
    assert env.step("nonsense")[1:4] == (-1.0, True, False)
    with pytest.raises(UserError, match="player: must be 0 to 1"):
        TextArena(Nim(), [greedy], player=2)


def test_textarena_by_name_needs_the_package():
    try:
        import textarena  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="needs TextArena: pip install textarena"):
            TextArena("TicTacToe-v0")
