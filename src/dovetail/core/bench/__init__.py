"""Benchmarks: workloads, load generation over HTTP, and the definitions of what is measured."""
