"""Compares the generator with stock PyTorch: the code that `spade bench` and the scripts in benchmarks/ share."""
