"""Hooks: validated when they are registered, harmless when they fail."""

from __future__ import annotations

import sys

import pytest

from dovetail.core.errors import PluginError
from dovetail.core.plugins.hooks import hook_manager
from dovetail.core.request import Request, SamplingParams
from tests.core.plugins.conftest import Fakes

IMPORT = "from dovetail.core.plugins.hooks import hookimpl\n"
REQUEST = Request(
    id=1, prompt_token_ids=[1], params=SamplingParams(), stop_token_ids=[], seed=0, arrival_time=0.0
)


def listen(fakes: Fakes, distribution: str, source: str, attribute: str = "") -> None:
    fakes.install(
        distribution,
        IMPORT + source,
        name=distribution,
        group="dovetail.hooks",
        attribute=attribute,
    )
    if not attribute:
        info = fakes.folder / f"{distribution}-1.2.dist-info" / "entry_points.txt"
        info.write_text(info.read_text().replace(":\n", "\n"))


def test_without_listeners_a_hook_does_nothing(fakes: Fakes) -> None:
    assert hook_manager({}).hook.dovetail_step_finished(stats={}) == []


def test_a_module_and_an_object_listen_with_the_arguments_they_want(fakes: Fakes) -> None:
    listen(
        fakes,
        "one",
        "seen = []\n@hookimpl\ndef dovetail_request_started(request): seen.append(request.id)\n",
    )
    listen(
        fakes,
        "two",
        "seen = []\nclass Sink:\n"
        "    @hookimpl\n"
        "    def dovetail_request_finished(self, finish_reason, seconds):\n"
        "        seen.append((finish_reason, seconds))\n"
        "SINK = Sink()\n",
        attribute="SINK",
    )
    hook = hook_manager({}).hook
    hook.dovetail_request_started(request=REQUEST)
    hook.dovetail_request_finished(
        request=REQUEST, finish_reason="stop", num_generated=3, seconds=0.5
    )
    assert sys.modules["fake_one"].seen == [1]
    assert sys.modules["fake_two"].seen == [("stop", 0.5)]


def test_a_listener_that_fails_is_logged_with_its_package_and_stops_nobody(
    fakes: Fakes, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("one", "two"):
        listen(
            fakes,
            name,
            "seen = []\n@hookimpl\ndef dovetail_step_finished(stats):\n"
            "    seen.append(stats)\n    raise ValueError('disk full')\n",
        )
    hook_manager({}).hook.dovetail_step_finished(stats={"num_running": 1.0})
    assert sys.modules["fake_one"].seen == sys.modules["fake_two"].seen == [{"num_running": 1.0}]
    assert "dovetail_step_finished of one (one 1.2) failed" in caplog.text
    assert "disk full" in caplog.text


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("@hookimpl\ndef dovetail_request_strated(request): ...", "unknown hook"),
        ("@hookimpl\ndef dovetail_request_started(token): ...", "token"),
        ("def dovetail_request_started(request): ...", "not marked with hookimpl"),
        ("@hookimpl\ndef dovetail_request_started(request): yield", "generator"),
        ("@hookimpl\nasync def dovetail_request_started(request): ...", "coroutine"),
        ("@hookimpl(wrapper=True)\ndef dovetail_request_started(request): yield", "wrapper"),
        ("x = 1", "no function whose name begins with dovetail_"),
        ("import no_such_library", "No module named 'no_such_library'"),
    ],
)
def test_a_wrong_listener_is_refused_with_its_package(
    fakes: Fakes, source: str, reason: str
) -> None:
    listen(fakes, "one", source)
    with pytest.raises(PluginError, match=reason) as caught:
        hook_manager({})
    assert "(one 1.2, fake_one)" in str(caught.value)


def test_a_class_is_not_an_object(fakes: Fakes) -> None:
    listen(fakes, "one", "class Sink: ...", attribute="Sink")
    with pytest.raises(PluginError, match="is the class Sink, not an object"):
        hook_manager({})


def test_the_allow_list_covers_listeners(fakes: Fakes) -> None:
    listen(fakes, "one", "raise RuntimeError")
    assert hook_manager({"DOVETAIL_PLUGINS": ""}).get_plugins() == set()
