"""The admin socket of a real server: private, off unless asked for, and no disturbance."""

from __future__ import annotations

import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.servers import Server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("admin")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    options = '{"step_time": 0.02}'
    server = Server(
        folder / "log", "--device", "oracle", "--admin-socket", str(folder / "a.sock"),
        "--options", options,
    )  # fmt: skip
    yield server
    assert server.stop() == 0
    assert not (folder / "a.sock").exists()


def ask(folder: Path) -> dict[str, Any]:
    transport = httpx.HTTPTransport(uds=str(folder / "a.sock"))
    with httpx.Client(transport=transport, base_url="http://admin") as client:
        answer = client.get("/debug/state")
    assert answer.status_code == 200
    return answer.json()


def complete(server: Server, seed: int) -> str:
    body = {
        "prompt": "a secret word",
        "max_tokens": 60,
        "temperature": 1.0,
        "seed": seed,
        "ignore_eos": True,
        "model": httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"],
    }
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def test_only_the_owner_may_ask(server: Server, folder: Path) -> None:
    assert stat.S_IMODE((folder / "a.sock").stat().st_mode) == 0o600
    assert httpx.get(f"{server.url}/debug/state").status_code == 404


def test_an_idle_engine_holds_nothing(server: Server, folder: Path) -> None:
    state = ask(folder)
    engine = state["engine"]
    assert state["status"] == "ready" and state["num_live"] == 0
    assert engine["running"] == engine["waiting"] == engine["requests"] == []
    assert engine["steps_under_way"] == 0
    assert engine["pool"]["num_free"] == engine["pool"]["num_blocks"]
    assert engine["pool"]["references"] == {"0": engine["pool"]["num_blocks"]}
    assert engine["settings"]["block_size"] == 16


def test_a_busy_engine_is_described_and_not_disturbed(server: Server, folder: Path) -> None:
    want = [complete(server, seed) for seed in range(3)]
    texts: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda seed=seed: texts.update({seed: complete(server, seed)}))
        for seed in range(3)
    ]
    for thread in threads:
        thread.start()
    states = []
    while any(thread.is_alive() for thread in threads):
        states.append(ask(folder))
    for thread in threads:
        thread.join()
    assert [texts[seed] for seed in range(3)] == want
    busy = max(states, key=lambda state: len(state["engine"]["running"]))
    assert len(busy["engine"]["running"]) == busy["num_live"] == 3
    for request in busy["engine"]["requests"]:
        assert request["num_known"] >= request["num_prompt_tokens"] > 0
        assert request["num_blocks"] > 0 and request["row"] is not None
    assert (
        sum(busy["engine"]["pool"]["references"].values()) == busy["engine"]["pool"]["num_blocks"]
    )
    assert "secret" not in str(busy), "what clients say is not shown"
    counters = ask(folder)["engine"]["counters"]
    assert counters["num_accepted"] == counters["num_finished"] == 6


def test_nothing_else_is_there(server: Server, folder: Path) -> None:
    transport = httpx.HTTPTransport(uds=str(folder / "a.sock"))
    with httpx.Client(transport=transport, base_url="http://admin") as client:
        assert client.get("/v1/models").status_code == 404
        assert client.post("/debug/state").status_code == 405
