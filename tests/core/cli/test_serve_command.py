import argparse
import asyncio
import json
import shlex
import subprocess
import sys
import types

import pytest

from dovetail.core.cli import main
from dovetail.core.cli.banner import curl_line, heading, ready_lines
from dovetail.core.cli.stats_line import stats_line
from dovetail.core.engine.api import EngineStats
from dovetail.core.server import listen


def test_stats_line_is_silent_while_nothing_happens():
    now = EngineStats(num_prompt_tokens=5, num_generation_tokens=7, num_blocks=10)
    assert stats_line(now, now, 10) is None


def test_stats_line():
    before = EngineStats(num_prompt_tokens=100, num_generation_tokens=50, prefix_cache_queries=10)
    now = EngineStats(
        num_prompt_tokens=300,
        num_generation_tokens=80,
        num_running=2,
        num_waiting=1,
        num_blocks=200,
        num_free_blocks=150,
        prefix_cache_queries=110,
        prefix_cache_hits=25,
        num_preemptions=3,
    )
    assert stats_line(before, now, 10.0) == (
        "Avg prompt throughput: 20.0 tokens/s, Avg generation throughput: 3.0 tokens/s,"
        " Running: 2 reqs, Waiting: 1 reqs, KV cache usage: 25.0%,"
        " Prefix cache hit rate: 25.0%, Preempted: 3"
    )


def test_counters_that_started_anew_give_no_negative_rate():
    line = stats_line(EngineStats(num_prompt_tokens=9), EngineStats(num_running=1), 10)
    assert "prompt throughput: 0.0" in line


@pytest.mark.parametrize(
    ("url", "settings", "expected"),
    [
        ("http://127.0.0.1:8000", {}, "curl http://127.0.0.1:8000/v1/completions "),
        ("http://0.0.0.0:80", {}, "curl http://127.0.0.1:80/v1/completions "),
        ("http://[::]:80", {}, "curl http://[::1]:80/v1/completions "),
        ("https://h:1", {"insecure": True}, "curl --insecure https://h:1/v1/completions "),
        ("unix:/a b", {}, "curl --unix-socket '/a b' http://localhost/v1/completions "),
        ("http://h:1", {"chat": True}, "curl http://h:1/v1/chat/completions "),
        ("http://h:1", {"needs_key": True}, 'Authorization: Bearer $DOVETAIL_API_KEY" '),
    ],
)
def test_curl_line(url, settings, expected):
    line = curl_line(url, "it's", **{"chat": False, "needs_key": False, **settings})
    assert expected in line
    words = shlex.split(line)
    body = json.loads(words[words.index("-d") + 1])
    assert body["model"] == "it's"
    assert ("messages" in body) == settings.get("chat", False)


def test_banner():
    assert (
        heading("1.0", "cpu", "named by --device") == "dovetail 1.0  device cpu (named by --device)"
    )
    lines = ready_lines({"memory": "lots"}, "http://0.0.0.0:8000", seconds=1.26, try_it="curl x")
    assert lines[0] == "memory:     lots"
    assert lines[1] == "Ready in 1.3 s  http://0.0.0.0:8000/v1 (API)  http://0.0.0.0:8000/metrics"
    assert "host.docker.internal:8000" in lines[2]
    assert lines[3] == "Try: curl x"


@pytest.fixture
def server(engine, monkeypatch):
    """A server that listens, waits for a moment, and ends with ``status``."""
    found = types.SimpleNamespace(status=0, engine=engine)
    engine.selection = types.SimpleNamespace(name="fake", reason="the only one")

    async def serve(client, settings, *, listener, on_listening, **more):
        found.settings, found.more = settings, more
        found.listener = listener
        on_listening("http://127.0.0.1:1")
        await asyncio.sleep(0.3)
        await client.close()
        return found.status

    run = types.ModuleType("dovetail.core.server.run")
    run.serve, run.EXIT_ENGINE_DEAD = serve, 70
    monkeypatch.setitem(sys.modules, run.__name__, run)
    monkeypatch.setattr(listen, "bind", lambda host, port, uds: _Listener(found, (host, port, uds)))
    monkeypatch.setattr(listen, "new_event_loop", asyncio.new_event_loop)
    return found


class _Listener:
    def __init__(self, found, address):
        found.address = address

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


def test_serve(server, capsys):
    words = ["a-model", "--device", "fake", "--port", "0", "--api-key", "k", "--api-key", "l",
             "--served-model-name", "n", "--shutdown-timeout", "2", "--root-path", "/p",
             "--public-paths", "/metrics", "--disable-access-log"]  # fmt: skip
    assert main(["serve", *words]) == 0
    assert server.address == ("127.0.0.1", 0, None)
    assert server.engine.config.model == "a-model"
    settings = server.settings
    assert (settings.api_keys, settings.root_path) == (("k", "l"), "/p")
    assert (settings.served_model_names, settings.public_paths) == (("n",), ("/metrics",))
    assert not settings.access_log
    assert server.more["shutdown_timeout"] == 2.0
    shown = capsys.readouterr().err
    assert "device fake (the only one)" in shown
    assert "Listening on http://127.0.0.1:1" in shown
    assert "memory:     none at all" in shown
    assert '"model": "n"' in shown
    assert "Bearer $DOVETAIL_API_KEY" in shown
    assert "bundled" not in shown


def test_serve_without_a_model_says_what_it_serves(server, capsys):
    assert main(["serve"]) == 0
    assert "using the bundled dovetail-demo" in capsys.readouterr().err


def test_an_engine_that_never_got_ready_is_no_reason_to_start_again(server):
    server.status = 70
    server.engine.banner = {}
    assert main(["serve"]) == 1
    server.engine.banner = {"x": "y"}
    assert main(["serve"]) == 70


@pytest.mark.parametrize(
    ("words", "message", "status"),
    [
        (["a", "--model", "b"], "two models: a and --model b", 2),
        (["--api-key", ""], "must not be empty", 1),
        (["--root-path", "p"], "root_path 'p' must look like", 1),
        (["--log-level", "loud"], "argument --log-level: invalid choice", 2),
    ],
)
def test_wrong_wishes(server, capsys, words, message, status):
    assert main(["serve", *words]) == status
    assert message in capsys.readouterr().err


def test_the_file_may_name_a_model_and_the_command_line_another(server, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model: from-file\nport: 7\n")
    assert main(["serve", "--config", str(file)]) == 0
    assert server.engine.config.model == "from-file"
    assert main(["serve", "other", "--config", str(file)]) == 0
    assert server.engine.config.model == "other"
    assert server.address[1] == 7


def test_namespace_is_not_changed():
    from dovetail.core.cli.serve import _with_model

    namespace = argparse.Namespace(model_given_first="m", config=None)
    assert _with_model(namespace).model == "m"
    assert not hasattr(namespace, "model")


def test_the_engine_process_does_not_wait_for_what_only_the_server_needs():
    code = (
        "import sys, dovetail.core.cli.serve, dovetail.core.server.listen,"
        " dovetail.core.engine.async_engine; print(*sys.modules)"
    )
    found = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    late = ("numpy", "starlette", "uvicorn", "prometheus_client", "llguidance", "tokenizers")
    assert "dovetail.core.engine.child" in found
    assert not {module for module in found if module.split(".")[0] in late}


def test_a_server_that_cannot_be_imported_ends_the_engine(server, monkeypatch):
    monkeypatch.setitem(sys.modules, "dovetail.core.server.run", None)
    with pytest.raises(ImportError):
        main(["serve"])
    assert server.engine.closed
