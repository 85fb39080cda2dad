"""Ops in Triton, in place of the torch references."""
