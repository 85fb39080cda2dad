import dataclasses
import logging

import pytest

from dovetail.core.config import EngineConfig, engine_options
from dovetail.core.errors import ConfigError


@pytest.mark.parametrize(
    ("field", "given", "normal"),
    [
        ("max_model_len", "25.6k", 25_600),
        ("max_model_len", "1M", 1 << 20),
        ("max_model_len", "1m", 1_000_000),
        ("max_model_len", "auto", None),
        ("max_model_len", -1, None),
        ("max_model_len", "-1", None),
        ("max_model_len", 0, ConfigError),
        ("max_model_len", "2.5", ConfigError),
        ("max_model_len", True, ConfigError),
        ("kv_cache_memory_bytes", "2g", 2_000_000_000),
        ("kv_cache_memory_bytes", "2G", 1 << 31),
        ("kv_cache_memory_bytes", "2GiB", 1 << 31),
        ("kv_cache_memory_bytes", "two", ConfigError),
        ("gpu_memory_utilization", "0.5", 0.5),
        ("gpu_memory_utilization", 1, 1.0),
        ("gpu_memory_utilization", 0, ConfigError),
        ("gpu_memory_utilization", float("nan"), ConfigError),
        ("dtype", "half", "float16"),
        ("dtype", "float", "float32"),
        ("dtype", "int4", ConfigError),
        ("generation_config", "vllm", "dovetail"),
        ("model_impl", "vllm", "native"),
        ("served_model_name", "a", ("a",)),
        ("served_model_name", ["a", "b"], ("a", "b")),
        ("served_model_name", None, ()),
        ("enable_prefix_caching", "off", False),
        ("enable_chunked_prefill", None, True),
        ("async_scheduling", None, None),
        ("async_scheduling", "true", True),
        ("seed", None, 0),
        ("seed", "-3", -3),
        ("seed", 1.5, ConfigError),
        ("options", '{"a": 1}', {"a": 1}),
        ("options", "[1]", ConfigError),
        ("options", "{", ConfigError),
        ("model", 3, ConfigError),
    ],
)
def test_values_are_normalised_or_refused(field, given, normal):
    if normal is ConfigError:
        with pytest.raises(ConfigError, match=rf"^{field} must be .*, not "):
            EngineConfig.from_kwargs(**{field: given})
    else:
        assert getattr(EngineConfig.from_kwargs(**{field: given}), field) == normal


def test_aliases_name_the_same_field():
    assert EngineConfig.from_kwargs(num_blocks=8).num_gpu_blocks_override == 8
    assert EngineConfig.from_kwargs(memory_utilization=0.2).gpu_memory_utilization == 0.2
    with pytest.raises(ConfigError, match="num_blocks: num_gpu_blocks_override was given too"):
        EngineConfig.from_kwargs(num_gpu_blocks_override=8, num_blocks=8)


def test_unknown_argument_names_the_nearest():
    with pytest.raises(ConfigError, match="'max_model_length'; did you mean 'max_model_len'"):
        EngineConfig.from_kwargs(max_model_length=4)
    with pytest.raises(ConfigError, match=r"^unknown argument 'zzz'$"):
        EngineConfig.from_kwargs(zzz=4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("enforce_eager", True),
        ("pipeline_parallel_size", 1),
        ("swap_space", 4),
        ("cpu_offload_gb", 0.0),
        ("enable_lora", False),
        ("compilation_config", {"level": 3}),
    ],
)
def test_harmless_foreign_arguments_warn(name, value, caplog):
    with caplog.at_level(logging.WARNING):
        EngineConfig.from_kwargs(**{name: value})
    assert [r.getMessage().split("=")[0] for r in caplog.records] == [name]
    assert "\n" not in caplog.text.strip()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pipeline_parallel_size", 2),
        ("data_parallel_size", True),
        ("enable_lora", True),
        ("speculative_model", "a/b"),
        ("cpu_offload_gb", 4),
    ],
)
def test_harmful_foreign_arguments_are_refused_with_a_reason(name, value):
    with pytest.raises(ConfigError, match=rf"^{name}=.*: \w+"):
        EngineConfig.from_kwargs(**{name: value})


def test_every_field_is_documented():
    fields = {f.name for f in dataclasses.fields(EngineConfig)}
    assert set(engine_options()) == fields
    for name, entry in engine_options().items():
        assert entry.help.rstrip().endswith("."), name
        assert entry.group, name


def test_the_intent_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineConfig().model = "x"
