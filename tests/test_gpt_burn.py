"""gpt-burn's records: what is read equals what was written, what cannot be read is an error."""

import json
import re
from itertools import pairwise

import msgpack
import numpy as np
import pytest
from conftest import (
    CONFIG,
    DATA,
    REFERENCE,
    SHAPES,
    assert_equal,
    not_on_windows,
    parameter_shapes,
)
from mutate import N_MUTATIONS, mutated_bytes, outcomes

from models import checkpoint, gpt_burn

FORMATS = {16: "half::binary16::f16", 32: "f32", 64: "f64"}


def make_record(tensors: dict[str, np.ndarray], precision: int) -> bytes:
    """Return a record as msgpack itself would pack it, with linears' weights (in, out)."""
    item = {}
    for name, values in tensors.items():
        if precision == 16:
            numbers = values.astype(np.float16).reshape(-1).view(np.uint16).tolist()
        else:
            numbers = values.reshape(-1).tolist()
        *modules, field = name.split(".")
        holder = item
        for module in modules:
            holder = holder.setdefault(module, {})
        param = {"value": numbers, "shape": list(values.shape)}
        holder[field] = {"id": "an id", "param": param}
    record = {"metadata": {"float": FORMATS[precision]}, "item": item, "_b": []}
    return msgpack.packb(record, use_single_float=precision == 32)


def test_reference_record_equals_what_msgpack_reads():
    config = checkpoint.read_config(REFERENCE)
    weights = checkpoint.read_weights(REFERENCE, parameter_shapes(config["model"]))
    item = msgpack.unpackb((REFERENCE / "model.mpk").read_bytes())["item"]
    for name, values in weights.items():
        holder = item
        for part in name.split("."):
            holder = holder[int(part) if part.isdigit() else part]
        theirs = np.array(holder["param"]["value"], np.uint16).view(np.float16)
        theirs = theirs.reshape(holder["param"]["shape"])
        theirs = theirs if "embedding" in name else theirs.T
        assert values.dtype == np.float16
        assert values.flags.c_contiguous
        np.testing.assert_array_equal(values, theirs, err_msg=name)


def test_full_precision_reference_records_are_read():
    before = gpt_burn.read_record(DATA / "adamw_steps" / "before.mpk")
    after = gpt_burn.read_record(DATA / "adamw_steps" / "after_5.mpk")
    assert {name: values.shape for name, values in before.items()} == SHAPES
    assert {values.dtype for values in before.values()} == {np.dtype(np.float32)}
    moved = max(np.abs(after[name] - before[name]).max() for name in before)
    assert 0.003 < moved < 0.03  # five steps of AdamW at a learning rate of 0.003


@pytest.mark.parametrize("precision", [16, 32, 64])
def test_records_of_each_precision_are_read_exactly(tmp_path, precision):
    values = np.random.default_rng(0).normal(0, 0.02, (300, 40)).astype(f"f{precision // 8}")
    values[0, 0] = -0.0
    path = tmp_path / "model.mpk"
    path.write_bytes(make_record({"linear.weight": values, "norm.beta": values[0]}, precision))
    theirs = {"linear.weight": values.T, "norm.beta": values[0]}
    assert_equal(gpt_burn.read_record(path), theirs)

    path.with_name("config.json").write_text(json.dumps(CONFIG))
    shapes = {name: values.shape for name, values in theirs.items()}
    at_most_float32 = np.float16 if precision == 16 else np.float32
    theirs = {name: values.astype(at_most_float32) for name, values in theirs.items()}
    assert_equal(checkpoint.read_weights(tmp_path, shapes), theirs)


@pytest.mark.parametrize("share", [0, 0.0003, 0.01, 0.1, 0.5, 0.99, 1])
@pytest.mark.parametrize("largest", [1, 0x80, 0x100])
def test_half_precision_records_with_any_share_of_short_integers_are_read(tmp_path, share, largest):
    rng = np.random.default_rng(0)
    bits = rng.integers(0x100, 0x10000, 40_000, np.uint16)
    short = rng.random(len(bits)) < share
    bits[short] = rng.integers(0, largest, short.sum())
    path = tmp_path / "model.mpk"
    path.write_bytes(make_record({"norm.beta": bits.view(np.float16)}, 16))
    read = gpt_burn.read_record(path)["norm.beta"]
    np.testing.assert_array_equal(read.view(np.uint16), bits)


@pytest.mark.parametrize("numbers", [[1, 0.5], [1, 70_000], [1, -1], [1, None], [1, "x"], [1, [2]]])
@pytest.mark.parametrize("precision", [16, 32])
def test_a_record_with_other_numbers_than_it_says_is_refused(tmp_path, numbers, precision):
    param = {"value": numbers, "shape": [2]}
    item = {"norm": {"beta": {"id": "", "param": param}}}
    path = tmp_path / "model.mpk"
    path.write_bytes(msgpack.packb({"metadata": {"float": FORMATS[precision]}, "item": item}))
    with pytest.raises(ValueError, match=r"model\.mpk is truncated or corrupt"):
        gpt_burn.read_record(path)


@pytest.mark.parametrize(
    "header", [b"\xdd\xff\xff\xff\xff", b"\xdd\x00\x01\x00\x00", b"\xdc\xff\xff"]
)
def test_a_record_that_claims_more_numbers_than_it_holds_is_refused(tmp_path, header):
    data = (REFERENCE / "model.mpk").read_bytes()
    at = data.index(b"value\xdc") + 5
    (tmp_path / "model.mpk").write_bytes(data[:at] + header + data[at + 3 : at + 1000])
    with pytest.raises(ValueError, match="truncated or corrupt"):
        gpt_burn.read_record(tmp_path / "model.mpk")


def test_a_shape_of_a_million_million_elements_is_refused(tmp_path):
    param = {"value": [1], "shape": [10**6, 10**6]}
    item = {"norm": {"beta": {"id": "", "param": param}}}
    record = {"metadata": {"float": FORMATS[16]}, "item": item}
    (tmp_path / "model.mpk").write_bytes(msgpack.packb(record))
    with pytest.raises(ValueError, match=r"norm.beta.*1 values .*\[1000000, 1000000\]"):
        gpt_burn.read_record(tmp_path / "model.mpk")


def test_a_written_record_is_byte_for_byte_gpt_burns(tmp_path, monkeypatch):
    theirs = (REFERENCE / "model.mpk").read_bytes()
    ids = re.findall(rb"\xa2id\xd9\x24([0-9a-f-]{36})", theirs)
    config = checkpoint.read_config(REFERENCE)
    weights = checkpoint.read_weights(REFERENCE, parameter_shapes(config["model"]))
    assert len(ids) == len(weights)

    new_id = gpt_burn.uuid.uuid4
    remaining = iter(ids)
    monkeypatch.setattr(gpt_burn.uuid, "uuid4", lambda: next(remaining).decode())
    gpt_burn.write_record(tmp_path / "model.mpk", weights, config["model"]["n_layers"])
    assert (tmp_path / "model.mpk").read_bytes() == theirs

    monkeypatch.setattr(gpt_burn.uuid, "uuid4", new_id)
    config["tokenizer"] = "char"
    checkpoint.save(tmp_path / "model", config, weights, format="burn")
    ours = (tmp_path / "model" / "model.mpk").read_bytes()
    our_ids = re.findall(rb"\xa2id\xd9\x24([0-9a-f-]{36})", ours)
    assert len(set(our_ids) - set(ids)) == len(ids)
    for our_id, their_id in zip(our_ids, ids, strict=True):
        ours = ours.replace(our_id, their_id)
    assert ours == theirs
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert written == json.loads((REFERENCE / "config.json").read_text())


def test_short_integers_are_packed_as_msgpack_does():
    bits = np.array([0, 1, 0x7F, 0x80, 0xFF, 0x100, 0xFFFF] * 3, np.uint16)
    packed = gpt_burn.packed_halves("norm.beta", bits.view(np.float16))
    assert packed == msgpack.packb(bits.tolist())


def test_a_model_that_gpt_burn_cannot_hold_is_refused(tmp_path, weights):
    path = tmp_path / "model.mpk"
    with pytest.raises(ValueError, match=r"linear\.bias has values too large"):
        gpt_burn.write_record(path, weights | {"linear.bias": np.full(11, 7e4, np.float32)}, 2)
    with pytest.raises(ValueError, match=r"no place for blocks\.1"):
        gpt_burn.write_record(path, weights, 1)
    with pytest.raises(ValueError, match=r"needs blocks\.2"):
        gpt_burn.write_record(path, weights, 3)


@not_on_windows("replaces files that are still mapped")
@pytest.mark.parametrize("precision", [16, 32])
def test_damaged_records_are_refused(model_folder, weights, precision):
    (model_folder / "model.safetensors").unlink()
    path = model_folder / "model.mpk"
    data = (DATA / "adamw_steps" / "before.mpk").read_bytes()
    if precision == 16:
        gpt_burn.write_record(path, weights, 2)
        data = path.read_bytes()

    def read():
        return checkpoint.read_weights(model_folder, SHAPES)

    n_read, n_refused = outcomes(mutated_bytes(data, N_MUTATIONS // 2, 0), path, read)
    assert n_refused > n_read > 0
    cuts = [*range(0, 1500, 7), *range(1500, len(data), 997), len(data) - 1]
    assert all(first < second for first, second in pairwise(cuts))
    assert outcomes((data[:cut] for cut in cuts), path, read) == (0, len(cuts))
