"""How fast and how large the generator is here, against stock PyTorch: what `spade bench` and benchmarks/ share."""
