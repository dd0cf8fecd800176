"""Schedule, numbers, accumulation, evaluation and the checkpoint."""
import math
import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt2
from conftest import NANO, ROOT, exit_code, load_checkpoint
from train_gpt2 import (ADAMW, FINETUNE, LECTURE, MODELS, DataLoaderLite, GPT, GPTConfig, TrainConfig, UserError, evaluate,
                        get_lr, optimizer_step, read_flags, split_batch)

CPU = torch.device("cpu")


def test_schedule_at_its_corners():
    cfg = TrainConfig(max_steps=110, warmup_steps=10, max_lr=1.0, min_lr=0.1)
    assert get_lr(0, cfg) == pytest.approx(0.1)  # not 0: the first update would be lost
    assert get_lr(9, cfg) == get_lr(10, cfg) == 1.0
    assert get_lr(60, cfg) == pytest.approx(0.55)
    assert get_lr(109, cfg) == pytest.approx(0.1, abs=1e-3) and get_lr(109, cfg) > 0.1
    assert get_lr(110, cfg) == get_lr(1000, cfg) == 0.1
    assert [get_lr(s, cfg) for s in range(10, 110)] == sorted([get_lr(s, cfg) for s in range(10, 110)], reverse=True)
    short = TrainConfig(max_steps=5, warmup_steps=10, max_lr=1.0, min_lr=0.1)
    assert [get_lr(s, short) for s in (0, 4)] == [0.1, 0.5]
    assert get_lr(0, TrainConfig(max_steps=5, warmup_steps=0, max_lr=1.0)) == 1.0


@pytest.fixture
def make():
    """make(B) -> (model, its optimizers, a loader of B windows); the same weights and order each time."""

    def make(B, optimizer="adamw"):
        torch.manual_seed(0)
        model = GPT(GPTConfig(**NANO, vocab_size=101))
        tokens = np.random.default_rng(0).integers(101, size=500).astype(np.uint16)
        return model, model.configure_optimizers(optimizer, 0.1, 1e-3), DataLoaderLite([tokens], B, 16, seed=1)

    return make


def one_step(model, optimizers, loader, grad_accum_steps=1, grad_clip=1.0, scaler=None, autocast=nullcontext(), lr=1e-3):
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    cfg = TrainConfig(grad_clip=grad_clip)
    loss, norm = optimizer_step(model, loader, optimizers, scaler, autocast, CPU, lr, cfg, grad_accum_steps)
    return loss.item(), norm.item()


def steps(model, optimizers, loader, grad_accum_steps, n=3):
    return [one_step(model, optimizers, loader, grad_accum_steps) for _ in range(n)]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_update_takes_its_own_rate_and_no_gradient_from_before(make, optimizer):
    plain, dirty = make(4, optimizer), make(4, optimizer)
    for p in dirty[0].parameters():
        p.grad = torch.ones_like(p)  # as the probe of compile_model leaves them
    before = [p.detach().clone() for p in plain[0].parameters()]
    one_step(*plain, lr=1e-2), one_step(*dirty, lr=1e-2)
    for a, b in zip(plain[0].parameters(), dirty[0].parameters()):
        assert torch.equal(a, b)
    moved = [p.detach().clone() for p in plain[0].parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(before, moved))
    one_step(*plain, lr=0.0)
    assert all(torch.equal(a, b) for a, b in zip(moved, plain[0].parameters()))  # 0 counts at once, not a step later


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_accumulating_4x1_equals_1x4(make, optimizer):
    one, four = make(4, optimizer), make(1, optimizer)
    torch.testing.assert_close(steps(*one, 1), steps(*four, 4), atol=1e-5, rtol=1e-5)
    if optimizer == "adamw":  # Muon's products are in bfloat16, where rounding differs more
        for a, b in zip(one[0].parameters(), four[0].parameters()):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_step_is_that_of_plain_adamw(make):
    model, _, loader = make(4)
    reference, _, same_loader = make(4)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=False)
    for loss, norm in steps(model, model.configure_optimizers("adamw", 0.0, 1e-3), loader, 1):
        expected = reference(*same_loader.next_batch())[1]
        expected.backward()
        expected_norm = torch.cat([p.grad.flatten() for p in reference.parameters()]).norm().item()
        for p in reference.parameters():
            p.grad.mul_(min(1.0, 1.0 / expected_norm))
        optimizer.step()
        optimizer.zero_grad()
        assert (loss, norm) == pytest.approx((expected.item(), expected_norm), rel=1e-5)
    for a, b in zip(model.parameters(), reference.parameters()):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_evaluate_is_the_mean_over_all_windows(make):
    model, _, loader = make(4)
    x, y = loader.get(range(loader.n_windows))
    assert loader.n_windows % 4  # so that the last batch is shorter
    expected = model(x, y)[1].item()
    position = loader.position
    assert evaluate(model, loader, loader.n_windows, nullcontext(), CPU) == pytest.approx(expected, rel=1e-6)
    assert evaluate(model, loader, 10**6, nullcontext(), CPU) == pytest.approx(expected, rel=1e-6)
    for n in 8, 7:
        assert evaluate(model, loader, n, nullcontext(), CPU) == pytest.approx(model(x[:n], y[:n])[1].item(), rel=1e-6)
    assert loader.position == position  # training goes on where it was


def test_the_default_validation_loss_covers_input_txt_and_no_more():
    cfg = TrainConfig()
    n_windows = DataLoaderLite(train_gpt2.load_tokens(ROOT / "input.txt")[1], 16, cfg.sequence_length).n_windows
    assert (cfg.eval_batches - 1) * cfg.batch_size < n_windows <= cfg.eval_batches * cfg.batch_size


def test_the_end_of_the_cosine_is_a_tenth_unless_given():
    assert get_lr(100, TrainConfig(max_lr=0.5, warmup_steps=10, max_steps=100)) == pytest.approx(0.05)
    assert get_lr(100, TrainConfig(max_lr=0.5, min_lr=0.0, warmup_steps=10, max_steps=100)) == 0


@pytest.mark.parametrize("given", [[], ["--max_lr=3e-5"], ["--min_lr=2e-4"], ["--max_lr=1e-3", "--min_lr=1e-3"]])
@pytest.mark.parametrize("more", [[], ["--optimizer=adamw"], ["--model=gpt2"]])
def test_the_rate_never_rises_after_the_warm_up(given, more):
    cfg = read_flags(given + more)
    rates = [get_lr(step, cfg) for step in range(cfg.warmup_steps, cfg.max_steps + 10)]
    assert rates == sorted(rates, reverse=True) and rates[0] == pytest.approx(cfg.max_lr)


@pytest.mark.parametrize("name, value", [
    ("batch_size", 0), ("sequence_length", -1), ("temperature", -0.1), ("temperature", math.nan), ("top_k", -1), ("max_steps", -1),
    ("max_lr", math.inf), ("seed", -1), ("num_samples", -1), ("max_new_tokens", 0), ("shard_size", 0), ("total_batch_size", 0),
    ("grad_clip", -1.0), ("warmup_steps", -1), ("weight_decay", math.nan), ("eval_every", -1), ("eval_batches", -1), ("save_every", -1),
    ("log_every", -1), ("min_lr", -1.0), ("n_layer", 0), ("n_head", 0), ("n_embd", 0), ("block_size", 0), ("vocab_size", 0)])
def test_impossible_numbers(name, value):
    with pytest.raises(UserError, match=f"--{name} must be a (whole|finite) number of at least [01], not {value}"):
        read_flags([f"--{name}={value}"])


# What is trained gives the numbers

def numbers_of(*flags):
    """-> all fields of the TrainConfig that these flags give, but for the shape's n_layer ... vocab_size."""
    return {name: value for name, value in vars(read_flags(list(flags))).items() if name not in vars(GPTConfig())}


def test_the_bare_run_is_what_the_file_says():
    assert vars(read_flags([])) == vars(TrainConfig(model="nano"))
    assert MODELS["nano"] == {}


@pytest.mark.parametrize("name", list(MODELS)[1:])
def test_every_number_of_a_row_counts_unless_a_flag_says_otherwise(name):
    row = MODELS[name]
    assert vars(read_flags(["--model", name])) == vars(TrainConfig(model=name)) | row
    for field in "max_lr", "warmup_steps", "max_steps", "eval_every", "n_layer":
        assert getattr(read_flags(["--model", name, f"--{field}={2 * row[field]}"]), field) == 2 * row[field]


def test_the_numbers_of_the_lecture_and_of_gpt3():
    cfg = read_flags(["--model=gpt2"])
    assert (cfg.sequence_length, cfg.total_batch_size, cfg.max_lr, cfg.warmup_steps, cfg.max_steps) == (1024, 524288, 6e-4, 715, 19073)
    assert (cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.block_size, cfg.vocab_size) == (12, 12, 768, 1024, 50304)
    assert get_lr(0, cfg) == pytest.approx(8.39e-7, rel=1e-3) and get_lr(19073, cfg) == pytest.approx(6e-5)
    rates = {name: read_flags([f"--model={name}"]).max_lr for name in list(MODELS)[1:]}
    assert rates == {"gpt2": 6e-4, "gpt2-medium": 3e-4, "gpt2-large": 2.5e-4, "gpt2-xl": 2e-4}
    assert all(row.items() >= LECTURE.items() for row in list(MODELS.values())[1:])


def test_adamw_takes_a_rate_of_its_own_by_the_flag_alone(monkeypatch):
    assert numbers_of("--optimizer=adamw") == numbers_of() | ADAMW | dict(optimizer="adamw")
    assert read_flags(["--optimizer=adamw", "--max_lr=0.5"]).max_lr == 0.5
    assert read_flags(["--model=gpt2", "--optimizer=adamw"]).max_lr == 6e-4  # the row has a rate
    monkeypatch.setitem(MODELS, "mine", dict(optimizer="adamw", warmup_steps=5))
    assert (read_flags(["--model=mine"]).max_lr, read_flags(["--model=mine"]).warmup_steps) == (2e-3, 5)
    monkeypatch.setattr(TrainConfig.__init__, "__defaults__", TrainConfig.__init__.__defaults__)  # put back after the edits
    edit(monkeypatch, optimizer="adamw", max_lr=0.123)
    assert read_flags([]).max_lr == read_flags(["--optimizer=adamw"]).max_lr == 0.123  # edited together


def edit(monkeypatch, **numbers):
    """As if a user had changed these numbers in TrainConfig."""
    init = TrainConfig.__init__
    names = list(TrainConfig.__dataclass_fields__)
    defaults = [numbers.get(name, default) for name, default in zip(names, init.__defaults__)]
    monkeypatch.setattr(init, "__defaults__", tuple(defaults))
    for name, value in numbers.items():
        monkeypatch.setattr(TrainConfig.__dataclass_fields__[name], "default", value)
        monkeypatch.setattr(TrainConfig, name, value)


def test_an_edit_of_the_defaults_shows_in_the_bare_run_and_a_row_beats_it(monkeypatch):
    edit(monkeypatch, max_lr=0.123, n_layer=3, model="gpt2")
    assert (read_flags([]).max_lr, read_flags([]).n_layer) == (6e-4, 12)
    assert (read_flags(["--model=nano"]).max_lr, read_flags(["--model=nano"]).n_layer) == (0.123, 3)
    monkeypatch.setitem(MODELS["gpt2"], "max_lr", 0.5)
    assert read_flags([]).max_lr == 0.5


@pytest.mark.parametrize("row, message", [
    (dict(max_steps=1e4), "--max_steps must be a whole number of at least 0, not 10000.0"),
    (dict(max_lr="6e-4"), "--max_lr must be a finite number of at least 0, not '6e-4'"), (dict(n_layer=np.int64(1)), "--n_layer must be a whole")])
def test_a_number_of_another_type_in_the_file_is_seen_before_training(monkeypatch, row, message):
    monkeypatch.setitem(MODELS, "mine", row)
    with pytest.raises(UserError, match=message):
        read_flags(["--model=mine"])


def test_a_row_of_ones_own(monkeypatch):
    monkeypatch.setitem(MODELS, "mini", dict(n_layer=2, n_head=2, n_embd=128, block_size=64))
    cfg = read_flags(["--model=mini"])
    assert vars(cfg) == vars(TrainConfig(model="mini", n_layer=2, n_head=2, n_embd=128))
    monkeypatch.setitem(MODELS, "short", dict(block_size=24))
    assert read_flags(["--model=short"]).sequence_length == 16  # divides total_batch_size
    with pytest.raises(UserError, match="--model mine is not one of nano, gpt2, .*, mini, short; for a HuggingFace id"):
        read_flags(["--model=mine"])


@pytest.fixture
def pretrained(monkeypatch):
    """pretrained(setting=value, ...): every model's config.json has this shape."""
    def be(**shape):
        monkeypatch.setattr(train_gpt2, "pretrained_config", lambda name: GPTConfig(**shape))
    return be


def test_finetuning_takes_one_low_rate_for_every_size(pretrained):
    for n_embd in 32, 768, 1600:
        pretrained(n_embd=n_embd, n_head=4)
        cfg = read_flags(["--init_from=pretrained", "--model=folder"])
        assert (cfg.max_lr, cfg.optimizer, cfg.model, cfg.n_embd, cfg.vocab_size) == (5e-5, "adamw", "folder", n_embd, 50257)
        assert FINETUNE.items() <= vars(cfg).items()
    assert read_flags(["--init_from=pretrained"]).model == "gpt2"
    assert read_flags(["--init_from=pretrained", "--max_lr=1e-3"]).max_lr == 1e-3
    with pytest.raises(UserError, match="cannot change --n_layer from 12 to 3: the weights have this shape"):
        read_flags(["--init_from=pretrained", "--n_layer=3"])


def test_a_sequence_is_no_longer_than_the_model_unless_a_flag_says_so(pretrained):
    for block_size, T in (64, 64), (256, 256), (1024, 256), (16, 16), (50, 32):
        pretrained(block_size=block_size)
        assert read_flags(["--init_from=pretrained"]).sequence_length == T
    with pytest.raises(UserError, match="--sequence_length 65 is over --block_size 64$"):
        read_flags(["--sequence_length=65", "--total_batch_size=1040"])


def test_contradictions_name_both_sides():
    with pytest.raises(UserError, match=r"--total_batch_size 1000 is not a multiple of --sequence_length 64 x 1 processes"):
        read_flags(["--total_batch_size=1000"])
    with pytest.raises(UserError, match=r"--min_lr 0.001 is over --max_lr 0.0006"):
        read_flags(["--model=gpt2", "--min_lr=1e-3"])
    with pytest.raises(UserError, match="--n_embd 100 is not a multiple of --n_head 3"):
        read_flags(["--n_embd=100", "--n_head=3"])


@pytest.mark.parametrize("world_size, batch_size, expected", [
    (1, 16, (16, 1)), (2, 16, (8, 1)), (1, 10, (8, 2)), (1, 12, (8, 2)), (1, 1, (1, 16)), (1, 10**9, (16, 1)), (16, 16, (1, 1)), (4, 3, (2, 2))])
def test_a_batch_is_the_largest_that_divides_a_step(monkeypatch, world_size, batch_size, expected):
    monkeypatch.setattr(train_gpt2, "WORLD_SIZE", world_size)
    B, grad_accum_steps = split_batch(TrainConfig(batch_size=batch_size))
    assert (B, grad_accum_steps) == expected and world_size * B * grad_accum_steps * 64 == 1024


def test_fewer_tokens_than_one_sequence_a_process_are_no_step(monkeypatch):
    monkeypatch.setattr(train_gpt2, "WORLD_SIZE", 32)
    with pytest.raises(UserError, match="1024 is not a multiple of --sequence_length 64 x 32 processes"):
        read_flags([])


def saved(out_dir, make, step=3, scaler=None):
    model, optimizers, loader = make(4)
    steps(model, optimizers, loader, 1)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    cfg, log = TrainConfig(out_dir=str(out_dir), save_every=1), {(step, "train"): (5.0, 64 * step)}
    train_gpt2.save_run(step, False, model, optimizers, scaler, loader, cfg, log)
    return model, optimizers, loader


def test_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch, capsys, make):
    path = tmp_path / "ckpt.pt"
    saved(tmp_path, make, step=2)

    def full_disk(state, path):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as m:
        m.setattr(torch, "save", full_disk)
        saved(tmp_path, make, step=3)
    assert "warning: step 3: could not save in" in capsys.readouterr().out
    assert not list(tmp_path.glob(".tmp*"))
    checkpoint = load_checkpoint(path)
    assert checkpoint["step"] == 2
    checkpoint["train_config"]["dropout"] = checkpoint["train_config"].pop("seed")
    torch.save(checkpoint, path)
    assert exit_code("--init_from=resume", "--out_dir", tmp_path) == 1
    err = capsys.readouterr().err
    assert f"cannot resume from {path}" in err and "dropout" in err


def test_a_file_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    calls, path = [], tmp_path / "loss.png"
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append("fsync") or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append("replace") or replace(a, b))
    path.write_text("old")
    with train_gpt2.atomic_write(path) as tmp:
        tmp.write_text("new")
        assert path.read_text() == "old" and tmp.suffix == ".png"
    assert calls == ["fsync", "replace"] and path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(KeyboardInterrupt), train_gpt2.atomic_write(path) as tmp:
        tmp.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


class Evil:
    def __reduce__(self):
        return open, ("evil", "w")


@pytest.mark.parametrize("content", [Evil(), {"model": {}}, [1], {"optimizers": 0}, b"", b"PK\x03\x04 and no more"])
def test_strange_checkpoints_are_refused_and_run_nothing(tmp_path, monkeypatch, capsys, content):
    monkeypatch.chdir(tmp_path)
    path = Path("ckpt.pt")
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    assert exit_code("--init_from=resume", "--out_dir=.") == 1
    assert "cannot resume from ckpt.pt: " in capsys.readouterr().err
    assert not (tmp_path / "evil").exists()


def test_a_norm_is_that_of_the_unscaled_gradients_and_clipping_follows(make):
    def gradients(grad_clip, scaler=None):
        model, optimizers, loader = make(4)
        norm = one_step(model, optimizers, loader, grad_clip=grad_clip, scaler=scaler)[1]
        return norm, torch.cat([p.grad.flatten() for p in model.parameters()])

    norm, clipped = gradients(0.01)
    scaled_norm, scaled = gradients(0.01, torch.amp.GradScaler("cpu", init_scale=1024.0))
    assert norm > 0.01 and clipped.norm() == pytest.approx(0.01, rel=1e-3)
    assert scaled_norm == pytest.approx(norm, rel=1e-4)
    torch.testing.assert_close(scaled, clipped)
    torch.testing.assert_close(gradients(0.0)[1], gradients(1e9)[1])
    assert gradients(0.0)[1].norm() == pytest.approx(norm, rel=1e-4)


def test_processes_sync_in_the_last_micro_step_alone(make, monkeypatch):
    model, optimizer, loader = make(2)

    class StandIn(torch.nn.Module):
        require_backward_grad_sync, seen = True, []

        def forward(self, x, y):
            self.seen.append(self.require_backward_grad_sync)
            return model(x, y)

    monkeypatch.setattr(train_gpt2, "DDP", StandIn)
    standin = StandIn()
    standin.inner = model
    one_step(standin, optimizer, loader, 3)
    assert standin.seen == [False, False, True]


def test_float16_on_a_cpu_survives_overflowing_gradients(make):
    model, optimizer, loader = make(4)
    before = [p.detach().clone() for p in model.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    for _ in range(30):  # the scale halves with each step until the gradients fit
        one_step(model, optimizer, loader, scaler=scaler, autocast=torch.autocast("cpu", torch.float16))
    assert scaler.get_scale() < 2.0**40
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters()))


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("scaling", [False, True])
def test_a_step_does_not_wait_for_a_gpu(make, name, scaling):
    """On a GPU each read of a number by Python is a wait; to scale takes one, whether to skip the update."""
    reads = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            reads.extend([func] if func is torch.ops.aten._local_scalar_dense.default else [])
            return func(*args, **(kwargs or {}))

    model, optimizer, loader = make(2, name)
    scaler = torch.amp.GradScaler("cpu", enabled=scaling, init_scale=1.0)
    for _ in range(2):  # the first one makes the optimizer's state
        batches = iter([loader.next_batch() for _ in range(3)])
        ready = SimpleNamespace(next_batch=lambda: next(batches))  # the loader works on the CPU
        reads.clear()
        with Count():
            optimizer_step(model, ready, optimizer, scaler, nullcontext(), CPU, 1e-3, TrainConfig(), 3)
    assert len(reads) == scaling


@pytest.mark.parametrize("name", ["transformer.ln_f.bias", "transformer.h.0.mlp.c_fc.weight"])  # AdamW's, Muon's
@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
def test_an_overflow_anywhere_skips_the_whole_update(make, name, grad_clip):
    model, optimizer, loader = make(4, "muon")
    before = [p.detach().clone() for p in model.parameters()]
    model.get_parameter(name).register_hook(lambda grad: grad * math.inf)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for scale in 1.0, 0.5:
        one_step(model, optimizer, loader, grad_clip=grad_clip, scaler=scaler)
        assert scaler.get_scale() == scale
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_dtype_of_each_device():
    assert train_gpt2.pick_dtype("float16", CPU) == torch.float16
    assert train_gpt2.pick_dtype("auto", CPU) in (torch.float32, torch.bfloat16)
    for name in "auto", "bfloat16", "float16":  # without autocast neither these products nor a GradScaler
        assert train_gpt2.pick_dtype(name, torch.device("mps")) == torch.float32


@pytest.mark.parametrize("capability, dtype", [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)])
def test_dtype_of_gpus(monkeypatch, capability, dtype):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    assert train_gpt2.pick_dtype("auto", torch.device("cuda", 0)) == dtype
    assert train_gpt2.pick_dtype("float32", torch.device("cuda", 0)) == torch.float32


def test_loss_png_has_both_losses_over_tokens(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path: path.touch() or drawn.extend(figure.axes))
    log = {(0, "val"): (10.8, 0), (5, "train"): (6.1, 500), (10, "train"): (5.5, 1000), (10, "val"): (5.0, 1000),
           (10, "hella"): (0.25, 1000)}
    train_gpt2.plot_losses(tmp_path / "loss.png", log)
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in drawn[0].get_lines()}
    assert lines == {"train": ([500, 1000], [6.1, 5.5]), "val": ([0, 1000], [10.8, 5.0])}
    train_gpt2.plot_losses(tmp_path / "loss.png", {})


def test_a_resumed_run_takes_the_state_and_this_runs_numbers(make, tmp_path):
    _, optimizers, loader = saved(tmp_path, make)
    model, other, new_loader = make(4)
    other = model.configure_optimizers("adamw", 0.7, 1e-3)
    train_gpt2.restore(load_checkpoint(tmp_path / "ckpt.pt"), other, torch.amp.GradScaler("cpu", enabled=False), new_loader, "log")
    assert new_loader.position == loader.position == 12
    assert [group["weight_decay"] for group in other[0].param_groups] == [0.7, 0.0]
    for a, b in zip(optimizers[0].state_dict()["state"].values(), other[0].state_dict()["state"].values()):
        torch.testing.assert_close(a, b, atol=0, rtol=0)
