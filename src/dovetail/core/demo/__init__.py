"""The bundled demonstration model, which `dovetail serve` loads when no model is named."""

from pathlib import Path

__all__ = ["DEMO_MODEL_DESCRIPTION", "DEMO_MODEL_NAME", "demo_model_path"]

DEMO_MODEL_NAME = "dovetail-demo"

DEMO_MODEL_DESCRIPTION = (
    "a 3.8 M parameter model that completes Python, trained on the standard library's source; "
    "for demonstration, not for use"
)


def demo_model_path() -> Path:
    """Directory that holds the model's configuration, weights and tokenizer."""
    return Path(__file__).resolve().parent / "model"
