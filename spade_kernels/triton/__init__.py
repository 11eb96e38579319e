"""The operators as Triton kernels: functions with the names and arguments of those in `reference.py`.

A module here is imported when a backend first uses it, so `import spade_kernels` needs no Triton.
"""
