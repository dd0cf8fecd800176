"""Two processes through torchrun against one, on the CPU."""
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from conftest import NANO, ROOT, load_checkpoint
from test_hellaswag import made_examples, write


@pytest.fixture
def torchrun(tmp_path):
    """torchrun(n, flag, ...) runs train_gpt2.py in n processes -> CompletedProcess with stdout and stderr as text."""

    def run(n, *flags):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
        return subprocess.run([*command, ROOT / "train_gpt2.py", *map(str, flags)], cwd=tmp_path, capture_output=True,
                              text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"})

    return run


def records(path):
    return [(int(step), stream, float(value)) for step, stream, value in map(str.split, path.read_text().splitlines())]


def assert_same_records(path, expected):
    assert [r[:2] for r in records(path)] == [r[:2] for r in expected]
    np.testing.assert_allclose([r[2] for r in records(path)], [r[2] for r in expected], atol=1e-5, rtol=0)


def test_two_processes_train_like_one(torchrun, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "shards").mkdir()
    for name, n in ("train_1", 1500), ("train_2", 700), ("train_3", 900), ("val_0", 400):  # ends within batches
        np.save(tmp_path / "shards" / f"{name}.npy", rng.integers(0, 500, size=n).astype(np.uint16))
    hellaswag = write(tmp_path / "h.jsonl", made_examples(10))
    flags = [f"--{name}={value}" for name, value in NANO.items()] + [
        "--data=shards", "--sequence_length=32", "--total_batch_size=512", "--max_steps=8", "--eval_every=4",
        "--log_every=1", "--num_samples=0", "--max_new_tokens=4", "--no-compile", "--device=cpu", "--dtype=float32",
        "--optimizer=muon", "--save_every=4", "--max_lr=1e-3", "--min_lr=1e-4", "--eval_batches=2",
        f"--hellaswag={hellaswag}"]
    one = torchrun(1, *flags, "--batch_size=4", "--out_dir=one")  # 4 micro-steps, and the same batches to evaluate
    two = torchrun(2, *flags, "--batch_size=4", "--out_dir=two")  # 2 micro-steps, into the second epoch
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    expected = records(tmp_path / "one" / "log.txt")
    assert len(expected) == 14
    assert_same_records(tmp_path / "two" / "log.txt", expected)
    assert two.stdout.count("8/8 | val loss") == 1  # one process prints

    # and goes on at another number of processes
    checkpoint = load_checkpoint(tmp_path / "two" / "ckpt.pt")
    assert checkpoint["position"] == 8 * 16
    more = torchrun(1, "--init_from=resume", "--out_dir=two", "--max_steps=10", "--batch_size=8")
    assert more.returncode == 0, more.stderr
    assert records(tmp_path / "two" / "log.txt")[-1][0] == 10


def test_a_batch_that_the_processes_cannot_share(torchrun, text):
    done = torchrun(2, "--data", text, "--total_batch_size=1024", "--batch_size=16", "--sequence_length=64")
    assert done.returncode != 0
    assert "--batch_size 16 x --sequence_length 64 x 2 processes" in done.stderr


def test_a_process_that_dies_ends_the_run_and_resuming_makes_it_whole(torchrun, tmp_path, text):
    """The other process ends too, soon; two processes go on to the same bits, one to the same within rounding."""
    code = ("import os, train_gpt2\n"
            "step = train_gpt2.optimizer_step\n"
            "def dies(model, loader, *args):\n"
            "    if train_gpt2.RANK == 1 and loader.position >= 24: os._exit(9)\n"
            "    return step(model, loader, *args)\n"
            "train_gpt2.optimizer_step = dies\n"
            "train_gpt2.main()\n")
    (tmp_path / "dies.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "dies.py"]
    flags = [f"--{name}={value}" for name, value in NANO.items()] + [
        f"--data={text}", "--sequence_length=16", "--batch_size=4", "--total_batch_size=128", "--max_steps=8",
        "--save_every=1", "--eval_every=0", "--num_samples=0", "--no-compile", "--device=cpu", "--dtype=float32",
        "--optimizer=adamw", "--max_lr=1e-3", "--min_lr=1e-4"]
    done = subprocess.run([*command, *flags], cwd=tmp_path, capture_output=True, text=True, timeout=100,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode != 0
    checkpoint = load_checkpoint(tmp_path / "log" / "ckpt.pt")
    assert checkpoint["step"] in (2, 3) and all(torch.isfinite(w).all() for w in checkpoint["model"].values())

    shutil.copytree(tmp_path / "log", tmp_path / "alone")
    assert torchrun(2, *flags, "--out_dir=whole").returncode == 0
    assert torchrun(2, "--init_from=resume").returncode == 0
    assert torchrun(1, "--init_from=resume", "--out_dir=alone").returncode == 0
    whole, two, one = (load_checkpoint(tmp_path / name / "ckpt.pt") for name in ("whole", "log", "alone"))
    assert whole["step"] == two["step"] == one["step"] == 8
    torch.testing.assert_close(two["model"], whole["model"], atol=0, rtol=0)
    torch.testing.assert_close(one["model"], whole["model"], atol=1e-4, rtol=1e-3)
    assert (tmp_path / "log" / "log.txt").read_text() == (tmp_path / "whole" / "log.txt").read_text()
