"""Hugging Face's format of GPT-2: converts configs and tensors to ours and back.

A block's query, key and value are one tensor there, and the weight of a linear layer is (in, out).
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from backend.errors import UserError
from tokenizers import BytePairTokenizer, Tokenizer

SIZES = {
    "context_length": "n_positions",
    "vocab_size": "vocab_size",
    "n_layers": "n_layer",
    "n_heads": "n_head",
    "d_model": "n_embd",
}
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate")
EXACT_GELU = ("gelu", "gelu_python")
# Options with the values that the model supports, the default first.
SUPPORTED = {
    "activation_function": (*TANH_GELU, *EXACT_GELU),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
    "quantization_config": (None,),
}
EMBEDDINGS = ("wte.weight", "transformer.wte.weight")  # of GPT2Model, of GPT2LMHeadModel
DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
LINEARS = {
    "attn.c_attn": ("multi_head.query", "multi_head.key", "multi_head.value"),
    "attn.c_proj": ("multi_head.out",),
    "mlp.c_fc": ("pwff.linear_1",),
    "mlp.c_proj": ("pwff.linear_2",),
}
# In older files: causal masks, and a head that transformers replaces by the token embedding.
IGNORED = (".attn.bias", ".attn.masked_bias", "lm_head.decoder.weight")


def config_to_ours(config: dict) -> dict:
    """Our config from Hugging Face's, with the settings of a training from the section `gpt_tiny`.

    UserError for other models than GPT-2 and for options that are not SUPPORTED.
    """
    if config.get("model_type") != "gpt2":
        raise UserError(f"model_type is {config.get('model_type')!r:.60}: only 'gpt2' is known")
    for name, values in SUPPORTED.items():
        if (value := config.get(name, values[0])) not in values:
            raise UserError(f"{name} {value!r:.60} is not supported, only {values[0]!r}")
    if missing := set(SIZES.values()) - config.keys():
        raise UserError(f"it lacks the setting {min(missing)}")
    training = config.get("gpt_tiny", {})
    if type(training) is not dict:
        raise UserError("gpt_tiny is not a section of settings")
    model = {ours: config[theirs] for ours, theirs in SIZES.items()}
    d_hidden = config.get("n_inner")
    if d_hidden is None and type(model["d_model"]) is int:
        d_hidden = 4 * model["d_model"]
    model |= {"d_hidden": d_hidden, "dropout": config.get("resid_pdrop", 0.1), "gpt2": True}
    model["exact_gelu"] = config.get("activation_function") in EXACT_GELU
    return {**training, "model": model, "tokenizer": BytePairTokenizer.name}


def config_to_theirs(config: dict, tokenizer: Tokenizer | None) -> dict:
    """Hugging Face's config from ours, with the ids of the tokenizer's special tokens."""
    model, specials = config["model"], tokenizer or Tokenizer  # the class has none
    ends, pads = specials.ends, specials.padding
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        **{theirs: model[ours] for ours, theirs in SIZES.items()},
        "n_inner": model["d_hidden"],
        **dict.fromkeys(DROPOUTS, model["dropout"]),
        **{name: values[0] for name, values in SUPPORTED.items() if values[0] is not None},
        "activation_function": (EXACT_GELU if model.get("exact_gelu") else TANH_GELU)[0],
        "bos_token_id": specials.end,
        "eos_token_id": ends[0] if len(ends) == 1 else [*ends] or None,
        "pad_token_id": pads[0] if pads else None,
        "gpt_tiny": {k: v for k, v in config.items() if k not in ("model", "tokenizer")},
    }


def parameters_of(n_layers: int) -> dict[str, list[str]]:
    """Hugging Face's name of each tensor -> our names of its one or three parameters."""
    table = {
        "wte.weight": ["token_embedding.weight"],
        "wpe.weight": ["positional_embedding.weight"],
        "ln_f.weight": ["norm.gamma"],
        "ln_f.bias": ["norm.beta"],
    }
    for layer in range(n_layers):
        theirs, ours = f"h.{layer}", f"blocks.{layer}"
        for norm in ("1", "2"):
            table[f"{theirs}.ln_{norm}.weight"] = [f"{ours}.norm_{norm}.gamma"]
            table[f"{theirs}.ln_{norm}.bias"] = [f"{ours}.norm_{norm}.beta"]
        for part in ("weight", "bias"):
            for linear, parameters in LINEARS.items():
                table[f"{theirs}.{linear}.{part}"] = [f"{ours}.{p}.{part}" for p in parameters]
    return table


def weights_to_ours(
    tensors: Mapping[str, np.ndarray], n_layers: int, path: Path
) -> dict[str, Callable[[], np.ndarray]]:
    """Functions that read the parameters, by our names, from the tensors of the file `path`.

    UserError for tensors that no GPT-2 has, and for a head that is not the token embedding.
    """
    table, readers = parameters_of(n_layers), {}
    for name in tensors:
        short = name.removeprefix("transformer.")
        if short == "lm_head.weight":
            embedding = next(filter(tensors.__contains__, EMBEDDINGS))
            if not np.array_equal(tensors[name], tensors[embedding]):
                raise UserError(f"{path}: its head lm_head.weight is not the token embedding")
        elif short in table:
            for part, our_name in enumerate(table[short]):
                readers[our_name] = partial(read_part, tensors, name, part, len(table[short]))
        elif not short.endswith(IGNORED):
            raise UserError(f"{path}: a GPT-2 of {n_layers} layers has no tensor {name!r:.80}")
    return readers


def read_part(tensors: Mapping[str, np.ndarray], name: str, part: int, n_parts: int) -> np.ndarray:
    array = tensors[name]
    return np.array_split(array.T if ".h." in f".{name}" else array, n_parts)[part]


def weights_to_theirs(weights: Mapping[str, np.ndarray], n_layers: int) -> dict[str, np.ndarray]:
    """Hugging Face's tensors from our parameters."""
    tensors = {}
    for name, ours in parameters_of(n_layers).items():
        array = np.concatenate([weights[our_name] for our_name in ours])
        tensors[f"transformer.{name}"] = array.T if name.startswith("h.") else array
    return tensors
