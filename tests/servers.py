"""A real server in a process of its own, for tests that talk to it as users do."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx

from tests.ports import free_port

__all__ = ["Server"]


class Server:
    """A ``dovetail serve`` process and its address."""

    def __init__(self, log: Path, *arguments: str, environ: dict[str, str] | None = None) -> None:
        self.log = log
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "dovetail", "serve", *arguments, "--port", str(port)]
        with log.open("wb") as output:
            self.process = subprocess.Popen(command, stderr=output, stdout=output, env=environ)
        self.client = httpx.Client(base_url=self.url, verify=False)
        for _ in range(600):
            if self._is_ready():
                return
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        raise RuntimeError(f"the server is not ready: {log.read_text()[-2000:]}")

    def stop(self) -> int:
        """Ask it to end, as a service manager does; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        self.client.close()
        return self.process.wait(30)

    def pids(self) -> list[int]:
        """Of the server and of its engine."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [self.process.pid, *map(int, children.split())]

    def resident_bytes(self) -> int:
        """Memory of both."""
        page = os.sysconf("SC_PAGE_SIZE")
        return sum(int(Path(f"/proc/{p}/statm").read_text().split()[1]) * page for p in self.pids())

    def gauge(self, name: str) -> float:
        """A figure of ``/metrics``."""
        text = self.client.get("/metrics").text
        match = re.search(rf"^{re.escape(name)}\{{[^}}]*\}} (\S+)$", text, re.MULTILINE)
        assert match, f"{name} is not among the metrics"
        return float(match.group(1))

    def _is_ready(self) -> bool:
        try:
            return self.client.get("/ready").status_code == 200
        except httpx.TransportError:
            return False
