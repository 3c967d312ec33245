# SPDX-License-Identifier: MIT
"""The program beside TransformerLens itself, on models made on the spot: GPT-2 small's shape, then a
series of random configurations that no golden file contains.

    python tests/reference.py [--seed N] [--fuzz N] [--small | --no-small]

Run by `make test-reference`. Needs numpy, torch 2.13, transformers < 5 and transformer-lens 2.18; where
they are missing it says so and exits with 77. --seed repeats a run whose seed was printed; --fuzz is the
number of random models; --small does GPT-2 small alone, --no-small leaves it out.

The bound is the golden tests': per tensor, max|ours - f64| <= 2 max|TL32 - f64| + 2^-22 max|f64|,
infinities equal, where a tensor of fewer than 32 numbers takes TransformerLens's worst relative error
over its kin (the hook's other layers, the other numbers of the same metric): one number can be right by
luck."""

import argparse
import os
import random
import shutil
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
import util  # noqa: E402

try:
    import numpy as np
    import pandas
    import torch
    import transformers
    import make_golden as reference
except ImportError as missing:
    print("reference: skipped, %s (needs torch, transformers and transformer-lens; set PYTHON)" % missing)
    print("0 passed, 0 failed, 1 skipped")
    sys.exit(77)


class Report:
    """Counts what passed and failed, and the worst errors of each group."""

    def __init__(self):
        self.passed = self.failed = self.compared = self.below = 0
        self.worst = {}

    def compare(self, group, what, got, f64, f32, kin=0.0):
        """One tensor against the bound; kin: TransformerLens's relative error elsewhere."""
        got = np.asarray(got, np.float64).reshape(-1)
        f64, f32 = (np.asarray(values, np.float64).reshape(-1) for values in (f64, f32))
        theirs, scale = util.worst(f32, f64)
        fair = max(theirs, kin * scale) if len(f64) < 32 else theirs
        if len(got) != len(f64):
            return self.fail("%s: %d values, not %d" % (what, len(got), len(f64)))
        ours, _ = util.worst(got, f64)
        bound = 2 * fair + 2.0 ** -22 * scale
        if not ours <= bound:
            return self.fail("%s: off by %.3g; TransformerLens in float32 by %.3g, bound %.3g" % (
                what, ours, theirs, bound))
        self.passed += 1
        self.compared += 1
        self.below += ours <= theirs
        a, b, c = self.worst.get(group, (0.0, 0.0, 0.0))
        self.worst[group] = max(a, ours), max(b, theirs), max(c, scale)
        return True

    def fail(self, what):
        self.failed += 1
        print("FAILED: " + what, flush=True)
        return False

    def equal(self, what, got, want):
        if got == want:
            self.passed += 1
        else:
            self.fail("%s: %r, not %r" % (what, got, want))

    def print_groups(self):
        for group, (ours, theirs, scale) in self.worst.items():
            print("  %-34s ours %.3g, TransformerLens in float32 %.3g (numbers up to %.4g)" % (
                group, ours, theirs, scale), flush=True)
        self.worst = {}


def relative(pairs):
    """TransformerLens's worst relative error over pairs (f64, f32) of tensors."""
    worst = 0.0
    for f64, f32 in pairs:
        error, scale = util.worst(np.asarray(f32, np.float64).reshape(-1), np.asarray(f64).reshape(-1))
        worst = max(worst, error / scale if scale else 0.0)
    return worst


def note(text):
    print("reference: " + text, flush=True)


# ---- GPT-2 small's shape -------------------------------------------------------------------------------


def small(report, folder, seed):
    started = time.time()
    source_folder = os.path.join(folder, "small")
    reference.lively(seed, source_folder)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(os.path.join(HERE, "vocab", name), source_folder)
    model = util.convert(source_folder, os.path.join(folder, "small.bin"))
    source = reference.hugging_face(source_folder)
    tokenizer = transformers.GPT2TokenizerFast(
        vocab_file=os.path.join(source_folder, "vocab.json"),
        merges_file=os.path.join(source_folder, "merges.txt"))
    note("GPT-2 small's shape, random weights of seed %d: made and converted in %.0f s" % (
        seed, time.time() - started))
    for processing in (reference.DEFAULT, reference.REFACTORED, reference.NONE):
        words = reference.options(processing)
        pair = [reference.hooked(source, dtype, processing) for dtype in (torch.float64, torch.float32)]
        for file in ("ioi.tsv", "ioi-notebook.tsv") if processing is reference.DEFAULT else ("ioi.tsv",):
            tsv = os.path.join(reference.TINY, file)
            label = " ".join([file] + words)
            small_diff_and_cache(report, folder, model, pair, tsv, tokenizer, words, label)
            if file == "ioi.tsv" and processing is not reference.NONE:
                cells = 20 if processing is reference.DEFAULT else 5
                small_sweeps(report, folder, model, pair, tsv, tokenizer, words, label, cells, seed)
        del pair
    report.print_groups()


def small_examples(tsv, tokenizer):
    columns, rows = util.read_tsv(tsv)
    rows = [dict(zip(columns, row)) for row in rows]
    ids = lambda role: torch.tensor([  # noqa: E731
        ([50256] if role in ("clean", "corrupted") else []) + tokenizer(row[role])["input_ids"]
        for row in rows])
    return {role: ids(role) for role in ("clean", "corrupted", "answer", "wrong")}


def logit_diff(logits, ids):
    final = logits[:, -1]
    return (final.gather(1, ids["answer"]) - final.gather(1, ids["wrong"]))[:, 0]


def small_diff_and_cache(report, folder, model, pair, tsv, tokenizer, words, label):
    ids = small_examples(tsv, tokenizer)
    output = os.path.join(folder, "small.npy")
    util.must("diff", tsv, "-m", model, "-o", output, *words)
    sides = []
    for reference_model in pair:
        with reference.default_dtype(reference_model.cfg.dtype):
            sides.append(torch.stack([logit_diff(reference_model(ids[side]), ids)
                                      for side in ("clean", "corrupted")], 1).numpy())
    kin = relative([sides])
    report.compare("logit differences", "diff " + label, util.read_npy(output).data, *sides, kin)
    names = ("hook_embed,blocks.0.hook_resid_mid,blocks.0.attn.*,blocks.5.*,blocks.11.hook_*,"
             "blocks.11.mlp.hook_post,ln_final.*")
    if any("refactor" in word for word in words):  # singular vectors have free signs
        names = "blocks.0.attn.hook_pattern,blocks.5.hook_*,blocks.11.*.hook_pattern,ln_final.*"
    output = os.path.join(folder, "small.safetensors")
    util.must("cache", tsv, "-m", model, "--names", names, "-o", output, *words)
    tensors, _ = util.read_safetensors(output)
    report.equal("tokens " + label, list(tensors.pop("tokens").data), ids["clean"].reshape(-1).tolist())
    caches = []
    for reference_model in pair:
        with reference.default_dtype(reference_model.cfg.dtype):
            logits, cache = reference_model.run_with_cache(
                ids["clean"], names_filter=lambda hook: hook in tensors)
            caches.append(dict(cache.items(), logits=logits))
    for hook, got in tensors.items():
        report.equal("shape of %s %s" % (hook, label), got.shape, tuple(caches[0][hook].shape))
        report.compare("hook points" if hook != "logits" else "logits", "%s %s" % (hook, label), got.data,
                       *(cache[hook].numpy() for cache in caches))


def small_sweeps(report, folder, model, pair, tsv, tokenizer, words, label, cells, seed):
    ids = small_examples(tsv, tokenizer)
    choice = random.Random(seed)
    output = os.path.join(folder, "sweep.npy")
    for sweep, hook, setter, columns, sizes in (
            ("resid_pre", "resid_pre", reference.patching.layer_pos_patch_setter, ["layer", "pos"],
             [12, ids["clean"].shape[1]]),
            ("attn_head_out_all_pos", "z", reference.patching.layer_head_vector_patch_setter,
             ["layer", "head"], [12, 12])):
        first = 10 if sweep == "resid_pre" else 0  # positions before the first difference are trivial
        picked = [[choice.randrange(sizes[0]), choice.randrange(first, sizes[1])] for _ in range(cells)]
        util.must("patch", tsv, "-m", model, "--sweep", sweep, "-o", output, *words)
        got = util.read_npy(output)
        report.equal("shape of %s %s" % (sweep, label), got.shape, tuple(sizes))
        values = []
        for reference_model in pair:
            with reference.default_dtype(reference_model.cfg.dtype):
                _, cache = reference_model.run_with_cache(
                    ids["clean"], names_filter=lambda name: name.endswith("hook_" + hook))
                values.append(reference.patching.generic_activation_patch(
                    reference_model, ids["corrupted"], cache,
                    lambda logits: logit_diff(logits, ids).mean(), setter, hook,
                    index_df=pandas.DataFrame(picked, columns=columns)).numpy())
        report.compare("sweep " + sweep, "%s %s" % (sweep, label),
                       [got.data[i * sizes[1] + j] for i, j in picked], *values, relative([values]))


# ---- models that no golden contains --------------------------------------------------------------------


def random_settings(choice):
    heads = choice.randint(1, 5)
    head = choice.choice([1, 2, 3, 4, 7, 8, 13, 16, 20])
    while heads * head < 6:
        heads, head = choice.randint(1, 5), choice.randint(2, 20)
    settings = dict(
        n_layer=choice.randint(1, 4), n_head=heads, n_embd=heads * head,
        n_inner=choice.choice([None, choice.randint(1, 150)]), n_positions=choice.randint(4, 20),
        vocab_size=choice.randint(5, 300), layer_norm_epsilon=choice.choice([1e-6, 1e-5, 1e-3, 0.1]),
        activation_function=choice.choice(["gelu_new", "gelu_new", "gelu", "relu", "gelu_pytorch_tanh"]),
        scale_attn_by_inverse_layer_idx=choice.random() < 0.3,
        tie_word_embeddings=choice.random() < 0.7)
    processing = {step: choice.random() < 0.6 for step in reference.STEPS}
    if choice.random() < 0.3:
        processing = dict(reference.DEFAULT)
    return settings, processing


def random_examples(choice, settings):
    n = choice.randint(1, 4)
    length = choice.randint(1, min(settings["n_positions"], 9))
    n = max(n, -(-6 // length))
    token = lambda: choice.randrange(settings["vocab_size"])  # noqa: E731
    examples = []
    for _ in range(n):
        clean = [token() for _ in range(length)]
        corrupted = [token() if choice.random() < 0.4 else old for old in clean]
        if choice.random() < 0.5 and examples:  # beginnings in common
            clean[:length // 2] = examples[0][0][:length // 2]
            corrupted[:length // 2] = clean[:length // 2]
        answer, wrong = choice.sample(range(settings["vocab_size"]), 2)
        examples.append((clean, corrupted, answer, wrong))
    return examples


def fuzz_one(report, folder, seed):
    """A random model, processing and task: its whole cache, its differences and some sweeps."""
    choice = random.Random(seed)
    settings, processing = random_settings(choice)
    examples = random_examples(choice, settings)
    words = reference.options(processing)
    label = "(seed %d: %s; %s; %d prompts of %d tokens)" % (
        seed, settings, " ".join(words), len(examples), len(examples[0][0]))
    source_folder = os.path.join(folder, "fuzz")
    shutil.rmtree(source_folder, ignore_errors=True)
    reference.lively(seed % 2 ** 32, source_folder, scale=choice.choice([0.5, 1.0, 1.5]), **settings)
    model = util.convert(source_folder, os.path.join(folder, "fuzz.bin"), "--no-tokenizer")
    tsv = os.path.join(folder, "fuzz.tsv")
    reference.write_examples(tsv, examples)
    source = reference.hugging_face(source_folder)
    f64, f32 = (reference.Task(reference.hooked(source, dtype, processing), examples)
                for dtype in (torch.float64, torch.float32))
    fuzz_cache(report, folder, model, tsv, words, processing, label, f64, f32)
    fuzz_values(report, folder, model, tsv, words, label, f64, f32, choice)


def fuzz_cache(report, folder, model, tsv, words, processing, label, f64, f32):
    output = os.path.join(folder, "fuzz.safetensors")
    util.must("cache", tsv, "-m", model, "--names", "*,*hook_result", "-o", output, *words)
    got, _ = util.read_safetensors(output)
    want, single = (reference.run(task.model, task.clean) for task in (f64, f32))
    report.equal("names " + label, sorted(got), sorted(list(want) + ["tokens"]))
    for hook in want:
        ending = hook.split(".")[-1]
        refactored = processing["refactor_factored_attn_matrices"]
        if hook not in got or refactored and ending in ("hook_q", "hook_k", "hook_v", "hook_z"):
            continue  # singular vectors have free signs
        kin = relative([(want[name], single[name]) for name in want if name.endswith(ending)])
        report.equal("shape of %s %s" % (hook, label), got[hook].shape, want[hook].shape)
        report.compare("hook points" if hook != "logits" else "logits", "%s %s" % (hook, label),
                       got[hook].data, want[hook], single[hook], kin)


def fuzz_values(report, folder, model, tsv, words, label, f64, f32, choice):
    both = [np.stack([task.baseline[side]["logit_diff"].numpy() for side in ("clean", "corrupted")], 1)
            for task in (f64, f32)]
    output = os.path.join(folder, "fuzz.npy")
    util.must("diff", tsv, "-m", model, "-o", output, *words)
    kin = relative([(f64.baseline[side]["logit"].numpy(), f32.baseline[side]["logit"].numpy())
                    for side in ("clean", "corrupted")] + [both])
    report.compare("logit differences", "diff " + label, util.read_npy(output).data, *both, kin)
    for sweep in choice.sample(sorted(reference.SWEEPS), 3):
        direction = choice.choice(["denoising", "noising"])
        metric = choice.choice(["logit_diff", "logit", "prob", "logprob", "kl"])
        more = ["--noising"] * (direction == "noising")
        util.must("patch", tsv, "-m", model, "--sweep", sweep, "--metric", metric, "--per-prompt", "-o",
                  output, *(words + more))
        want, single = (task.sweep(sweep, direction)[metric] for task in (f64, f32))
        got = util.read_npy(output)
        what = "%s %s %s %s" % (sweep, direction, metric, label)
        report.equal("shape of " + what, got.shape, want.shape)
        report.compare("sweeps, " + metric, what, got.data, want, single,
                       max(kin, relative([(want, single)])))


def fuzz(report, folder, seed, n):
    note("%d random models from seed %d" % (n, seed))
    for i in range(n):
        try:
            fuzz_one(report, folder, seed + i)
        except AssertionError as problem:
            report.fail("seed %d: %s" % (seed + i, problem))
    report.print_groups()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10 ** 6))
    parser.add_argument("--fuzz", type=int, default=20)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--no-small", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    report, started = Report(), time.time()
    with util.scratch() as folder:
        if not arguments.small:
            fuzz(report, folder, arguments.seed, arguments.fuzz)
        if not arguments.no_small:
            try:
                small(report, folder, arguments.seed)
            except AssertionError as problem:
                report.fail("GPT-2 small's shape, seed %d: %s" % (arguments.seed, problem))
    note("%d of %d accepted tensors at or below TransformerLens's own float32 error; %.0f s" % (
        report.below, report.compared, time.time() - started))
    print("%d passed, %d failed, 0 skipped" % (report.passed, report.failed))
    return 1 if report.failed or not report.passed else 0


if __name__ == "__main__":
    sys.exit(main())
