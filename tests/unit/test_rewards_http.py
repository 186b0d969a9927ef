"""Remote terms against a real server on this machine: what is posted, retried, bounded."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import math
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rayrl.data.images import FORMATS
from rayrl.rewards.deadline import Deadline
from rayrl.rewards.http import ChatTerm, Client, HttpTerm, rating
from rayrl.rewards.term import Failure, Item, Judged
from rayrl.types import Prompt

Answer = Callable[[dict[str, Any]], tuple[int, object]]


class Server:
    """Answers every post with ``answer(body)``; remembers bodies, keys and the most at a time."""

    def __init__(self) -> None:
        self.answer: Answer = lambda body: (200, {})
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.now = self.most = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.bodies.append(body)
                    outer.keys.append(self.headers["Authorization"])
                    outer.now += 1
                    outer.most = max(outer.most, outer.now)
                status, answer = outer.answer(body)
                with outer.lock:
                    outer.now -= 1
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self.send_response(status)
                    self.end_headers()
                    self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/score"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def client(server: Server, **fields: Any) -> Client:
    settings = {"timeout_s": 5.0, "retries": 2, "in_flight": 4, "first_pause_s": 0.001, **fields}
    return Client(server.url, **settings)


def item(i: int, *captions: str) -> Item:
    image = b"\x89PNG pixels"
    prompt = Prompt(prompt_id=f"p{i}", image=image, text="Describe.", references=("a dog", "dogs"))
    return Item(prompt, captions, (True,) * len(captions))


def lengths(body: dict[str, Any]) -> tuple[int, object]:
    return 200, {"scores": [[len(c) for c in item["captions"]] for item in body["items"]]}


def test_a_batch_is_posted_and_scored_in_order(server: Server) -> None:
    server.answer = lengths
    items = [item(i, "x" * i, "yy") for i in range(5)]
    results = HttpTerm(client(server), items_per_request=2).score(items)
    assert [list(scores) for scores in results] == [[float(i), 2.0] for i in range(5)]
    assert sorted(len(body["items"]) for body in server.bodies) == [1, 2, 2]
    sent = next(e for body in server.bodies for e in body["items"] if e["prompt_id"] == "p3")
    assert sent == {
        "prompt_id": "p3",
        "prompt": "Describe.",
        "image": base64.b64encode(b"\x89PNG pixels").decode(),
        "captions": ["xxx", "yy"],
        "references": ["a dog", "dogs"],
    }


def test_a_busy_server_is_asked_again(server: Server) -> None:
    statuses = iter([503, 429])

    def busy(body: dict[str, Any]) -> tuple[int, object]:
        status = next(statuses, 200)
        return lengths(body) if status == 200 else (status, "busy")

    server.answer = busy
    (scores,) = HttpTerm(client(server), 8).score([item(0, "abc")])
    assert isinstance(scores, np.ndarray) and scores.tolist() == [3.0]
    assert len(server.bodies) == 3


@pytest.mark.parametrize(
    ("status", "answer", "requests", "reason"),
    [
        (500, "out of memory", 3, "after 3 attempt(s): status 500: \"out of memory\""),
        (404, "no such path", 1, "after 1 attempt(s): status 404"),
        (200, b"<html>", 3, "answer not understood, JSONDecodeError"),
        (200, {"score": []}, 3, "answer not understood, KeyError: 'scores'"),
        (200, {"scores": [[1.0]]}, 3, "scores of shapes [(1,)], want [(2,)]"),
        (200, {"scores": [["good", "bad"]]}, 3, "answer not understood, ValueError"),
        (200, {"scores": [[1, math.nan]]}, 3, "scores [1.0, nan] of p0, want finite numbers"),
        (200, {"scores": [[1, None]]}, 3, "scores [1.0, nan] of p0, want finite numbers"),
        (200, {"scores": [[1, 2]], "versions": [[math.inf, 1]]}, 3, "understood, OverflowError"),
        (200, b"[" * 200_000 + b"]" * 200_000, 3, "not understood, RecursionError"),
    ],
)  # fmt: skip
def test_what_fails_for_good_is_a_failure_with_the_reason(
    server: Server, status: int, answer: object, requests: int, reason: str
) -> None:
    server.answer = lambda body: (status, answer)
    (result,) = HttpTerm(client(server), 8).score([item(0, "a", "b")])
    assert isinstance(result, Failure)
    assert reason in result.reason and server.url in result.reason
    assert len(server.bodies) == requests


@pytest.mark.parametrize("how", ["stalls", "breaks off"])
def test_a_status_whose_words_do_not_come_is_a_failure(how: str) -> None:
    """The body of an error is read with the same errors as that of an answer."""
    listening = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listening.accept()
                while b"\r\n\r\n" not in connection.recv(1 << 16):
                    pass
                connection.sendall(b"HTTP/1.1 502 Bad Gateway\r\n")
                if how == "stalls":
                    connection.sendall(b"Content-Length: 9\r\n\r\n")
                    over.wait(5)
                else:
                    connection.sendall(b"Transfer-Encoding: chunked\r\n\r\nno size\r\n")
                connection.close()

    threading.Thread(target=serve, daemon=True).start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    asked = Client(url, timeout_s=0.2, retries=0, in_flight=1)
    (result,) = HttpTerm(asked, 8).score([item(0, "a")])
    over.set()
    listening.close()
    assert isinstance(result, Failure)
    assert "after 1 attempt(s): status 502" in result.reason


def test_what_a_server_leaves_open_is_not_there(server: Server) -> None:
    server.answer = lambda body: (200, {"scores": [[1]], "versions": None, "wrong_spans": None})
    (scores,) = HttpTerm(client(server), 8).score([item(0, "a")])
    assert isinstance(scores, np.ndarray) and scores.tolist() == [1.0]


def test_one_failing_request_does_not_take_the_others_with_it(server: Server) -> None:
    server.answer = lambda body: (
        (500, "") if body["items"][0]["prompt_id"] == "p1" else lengths(body)
    )
    results = HttpTerm(client(server, retries=0), 1).score([item(i, "ab") for i in range(3)])
    assert [isinstance(result, Failure) for result in results] == [False, True, False]


def test_a_slow_server_times_out(server: Server) -> None:
    done = threading.Event()
    server.answer = lambda body: (done.wait(5), lengths(body))[1]
    (result,) = HttpTerm(client(server, timeout_s=0.1, retries=1), 8).score([item(0, "a")])
    done.set()
    assert isinstance(result, Failure)
    assert "after 2 attempt(s): TimeoutError" in result.reason


def test_at_the_deadline_of_a_call_what_is_there_is_kept(server: Server) -> None:
    done = threading.Event()

    def hangs_for_one(body: dict[str, Any]) -> tuple[int, object]:
        if body["items"][0]["prompt_id"] == "p1":
            done.wait(10)
        return lengths(body)

    server.answer = hangs_for_one
    deadline = Deadline(0.5)
    patient = client(server, timeout_s=60.0, in_flight=1, deadline=deadline)
    deadline.start()
    results = HttpTerm(patient, 1).score([item(i, "ab") for i in range(4)])
    assert [isinstance(result, Failure) for result in results] == [False, True, True, True]
    assert isinstance(results[1], Failure) and isinstance(results[3], Failure)
    assert re.search(r"not answered within 0.5 s|after 1 attempt\(s\)", results[1].reason)
    # One at a time: the others were never asked.
    assert re.search(r"not answered within 0.5 s|after 0 attempt\(s\)", results[3].reason)
    done.set()
    server.answer = lengths
    # A later call has its own time.
    deadline.start()
    assert [list(scores) for scores in HttpTerm(patient, 1).score([item(1, "ab")])] == [[2.0]]


def test_an_answer_that_trickles_in_is_not_waited_for(server: Server) -> None:
    """Every byte ends the wait of a socket, and begins the next."""
    listening = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def serve() -> None:
        connection, _ = listening.accept()
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        with contextlib.suppress(OSError):
            while not over.wait(0.05):
                connection.sendall(b" ")
        connection.close()

    threading.Thread(target=serve, daemon=True).start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    asked = Client(url, timeout_s=1.0, retries=0, in_flight=1, deadline=Deadline(0.3))
    (result,) = HttpTerm(asked, 8).score([item(0, "a")])
    over.set()
    listening.close()
    assert result == Failure(f"{url}: not answered within 0.3 s for the batch")


def test_no_server_is_a_failure() -> None:
    nowhere = Client("http://127.0.0.1:9/x", 1.0, 1, 2, first_pause_s=0.001)
    (result,) = HttpTerm(nowhere, 8).score([item(0, "a")])
    assert isinstance(result, Failure) and "after 2 attempt(s)" in result.reason


def test_requests_in_flight_are_bounded(server: Server) -> None:
    def slow(body: dict[str, Any]) -> tuple[int, object]:
        time.sleep(0.02)
        return lengths(body)

    server.answer = slow
    HttpTerm(client(server, in_flight=3), 1).score([item(i, "a") for i in range(12)])
    assert 2 <= server.most <= 3
    assert len(server.bodies) == 12


def chat(server: Server, answer: Callable[[str], str], **fields: Any) -> ChatTerm:
    def reply(body: dict[str, Any]) -> tuple[int, object]:
        text = body["messages"][0]["content"][1]["text"]
        return 200, {"choices": [{"message": {"content": answer(text)}}]}

    server.answer = reply
    question = "Rate: {caption}\nRight are: {references}"
    return ChatTerm(client(server, **fields), "judge", question, scale=10.0, max_tokens=99)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_judge_is_told_what_kind_of_file_a_picture_is(server: Server, kind: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, kind)
    pictured = item(0, "a cat")
    prompt = replace(pictured.prompt, image=file.getvalue())
    chat(server, lambda text: "3").score([replace(pictured, prompt=prompt)])
    url = server.bodies[0]["messages"][0]["content"][0]["image_url"]["url"]
    assert url.startswith(f"data:{Image.MIME[kind]};base64,")


def test_what_a_server_has_none_of_may_be_null(server: Server) -> None:
    term = HttpTerm(client(server), 8)
    answer = {"scores": [[1, 2]], "versions": None, "wrong_spans": None}
    server.answer = lambda body: (200, answer)
    (scores,) = term.score([item(0, "a", "bb")])
    assert isinstance(scores, np.ndarray) and scores.tolist() == [1.0, 2.0]
    server.answer = lambda body: (200, {**answer, "versions": [[4, 5]]})
    (judged,) = term.score([item(0, "a", "bb")])
    assert isinstance(judged, Judged)
    assert (judged.versions, judged.wrong_spans) == ((4, 5), None)
    assert len(server.bodies) == 2


def test_a_judge_is_asked_about_each_distinct_caption(server: Server) -> None:
    term = chat(server, lambda text: "On 0 to 10 I say 7.5" if "a cat" in text else "3")
    results = term.score([item(0, "a cat", "a dog", "a cat"), item(1, "a cat")])
    assert [list(scores) for scores in results] == [[0.75, 0.3, 0.75], [0.75]]
    assert len(server.bodies) == 3
    asked = {b["messages"][0]["content"][1]["text"].splitlines()[0]: b for b in server.bodies}
    body = asked["Rate: a dog"]
    image, text = body["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    assert text["text"] == "Rate: a dog\nRight are: a dog\ndogs"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge", 0, 99)


def test_a_judge_is_asked_about_a_caption_against_other_references_too(server: Server) -> None:
    term = chat(server, lambda text: "9" if "Right are: a bird" in text else "3")
    one = item(0, "a cat", "{references}")
    other = replace(one, prompt=replace(one.prompt, references=("a bird",)))
    assert [list(scores) for scores in term.score([one, other])] == [[0.3, 0.3], [0.9, 0.9]]
    asked = sorted(body["messages"][0]["content"][1]["text"] for body in server.bodies)
    # What a caption says is not filled in.
    assert asked[-1] == "Rate: {references}\nRight are: a dog\ndogs"


def test_a_judge_who_is_cut_off_drops_the_image(server: Server) -> None:
    term = chat(server, lambda text: "", retries=0)
    choice = {"message": {"content": "There are 3 dogs, which"}, "finish_reason": "length"}
    server.answer = lambda body: (200, {"choices": [choice]})
    (result,) = term.score([item(0, "a cat")])
    assert isinstance(result, Failure)
    assert "cut at max_tokens 99: 'There are 3 dogs, which'" in result.reason


def test_a_judge_who_will_not_say_drops_the_image(server: Server) -> None:
    term = chat(server, lambda text: "I cannot" if "a cat" in text else "9", retries=0)
    results = term.score([item(0, "a cat", "a dog"), item(1, "a dog")])
    assert isinstance(results[0], Failure) and "no number in 'I cannot'" in results[0].reason
    assert list(results[1]) == [0.9]


@pytest.mark.parametrize(
    ("answer", "want"),
    [
        ("7", 7),
        ("Score: 7.5.", 7.5),
        ("On 0 to 10 I say 0", 0),
        ("8/10", 8),
        ("7 out of 10.", 7),
        ("I give 8 of 10", 8),
        ("**7**/10", 7),
        ("I would rate it 7 on a scale of 0 to 10", 7),
        ("7, on a scale from 1-10", 7),
        ("From 0 to 10: 6", 6),
        ("a 3.5, on a scale of 1.0 to 10.0.", 3.5),
        ("A 4 on the 0-10 scale", 4),
        ("It is a 5 on a scale of 10.", 5),
        ("7 on a 10-point scale", 7),
        ("7 (of 10)", 7),
        ("8 out of a possible 10", 8),
        ("8/10; on a scale of 3 it would be a 2", 8),
        ("A 4 on a scale of 1 to 5", "'scale of 1 to 5', want a number from 0 to 10"),
        ("On a scale of 0 to 10, the caption is vague", "no number in"),
        ("from 2 to 3 dogs", 3),
        ("**Rating: 9 / 10**", 9),
        ("10/10, for it names 2 dogs", 10),
        ("1/2 of it is wrong: 3", 3),
        ("12", "12 in '12', want a number from 0 to 10"),
        ("-3", "-3 in"),
        ("7-8", "-8 in"),
        ("12/10", "12/10 in"),
        ("4/5", "4/5 in '4/5', want a number from 0 to 10"),
        ("85 out of 100", "85/100 in"),
        ("I cannot", "no number in 'I cannot'"),
    ],
)
def test_an_answer_is_a_number_of_the_scale_or_not_understood(
    answer: str, want: float | str
) -> None:
    if isinstance(want, str):
        with pytest.raises(ValueError, match=re.escape(want)):
            rating(answer, 10.0)
    else:
        assert rating(answer, 10.0) == want


def test_a_judge_beyond_the_scale_drops_the_image(server: Server) -> None:
    term = chat(server, lambda text: "12" if "a cat" in text else "8/10", retries=0)
    results = term.score([item(0, "a cat", "a dog"), item(1, "a dog")])
    assert isinstance(results[0], Failure) and "answer not understood" in results[0].reason
    assert list(results[1]) == [0.8]


def test_the_key_comes_from_the_environment(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    server.answer = lengths
    HttpTerm(client(server, api_key_variable="JUDGE_KEY"), 8).score([item(0, "a")])
    assert server.keys == ["Bearer secret"]
    with pytest.raises(ValueError, match="no environment variable OTHER_KEY"):
        client(server, api_key_variable="OTHER_KEY")
