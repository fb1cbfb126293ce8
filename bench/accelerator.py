"""The 83M model's training on an accelerator, beside PyTorch: python bench/accelerator.py.

(Not cuda.py: PyTorch, started in this folder, would import it as NVIDIA's package cuda.)
"""

from rows import Row, config, ours, peer

from bench import argument_parser, measure_all, show


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

    size, n = config(128, 768, 12, 12), 20
    if arguments.small:
        arguments.dev, arguments.torch_device, arguments.batch_size = "CPU", "cpu", 4
        arguments.beam = 0  # a search takes minutes
        size, n = config(16, 16, 1, 2), 2

    job = {"work": "train", "config": size, "batch_size": arguments.batch_size, "n": n}
    rows, peaks = [], {"float32": arguments.peak, "bfloat16": arguments.peak_bfloat16}
    for dtype in peaks:
        mine = job | {"dtype": dtype}
        theirs = mine | {"device": arguments.torch_device}
        for name, beam in {"plain": 0, "BEAM": arguments.beam}.items():
            contestants = {
                "gpt-tiny": ours(mine, DEV=arguments.dev, BEAM=str(beam)),
                "PyTorch eager": peer(theirs),
                "torch.compile": peer(theirs | {"compile": True}),
            }
            amount = n * arguments.batch_size * size["context_length"]
            title = f"training, 83M, {dtype}, {name}, tokens/s"
            rows.append(Row(f"{dtype}-{name.lower()}", title, contestants, amount))
    n_turns = 1 if arguments.small else arguments.turns
    results = measure_all(rows, n_turns, arguments.peer_python)

    # Operations of a token's forward and backward pass (Chowdhery et al., 2022, PaLM, appendix B).
    width, n_layers = size["d_model"], size["n_layers"]
    flops = 6 * 12 * n_layers * width**2 + 12 * n_layers * width * size["context_length"]
    shares = {}
    for line in results["lines"]:
        peak = peaks[line["row"].split("-")[0]]
        for side in (line["ours"], line["peer"]):
            side["share_of_peak"] = side["figure"] and side["figure"] * flops / peak / 1e12
            if side["figure"]:
                shares[f"{line['row']}, {side['name']}: {side['share_of_peak']:.1%}"] = True
    show(results, arguments.json)
    if not arguments.json:
        print("Share of the chip's peak:", *shares, sep="\n")


if __name__ == "__main__":
    main()
