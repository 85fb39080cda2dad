"""The benchmark of a GPU, on the host and with models that are there in a moment."""

import json
import sys
import time
from pathlib import Path

import pytest
from safetensors import safe_open

from benchmarks import cuda, processes, shapes
from benchmarks.shapes import SHAPES, checkpoint_bytes, tiny, write_checkpoint
from tests.engines import answer, make_core


@pytest.fixture
def parts(monkeypatch):
    def use(**named):
        made = {
            name: cuda.Part(what=f"part {name}", run=run, target="much", met=lambda raw: raw["x"])
            for name, run in named.items()
        }
        monkeypatch.setattr(cuda, "PARTS", made)

    return use


def outcome(**more):
    return processes.Outcome(**{"status": 0, "seconds": 1.0, "output": "", "errors": "", **more})


def found(x):
    def run(setting, finding):
        finding.raw, finding.measured, finding.fraction = {"x": x}, "12 tok/s", 0.5
        return outcome(command=f"dovetail x {setting.folder}/y")

    return run


def raises(setting, finding):
    raise OSError("no room")


def test_one_part_that_fails_does_not_lose_the_others(parts, tmp_path, capsys):
    parts(
        good=found(True),
        slow=lambda s, f: outcome(status=-9, timed_out=True, seconds=90.2),
        wrong=lambda s, f: outcome(status=1, errors="first\nthe | reason\n\n"),
        raises=raises,
        short=found(False),
    )
    assert cuda.main(["--output", str(tmp_path)]) == 1
    assert "FAILED: slow, wrong, raises\n" in capsys.readouterr().out
    table = (tmp_path / "result.md").read_text()
    assert "| part good | 12 tok/s | 50% | much | met |  |" in table
    assert "| part short | 12 tok/s | 50% | much | **not met** |  |" in table
    assert "| part slow | not measured |  | much |  | not over after 90 s |" in table
    assert "| part wrong | not measured |  | much |  | the / reason |" in table
    assert "| part raises | not measured |  | much |  | OSError: no room |" in table
    assert "dovetail x FOLDER/y" in table
    findings = json.loads((tmp_path / "result.json").read_text())["findings"]
    assert [finding["ok"] for finding in findings] == [True, False, False, False, True]


def test_targets_are_for_the_real_shapes(parts, tmp_path):
    parts(good=found(False))
    for words in (["--shape", "tiny"], ["--quick"]):
        assert cuda.main([*words, "--output", str(tmp_path)]) == 0
        assert "not met" not in (tmp_path / "result.md").read_text()


def test_parts_are_chosen_by_name(parts, tmp_path, capsys):
    parts(one=found(True), two=raises)
    assert cuda.main(["--only", "one", "--output", str(tmp_path)]) == 0
    with pytest.raises(SystemExit):
        cuda.main(["--only", "three", "--output", str(tmp_path)])
    assert "there is no part 'three'; there are one, two" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "raw", "good"),
    [
        ("nano", "output_tokens_per_second", 25_000),
        ("throughput", "output_tokens_per_second", 8500),
        ("itl", "base_ms", 5.0),
        ("ready", "seconds", 19.9),
    ],
)
def test_targets(name, raw, good):
    worse = good * (0.99 if "per_second" in raw else 1.01)
    met = cuda.PARTS[name].met
    assert met({raw: good})
    assert not met({raw: worse})


def test_a_command_that_does_not_end_is_ended_with_its_children(tmp_path):
    file = tmp_path / "beats"
    beat = f"import time\nwhile True: open({str(file)!r}, 'a').write('x'); time.sleep(0.02)"
    script = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_DFL)\n"
        f"subprocess.Popen([sys.executable, '-c', {beat!r}]); print('on', flush=True)\n"
        "time.sleep(60)"
    )
    ended = processes.run([sys.executable, "-c", script], 2)
    assert ended.timed_out
    assert ended.output == "on\n"
    assert ended.seconds < 10
    size = file.stat().st_size
    time.sleep(0.2)
    assert file.stat().st_size == size


@pytest.mark.parametrize("shape", SHAPES)
def test_a_written_checkpoint_is_what_the_model_reads(shape, tmp_path):
    config = tiny(SHAPES[shape])
    folder = write_checkpoint(tmp_path, config)
    file = folder / "model-00001-of-00001.safetensors"
    with safe_open(file, "np") as tensors:
        names = set(tensors.keys())
    assert names == set(
        json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    )
    assert 0 < file.stat().st_size - checkpoint_bytes(config) < 10_000
    core = make_core(folder, "reference", skip_tokenizer_init=True)
    assert len(answer(core, [[5, 6, 7]])[0].token_ids) == 64


def test_a_large_checkpoint_is_in_several_files(monkeypatch, tmp_path):
    monkeypatch.setattr(shapes, "_SHARD", 100_000)
    folder = write_checkpoint(tmp_path, tiny(SHAPES["llama-3.1-8b"]))
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    files = {file.name for file in folder.glob("*.safetensors")}
    assert set(index.values()) == files
    assert len(files) == 3
    core = make_core(folder, "reference", skip_tokenizer_init=True)
    assert len(answer(core, [[5, 6, 7]])[0].token_ids) == 64


def test_sizes_of_the_real_shapes():
    sizes = {name: round(checkpoint_bytes(config) / 1e9, 1) for name, config in SHAPES.items()}
    assert sizes == {
        "qwen3-0.6b": 1.2, "qwen3-8b": 16.4, "llama-3.1-8b": 16.1, "qwen0.5b": 1.0, "llama1b": 2.5
    }  # fmt: skip


def test_a_disk_that_is_too_slow_is_said(tmp_path):
    with pytest.raises(TimeoutError, match="too slow"):
        write_checkpoint(tmp_path, tiny(SHAPES["qwen3-0.6b"]), limit=-1)


def test_parts_of_a_real_engine(tmp_path):
    words = ["--device", "null", "--shape", "tiny", "--quick", "--only", "throughput,ready"]
    assert cuda.main([*words, "--output", str(tmp_path)]) == 0
    tokens, ready = json.loads((tmp_path / "result.json").read_text())["findings"]
    assert tokens["raw"]["total_output_tokens"] == 8 * 32
    assert tokens["fraction"] is None
    assert 0.1 < ready["raw"]["seconds"] < ready["seconds"]


def test_figures_of_the_commands_come_into_the_table(monkeypatch, tmp_path):
    steps = {"host_us_mean": 80.0, "host_us_p99": 95.0, "waiting_share": 0.9}
    rates = {"read_bytes_per_second": 4.3e12, "matrix_flops_per_second": 7.9e14}
    tokens = {"output_tokens_per_second": 26_000.0, "roofline_fraction": 0.715, **steps, **rates}
    line = {"base_ms": 5.5, "ms_per_1000_tokens": 0.04, "residual_ms": 0.01}
    fit = {"fits": [{**line, "roofline_fraction": 0.63, **steps}], "rates": rates}

    def run(command, limit):
        file = Path(command[command.index("--output-json") + 1])
        file.write_text(json.dumps(fit if "--fit" in command else tokens))
        return outcome()

    monkeypatch.setattr(cuda, "run", run)
    assert cuda.main(["--only", "nano,itl", "--output", str(tmp_path)]) == 0
    table = (tmp_path / "result.md").read_text()
    assert "| 26,000 tok/s | 72% | >= 25,000 tok/s | met | host 80 us a step (P99 95)" in table
    assert (
        "| 5.50 ms + 0.0400 ms per 1000 tokens (residual 0.010 ms) | 63% |"
        " base <= 5.0 ms | **not met** |" in table
    )
    assert "reads 4,300 GB/s and multiplies at 790.0 TFLOP/s, measured by the part nano" in table


def test_a_device_that_is_not_there_is_said(tmp_path):
    words = ["--device", "nowhere", "--shape", "tiny", "--quick", "--only", "ready"]
    assert cuda.main([*words, "--output", str(tmp_path)]) == 1
    table = (tmp_path / "result.md").read_text()
    assert "There is no platform 'nowhere'" in table


@pytest.mark.parametrize("alone", ["pass", "fail"])
def test_what_fails_beside_others_is_looked_at_alone(alone, monkeypatch, tmp_path):
    shares = set()

    def run(command, limit):
        if "--only" in command:
            assert command[command.index("--only") + 1 :] == ["ops.2/3"]
            checks = [{"name": "ops.2/3", "status": alone}]
        else:
            share = command[command.index("--share") + 1]
            shares.add(share)
            status = "fail" if share == "2/3" else "pass"
            checks = [{"name": f"ops.{share}", "status": status}]
        failed = checks[0]["status"] == "fail"
        return outcome(status=int(failed), output=json.dumps({"checks": checks}))

    monkeypatch.setattr(cuda, "run", run)
    monkeypatch.setattr(cuda.os, "cpu_count", lambda: 6)
    wrong = alone == "fail"
    assert cuda.main(["--only", "conformance", "--output", str(tmp_path)]) == wrong
    assert shares == {"1/3", "2/3", "3/3"}
    row = (tmp_path / "result.md").read_text().split("|---|\n")[1].split("\n")[0]
    seen = "1 fail, 2 pass" if wrong else "3 pass"
    verdict = "**not met** | failed: ops.2/3" if wrong else "met | "
    assert f"| level 3: {seen} |  | no failure | {verdict} |" in row


def test_a_disk_without_room_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda, "free_bytes", lambda folder: 5 << 30)
    assert cuda.main(["--only", "ready", "--output", str(tmp_path)]) == 1
    assert "16.4 GB of weights do not fit" in (tmp_path / "result.md").read_text()
