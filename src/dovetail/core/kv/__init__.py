"""Which KV blocks exist, who refers to them, and which hold a known prefix. No arrays of a device."""
