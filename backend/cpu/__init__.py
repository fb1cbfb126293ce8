"""The CPU as a device for tinygrad: a compiler, all cores, and matrix products in C.

Read `compiler`, `threads` (with threads.c) and `native` (functions in C that kernels call: gemm.c,
gemv.c, attention.c and BLAS's), then `processes` and `patches`, which puts them into tinygrad.
Nothing outside of this room assigns into tinygrad. Nothing here knows of a GPT.
"""
