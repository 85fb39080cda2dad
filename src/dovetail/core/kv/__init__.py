"""Which KV blocks exist, who refers to them, which hold a known prefix. Plain host code."""
