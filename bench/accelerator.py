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
    add("--peak", type=float, default=67, help="TFLOPS of the chip; 67: H100, H200 in float32")
    arguments = parser.parse_args()

    size, n = config(context_length=128, d_model=768, n_layers=12, n_heads=12), 20
    if arguments.small:
        arguments.dev, arguments.torch_device, arguments.batch_size = "CPU", "cpu", 4
        arguments.beam = 0  # a search takes minutes
        size, n = config(context_length=16, d_model=16, n_layers=1, n_heads=2), 2

    job = {"work": "train", "config": size, "batch_size": arguments.batch_size, "n": n}
    theirs = job | {"device": arguments.torch_device}
    rows = [
        Row(
            f"train-{name.lower()}",
            f"training, 83M, {name}, tokens/s",
            {
                "gpt-tiny": ("ours.py", job, {"DEV": arguments.dev, "BEAM": str(beam)}),
                "PyTorch eager": ("peers.py", theirs, {}),
                "torch.compile": ("peers.py", theirs | {"compile": True}, {}),
            },
            n * arguments.batch_size * size["context_length"],
        )
        for name, beam in {"plain": 0, "BEAM": arguments.beam}.items()
    ]
    n_turns = 1 if arguments.small else arguments.turns
    results = measure_all(rows, n_turns, arguments.peer_python)

    # A token's forward and backward pass (Chowdhery et al., 2022, PaLM, appendix B).
    width, n_layers = size["d_model"], size["n_layers"]
    flops = 6 * 12 * n_layers * width**2 + 12 * n_layers * width * size["context_length"]
    for line in results["lines"]:
        for who in (line["ours"], line["peer"]):
            who["share_of_peak"] = who["figure"] and who["figure"] * flops / arguments.peak / 1e12
    show(results, arguments.json)
    if not arguments.json:
        shares = {
            f"{line['row']}, {who['name']}: {who['share_of_peak']:.1%}": None
            for line in results["lines"]
            for who in (line["ours"], line["peer"])
            if who["figure"]
        }
        print(f"Share of {arguments.peak:g} TFLOPS:", *shares, sep="\n")


if __name__ == "__main__":
    main()
