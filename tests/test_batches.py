"""A batch in parts, or in low precision, trains as a whole one does."""

import re

import numpy as np

import train
from models import checkpoint

TINY = ["-d", "8", "-l", "1", "-h", "2", "-c", "8", "-b", "4", "-n", "1"]


def test_accumulation_gives_the_model_of_whole_batches(call, folder):
    options = [*TINY, "--dropout", "0"]
    models = []
    for number, more in enumerate(([], ["--accumulate", "2"])):
        assert call(train.main, *options, *more, "-o", f"accumulated_{number}").status == 0
        model, _ = checkpoint.load(folder / f"accumulated_{number}")
        models.append({name: p.numpy() for name, p in model.parameters().items()})
    for name, whole in models[0].items():
        np.testing.assert_allclose(models[1][name], whole, atol=1e-4, err_msg=name)


def test_products_of_bfloat16_train_almost_as_those_of_float32(call, folder):
    lines = [
        call(train.main, *TINY, "-x", "--dtype", dtype).out for dtype in ("float32", "bfloat16")
    ]
    losses = [[float(x) for x in re.findall(r"loss: (\S+?),? ", line)] for line in lines]
    assert losses[0] != losses[1]
    np.testing.assert_allclose(losses[1], losses[0], rtol=3e-3)
