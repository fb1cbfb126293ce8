"""The CPU as a device for tinygrad: a compiler, all cores, and C of our own.

Read `compiler`, `threads`, `gemv` and `gemm`, then `processes`, `imports` and `patches`, the only
file that assigns into tinygrad. Nothing here knows of a GPT.
"""
