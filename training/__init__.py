"""How a model is trained. Read `settings`, `loop` and `batches` first: they are the algorithm.

`texts` and `corpus` are what it reads, `optimizers` how it learns, `state` what it starts from and
where it stands; `metrics` shows it, `resume` keeps it on disk, `distributed` shares it out. Nothing
here knows of a command line.
"""
