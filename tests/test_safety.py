"""Interrupted, killed, on a full disk, with numbers that are not finite: nothing is lost, nothing is half-written."""
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train_gpt2
from conftest import ROOT, TINY_RUN, exit_code, load_checkpoint
from train_gpt2 import GPT


@pytest.fixture
def start(tmp_path, text):
    """start(flag, ...) -> Popen of a small run that goes on until it is stopped."""
    running = []

    def start(*flags):
        command = [sys.executable, ROOT / "train_gpt2.py", *TINY_RUN, "--data", text, "--max_steps=100000",
                   "--eval_every=0", "--log_every=1", "--save_every=1", *flags]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        running.append(subprocess.Popen(command, cwd=tmp_path, **pipes))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate()


def wait_for_steps(path, n):
    for _ in range(600):
        if path.exists() and len(path.read_text().splitlines()) >= n:
            return
        time.sleep(0.05)
    pytest.fail("the run did not get anywhere")


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(start, cli, tmp_path, number, code):
    process = start("--save_every=100000")
    wait_for_steps(tmp_path / "log" / "log.txt", 3)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code and "Traceback" not in err
    step = load_checkpoint(tmp_path / "log" / "ckpt.pt")["step"]
    assert f"stopped at step {step}; continue with --init_from resume --out_dir log" in out
    assert GPT.from_pretrained(tmp_path / "log" / "model").config.n_layer == 2 and f"model is step {step}'s" in out
    lines = (tmp_path / "log" / "log.txt").read_text().splitlines()
    assert [int(line.split()[0]) for line in lines] == list(range(1, step + 1))
    more = cli("--init_from=resume", f"--max_steps={step + 2}")
    assert more.returncode == 0, more.stderr
    assert load_checkpoint(tmp_path / "log" / "ckpt.pt")["step"] == step + 2


def test_a_signal_in_the_last_evaluation_saves_and_draws_no_samples(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    evaluate, n = train_gpt2.evaluate, []

    def interrupted(*args):
        n.append(1)
        if len(n) == 3:  # after step 4, the last
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(*args)

    monkeypatch.setattr(train_gpt2, "evaluate", interrupted)
    assert exit_code(*TINY_RUN, "--data", text) == 130
    out = capsys.readouterr().out
    assert "4/4 | val loss" in out and "\nstopped at step 4\n" in out and "--- sample 1 of 2" not in out
    assert load_checkpoint("log/ckpt.pt")["step"] == 4


def test_a_stopped_run_that_saves_nothing_says_so(start, tmp_path):
    process = start("--save_every=0")
    wait_for_steps(tmp_path / "log" / "log.txt", 3)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and re.search(r"stopped at step \d+\n", out)
    assert not (tmp_path / "log" / "ckpt.pt").exists()


def test_a_second_signal_stops_at_once(start, tmp_path):
    process = start("--batch_size=64", "--total_batch_size=10240000")  # a step takes minutes
    while not process.stdout.readline().startswith("reading"):
        pass
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in err


def test_killed_at_random_moments(start, cli, tmp_path):
    log, rng, steps = tmp_path / "log" / "log.txt", random.Random(0), []
    for n in range(6):
        process = start(*(["--init_from=resume"] if n else []))
        seen = log.read_text().splitlines() if n else []
        wait_for_steps(log, len(seen) + 2 if n else 3)
        time.sleep(rng.random() * 0.2)
        process.kill()
        process.communicate()
        steps.append(load_checkpoint(tmp_path / "log" / "ckpt.pt")["step"])  # whole, whenever the kill came
    assert steps == sorted(steps) and steps[-1] > steps[0]
    assert cli("--init_from=resume", f"--max_steps={steps[-1] + 1}", "--num_samples=0").returncode == 0
    recorded = [int(line.split()[0]) for line in log.read_text().splitlines() if " train " in line]
    assert recorded == list(range(1, steps[-1] + 2))  # none missing, none twice


def test_a_full_disk_leaves_the_old_checkpoint_and_the_run_going(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save = torch.save

    def full_after_step_2(state, path):
        if state["step"] > 2:
            path.write_bytes(b"half")
            raise RuntimeError("PytorchStreamWriter failed writing file: No space left on device")
        save(state, path)

    monkeypatch.setattr(torch, "save", full_after_step_2)
    assert exit_code(*TINY_RUN, "--data", text, "--save_every=1") == 1
    out, err = capsys.readouterr()
    assert out.count("ckpt.pt could not be saved in log: ") == 2 and " 4/4 | val loss" in out
    assert "step 4: ckpt.pt could not be saved in log: " in err and "No space left" in err
    assert load_checkpoint(Path("log/ckpt.pt"))["step"] == 2
    assert GPT.from_pretrained("log/model").config.n_layer == 2  # what was trained is not lost
    assert not list(Path("log").glob("*.tmp"))


def test_a_log_that_cannot_be_written_does_not_end_the_run(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    step = train_gpt2.optimizer_step

    def in_the_way(*args):
        n.append(1)
        if len(n) == 2:
            Path("log/log.txt").unlink()
            Path("log/log.txt").mkdir()
        if len(n) == 4:
            Path("log/log.txt").rmdir()
            Path("log/log.txt").write_text("1 train 10.8")  # a line that a full disk cut off
        return step(*args)

    n = []
    monkeypatch.setattr(train_gpt2, "optimizer_step", in_the_way)
    assert exit_code(*TINY_RUN, "--data", text, "--eval_every=0", "--num_samples=0") == 0
    lines = Path("log/log.txt").read_text().splitlines()  # none missing, none merged
    assert [line.rsplit(" ", 1)[0] for line in lines] == ["1 train", "2 train", "3 train", "4 train"]
    assert [f"{step} {stream} {value:.6f}" for (step, stream), (value, _) in load_checkpoint("log/ckpt.pt")["log"].items()] == lines


def test_a_picture_that_cannot_be_written_costs_no_checkpoint(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("log/loss.png").mkdir(parents=True)
    assert exit_code(*TINY_RUN, "--data", text) == 1
    assert "step 4: loss.png could not be saved in log: " in capsys.readouterr().err
    assert load_checkpoint("log/ckpt.pt")["step"] == 4 and Path("log/model").exists() and Path("log/loss.png").is_dir()


@pytest.mark.skipif(sys.platform == "win32", reason="ulimit is the shell's of Unix")
def test_a_file_size_limit(text, tmp_path):
    """A real error of the operating system, in the midst of writing the checkpoint."""
    flags = " ".join(map(str, [*TINY_RUN, "--data", text]))
    command = f"trap '' XFSZ; ulimit -f 2000; {sys.executable} {ROOT / 'train_gpt2.py'} {flags}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "warning: step 4: ckpt.pt could not be saved in log: " in done.stdout and " 4/4 | val loss" in done.stdout
    assert sorted(p.name for p in (tmp_path / "log").iterdir()) == ["log.txt", "loss.png"]


def test_out_dir_that_cannot_be_written_is_found_before_training(cli, text, tmp_path):
    (tmp_path / "file").write_text("")
    for out_dir in ("file", "file/log", "/proc/log"):
        done = cli(*TINY_RUN, "--data", text, "--out_dir", out_dir, "--compile")
        assert done.returncode == 1 and out_dir in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert "loss" not in done.stdout and "compiling" not in done.stdout


@pytest.mark.parametrize("poison", ["loss", "gradient", "weights", "weights and Ctrl-C"])
def test_numbers_that_are_not_finite_are_never_saved(text, tmp_path, monkeypatch, capsys, poison):
    monkeypatch.chdir(tmp_path)
    step, n = train_gpt2.optimizer_step, []

    def poisoned(model, *args):
        n.append(1)
        if len(n) == 3 and poison == "loss":
            model.transformer.ln_f.register_forward_hook(lambda module, x, y: y * float("nan"))
        if len(n) == 3 and poison == "gradient":
            model.transformer.ln_f.bias.register_hook(lambda grad: grad / 0)
        result = step(model, *args)
        if len(n) == 3 and "weights" in poison:
            with torch.no_grad():
                model.transformer.ln_f.bias.fill_(float("nan"))
            if "Ctrl-C" in poison:
                os.kill(os.getpid(), signal.SIGINT)
        return result

    monkeypatch.setattr(train_gpt2, "optimizer_step", poisoned)
    assert exit_code(*TINY_RUN, "--data", text, "--save_every=2", "--max_steps=5", "--eval_every=0") == 1
    err = capsys.readouterr().err
    assert ("the weights are not finite" if poison == "weights and Ctrl-C" else "the loss or the gradient's norm is not finite") in err and "--max_lr" in err
    assert load_checkpoint(Path("log/ckpt.pt"))["step"] == 2 and not Path("log/model").exists()
    assert ("3 train" in Path("log/log.txt").read_text()) == (poison == "weights")


def test_other_data_under_a_checkpoint_is_refused(cli, text, tmp_path):
    assert cli(*TINY_RUN, "--data", text, "--num_samples=0").returncode == 0
    text.write_text(text.read_text()[:30_000])
    before = (tmp_path / "log" / "ckpt.pt").read_bytes()
    done = cli("--init_from=resume", "--max_steps=6")
    assert done.returncode == 1 and re.search(r"has \d+ windows, not the \d+ that the run began with", done.stderr)
    assert (tmp_path / "log" / "ckpt.pt").read_bytes() == before


def test_what_could_not_be_saved_is_forgotten_once_it_can(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    plot, n = train_gpt2.plot_losses, []

    def fails_once(*args):
        n.append(1)
        if len(n) == 1:
            raise OSError("No space left on device")
        plot(*args)

    monkeypatch.setattr(train_gpt2, "plot_losses", fails_once)
    assert exit_code(*TINY_RUN, "--data", text, "--save_every=0") == 0
    out = capsys.readouterr().out
    assert out.count("loss.png could not be saved") == 1 and "--- sample 2 of 2" in out and len(n) > 1


@pytest.mark.parametrize("dies", ["in the first update", "in the second update", "in the first evaluation"])
def test_an_old_run_stays_until_the_new_one_has_made_an_update(text, tmp_path, monkeypatch, dies):
    monkeypatch.chdir(tmp_path)
    assert exit_code(*TINY_RUN, "--data", text, "--num_samples=0") == 0
    old = {str(p): p.read_bytes() for p in Path("log").rglob("*") if p.is_file()}
    step, n = train_gpt2.optimizer_step, []

    def dying(*args):
        n.append(1)
        if len(n) == (1 if dies == "in the first update" else 2):
            raise KeyboardInterrupt
        return step(*args)

    def dying_too(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_gpt2, "optimizer_step", dying)
    if "evaluation" in dies:
        monkeypatch.setattr(train_gpt2, "evaluate", dying_too)
    flags = ["--overwrite", "--seed=2", "--save_every=100", "--eval_every=100", "--num_samples=0"]
    assert exit_code(*TINY_RUN, "--data", text, *flags) == 130
    new = {str(p): p.read_bytes() for p in Path("log").rglob("*") if p.is_file() and p.name != ".lock"}
    if dies == "in the second update":  # or the folder would resume the old run
        assert set(new) == {"log/log.txt"} and new["log/log.txt"].startswith(b"0 val")
    else:
        assert new == old


def test_two_runs_in_one_folder(start, cli, text, tmp_path):
    first = start("--save_every=0")
    wait_for_steps(tmp_path / "log" / "log.txt", 2)
    for flags in ["--overwrite"], ["--overwrite", "--seed=2"]:
        done = cli(*TINY_RUN, "--data", text, *flags)
        assert done.returncode == 1 and "another run is at work in log" in done.stderr and "loss" not in done.stdout
    first.kill()
    first.communicate()
    assert cli(*TINY_RUN, "--data", text, "--overwrite", "--max_steps=1").returncode == 0  # the lock died with it


def test_a_run_holds_its_folder_while_it_reads_the_data(start, cli, text, tmp_path):
    """Or a second one could come and go in the meantime, and lose its files to the first."""
    os.mkfifo(tmp_path / "slow.txt")
    first = start("--data=slow.txt", "--max_steps=2", "--num_samples=0")
    while not (tmp_path / "log" / ".lock").exists():
        time.sleep(0.05)
    time.sleep(0.5)
    done = cli(*TINY_RUN, "--data", text)
    assert done.returncode == 1 and "another run is at work in log" in done.stderr
    first.kill()


def test_two_runs_started_at_once(start, tmp_path):
    runs = [start("--max_steps=30", f"--seed={seed}", "--num_samples=0") for seed in (1, 2)]
    outs = [process.communicate(timeout=60) for process in runs]
    assert sorted(process.returncode for process in runs) == [0, 1], outs
    assert sum("another run is at work in log" in err or "exists: " in err for _, err in outs) == 1
    seed = 1 if runs[0].returncode == 0 else 2
    assert load_checkpoint(tmp_path / "log" / "ckpt.pt")["train_config"]["seed"] == seed
