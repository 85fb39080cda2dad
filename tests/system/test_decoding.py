"""Beam search, best_of, bad words and logits processors through a real server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from dovetail import LLM
from dovetail.core.engine.beam_search import BeamSearchParams
from tests import processors
from tests.servers import Server

PROMPT = "def main("
SOURCE = """
from dovetail.core.contracts.logits import LogitsProcessor

class Ban(LogitsProcessor):
    def validate(self, argument, vocab_size):
        if not isinstance(argument, int):
            raise ValueError("it takes one token id.")
    def apply(self, logits_V, output_token_ids, argument):
        if len(output_token_ids) == 3 and argument == 1:
            raise RuntimeError("the fourth token is too much")
        logits_V[argument] = float("-inf")
        return logits_V
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    with (
        processors.installed(tmp_path_factory.mktemp("plugins"), SOURCE, "Ban") as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("PYTHONPATH", str(folder))
        server = Server(log, "--device", "cpu", "--dtype", "float32", "--threads", "1")
    yield server
    assert server.stop() == 0


def post(server: Server, path: str = "/v1/completions", **body: Any) -> httpx.Response:
    if path == "/v1/completions":
        body = {"prompt": PROMPT, "max_tokens": 8, **body}
    else:
        body = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 8, **body}
    return httpx.post(server.url + path, json=body, timeout=60)


def choices(server: Server, **body: Any) -> list[dict[str, Any]]:
    response = post(server, **body)
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = response.json()["choices"]
    return found


def test_a_beam_search_gives_what_the_llm_gives(server: Server) -> None:
    llm = LLM(device="cpu", dtype="float32", threads=1)
    (want,) = llm.beam_search(PROMPT, BeamSearchParams(beam_width=4, max_tokens=8))
    size = len(llm.get_tokenizer().encode(PROMPT))
    got = choices(server, use_beam_search=True, n=3, best_of=4, return_token_ids=True, logprobs=2)
    assert [c["token_ids"] for c in got] == [s.tokens[size:] for s in want.sequences[:3]]
    assert [c["index"] for c in got] == [0, 1, 2]
    for choice in got:
        assert len(choice["logprobs"]["token_logprobs"]) == len(choice["token_ids"])
        assert all(len(top) in (2, 3) for top in choice["logprobs"]["top_logprobs"])
    assert len({c["text"] for c in got}) == 3


def test_a_chat_may_search_too(server: Server) -> None:
    response = post(server, "/v1/chat/completions", use_beam_search=True, n=2, length_penalty=0.0)
    assert response.status_code == 200, response.text
    body = response.json()
    assert len(body["choices"]) == 2 and body["usage"]["completion_tokens"] > 0
    assert body["choices"][0]["message"]["content"] != body["choices"][1]["message"]["content"]


def test_best_of_gives_the_likeliest(server: Server) -> None:
    def mean(choice: dict[str, Any]) -> float:
        scores = choice["logprobs"]["token_logprobs"]
        return float(sum(scores) / len(scores))

    drawn = {"seed": 5, "temperature": 1.2, "logprobs": 0, "return_token_ids": True}
    every = choices(server, n=6, **drawn)
    best = choices(server, n=2, best_of=6, **drawn)
    assert [c["token_ids"] for c in best] == [
        c["token_ids"] for c in sorted(every, key=mean, reverse=True)[:2]
    ]


def test_bad_words_are_not_said(server: Server) -> None:
    plain = choices(server, temperature=0, max_tokens=24)[0]["text"]
    word = next(w for w in plain.split() if w.isalpha() and len(w) > 2)
    without = choices(server, temperature=0, max_tokens=24, bad_words=[word])[0]["text"]
    assert word in plain.split() and word not in without.split()


def test_a_processor_is_applied_and_one_that_fails_is_the_requests_loss(server: Server) -> None:
    plain = choices(server, temperature=0, return_token_ids=True)[0]["token_ids"]
    asked = {"temperature": 0, "return_token_ids": True, "logits_processors": {"ban": plain[0]}}
    assert plain[0] not in choices(server, **asked)[0]["token_ids"]
    response = post(server, temperature=0, logits_processors={"ban": 1})
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "request_failed"
    assert choices(server, temperature=0, return_token_ids=True)[0]["token_ids"] == plain


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("processors", "message"),
    [
        ({"bann": 1}, "There is no logits processor 'bann'; known: ban."),
        ({"ban": "x"}, "one token"),
    ],
)
def test_what_is_not_installed_or_wrong_is_a_400(
    server: Server, stream: bool, processors: dict[str, Any], message: str
) -> None:
    response = post(server, stream=stream, logits_processors=processors)
    assert response.status_code == 400
    error = response.json()["error"]
    assert message in error["message"] and error["param"].startswith("logits_processors")
