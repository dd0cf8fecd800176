"""Several processes through torchrun against one, on the CPU."""
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import train_gpt2
from conftest import NANO, ROOT, TINY_RUN, exit_code, load_checkpoint
from test_hellaswag import made_examples, write


@pytest.fixture
def torchrun(tmp_path):
    """torchrun(n, flag, ...) runs train_gpt2.py in n processes -> CompletedProcess with stdout and stderr as text.
    code is run in each of them before main."""

    def run(n, *flags, code=""):
        (tmp_path / "program.py").write_text(f"import train_gpt2\n{code}\ntrain_gpt2.main()\n")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
        return subprocess.run([*command, "program.py", *map(str, flags)], cwd=tmp_path, capture_output=True, text=True,
                              timeout=100, env={**os.environ, "PYTHONPATH": str(ROOT)})

    return run


def records(path):
    return [(int(step), stream, float(value)) for step, stream, value in map(str.split, path.read_text().splitlines())]


def assert_same_records(path, expected):
    assert [r[:2] for r in records(path)] == [r[:2] for r in expected]
    np.testing.assert_allclose([r[2] for r in records(path)], [r[2] for r in expected], atol=1e-5, rtol=0)


def test_two_processes_train_like_one(torchrun, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    (tmp_path / "shards").mkdir()
    for name, n in ("train_1", 1500), ("train_2", 700), ("train_3", 900), ("val_0", 400):  # ends within batches
        np.save(tmp_path / "shards" / f"{name}.npy", rng.integers(0, 500, size=n).astype(np.uint16))
    hellaswag = write(tmp_path / "h.jsonl", made_examples(10))
    flags = [f"--{name}={value}" for name, value in NANO.items()] + [
        "--data=shards", "--sequence_length=32", "--total_batch_size=512", "--max_steps=8", "--eval_every=4",
        "--log_every=1", "--num_samples=0", "--max_new_tokens=4", "--no-compile", "--device=cpu", "--dtype=float32",
        "--optimizer=muon", "--save_every=4", "--max_lr=1e-3", "--min_lr=1e-4", "--eval_batches=1",
        f"--hellaswag={hellaswag}", "--batch_size=7"]  # 7 windows to evaluate; into the second epoch
    assert exit_code(*flags, "--out_dir=one") == 0
    two = torchrun(2, *flags, "--out_dir=two")
    assert two.returncode == 0, two.stderr
    assert "4 micro-steps x 1 processes x B 4 x T 32" in capsys.readouterr().out
    assert "2 micro-steps x 2 processes x B 4 x T 32" in two.stdout
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


@pytest.mark.parametrize("eval_windows", [1, 5, 8, 11, 12, 100])
def test_a_validation_loss_does_not_depend_on_processes_or_batches(eval_windows):
    model = train_gpt2.GPT(train_gpt2.GPTConfig(vocab_size=100, n_layer=1, n_head=1, n_embd=8, block_size=8))
    torch.nn.init.normal_(model.lm_head.weight)
    shard = np.random.default_rng(0).integers(100, size=100).astype(np.uint16)
    x, y = train_gpt2.DataLoaderLite([shard], 1, 8).get(range(min(12, eval_windows)))
    expected = model(x, y)[1].item()
    for n, B in (1, 3), (1, 4), (2, 2), (2, 3), (3, 2), (4, 1), (4, 5):
        loaders = [train_gpt2.DataLoaderLite([shard], B, 8, rank=rank, world_size=n) for rank in range(n)]
        shares = [train_gpt2.evaluate(model, loader, eval_windows, torch.autocast("cpu", enabled=False), torch.device("cpu"))
                  for loader in loaders]  # their sum is what sum_over_ranks makes of them
        assert sum(shares) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("batch_size, n, processes, B", [
    (16, 16, 1, 16), (8, 12, 1, 6), (64, 16, 1, 16), (5, 16, 1, 4), (4, 7, 1, 1), (16, 16, 2, 8), (8, 24, 2, 6), (16, 16, 16, 1)])
def test_a_batch_is_the_largest_divisor_up_to_batch_size(monkeypatch, batch_size, n, processes, B):
    monkeypatch.setattr(train_gpt2, "WORLD_SIZE", processes)
    cfg = train_gpt2.TrainConfig(batch_size=batch_size, total_batch_size=32 * n, sequence_length=32)
    assert train_gpt2.split_batch(cfg) == (B, n // processes // B)


@pytest.mark.parametrize("total", [16, 24, 48])
def test_a_step_that_the_processes_cannot_share_is_refused(monkeypatch, text, capsys, total):
    monkeypatch.setattr(train_gpt2, "WORLD_SIZE", 2)
    assert exit_code(*TINY_RUN, "--data", text, f"--total_batch_size={total}") == 1
    message = f"--total_batch_size {total} is not a multiple of --sequence_length 16 x 2 processes"
    assert message in capsys.readouterr().err


def test_torchrun_needs_no_other_batch_and_shares_the_cores(torchrun, text):
    code = ("import os, torch\n"
            "os.cpu_count = lambda: 6\n"
            "train = train_gpt2.train\n"
            "def spy(*args):\n"
            "    print(f'process {train_gpt2.RANK}: {torch.get_num_threads()} threads', flush=True)\n"
            "    return train(*args)\n"
            "train_gpt2.train = spy")
    done = torchrun(2, "--data", text, "--max_steps=1", "--eval_every=0", "--save_every=0", "--num_samples=0",
                    "--no-compile", "--device=cpu", "--n_layer=1", code=code)
    assert done.returncode == 0, done.stderr
    assert "1 micro-steps x 2 processes x B 8 x T 64" in done.stdout
    assert "process 0: 3 threads" in done.stdout and "process 1: 3 threads" in done.stdout


@pytest.mark.parametrize("cores, here, processes, n_threads", [(16, 2, 2, 8), (16, 4, 8, 4), (5, 2, 2, 2), (1, 2, 2, 1), (8, None, 4, 2)])
def test_processes_share_the_cores_of_their_machine(monkeypatch, cores, here, processes, n_threads):
    made = []
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(train_gpt2, "WORLD_SIZE", processes)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **kwargs: None)
    monkeypatch.setattr(torch, "set_num_threads", made.append)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if here:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    train_gpt2.start_process("cpu")
    assert made == [n_threads]


def test_one_process_keeps_its_threads(monkeypatch):  # OMP_NUM_THREADS is the user's
    monkeypatch.setattr(torch, "set_num_threads", lambda n: pytest.fail("changed the threads"))
    train_gpt2.start_process("cpu")


def test_all_stop_when_another_process_is_asked_to(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def with_another(*values):  # the other process has this one's losses, and a signal
        return values if len(values) == 1 else (values[0], values[1] + 1)

    monkeypatch.setattr(train_gpt2, "sum_over_ranks", with_another)
    assert exit_code(*TINY_RUN, "--data", text) == 143  # SIGTERM's, as no signal reached this one
    out = capsys.readouterr().out
    assert "stopped at step 1; continue with --init_from resume" in out and "2/4 |" not in out
    assert load_checkpoint(tmp_path / "log" / "ckpt.pt")["step"] == 1


def test_a_process_that_dies_ends_the_run_and_resuming_makes_it_whole(torchrun, tmp_path, text, monkeypatch):
    """The other process ends too, soon; two processes go on to the same bits, one to the same within rounding."""
    monkeypatch.chdir(tmp_path)
    code = ("import os\n"
            "step = train_gpt2.optimizer_step\n"
            "def dies(model, loader, *args):\n"
            "    if train_gpt2.RANK == 1 and loader.position >= 24: os._exit(9)\n"
            "    return step(model, loader, *args)\n"
            "train_gpt2.optimizer_step = dies")
    flags = [f"--{name}={value}" for name, value in NANO.items()] + [
        f"--data={text}", "--sequence_length=16", "--batch_size=4", "--total_batch_size=128", "--max_steps=8",
        "--save_every=1", "--eval_every=0", "--num_samples=0", "--no-compile", "--device=cpu", "--dtype=float32",
        "--optimizer=adamw", "--max_lr=1e-3", "--min_lr=1e-4"]
    done = torchrun(2, *flags, code=code)
    assert done.returncode != 0
    checkpoint = load_checkpoint(tmp_path / "log" / "ckpt.pt")
    assert checkpoint["step"] in (2, 3) and all(torch.isfinite(w).all() for w in checkpoint["model"].values())

    shutil.copytree(tmp_path / "log", tmp_path / "alone")
    assert torchrun(2, *flags, "--out_dir=whole").returncode == 0
    assert torchrun(2, "--init_from=resume").returncode == 0
    assert exit_code("--init_from=resume", "--out_dir=alone") == 0
    whole, two, one = (load_checkpoint(tmp_path / name / "ckpt.pt") for name in ("whole", "log", "alone"))
    assert whole["step"] == two["step"] == one["step"] == 8
    torch.testing.assert_close(two["model"], whole["model"], atol=0, rtol=0)
    torch.testing.assert_close(one["model"], whole["model"], atol=1e-4, rtol=1e-3)
    assert (tmp_path / "log" / "log.txt").read_text() == (tmp_path / "whole" / "log.txt").read_text()
