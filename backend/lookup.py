"""Rows of a large table by their numbers, on every backend."""

from tinygrad import Tensor, UOp, dtypes
from tinygrad.uop.ops import AxisType, KernelInfo


def look_up(table: Tensor, ids: Tensor) -> Tensor:
    """table (n_rows, d), ids (n,) -> float32 (n, d): the rows of these numbers.

    The gradient adds one row after the other to a table of zeros. tinygrad's own compares all rows
    with all ids, and so does a product with one-hot rows, which is faster for small tables alone.
    """
    if not isinstance(table, Tensor):
        return table.rows(ids)
    rows = Tensor.empty(ids.shape[0], table.shape[1], device=table.device)
    ids = ids.cast(dtypes.int32).contiguous()
    kernel = UOp.custom_kernel(rows.uop, table.uop, ids.uop, fxn=copy_rows, grad_fxn=gradient)
    return Tensor(kernel[0])


def gradient(of_rows: UOp, call: UOp) -> tuple:
    _, _, table, ids = call.src
    zeros = Tensor.zeros(*table.shape, device=table.device).contiguous().uop
    if table.shape[1] == 1:  # behind a norm over one value it is a constant, which has no memory
        of_rows = of_rows.contiguous()
    return None, UOp.custom_kernel(zeros, of_rows, ids, fxn=add_rows)[0], None


def copy_rows(rows: UOp, table: UOp, ids: UOp) -> UOp:
    i, j = UOp.range(rows.shape[0], 0), UOp.range(rows.shape[1], 1)
    value = row(table, ids[i])[j].cast(rows.dtype)
    return rows[i, j].store(value).end(i, j).sink(arg=KernelInfo("copy_rows", opts_to_apply=()))


def add_rows(table: UOp, rows: UOp, ids: UOp) -> UOp:
    # in turn, for a row may occur twice; what runs in parallel are its columns
    i, j = UOp.range(rows.shape[0], 0, AxisType.LOOP), UOp.range(rows.shape[1], 1)
    place = row(table, ids[i])[j]
    return (
        place.store(place.load() + rows[i, j])
        .end(i, j)
        .sink(arg=KernelInfo("add_rows", opts_to_apply=()))
    )


def row(table: UOp, number: UOp) -> UOp:
    # within its bounds, for which tinygrad would take 64 bits to be sure
    return table[number.clip(0, table.shape[0] - 1).cast(dtypes.weakint)]
