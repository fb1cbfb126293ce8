"""How a model is trained. Read `config`, `trainer` and `batches` first: they are the algorithm.

`checkpoint` is what a training starts from and leaves on disk, `optimizers` how it learns,
`metrics` what is to be seen of it, `checks` what is looked at before; `workers` share the batches,
and stop by signals, `launch` starts them. Nothing here knows of a command line.
"""
