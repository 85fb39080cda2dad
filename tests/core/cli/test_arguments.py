import pytest

from dovetail.core.cli.arguments import add_engine_arguments, engine_config
from dovetail.core.cli.config_file import add_config_argument, with_config_file
from dovetail.core.cli.parser import Parser, UsageError
from dovetail.core.config import EngineConfig, engine_options
from dovetail.core.errors import ConfigError


@pytest.fixture
def parser():
    made = Parser("dovetail test", "A test.")
    made.add_argument("--port", type=int, default=8000, help="Where to listen.")
    made.add_argument("--api-key", action="append", help="A key.")
    made.add_argument("--quiet", action="store_true", help="Say nothing.")
    add_config_argument(made)
    add_engine_arguments(made)
    return made


def test_there_is_a_flag_for_every_field(parser):
    flags = set(parser.flags())
    for name, entry in engine_options().items():
        flag = "--" + name.replace("_", "-")
        assert flag in flags
        assert not entry.is_switch or "--no-" + flag.removeprefix("--") in flags
        assert {"--" + alias.replace("_", "-") for alias in entry.aliases} <= flags


def test_without_flags_the_intent_is_the_default(parser):
    assert engine_config(parser.parse([])) == EngineConfig()


def test_dashes_and_underscores(parser):
    for words in (["--max_model_len", "1k"], ["--max-model-len=1k"], ["--max_model-len=1k"]):
        assert engine_config(parser.parse(words)).max_model_len == 1000
    found = engine_config(parser.parse(["--device=my_device"]))
    assert found.device == "my_device", "values stay as they are"


def test_every_kind_of_flag(parser):
    words = [
        "--served-model-name", "a", "b", "--no-enable-prefix-caching", "--async-scheduling",
        "--options", '{"x": 1}', "--kv-cache-memory-bytes", "2g", "--num-blocks", "8",
        "--memory-utilization", "0.5", "--dtype", "half", "--trust-remote-code",
    ]  # fmt: skip
    found = engine_config(parser.parse(words))
    assert found == EngineConfig(
        served_model_name=("a", "b"),
        enable_prefix_caching=False,
        async_scheduling=True,
        options={"x": 1},
        kv_cache_memory_bytes=2_000_000_000,
        num_gpu_blocks_override=8,
        gpu_memory_utilization=0.5,
        dtype="float16",
        trust_remote_code=True,
    )


def test_flags_of_vllm_that_change_nothing_are_accepted(parser, caplog):
    words = ["--enforce-eager", "--pipeline-parallel-size", "1", "--swap-space=4", "--port", "1"]
    namespace = parser.parse(words)
    assert engine_config(namespace) == EngineConfig()
    assert len(caplog.records) == 3
    assert namespace.port == 1


def test_flags_of_vllm_that_would_change_something_are_refused(parser):
    with pytest.raises(ConfigError, match="pipeline_parallel_size=2: this version runs on one"):
        engine_config(parser.parse(["--pipeline-parallel-size=2"]))


def test_brief_help_names_flags_and_full_help_explains_them(parser, capsys):
    assert parser.parse(["--help"]) is None
    brief = capsys.readouterr().out
    assert "Memory:" in brief
    assert "--kv-cache-memory-bytes" in brief
    assert "--help=all" in brief
    parser.parse(["--help=all"])
    full = capsys.readouterr().out
    assert len(full) > 1.5 * len(brief)
    assert "--enforce-eager" not in full
    assert all(len(line) <= 100 for line in full.splitlines())


@pytest.mark.parametrize(
    ("word", "shown", "hidden"),
    [
        ("memory", "--block-size", "--dtype"),
        ("max-model-len", "--max-model-len", "--block-size"),
        ("max_model_len", "--max-model-len", "--block-size"),
        ("Scheduling", "--max-num-seqs", "--dtype"),
        ("listen", "--port", "--dtype"),
        ("frobnicate", "Nothing about 'frobnicate'", "--port"),
    ],
)
def test_help_is_searchable(parser, capsys, word, shown, hidden):
    assert parser.parse([f"--help={word}"]) is None
    out = capsys.readouterr().out
    assert shown in out
    assert f"  {hidden}" not in out


def with_file(parser, tmp_path, content, *words):
    file = tmp_path / "config.yaml"
    file.write_text(content)
    return parser.parse(with_config_file(parser, ["--config", str(file), *words]))


def test_a_file_gives_flags_and_the_command_line_goes_before_it(parser, tmp_path):
    content = """
max-model-len: 25.6k
port: 9000
dtype: half
quiet: true
trust_remote_code: true
enable-prefix-caching: false
tokenizer:
served-model-name: [a, b]
api-key: [k1, k2]
options: {threads: 2}
"""
    namespace = with_file(parser, tmp_path, content, "--port", "1", "--dtype=float32")
    found = engine_config(namespace)
    assert (namespace.port, namespace.quiet, namespace.api_key) == (1, True, ["k1", "k2"])
    assert found == EngineConfig(
        max_model_len=25_600,
        dtype="float32",
        trust_remote_code=True,
        enable_prefix_caching=False,
        served_model_name=("a", "b"),
        options={"threads": 2},
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("max-model-length: 4", "'max-model-length' is no flag of `dovetail test`; did you mean"),
        ("config: x", "'config' is no flag"),
        ("dtype: int4", "argument --dtype: must be one of"),
        ("quiet: [", "is not YAML"),
        ("- a", "must hold one entry per line"),
    ],
)
def test_files_that_are_wrong(parser, tmp_path, content, message):
    with pytest.raises(ConfigError, match=message) as caught:
        with_file(parser, tmp_path, content)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(parser):
    with pytest.raises(ConfigError, match="cannot be read"):
        with_config_file(parser, ["--config=/nowhere.yaml"])


def test_a_value_that_is_missing(parser):
    with pytest.raises(UsageError, match="expected one argument"):
        parser.parse(with_config_file(parser, ["--config"]))
