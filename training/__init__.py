"""Training a model. Read `config` and `trainer` first: they are the algorithm.

`checkpoint` is the start of a training and its state on disk, `optimizers` has AdamW and Muon,
`metrics` the reports, `checks` the checks before a training; `workers` are MPI's ranks, which share
a batch, and `launch` starts them. Nothing here knows of a command line.
"""
