"""A service manager ends a server by a signal to all of its processes: what runs is finished."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from tests.checkpoints import make_checkpoint
from tests.servers import Server


def test_running_requests_are_finished(tmp_path: Path) -> None:
    model = make_checkpoint("llama", tmp_path / "model")
    log = tmp_path / "log"
    flags = ["--served-model-name", "m", "--device", "cpu", "--dtype", "float32", "--threads", "1"]
    server = Server(log, str(model), *flags)
    body = {"model": "m", "prompt": "on and", "max_tokens": 200, "ignore_eos": True, "stream": True}
    pieces: list[str] = []
    with server.client.stream("POST", "/v1/completions", json=body) as response:
        for line in response.iter_lines():
            if not pieces:
                for process in server.pids():
                    os.kill(process, signal.SIGTERM)
            if line.startswith("data: {"):
                pieces.append(json.loads(line[6:])["choices"][0]["finish_reason"] or "")
            elif line:
                assert line == "data: [DONE]"
    assert len(pieces) > 100 and pieces[-1] == "length"
    assert server.process.wait(30) == 0
    assert "error" not in log.read_text()
