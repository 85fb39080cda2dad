"""Every route with every kind of credential, under every spelling of its path."""

from __future__ import annotations

import itertools
from typing import Any

import httpx
import pytest
from starlette.routing import Route

from dovetail.core.errors import ConfigError
from dovetail.core.server.app import create_app
from dovetail.core.server.settings import ALWAYS_PUBLIC, ServerSettings
from tests.core.server.fakes import FakeEngine
from tests.core.server.harness import COMPLETIONS, client_of, envelope
from tests.thorough import thorough

KEYS = ("first-key", "second key ü")
ROUTES = {
    "/",
    "/detokenize",
    "/docs",
    "/health",
    "/live",
    "/metrics",
    "/openapi.json",
    "/ready",
    "/tokenize",
    "/tokenizer_info",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/v1/models/{model:path}",
    "/version",
}


def routes() -> list[Route]:
    app = create_app(FakeEngine(), ServerSettings(api_keys=KEYS))
    assert all(isinstance(route, Route) for route in app.routes)
    return [route for route in app.routes if isinstance(route, Route)]


def test_no_route_was_added_without_a_thought_about_keys() -> None:
    assert {route.path for route in routes()} == ROUTES
    assert {"/live", "/ready", "/health", "/version"} == ALWAYS_PUBLIC


SPELLINGS = [
    "{path}",
    "/{path}",
    "{path}/",
    "{path}//",
    "{path};x=1",
    "{path}?key=first-key",
    "{path}#x",
    "/.{path}",
    "/x/..{path}",
    "{upper}",
    "{escaped}",
    "%2f{path}",
    "{path}%00",
    "/prefix{path}",
]
CREDENTIALS: list[tuple[list[tuple[str, str]], bool]] = [
    ([], False),
    ([("authorization", "Bearer first-key")], True),
    ([("authorization", "bearer first-key")], True),
    ([("authorization", "BEARER  first-key ")], True),
    ([("Authorization", "Bearer second key ü")], True),
    ([("authorization", "Bearer ")], False),
    ([("authorization", "Bearer")], False),
    ([("authorization", "first-key")], False),
    ([("authorization", "Basic first-key")], False),
    ([("authorization", "Bearer first-ke")], False),
    ([("authorization", "Bearer first-key2")], False),
    ([("authorization", "Bearer first-key,second key ü")], False),
    ([("authorization", "Bearer x"), ("authorization", "Bearer first-key")], False),
    ([("x-api-key", "first-key")], False),
    ([("cookie", "first-key"), ("x-forwarded-prefix", "/health")], False),
]


def spelled(template: str, path: str) -> str:
    real = path.replace("{model:path}", "org/model")
    return template.format(
        path=real, upper=real.upper(), escaped="/" + "".join(f"%{ord(c):02x}" for c in real[1:])
    )


METHODS = ("GET", "POST", "HEAD", "OPTIONS", "DELETE")


@pytest.mark.parametrize("at_once", [1, pytest.param(len(METHODS), marks=thorough)])
@pytest.mark.parametrize("route", routes(), ids=lambda route: route.path)
async def test_route_by_credential(route: Route, at_once: int) -> None:
    """Each spelling with each credential, by so many methods, which take turns."""
    async with client_of(FakeEngine(), api_keys=KEYS) as client:
        pairs = itertools.product(SPELLINGS, CREDENTIALS)
        for number, (template, (headers, valid)) in enumerate(pairs):
            url = spelled(template, route.path)
            public = httpx.URL(f"http://server{url}").path in ALWAYS_PUBLIC
            # There are a multiple of as many credentials as methods: each would meet the same one.
            turn = number + number // len(CREDENTIALS)
            for method in ((METHODS * 2)[turn % 5 :])[:at_once]:
                sent = [(name, value.encode()) for name, value in headers]
                request = client.build_request(method, f"http://server{url}", headers=sent)
                status = (await client.send(request)).status_code
                assert (status != 401) == (valid or public), (method, url, headers, status)


async def test_the_refusal_is_an_envelope_with_a_challenge() -> None:
    async with client_of(FakeEngine(), api_keys=KEYS) as client:
        for path in ("/v1/models", "/metrics", "/no/such/path"):
            response = await client.get(path, headers={"host": "a/health?"})
            error = envelope(response)
            assert response.headers["www-authenticate"] == "Bearer"
            assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
            assert not any(key in response.text for key in KEYS)


@pytest.mark.parametrize("header", ["Bearer ", "Bearer", "Bearer whatever", "", "Basic eDp5"])
async def test_without_keys_any_credential_passes(header: str) -> None:
    async with client_of(FakeEngine(), api_keys=()) as client:
        response = await client.get("/v1/models", headers={"authorization": header})
    assert response.status_code == 200


async def test_the_operator_can_open_further_routes() -> None:
    async with client_of(FakeEngine(), api_keys=KEYS, public_paths=("/metrics",)) as client:
        assert (await client.get("/metrics")).status_code == 200
        assert (await client.get("/v1/models")).status_code == 401
        assert (await client.post("/metrics")).status_code == 405


async def test_a_foreign_route_is_guarded_too() -> None:
    app = create_app(FakeEngine(), ServerSettings(api_keys=KEYS))
    app.router.routes.append(Route("/added", lambda request: None))  # type: ignore[arg-type]
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app=app), base_url="http://server"
    ) as client:
        assert (await client.get("/added")).status_code == 401


async def test_a_mounted_path_prefix_does_not_open_anything() -> None:
    app = create_app(FakeEngine(), ServerSettings(api_keys=KEYS))
    transport = httpx.ASGITransport(app=app, root_path="/health")
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        assert (await client.get("/health/v1/models")).status_code == 401
        assert (await client.get("/health/health")).status_code == 200


async def test_each_key_has_its_own_prefix_cache() -> None:
    engine = FakeEngine()
    async with client_of(engine, api_keys=KEYS) as client:
        for key, salt in (("first-key", None), ("second key ü", None), ("first-key", "s")):
            headers = [("authorization", f"Bearer {key}".encode())]
            body = {"prompt": "x", "cache_salt": salt}
            assert (await client.post(COMPLETIONS, json=body, headers=headers)).status_code == 200
    salts = [call["cache_salt"] for call in engine.calls]
    assert len(set(salts)) == 3 and salts[2] == salts[0] + "s"
    assert not any("key" in salt for salt in salts)


def test_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOVETAIL_API_KEY", "a, b,,")
    assert ServerSettings().resolve_api_keys() == ("a", "b")
    assert ServerSettings(api_keys=("c",)).resolve_api_keys() == ("c",)
    assert ServerSettings(api_keys=()).resolve_api_keys() == ()
    monkeypatch.delenv("DOVETAIL_API_KEY")
    assert ServerSettings().resolve_api_keys() == ()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"api_keys": ("",)}, "must not be empty"),
        ({"api_keys": ("a", " ")}, "must not be empty"),
        ({"public_paths": ("metrics",)}, "must start with"),
        ({"public_paths": ("/metric",)}, "Did you mean /metrics?"),
        ({"served_model_names": ("",)}, "must not be empty"),
        ({"root_path": "x"}, "root_path"),
        ({"keep_alive_s": 0}, "keep_alive_s"),
    ],
)
def test_settings_that_cannot_be_meant(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_app(FakeEngine(), ServerSettings(**wrong))
