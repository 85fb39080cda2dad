"""Text to tokens and back, and conversations to prompts."""

from dovetail.core.tokenizer.base import DecodeStream, Message, Tokenizer
from dovetail.core.tokenizer.load import load_tokenizer

__all__ = ["DecodeStream", "Message", "Tokenizer", "load_tokenizer"]
