# SPDX-License-Identifier: MIT
"""Measures actpatch at GPT-2 small's size and prints one table, beside what else is installed.

    python3 tests/bench.py [--quick] [--runs N] [--model FILE.bin]

The weights are random, made here from a seed (the time does not depend on them); the prompts are the
notebook's eight. Whole processes are timed, the file mapped, the best of --runs; the FMA peak is measured
before and after each, in the same run, since shared machines change their speed. TransformerLens is
timed where PYTHON (default: this interpreter) can import it, on a few cells of each sweep, whose time is
multiplied: every cell costs it one forward pass."""

import argparse
import array
import json
import os
import random
import resource
import struct
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
import util  # noqa: E402

PROMPTS = os.path.join(util.TINY, "ioi-notebook.tsv")
FACT = "The capital of France is the city of"
SWEEPS = ["resid_pre", "block_every", "attn_head_out_all_pos"]


def make_model(folder, layers=12, width=768, heads=12, vocab=50257, context=1024):
    """A GPT-2 checkpoint with random weights as Hugging Face would save it; the converter's tensors are
    slices of one pool of Gaussian numbers, so that it takes seconds without numpy."""
    stream = random.Random(1)
    pool = array.array("f", (stream.gauss(0, 1) for _ in range(1 << 16)))
    config = {"model_type": "gpt2", "n_layer": layers, "n_head": heads, "n_embd": width, "n_positions": context,
              "vocab_size": vocab, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump(config, file)
    sys.path.insert(0, util.ROOT)
    import convert_weights
    tensors = list(convert_weights.Config(os.path.join(folder, "config.json")).tensors())
    header, at = {}, 0
    for name, shape in tensors:
        size = 4 * util.count(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(os.path.join(folder, "model.safetensors"), "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in tensors:
            scale = 0.5 if name.endswith("bias") else 0.7 / shape[0] ** 0.5
            shift = 1.0 if ".ln" in name or "ln_" in name and name.endswith("weight") else 0.0
            piece = array.array("f", (shift + scale * x for x in pool)).tobytes()
            left, start = 4 * util.count(shape), 4 * stream.randrange(len(pool))
            while left:
                part = piece[start:start + left]
                file.write(part)
                left, start = left - len(part), 4 * stream.randrange(len(pool) // 2)
    for name in ("vocab.json", "merges.txt"):
        os.symlink(os.path.join(HERE, "vocab", name), os.path.join(folder, name))
    return folder


def driver(folder):
    path = os.path.join(folder, "bench_driver")
    subprocess.check_call([os.environ.get("CC", "cc"), "-std=gnu99", "-O2", "-fopenmp", "-w",
                           os.path.join(HERE, "bench_driver.c"), "-o", path, "-lm"])
    return path


def timed(argv, runs, timeout=3600):
    """(best wall seconds, peak resident bytes) of whole processes."""
    best, peak = 1e9, 0
    for _ in range(runs):
        started = time.time()
        child = subprocess.Popen([str(word) for word in argv], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        error = child.stderr.read()
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.time() - started
        if status:
            raise AssertionError("%s: status %d: %s" % (argv, status, error.decode()))
        best, peak = min(best, seconds), max(peak, usage.ru_maxrss * 1024)
    return best, peak


def stats_of(argv, folder):
    out = os.path.join(folder, "stats.json")
    subprocess.check_call([str(word) for word in argv] + ["--stats", "-o", out], stderr=subprocess.DEVNULL)
    with open(out) as file:
        return json.load(file)["stats"]


def transformer_lens(python, source, cells):
    """{sweep: seconds of a whole sweep}, {}: not installed."""
    done = subprocess.run([python, os.path.join(HERE, "bench_reference.py"), source, PROMPTS, str(cells)],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if done.returncode:
        print("TransformerLens: not measured (%s)" % (done.stderr.decode().strip().split("\n") or [""])[-1][:100])
        return {}
    return json.loads(done.stdout.decode().strip().split("\n")[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="no brute force, no TransformerLens, no long sweep")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cells", type=int, default=6, help="cells that TransformerLens is timed on")
    parser.add_argument("--model", help="a flat file of GPT-2 small instead of random weights")
    arguments = parser.parse_args()
    python = os.environ.get("PYTHON", sys.executable)
    with tempfile.TemporaryDirectory(prefix="actpatch-bench-") as folder:
        tool, program = driver(folder), util.binary()
        source = make_model(folder)
        model = arguments.model or util.convert(source, os.path.join(folder, "small.bin"))
        folded = os.path.join(folder, "folded.bin")
        util.must("fold", "-m", model, "-o", folded)

        def peak(threads):
            return float(subprocess.check_output([tool, "peak", "0.3", str(threads)]))

        print("FMA peak: %.0f GFLOP/s on one thread, %.0f on two" % (peak(1), peak(2)))
        print("\n| product, one thread | " + " | ".join("%d rows" % rows for rows in (1, 16, 120, 480, 1440)) + " |")
        print("|---|---|---|---|---|---|")
        for k, n in ((768, 768), (768, 3072), (3072, 768)):
            cells = []
            for rows in (1, 16, 120, 480, 1440):
                best = max(float(subprocess.check_output([tool, "gemm", str(rows), str(k), str(n), "0.2"]))
                           for _ in range(3))
                cells.append("%.0f (%.0f %%)" % (best, 100 * best / peak(1)))
            print("| %d x %d: GFLOP/s (of peak) | %s |" % (k, n, " | ".join(cells)))
        numpy_rows(python)
        reference = {} if arguments.quick else transformer_lens(python, source, arguments.cells)
        print("\n| sweep, notebook's 8 prompts | seconds | of peak | peak memory | brute force | TransformerLens | ratio |")
        print("|---|---|---|---|---|---|---|")
        rows = [(sweep, 2, model, PROMPTS, []) for sweep in SWEEPS]
        rows += [("resid_pre", 1, model, PROMPTS, []), ("resid_pre", 2, folded, PROMPTS, []),
                 ("resid_pre", 2, model, different(folder), []), ("resid_pre", 2, model, PROMPTS, ["--max-memory", "64M"])]
        if not arguments.quick:
            rows.append(("attn_head_by_pos_every", 2, model, PROMPTS, []))
        for sweep, threads, file, prompts, more in rows:
            argv = [program, "patch", prompts, "-m", file, "--sweep", sweep, "--threads", threads] + more
            runs = 1 if sweep == "attn_head_by_pos_every" else arguments.runs
            before = peak(threads)
            seconds, memory = timed(argv + ["-o", os.path.join(folder, "out.npy")], runs)
            fma = max(before, peak(threads))
            stats = stats_of(argv, folder)
            label = "%s, %d thread%s%s%s%s" % (sweep, threads, "s" * (threads > 1), ", folded file" * (file == folded),
                                             ", prompts differ everywhere" * (prompts != PROMPTS),
                                             ", " + " ".join(more) if more else "")
            theirs = reference.get(sweep if threads == 2 and prompts == PROMPTS else "", None)
            print("| %s | %.2f | %.0f %% | %.0f MB | %s | %s | %s |" % (
                label, seconds, 100 * stats["flops"] / seconds / 1e9 / fma, memory / 1e6,
                brute(argv, folder, tool) if not arguments.quick and sweep == "resid_pre" and threads == 2
                and file == model and prompts == PROMPTS and not more else "",
                "%.0f s" % theirs if theirs else "", "%.0f x" % (theirs / seconds) if theirs else ""), flush=True)
        extras(arguments, folder, tool, program, model, folded, reference)
        print("peak memory of the benchmark's children: %.0f MB" % (
            resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3))


def different(folder):
    """The notebook's prompts, corrupted so that they differ from the first token on."""
    columns, rows = util.read_tsv(PROMPTS)
    path = os.path.join(folder, "different.tsv")
    swap = {"When": "Then", "Then": "When"}
    return util.write_tsv(path, columns, [
        [row[0], " ".join(swap.get(word, word) for word in row[1].split(" "))] + row[2:] for row in rows])


def brute(argv, folder, tool):
    """Brute force, one layer's worth of it multiplied: a whole one takes minutes."""
    del tool
    columns, rows = util.read_tsv(PROMPTS)
    one = util.write_tsv(os.path.join(folder, "one.tsv"), columns, rows[:1])
    words = [one if word == PROMPTS else word for word in argv]
    seconds, _ = timed(words + ["--brute", "-o", os.path.join(folder, "brute.npy")], 1)
    return "%.0f s" % (seconds * len(rows))


def numpy_rows(python):
    """numpy's BLAS on the same products, where numpy is there."""
    code = ("import numpy as n,time\n"
            "for r in (1,16,120,480,1440):\n"
            "  a=n.random.rand(r,768).astype('f');b=n.random.rand(768,3072).astype('f');a@b\n"
            "  t=time.time();i=0\n"
            "  while time.time()-t<.3:\n"
            "    a@b;i+=1\n"
            "  print('%.0f'%(2e-9*r*768*3072*i/(time.time()-t)))\n")
    done = subprocess.run([python, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          env=dict(os.environ, OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1"))
    if done.returncode == 0:
        print("| numpy's BLAS, 768 x 3072 | %s |" % " | ".join(done.stdout.decode().split()))


def resume(argv, folder, pairs):
    """What the part file costs: the ratios of processor time with -o FILE to that with -o -, run in turn."""
    def seconds(out):
        child = subprocess.Popen([str(word) for word in argv] + ["-o", out], stdout=subprocess.DEVNULL,
                                 stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        if status:
            raise AssertionError("%s: status %d" % (argv, status))
        return usage.ru_utime + usage.ru_stime

    ratios = sorted(seconds(os.path.join(folder, "out.npy")) / seconds("-") for _ in range(pairs))
    return "median %.3f of %d pairs (%.3f to %.3f)" % (ratios[pairs // 2], pairs, ratios[0], ratios[-1])


def extras(arguments, folder, tool, program, model, folded, reference):
    def best(argv):
        seconds, memory = timed(argv, arguments.runs)
        return "%.3f s, %.0f MB" % (seconds, memory / 1e6)

    print("\none forward pass of 16 prompts (diff): %s" % best([program, "diff", PROMPTS, "-m", model]), end="")
    print("; TransformerLens %.2f s" % reference["forward"] if "forward" in reference else "")
    print("the same from a folded file: %s" % best([program, "diff", PROMPTS, "-m", folded]))
    print("loading alone (tokens): %s" % best([program, "tokens", "-m", model, "a"]))
    if "load" in reference:
        print("TransformerLens, import and load: %.1f s" % reference["load"])
    fact = util.write_tsv(os.path.join(folder, "fact.tsv"), ["prompt", "subject"], [[FACT, "France"]])
    print("trace, one fact of 8 tokens, three kinds: %s" % best([program, "trace", fact, "-m", model]), end="")
    print("; a plain loop over TransformerLens %.0f s" % reference["trace"] if "trace" in reference else "")
    print("report: %s" % best([program, "report", PROMPTS, "-m", model, "-o", os.path.join(folder, "report.html")]))
    print("processor time with FILE.part beside that without, block_every in 64M: %s" % resume(
        [program, "patch", PROMPTS, "-m", model, "--sweep", "block_every", "--threads", "1", "--max-memory", "64M"],
        folder, 2 * arguments.runs + 1))
    text = ("When John and Mary went to the shops, John gave the bag to Mary. " * 20000)[:1 << 20].encode()
    done = subprocess.run([tool, "tokens", model], input=text, stdout=subprocess.PIPE)
    print("tokenizing a megabyte: %s s" % done.stdout.decode().strip())


if __name__ == "__main__":
    main()
