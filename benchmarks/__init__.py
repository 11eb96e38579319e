"""Benchmark suites and scripts, which use `spade_model.benchmark`. Run them from the root of the repository."""
