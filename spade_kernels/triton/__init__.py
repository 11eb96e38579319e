"""The operators as Triton kernels: one module for each stem of `reference.py`, with its functions' names and arguments.

Nothing here is imported before a backend asks for it: `import spade_kernels` needs no Triton.
"""
