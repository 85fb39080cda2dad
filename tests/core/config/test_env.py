import logging
import re
from pathlib import Path

import pytest

import dovetail
from dovetail.core.config import EngineConfig, Environment, read_environment, with_environment
from dovetail.core.config.env import KNOWN_VARIABLES
from dovetail.core.errors import ConfigError


def test_reads_the_known_variables():
    found = read_environment(
        {
            "DOVETAIL_DEVICE": "cpu",
            "DOVETAIL_ATTENTION_BACKEND": "",
            "DOVETAIL_PLUGINS": "a, b",
            "DOVETAIL_ALLOW_LONG_MAX_MODEL_LEN": "1",
        }
    )
    assert found == Environment(device="cpu", allow_long_max_model_len=True)


def test_unknown_variables_are_warned_about(caplog):
    with caplog.at_level(logging.WARNING):
        read_environment({"DOVETAIL_DEVISE": "cpu", "DOVETAIL_TEST_X": "1", "OTHER": "1"})
    assert [r.getMessage() for r in caplog.records] == [
        "the environment variable DOVETAIL_DEVISE is unknown; did you mean 'DOVETAIL_DEVICE'?"
    ]


def test_a_bad_flag_is_an_error():
    with pytest.raises(ConfigError, match="DOVETAIL_ALLOW_LONG_MAX_MODEL_LEN must be true or fal"):
        read_environment({"DOVETAIL_ALLOW_LONG_MAX_MODEL_LEN": "perhaps"})


def test_arguments_go_before_the_environment():
    environment = Environment(device="cpu", attention_backend="sdpa")
    assert with_environment(EngineConfig(), environment).attention_backend == "sdpa"
    named = with_environment(EngineConfig(attention_backend="reference"), environment)
    assert named.attention_backend == "reference"


def test_the_device_is_left_to_its_selection_which_says_where_the_name_is_from():
    assert with_environment(EngineConfig(), Environment(device="cpu")).device == "auto"


def test_every_variable_that_the_code_names_is_known():
    files = Path(dovetail.__file__).parent.rglob("*.py")
    named = {
        name for f in files for name in re.findall(r"\bDOVETAIL_[A-Z_]*[A-Z]\b", f.read_text())
    }
    assert named - {"DOVETAIL_TEST", "DOVETAIL_BENCH"} <= set(KNOWN_VARIABLES)


def test_variables_named_after_an_installed_platform_are_its_own(monkeypatch):
    from dovetail.core.config import env

    monkeypatch.setattr(env, "_platforms", lambda: {"acme-x", "null"})
    found = env.unknown_variables({"DOVETAIL_ACME_X_SIZE": "1", "DOVETAIL_ACME": "1", "OTHER": "1"})
    assert len(found) == 1 and "DOVETAIL_ACME is unknown" in found[0]
