# SPDX-License-Identifier: MIT
"""Fuzzing: what `make fuzz` calls. Ends with 'N passed, N failed, N skipped'.

    python3 tests/fuzz.py [--runs 20000] [TARGET...]

Targets are those of tests/fuzz_driver.c (model, text, glob, prompts, part, words), each under libFuzzer with
address and undefined-behaviour sanitizers, then under AFL++ (as TARGET-afl), and `converter`: files of
tests/convert with bytes changed, given to convert_weights.py. A target fails that crashes, hangs, leaks, or
allocates far beyond its file's needs; the input is kept in the folder that is named. A tool that is not
installed is a named skip. Slow targets take a share of the runs (SHARE), which the line states."""

import argparse
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time

TESTS = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, TESTS)
import util  # noqa: E402

TARGETS = ("model", "text", "glob", "prompts", "part", "words")
SHARE = {"prompts": 4, "part": 4, "words": 4, "converter": 10}
LIMITS = {"model": 1 << 17, "text": 4096, "glob": 300, "prompts": 1500, "part": 4096, "words": 600}
FLAGS = ["-std=gnu99", "-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined",
         "-fno-sanitize-recover=all"]
WORDS = ["info", "tokens\na b\n--no-bos", "top\nWhen John\n-k\n3\n--answer\n Mary", "diff\nprompts.tsv\n--metric\nkl",
         "cache\n--text\nHi\n--names\n*z,blocks.0.*\n-o\nc.safetensors", "heads\n--seed\n3", "lens\nprompts.tsv",
         "patch\nprompts.tsv\n--sweep\nresid_pre,attn_out\n--noising\n--normalize\n-o\nx.npy\n-o\nx.svg",
         "patch\nprompts.tsv\n--sweep=block_every\n--shard\n1/2\n-o\ny.npy\n--max-memory\n8M", "attn\nprompts.tsv\n"
         "--heads\n0.2,1.1\n--color\nalways", "path\nprompts.tsv\n--to\n1.0.q,2.1.v\n--freeze-mlps", "fold\n-o\nf.bin",
         "ablate\nprompts.tsv\n--site\nmlp_out\n--by\nmean", "trace\nfacts.tsv\n--window\n2\n--samples\n1", "-h"]
GLOBS = ["*\nhook_embed", "blocks.*.hook_[a-z]*_pre\nblocks.0.hook_resid_pre", "[!]]?*\nabc", "*a*b*c*d\naabbccdd", "[\n["]


def read(path):
    with open(path, "rb") as file:
        return file.read()


def write(path, data):
    with open(path, "wb") as file:
        file.write(data)


def seeds(target, folder):
    """Inputs to begin with, one file each."""
    os.makedirs(folder)
    inputs = []
    rows = read(os.path.join(util.TINY, "ioi.tsv")).split(b"\n")[:3]
    few = b"\n".join(rows) + b"\n"
    if target == "model":
        with tempfile.TemporaryDirectory() as scratch:
            for name in ("single", "odd"):
                source = os.path.join(util.GOLDEN, name)
                more = [] if os.path.exists(os.path.join(source, "merges.txt")) else ["--no-tokenizer"]
                path = util.convert(source, os.path.join(scratch, name + ".bin"), *more)
                util.must("fold", "-m", path, "-o", os.path.join(scratch, name + "-folded.bin"))
            for name in os.listdir(scratch):
                inputs.append(read(os.path.join(scratch, name)))
    elif target == "text":
        inputs = [few, "Größe 日本 \u202e 12'll\n\t  x".encode(), bytes(range(256)), b"<|endoftext|><|endof", b"a" * 300]
    elif target == "glob":
        inputs = [glob.encode() for glob in GLOBS]
    elif target == "words":
        inputs = [words.encode() for words in WORDS]
    elif target == "prompts":
        facts = read(os.path.join(util.TINY, "facts.tsv")).split(b"\n")[:3]
        inputs = [bytes([i]) + (b"\n".join(facts) + b"\n" if i == 3 else few) for i in range(8)]
        inputs.append(b"\x04clean\tanswer\twrong\tg\tp\nWhen John\t Mary\t John\tx\t1\nWhen Mary\t John\t Mary\ty\t\n")
        inputs.append(b"\x00clean_ids\tcorrupted_ids\tanswer_id\twrong_id\n1 2 3\t1 2 4\t5\t6\n")
    else:
        with tempfile.TemporaryDirectory() as scratch:
            prompts = os.path.join(scratch, "p.tsv")
            write(prompts, few)
            for i, words in enumerate((["resid_pre"], ["attn_out,mlp_out", "--noising", "--per-prompt"])):
                out = os.path.join(scratch, "%d.npy" % i)
                util.must("patch", prompts, "--sweep", words[0], "--shard", "1/2", "-o", out, *words[1:])
                inputs.append(read(out + ".part"))
    for i, data in enumerate(inputs):
        write(os.path.join(folder, "seed%d" % i), data)
    return folder


def around(folder):
    """What lies beside the inputs in the folder that a target runs in."""
    lines = read(os.path.join(util.TINY, "ioi.tsv")).split(b"\n")
    write(os.path.join(folder, "prompts.tsv"), b"\n".join(lines[:3]) + b"\n")
    shutil.copy(os.path.join(util.TINY, "facts.tsv"), folder)


def environment(target):
    return dict(os.environ, FUZZ_TARGET=target, FUZZ_MODEL=util.TINY_MODEL, OMP_NUM_THREADS="1", AFL_SKIP_CPUFREQ="1",
                AFL_I_DONT_CARE_ABOUT_MISSING_CRASHES="1", AFL_NO_UI="1", AFL_NO_AFFINITY="1",
                ASAN_OPTIONS="detect_leaks=1:abort_on_error=1:symbolize=0:allocator_may_return_null=1")


def build(compiler, out, more):
    source = os.path.join(TESTS, "fuzz_driver.c")
    done = subprocess.run([compiler] + FLAGS + more + [source, "-o", out, "-lm"], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env=dict(os.environ, AFL_QUIET="1"))
    if done.returncode:
        raise RuntimeError(done.stdout.decode("utf-8", "replace")[-2000:])
    return out


def libfuzzer(binary, target, runs, folder):
    """(ok, what came out)"""
    os.makedirs(os.path.join(folder, "run"))
    around(os.path.join(folder, "run"))
    seed_folder = seeds(target, os.path.join(folder, "seeds"))
    done = subprocess.run(
        [binary, "-runs=%d" % runs, "-seed=1", "-max_len=%d" % LIMITS[target], "-timeout=20", "-rss_limit_mb=1500",
         "-artifact_prefix=%s/" % folder, "-verbosity=1", "-print_final_stats=1", seed_folder],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=os.path.join(folder, "run"), env=environment(target))
    text = done.stdout.decode("utf-8", "replace")
    edges = re.findall(r"cov: (\d+)", text)
    return done.returncode == 0, "%s edges" % (edges[-1] if edges else "?") if done.returncode == 0 else text[-1500:]


def afl(binary, target, runs, folder):
    os.makedirs(os.path.join(folder, "run"))
    around(os.path.join(folder, "run"))
    seed_folder = seeds(target, os.path.join(folder, "seeds"))
    done = subprocess.run(["afl-fuzz", "-i", seed_folder, "-o", os.path.join(folder, "out"), "-E", str(runs), "-t", "5000+",
                           "-m", "none", "--", binary], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          cwd=os.path.join(folder, "run"), env=environment(target))
    stats = os.path.join(folder, "out", "default", "fuzzer_stats")
    if done.returncode or not os.path.exists(stats):
        return False, done.stdout.decode("utf-8", "replace")[-1500:]
    found = dict(re.findall(r"(\w+)\s*: (\S+)", read(stats).decode()))
    faults = int(found.get("saved_crashes", 0)) + int(found.get("saved_hangs", 0))
    return faults == 0, "%s execs, %s edges, %s crashes, %s hangs" % (
        found.get("execs_done"), found.get("edges_found"), found.get("saved_crashes"), found.get("saved_hangs"))


# ---- the converter -------------------------------------------------------------------------------------


def mutated(choice, data):
    """One to four changes: a byte, a bit, a cut, a piece said twice or taken out, another number."""
    data = bytearray(data)
    for _ in range(choice.randint(1, 4)):
        if not data:
            break
        at, how = choice.randrange(len(data)), choice.randrange(6)
        if choice.random() < 0.5:  # heads and JSON stand at the front, a zip's directory at the end
            at = min(at, choice.randrange(2000)) if choice.random() < 0.5 else max(0, len(data) - 1 - choice.randrange(400))
        if how == 0:
            data[at] = choice.randrange(256)
        elif how == 1:
            data[at] ^= 1 << choice.randrange(8)
        elif how == 2:
            del data[at:]
        elif how == 3:
            data[at:at] = data[at:at + choice.randrange(1, 40)]
        elif how == 4:
            del data[at:at + choice.randrange(1, 40)]
        else:
            data[at:at] = choice.choice((b"-1", b"99999999999", b"0", b"null", b'"', b"{", b"[", b"1e9", b"\x80\xff"))
    return bytes(data)


def converter(runs, folder):
    """Every end is status 0 or 1 with one line on stderr; no other exception, in bounded memory and time."""
    import contextlib
    import io
    sys.path.insert(0, util.ROOT)
    import convert_weights
    fixtures = sorted(name for name in os.listdir(os.path.join(TESTS, "convert"))
                      if os.path.isdir(os.path.join(TESTS, "convert", name)))
    choice, kept, ended = random.Random(1), resource.getrlimit(resource.RLIMIT_AS), [0, 0]
    resource.setrlimit(resource.RLIMIT_AS, (1 << 31, kept[1]))

    def too_long(*_):
        raise RuntimeError("it takes longer than 20 s")
    signal.signal(signal.SIGALRM, too_long)
    try:
        for run in range(runs):
            source = os.path.join(TESTS, "convert", choice.choice(fixtures))
            work = os.path.join(folder, "case")
            shutil.copytree(source, work)
            shared = os.path.join(TESTS, "convert", "tokenizer")
            for name in os.listdir(shared):
                if os.path.isfile(os.path.join(shared, name)) and not os.path.exists(os.path.join(work, name)):
                    shutil.copy(os.path.join(shared, name), work)
            path = os.path.join(work, choice.choice(sorted(n for n in os.listdir(work) if os.path.isfile(os.path.join(work, n)))))
            write(path, mutated(choice, read(path)))
            said = io.StringIO()
            signal.alarm(20)
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
                status = convert_weights.main([work, "-o", os.path.join(folder, "out.bin")])
            signal.alarm(0)
            left = [n for n in os.listdir(folder) if n not in ("case", "out.bin")]
            if status not in (0, 1) or (status == 1 and said.getvalue().count("\n") != 1) or left:
                return False, "run %d: status %r, %r, left %r; kept in %s" % (run, status, said.getvalue(), left, work)
            ended[status] += 1
            shutil.rmtree(work)
        return True, "%d converted, %d refused" % tuple(ended)
    except Exception as error:  # noqa: BLE001: whatever it is, it is the finding
        return False, "run %d, %s: %r; kept in %s" % (run, os.path.basename(path), error, folder)
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, kept)


def has(program, *more):
    if shutil.which(program) is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "x.c")
        write(source, b"#include <stddef.h>\nint LLVMFuzzerTestOneInput(const unsigned char *d, size_t n);\n"
                      b"int LLVMFuzzerTestOneInput(const unsigned char *d, size_t n) { return d && n > 9 ? 0 : 0; }\n")
        return subprocess.run([program, "-fsanitize=fuzzer"] + list(more) + [source, "-o", os.path.join(folder, "x")],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=20000)
    parser.add_argument("targets", nargs="*")
    options = parser.parse_args()
    every = list(TARGETS) + [t + "-afl" for t in TARGETS] + ["converter"]
    chosen = options.targets or every
    for name in chosen:
        if name not in every:
            parser.error("unknown target %s; choose of %s" % (name, " ".join(every)))
    passed = failed = skipped = 0
    folder = tempfile.mkdtemp(prefix="actpatch-fuzz-")
    tools = {"": ("clang", has("clang"), ["-fsanitize=fuzzer"]),
             "-afl": ("afl-clang-fast", has("afl-clang-fast") and shutil.which("afl-fuzz") is not None, ["-fsanitize=fuzzer"])}
    built = {}
    for name in chosen:
        target, kind = name.replace("-afl", ""), "-afl" if name.endswith("-afl") else ""
        runs = max(1, options.runs // SHARE.get(target, 1) // (10 if kind else 1))
        work = os.path.join(folder, name)
        os.makedirs(work)
        started = time.time()
        if name == "converter":
            ok, text = converter(runs, work)
        elif not tools[kind][1]:
            print("skipped: %s: %s with -fsanitize=fuzzer is not installed" % (name, tools[kind][0]), flush=True)
            skipped += 1
            continue
        else:
            if kind not in built:
                built[kind] = build(tools[kind][0], os.path.join(folder, "fuzz" + kind), tools[kind][2])
            ok, text = (afl if kind else libfuzzer)(built[kind], target, runs, work)
        passed, failed = passed + ok, failed + (not ok)
        print("%-8s %-12s %8d runs %5.0f s  %s" % ("ok" if ok else "FAILED:", name, runs, time.time() - started, text),
              flush=True)
        if ok:
            shutil.rmtree(work)
    if failed:
        print("inputs are kept in %s" % folder)
    else:
        shutil.rmtree(folder)
    print("%d passed, %d failed, %d skipped" % (passed, failed, skipped))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
