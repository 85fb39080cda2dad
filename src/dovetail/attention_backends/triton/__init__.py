"""Paged attention in Triton, for GPUs of several vendors."""
