"""How fast and how large the generator is, against stock PyTorch: what `spade bench` and benchmarks/ share."""
