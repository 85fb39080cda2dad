import sys
import types

import pytest

from dovetail.core.config.locate import locate, locate_locally
from dovetail.core.demo import DEMO_MODEL_NAME, demo_model_path
from dovetail.core.errors import CheckpointError


@pytest.fixture
def environ(tmp_path):
    return {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}


def snapshot(tmp_path, name, commit, *, main=False, files=("config.json",)):
    folder = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
    path = folder / "snapshots" / commit
    path.mkdir(parents=True)
    for file in files:
        (path / file).write_text("{}")
    if main:
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(commit)
    return path


def test_bundled_model(environ):
    assert locate(None, environ=environ) == demo_model_path()
    assert locate(DEMO_MODEL_NAME, environ=environ) == demo_model_path()


def test_folder(tmp_path, environ):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    assert locate(str(tmp_path / "m"), environ=environ) == tmp_path / "m"


@pytest.mark.parametrize("by", ["HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"])
def test_cached_snapshot_of_the_main_branch(tmp_path, by, monkeypatch):
    newest = snapshot(tmp_path, "org/m", "aaa")
    wanted = snapshot(tmp_path, "org/m", "bbb", main=True)
    assert newest != wanted
    if by == "HF_HUB_CACHE":
        environ = {by: str(tmp_path / "hub")}
    elif by == "HF_HOME":
        environ = {by: str(tmp_path)}
    else:
        (tmp_path / "huggingface").symlink_to(tmp_path)
        environ = {by: str(tmp_path)}
    assert locate_locally("org/m", environ=environ).name == "bbb"


def test_a_snapshot_of_the_tokenizer_alone(tmp_path, environ):
    snapshot(tmp_path, "org/m", "aaa", files=("tokenizer.json",))
    assert locate("org/m", tokenizer_only=True, environ=environ).name == "aaa"
    with pytest.raises(CheckpointError, match="neither a folder here nor in the Hugging Face"):
        locate("org/m", environ=environ)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{tmp}/smol", "model folder not found: .*; did you mean .*/small"),
        ("{tmp}/small", "holds no config.json; did you mean its folder inner"),
        ("{tmp}/file", "is a file; name the folder"),
        ("./nowhere/at/all", "model folder not found"),
        ("org/absent", "unset HF_HUB_OFFLINE to download it"),
    ],
)
def test_messages_say_what_to_do(tmp_path, environ, name, message):
    (tmp_path / "small" / "inner").mkdir(parents=True)
    (tmp_path / "small" / "inner" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=message) as caught:
        locate(name.format(tmp=tmp_path), environ=environ)
    assert "\n" not in str(caught.value)


def fake_hub(monkeypatch, download):
    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)


def test_what_is_not_cached_is_downloaded(tmp_path, monkeypatch):
    asked = {}

    def download(name, allow_patterns):
        asked[name] = allow_patterns
        return str(tmp_path)

    fake_hub(monkeypatch, download)
    environ = {"HF_HUB_CACHE": str(tmp_path / "hub")}
    assert locate("org/m", environ=environ) == tmp_path
    assert "*.safetensors" in asked["org/m"]


def test_a_failed_download_is_one_line(tmp_path, monkeypatch):
    def download(name, allow_patterns):
        raise OSError("no route\nmore")

    fake_hub(monkeypatch, download)
    with pytest.raises(CheckpointError, match=r"downloading it failed: OSError: no route$"):
        locate("org/m", environ={"HF_HUB_CACHE": str(tmp_path / "hub")})
