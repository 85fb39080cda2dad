"""The quantization formats and schemes."""
