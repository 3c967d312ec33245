# SPDX-License-Identifier: MIT
"""Every number of the golden files: activations, logits, metrics and sweeps equal TransformerLens's.

tests/golden/*.safetensors.gz come from make_golden.py, whose head describes them: TransformerLens in
double, and by how much TransformerLens in single misses each tensor. The bound, per tensor:

    max|ours - f64| <= 2 max|TL32 - f64| + 2^-22 max|f64|,  infinities equal.

Then identities that need no reference: what patching must give whatever the weights are."""

import itertools
import json
import os
import struct
import sys
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import util  # noqa: E402

MODELS = ("odd", "gelu", "relu", "scaled", "untied", "single", "tiny")
METRICS = ("logit_diff", "logit", "prob", "logprob", "kl", "rank")
BY_POS = ["attn_head_%s_by_pos" % kind for kind in ("out", "q", "k", "v", "pattern")]
ALL_POS = ["attn_head_%s_all_pos" % kind for kind in ("out", "q", "k", "v", "pattern")]
BLOCK = ["resid_pre", "attn_out", "mlp_out"]
DEST_SRC = "attn_head_pattern_dest_src_pos"
SINGLE = ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"] + BY_POS + ALL_POS
EVERY = {"attn_head_by_pos_every": BY_POS, "attn_head_all_pos_every": ALL_POS, "block_every": BLOCK}
ALL = SINGLE + list(EVERY)  # what `--sweep all` means

folder = None  # temporary, of the whole module
flat_files = {}
compared = []  # (error / TransformerLens's error, error / bound, key) of every tensor


def setUpModule():
    global folder
    folder = util.scratch()


def tearDownModule():
    folder.cleanup()
    if compared:
        ratio, _, where = max(compared)
        share, place = max((share, key) for _, share, key in compared)
        below = sum(ratio <= 1 for ratio, _, _ in compared)
        print("golden: %d tensors compared; %d at or below float32 TransformerLens's own error; worst "
              "%.2f times it (%s); worst %.2f of the bound (%s)" % (
                  len(compared), below, ratio, where, share, place), flush=True)


def at(name):
    return os.path.join(folder.name, name)


def flat_file(name):
    """The model's flat file, converted once a run; the weights stay float32, exactly as they were."""
    if name not in flat_files:
        source = util.TINY if name == "tiny" else os.path.join(util.GOLDEN, name)
        words = [] if name == "tiny" else ["--no-tokenizer"]
        flat_files[name] = util.convert(source, at(name + ".bin"), *words)
    return flat_files[name]


def prompts(name, n=None):
    """The prompts file of a model, or one with the first n examples."""
    path = (os.path.join(util.TINY, "ioi.tsv") if name == "tiny"
            else os.path.join(util.GOLDEN, name, "prompts.tsv"))
    if n is None:
        return path
    columns, rows = util.read_tsv(path)
    return util.write_tsv(at("%s-%d.tsv" % (name, n)), columns, rows[:n])


def patch(model, tsv, sweeps, *words):
    """{sweep: path of its .npy} from one call of `patch`."""
    stem = at("patch")
    for old in os.listdir(folder.name):
        if old.startswith("patch"):
            os.remove(at(old))
    util.must("patch", tsv, "-m", model, "--sweep", ",".join(sweeps), "-o", stem + ".npy", *words)
    if len(sweeps) == 1:
        return {sweeps[0]: stem + ".npy"}
    return {sweep: "%s-%s.npy" % (stem, sweep) for sweep in sweeps}


def tables(model, tsv, sweeps, *words):
    """{sweep: Tensor} from one call of `patch`."""
    return {sweep: util.read_npy(path)
            for sweep, path in patch(model, tsv, sweeps, *words).items()}


def contents(paths):
    """{sweep: the file's bytes}."""
    found = {}
    for sweep, path in paths.items():
        with open(path, "rb") as file:
            found[sweep] = file.read()
    return found


def baselines(model, tsv, *words):
    """[(clean, corrupted)] of every example, from `diff`."""
    util.must("diff", tsv, "-m", model, "-o", at("diff.npy"), *words)
    data = util.read_npy(at("diff.npy")).data
    return list(zip(data[0::2], data[1::2]))


class Golden:
    """One golden file: tensors by key, aliases resolved."""

    def __init__(self, name):
        self.name = name
        self.tensors, self.metadata = util.read_safetensors(
            os.path.join(util.GOLDEN, name + ".safetensors.gz"))
        self.keys = sorted(set(self.tensors) | {
            key[5:] for key in self.metadata if key.startswith("same:")})
        self.variants = sorted(key[6:] for key in self.metadata if key.startswith("flags:"))
        self.cache_examples = int(self.metadata["cache_examples"])

    def flags(self, variant):
        return self.metadata["flags:" + variant].split()

    def get(self, key):
        return self.tensors[self.metadata.get("same:" + key, key)]

    def error(self, key, kind="err32"):
        """TransformerLens's own, in float32. A few numbers can all be right by luck, so a tensor of fewer
        than 100 different ones (most cells of a sweep repeat the baseline) takes the worst of its kin: the
        hook's other layers, the variant's other sweeps and `diff` by the same metric."""
        if len(set(self.get(key).data)) >= 100 or "/final_" in key:
            return float(self.metadata["%s:%s" % (kind, key)])
        return max(float(value) for name, value in self.metadata.items()
                   if name.startswith(kind + ":") and self.kin(name.split(":")[1]) == self.kin(key))

    @staticmethod
    def kin(key):
        parts = key.split("/")
        if parts[1].startswith("cache"):
            return parts[0], parts[1], parts[2].split(".")[-1]
        return parts[0], "logit_diff" if parts[1] == "diff" else parts[2] if len(parts) == 4 else ""

    def under(self, prefix):
        return [key[len(prefix):] for key in self.keys if key.startswith(prefix)]

    def sweeps(self, variant):
        """{(direction, metric): [sweep]} of what the file holds."""
        found = {}
        for direction in ("denoising", "noising"):
            for rest in self.under("%s/%s/" % (variant, direction)):
                metric, sweep = rest.split("/")
                found.setdefault((direction, metric), []).append(sweep)
        return found


class Case(unittest.TestCase):
    def compare(self, key, got, want, error32):
        """One tensor against the bound; a failure names it and the others are still compared."""
        with self.subTest(tensor=key):
            self.assertEqual(got.shape, want.shape, key)
            self.assertEqual(got.data.typecode, "f", key)
            error, scale = util.worst(got.data, want.data)
            bound = 2 * error32 + 2.0 ** -22 * scale
            ok = error <= bound
            self.assertTrue(ok, "%s: off by %.3g; TransformerLens in float32 by %.3g, bound %.3g" % (
                key, error, error32, bound))
            compared.append((error / error32 if error32 else 0.0 if error == 0 else float("inf"),
                             error / bound if bound else 0.0, key))

    def assert_cells(self, got, want, what):
        """Every value is one number, to the bit."""
        ok = bool(got) and all(value == want for value in got)
        self.assertTrue(ok, "%s: %r, not %r" % (what, sorted(set(got))[:4], want))


# ---- TransformerLens's numbers ------------------------------------------------------------------------


class Cache(Case):
    """`cache` gives run_with_cache's tensors: names, shapes and values."""

    def check(self, golden, variant, *words):
        tsv = prompts(golden.name, golden.cache_examples)
        wanted = golden.under(variant + "/cache/")
        full = any(hook.endswith("hook_result") for hook in wanted)
        names = "*,blocks.*.attn.hook_result" if full else ",".join(
            hook for hook in wanted if hook != "logits")
        output = at("cache.safetensors")
        util.must("cache", tsv, "-m", flat_file(golden.name), "--names", names, "-o", output,
                  *(golden.flags(variant) + list(words)))
        tensors, _ = util.read_safetensors(output)
        self.assertEqual(set(tensors), set(wanted) | {"tokens", "logits"})
        for hook in wanted:
            key = "%s/cache/%s" % (variant, hook)
            self.compare_rows(golden, key, tensors[hook])
        self.assert_tokens(golden, "tokens", tensors["tokens"])

        hooks = [hook for hook in golden.under(variant + "/cache-corrupted/") if hook != "logits"]
        util.must("cache", tsv, "-m", flat_file(golden.name), "--run", "corrupted", "--names",
                  ",".join(hooks), "-o", output, *(golden.flags(variant) + list(words)))
        tensors, _ = util.read_safetensors(output)
        for hook in hooks + ["logits"]:
            self.compare_rows(golden, "%s/cache-corrupted/%s" % (variant, hook), tensors[hook])
        self.assert_tokens(golden, "tokens-corrupted", tensors["tokens"])

    def compare_rows(self, golden, key, got):
        rows = golden.metadata.get("rows:" + key)
        if rows is not None:
            axis = 2 if key.endswith(("scores", "pattern")) else 1
            got = util.take(got, axis, [int(row) for row in rows.split()])
        self.compare("%s/%s" % (golden.name, key), got, golden.get(key), golden.error(key))

    def assert_tokens(self, golden, key, got):
        want = golden.get(key)
        n = golden.cache_examples
        self.assertEqual(got.shape, (n,) + want.shape[1:])
        self.assertEqual(list(got.data), list(want.data[:len(got.data)]))


class Diff(Case):
    """`diff` gives every example's logit differences and their means."""

    def check(self, golden, variant, *words):
        words = golden.flags(variant) + list(words)
        key = variant + "/diff"
        util.must("diff", prompts(golden.name), "-m", flat_file(golden.name), "-o", at("d.npy"),
                  "-o", at("d.json"), *words)
        got, want = util.read_npy(at("d.npy")), golden.get(key)
        name = "%s/%s" % (golden.name, key)
        self.compare(name, got, want, golden.error(key))
        with open(at("d.json"), encoding="utf-8") as file:
            found = json.load(file)
        self.assertEqual(len(found["examples"]), want.shape[0])
        means = util.Tensor((2,), util.array.array("f", [found["clean"], found["corrupted"]]))
        self.compare(name + " mean", means, util.mean(want), golden.error(key, "mean32"))


class Sweeps(Case):
    """`patch` gives TransformerLens's sweeps: each example's values, their means, and *_every."""

    def check(self, golden, variant, *words):
        words = golden.flags(variant) + list(words)
        for (direction, metric), sweeps in golden.sweeps(variant).items():
            prefix = "%s/%s/%s/" % (variant, direction, metric)
            every = [name for name, parts in EVERY.items() if set(parts) <= set(sweeps)]
            more = ["--metric", metric] + ["--noising"] * (direction == "noising")
            arguments = [flat_file(golden.name), prompts(golden.name), sweeps + every] + words + more
            got = tables(*(arguments + ["--per-prompt"]))
            mean = tables(*arguments)
            for sweep in sweeps + every:
                want, error, error_of_mean = self.wanted(golden, prefix, sweep)
                name = "%s/%s%s" % (golden.name, prefix, sweep)
                self.compare(name, got[sweep], want, error)
                self.compare(name + " mean", mean[sweep], util.mean(want), error_of_mean)

    def wanted(self, golden, prefix, sweep):
        """The golden tensor and TransformerLens's errors; *_every are the single sweeps stacked."""
        parts = EVERY.get(sweep, [sweep])
        tensors = [golden.get(prefix + part) for part in parts]
        if sweep == "attn_head_by_pos_every":  # [B,layer,head,dest] -> [B,layer,pos,head]
            tensors[-1] = util.swap(tensors[-1], 2, 3)
        return (util.stack(tensors, 1) if sweep in EVERY else tensors[0],
                max(golden.error(prefix + part) for part in parts),
                max(golden.error(prefix + part, "mean32") for part in parts))


def add_tests():
    """One test a model, variant and command, named after them."""
    for name in MODELS:
        golden = Golden(name)
        for variant in golden.variants:
            for case in (Cache, Diff, Sweeps):
                if case is Sweeps and not golden.sweeps(variant):
                    continue

                def test(self, golden=golden, variant=variant):
                    self.check(golden, variant)

                test.__doc__ = "%s of %s, %s: TransformerLens's numbers" % (
                    case.__name__, name, variant)
                setattr(case, "test_%s_%s" % (name, variant.replace("-", "_")), test)
        if name == "odd":
            for case in (Cache, Diff, Sweeps):
                def test(self, golden=golden):
                    self.check(golden, "default", "--plain")

                test.__doc__ = "%s of odd with the scalar reference kernels" % case.__name__
                setattr(case, "test_odd_plain", test)


add_tests()


class Rest(Case):
    """What the loops above leave out."""

    def test_hook_result_only_where_named(self):
        """`--names *` is every hook point of TransformerLens but hook_result."""
        golden = Golden("odd")
        util.must("cache", prompts("odd", 1), "-m", flat_file("odd"), "--names", "*", "-o",
                  at("c.safetensors"))
        got, _ = util.read_safetensors(at("c.safetensors"))
        want = {hook for hook in golden.under("default/cache/") if not hook.endswith("hook_result")}
        self.assertEqual(set(got), want | {"tokens"})

    def test_a_star_at_a_globs_end(self):
        """`blocks.0.*` is every hook point of that block, and `blocks.0.hook_mlp_out*` one."""
        for glob, least in (("blocks.0.*", 15), ("blocks.0.hook_mlp_out*", 1)):
            util.must("cache", prompts("odd", 1), "-m", flat_file("odd"), "--names", glob, "-o", at("c.safetensors"))
            got = set(util.read_safetensors(at("c.safetensors"))[0]) - {"tokens", "logits"}
            self.assertGreaterEqual(len(got), least)
            self.assertTrue(all(name.startswith(glob[:-1]) for name in got), got)

    def test_the_cost_is_positive(self):
        """--stats counts work done, not undone."""
        util.must("patch", prompts("odd", 1), "-m", flat_file("odd"), "--sweep", "resid_pre", "--stats", "-o",
                  at("s.json"))
        with open(at("s.json"), encoding="utf-8") as file:
            stats = json.load(file)["stats"]
        for name in ("flops", "weight_bytes_read", "rows"):
            self.assertGreater(stats[name], 0, name)

    def test_top(self):
        """`top` lists the final logits and probabilities of the golden in order, then the answers."""
        golden = Golden("tiny")
        logits, probs = golden.get("default/final_logits"), golden.get("default/final_probs")
        columns, rows = util.read_tsv(prompts("tiny"))
        self.assertEqual(logits.shape[0], len(rows))
        for b, row in enumerate(rows):
            row, v = dict(zip(columns, row)), logits.shape[1]
            want = logits.data[b * v:(b + 1) * v]
            prob = probs.data[b * v:(b + 1) * v]
            bound = [2 * golden.error("default/" + key) + 2.0 ** -22 * max(map(abs, values))
                     for key, values in (("final_logits", want), ("final_probs", prob))]
            done = util.must("top", row["clean"], "-k", "7", "--answer", row["answer"], "--answer",
                             row["wrong"], "-m", flat_file("tiny"))
            lines = [line.split("\t") for line in done.stdout.splitlines()]
            self.assertEqual(len(lines), 9, done.stdout)
            self.assertEqual(lines[7][4], "|%s|" % row["answer"])
            self.assertEqual(lines[8][4], "|%s|" % row["wrong"])
            for n, line in enumerate(lines):
                rank, token, logit, p = int(line[0]), int(line[1]), float(line[2]), float(line[3])
                self.assertTrue(abs(logit - want[token]) <= bound[0], line)
                self.assertTrue(abs(p - prob[token]) <= bound[1], line)
                if n < 7:
                    self.assertEqual(rank, n)
                near = sum(abs(other - want[token]) <= 2 * bound[0] for other in want) - 1
                exact = sum(other > want[token] for other in want)
                self.assertTrue(abs(rank - exact) <= near, "%r, rank %d" % (line, exact))

    def test_json_and_csv_hold_the_same_values(self):
        """.json and .csv hold .npy's values, in its order, and the unpatched means."""
        tsv, model = prompts("odd"), flat_file("odd")
        stem = at("formats")
        for sweep, axes in (("attn_head_pattern_by_pos", ["layer", "head", "dest"]),
                            ("block_every", ["kind", "layer", "pos"])):
            util.must("patch", tsv, "-m", model, "--sweep", sweep, "--per-prompt", "-o", stem + ".npy",
                      "-o", stem + ".json", "-o", stem + ".csv")
            npy = util.read_npy(stem + ".npy")
            with open(stem + ".json", encoding="utf-8") as file:
                found = json.load(file)
            self.assertEqual(found["sweep"], sweep)
            self.assertEqual(found["metric"], "logit_diff")
            self.assertEqual(found["direction"], "denoising")
            self.assertIs(found["normalized"], False)
            self.assertEqual(found["axes"], ["example"] + axes)
            self.assertEqual(tuple(found["shape"]), npy.shape)
            self.same(found["values"], npy.data)
            pairs = baselines(model, tsv)
            self.same([found["clean"], found["corrupted"]],
                      [sum(side) / len(pairs) for side in zip(*pairs)],
                      slack=2.0 ** -23 * max(abs(value) for pair in pairs for value in pair))
            ids = Golden("odd").get("tokens")
            self.assertEqual(len(found["tokens"]["clean"]), ids.shape[0])
            with open(stem + ".csv", encoding="utf-8", newline="") as file:
                lines = file.read().splitlines()
            self.assertEqual(lines[0], ",".join(["sweep", "example"] + axes + ["token", "value"]))
            self.same([float(line.rsplit(",", 1)[1]) for line in lines[1:]], npy.data)

    def same(self, got, want, slack=0.0):
        """Nine digits of a value and the same value as a float: half an ulp and a hair."""
        self.assertEqual(len(got), len(want))
        for g, w in zip(got, want):
            ok = abs(g - w) <= 2.0 ** -23 * abs(w) + slack
            self.assertTrue(ok, "%r, not %r" % (g, w))

    def test_normalize(self):
        """--normalize is (patched - corrupted) / (clean - corrupted), or its mirror image for --noising."""
        tsv, model = prompts("odd"), flat_file("odd")
        pairs = baselines(model, tsv)
        clean, corrupted = (sum(side) / len(pairs) for side in zip(*pairs))
        for words, zero in (([], corrupted), (["--noising"], clean)):
            for more in ([], ["--per-prompt"]):
                raw = tables(model, tsv, ["resid_pre"], *(words + more))["resid_pre"]
                got = tables(model, tsv, ["resid_pre"], "--normalize", *(words + more))["resid_pre"]
                self.assertEqual(got.shape, raw.shape)
                for g, r in zip(got.data, raw.data):
                    want = (r - zero) / (clean - corrupted)
                    ok = abs(g - want) <= 1e-6 * (1 + abs(r) + abs(zero)) / abs(clean - corrupted)
                    self.assertTrue(ok, "%r, not %r" % (g, want))

    def test_all(self):
        """`--sweep all` is every sweep but dest_src_pos, each in a file of its own."""
        got = contents(patch(flat_file("single"), prompts("single"), ALL))
        for old in os.listdir(folder.name):
            if old.startswith("patch"):
                os.remove(at(old))
        util.must("patch", prompts("single"), "-m", flat_file("single"), "--sweep", "all", "-o",
                  at("patch.npy"))
        made = sorted(name for name in os.listdir(folder.name) if name.startswith("patch"))
        self.assertEqual(made, sorted("patch-%s.npy" % sweep for sweep in ALL))
        self.assertEqual(contents({sweep: at("patch-%s.npy" % sweep) for sweep in ALL}), got)


# ---- identities that need no reference ----------------------------------------------------------------


class Identities(Case):
    """What patching must give whatever the weights are, to the bit."""

    def setUp(self):
        self.model = flat_file("odd")
        self.columns, rows = util.read_tsv(prompts("odd"))
        self.rows = [([int(i) for i in row[0].split()], [int(i) for i in row[1].split()],
                      int(row[2]), int(row[3])) for row in rows]

    def tsv(self, rows, name="identity.tsv"):
        return util.write_tsv(at(name), self.columns, rows)

    def per_example(self, tensor):
        size = util.count(tensor.shape[1:])
        return [tensor.data[b * size:(b + 1) * size] for b in range(tensor.shape[0])]

    def test_patching_a_run_with_itself_is_the_baseline(self):
        """Self-patch: every cell of every sweep is the unpatched value."""
        tsv = self.tsv([(clean, clean, answer, wrong) for clean, _, answer, wrong in self.rows])
        pairs = baselines(self.model, tsv)
        for direction in ([], ["--noising"]):
            for sweep, tensor in tables(self.model, tsv, ALL + [DEST_SRC], "--per-prompt",
                                        *direction).items():
                for (clean, corrupted), cells in zip(pairs, self.per_example(tensor)):
                    self.assertEqual(clean, corrupted)
                    self.assert_cells(cells, clean, sweep)

    def test_resid_post_is_the_next_layers_resid_pre(self):
        """resid_pre(l+1, p) == resid_post(l, p)."""
        for direction in ([], ["--noising"]):
            got = tables(self.model, prompts("odd"), ["resid_pre", "resid_post"], "--per-prompt", *direction)
            layers, pos = got["resid_pre"].shape[1:]
            for pre, post in zip(*(self.per_example(got[name]) for name in ("resid_pre", "resid_post"))):
                self.assertEqual(list(pre[pos:]), list(post[:(layers - 1) * pos]))

    def test_resid_pre_of_layer_0_is_a_swapped_token(self):
        """resid_pre(0, p) == the run with the clean token at p."""
        got = tables(self.model, prompts("odd"), ["resid_pre"], "--per-prompt")["resid_pre"]
        for b, (clean, corrupted, answer, wrong) in enumerate(self.rows):
            swapped = [corrupted[:p] + [clean[p]] + corrupted[p + 1:] for p in range(len(clean))]
            pairs = baselines(self.model, self.tsv([(clean, ids, answer, wrong) for ids in swapped]))
            self.assertEqual(list(self.per_example(got)[b][:len(clean)]), [pair[1] for pair in pairs])

    def test_patching_all_that_differs_is_the_clean_run(self):
        """Prompts that differ in the last token alone: resid_pre there is the clean run, at every layer;
        in one other token alone: resid_pre there at layer 0."""
        clean, _, answer, wrong = self.rows[0]
        last = len(clean) - 1
        for p in range(last + 1):
            corrupted = clean[:p] + [(clean[p] + 1) % 97] + clean[p + 1:]
            tsv = self.tsv([(clean, corrupted, answer, wrong)])
            pairs = baselines(self.model, tsv)
            self.assertNotEqual(pairs[0][0], pairs[0][1])
            got = tables(self.model, tsv, ["resid_pre"])["resid_pre"]
            layers = got.shape[0] if p == last else 1
            self.assert_cells([got.data[l * (last + 1) + p] for l in range(layers)], pairs[0][0], p)

    def test_cells_before_the_first_differing_token_are_the_baseline(self):
        """Before the first differing token nothing can change, in every sweep with positions."""
        tsv = prompts("odd")
        pairs = baselines(self.model, tsv)
        sweeps = [name for name in SINGLE if name not in ALL_POS] + [DEST_SRC]
        for side, direction in ((1, []), (0, ["--noising"])):
            for sweep, tensor in tables(self.model, tsv, sweeps, "--per-prompt", *direction).items():
                axis = 2 if "pattern" in sweep else 1  # of one example: [layer,head,dest..] or [layer,pos..]
                inner = util.count(tensor.shape[axis + 2:])
                size = tensor.shape[axis + 1]
                for b, (clean, corrupted, _, _) in enumerate(self.rows):
                    first = next(p for p in range(len(clean)) if clean[p] != corrupted[p])
                    cells = self.per_example(tensor)[b]
                    if first:
                        self.assert_cells([value for i, value in enumerate(cells)
                                           if i // inner % size < first], pairs[b][side], sweep)

    def test_a_source_after_its_destination_is_the_baseline(self):
        """attn_head_pattern_dest_src_pos with src > dest is the unpatched value."""
        tsv = prompts("odd")
        pairs = baselines(self.model, tsv)
        tensor = tables(self.model, tsv, [DEST_SRC], "--per-prompt")[DEST_SRC]
        n = tensor.shape[-1]
        for pair, cells in zip(pairs, self.per_example(tensor)):
            self.assert_cells([value for i, value in enumerate(cells) if i % n > i // n % n], pair[1],
                              DEST_SRC)

    def test_every_is_the_single_sweeps_stacked(self):
        """*_every hold the single sweeps' values."""
        got = tables(self.model, prompts("odd"), ALL)
        for name, parts in EVERY.items():
            tensors = [got[part] for part in parts]
            if name == "attn_head_by_pos_every":
                tensors[-1] = util.swap(tensors[-1], 1, 2)
            self.assertEqual(got[name], util.stack(tensors, 0), name)

    def test_noising_is_denoising_with_the_prompts_exchanged(self):
        """--noising puts the corrupted activation into the clean run."""
        sweeps = SINGLE + [DEST_SRC]
        swapped = self.tsv([(corrupted, clean, a, w) for clean, corrupted, a, w in self.rows])
        self.assertEqual(contents(patch(self.model, prompts("odd"), sweeps, "--noising")),
                         contents(patch(self.model, swapped, sweeps)))

    def test_the_mean_is_the_examples_mean(self):
        """Without --per-prompt the values are the examples' means, and examples do not meet."""
        together = tables(self.model, prompts("odd"), SINGLE, "--per-prompt")
        for sweep, tensor in tables(self.model, prompts("odd"), SINGLE).items():
            error, scale = util.worst(tensor.data, util.mean(together[sweep]).data)
            self.assertTrue(error <= 2.0 ** -22 * max(scale, 1.0), sweep)
        for b, row in enumerate(self.rows):
            for sweep, tensor in tables(self.model, self.tsv([row]), SINGLE).items():
                self.assertEqual(tensor.data, self.per_example(together[sweep])[b], sweep)

    def test_invariants_of_the_processing(self):
        """Logit differences survive every processing: loosely here, the goldens say how closely."""
        reference = baselines(self.model, prompts("odd"))
        for words in (["--no-processing"], ["--no-fold-ln"], ["--no-center-writing-weights"],
                      ["--no-center-unembed"], ["--no-fold-value-biases"],
                      ["--refactor-factored-attn-matrices"],
                      ["--no-processing", "--refactor-factored-attn-matrices"]):
            for got, want in zip(baselines(self.model, prompts("odd"), *words), reference):
                for side in (0, 1):
                    self.assertTrue(abs(got[side] - want[side]) <= 1e-3, words)

    def test_probability_metrics_agree(self):
        """prob is exp(logprob); the clean run has kl 0; rank counts from 0."""
        got = {metric: tables(self.model, prompts("odd"), ["resid_pre"], "--per-prompt", "--metric",
                              metric)["resid_pre"].data for metric in METRICS}
        for logprob, prob, rank, kl in zip(*(got[name] for name in ("logprob", "prob", "rank", "kl"))):
            import math
            self.assertTrue(abs(math.exp(logprob) - prob) <= 1e-5)
            self.assertTrue(rank == int(rank) and 0 <= rank < 97)
            self.assertTrue(kl >= -1e-6)
            self.assertTrue(prob <= 1 / (1 + rank) + 1e-6)


class Brute(Case):
    """--brute, one full pass a cell with nothing shared, gives the same files byte for byte."""

    def check(self, model, tsv, sweeps, *words):
        fast = contents(patch(model, tsv, sweeps, *words))
        slow = contents(patch(model, tsv, sweeps, "--brute", *words))
        for sweep in sweeps:
            self.assertTrue(fast[sweep] == slow[sweep],
                            "%s %s: --brute gives other bits" % (sweep, " ".join(words)))

    def test_odd(self):
        """Every sweep, direction and metric on odd, per example and in the mean."""
        for direction, metric in itertools.product(([], ["--noising"]), METRICS):
            with self.subTest(direction=direction, metric=metric):
                self.check(flat_file("odd"), prompts("odd"), ALL + [DEST_SRC], "--per-prompt",
                           "--metric", metric, *direction)
        self.check(flat_file("odd"), prompts("odd"), ALL)

    def test_odd_in_other_forms(self):
        """Unprocessed, refactored, and with the scalar kernels."""
        for words in (["--no-processing"], ["--refactor-factored-attn-matrices"], ["--plain"],
                      ["--threads", "1"]):
            with self.subTest(words=words):
                self.check(flat_file("odd"), prompts("odd"), SINGLE + [DEST_SRC], *words)

    def test_tiny(self):
        """Every sweep and direction on one prompt of the bundled model; every metric on some."""
        model, tsv = flat_file("tiny"), prompts("tiny", 1)
        for direction in ([], ["--noising"]):
            with self.subTest(direction=direction):
                self.check(model, tsv, SINGLE, *direction)
        for metric in METRICS:
            with self.subTest(metric=metric):
                self.check(model, tsv, ["resid_pre", "attn_head_k_all_pos"], "--metric", metric)

    def test_other_models(self):
        """The other activations, sizes and switches."""
        for name in MODELS[1:-1]:
            with self.subTest(model=name):
                self.check(flat_file(name), prompts(name), SINGLE + [DEST_SRC], "--per-prompt")


class Runner(Case):
    """The comparison itself can fail."""

    def test_wrong_numbers_are_noticed(self):
        """NaN, infinities, a float's error too much and a wrong shape do not pass."""
        inf = float("inf")
        want = util.Tensor((2,), util.array.array("d", [1.0, -inf]))
        for values in ([float("nan"), -inf], [1.0, inf], [1.0, 0.0], [inf, -inf], [1 + 1e-6, -inf]):
            error, scale = util.worst(util.array.array("f", values), want.data)
            self.assertFalse(error <= 2.0 ** -22 * scale, values)
        error, scale = util.worst(struct.unpack("<2f", struct.pack("<2f", 1.0, -inf)), want.data)
        self.assertTrue(error <= 2.0 ** -22 * scale)


if __name__ == "__main__":
    unittest.main()
