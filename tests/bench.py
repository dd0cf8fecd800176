"""
Times train_gpt2.py beside transformers on the same work: the two alternate within one run, and medians are compared,
because the absolute times of a shared machine say little. Prints the machine, then one Markdown table.

    python tests/bench.py               every row
    python tests/bench.py sampling      only that group of rows
    python tests/bench.py --quick       fewer tokens and rounds, and not the rows that take minutes

Where there is a CUDA GPU, training (124M, T=1024) and sampling run on it, everything else on the CPU.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt2  # noqa: E402
from train_gpt2 import DataLoaderLite, GPT, GPTConfig, MODELS  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent

PROMPT = [15496, 11, 314, 1101, 257, 3303, 2746, 11]  # Hello, I'm a language model,


DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")  # of training and sampling
HAS_BFLOAT16 = train_gpt2.pick_dtype("auto", DEVICE) == torch.bfloat16
DTYPES = [torch.float32, torch.bfloat16] if HAS_BFLOAT16 else [torch.float32]


def seconds(f):
    synchronize = torch.cuda.synchronize if DEVICE.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    f()
    synchronize()
    return time.perf_counter() - start


def alternate(ours, theirs, rounds):
    """-> (median seconds of ours, median seconds of theirs), after one untimed call of each."""
    ours(), theirs()
    times = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*times)]


def read_bandwidth():
    """-> bytes a second at which this machine sums a large float32 tensor, the speed that sampling cannot pass."""
    x = torch.ones(64 * 2**20, device=DEVICE)
    return 4 * x.numel() / statistics.median(seconds(x.sum) for _ in range(9))


def flops_per_second(dtype):
    """-> FLOP/s of the matrix product of two (2048, 2048), on a GPU (8192, 8192)."""
    n = 8192 if DEVICE.type == "cuda" else 2048
    x = torch.randn(n, n, device=DEVICE).to(dtype)
    x @ x
    return 2 * n**3 / statistics.median(seconds(lambda: x @ x) for _ in range(7))


def random_gpt2(name, dtype=torch.float32):
    """-> a GPT of that row of MODELS, with quickly drawn random weights of GPT-2's size."""
    row = MODELS[name]
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=row["n_layer"], n_head=row["n_head"], n_embd=row["n_embd"]))
    model = model.to(dtype).to_empty(device="cpu")
    model.transformer.wte.weight = model.lm_head.weight
    for p in model.parameters():
        torch.nn.init.uniform_(p, -0.03, 0.03)
    return model


def bench_sampling(args):
    from transformers import GPT2LMHeadModel
    bandwidth, n = read_bandwidth(), 16 if args.quick else 64
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory() as folder:
            random_gpt2("gpt2", dtype).save_pretrained(f"{folder}/model")
            ours = GPT.from_pretrained(f"{folder}/model").to(DEVICE)
            if DEVICE.type == "cpu":
                train_gpt2.faster_on_a_cpu(ours)
            theirs = GPT2LMHeadModel.from_pretrained(f"{folder}/model", dtype=dtype).to(DEVICE)
            n_bytes = sum(p.numel() * p.element_size() for p in ours.parameters())
            for B in 1, 5:
                idx = torch.tensor(PROMPT, device=DEVICE).repeat(B, 1)
                a, b = alternate(
                    lambda: ours.generate(idx, n, top_k=50),
                    lambda: theirs.generate(idx, attention_mask=torch.ones_like(idx), do_sample=True, top_k=50,
                                            max_new_tokens=n, min_new_tokens=n, pad_token_id=50256),
                    1 if args.quick else 7)
                yield (f"sampling, gpt2, {str(dtype)[6:]}, batch {B}", f"{B * n / a:.1f} tok/s",
                       f"{B * n / b:.1f} tok/s", b / a,
                       f"{n_bytes * n / bandwidth / a:.0%} of {bandwidth / 1e9:.0f} GB/s")


# Loading runs in a process of its own, whose memory is counted while it works: RssAnon is what is private to the
# process, without the mapped pages of the file. The lecture's recipe makes a random model and copies over it.
LOADING = """
import json, sys, threading, time
import torch, transformers
from transformers import GPT2LMHeadModel
from train_gpt2 import GPT, GPTConfig, MODELS
transformers.utils.logging.disable_progress_bar()

def private():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

def watch():
    global peak
    while not done:
        peak = max(peak, private())
        time.sleep(0.01)

folder, name, way = sys.argv[1:]
before = peak = private()
done = False
thread = threading.Thread(target=watch)
thread.start()
start = time.perf_counter()
if way == "ours":
    model = GPT.from_pretrained(folder)
else:
    shape = {field: MODELS[name][field] for field in ("n_layer", "n_head", "n_embd")}
    model = GPT(GPTConfig(**shape))
    sd, sd_hf = model.state_dict(), GPT2LMHeadModel.from_pretrained(folder).state_dict()
    with torch.no_grad():
        for k in sd:
            sd[k].copy_(sd_hf[k].t() if k.endswith(GPT.CONV1D) else sd_hf[k])
took = time.perf_counter() - start
done = True
thread.join()
n_bytes = sum(4 * p.numel() for p in model.parameters())
print(json.dumps([took, (max(peak, private()) - before) / n_bytes]))
"""


def bench_loading(args):
    for name in ["gpt2"] if args.quick else ["gpt2", "gpt2-xl"]:
        with tempfile.TemporaryDirectory() as folder:
            random_gpt2(name).save_pretrained(f"{folder}/model")

            def load(way):
                done = subprocess.run([sys.executable, "-c", LOADING, f"{folder}/model", name, way], text=True,
                                      check=True, stdout=subprocess.PIPE, cwd=ROOT)
                return json.loads(done.stdout.splitlines()[-1])

            rounds = [(load("ours"), load("the lecture's")) for _ in range(1 if args.quick else 3)]
            ours, theirs = ([statistics.median(x) for x in zip(*column)] for column in zip(*rounds))
            yield (f"loading, {name} (beside the lecture's recipe)", f"{ours[0]:.2f} s, {ours[1]:.2f} x the weights",
                   f"{theirs[0]:.2f} s, {theirs[1]:.2f} x the weights", theirs[0] / ours[0], "")


class Worker:
    """A process of this script that trains in one of the two ways, and waits while the other one is timed: each has the
    memory settings that its users have."""

    def __init__(self, way, shape, env=None):
        self.process = subprocess.Popen([sys.executable, __file__, "--worker", way, *map(str, shape)], text=True, env=env,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def steps(self, n):
        """-> (seconds a step, peak memory in bytes), of n steps."""
        print(n, file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def worker(way, dtype, n_layer, n_head, n_embd, B, T):
    """Trains as the Worker says: compiled, autocast, fused AdamW, the loss of all positions, no dropout."""
    import resource
    from transformers import GPT2Config, GPT2LMHeadModel
    sys.stdout = sys.stderr  # stdout is for the answers alone
    torch.manual_seed(0)
    n_layer, n_head, n_embd, B, T, V = *map(int, (n_layer, n_head, n_embd, B, T)), 50304
    dtype, cfg = getattr(torch, dtype), train_gpt2.TrainConfig()
    tokens = torch.randint(50257, (1_000_000,)).to(torch.uint16).numpy()
    loader = DataLoaderLite([tokens], B, T, seed=0)
    autocast = torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=False)
    if way == "ours":
        model = GPT(GPTConfig(block_size=T, vocab_size=V, n_layer=n_layer, n_head=n_head, n_embd=n_embd)).to(DEVICE)
        if DEVICE.type == "cpu":
            train_gpt2.faster_on_a_cpu(model)
        optimizers = model.configure_optimizers("adamw", 0.1, 1e-4)
        compiled = train_gpt2.compile_model(model, loader, autocast, DEVICE)
    else:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=T, n_layer=n_layer, n_head=n_head, n_embd=n_embd,
                                           resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)).to(DEVICE)
        optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)]
        module = torch.compile(model)

        def compiled(x, y):
            return None, module(x, labels=x).loss

        compiled.parameters = model.parameters

    def step():
        train_gpt2.optimizer_step(compiled, loader, optimizers, scaler, autocast, DEVICE, 1e-4, cfg, 1)

    for line in sys.stdin:
        took = seconds(lambda: [step() for _ in range(int(line))]) / int(line)
        peak = (torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else
                1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        print(json.dumps([took, peak]), file=sys.__stdout__, flush=True)


def bench_training(args):
    shapes = [((6, 6, 96, 16, 64), 8), ((6, 6, 384, 8, 128), 5), ((12, 12, 768, 4, 256), 2)]
    if DEVICE.type == "cuda":
        shapes = [((12, 12, 768, B, 1024), 10) for B in (16, 32, 64)]
    for dtype in DTYPES:
        peak = flops_per_second(dtype)
        for shape, n in shapes[:1] if args.quick else shapes:
            n_layer, n_head, n_embd, B, T = shape
            workers = [Worker(way, (str(dtype)[6:], *shape)) for way in ("ours", "transformers")]
            for w in workers:
                w.steps(2)  # compiles
            rounds = [[w.steps(n) for w in workers] for _ in range(2 if args.quick else 5)]
            (a, a_peak), (b, b_peak) = ([statistics.median(c) for c in zip(*column)] for column in zip(*rounds))
            for w in workers:
                w.close()
            with torch.device("meta"):
                n_params = sum(p.numel() for p in GPT(GPTConfig(T, 50304, n_layer, n_head, n_embd)).parameters())
            rate = B * T * (6 * (n_params - T * n_embd) + 12 * n_layer * n_embd * T) / a
            yield (f"training, {n_layer} layers, {n_embd} wide, B={B}, T={T}, {str(dtype)[6:]}",
                   f"{1000 * a:.0f} ms, {a_peak / 1e9:.2f} GB", f"{1000 * b:.0f} ms, {b_peak / 1e9:.2f} GB", b / a,
                   f"{rate / peak:.0%} of {peak / 1e9:.0f} GFLOP/s")


def bench_busy(args):
    """A step of nano beside busy loops: with the GOMP_SPINCOUNT that train_gpt2 sets, and with libgomp's own."""
    with_it = dict(os.environ)
    without = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    for dtype in DTYPES:
        workers = [Worker("ours", (str(dtype)[6:], 6, 6, 96, 16, 64), env) for env in (with_it, without)]
        for w in workers:
            w.steps(2)  # compiles
        for n_loops in [0, 3] if args.quick else [0, 1, 3]:
            loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n_loops)]
            rounds = [[w.steps(5)[0] for w in workers] for _ in range(3 if args.quick else 7)]
            for loop in loops:
                loop.kill()
                loop.wait()
            a, b = (statistics.median(column) for column in zip(*rounds))
            yield (f"GOMP_SPINCOUNT={with_it['GOMP_SPINCOUNT']} (beside unset), nano, {n_loops} busy loops, {str(dtype)[6:]}",
                   f"{1000 * a:.0f} ms", f"{1000 * b:.0f} ms", b / a, "")
        for w in workers:
            w.close()


def bench_shards(args):
    """write_shards beside tiktoken's encode_ordinary_batch alone, on the same text with as many threads."""
    text = (ROOT / "input.txt").read_text()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        pieces = [text[i:i + 2**18] for i in range(0, len(text), 2**18)] * (8 if args.quick else 40)
        (Path(folder) / "a.txt").write_text("".join(pieces))
        n, enc = iter(range(100)), train_gpt2.get_tokenizer()
        a, b = alternate(lambda: train_gpt2.write_shards(f"{folder}/a.txt", f"{folder}/{next(n)}", 10**8),
                         lambda: enc.encode_ordinary_batch(pieces, num_threads=os.cpu_count()), 1 if args.quick else 5)
        size = os.path.getsize(f"{folder}/a.txt")
    yield ("--write_shards (beside tiktoken's encode_ordinary_batch)", f"{size / a / 1e6:.1f} MB/s",
           f"{size / b / 1e6:.1f} MB/s", b / a, "")


def bench_tokenizing(args):
    from transformers import AutoTokenizer
    with tempfile.TemporaryDirectory() as folder:
        GPT(GPTConfig(n_layer=1, n_head=1, n_embd=1)).save_pretrained(f"{folder}/model")
        theirs = AutoTokenizer.from_pretrained(f"{folder}/model", model_max_length=10**9)
    text, enc = (ROOT / "input.txt").read_text(), train_gpt2.get_tokenizer()
    assert enc.encode(text) == theirs(text)["input_ids"]
    a, b = alternate(lambda: enc.encode(text), lambda: theirs(text)["input_ids"], 3 if args.quick else 7)
    yield "tokenizing input.txt", f"{a:.2f} s", f"{b:.2f} s", b / a, ""


def bench_hellaswag(args):
    from transformers import GPT2LMHeadModel
    from test_hellaswag import made_examples, score_one_by_one, write
    examples = made_examples(4 if args.quick else 24)
    with tempfile.TemporaryDirectory() as folder:
        random_gpt2("gpt2").save_pretrained(f"{folder}/model")
        ours, theirs = GPT.from_pretrained(f"{folder}/model"), GPT2LMHeadModel.from_pretrained(f"{folder}/model")
        path = write(Path(folder) / "hellaswag.jsonl", examples)

        class Theirs:  # what score_one_by_one wants of a model
            config = ours.config

            def __call__(self, idx):
                return theirs(idx).logits, None

        with redirect_stdout(sys.stderr):  # it prints the accuracies
            a, b = alternate(lambda: train_gpt2.evaluate_hellaswag(ours, path),
                             lambda: [score_one_by_one(Theirs(), context, ends) for context, ends, _ in examples],
                             1 if args.quick else 3)
    yield ("HellaSwag, gpt2, float32 (transformers: one ending at a time)", f"{len(examples) / a:.2f} examples/s",
           f"{len(examples) / b:.2f} examples/s", b / a, "")


def bench_startup(args):
    def run(*command):
        with tempfile.TemporaryDirectory() as folder:
            return seconds(lambda: subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL))

    flags = ["--data", ROOT / "input.txt", "--max_steps=1", "--eval_every=0", "--save_every=0", "--num_samples=0",
             "--no-compile"]
    rows = {"--help (beside import torch)": (["--help"], "import torch"),
            "start, one training step, export, loss.png (beside import transformers' GPT-2)": (
                flags, "from transformers import GPT2LMHeadModel")}
    for name, (ours, theirs) in rows.items():
        a, b = alternate(lambda: run(sys.executable, ROOT / "train_gpt2.py", *ours),
                         lambda: run(sys.executable, "-c", theirs), 1 if args.quick else 3)
        yield f"start-up: {name}", f"{a:.2f} s", f"{b:.2f} s", b / a, ""


def bench_ranks(args):
    """Two processes with a thread each beside one process with two threads, on the same total batch."""
    def run(n):
        flags = ["--data", ROOT / "input.txt", "--max_steps=11", "--eval_every=0", "--save_every=0", "--num_samples=0",
                 "--log_every=5", "--no-compile", f"--batch_size={16 // n}"]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
        with tempfile.TemporaryDirectory() as folder:
            out = subprocess.run([*command, ROOT / "train_gpt2.py", *flags], cwd=folder, check=True, text=True,
                                 env={**os.environ, "OMP_NUM_THREADS": str(2 // n)}, stdout=subprocess.PIPE,
                                 stderr=subprocess.DEVNULL).stdout
        rates = [float(line.split(" tok/s")[0].split()[-1]) for line in out.splitlines() if " tok/s" in line]
        return statistics.median(rates[1:])

    if args.quick:
        return
    rounds = [(run(2), run(1)) for _ in range(3)]
    two, one = (statistics.median(column) for column in zip(*rounds))
    yield ("two gloo processes (beside one with two threads), nano, not compiled", f"{two:.0f} tok/s",
           f"{one:.0f} tok/s", two / one, "")


BENCHES = {"training": bench_training, "busy": bench_busy, "shards": bench_shards, "sampling": bench_sampling, "loading": bench_loading,
           "startup": bench_startup, "tokenizing": bench_tokenizing, "hellaswag": bench_hellaswag, "ranks": bench_ranks}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", help="benches to run, of " + ", ".join(BENCHES))
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and not the rows that take minutes")
    parser.add_argument("--worker", nargs=7, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(*args.worker)
    import transformers
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),
               platform.processor()) if os.path.exists("/proc/cpuinfo") else platform.processor()
    gpu = f", {torch.cuda.get_device_name(DEVICE)}" if DEVICE.type == "cuda" else ""
    print(f"{date.today()}, {cpu}{gpu}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"transformers {transformers.__version__}")
    print(f"matrix instructions for bfloat16: {'yes' if HAS_BFLOAT16 else 'no'}; " + ", ".join(
        f"{str(dtype)[6:]} {flops_per_second(dtype) / 1e9:.0f} GFLOP/s" for dtype in (torch.float32, torch.bfloat16)) + "\n")
    print("| work | ours | transformers | ratio | of the machine's limit |\n| --- | --- | --- | --- | --- |")
    for name, bench in BENCHES.items():
        if not args.only or name in args.only:
            for work, ours, theirs, ratio, limit in bench(args):
                print(f"| {work} | {ours} | {theirs} | {ratio:.2f} | {limit} |", flush=True)


if __name__ == "__main__":
    main()
