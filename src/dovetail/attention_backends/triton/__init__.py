"""Paged attention in Triton, for GPUs of every vendor that Triton compiles for.

A step of a layer is two to four launches: ``write`` (norms, rotation, KV write), ``decode`` and its
``reduce`` for rows with few query tokens, ``prefill`` for the others. How they are launched follows
from the numbers of tokens and rows and from the layer, never from values, so that steps can be
recorded and replayed.
"""
