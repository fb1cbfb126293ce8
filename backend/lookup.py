"""Rows of a table by their ids, on every backend."""

from tinygrad import Tensor, UOp, dtypes
from tinygrad.uop.ops import AxisType, KernelInfo


def look_up(table: Tensor, ids: Tensor) -> Tensor:
    """table (n_rows, d), ids of any shape -> float32 (*ids.shape, d)

    The gradient adds row after row to a table of zeros. tinygrad's own compares all ids with all
    rows, and so does a product with one-hot rows, which is faster for small tables on a GPU alone.
    """
    if not isinstance(table, Tensor):  # a QuantizedMatrix
        return table.rows(ids)
    if table.shape[0] <= 1024 and not table.device.startswith("CPU"):
        one_hot = (ids.unsqueeze(-1) == Tensor.arange(table.shape[0])).cast(dtypes.float32)
        return one_hot @ table
    rows = Tensor.empty(ids.numel(), table.shape[1], device=table.device)
    sources = rows.uop, table.uop, ids.flatten().cast(dtypes.int32).contiguous().uop
    kernel = UOp.custom_kernel(*sources, fxn=copy_rows, grad_fxn=gradient)
    return Tensor(kernel[0]).reshape(*ids.shape, -1)


def gradient(of_rows: UOp, call: UOp) -> tuple:
    """of_rows (n, d) -> the gradients of the kernel's buffers: of the table (n_rows, d) alone"""
    _, _, table, ids = call.src
    zeros = Tensor.zeros(*table.shape, device=table.device).contiguous().uop
    if table.shape[1] == 1:  # tinygrad folds the gradient of a norm over one value to a constant,
        of_rows = of_rows.contiguous()  # and a kernel takes buffers
    return None, UOp.custom_kernel(zeros, of_rows, ids, fxn=add_rows)[0], None


def copy_rows(rows: UOp, table: UOp, ids: UOp) -> UOp:
    i, j = UOp.range(rows.shape[0], 0), UOp.range(rows.shape[1], 1)
    copy = rows[i, j].store(row(table, ids[i])[j].cast(rows.dtype))
    return copy.end(i, j).sink(arg=KernelInfo("copy_rows", opts_to_apply=()))


def add_rows(table: UOp, rows: UOp, ids: UOp) -> UOp:
    # one row at a time, since an id may occur twice; the columns may run in parallel
    i, j = UOp.range(rows.shape[0], 0, AxisType.LOOP), UOp.range(rows.shape[1], 1)
    element = row(table, ids[i])[j]
    add = element.store(element.load() + rows[i, j])
    return add.end(i, j).sink(arg=KernelInfo("add_rows", opts_to_apply=()))


def row(table: UOp, id: UOp) -> UOp:
    # clipped, or else tinygrad would compute the index in 64 bits
    return table[id.clip(0, table.shape[0] - 1).cast(dtypes.weakint)]
