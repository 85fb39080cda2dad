"""The routes beside generation: models, tokenizer, probes, figures, the document."""

from __future__ import annotations

import json
import logging
import re
from typing import Any

import pytest

from dovetail.core.errors import ConfigError, RequestFailedError
from dovetail.core.server.app import create_app
from dovetail.core.server.settings import Limits, ServerSettings
from tests.core.server.fakes import BOS, EOS, FakeEngine
from tests.core.server.harness import CHAT, COMPLETIONS, MESSAGES, client_of, envelope


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(max_model_len=128)


async def get(engine: FakeEngine, path: str, **settings: Any) -> Any:
    async with client_of(engine, **settings) as client:
        response = await client.get(path)
    assert response.status_code == 200, response.text
    return response.json()


async def post(engine: FakeEngine, path: str, **body: Any) -> Any:
    async with client_of(engine) as client:
        response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def test_models_under_all_their_names(engine: FakeEngine) -> None:
    names = ("short", "publisher/with/slashes")
    listed = await get(engine, "/v1/models", served_model_names=names)
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == list(names)
    for name in names:
        card = await get(engine, f"/v1/models/{name}", served_model_names=names)
        assert card["id"] == name
        assert (card["object"], card["owned_by"], card["max_model_len"]) == (
            "model",
            "dovetail",
            128,
        )
        assert isinstance(card["created"], int)
        assert "secret-place" not in json.dumps(card)


async def test_an_unknown_model_is_404(engine: FakeEngine) -> None:
    async with client_of(engine) as client:
        response = await client.get("/v1/models/other/model")
    assert response.status_code == 404
    assert envelope(response)["code"] == "model_not_found"


async def test_models_are_listed_while_loading() -> None:
    assert (await get(FakeEngine(state="loading"), "/v1/models"))["data"]


async def test_tokenize_and_detokenize(engine: FakeEngine) -> None:
    tokens = await post(engine, "/tokenize", prompt="hé", return_token_strs=True)
    assert tokens["tokens"] == [BOS, 104, 0xC3, 0xA9]
    assert tokens["count"] == 4 and tokens["max_model_len"] == 128
    assert tokens["token_strs"][:2] == ["<s>", "h"]
    plain = await post(engine, "/tokenize", prompt="h", add_special_tokens=False)
    assert plain["tokens"] == [104] and plain["token_strs"] is None
    chat = await post(engine, "/tokenize", messages=MESSAGES, add_generation_prompt=False)
    assert bytes(chat["tokens"]) == b"user: hello\n"
    assert await post(engine, "/detokenize", tokens=[104, EOS]) == {"prompt": "h</s>"}


async def test_long_texts_may_be_counted(engine: FakeEngine) -> None:
    assert (await post(engine, "/tokenize", prompt="x" * 100_000))["count"] == 100_001
    assert await post(engine, "/tokenize", prompt="") == {
        "count": 1,
        "max_model_len": 128,
        "tokens": [BOS],
        "token_strs": None,
    }


async def test_tokenizer_info(engine: FakeEngine) -> None:
    info = await get(engine, "/tokenizer_info", chat_template="mine")
    assert info == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": None,
        "chat_template": "mine",
    }


@pytest.mark.parametrize(
    ("state", "code", "retry"),
    [
        ("loading", "loading", "2"),
        ("draining", "draining", "1"),
        ("restarting", "restarting", "2"),
        ("dead", "engine_dead", "10"),
    ],
)
async def test_probes_when_not_ready(state: Any, code: str, retry: str) -> None:
    engine = FakeEngine(state=state, reason="weights 3 of 7")
    async with client_of(engine) as client:
        for path in ("/ready", "/health"):
            response = await client.get(path)
            assert response.status_code == 503
            assert response.headers["retry-after"] == retry
            body = response.json()
            assert body["status"] == body["error"]["code"] == code
            shows = state in ("loading", "restarting")
            assert ("weights 3 of 7" in body["error"]["message"]) == shows
        assert (await client.get("/live")).json() == {"status": "live"}
        assert "version" in (await client.get("/version")).json()


async def test_probes_when_ready(engine: FakeEngine) -> None:
    assert await get(engine, "/ready") == {"status": "ready"}
    assert await get(engine, "/health") == {"status": "ok"}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    ("state", "status"), [("loading", 503), ("draining", 503), ("dead", 503), ("restarting", 200)]
)
async def test_generation_when_not_ready(path: str, state: Any, status: int) -> None:
    engine = FakeEngine(state=state)
    async with client_of(engine) as client:
        body = {"prompt": "x", "messages": MESSAGES, "max_tokens": 1}
        response = await client.post(path, json=body)
    assert response.status_code == status
    if status == 503:
        assert envelope(response)["type"] == "server_error"
        assert int(response.headers["retry-after"]) >= 1
        assert not engine.calls


async def test_a_wrong_path_and_a_wrong_method(engine: FakeEngine) -> None:
    async with client_of(engine) as client:
        for path in ("/nope", "/v1/chat", "//v1/models", "/v1/models/", "/v1/completions/"):
            response = await client.get(f"http://server{path}")
            assert response.status_code == 404, path
            assert envelope(response)["type"] == "not_found_error"
        wrong = await client.get(CHAT)
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST"
    assert envelope(wrong)["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    ("given", "answered"),
    [
        ("abc-1.2_3:/+=@", "abc-1.2_3:/+=@"),
        ("a b\tc<script>", "abcscript"),
        ("x" * 1_000_000, "x" * 128),
    ],
)
async def test_request_ids_are_cleaned(engine: FakeEngine, given: str, answered: str) -> None:
    async with client_of(engine) as client:
        response = await client.get("/live", headers={"x-request-id": given})
    assert response.headers["x-request-id"] == answered


async def test_request_ids_are_made(engine: FakeEngine) -> None:
    async with client_of(engine) as client:
        ids = {
            (await client.get(path, headers={"x-request-id": "\t ()"})).headers["x-request-id"]
            for path in ("/live", "/nope", "/metrics")
        }
    assert all(re.fullmatch(r"[0-9a-f]{32}", one) for one in ids) and len(ids) == 3


async def test_the_log_has_what_the_client_must_not_see(
    engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.fail_at = {0: RequestFailedError("cosmic ray in row 7")}
    async with client_of(engine) as client:
        with caplog.at_level(logging.INFO):
            headers = {"x-request-id": "label", "authorization": "Bearer secret"}
            await client.post("/v1/completions", json={"prompt": "x"}, headers=headers)
            await client.get("/a%0d%0aFAKE%20LINE")
    assert "request label failed: cosmic ray in row 7" in caplog.text
    assert "POST '/v1/completions' 500" in caplog.text
    assert "'/a\\r\\nFAKE LINE' 404" in caplog.text
    assert "secret" not in caplog.text


async def test_openapi_describes_every_route(engine: FakeEngine) -> None:
    async with client_of(engine, root_path="/llm", public_paths=("/metrics",)) as client:
        document = (await client.get("/openapi.json")).json()
    assert document["openapi"].startswith("3.1")
    assert document["servers"] == [{"url": "/llm"}]
    paths = document["paths"]
    assert {"/v1/chat/completions", "/v1/models/{model}", "/openapi.json"} <= set(paths)
    chat = paths[CHAT]["post"]
    schema = chat["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    assert schema == "#/components/schemas/ChatCompletionRequest"
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert chat["security"] and not paths["/metrics"]["get"]["security"]
    assert paths["/v1/models/{model}"]["get"]["parameters"][0]["name"] == "model"
    text = json.dumps(document)
    for name in re.findall(r"#/components/schemas/(\w+)", text):
        assert name in document["components"]["schemas"]
    operations = [op["operationId"] for path in paths.values() for op in path.values()]
    assert len(operations) == len(set(operations))


async def test_a_text_beyond_all_measure_is_not_tokenised(engine: FakeEngine) -> None:
    limits = Limits(tokenize_chars=100)
    async with client_of(engine, limits=limits) as client:
        for size, status in ((100, 200), (101, 400)):
            response = await client.post("/tokenize", json={"prompt": "x" * size})
            assert response.status_code == status


async def test_websockets_are_turned_away(engine: FakeEngine) -> None:
    app = create_app(engine, ServerSettings(api_keys=()))
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    await app({"type": "websocket", "path": "/v1/models", "headers": []}, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]


async def test_the_application_runs_under_a_lifespan(engine: FakeEngine) -> None:
    app = create_app(engine, ServerSettings(api_keys=()))
    messages = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])
    sent: list[str] = []

    async def send(message: Any) -> None:
        sent.append(message["type"])

    async def receive() -> Any:
        return next(messages)

    await app({"type": "lifespan", "state": {}}, receive, send)
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


def test_keys_do_not_show_in_the_settings_text() -> None:
    assert "secret" not in repr(ServerSettings(api_keys=("secret",)))


@pytest.mark.parametrize("name", ["header_bytes", "body_stall_s", "json_depth"])
def test_limits_must_be_positive(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        Limits(**{name: 0})
