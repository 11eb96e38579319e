"""The suites of `make gpu-check` measure ours against the honest baseline.

A suite is a generator function that measures a `Workload` and yields results; `benchmarks/gpu_measure.py` runs each in
a process of its own. These are the providers of whole generators and layers:

"baseline" is channels-last, with one convolution for gamma and beta, compiled with mode="max-autotune-no-cudagraphs",
in one CUDA graph with the making of its one-hot planes ("max-autotune" would capture the compiled part alone); in eval
its spectral norm is folded. "tuned" is the same without the compiler, "spade-free" is that without its SPADE layers.
"ours" makes its label map and the window indexes in every call and replays a graph; for "ours-indexed" they were made
ahead, as loader workers do; "ours-replay" is the graph alone; "ours-compiled" is "ours" compiled like the baseline.
"original" is as shipped: eager, float32, NCHW.

Precision: in eval, "bf16" has the weights themselves in bfloat16; in training it is autocast over float32 weights.
"tf32" are float32 tensors whose products round their factors to tf32. The same holds on both sides.
"""

COMPILE, UNCOMPILED = "compile ", "-uncompiled"
"""The names of parts that only compile for others begin so, and of those without the baseline end so."""
