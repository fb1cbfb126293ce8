"""How a model is trained. Read `config`, `trainer` and `batches` first: they are the algorithm.

`optimizers` is how it learns, `state` what it starts from and where it stands; `metrics` shows it,
`resume` keeps it on disk, `workers` shares it out. Nothing here knows of a command line.
"""
