"""Seconds from the command to the first token of a server.

    python benchmarks/startup.py MODEL [--runs 3] [FLAGS OF dovetail serve]

Starts ``dovetail serve``, asks for one token until it comes, and stops the server again.
"""

from __future__ import annotations

import argparse
import http.client
import json
import signal
import socket
import subprocess
import sys
import time


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def ask(port: int) -> bool:
    """Whether the server answers with a token."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = json.dumps({"model": "m", "prompt": [5, 6, 7], "max_tokens": 1, "temperature": 0})
    try:
        connection.request(
            "POST", "/v1/completions", body, headers={"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        return response.status == 200 and "choices" in json.loads(response.read())
    except OSError:
        return False
    finally:
        connection.close()


def measure(model: str, flags: list[str]) -> float:
    port = free_port()
    command = [sys.executable, "-m", "dovetail", "serve", model, "--served-model-name", "m"]
    start = time.perf_counter()
    with subprocess.Popen(
        [*command, "--port", str(port), *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as server:
        try:
            while not ask(port):
                if server.poll() is not None:
                    raise SystemExit(f"the server ended with status {server.returncode}")
                time.sleep(0.02)
            return time.perf_counter() - start
        finally:
            server.send_signal(signal.SIGTERM)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--runs", type=int, default=3)
    args, flags = parser.parse_known_args()
    times = sorted(measure(args.model, flags) for _ in range(args.runs))
    print(
        f"first token after {times[len(times) // 2]:.2f} s (median of {args.runs}: "
        f"{', '.join(f'{t:.2f}' for t in times)})"
    )


if __name__ == "__main__":
    main()
