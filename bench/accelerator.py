"""The 83M model's training on an accelerator, beside PyTorch: python bench/accelerator.py.

(Not cuda.py: PyTorch, started from this folder, would take that for NVIDIA's package cuda.)
"""

from bench import Row, argument_parser, config, measure_all, show


def main() -> None:
    parser = argument_parser("Measure the training of the 83M model on an accelerator.")
    add = parser.add_argument
    add("--dev", default="CUDA", help="tinygrad's device")
    add("--torch-device", default="cuda", help="PyTorch's device")
    add("--batch-size", type=int, default=128, help="windows of 128 tokens in a batch")
    add("--beam", type=int, default=2, help="width of tinygrad's search for fast kernels")
    add("--peak", type=float, default=67, help="TFLOPS in float32 (default: an H100's, H200's)")
    add("--peak-bfloat16", type=float, default=990, help="TFLOPS in bfloat16, without sparsity")
    arguments = parser.parse_args()

    size, n = config(context_length=128, d_model=768, n_layers=12, n_heads=12), 20
    if arguments.small:
        arguments.dev, arguments.torch_device, arguments.batch_size = "CPU", "cpu", 4
        arguments.beam = 0  # a search takes minutes
        size, n = config(context_length=16, d_model=16, n_layers=1, n_heads=2), 2

    job = {"work": "train", "config": size, "batch_size": arguments.batch_size, "n": n}
    rows, peaks = [], {"float32": arguments.peak, "bfloat16": arguments.peak_bfloat16}
    for dtype in peaks:
        mine = job | {"dtype": dtype}
        theirs = mine | {"device": arguments.torch_device}
        for name, beam in {"plain": 0, "BEAM": arguments.beam}.items():
            contestants = {
                "gpt-tiny": ("ours.py", mine, {"DEV": arguments.dev, "BEAM": str(beam)}),
                "PyTorch eager": ("peers.py", theirs, {}),
                "torch.compile": ("peers.py", theirs | {"compile": True}, {}),
            }
            amount = n * arguments.batch_size * size["context_length"]
            title = f"training, 83M, {dtype}, {name}, tokens/s"
            rows.append(Row(f"{dtype}-{name.lower()}", title, contestants, amount))
    n_turns = 1 if arguments.small else arguments.turns
    results = measure_all(rows, n_turns, arguments.peer_python)

    # A token's forward and backward pass (Chowdhery et al., 2022, PaLM, appendix B).
    width, n_layers = size["d_model"], size["n_layers"]
    flops = 6 * 12 * n_layers * width**2 + 12 * n_layers * width * size["context_length"]
    for line in results["lines"]:
        peak = peaks[line["row"].split("-")[0]]
        for who in (line["ours"], line["peer"]):
            who["share_of_peak"] = who["figure"] and who["figure"] * flops / peak / 1e12
    show(results, arguments.json)
    if not arguments.json:
        shares = {
            f"{line['row']}, {who['name']}: {who['share_of_peak']:.1%}": None
            for line in results["lines"]
            for who in (line["ours"], line["peer"])
            if who["figure"]
        }
        print("Share of the chip's peak:", *shares, sep="\n")


if __name__ == "__main__":
    main()
