"""Terms that ask a server: a reward model, or an LLM that judges.

Requests are retried, bounded in number at any time, and each has its time limit.  What fails for
good drops its image's group; it is never a score of 0.
"""

from __future__ import annotations

import base64
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, TypeVar

import numpy as np

from rayrl.credentials import redacted
from rayrl.data.images import media_type
from rayrl.rewards.deadline import FIRST_PAUSE_S, UNLIMITED, Deadline
from rayrl.rewards.term import Failure, Item, Judged, Scores

T = TypeVar("T")
_RETRIED_STATUS = frozenset({408, 425, 429})
_SAID = re.compile(
    r"(-?\d+(?:\.\d+)?)"
    r"(?:[*_`\s(]*(?:/|(?:out\s+)?of\b)(?:\s+a\s+(?:possible|total\s+of)\b)?[*_`\s]*(\d+(?:\.\d+)?))?",
    flags=re.IGNORECASE,
)
"""A number, and of how many it is where that is said: 7, 7/10, **7** out of 10."""

_N = r"\d+(?:\.\d+)?"
_SCALE = re.compile(
    rf"""\bscale\s+(?:of|from)\s+(?:{_N}\s*(?:to|-|–)\s*)?({_N})
    | \b(?:from|between)\s+{_N}\s*(?:to|and|-|–)\s*({_N})
    | \b(?:{_N}\s*(?:to|-|–)\s*)?({_N})(?:[\s-]points?)?\s+scale\b""",
    flags=re.IGNORECASE | re.VERBOSE,
)
"""Words that name a scale, and its end: on a scale of 0 to 10, from 0 to 10, on a 0-10 scale, on a
10-point scale."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Refuses to follow: the images and the key are for the server that was named."""

    def redirect_request(self, *_args: Any, **_kwargs: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)
_MAX_ANSWER = 64 << 20
_MISFITS = (ValueError, LookupError, TypeError, ArithmeticError, RecursionError)
"""What an answer raises that is not of the form wanted: a number that is infinite or a list nested
a hundred thousand deep too."""


class RequestFailed(RuntimeError):
    """A server did not answer, or not usefully, after every retry."""


@dataclass(frozen=True, slots=True)
class Client:
    """Posts JSON.  ``api_key_variable`` names the environment variable that holds the key ("" for
    none), so that no key is in a configuration file."""

    url: str
    timeout_s: float
    retries: int
    in_flight: int
    api_key_variable: str = ""
    first_pause_s: float = FIRST_PAUSE_S
    """The pause before the first retry; it doubles with each further one."""
    deadline: Deadline = UNLIMITED
    """Bounds all requests of a call together, their retries included."""

    def __post_init__(self) -> None:
        if self.api_key_variable and self.api_key_variable not in os.environ:
            raise ValueError(
                f"{self.url}: no environment variable {self.api_key_variable} with the key"
            )

    def map(self, function: Callable[[T], Any], jobs: Iterable[T]) -> list[Any]:
        """``function`` of each job, at most ``in_flight`` at a time; a failure for each one that
        has not come at the deadline."""
        pool = ThreadPoolExecutor(max_workers=self.in_flight)
        calls = [pool.submit(function, job) for job in jobs]
        done, _ = wait(calls, timeout=self.deadline.left)
        # A timeout bounds the wait for the next byte: one that goes on is left to itself.
        pool.shutdown(wait=False, cancel_futures=True)
        late = Failure(f"{self.url}: not answered within {self.deadline.limit_s:g} s for the batch")
        return [call.result() if call in done else late for call in calls]

    def post(self, body: object, read: Callable[[Any], T]) -> T:
        """What ``read`` makes of the answer.  An answer that it refuses with one of ``_MISFITS`` is
        retried like a failed request.  RequestFailed in the end, or when the time is over."""
        # Not that of a later call, should this one outlast its own.
        due = self.deadline.due
        attempts, reason = 0, "no time left for it"
        while attempts <= self.retries:
            pause = self.first_pause_s * 2 ** (attempts - 1) if attempts else 0.0
            if time.monotonic() + pause >= due:
                break
            time.sleep(pause)
            attempts += 1
            try:
                left = max(0.001, due - time.monotonic())
                return read(self._post(body, min(self.timeout_s, left)))
            except urllib.error.HTTPError as error:
                reason = f"status {error.code}: {_said_beside(error)}"
                if error.code < 500 and error.code not in _RETRIED_STATUS:
                    break
            except (OSError, HTTPException) as error:
                reason = f"{type(error).__name__}: {error}"
            except _MISFITS as error:
                reason = f"answer not understood, {type(error).__name__}: {error}"
        raise RequestFailed(f"{self.url} after {attempts} attempt(s): {self._hidden(reason)}")

    def _hidden(self, text: str) -> str:
        """A text without the key, which a server may repeat in its answer."""
        key = os.environ.get(self.api_key_variable, "") if self.api_key_variable else ""
        return redacted(text.replace(key, "***") if key else text)

    def _post(self, body: object, timeout_s: float) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.api_key_variable:
            headers["Authorization"] = f"Bearer {os.environ[self.api_key_variable]}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        with _OPENER.open(request, timeout=timeout_s) as response:
            answer = response.read(_MAX_ANSWER + 1)
        if len(answer) > _MAX_ANSWER:
            raise ValueError(f"more than {_MAX_ANSWER} bytes")
        return json.loads(answer)


def _said_beside(error: urllib.error.HTTPError) -> str:
    """The beginning of what a server says beside its status; "" where it does not come."""
    try:
        return error.read(200).decode(errors="replace")
    except (OSError, HTTPException):
        return ""


class HttpTerm:
    """A reward server.  It gets ``{"items": [{"prompt_id", "prompt", "image" (base64), "captions",
    "references"}, ...]}`` with up to ``items_per_request`` images, and answers ``{"scores":
    [[one number a caption], ...]}``, and if it likes ``"versions"`` (of the judge, one a caption)
    and ``"wrong_spans"`` ([[start, end], ...] in characters, a list a caption) of the same
    form; null is as none."""

    def __init__(self, client: Client, items_per_request: int) -> None:
        self._client = client
        self._items_per_request = items_per_request

    def score(self, items: Sequence[Item]) -> list[Scores | Judged | Failure]:
        size = self._items_per_request
        batches = [items[i : i + size] for i in range(0, len(items), size)]
        answers = zip(batches, self._client.map(self._score, batches), strict=True)
        return [
            result
            for batch, answer in answers
            for result in ([answer] * len(batch) if isinstance(answer, Failure) else answer)
        ]

    def _score(self, items: Sequence[Item]) -> Any:
        body = {"items": [_as_json(item) for item in items]}
        try:
            return self._client.post(body, lambda answer: _read_scores(answer, items))
        except RequestFailed as error:
            return Failure(str(error))


class ChatTerm:
    """An LLM judge behind an OpenAI-compatible ``/chat/completions``, asked about every caption
    with its image; the number of its answer (:func:`rating`), divided by ``scale``, is the
    score."""

    def __init__(
        self, client: Client, model: str, question: str, scale: float, max_tokens: int
    ) -> None:
        self._client = client
        self._model = model
        self._question = question
        self._scale = scale
        self._max_tokens = max_tokens

    def score(self, items: Sequence[Item]) -> list[Scores | Failure]:
        """What is asked twice is asked once: the same of an image."""
        asked = [[(i.prompt.prompt_id, self._text(i, c)) for c in i.captions] for i in items]
        images = {item.prompt.prompt_id: item.prompt.image for item in items}
        questions = list(dict.fromkeys(question for some in asked for question in some))
        jobs = [(images[prompt_id], text) for prompt_id, text in questions]
        answers = dict(zip(questions, self._client.map(self._ask, jobs), strict=True))
        return [_collect([answers[question] for question in some]) for some in asked]

    def _text(self, item: Item, caption: str) -> str:
        text = self._question.replace("{references}", "\n".join(item.prompt.references))
        return text.replace("{caption}", caption)

    def _ask(self, job: tuple[bytes, str]) -> Any:
        image, text = job
        content = [
            {"type": "image_url", "image_url": {"url": _data_url(image)}},
            {"type": "text", "text": text},
        ]
        messages = [{"role": "user", "content": content}]
        body = {
            "model": self._model,
            "messages": messages,
            "temperature": 0,
            "max_tokens": self._max_tokens,
        }
        try:
            return self._client.post(body, self._read)
        except RequestFailed as error:
            return Failure(str(error))

    def _read(self, answer: Any) -> float:
        choice = answer["choices"][0]
        text = choice["message"]["content"]
        if choice.get("finish_reason") == "length":
            raise ValueError(f"cut at max_tokens {self._max_tokens}: {text!r:.100}")
        return rating(text, self._scale) / self._scale


def rating(text: str, scale: float) -> float:
    """What a judge's answer gives, from 0 to ``scale``: the last number that is said to be out of
    ``scale`` ("8/10", "7 out of 10"), else the last number that does not just name the scale ("7 on
    a scale of 0 to 10").  ValueError where there is none, or it is on another scale: a clipped
    guess would be learned from like an answer."""
    out_of = [pair for pair in _SAID.findall(text) if pair[1] and float(pair[1]) == scale]
    said = out_of or _SAID.findall(_SCALE.sub(lambda named: _without_scale(named, scale), text))
    if not said:
        raise ValueError(f"no number in {text[:100]!r}")
    number, of = said[-1]
    if (of and float(of) != scale) or not 0 <= float(number) <= scale:
        shown = f"{number}/{of}" if of else number
        raise ValueError(f"{shown} in {text[:100]!r}, want a number from 0 to {scale:g} (scale)")
    return float(number)


def _without_scale(named: re.Match[str], scale: float) -> str:
    """Nothing in place of the words that name the scale; ValueError where it is another one."""
    if float(named[1] or named[2] or named[3]) == scale:
        return ""
    if "scale" in named[0].lower():
        raise ValueError(f"{named[0]!r}, want a number from 0 to {scale:g} (scale)")
    return named[0]


def _data_url(image: bytes) -> str:
    return f"data:{media_type(image) or 'image/jpeg'};base64,{base64.b64encode(image).decode()}"


def _as_json(item: Item) -> dict[str, object]:
    return {
        "prompt_id": item.prompt.prompt_id,
        "prompt": item.prompt.text,
        "image": base64.b64encode(item.prompt.image).decode(),
        "captions": item.captions,
        "references": item.prompt.references,
    }


def _read_scores(answer: Any, items: Sequence[Item]) -> list[Scores | Judged]:
    scores = [np.asarray(row, dtype=np.float64) for row in answer["scores"]]
    got, want = [row.shape for row in scores], [(len(item.captions),) for item in items]
    if got != want:
        raise ValueError(f"scores of shapes {got}, want {want}")
    for item, row in zip(items, scores, strict=True):
        if not np.isfinite(row).all():
            who = item.prompt.prompt_id
            raise ValueError(f"scores {row.tolist()} of {who}, want finite numbers")
    none = [None] * len(items)
    versions, spans = (
        none if answer.get(name) is None else answer[name] for name in ("versions", "wrong_spans")
    )
    if versions is spans is none:
        return list(scores)
    rows = zip(scores, versions, spans, strict=True)
    return [
        Judged(
            some,
            None if of is None else tuple(int(v) for v in of),
            None if wrong is None else tuple(tuple((int(a), int(b)) for a, b in s) for s in wrong),
        )
        for some, of, wrong in rows
    ]


def _collect(answers: list[float | Failure]) -> Scores | Failure:
    failure = next((answer for answer in answers if isinstance(answer, Failure)), None)
    return failure if failure is not None else np.array(answers, dtype=np.float64)
