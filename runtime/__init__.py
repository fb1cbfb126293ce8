"""A trained model as one file: what runs there, and how it is made. Nothing here knows of a GPT.

`sources` writes the C of a model's step, which tinygrad renders, and tables of its tokens; `build`
compiles it for a program or a page. Of the files in C read generation.c first, then tokenizer.c and
sampling.c, which both have; steps.c runs the kernels and, with sgemm.c, what they call. A program
is program.c, system.c and whole.c, a page page.html, page.js, worker.js and page.c.
"""
