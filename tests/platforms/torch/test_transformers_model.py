"""Models of the transformers library over paged attention: its tokens, or a reason why not."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, dynamic_module_utils

from dovetail.core.engine.core import EngineCore
from dovetail.core.errors import CheckpointError, UnsupportedError
from dovetail.core.request import SamplingParams
from dovetail.platforms.torch.library.probe import Recorder, check_independence
from tests.checkpoints import FAMILIES, randomise
from tests.engines import Answer, answer, make_core
from tests.thorough import every

LENGTHS = (3, 17, 33, 50)
NUM_NEW = 24
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_NEW, logprobs=0)

PLAIN: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
GROUPED = {**PLAIN, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
SHARED = {"shared_expert_intermediate_size": 32}

RUN: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"native {family}": (family, settings) for family, settings in FAMILIES.items()},
    "bloom": ("bloom", PLAIN | {"n_layer": 2, "n_head": 4, "seq_length": 512}),
    "bloom, 6 heads": ("bloom", PLAIN | {"hidden_size": 96, "num_attention_heads": 6}),
    "codegen": ("codegen", PLAIN | {"n_ctx": 512, "rotary_dim": 8, "n_inner": 96}),
    "cohere": ("cohere", GROUPED | {"logit_scale": 0.25, "use_qk_norm": True}),
    "cohere2": ("cohere2", GROUPED | {"sliding_window": 32, "num_hidden_layers": 4}),
    "exaone4": ("exaone4", GROUPED | {"sliding_window": 32, "sliding_window_pattern": 2}),
    "falcon 40b": ("falcon", PLAIN | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon 7b": ("falcon", PLAIN | {"multi_query": True}),
    "falcon rw": ("falcon", PLAIN | {"multi_query": False, "alibi": True, "parallel_attn": False}),
    "gemma": ("gemma", GROUPED | {"head_dim": 16}),
    "gemma3": (
        "gemma3_text",
        GROUPED | {"head_dim": 16, "sliding_window": 32, "query_pre_attn_scalar": 24},
    ),
    "glm": ("glm", GROUPED | {"head_dim": 16}),
    "glm4": ("glm4", GROUPED | {"head_dim": 16}),
    "gpt-j": ("gptj", PLAIN | {"rotary_dim": 8}),
    "gpt-neox": ("gpt_neox", PLAIN),
    "granite": (
        "granite",
        GROUPED | {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "attention_multiplier": 0.2},
    ),
    "granitemoe": ("granitemoe", GROUPED | LOCAL),
    "helium": ("helium", GROUPED | {"head_dim": 16}),
    "mixtral": ("mixtral", GROUPED | LOCAL),
    "mpt": ("mpt", PLAIN | {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512}),
    "olmo2": ("olmo2", GROUPED),
    "olmoe": ("olmoe", GROUPED | EXPERTS),
    "phi": ("phi", GROUPED),
    "qwen2-moe": ("qwen2_moe", GROUPED | EXPERTS | SHARED),
    "qwen3-moe": ("qwen3_moe", GROUPED | EXPERTS | {"head_dim": 16}),
    "smollm3": ("smollm3", GROUPED | {"num_hidden_layers": 4}),
    "stablelm": ("stablelm", GROUPED),
    "starcoder2": ("starcoder2", GROUPED | {"sliding_window": 32}),
}


Wanted = tuple[list[list[int]], list[list[float]]]
"""Tokens of each prompt, and their log-probabilities."""


def save(model_type: str, settings: dict[str, Any], path: Path) -> Any:
    """A random checkpoint of the library's own class, and the model."""
    config = AutoConfig.for_model(model_type, **settings)
    model = AutoModelForCausalLM.from_config(config).eval()
    randomise(model, seed=0)
    model.save_pretrained(path)
    return model


def prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(3, 250) for _ in range(length)] for length in LENGTHS]


def generate(model: Any) -> Wanted:
    """What the library itself answers, one prompt at a time."""
    tokens, logprobs = [], []
    for prompt in prompts():
        out = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=NUM_NEW,
            min_new_tokens=NUM_NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        new = out.sequences[0, len(prompt) :]
        table = torch.stack(out.logits)[:, 0].float().log_softmax(-1)
        tokens.append(new.tolist())
        logprobs.append(table.gather(1, new[:, None])[:, 0].tolist())
    assert len({tuple(answer) for answer in tokens}) > 1, "it says the same to everybody"
    return tokens, logprobs


def load(path: Path, **settings: Any) -> EngineCore:
    small = {"max_num_batched_tokens": 16, "max_num_seqs": 4, "block_size": 8}
    return make_core(path, "cpu", **({"model_impl": "transformers"} | small | settings))


def same(answers: list[Answer], wanted: Wanted) -> None:
    tokens, logprobs = wanted
    assert [a.token_ids for a in answers] == tokens
    for a, expected in zip(answers, logprobs, strict=True):
        assert a.logprobs == pytest.approx(expected, abs=2e-4)


def edit(path: Path, **changes: Any) -> None:
    """Change entries of a checkpoint's config.json."""
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


NATIVE = [f"native {family}" for family in FAMILIES]


@pytest.mark.parametrize("name", [*every(3, NATIVE), *list(RUN)[len(NATIVE) :]])
def test_tokens_equal_generate(name: str, tmp_path: Path) -> None:
    wanted = generate(save(*RUN[name], tmp_path))
    core = load(tmp_path)
    same(answer(core, prompts(), GREEDY), wanted)
    same(answer(core, prompts(), GREEDY, first_id=10), wanted)
    assert core.scheduler.stats.prefix_cache_hits > 0


def test_the_reference_platform_runs_them_too(tmp_path: Path) -> None:
    wanted = generate(save(*RUN["starcoder2"], tmp_path))
    core = make_core(tmp_path, "reference")
    same(answer(core, prompts(), GREEDY), wanted)
    assert core.runner.describe()["model code"].startswith("Starcoder2ForCausalLM of transformers")


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "bamba": ("bamba", GROUPED | {"mamba_n_heads": 8, "mamba_d_head": 16}, "linear_attention"),
    "bert": ("bert", PLAIN | {"is_decoder": False}, "its attention is not causal"),
    "diffllama": ("diffllama", GROUPED, "layer 0 attends twice in one step"),
    "gpt-neo": (
        "gpt_neo",
        {
            **{"vocab_size": 384, "hidden_size": 64, "num_layers": 2, "num_heads": 4},
            "attention_types": [[["global", "local"], 1]],
        },
        "do not call the library's attention interface",
    ),
    "gpt-oss": (
        "gpt_oss",
        GROUPED | LOCAL | {"head_dim": 16, "rope_parameters": {"rope_type": "default"}},
        "its attention takes s_aux",
    ),
    "jamba": ("jamba", GROUPED | {"mamba_d_state": 8}, "linear_attention"),
    "lfm2": ("lfm2", GROUPED | {"layer_types": ["conv", "full_attention"]}, "of the kind conv"),
    "llama4": (
        "llama4_text",
        GROUPED | LOCAL | {"head_dim": 16, "intermediate_size_mlp": 96},
        "chunked_attention",
    ),
    "mamba": ("mamba", {"vocab_size": 384, "hidden_size": 64, "num_hidden_layers": 2}, "linear"),
    "moshi": (
        "moshi",
        PLAIN | {"sliding_window": 32, "ffn_dim": 96, "num_key_value_heads": 4},
        "--max-model-len 32 or less",
    ),
    "rwkv": (
        "rwkv",
        {"vocab_size": 384, "hidden_size": 64, "num_hidden_layers": 2, "context_length": 128},
        "a recurrent state",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    model_type, settings, reason = REFUSED[name]
    architecture = type(save(model_type, settings, tmp_path)).__name__
    with pytest.raises(UnsupportedError) as caught:
        load(tmp_path, max_model_len=128)
    text = str(caught.value)
    assert text.startswith(f"{architecture} cannot run over paged attention: ")
    assert reason in text
    assert "\n" not in text


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    save(*RUN["olmo2"], tmp_path)
    edit(tmp_path, architectures=["NoSuchForCausalLM"])
    with pytest.raises(UnsupportedError, match="has no causal language model of that name"):
        load(tmp_path)


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OddConfig(LlamaConfig):
    model_type = "odd"

class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.flip(-1)
        return output
"""


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint that brings its own code, which the library copies to a folder of its cache."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    path = tmp_path / "odd"
    save(*RUN["native llama"], path)
    (path / "own_code.py").write_text(OWN_CODE)
    places = {"AutoConfig": "own_code.OddConfig", "AutoModelForCausalLM": "own_code.OddForCausalLM"}
    edit(path, architectures=["OddForCausalLM"], model_type="odd", auto_map=places)
    return path


def test_code_of_a_model_is_not_run_unasked(odd: Path) -> None:
    with pytest.raises(UnsupportedError, match="--trust-remote-code"):
        load(odd)


def test_code_of_a_model_runs_if_trusted(odd: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(odd, trust_remote_code=True)
    assert type(model).__name__ == "OddForCausalLM"
    same(answer(load(odd, trust_remote_code=True), prompts(), GREEDY), generate(model))


def rewrite(path: Path, change: Any) -> None:
    """Change the tensors of a checkpoint."""
    file = path / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    save(*RUN["olmo2"], tmp_path)

    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        del tensors["model.layers.0.mlp.up_proj.weight"]
        tensors["model.norm.weight"] = torch.ones(7)
        return tensors | {"model.surprise": torch.ones(1)}

    rewrite(tmp_path, spoil)
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    assert "lacks 1 tensor: model.layers.0.mlp.up_proj.weight" in str(caught.value)
    assert "unknown to the model, 1 tensor: model.surprise" in str(caught.value)
    assert "model.norm.weight (7,) instead of (64,)" in str(caught.value)


def test_a_checkpoint_of_the_model_without_its_head(tmp_path: Path) -> None:
    wanted = generate(save(*RUN["bloom"], tmp_path))
    rewrite(tmp_path, lambda held: {k.removeprefix("transformer."): v for k, v in held.items()})
    same(answer(load(tmp_path), prompts(), GREEDY), wanted)


def test_dummy_weights(tmp_path: Path) -> None:
    save(*RUN["olmo2"], tmp_path)
    (tmp_path / "model.safetensors").unlink()
    answers = [answer(load(tmp_path, load_format="dummy"), prompts(), GREEDY) for _ in range(2)]
    assert [a.token_ids for a in answers[0]] == [a.token_ids for a in answers[1]]


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + i / 8 for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize("max_model_len", [64, 512])
def test_longrope_is_the_same_in_every_step(
    max_model_len: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOVETAIL_ALLOW_LONG_MAX_MODEL_LEN", "1")
    settings = FAMILIES["phi3"] | {"original_max_position_embeddings": 64}
    save("phi3", settings | {"rope_parameters": LONGROPE}, tmp_path)
    library, native = (
        answer(load(tmp_path, model_impl=impl, max_model_len=max_model_len), prompts()[:3], GREEDY)
        for impl in ("transformers", "native")
    )
    same(library, ([a.token_ids for a in native], [a.logprobs for a in native]))


def test_dynamic_rotary_scaling_ends_at_the_original_context(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    wanted = generate(save("olmo2", GROUPED | {"rope_parameters": rope}, tmp_path))
    same(answer(load(tmp_path, max_model_len=512), prompts(), GREEDY), wanted)
    with pytest.raises(UnsupportedError, match="--max-model-len 512 or less"):
        load(tmp_path, max_model_len=1024)


def test_linear_layers_are_the_platforms(tmp_path: Path) -> None:
    save("olmo2", GROUPED | {"tie_word_embeddings": True}, tmp_path)
    core = load(tmp_path, dtype="bfloat16")
    model = core.runner._loaded.model  # type: ignore[attr-defined]
    linear = [m for m in model._head.modules() if isinstance(m, nn.Linear)]
    linear += [m for m in model._trunk.modules() if isinstance(m, nn.Linear)]
    assert len(linear) == 1 + 2 * 7
    assert all(m.weight.is_meta and not isinstance(m.forward, type(m.__init__)) for m in linear)
    answers = answer(core, prompts(), GREEDY)
    assert all(len(a.token_ids) == NUM_NEW for a in answers)


def attention_call(**changes: Any) -> None:
    layer = nn.Module()
    layer.layer_idx = 0  # type: ignore[assignment]
    query, key, value = torch.ones(1, 4, 2, 8), torch.ones(1, 2, 2, 8), torch.ones(1, 2, 2, 8)
    given = {"query": query, "key": key, "value": value} | changes.pop("given", {})
    Recorder().attend(layer, **given, asked=changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"position_bias": torch.zeros(1)}, "its attention takes position_bias"),
        ({"is_causal": False}, "not causal"),
        ({"attention_mask": torch.ones(1, 1, 3, 66, dtype=torch.bool)}, "more than causal"),
        ({"attention_mask": torch.zeros(1, 1, 2, 2)}, "more than causal"),
        ({"given": {"key": torch.ones(1, 2, 5, 8)}}, "not of the same tokens"),
    ],
)
def test_a_layer_that_asks_too_much(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        attention_call(**changes)


def test_tokens_that_influence_each_other_are_found() -> None:
    def neighbours(ids: torch.Tensor, positions: torch.Tensor, step: object) -> Any:
        hidden = torch.eye(3)[ids]
        return [(hidden + hidden.roll(1, 0))[None]]

    def alone(ids: torch.Tensor, positions: torch.Tensor, step: object) -> Any:
        return [torch.eye(3)[ids][None]]

    check_independence(alone, torch.device("cpu"))
    with pytest.raises(UnsupportedError, match="influence each other"):
        check_independence(neighbours, torch.device("cpu"))
