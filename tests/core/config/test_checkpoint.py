import json
import struct

import pytest

from dovetail.core.config import EngineConfig, read_facts
from dovetail.core.config.context import context_length, sliding_window
from dovetail.core.demo import DEMO_MODEL_NAME, demo_model_path
from dovetail.core.errors import CheckpointError

CONFIG = {"architectures": ["LlamaForCausalLM"], "vocab_size": 100, "max_position_embeddings": 512}


@pytest.fixture
def folder(tmp_path):
    def make(config=None, generation=None, tensors=None, name="model"):
        path = tmp_path / name
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(json.dumps(CONFIG | (config or {})))
        if generation is not None:
            (path / "generation_config.json").write_text(json.dumps(generation))
        if tensors is not None:
            header = {n: {"dtype": d, "shape": [], "data_offsets": [0, 0]} for n, d in tensors}
            encoded = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
            content = struct.pack("<Q", len(encoded)) + encoded
            (path / "model.safetensors").write_bytes(content)
        return path

    return make


def facts(path, **kwargs):
    return read_facts(EngineConfig(model=str(path), **kwargs), environ={})


def test_the_bundled_model_is_the_default():
    found = read_facts(EngineConfig(), environ={})
    assert (found.name, found.path) == (DEMO_MODEL_NAME, demo_model_path())
    assert found.architectures == ("LlamaForCausalLM",)
    assert found.has_weights


def test_text_config_is_put_in_place(folder):
    path = folder(
        {
            "architectures": ["XForConditionalGeneration"],
            "vocab_size": None,
            "text_config": {"architectures": None, "vocab_size": 7, "model_type": "inner"},
        }
    )
    found = facts(path)
    assert found.vocab_size == 7
    assert found.hf_config["model_type"] == "inner"
    assert "text_config" not in found.hf_config
    assert found.architectures == ("XForConditionalGeneration",)


@pytest.mark.parametrize(
    ("config", "tensors", "dtype"),
    [
        ({"torch_dtype": "torch.bfloat16"}, None, "bfloat16"),
        ({"dtype": "float16"}, None, "float16"),
        ({}, [("a", "F32"), ("b", "BF16"), ("c", "BF16"), ("d", "I64")], "bfloat16"),
        ({}, None, None),
    ],
)
def test_dtype_of_the_checkpoint(folder, config, tensors, dtype):
    assert facts(folder(config, tensors=tensors)).dtype == dtype


def test_generation_config_gives_default_parameters(folder):
    path = folder(
        {"eos_token_id": 2},
        {
            "eos_token_id": [2, 5],
            "temperature": 0.6,
            "top_k": 20,
            "max_new_tokens": 9,
            "top_p": None,
        },
    )
    found = facts(path)
    assert found.eos_token_ids == (2, 5)
    params = found.default_params
    assert (params.temperature, params.top_k, params.max_tokens, params.top_p) == (0.6, 20, 9, 1.0)
    ignored = facts(path, generation_config="vllm")
    assert ignored.default_params.temperature == 1.0
    assert ignored.eos_token_ids == (2, 5)


def test_generation_config_of_another_folder(folder):
    other = folder(generation={"temperature": 0.1}, name="other")
    assert facts(folder(), generation_config=str(other)).default_params.temperature == 0.1


@pytest.mark.parametrize(
    ("config", "generation", "message"),
    [
        ({"architectures": []}, None, "names no architectures"),
        ({"vocab_size": "many"}, None, "no usable vocab_size"),
        ({}, {"top_p": 7}, "generation_config.json: top_p must be"),
        ({"eos_token_id": "</s>"}, None, "eos_token_id must be token ids"),
    ],
)
def test_broken_settings_name_the_file(folder, config, generation, message):
    with pytest.raises(CheckpointError, match=message):
        facts(folder(config, generation))


def test_broken_json_names_the_file(folder):
    path = folder()
    (path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        facts(path)


def test_broken_weights_header(folder):
    path = folder()
    (path / "model.safetensors").write_bytes(b"\xff" * 32)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        facts(path)


def rope(kind, **more):
    return {"rope_parameters": {"rope_type": kind, **more}}


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({}, 512),
        ({"max_position_embeddings": None}, 2048),
        ({"max_position_embeddings": None, "n_positions": 1024}, 1024),
        ({"seq_length": 256}, 256),
        (rope("linear", factor=4.0), 2048),
        (rope("dynamic", factor=2.0), 1024),
        (rope("yarn", factor=4.0, original_max_position_embeddings=256), 1024),
        (rope("llama3", factor=8.0, original_max_position_embeddings=64), 512),
        (rope("longrope", original_max_position_embeddings=128), 128),
        (rope("su", factor=4.0), 512),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, 1024),
        ({"rope_scaling": None}, 512),
        ({"rope_parameters": {"full": {"rope_type": "linear", "factor": 8.0}, "slide": {}}}, 4096),
        ({"model_type": "gemma3_text", **rope("linear", factor=8.0)}, 512),
    ],
)
def test_context_length(config, length):
    assert context_length(CONFIG | config) == length


def test_sliding_window():
    assert sliding_window({"sliding_window": 64}) == 64
    assert sliding_window({"sliding_window": 64, "use_sliding_window": False}) is None
    assert sliding_window({}) is None
