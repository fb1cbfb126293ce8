"""A trained model as one file, a program or a page. Nothing here knows of a GPT.

`sources` writes C of a model's step, which tinygrad renders, and tables of its tokens; `build`
compiles them. Read generation.c first, then tokenizer.c and sampling.c, which programs and pages
share; steps.c runs the kernels, and sgemm.c multiplies for them. A program also has program.c,
system.c and whole.c, a page page.html, page.js, worker.js and page.c.
"""
