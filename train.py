"""Trains a GPT on a text: python train.py -t my.txt."""

import io
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import command_line
from command_line import bold, number

BATCHES_PER_STEP = 100
VALIDATION_SIZE = 128  # windows
MAX_MEGA_BYTES = 999
CORPUS = Path(".data/corpus.txt")


def parse_arguments():
    parser = command_line.ArgumentParser("Train a GPT on a text.")
    size = number(int, 1, 2**31)
    add = parser.add_argument
    add("-o", "--output-path", type=Path, help="folder for the model (default: one in .data)")
    add("-c", "--context-length", type=size, default=64, help="tokens that the model sees")
    add("-d", "--d-model", type=size, default=64, help="width of the model")
    add("-l", "--n-layers", type=size, default=2, help="number of blocks")
    add("-h", "--n-heads", type=size, default=2, help="attention heads in a block")
    add("-n", "--n-steps", type=size, default=50, help=f"steps of {BATCHES_PER_STEP} batches")
    add("-b", "--batch-size", type=size, default=32, help="windows in a batch")
    add("-r", "--learning-rate", type=number(float, 0), default=0.003, help="of AdamW")
    add("-s", "--seed", type=number(int, 0, 2**64), default=0, help="of the random numbers")
    add("-t", "--text-corpus", type=Path, default=CORPUS, help="text to train on, UTF-8")
    add("-m", "--n-mega-bytes", type=size, help="use only the first N MiB of the text")
    add("-x", "--no-save", action="store_true", help="keep neither checkpoints nor the model")
    add("--tokenizer", choices=["char", "vowel"], default="char", help="what a token is")
    add("--vocab-size", type=size, default=2000, help="of the vowel tokenizer")
    add("--dropout", type=number(float, 0, 1), default=0.2, help="share of values dropped")
    arguments = parser.parse_args()
    if arguments.d_model % arguments.n_heads:
        parser.error(
            f"--d-model {arguments.d_model} is not divisible by --n-heads {arguments.n_heads}"
        )
    return arguments


def read_corpus(arguments):
    """The ids of the corpus, in the smallest dtype that holds them, and their tokenizer."""
    import tokenizers

    path = arguments.text_corpus
    size = min(arguments.n_mega_bytes or MAX_MEGA_BYTES, MAX_MEGA_BYTES) << 20
    if path == CORPUS and not path.exists():
        from pydoc_data.topics import topics

        print(f"{path} is missing: training on the text of Python's own help", file=sys.stderr)
        text = "\n\n".join(topics[name] for name in sorted(topics))
        file = io.BytesIO(text.encode())
    else:
        file = path.open("rb")
    with file:
        if arguments.tokenizer == "vowel":
            tokenizer = tokenizers.SimpleVowelTokenizer.train(file, size, arguments.vocab_size)
            file.seek(0)
        else:
            tokenizer = tokenizers.CharTokenizer()
        return tokenizer.encode_file(file, size), tokenizer


def check_corpus(ids, arguments) -> None:
    n_validation = len(ids) - len(ids) * 9 // 10
    if n_validation <= arguments.context_length:
        raise ValueError(
            f"{arguments.text_corpus} is too short: a tenth of it, {n_validation} tokens, is for "
            f"validation and must exceed --context-length {arguments.context_length}"
        )


def check_memory(config, batch_size: int) -> None:
    """ValueError where the training can't fit: better now than from the system's OOM killer."""
    activations = 16 * config.d_model + 3 * config.d_hidden
    activations += 4 * config.n_heads * config.context_length
    n_tokens = batch_size * config.context_length
    # float32: a parameter, its gradient and two moments
    n_bytes = 16 * config.n_parameters
    n_bytes += 4 * n_tokens * (config.n_layers * activations + 4 * config.vocab_size)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if n_bytes > memory:
        raise ValueError(
            f"a model of {config.n_parameters:,} parameters trained on {n_tokens:,} tokens at a "
            f"time takes about {n_bytes / 2**30:,.0f} GiB, and there are {memory / 2**30:,.0f}: "
            "choose a smaller --d-model, --n-layers, --context-length or --batch-size"
        )


def main() -> None:
    arguments = parse_arguments()
    # tinygrad and what needs it only now: --help and a wrong flag answer at once
    import numpy as np
    from tinygrad import Context, Tensor, Variable
    from tqdm import tqdm

    import checkpoint
    from gpt_tiny import GPT, AdamW, Dropout, Generator, GPTConfig, captured, initial_weights, sample

    if arguments.output_path and not arguments.no_save:
        checkpoint.check_destination(arguments.output_path)
    command_line.open_backend()
    ids, tokenizer = read_corpus(arguments)
    check_corpus(ids, arguments)
    model_config = GPTConfig(
        context_length=arguments.context_length,
        vocab_size=tokenizer.vocab_size,
        n_layers=arguments.n_layers,
        n_heads=arguments.n_heads,
        d_model=arguments.d_model,
        d_hidden=4 * arguments.d_model,
        dropout=arguments.dropout,
    )
    check_memory(model_config, arguments.batch_size)
    optimizer_config = {"beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-5, "weight_decay": 1e-4}
    config = {
        "n_steps": arguments.n_steps,
        "batch_size": arguments.batch_size,
        "learning_rate": arguments.learning_rate,
        "batches_per_step": BATCHES_PER_STEP,
        "validation_size": VALIDATION_SIZE,
        "seed": arguments.seed,
        "model": asdict(model_config),
        "optimizer": {"grad_clipping": None, **optimizer_config},
        "tokenizer": tokenizer.name,
    }
    print(bold("start training"), "- parameters:", model_config.n_parameters)
    print(json.dumps(config, indent=2), flush=True)

    model = GPT(model_config, initial_weights(model_config, arguments.seed))
    parameters = model.parameters()
    optimizer = AdamW(list(parameters.values()), **optimizer_config)
    split = len(ids) * 9 // 10
    training_ids, validation_ids = (Tensor(part).realize() for part in (ids[:split], ids[split:]))
    losses = Tensor.zeros(BATCHES_PER_STEP).contiguous().realize()

    def windows(ids: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        positions = starts.unsqueeze(-1) + Tensor.arange(arguments.context_length + 1)
        with Context(SPLIT_REDUCEOP=0):  # else tinygrad looks each one up by a sum over all
            cut = ids[positions].realize()
        return cut[:, :-1], cut[:, 1:]

    @captured
    def train_batch(starts: Tensor, keys: Tensor, rates: Tensor, batch: Variable) -> Tensor:
        """One batch: row `batch` of each plan. Leaves its loss in `losses`."""
        inputs, targets = windows(training_ids, starts[batch])
        loss = model.loss(inputs, targets, Dropout(model_config.dropout, keys[batch].contiguous()))
        gradients = loss.gradient(*optimizer.parameters)
        optimizer.step(gradients, rates[batch].contiguous())
        losses[batch].assign(loss).realize()
        return losses

    @captured
    def validation_loss(starts: Tensor) -> Tensor:
        return model.loss(*windows(validation_ids, starts)).realize()

    def save(folder: Path) -> None:
        weights = {name: parameter.numpy() for name, parameter in parameters.items()}
        checkpoint.save(folder, config, weights, tokenizer)

    validation_batch = max(n for n in range(1, VALIDATION_SIZE + 1) if VALIDATION_SIZE % n == 0 and n <= arguments.batch_size)
    n_windows = [part.shape[0] - arguments.context_length for part in (training_ids, validation_ids)]
    started = time.time()
    for step in range(arguments.n_steps):
        # All random numbers of a step come from the seed and its number: there is no other state.
        rng = np.random.default_rng([arguments.seed, step])
        starts = rng.integers(n_windows[1], size=(VALIDATION_SIZE // validation_batch, validation_batch))
        validation_losses = [validation_loss(Tensor(row.astype(np.int32)).realize()).item() for row in starts]
        first = step * BATCHES_PER_STEP + 1
        numbers = range(first, first + BATCHES_PER_STEP)
        plan = [
            rng.integers(n_windows[0], size=(BATCHES_PER_STEP, arguments.batch_size), dtype=np.int32),
            rng.integers(2**32, size=(BATCHES_PER_STEP, 1), dtype=np.uint32),
            np.array([optimizer.rates(arguments.learning_rate, n) for n in numbers], np.float32),
        ]
        plan = [Tensor(array).realize() for array in plan]
        for batch in tqdm(range(BATCHES_PER_STEP), disable=not sys.stderr.isatty(), leave=False):
            train_batch(*plan, Variable("batch", 0, BATCHES_PER_STEP - 1).bind(batch))
        elapsed = time.time() - started
        total = elapsed / (step + 1) * arguments.n_steps
        print(
            f"step {step + 1:>3}/{arguments.n_steps}: train loss: {losses.numpy().mean():.4f}, "
            f"val loss: {np.mean(validation_losses):.4f} ({clock(elapsed)}/{clock(total)})",
            flush=True,
        )
        if (step + 6) % 10 == 0 and not arguments.no_save:
            folder = Path(f".data/checkpoints/{int(time.time())}_{step}")
            print(bold(f"store checkpoint model to: {folder}"), flush=True)
            save(folder)

    if not arguments.no_save:
        name = f"gpt_{model_config.n_parameters >> 10}k_{arguments.context_length}context_{int(time.time())}"
        folder = arguments.output_path or Path(".data") / name
        print(bold(f"store trained model to: {folder}"), flush=True)
        save(folder)


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60:02}:{minutes % 60:02}:{seconds:02}"


if __name__ == "__main__":
    command_line.run(main)
