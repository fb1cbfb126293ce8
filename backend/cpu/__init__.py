"""The CPU as a device for tinygrad: a C compiler, all cores, and functions in C.

Read `compiler`, `processes` (a pool that compiles), `threads` (with threads.c), `native` (the C
functions that kernels call: gemm.c, gemv.c, attention.c, norm.c and BLAS's), and `patches`, which
puts them into tinygrad. No other room assigns into tinygrad. Nothing here knows of a GPT.
"""
