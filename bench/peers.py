"""The worker for PyTorch and Hugging Face; bench.py starts it.

The project's folder is never on its path: tokenizers.py there would hide Hugging Face's package.
"""

import math
from importlib.metadata import version

import torch
import torch.nn.functional as F
from torch import nn
from worker import peak_memory, serve


class Block(nn.Module):
    def __init__(self, d_model, d_hidden, n_heads, dropout):
        super().__init__()
        self.n_heads, self.rate = n_heads, dropout
        self.norm_1, self.norm_2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.linear_1, self.linear_2 = nn.Linear(d_model, d_hidden), nn.Linear(d_hidden, d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        batch, time, d_model = x.shape
        qkv = self.qkv(self.norm_1(x)).view(batch, time, 3, self.n_heads, d_model // self.n_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, time, d_k)
        rate = self.rate if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=rate, is_causal=True)
        mixed = mixed.transpose(1, 2).reshape(batch, time, d_model)
        x = x + self.out(self.dropout(mixed))
        return x + self.dropout(self.linear_2(F.gelu(self.linear_1(self.norm_2(x)))))


class GPT(nn.Module):
    """gpt-tiny's model in idiomatic PyTorch."""

    def __init__(self, context_length, vocab_size, n_layers, n_heads, d_model, d_hidden, dropout):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, d_model)
        self.positional_embedding = nn.Embedding(context_length, d_model)
        self.dropout = nn.Dropout(dropout)
        blocks = [Block(d_model, d_hidden, n_heads, dropout) for _ in range(n_layers)]
        self.blocks, self.norm = nn.Sequential(*blocks), nn.LayerNorm(d_model)
        self.linear = nn.Linear(d_model, vocab_size)
        for name, parameter in self.named_parameters():
            if "norm" not in name:
                ends_branch = ".out." in name or ".linear_2." in name
                nn.init.normal_(parameter, 0, 0.02 / math.sqrt(2 * n_layers if ends_branch else 1))

    def forward(self, ids):
        x = self.token_embedding(ids) + self.positional_embedding.weight[: ids.shape[1]]
        return self.linear(self.norm(self.blocks(self.dropout(x))))

    def loss(self, ids, targets):
        return F.cross_entropy(self(ids).flatten(0, 1), targets.flatten())


def train(config, n, batch_size, compile=False, device="cpu", dtype="float32"):
    model = GPT(**config).to(device)
    loss_of = torch.compile(model.loss) if compile else model.loss
    options = {"lr": 0.003, "eps": 1e-5, "weight_decay": 1e-4, "fused": True}
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    ids = torch.randint(config["vocab_size"], (500_000,), device=device)
    positions = torch.arange(config["context_length"], device=device)

    def work():
        for _ in range(n):
            at = torch.randint(490_000, (batch_size, 1), device=device) + positions
            with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = loss_of(ids[at], ids[at + 1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        loss.item()  # waits for the device

    return work


def forward(config, n):
    model = GPT(**config).eval()
    ids = torch.zeros((1, config["context_length"]), dtype=torch.long)

    def work():
        with torch.inference_mode():
            for _ in range(n):
                model(ids)[0, -1].argmax().item()

    return work


def hugging_face(config):
    """Hugging Face's GPT-2 of these sizes."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {
        "vocab_size": config["vocab_size"],
        "n_positions": config["context_length"],
        "n_embd": config["d_model"],
        "n_layer": config["n_layers"],
        "n_head": config["n_heads"],
    }
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config["dropout"])
    return GPT2LMHeadModel(GPT2Config(**sizes, **rates, bos_token_id=None, eos_token_id=None))


def generate(config, n, n_prompt):
    """Greedy tokens, with Hugging Face's cache."""
    model = hugging_face(config).eval()
    ids = torch.zeros((1, n_prompt), dtype=torch.long)
    options = {"max_new_tokens": n, "do_sample": False, "use_cache": True, "pad_token_id": 0}

    def work():
        text = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert text.shape == (1, n_prompt + n)

    return work


def finetune(config, n, batch_size):
    model = hugging_face(config).train()
    options = {"lr": 3e-5, "eps": 1e-5, "weight_decay": 1e-4, "fused": True}
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    shape = (batch_size, config["context_length"])

    def work():
        for _ in range(n):
            ids = torch.randint(config["vocab_size"], shape)
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()

    return work


def prepare(work, config, **job):
    torch.manual_seed(0)
    versions = {"torch": version("torch")}
    if work in ("generate", "finetune"):
        versions["transformers"] = version("transformers")
    works = {"train": train, "forward": forward, "generate": generate, "finetune": finetune}
    work = works[work](config, **job)
    work()
    return work, versions


def memory():
    """Bytes of the process on a CPU, of the device elsewhere."""
    on_device = torch.cuda.is_initialized() and torch.cuda.max_memory_allocated()
    return on_device or peak_memory()


if __name__ == "__main__":
    serve(prepare, memory)
