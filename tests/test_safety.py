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
    """start(flag, ..., pipe=...) -> Popen of a small run that goes on until it is stopped."""
    running = []

    def start(*flags, **pipes):
        command = [sys.executable, ROOT / "train_gpt2.py", *TINY_RUN, "--data", text, "--max_steps=100000",
                   "--eval_every=0", "--log_every=1", "--save_every=1", *flags]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE) | pipes
        running.append(subprocess.Popen(command, cwd=tmp_path, text=True, **pipes))
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
def test_a_signal_saves_and_says_how_to_go_on(start, tmp_path, monkeypatch, number, code):
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
    monkeypatch.chdir(tmp_path)
    assert exit_code("--init_from=resume", f"--max_steps={step + 2}") == 0
    assert load_checkpoint(tmp_path / "log" / "ckpt.pt")["step"] == step + 2


SIGNALS = [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129), ("SIGUSR1", 138)]


@pytest.fixture
def signal_in_step_2(monkeypatch):
    """signal_in_step_2(name, handler): the signal comes to this process in the second update; handler is the one it had."""
    before = {}

    def prepare(name, handler):
        number, step, n = getattr(signal, name), train_gpt2.optimizer_step, []
        before[number] = signal.signal(number, handler)

        def interrupted(*args):
            n.append(1)
            if len(n) == 2:
                os.kill(os.getpid(), number)
            return step(*args)

        monkeypatch.setattr(train_gpt2, "optimizer_step", interrupted)

    yield prepare
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name, code", SIGNALS)
def test_each_signal_saves_and_the_next_run_in_the_process_knows_nothing_of_it(text, tmp_path, monkeypatch, capsys, signal_in_step_2, name, code):
    monkeypatch.chdir(tmp_path)
    ignored = []
    signal_in_step_2(name, lambda *args: ignored.append(args))
    handlers = [signal.getsignal(getattr(signal, name)) for name, _ in SIGNALS]
    assert exit_code(*TINY_RUN, "--data", text, "--save_every=100", "--num_samples=0") == code and not ignored
    assert "\nstopped at step 2; continue with --init_from resume --out_dir log\n" in capsys.readouterr().out
    assert load_checkpoint("log/ckpt.pt")["step"] == 2 and GPT.from_pretrained("log/model").config.n_layer == 2
    assert exit_code("--init_from=resume") == 0 and load_checkpoint("log/ckpt.pt")["step"] == 4
    assert [signal.getsignal(getattr(signal, name)) for name, _ in SIGNALS] == handlers


def test_handlers_are_restored_however_training_ends(text, tmp_path, monkeypatch):
    """Or Ctrl-C is swallowed by what runs next in the same process, a notebook."""
    monkeypatch.chdir(tmp_path)
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1
    before = {number: signal.getsignal(number) for number in numbers}
    mine = [lambda number, frame: None for _ in numbers]  # a suite that runs in the background finds some ignored
    for number, handler in zip(numbers, mine):
        signal.signal(number, handler)
    for flags, code in ([], 0), (["--max_lr=1e9", "--warmup_steps=0", "--eval_every=1", "--overwrite"], 1):
        assert exit_code(*TINY_RUN, "--data", text, "--dtype=float32", "--num_samples=0", *flags) == code
        assert [signal.getsignal(number) for number in numbers] == mine
    for number, handler in before.items():
        signal.signal(number, handler)


def test_under_nohup_the_end_of_the_session_ends_no_run(text, tmp_path, monkeypatch, signal_in_step_2):
    monkeypatch.chdir(tmp_path)
    signal_in_step_2("SIGHUP", signal.SIG_IGN)
    assert exit_code(*TINY_RUN, "--data", text, "--num_samples=0") == 0 and load_checkpoint("log/ckpt.pt")["step"] == 4
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_signal_to_another_process_stops_this_one_too(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt2, "sum_over_ranks", lambda *values: values if len(values) == 1 else (values[0], 1))
    assert exit_code(*TINY_RUN, "--data", text) == 143
    assert "\nstopped at step 1; continue" in capsys.readouterr().out and load_checkpoint("log/ckpt.pt")["step"] == 1


def read_until(file, words):
    seen = b""
    while words not in seen:
        seen += os.read(file, 1000)


@pytest.mark.parametrize("console", ["pipe", "terminal"])
def test_a_console_that_is_gone_ends_no_training(start, tmp_path, console):
    """As in `| head -4`, or when the window or the SSH session is closed."""
    ours, theirs = os.openpty() if console == "terminal" else os.pipe()
    process = start("--max_steps=8", "--num_samples=1", stdout=theirs, **(dict(stderr=theirs) if console == "terminal" else {}))
    os.close(theirs)
    read_until(ours, b" 1/8 | loss")
    os.close(ours)
    assert process.wait(timeout=60) == 0
    assert load_checkpoint(tmp_path / "log" / "ckpt.pt")["step"] == 8 and GPT.from_pretrained(tmp_path / "log" / "model")


def test_ctrl_c_that_ends_tee_first_saves_as_ever(start, tmp_path):
    """As in `2>&1 | tee out.txt`: the signal goes to both, and tee dies at once. It comes within an update, where no print is."""
    tee, console = os.pipe()
    process = start("--save_every=100000", "--log_every=100000", "--total_batch_size=1024", stdout=console, stderr=console)
    os.close(console)
    read_until(tee, b" 1/100000 | loss")
    os.close(tee)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    step = load_checkpoint(tmp_path / "log" / "ckpt.pt")["step"]
    assert step >= 1 and GPT.from_pretrained(tmp_path / "log" / "model") and (tmp_path / "log" / "log.txt").exists()


def test_a_stopped_run_that_saves_nothing_says_so(start, tmp_path):
    process = start("--save_every=0")
    wait_for_steps(tmp_path / "log" / "log.txt", 3)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and re.search(r"stopped at step \d+\n", out) and "ckpt.pt" not in out
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


def test_killed_at_random_moments(start, tmp_path, monkeypatch):
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
    monkeypatch.chdir(tmp_path)
    assert exit_code("--init_from=resume", f"--max_steps={steps[-1] + 1}", "--num_samples=0") == 0
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
    assert out.count("could not save") == out.count("warning: step 3: could not save in log (a full disk?): ") == 1 and " 4/4 | val loss" in out
    assert err.startswith("train_gpt2.py: error: step 4: could not save in log (a full disk?): ") and "No space left" in err
    assert load_checkpoint(Path("log/ckpt.pt"))["step"] == 2
    assert GPT.from_pretrained("log/model").config.n_layer == 2  # what was trained is not lost
    assert not list(Path("log").rglob(".tmp*"))


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
    assert exit_code(*TINY_RUN, "--data", text) == 0
    out = capsys.readouterr().out
    assert "warning: step 4: could not draw loss.png: " in out and "--- sample 2 of 2" in out
    assert load_checkpoint("log/ckpt.pt")["step"] == 4 and Path("log/model").exists() and Path("log/loss.png").is_dir()
    assert len(Path("log/log.txt").read_text().splitlines()) == 7


def test_a_backend_of_matplotlib_that_is_not_installed_costs_only_the_picture(cli, text, tmp_path):
    """Notebooks export theirs; matplotlib then raises ValueError on import."""
    done = cli(*TINY_RUN, "--data", text, "--num_samples=0", env={"MPLBACKEND": "nowhere_to_be_found"})
    assert done.returncode == 0 and "warning: step 2: could not draw loss.png: " in done.stdout and " 4/4 | val loss" in done.stdout, done.stderr
    assert load_checkpoint(tmp_path / "log" / "ckpt.pt")["step"] == 4 and GPT.from_pretrained(tmp_path / "log" / "model")


@pytest.mark.skipif(sys.platform == "win32", reason="ulimit is the shell's of Unix")
def test_a_file_size_limit(text, tmp_path):
    """A real error of the operating system, in the midst of writing the weights."""
    flags = " ".join(map(str, [*TINY_RUN, "--data", text]))
    command = f"trap '' XFSZ; ulimit -f 5000; {sys.executable} {ROOT / 'train_gpt2.py'} {flags}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "warning: step 2: could not save in log (a full disk?): " in done.stdout and " 4/4 | val loss" in done.stdout
    assert "error: step 4: could not save in log (a full disk?): " in done.stderr
    model = {path.name for path in (tmp_path / "log" / "model").iterdir()}  # all but the weights, none half-written
    assert model == {"config.json", "merges.txt", "vocab.json", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in (tmp_path / "log").glob("[!.]*")} == {"log.txt", "loss.png", "model"}


def test_out_dir_that_cannot_be_written_is_found_before_training(cli, text, tmp_path):
    (tmp_path / "file").write_text("")
    for out_dir in ("file", "file/log", "/proc/log"):
        done = cli(*TINY_RUN, "--data", text, "--out_dir", out_dir, "--compile")
        assert done.returncode == 1 and out_dir in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert "loss" not in done.stdout and "compiling" not in done.stdout


@pytest.mark.parametrize("poison", ["loss", "gradient", "weights", "weights and Ctrl-C", "weights when a checkpoint is due"])
def test_numbers_that_are_not_finite_are_never_saved(text, tmp_path, monkeypatch, capsys, poison):
    monkeypatch.chdir(tmp_path)
    step, n = train_gpt2.optimizer_step, []

    def poisoned(model, *args):
        n.append(1)
        is_now = len(n) == (4 if "due" in poison else 3)
        if is_now and poison == "loss":
            model.transformer.ln_f.register_forward_hook(lambda module, x, y: y * float("nan"))
        if is_now and poison == "gradient":
            model.transformer.ln_f.bias.register_hook(lambda grad: grad / 0)
        result = step(model, *args)
        if is_now and "weights" in poison:
            with torch.no_grad():
                model.transformer.ln_f.bias.fill_(float("nan"))
            if "Ctrl-C" in poison:
                os.kill(os.getpid(), signal.SIGINT)
        return result

    monkeypatch.setattr(train_gpt2, "optimizer_step", poisoned)
    assert exit_code(*TINY_RUN, "--data", text, "--save_every=2", "--max_steps=5", "--eval_every=0") == 1
    err = capsys.readouterr().err
    what = dict.fromkeys(["loss", "gradient", "weights"], "the loss or the gradient's norm is not finite").get(poison, "the weights are not finite")
    assert f"{what}; not saved" in err and "--max_lr" in err
    assert load_checkpoint(Path("log/ckpt.pt"))["step"] == 2 and not Path("log/model").exists()
    assert ("3 train" in Path("log/log.txt").read_text()) == (poison in ("weights", "weights when a checkpoint is due"))


@pytest.mark.parametrize("change", ["shorter", "as long"])
def test_other_data_under_a_checkpoint_is_refused(text, tmp_path, monkeypatch, capsys, change):
    monkeypatch.chdir(tmp_path)
    assert exit_code(*TINY_RUN, "--data", text, "--num_samples=0") == 0
    n, old = [len(tokens) for tokens, in train_gpt2.load_tokens(text)], text.read_text()
    text.write_text(old[:30_000] if change == "shorter" else old.replace(" the ", " and "))
    assert ([len(tokens) for tokens, in train_gpt2.load_tokens(text)] == n) == (change == "as long")
    before = (tmp_path / "log" / "ckpt.pt").read_bytes()
    assert exit_code("--init_from=resume", "--max_steps=6") == 1
    err = capsys.readouterr().err
    assert "--data is not what the run began with" in err and "--init_from pretrained --model log/model" in err
    assert (tmp_path / "log" / "ckpt.pt").read_bytes() == before
    text.write_text(old)
    assert exit_code("--init_from=resume", "--max_steps=6") == 0


@pytest.mark.parametrize("place, name, said", [(train_gpt2, "plot_losses", "could not draw loss.png"), (torch, "save", "could not save in log (a full disk?)")])
def test_what_could_not_be_saved_is_forgotten_once_it_can(text, tmp_path, monkeypatch, capsys, place, name, said):
    monkeypatch.chdir(tmp_path)
    write, n = getattr(place, name), []

    def fails_once(*args):
        n.append(1)
        if len(n) == 1:
            raise OSError("No space left on device")
        write(*args)

    monkeypatch.setattr(place, name, fails_once)
    assert exit_code(*TINY_RUN, "--data", text) == 0
    out = capsys.readouterr().out
    assert out.count(f"warning: step 2: {said}: No space left on device") == out.count("could not") == 1
    assert "--- sample 2 of 2" in out and len(n) > 1 and load_checkpoint("log/ckpt.pt")["step"] == 4 and Path("log/loss.png").exists()
    assert len(Path("log/log.txt").read_text().splitlines()) == 7


def test_a_step_without_news_writes_nothing(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write, save_run, written = train_gpt2.atomic_write, train_gpt2.save_run, []
    monkeypatch.setattr(train_gpt2, "atomic_write", lambda path: written[-1].append(path.name) or write(path))
    monkeypatch.setattr(train_gpt2, "save_run", lambda *args: written.append([]) or save_run(*args))
    assert exit_code(*TINY_RUN, "--data", text, "--eval_every=0", "--save_every=0", "--log_every=2", "--max_steps=5", "--num_samples=0") == 0
    tokenizer = ["merges.txt", "vocab.json", "tokenizer.json", "tokenizer_config.json"]
    last = ["config.json", *tokenizer, "model.safetensors", "log.txt", "loss.png"]
    assert written == [["log.txt"], ["log.txt"], [], ["log.txt"], last]  # the first in place of an old run's
    assert "ckpt.pt" not in capsys.readouterr().out and not Path("log/ckpt.pt").exists()


@pytest.mark.parametrize("dies", ["in the first update", "in the second update", "in the first evaluation"])
def test_an_old_run_stays_until_the_new_one_has_made_an_update(text, tmp_path, monkeypatch, capsys, dies):
    monkeypatch.chdir(tmp_path)
    assert exit_code(*TINY_RUN, "--data", text, "--num_samples=0") == 0
    old = {str(p): p.read_bytes() for p in Path("log").rglob("*") if p.is_file() and p.name != ".lock"}
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
        assert new.pop("log/log.txt").startswith(b"0 val") and "log/ckpt.pt" not in new
        assert {name: data for name, data in new.items() if "model" in name} == {name: data for name, data in old.items() if "model" in name}
        assert exit_code("--init_from=resume") == 1 and "no run to resume in log" in capsys.readouterr().err
    else:
        assert new == old


def test_a_new_run_that_saves_no_checkpoint_leaves_none_of_the_old_one(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert exit_code(*TINY_RUN, "--data", text, "--num_samples=0") == 0
    assert exit_code(*TINY_RUN, "--data", text, "--num_samples=0", "--overwrite", "--save_every=0") == 0
    assert "log/ holds log.txt, loss.png, model; " in capsys.readouterr().out
    assert exit_code("--init_from=resume") == 1 and "no run to resume in log" in capsys.readouterr().err


def test_a_model_that_is_trained_in_place_stays_until_a_better_one_is_there(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert exit_code(*TINY_RUN, "--data", text, "--num_samples=0") == 0
    model = Path("log/model/model.safetensors")
    before, optimizer_step, n = model.read_bytes(), train_gpt2.optimizer_step, []
    flags = [*TINY_RUN[4:], "--data", text, "--init_from=pretrained", "--model=log/model", "--overwrite", "--num_samples=0"]

    def dying(*args):
        n.append(1)
        if len(n) == 2:
            raise KeyboardInterrupt
        return optimizer_step(*args)

    with monkeypatch.context() as patched:
        patched.setattr(train_gpt2, "optimizer_step", dying)
        assert exit_code(*flags) == 130
    assert model.read_bytes() == before and GPT.from_pretrained("log/model")
    capsys.readouterr()
    assert exit_code(*flags) == 0 and model.read_bytes() != before and GPT.from_pretrained("log/model")
    assert "never trained" not in capsys.readouterr().out  # the other positions were, in pretraining


def test_two_runs_in_one_folder(start, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first = start("--save_every=0")
    wait_for_steps(tmp_path / "log" / "log.txt", 2)
    for flags in ["--overwrite"], ["--overwrite", "--seed=2"]:
        assert exit_code(*TINY_RUN, "--data", text, *flags) == 1
        out, err = capsys.readouterr()
        assert "another run is at work in log" in err and "loss" not in out
    first.kill()
    first.communicate()
    assert exit_code(*TINY_RUN, "--data", text, "--overwrite", "--max_steps=1") == 0  # the lock died with it


def test_a_run_holds_its_folder_while_it_reads_the_data(start, text, tmp_path, monkeypatch, capsys):
    """Or a second one could come and go in the meantime, and lose its files to the first."""
    os.mkfifo(tmp_path / "slow.txt")
    first = start("--data=slow.txt", "--max_steps=2", "--num_samples=0")
    while not (tmp_path / "log" / ".lock").exists():
        time.sleep(0.05)
    time.sleep(0.5)
    monkeypatch.chdir(tmp_path)
    assert exit_code(*TINY_RUN, "--data", text) == 1 and "another run is at work in log" in capsys.readouterr().err
    first.kill()


def test_two_runs_started_at_once(start, tmp_path):
    runs = [start("--max_steps=30", f"--seed={seed}", "--num_samples=0") for seed in (1, 2)]
    outs = [process.communicate(timeout=60) for process in runs]
    assert sorted(process.returncode for process in runs) == [0, 1], outs
    assert sum("another run is at work in log" in err or "exists: " in err for _, err in outs) == 1
    seed = 1 if runs[0].returncode == 0 else 2
    assert load_checkpoint(tmp_path / "log" / "ckpt.pt")["train_config"]["seed"] == seed


def test_the_best_weights_that_could_not_be_saved_are_not_said_to_be_there(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    losses, save, n = iter([11.0, 9.0, 9.5]), GPT.save_pretrained, []

    def fails_once(model, folder):
        n.append(1)
        if len(n) == 1:
            raise OSError("No space left on device")
        save(model, folder)

    monkeypatch.setattr(train_gpt2, "evaluate", lambda *args: next(losses))
    monkeypatch.setattr(GPT, "save_pretrained", fails_once)
    assert exit_code(*TINY_RUN, "--data", text, "--num_samples=0") == 0
    assert "model is step 4's, validation loss 9.5000" in capsys.readouterr().out and Path("log/model/model.safetensors").exists()


def test_a_loss_first_measured_after_resuming_has_its_weights_in_model(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    step, losses, n = train_gpt2.optimizer_step, iter([5.0, 6.0]), []

    def dying(*args):
        n.append(1)
        if len(n) == 3:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(train_gpt2, "optimizer_step", dying)
    monkeypatch.setattr(train_gpt2, "evaluate", lambda *args: next(losses))
    flags = ["--num_samples=0", "--save_every=2", "--max_steps=4"]
    assert exit_code(*TINY_RUN, "--data", text, "--eval_every=0", *flags) == 130 and not Path("log/model").exists()
    weights = load_checkpoint("log/ckpt.pt")["model"]
    assert exit_code("--init_from=resume", "--eval_every=2") == 0
    assert "model is step 2's, validation loss 5.0000" in capsys.readouterr().out
    saved = GPT.from_pretrained("log/model").state_dict()
    assert all(torch.equal(saved[name], w[:len(saved[name])]) for name, w in weights.items())
