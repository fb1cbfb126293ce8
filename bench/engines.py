"""The worker for the inference engines llama.cpp and CTranslate2; bench.py starts it.

Both read the same made-up GPT-2 from a file in their own format. Another process writes the file,
so that this process's peak of memory is the engine's.
"""

import ctypes
import logging
import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
from worker import n_cores, serve


def made_up_weights(config: dict) -> dict[str, np.ndarray]:
    """GGUF's name -> array; a matrix is (out, in)."""
    d_model, d_hidden = config["d_model"], config["d_hidden"]
    parts = {
        "attn_norm": (d_model,),
        "attn_qkv": (3 * d_model, d_model),
        "attn_output": (d_model, d_model),
        "ffn_norm": (d_model,),
        "ffn_up": (d_hidden, d_model),
        "ffn_down": (d_model, d_hidden),
    }
    layers = range(config["n_layers"])
    shapes = {f"blk.{layer}.{part}": parts[part] for layer in layers for part in parts}
    shapes["output_norm"] = (d_model,)
    tables = {
        "token_embd.weight": (config["vocab_size"], d_model),
        "position_embd.weight": (config["context_length"], d_model),
    }
    weights = {f"{name}.weight": shape for name, shape in shapes.items()} | tables
    biases = {f"{name}.bias": shape[:1] for name, shape in shapes.items()}
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(shape, np.float32) * np.float32(0.02) + ("norm.weight" in name)
        for name, shape in (weights | biases).items()
    }


def write_llama(folder: str, config: dict, dtype: str) -> None:
    """Writes a GGUF file, with vectors and positions in float32, as llama.cpp's own converter."""
    import gguf

    writer = gguf.GGUFWriter(Path(folder, "model.gguf"), "gpt2")
    writer.add_context_length(config["context_length"])
    writer.add_embedding_length(config["d_model"])
    writer.add_feed_forward_length(config["d_hidden"])
    writer.add_block_count(config["n_layers"])
    writer.add_head_count(config["n_heads"])
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    kinds = gguf.GGMLQuantizationType
    kind = {"float32": kinds.F32, "float16": kinds.F16, "int8": kinds.Q8_0}[dtype]
    for name, values in made_up_weights(config).items():
        is_float32 = values.ndim == 1 or name.startswith("position")
        stored = kinds.F32 if is_float32 else kind
        writer.add_tensor(name, gguf.quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run_llama(folder: str, config: dict, dtype: str, n: int, n_prompt: int) -> Callable:
    import llama_cpp as llama

    logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)
    llama.llama_backend_init()
    options = llama.llama_model_default_params()
    options.n_gpu_layers = 0
    model = llama.llama_model_load_from_file(f"{folder}/model.gguf".encode(), options)
    if not model:
        raise RuntimeError("llama.cpp can't load the model")
    options = llama.llama_context_default_params()
    options.n_ctx = config["context_length"]
    options.n_threads = options.n_threads_batch = n_cores()
    context = llama.llama_init_from_model(model, options)

    def likeliest_after(tokens: list[int]) -> int:
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        if llama.llama_decode(context, llama.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError("llama.cpp can't read the tokens")
        logits = llama.llama_get_logits_ith(context, -1)
        return int(np.ctypeslib.as_array(logits, (config["vocab_size"],)).argmax())

    def work() -> None:
        llama.llama_memory_clear(llama.llama_get_memory(context), False)
        tokens = [0] * n_prompt
        for _ in range(n):
            tokens = [likeliest_after(tokens)]

    return work


def write_ctranslate2(folder: str, config: dict, dtype: str) -> None:
    from ctranslate2 import specs

    weights = made_up_weights(config)
    spec = specs.TransformerDecoderModelSpec.from_config(
        config["n_layers"], config["n_heads"], activation=specs.common_spec.Activation.GELUTanh
    )
    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = decoder.projection.weight = weights["token_embd.weight"]
    decoder.position_encodings.encodings = weights["position_embd.weight"]
    parts = {"output_norm": decoder.layer_norm}
    for number, layer in enumerate(decoder.layer):
        parts |= {
            f"blk.{number}.attn_norm": layer.self_attention.layer_norm,
            f"blk.{number}.attn_qkv": layer.self_attention.linear[0],
            f"blk.{number}.attn_output": layer.self_attention.linear[1],
            f"blk.{number}.ffn_norm": layer.ffn.layer_norm,
            f"blk.{number}.ffn_up": layer.ffn.linear_0,
            f"blk.{number}.ffn_down": layer.ffn.linear_1,
        }
    for name, part in parts.items():
        names = ("gamma", "beta") if hasattr(part, "gamma") else ("weight", "bias")
        setattr(part, names[0], weights[f"{name}.weight"])
        setattr(part, names[1], weights[f"{name}.bias"])
    spec.register_vocabulary([str(number) for number in range(config["vocab_size"])])
    spec.config.unk_token = spec.config.bos_token = spec.config.eos_token = "0"
    spec.validate()
    spec.optimize(dtype)
    spec.save(folder)


def run_ctranslate2(folder: str, config: dict, dtype: str, n: int, n_prompt: int) -> Callable:
    import ctranslate2

    threads = {"inter_threads": 1, "intra_threads": n_cores()}
    generator = ctranslate2.Generator(folder, "cpu", compute_type=dtype, **threads)
    lengths = {"min_length": n, "max_length": n, "include_prompt_in_result": False}

    def work() -> None:
        prompts = [["0"] * n_prompt]
        (text,) = generator.generate_batch(prompts, beam_size=1, sampling_topk=1, **lengths)
        assert len(text.sequences_ids[0]) == n

    return work


def prepare(work: str, engine: str, config: dict, weights: str, **lengths: int):
    write, run, package = {
        "llama": (write_llama, run_llama, "llama-cpp-python"),
        "ctranslate2": (write_ctranslate2, run_ctranslate2, "ctranslate2"),
    }[engine]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        with ProcessPoolExecutor(1, context) as pool:
            pool.submit(write, folder, config, weights).result()
        generate = run(folder, config, weights, **lengths)
    generate()
    return generate, {package: version(package)}


if __name__ == "__main__":
    serve(prepare)
