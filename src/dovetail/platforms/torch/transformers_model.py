"""Any decoder of the transformers library, run by its own modelling code over paged attention."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from dovetail.core.contracts.attention import AttentionBackend
from dovetail.core.contracts.model import StepInputs
from dovetail.core.contracts.observation import Wrap
from dovetail.core.contracts.runner import RunnerConfig
from dovetail.core.errors import UnsupportedError
from dovetail.core.types import IntArray
from dovetail.platforms.torch.library.attention import BY_KEYWORD, PagedStep, Step, Way, register
from dovetail.platforms.torch.library.classes import find_class
from dovetail.platforms.torch.library.head import make_head
from dovetail.platforms.torch.library.older import (
    ARCHITECTURES,
    BY_CACHE,
    adapt,
    register_older,
)
from dovetail.platforms.torch.library.probe import (
    PROBE_NAME,
    check_independence,
    check_windows,
    find_specs,
    register_probe,
)
from dovetail.platforms.torch.library.rotary import pin_rotary
from dovetail.platforms.torch.library.weights import bind_weights, read_model
from dovetail.platforms.torch.platform import TorchPlatform

__all__ = ["TransformersModel", "load_transformers_model"]


class TransformersModel:
    """A model of the library with its weights, ready to run.

    Args:
        model: The whole causal language model, bound for the platform. Changed in place.
        way: How steps reach its layers.
        device: Where it is.
        max_model_len: The longest sequence.

    Raises:
        UnsupportedError: It asks for something that paged attention cannot honour.
    """

    narrows = False

    @torch.inference_mode()
    def __init__(self, model: Any, way: Way, device: torch.device, max_model_len: int) -> None:
        self._name = type(model).__name__
        self._carry = way.carry
        self._trunk = _trunk(model)
        num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
        self.attention_specs, output = find_specs(self._call, num_layers, device)
        model.set_attn_implementation(way.attention)
        check_independence(self._call, device)
        check_windows(model.config, self.attention_specs, max_model_len)
        self._head = make_head(model, self._trunk, type(output))
        self.vocab_size: int = self.logits(output[0][0]).shape[1]

    def bind_attention(self, backend: AttentionBackend) -> None:
        """Attend with this backend from now on."""
        self._backend = backend

    def wrap_ops(self, wrap: Wrap) -> NoReturn:
        """Raises UnsupportedError: the library's code calls no ops of the table."""
        raise UnsupportedError(
            "the transformers library's code runs this model, and it calls no ops that could be"
            " timed; native models do"
        )

    def positions(self, positions_T: IntArray) -> IntArray:
        """From 0: the library's models add what they start with."""
        return positions_T

    def forward(self, inputs: StepInputs, caches: Sequence[Any]) -> tuple[Tensor, list[Any]]:
        """Hidden states (T, D) and the caches."""
        step = PagedStep(self._backend, inputs.plan, caches, self.attention_specs)
        hidden: Tensor = self._call(inputs.token_ids_T, inputs.positions_T, step)[0][0]
        return hidden, step.caches

    def _call(self, ids_T: Tensor, positions_T: Tensor, step: Step) -> Any:
        """The output of the layers below the output layer; its first entry is (1, T, D)."""
        ids, positions = ids_T[None].long(), positions_T[None].long()
        carried = self._carry(step)
        return self._trunk(input_ids=ids, position_ids=positions, use_cache=False, **carried)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits (N, V)."""
        logits: Tensor = self._head(inputs_embeds=hidden_ND[None], use_cache=False).logits[0]
        return logits

    def describe(self) -> dict[str, str]:
        """Whose code runs."""
        return {"model code": f"{self._name} of transformers {transformers.__version__}"}


def load_transformers_model(
    platform: TorchPlatform, config: RunnerConfig
) -> Generator[tuple[int, int], None, TransformersModel]:
    """Load a model of the library; yields (bytes done, bytes in all).

    Args:
        platform: Its device and its linear layers.
        config: Everything decided.

    Raises:
        CheckpointError: The library cannot read the config, or tensors do not fit it.
        UnsupportedError: The model asks for something that paged attention cannot honour; names
            the architecture and the reason.
    """
    name = config.hf_config["architectures"][0]
    register()
    register_older()
    register_probe()
    with _named(name):
        model_class, library_config = find_class(name, config)
    is_older = name in ARCHITECTURES
    first = "eager" if is_older else PROBE_NAME
    with _named(name):
        model, total_bytes = read_model(model_class, library_config, config, first)
        pin_rotary(model, config.max_model_len)
        if is_older:
            adapt(model)
    yield from bind_weights(model, platform, total_bytes)
    with _named(name):
        way = BY_CACHE if is_older else BY_KEYWORD
        return TransformersModel(model, way, platform.device, config.max_model_len)


def _trunk(model: Any) -> Any:
    """The module below the output layer. ``get_decoder`` may find an output layer of that name."""
    decoder = model.get_decoder()
    return decoder if isinstance(decoder, PreTrainedModel) else model.base_model


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Put the architecture in front of the reason; what its code raises is a reason as well."""
    try:
        yield
    except UnsupportedError as error:
        raise UnsupportedError(f"{name} cannot run over paged attention: {error}.") from error
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        text = (str(error).splitlines() or [""])[0]
        raise UnsupportedError(
            f"{name} cannot run over paged attention: its code raises"
            f" {type(error).__name__}: {text:.200}."
        ) from error
