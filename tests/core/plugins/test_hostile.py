"""Hostile plug-ins as a user meets them: the real command, with broken packages on the path.

Whatever they do, the message names the package and its version, everything else goes on, and a
platform that was named is never replaced by another.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.commands import dovetail, environment
from tests.core.plugins.conftest import Fakes
from tests.thorough import diagonal, every

PROMPT = ("generate", "x = ", "--max-tokens", "3", "--device")
TIMEOUT = {"DOVETAIL_PROBE_TIMEOUT": "30"}
SHORT = {"DOVETAIL_PROBE_TIMEOUT": "0.5"}
"""For what hangs: it is waited for to the end."""

MODULES = {
    "raises": ("raise RuntimeError('no libacme.so')", "RuntimeError: no libacme.so"),
    "aborts": ("import os; os.abort()", "ended by SIGABRT"),
    "exits": ("import sys; sys.exit(3)", "it called sys.exit(3)"),
    "wrong": ("PLUGIN = {'probe': 1}", "is of type dict, not a PlatformPlugin"),
}
"""Modules of platforms, with what is said of them."""
PLATFORMS: dict[str, tuple[dict[str, Any], str]] = {
    "old": ({"api": "0"}, "is written for platform interface 0; this Dovetail has 1"),
    "tuple": ({"probe": "return True, 'fine'"}, "its probe returned tuple"),
    "texts": ({"environment": "{'A': 3}"}, "which does not map text to text"),
}
LOUD = "[os.write(n, b'noise ' * 200_000) for n in (1, 2) for _ in range(4)];"
LOUD += " return ProbeResult(usable=True, reason='fine')"


REASONS = {name: reason for name, (_, reason) in (MODULES | PLATFORMS).items()}


def install(fakes: Fakes, name: str) -> None:
    """One of the broken platforms."""
    if name in MODULES:
        fakes.install(f"acme-{name}", MODULES[name][0], name=name)
    else:
        fakes.platform(name, distribution=f"acme-{name}", **PLATFORMS[name][0])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that is hostile, at once."""
    fakes = Fakes(tmp_path_factory.mktemp("hostile"))
    for name in REASONS:
        install(fakes, name)
    fakes.platform("loud", distribution="acme-loud", probe=LOUD, priority=None)
    for distribution in ("acme-one", "acme-two"):
        fakes.platform("twin", distribution=distribution)
    fakes.platform("oracle", distribution="acme-thief")
    return fakes.folder


@pytest.fixture(scope="module")
def listed(world: Path) -> dict[str, Any]:
    done = dovetail("platforms", "--json", folder=world, **TIMEOUT)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def examined(world: Path) -> dict[str, Any]:
    done = dovetail("doctor", "--json", folder=world, **TIMEOUT)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", REASONS)
def test_platforms_and_doctor_say_what_is_wrong_with_each(
    name: str, listed: dict[str, Any], examined: dict[str, Any]
) -> None:
    (report,) = (p for p in listed["platforms"] if p["name"] == name)
    assert (report["probe"], report["distribution"]) == ("broken", f"acme-{name}")
    assert REASONS[name] in report["reason"]
    (finding,) = (f for f in examined["findings"] if f"platform {name} " in f["what"])
    assert f"(acme-{name} 1.2)" in finding["what"]
    assert REASONS[name] in finding["what"]
    assert not finding["serious"]


def test_the_others_are_as_they_were(listed: dict[str, Any], examined: dict[str, Any]) -> None:
    usable = [p["name"] for p in listed["platforms"] if p["probe"] == "usable"]
    assert {"loud", "null", "reference"} <= set(usable)
    assert not set(REASONS) & set(usable)
    assert listed["selected"] == examined["selected"]
    assert examined["start"]["error"] == ""


@pytest.mark.parametrize("name", REASONS)
def test_a_broken_platform_that_is_named_is_an_error_and_never_replaced(
    name: str, tmp_path: Path
) -> None:
    install(Fakes(tmp_path), name)
    done = dovetail(*PROMPT, name, folder=tmp_path, **TIMEOUT)
    assert done.returncode == 1
    assert done.stdout == ""
    message = done.stderr.splitlines()[-1]
    assert f"The platform {name!r} (acme-{name} 1.2), named by --device, is broken" in message
    assert REASONS[name] in message


def test_the_variable_names_it_as_the_flag_does_and_serve_as_generate(world: Path) -> None:
    done = dovetail("serve", "--port", "0", folder=world, DOVETAIL_DEVICE="raises", **TIMEOUT)
    assert done.returncode == 1
    assert "(acme-raises 1.2), named by DOVETAIL_DEVICE, is broken" in done.stderr


@pytest.mark.parametrize(
    ("name", "packages"),
    [("twin", "acme-one 1.2 and acme-two 1.2"), ("oracle", "acme-thief 1.2 and dovetail 0.1.0")],
)
def test_a_name_that_two_packages_claim(
    name: str, packages: str, world: Path, listed: dict[str, Any], examined: dict[str, Any]
) -> None:
    reports = [p for p in listed["platforms"] if p["name"] == name]
    assert [p["probe"] for p in reports] == ["broken", "broken"]
    (finding,) = (f for f in examined["findings"] if f"platform {name} " in f["what"])
    assert packages in finding["what"]
    done = dovetail(*PROMPT, name, folder=world, **TIMEOUT)
    assert done.returncode == 1
    assert packages in done.stderr
    kept = dovetail(*PROMPT, name, folder=world, DOVETAIL_PLUGINS="acme-one", **TIMEOUT)
    assert kept.returncode == (0 if name == "oracle" else 1)


def test_with_all_of_them_installed_a_good_platform_serves(world: Path) -> None:
    done = dovetail(*PROMPT, "reference", folder=world, **TIMEOUT)
    assert done.returncode == 0, done.stderr
    assert "broken" not in done.stderr


def test_a_platform_whose_probe_hangs(tmp_path: Path) -> None:
    Fakes(tmp_path).platform("acme", probe="time.sleep(600)")
    for command in (("platforms", "--device", "acme"), (*PROMPT, "acme")):
        done = dovetail(*command, folder=tmp_path, **SHORT)
        assert done.returncode == 1
        assert "did not answer within 0.5 s" in done.stdout + done.stderr
        assert "(dovetail-acme 1.2)" in done.stdout + done.stderr
    done = dovetail(*PROMPT, "null", folder=tmp_path, **SHORT)
    assert done.returncode == 0


def test_two_of_the_same_priority(tmp_path: Path) -> None:
    fakes = Fakes(tmp_path)
    fakes.platform("left", priority=70)
    fakes.platform("right", priority=70)
    rivals = "left (dovetail-left 1.2) and right (dovetail-right 1.2) are usable with the same"
    for command in (("platforms",), ("doctor",), ("generate", "x")):
        done = dovetail(*command, folder=tmp_path, DOVETAIL_PLUGINS="left,right")
        assert done.returncode == 1
        assert rivals in done.stdout + done.stderr
    assert dovetail("platforms", "--device", "left", folder=tmp_path).returncode == 0


UNMADE = {
    "raise RuntimeError('no driver')": "failed to start: RuntimeError: no driver",
    "sys.exit('gone')": "failed to start: it called sys.exit('gone')",
    "return 3": "made a int, which is not a Platform",
    "os.abort()": "SIGABRT",
    "os._exit(0)": "status 0",
}
"""Ways not to make a platform, with what is said of them."""
COMMANDS = {"doctor": ("doctor", "--device", "acme"), "generate": (*PROMPT, "acme")}


@pytest.mark.parametrize(("create", "command"), diagonal(UNMADE, COMMANDS))
def test_a_platform_that_cannot_be_made(create: str, command: str, tmp_path: Path) -> None:
    Fakes(tmp_path).platform("acme", create=create)
    done = dovetail(*COMMANDS[command], folder=tmp_path, DOVETAIL_PLUGINS="acme")
    assert done.returncode == 1
    assert UNMADE[create] in done.stdout + done.stderr
    assert "dovetail-acme 1.2" in done.stdout + done.stderr
    assert command == "doctor" or done.stdout == ""


def test_a_platform_whose_start_hangs_is_named_while_it_does(tmp_path: Path) -> None:
    Fakes(tmp_path).platform("acme", create="time.sleep(600)")
    done = dovetail("doctor", "--device", "acme", "--timeout", "1", folder=tmp_path)
    assert done.returncode == 1
    wanted = "platform acme (dovetail-acme 1.2) does not start: its start did not answer within 1"
    assert wanted in done.stdout
    command = [sys.executable, "-m", "dovetail", *PROMPT, "acme"]
    with subprocess.Popen(command, env=environment(tmp_path), stderr=subprocess.PIPE) as hanging:
        try:
            assert hanging.stderr is not None
            assert any(
                b"starting platform acme (dovetail-acme 1.2)" in line for line in hanging.stderr
            )
            assert hanging.poll() is None
        finally:
            hanging.kill()


BACKENDS = {
    "raises": ("raise RuntimeError('no kernel')", "cannot be imported: RuntimeError: no kernel"),
    "number": ("THING = 3", "is no attention backend: it lacks refuses"),
    "liar": (
        "from dovetail.attention_backends.reference import ReferenceAttention as THING",
        "calls itself 'reference'",
    ),
}


@pytest.fixture(scope="module")
def backends(tmp_path_factory: pytest.TempPathFactory) -> Path:
    fakes = Fakes(tmp_path_factory.mktemp("backends"))
    group = "dovetail.attention_backends"
    for name, (source, _) in BACKENDS.items():
        fakes.install(f"acme-{name}", source, name=name, group=group, attribute="THING")
    twin = "from dovetail.attention_backends.reference import ReferenceAttention as THING"
    fakes.install("acme-sdpa", twin, name="sdpa", group=group, attribute="THING")
    return fakes.folder


def test_doctor_says_what_is_wrong_with_each_backend(backends: Path) -> None:
    admitted = ",".join(f"acme-{name}" for name in [*BACKENDS, "sdpa"])
    command = ("doctor", "--json", "--device", "reference")
    done = dovetail(*command, folder=backends, DOVETAIL_PLUGINS=admitted)
    assert done.returncode == 0, done.stdout
    found = json.loads(done.stdout)
    for name, (_, reason) in BACKENDS.items():
        (finding,) = (f for f in found["findings"] if f"backend {name} " in f["what"])
        assert f"acme-{name} 1.2" in finding["what"]
        assert reason in finding["what"]
    (clash,) = (f for f in found["findings"] if "sdpa" in f["what"])
    assert "is offered by acme-sdpa 1.2 and dovetail 0.1.0" in clash["what"]
    assert found["start"]["attention"] == ["reference", "invariant", "triton"]


def test_broken_backends_harm_nobody_who_does_not_name_them(backends: Path) -> None:
    done = dovetail(*PROMPT, "reference", folder=backends)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", every(2, [*BACKENDS, "sdpa"]))
def test_a_broken_backend_that_is_named_is_an_error(name: str, backends: Path) -> None:
    reason = BACKENDS[name][1] if name in BACKENDS else "is offered by"
    done = dovetail(*PROMPT, "reference", "--attention-backend", name, folder=backends)
    assert done.returncode == 1
    assert reason in done.stderr
    assert f"acme-{name} 1.2" in done.stderr


@pytest.mark.parametrize("name", every(2, ["raises", "unheard-of"]))
def test_doctor_is_strict_about_the_backend_that_the_variable_names(
    name: str, backends: Path
) -> None:
    done = dovetail(
        "doctor",
        "--device",
        "reference",
        folder=backends,
        DOVETAIL_ATTENTION_BACKEND=name,
        DOVETAIL_PLUGINS="acme-raises",
    )
    assert done.returncode == 1
    assert name in done.stdout


MODELS = {
    "GoneModel": ("import no_such_library", "No module named 'no_such_library'"),
    "ExitModel": ("import sys; sys.exit(2)", "it called sys.exit(2)"),
    "AbortModel": ("import os; os.abort()", "its import was ended by SIGABRT"),
    "FakeModel": ("class THING: pass", "not a class that inherits from Model"),
}


def test_broken_models_and_listeners(tmp_path: Path) -> None:
    fakes = Fakes(tmp_path)
    for name, (source, _) in MODELS.items():
        fakes.install(f"acme-{name}", source, name=name, group="dovetail.models", attribute="THING")
    fakes.install("acme-ear", "x = 1", name="ear", group="dovetail.hooks", attribute="x")
    fakes.install("acme-typo", "x = 1", name="typo", group="dovetail.platform", attribute="x")
    admitted = ",".join(fakes.names)
    command = ("doctor", "--json", "--device", "null")
    found = json.loads(dovetail(*command, folder=tmp_path, DOVETAIL_PLUGINS=admitted).stdout)
    for name, (_, reason) in MODELS.items():
        (finding,) = (f for f in found["findings"] if name in f["what"])
        assert f"acme-{name} 1.2" in finding["what"]
        assert reason in finding["what"]
        assert not finding["serious"]
    (listener,) = (f for f in found["findings"] if "acme-ear" in f["what"])
    assert listener["serious"], "a broken listener ends every start"
    (typo,) = (f for f in found["findings"] if "acme-typo" in f["what"])
    assert "did you mean dovetail.platforms?" in typo["what"]
    started = dovetail(*PROMPT, "null", folder=tmp_path)
    assert started.returncode == 1
    assert "The listener 'ear' (acme-ear 1.2" in started.stderr
    kept_out = dovetail(*PROMPT, "null", folder=tmp_path, DOVETAIL_PLUGINS="")
    assert kept_out.returncode == 0, kept_out.stderr
