"""The suites and scripts that measure, on top of `spade_model.benchmark`; imported from the repository root."""
