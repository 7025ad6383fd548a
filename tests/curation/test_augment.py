"""`data augment`: copies differ as asked, stay with their row, and are the same for the same seed."""

import json
import random
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from broken import chats, classification, demonstrations, jsonl

from jaxrlhf.__main__ import main
from jaxrlhf.curation.augment import Methods, augment, compiled_template, drop_words, read_synonyms, replace_synonyms
from jaxrlhf.curation.augment import swap_words as swap
from jaxrlhf.curation.rewriting import ChatServer, back_translation
from jaxrlhf.curation.split import split
from jaxrlhf.errors import Fault, UserError


def run(tmp_path, rows, methods, **options):
    (tmp_path / "a.jsonl").write_bytes(jsonl(rows))
    counts = augment(str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), methods, overwrite=True, **options)
    written = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    assert sum(counts) == len(written)
    return written


def test_words_are_dropped_swapped_and_replaced():
    rng, text = random.Random(0), " ".join(f"w{i}" for i in range(1000))
    dropped = drop_words(text, 0.3, rng).split()
    assert 600 < len(dropped) < 800 and dropped == [word for word in text.split() if word in {*dropped}]
    swapped = swap(text, 0.3, rng).split()
    moved = [i for i, word in enumerate(swapped) if word != f"w{i}"]
    assert sorted(swapped) == sorted(text.split()) and 300 < len(moved) < 600
    assert all(abs(int(word[1:]) - i) <= 1 for i, word in enumerate(swapped))
    assert drop_words("only", 0.99, rng) == "only" and swap("a  b\nc", 1.0, random.Random(0)) == "b  a\nc"
    assert replace_synonyms("Big, bigger, BIG.", {"big": ["large"]}, 1.0, rng) == "Large, bigger, Large."
    assert replace_synonyms("big", {"big": ["large"]}, 0.0, rng) == "big"


def test_a_row_and_its_copies_share_a_source_and_a_part(tmp_path):
    rows = [row | {"id": f"r{i}"} for i, row in enumerate(demonstrations(40))]
    written = run(tmp_path, rows, Methods(swap=0.5), copies=3)
    assert len(written) == 160 and [row["id"] for row in written[:5]] == ["r0", "r0-1", "r0-2", "r0-3", "r1"]
    assert [row["source"] for row in written] == [i // 4 + 1 for i in range(160)]
    assert all(row["response"] == rows[row["source"] - 1]["response"] for row in written)
    parts = split(str(tmp_path / "b.jsonl"), str(tmp_path / "out"), group="source")
    sources = [{json.loads(line)["source"] for line in Path(part.path).read_text().splitlines()} for part in parts]
    assert [len(part) for part in sources] == [32, 4, 4] and len(set().union(*sources)) == 40


def test_the_seed_decides_and_rows_do_not_depend_on_others(tmp_path):
    rows = demonstrations(20)
    first = run(tmp_path, rows, Methods(dropout=0.3))
    assert run(tmp_path, rows, Methods(dropout=0.3)) == first != run(tmp_path, rows, Methods(dropout=0.3), seed=1)
    assert run(tmp_path, rows[:5], Methods(dropout=0.3)) == first[:10]


def test_chats_and_templates(tmp_path):
    methods = Methods(templates=[compiled_template("Q: {{ text }} ({{ source }})")])
    rows = chats(3)
    written = run(tmp_path, rows, methods)
    for number, row in enumerate(rows, 1):
        question, answer = row["messages"]
        changed = question | {"content": f"Q: {question['content']} ({number})"}
        assert written[2 * number - 1]["messages"] == [changed, answer]
    assert run(tmp_path, classification(1), methods)[1]["text"].startswith("Q: ")
    with pytest.raises(UserError, match=r"must write \{\{ text \}\}"):
        compiled_template("no variable")
    with pytest.raises(UserError, match=r"a\.jsonl:1: the template fails: 'nothing' is undefined"):
        run(tmp_path, rows, Methods(templates=[compiled_template("{{ text }} {{ nothing }}")]))
    with pytest.raises(UserError, match="the template fails: access to attribute '__class__'"):
        run(tmp_path, rows, Methods(templates=[compiled_template("{{ text.__class__.__mro__ }}")]))


def test_synonyms_from_a_file(tmp_path):
    (tmp_path / "s.txt").write_text("# comment\nbig, Large,huge\n\nsmall,tiny\n")
    assert read_synonyms(str(tmp_path / "s.txt")) == {
        "big": ["Large", "huge"], "large": ["big", "huge"], "huge": ["big", "Large"],
        "small": ["tiny"], "tiny": ["small"],
    }  # fmt: skip
    (tmp_path / "s.txt").write_text("big, large\nalone\n")
    with pytest.raises(UserError, match=r"s.txt:2: a line must have several words"):
        read_synonyms(str(tmp_path / "s.txt"))


class Model(BaseHTTPRequestHandler):
    """Turns the last line of an instruction round, and fails the first request with status 503."""

    seen: list = []  # noqa: RUF012
    status = 200

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append((self.path, self.headers.get("Authorization"), body))
        text = body["messages"][0]["content"].splitlines()[-1][::-1]
        reply = json.dumps({"choices": [{"message": {"content": f" {text}\n"}}]}).encode()
        self.send_response(503 if len(self.seen) == 1 else self.status)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    Model.seen, Model.status = [], 200
    http = ThreadingHTTPServer(("127.0.0.1", 0), Model)
    Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/v1"
    http.shutdown()
    http.server_close()


def test_a_server_writes_paraphrases(tmp_path, monkeypatch, server, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KEY", "secret")
    rows = demonstrations(5)
    Path("a.jsonl").write_bytes(jsonl(rows))
    command = ["data", "augment", "a.jsonl", "--out", "b.jsonl", "--rewrite", "paraphrase", "--server", server]
    assert main([*command, "--model", "m", "--token-env", "KEY"]) == 0
    assert "b.jsonl: 5 rows and 5 changed copies" in capsys.readouterr().out
    written = [json.loads(line) for line in Path("b.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in written[1::2]] == [row["prompt"][::-1] for row in rows]
    assert len(Model.seen) == 6  # one was tried again
    path, token, body = Model.seen[0]
    assert path == "/v1/chat/completions" and token == "Bearer secret" and body["model"] == "m"
    assert re.match(r"Write this text in other words\. ", body["messages"][0]["content"])
    assert main(command) == 2 and "--rewrite: needs --model" in capsys.readouterr().err


def test_a_translation_comes_back(tmp_path, server):
    methods = Methods(rewrite=back_translation(ChatServer(server, "m"), "French"))
    rows = demonstrations(3)
    assert len(run(tmp_path, rows, methods)) == 3  # turned round twice: no copy differs
    asked = [body["messages"][0]["content"].split(".")[0] for _, _, body in Model.seen]
    assert asked.count("Translate this text into French") == 4 and asked.count("Translate this text into English") == 3


def test_a_server_that_fails_leaves_no_file(tmp_path, server):
    Model.status = 400
    with pytest.raises(Fault, match="must be 200, not 400"):
        run(tmp_path, demonstrations(2), Methods(rewrite=back_translation(ChatServer(server, "m"), "French")))
    assert not (tmp_path / "b.jsonl").exists()
    with pytest.raises(UserError, match="--server: URL localhost:8000/chat/completions: the scheme is"):
        ChatServer("localhost:8000", "m")


@pytest.mark.slow
def test_a_local_model_writes_paraphrases(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_bytes(jsonl(demonstrations(3)))
    model = str(Path(__file__).parents[1] / "data" / "files" / "stories260K")
    command = ["data", "augment", "a.jsonl", "--out", "b.jsonl", "--rewrite", "paraphrase", "--model", model]
    assert main([*command, "--max-new-tokens", "8"]) == 0
    written = [json.loads(line) for line in Path("b.jsonl").read_text().splitlines()]
    assert len(written) == 6 and len({row["prompt"] for row in written}) == 6
