"""
Times train_gpt2.py beside transformers on the same work: the two alternate within one run, and medians are compared,
because the absolute times of a shared machine say little. Prints one Markdown table.

    python tests/bench.py               every row
    python tests/bench.py sampling      only that group of rows
    python tests/bench.py --quick       fewer tokens and rounds, and not the largest model
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
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from train_gpt2 import GPT, GPTConfig, MODELS  # noqa: E402

PROMPT = [15496, 11, 314, 1101, 257, 3303, 2746, 11]  # Hello, I'm a language model,


def seconds(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def alternate(ours, theirs, rounds):
    """-> (median seconds of ours, median seconds of theirs), after one untimed call of each."""
    ours(), theirs()
    times = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*times)]


def read_bandwidth():
    """-> bytes a second at which this machine sums a large float32 tensor, the speed that sampling cannot pass."""
    x = torch.ones(64 * 2**20)
    return 4 * x.numel() / statistics.median(seconds(x.sum) for _ in range(9))


def random_gpt2(name, dtype=torch.float32):
    """-> a GPT of that row of MODELS, with quickly drawn random weights of GPT-2's size."""
    with torch.device("meta"):
        model = GPT(GPTConfig(**MODELS[name]))
    model = model.to(dtype).to_empty(device="cpu")
    model.transformer.wte.weight = model.lm_head.weight
    for p in model.parameters():
        torch.nn.init.uniform_(p, -0.03, 0.03)
    return model


def bench_sampling(args):
    from transformers import GPT2LMHeadModel
    bandwidth, n = read_bandwidth(), 16 if args.quick else 64
    for dtype in torch.float32, torch.bfloat16:
        with tempfile.TemporaryDirectory() as folder:
            random_gpt2("gpt2", dtype).save_pretrained(f"{folder}/model")
            ours = GPT.from_pretrained(f"{folder}/model")
            theirs = GPT2LMHeadModel.from_pretrained(f"{folder}/model", dtype=dtype)
            n_bytes = sum(p.numel() * p.element_size() for p in ours.parameters())
            for B in 1, 5:
                idx = torch.tensor(PROMPT).repeat(B, 1)
                a, b = alternate(
                    lambda: ours.generate(idx, n, top_k=50),
                    lambda: theirs.generate(idx, attention_mask=torch.ones_like(idx), do_sample=True, top_k=50,
                                            max_new_tokens=n, min_new_tokens=n, pad_token_id=50256),
                    3 if args.quick else 7)
                yield (f"sampling, gpt2, {str(dtype)[6:]}, batch {B}", f"{B * n / a:.1f} tok/s",
                       f"{B * n / b:.1f} tok/s", b / a, f"{n_bytes * n / bandwidth / a:.0%} of {bandwidth / 1e9:.0f} GB/s")


# Loading runs in a process of its own, whose memory is counted while it works: RssAnon is what is private to the
# process, without the mapped pages of the file. The lecture's recipe makes a random model and copies over it.
LOADING = """
import json, sys, threading, time
import torch, transformers
from transformers import GPT2LMHeadModel
from train_gpt2 import CONV1D, GPT, GPTConfig, MODELS
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
    model = GPT(GPTConfig(**MODELS[name]))
    sd, sd_hf = model.state_dict(), GPT2LMHeadModel.from_pretrained(folder).state_dict()
    with torch.no_grad():
        for k in sd:
            sd[k].copy_(sd_hf[k].t() if k.endswith(CONV1D) else sd_hf[k])
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
                                      check=True, stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent)
                return json.loads(done.stdout.splitlines()[-1])

            rounds = [(load("ours"), load("the lecture's")) for _ in range(3)]
            ours, theirs = ([statistics.median(x) for x in zip(*column)] for column in zip(*rounds))
            yield (f"loading, {name} (beside the lecture's recipe)", f"{ours[0]:.2f} s, {ours[1]:.2f} x the weights",
                   f"{theirs[0]:.2f} s, {theirs[1]:.2f} x the weights", theirs[0] / ours[0], "")


BENCHES = {"sampling": bench_sampling, "loading": bench_loading}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", help="benches to run, of " + ", ".join(BENCHES))
    parser.add_argument("--quick", action="store_true", help="fewer tokens and rounds, and not the largest model")
    args = parser.parse_args()
    import transformers
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),
               platform.processor()) if os.path.exists("/proc/cpuinfo") else platform.processor()
    print(f"{date.today()}, {cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"transformers {transformers.__version__}\n")
    print("| work | ours | transformers | ratio | of the machine's limit |\n| --- | --- | --- | --- | --- |")
    for name, bench in BENCHES.items():
        if not args.only or name in args.only:
            for work, ours, theirs, ratio, limit in bench(args):
                print(f"| {work} | {ours} | {theirs} | {ratio:.2f} | {limit} |", flush=True)


if __name__ == "__main__":
    main()
