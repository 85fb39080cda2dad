"""The model families, one per file, over the op table; and how their weights are read."""
