"""The suites and scripts here measure with `spade_model.benchmark`; they are imported from the repository root."""
