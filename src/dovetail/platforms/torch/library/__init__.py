"""Runs the transformers library's own modelling code over paged attention."""
