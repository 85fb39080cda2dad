"""One GPU in ten minutes: is it right, how fast is it, and how near to what the device can do.

    python -m benchmarks.cuda [--device cuda] [--only nano,itl] [--output FOLDER]

Looks at the machine, runs the conformance kit in several processes, and measures with random
weights in the shapes of known models: nothing is downloaded. What runs does so in processes with a
time limit, so that one that hangs or fails does not lose the others. Writes ``result.md``, a table
ready for ``docs/measurements``, and ``result.json``. The exit status is 0 if the kit passed and
everything was measured, whether or not targets are met.

``--device cpu --shape tiny --quick`` goes through all of it in less than a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from benchmarks.processes import Outcome, dovetail, run, seconds_until_ready
from benchmarks.results import machine_line, rates_text, row, show_report, write_report
from benchmarks.shapes import (
    SHAPES,
    checkpoint_bytes,
    free_bytes,
    tiny,
    write_checkpoint,
    write_config,
)

TOTAL_S = 590.0
SPARE_BYTES = 1 << 30
WRITE_S = 60.0


@dataclass(kw_only=True)
class Finding:
    """What came of one part."""

    part: str
    what: str
    ok: bool = False
    """It was run to its end, and nothing failed."""
    measured: str = "not measured"
    fraction: float | None = None
    """Of the roofline."""
    target: str = ""
    met: bool | None = None
    """None: there is no target here, or nothing was measured."""
    note: str = ""
    seconds: float = 0.0
    command: str = ""
    raw: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the parts are told."""

    device: str
    full: bool
    """Shapes of the real models."""
    quick: bool
    folder: Path
    deadline: float
    """On ``time.monotonic``."""

    def config(self, shape: str) -> dict[str, Any]:
        return SHAPES[shape] if self.full else tiny(SHAPES[shape])

    def limit(self, seconds: float) -> float:
        """At most so many seconds, and no longer than the whole may take."""
        return max(1.0, min(seconds, self.deadline - time.monotonic()))

    def flags(self, shape: str) -> list[str]:
        model = write_config(self.folder / shape, self.config(shape))
        return [
            *("--device", self.device, "--model", str(model), "--load-format", "dummy"),
            *("--skip-tokenizer-init", "--max-num-seqs", "256"),
        ]


@dataclass(frozen=True, kw_only=True)
class Part:
    """Something to measure."""

    what: str
    run: Callable[[Setting, Finding], Outcome]
    target: str = ""
    met: Callable[[dict[str, Any]], bool] | None = None
    """Whether the figures meet the target, which is for the real shapes on one H200."""


def conformance(setting: Setting, finding: Finding) -> Outcome:
    """The kit, a share of it in each of several processes.

    What fails there is looked at again with the device to itself, and that counts: how much memory
    is free, or how long something takes, is not for one of several to say.
    """
    level, count = (1, 1) if setting.quick else (3, max(1, min(8, (os.cpu_count() or 1) // 2)))

    def checked(*words: str) -> Outcome:
        every = ("conformance", "--device", setting.device, "--level", str(level), "--json")
        return run(dovetail(*every, *words), setting.limit(240))

    with ThreadPoolExecutor(count) as executor:
        shares = [f"{number}/{count}" for number in range(1, count + 1)]
        outcomes = list(executor.map(lambda share: checked("--share", share), shares))
    worst = max(outcomes, key=lambda outcome: (outcome.timed_out, outcome.status != 0))
    certificates = [outcome.json() for outcome in outcomes]
    if not all(certificates):
        return worst
    checks = {check["name"]: check for found in certificates for check in found["checks"]}
    again = [name for name, check in checks.items() if check["status"] == "fail"]
    if again and count > 1:
        worst = checked(*(word for name in again for word in ("--only", name)))
        checks |= {check["name"]: check for check in worst.json().get("checks", ())}
    statuses = [check["status"] for check in checks.values()]
    counts = {status: statuses.count(status) for status in sorted(set(statuses))}
    failed = [name for name, check in checks.items() if check["status"] == "fail"]
    finding.raw = {"passed": not failed, "counts": counts, "checks": list(checks.values())}
    texts = ", ".join(f"{number} {status}" for status, number in counts.items())
    finding.measured = f"level {level}: {texts}"
    finding.note = "failed: " + ", ".join(failed[:5]) if failed else ""
    return worst


def nano(setting: Setting, finding: Finding) -> Outcome:
    flags = ["--workload", "nano", "--max-model-len", "2048"]
    if setting.quick:
        flags += ["--num-prompts", "2"]
    return _throughput(setting, finding, "qwen3-0.6b", flags, limit=90)


def throughput(setting: Setting, finding: Finding) -> Outcome:
    flags = ["--workload", "1024/1024", "--max-model-len", "2048"]
    if setting.quick:
        flags = ["--input-len", "64", "--output-len", "32", "--num-prompts", "8"]
    return _throughput(setting, finding, "qwen3-8b", flags, limit=150)


def _throughput(
    setting: Setting, finding: Finding, shape: str, flags: Sequence[str], *, limit: float
) -> Outcome:
    file = setting.folder / f"{finding.part}.json"
    words = ["bench", "throughput", *setting.flags(shape), *flags, "--output-json", str(file)]
    outcome = run(dovetail(*words), setting.limit(limit))
    if outcome.status == 0:
        result = finding.raw = json.loads(file.read_text())
        finding.measured = f"{result['output_tokens_per_second']:,.0f} tok/s"
        finding.fraction = result.get("roofline_fraction")
        finding.note = _steps(result)
    return outcome


def itl(setting: Setting, finding: Finding) -> Outcome:
    file, picture = setting.folder / "itl.json", setting.folder / "itl.svg"
    words = ["bench", "latency", "--fit", *setting.flags("llama-3.1-8b")]
    words += ["--max-model-len", "16384" if setting.full else "2048"]
    words += ["--output-json", str(file), "--plot", str(picture)]
    if setting.quick:
        words += ["--output-len", "16", "--num-iters", "1", "--context-lens", "32,256,1024"]
    outcome = run(dovetail(*words), setting.limit(110))
    if outcome.status == 0:
        found = json.loads(file.read_text())
        fit = found["fits"][0]
        finding.raw = {**fit, **(found["rates"] or {})}
        finding.measured = (
            f"{fit['base_ms']:.2f} ms + {fit['ms_per_1000_tokens']:.4f} ms per 1000 tokens"
            f" (residual {fit['residual_ms']:.3f} ms)"
        )
        finding.fraction = fit["roofline_fraction"]
        finding.note = _steps(fit)
    return outcome


def ready(setting: Setting, finding: Finding) -> Outcome:
    config, folder = setting.config("qwen3-8b"), setting.folder / "weights"
    size, room = checkpoint_bytes(config), free_bytes(setting.folder)
    if room < size + SPARE_BYTES:
        raise OSError(
            f"{size / 1e9:.1f} GB of weights do not fit into {setting.folder}, which has"
            f" {room / 1e9:.1f} GB; TMPDIR names another folder"
        )
    start = time.monotonic()
    write_checkpoint(folder, config, setting.limit(WRITE_S))
    written = f"{size / 1e9:.1f} GB, written in {time.monotonic() - start:.0f} s"
    words = ["serve", str(folder), "--device", setting.device]
    words += ["--skip-tokenizer-init", "--max-num-seqs", "256", "--max-model-len", "2048"]
    outcome = seconds_until_ready(words, setting.limit(90))
    if outcome.status == 0:
        finding.raw = {"seconds": outcome.seconds, "weight_bytes": size}
        finding.measured, finding.note = f"{outcome.seconds:.1f} s", written
    return outcome


def _steps(result: dict[str, Any]) -> str:
    mean, high, waiting = (result[k] for k in ("host_us_mean", "host_us_p99", "waiting_share"))
    return f"host {mean:.0f} us a step (P99 {high:.0f}); {waiting:.0%} of the time waits for steps"


PARTS: dict[str, Part] = {
    "conformance": Part(
        what="The conformance kit",
        run=conformance,
        target="no failure",
        met=lambda raw: raw["passed"],
    ),
    "nano": Part(
        what="Qwen3-0.6B, bf16, the workload nano: output",
        run=nano,
        target=">= 25,000 tok/s",
        met=lambda raw: raw["output_tokens_per_second"] >= 25_000,
    ),
    "throughput": Part(
        what="Qwen3-8B, bf16, 256 requests 1024/1024: output",
        run=throughput,
        target=">= 8,500 tok/s",
        met=lambda raw: raw["output_tokens_per_second"] >= 8_500,
    ),
    "itl": Part(
        what="Llama-3.1-8B, bf16: time between tokens at batch 1",
        run=itl,
        target="base <= 5.0 ms",
        met=lambda raw: raw["base_ms"] <= 5.0,
    ),
    "ready": Part(
        what="Qwen3-8B, bf16: from the command to ready, weights on local disk",
        run=ready,
        target="< 20 s",
        met=lambda raw: raw["seconds"] < 20,
    ),
}
"""In the order in which they run."""


def measure(setting: Setting, name: str) -> Finding:
    """Run one part. Whatever goes wrong in it is in the finding."""
    part = PARTS[name]
    finding = Finding(part=name, what=part.what)
    if setting.full and not setting.quick:
        finding.target = part.target
    print(f"\n=== {name}: {part.what}", flush=True)
    start = time.monotonic()
    try:
        outcome = part.run(setting, finding)
    except (OSError, ValueError, KeyError) as error:
        finding.note = f"{type(error).__name__}: {error}"
    else:
        finding.ok, finding.command = outcome.status == 0, outcome.command
        if outcome.timed_out:
            finding.note = f"not over after {outcome.seconds:.0f} s"
        elif not finding.ok and not finding.note:
            finding.note = outcome.last_line()
    if finding.raw and finding.target and part.met is not None:
        finding.met = part.met(finding.raw)
    finding.seconds = time.monotonic() - start
    print(f"{finding.measured}  {finding.note}  ({finding.seconds:.0f} s)", flush=True)
    return finding


def report(machine: dict[str, str], findings: Sequence[Finding], setting: Setting) -> str:
    """The table and what belongs to it, in Markdown."""
    shapes = "the real shapes" if setting.full else "TINY shapes: the figures mean nothing"
    lines = [
        machine_line(machine),
        f"Device `{setting.device}`, random weights in {shapes}. Targets are for one H200.",
        *_rates(findings),
        "",
        "| what | measured | of the roofline | target | met | notes |",
        "|---|---|--:|---|---|---|",
    ]
    for found in findings:
        fraction = "" if found.fraction is None else f"{found.fraction:.0%}"
        met = {True: "met", False: "**not met**", None: ""}[found.met]
        cells = (found.what, found.measured, fraction, found.target, met, found.note)
        lines.append(row(cells))
    commands = [found.command for found in findings if found.command]
    text = "\n".join([*lines, "", "```", *commands, "```", ""])
    return text.replace(str(setting.folder), "FOLDER")


def _rates(findings: Sequence[Finding]) -> list[str]:
    """A line on what the device was measured to do, if any part measured it."""
    for found in findings:
        if "read_bytes_per_second" in found.raw:
            return [f"The device {rates_text(found.raw)}, measured by the part {found.part}."]
    return []


def write_results(
    folder: Path, machine: dict[str, str], findings: Sequence[Finding], setting: Setting
) -> None:
    """``result.md``, ``result.json``, and the picture of the latency fit if there is one."""
    result = {"device": setting.device, "findings": [asdict(found) for found in findings]}
    text = report(machine, findings, setting)
    write_report(folder, text, machine, result)
    show_report(folder, text)
    picture = setting.folder / "itl.svg"
    if picture.is_file():
        (folder / "itl.svg").write_bytes(picture.read_bytes())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.cuda", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", help="any platform")
    parser.add_argument("--shape", choices=("full", "tiny"), default="full")
    parser.add_argument("--quick", action="store_true", help="a few requests, no targets")
    parser.add_argument("--only", metavar="PARTS", help=f"of {','.join(PARTS)}")
    parser.add_argument("--output", type=Path, default=Path("bench-cuda"), metavar="FOLDER")
    args = parser.parse_args(arguments)
    names = args.only.split(",") if args.only else list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"there is no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    machine = describe_machine()
    print("\n".join(f"{key}: {value}" for key, value in machine.items()), flush=True)
    with tempfile.TemporaryDirectory(prefix="dovetail-bench-") as folder:
        setting = Setting(
            device=args.device,
            full=args.shape == "full",
            quick=args.quick,
            folder=Path(folder),
            deadline=time.monotonic() + TOTAL_S,
        )
        findings = [measure(setting, name) for name in names]
        write_results(args.output, machine, findings, setting)
    failed = [found.part for found in findings if not found.ok]
    if failed:
        print(f"FAILED: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
