"""This library measures the generator against stock PyTorch, for `spade bench` and for the suites in benchmarks/."""
