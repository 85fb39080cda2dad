"""Train the bundled demonstration model on the source of the Python standard library.

The result is a directory in the format of Hugging Face transformers: a small Llama model
in bfloat16 and its tokenizer. See README.md for the details.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
from corpus import END_OF_TEXT, END_OF_TEXT_ID, collect_corpus, count_bytes, train_tokenizer
from tokenizers import Tokenizer
from training import TrainingOptions, bits_per_byte, demo_config, train_model
from transformers import GenerationConfig, LlamaForCausalLM

VOCAB_SIZE = 4096
PROMPTS = ("def __init__(self, ", "import os\nimport ", "for i in range(")

# The model knows no conversation format: a chat becomes the messages' texts, one after the
# other, and the answer is the completion of that text.
CHAT_TEMPLATE = "{{ messages | map(attribute='content') | join('\\n') }}"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="directory to write the model to")
    bound = parser.add_mutually_exclusive_group()
    bound.add_argument("--steps", type=int, default=TrainingOptions.steps, help="optimizer steps")
    bound.add_argument("--minutes", type=float, help="train for this long instead")
    parser.add_argument("--learning-rate", type=float, default=TrainingOptions.learning_rate)
    parser.add_argument("--init", type=Path, help="continue from the model in this directory")
    parser.add_argument("--tokenizer", type=Path, help="use the tokenizer in this directory")
    parser.add_argument("--layers", type=int, default=4, help="layers of a new model")
    parser.add_argument("--hidden-size", type=int, default=256, help="of a new model: 64 x heads")
    parser.add_argument("--seed", type=int, default=TrainingOptions.seed)
    parser.add_argument("--stdlib", type=Path, help="read the source files below this directory")
    parser.add_argument(
        "--no-compile", action="store_true", help="train without torch.compile (slower)"
    )
    return parser.parse_args()


def new_model(
    tokenizer: Tokenizer, seed: int, hidden_size: int, num_layers: int
) -> LlamaForCausalLM:
    """A freshly initialized model; the same seed gives the same weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(demo_config(tokenizer.get_vocab_size(), hidden_size, num_layers))


def load_tokenizer(directory: Path | None) -> Tokenizer | None:
    """The tokenizer to continue with, if there is one."""
    return Tokenizer.from_file(str(directory / "tokenizer.json")) if directory else None


def load_model(directory: Path | None) -> LlamaForCausalLM | None:
    """The model to continue with, if there is one, in the precision it is trained in."""
    if directory is None:
        return None
    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write the model in bfloat16, the tokenizer and the generation defaults to `out`."""
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=END_OF_TEXT_ID, eos_token_id=END_OF_TEXT_ID
    )
    model.bfloat16()
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.config.max_position_embeddings,
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(tokenizer_config, indent=2) + "\n"
    (out / "tokenizer_config.json").write_text(text, encoding="utf-8")


def complete(model: Any, tokenizer: Tokenizer, prompt: str, new_tokens: int) -> str:
    """The prompt and its greedy continuation."""
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    output = model.generate(ids, do_sample=False, max_new_tokens=new_tokens)
    return prompt + tokenizer.decode(output[0, ids.shape[1] :].tolist())


def main() -> None:
    """Collect the text, train, save, evaluate what was saved, and show samples."""
    arguments = parse_arguments()
    corpus = collect_corpus(arguments.stdlib)
    print(f"Python {platform.python_version()}, torch {torch.__version__}")
    print(f"train: {len(corpus.train)} files, {count_bytes(corpus.train):,} bytes")
    print(f"held out: {len(corpus.held_out)} files, {count_bytes(corpus.held_out):,} bytes")
    print(f"sha256 of the corpus: {corpus.digest()}")
    tokenizer = load_tokenizer(arguments.tokenizer or arguments.init)
    tokenizer = tokenizer or train_tokenizer(corpus.train, VOCAB_SIZE)
    options = TrainingOptions(
        steps=arguments.steps,
        minutes=arguments.minutes,
        learning_rate=arguments.learning_rate,
        seed=arguments.seed,
        compile=not arguments.no_compile,
    )
    model = load_model(arguments.init) or new_model(
        tokenizer, options.seed, arguments.hidden_size, arguments.layers
    )
    print(f"{model.num_parameters():,} parameters, {options}")
    summary = train_model(model, tokenizer, corpus, options)
    print(f"{summary.steps} steps, {summary.tokens:,} tokens, {summary.seconds / 60:.1f} minutes")
    save(model, tokenizer, arguments.out)
    saved = LlamaForCausalLM.from_pretrained(arguments.out, dtype=torch.bfloat16)
    loss = bits_per_byte(saved, tokenizer, corpus.held_out, model.config.max_position_embeddings)
    print(f"held-out loss: {loss:.4f} bits per byte")
    for prompt in PROMPTS:
        print(f"--- {prompt!r}\n{complete(saved, tokenizer, prompt, 64)}")


if __name__ == "__main__":
    main()
