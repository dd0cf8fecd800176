"""What several test files use: the program as a command, small texts, small random GPT-2 models of transformers."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

import train_gpt2  # before torch: it sets GOMP_SPINCOUNT, without which the tests are slow beside other programs
import torch

ROOT = Path(__file__).parent.parent
os.environ["HF_HUB_OFFLINE"] = "1"  # a model id that is not in the cache fails at once instead of asking the network

NANO = dict(n_layer=2, n_head=2, n_embd=32, block_size=32)  # a GPT that trains in milliseconds
TINY_RUN = [f"--{name}={value}" for name, value in NANO.items()] + (
    "--batch_size=4 --sequence_length=16 --total_batch_size=64 --max_steps=4 --eval_every=2 --eval_batches=2 "
    "--save_every=2 --log_every=1 --num_samples=2 --max_new_tokens=8 --no-compile --device=cpu").split()


def exit_code(*flags):
    """Runs main in this process -> its exit code, with its last words on stderr as the interpreter would put them."""
    try:
        train_gpt2.main([str(flag) for flag in flags])
        return 0
    except SystemExit as e:
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
        return 1 if isinstance(e.code, str) else e.code


def load_checkpoint(path):
    """-> the dict in a ckpt.pt, which must be whole and hold no code."""
    return torch.load(path, weights_only=True)


@pytest.fixture
def cli(tmp_path):
    """cli(flag, ...) runs train_gpt2.py in an empty folder -> CompletedProcess with stdout and stderr as text."""

    def run(*flags, env=None, timeout=120):
        return subprocess.run([sys.executable, ROOT / "train_gpt2.py", *map(str, flags)], cwd=tmp_path, text=True,
                              capture_output=True, timeout=timeout, env={**os.environ, **(env or {})})

    return run


@pytest.fixture
def text(tmp_path):
    """Path of a text file with the first 40,000 characters of input.txt."""
    path = tmp_path / "text.txt"
    path.write_text((ROOT / "input.txt").read_text()[:40_000])
    return path


@pytest.fixture
def hf_model():
    """hf_model(setting=value, ...) -> a small random GPT2LMHeadModel whose biases and layer norms are random too."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def make(**settings):
        torch.manual_seed(0)
        settings = dict(vocab_size=101, n_positions=17, n_layer=2, n_head=3, n_embd=24, bos_token_id=None,
                        eos_token_id=None, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0) | settings
        model = GPT2LMHeadModel(GPT2Config(**settings)).eval()
        for p in model.parameters():
            torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.2)
        return model

    return make
