# SPDX-License-Identifier: MIT
"""trace, ablate, path, lens, attn and heads give what independent references give, cell by cell.

tests/golden/analyses-*.safetensors.gz come from make_golden_analyses.py, whose head describes them. The
bound, per tensor, is test_golden's:

    max|ours - f64| <= 2 max|f32 - f64| + 2^-22 max|f64|.

A command that the program does not have yet (`actpatch COMMAND -h` exits with 2) makes its tests skips, and
so do the few outputs that the interface leaves open, where nothing of the kind is found."""

import array
import functools
import json
import math
import os
import sys
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import util  # noqa: E402

CONVERTED = {"tiny": util.TINY, "odd": os.path.join(util.GOLDEN, "odd"),
             "random-facts": os.path.join(util.GOLDEN, "random-facts")}
SITES = ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "attn_head_out_by_pos",
         "attn_head_out_all_pos"]  # those that the interface names; of others it says "..."
KINDS = ["resid", "mlp", "attn"]
SEVERED = {"mlp": "severed_mlp", "attn": "severed_attn"}  # what --severed makes of the kinds; resid stays
GROUPS = ["first_subject", "middle_subject", "last_subject", "first_subsequent", "further", "last"]

# Models this small gain nothing from threads, and on a busy machine lose much; Threads has its own test.
ONE = {"OMP_NUM_THREADS": "1"}

folder = None  # temporary, of the whole module
flat_files = {}
compared = []  # (error / the reference's error in float32, error / bound, key) of every tensor


def setUpModule():
    global folder
    folder = util.scratch()


def tearDownModule():
    folder.cleanup()
    if compared:
        ratio, _, where = max(compared)
        share, place = max((share, key) for _, share, key in compared)
        below = sum(ratio <= 1 for ratio, _, _ in compared)
        print("analyses: %d tensors compared; %d at or below the reference's own error in float32; worst "
              "%.2f times it (%s); worst %.2f of the bound (%s)" % (
                  len(compared), below, ratio, where, share, place), flush=True)


def at(name):
    return os.path.join(folder.name, name)


def flat_file(name):
    """The model's flat file, converted once a run; random-facts and tiny with their tokenizer."""
    if name not in flat_files:
        words = ["--no-tokenizer"] if name == "odd" else []
        flat_files[name] = util.convert(CONVERTED[name], at(name + ".bin"), *words)
    return flat_files[name]


@functools.lru_cache(maxsize=None)
def help_of(command):
    """What `actpatch COMMAND -h` says; None where there is no such command."""
    done = util.actpatch(command, "-h")
    return None if done.returncode == 2 else done.stdout + done.stderr


def read_json(name):
    with open(at(name), encoding="utf-8") as file:
        return json.load(file)


def read_bytes(name):
    with open(at(name), "rb") as file:
        return file.read()


def numbers(values):
    """Nested lists of JSON to a Tensor of doubles; null is NaN."""
    if not isinstance(values, list):
        return util.Tensor((), array.array("d", [math.nan if values is None else values]))
    parts = [numbers(part) for part in values]
    if len(set(part.shape for part in parts)) != 1:
        raise AssertionError("a ragged or empty table: %r" % values)
    return util.stack(parts, 0)


class Golden:
    """One golden file: tensors by key, aliases resolved."""

    def __init__(self, name):
        self.name = name
        self.tensors, self.metadata = util.read_safetensors(
            os.path.join(util.GOLDEN, "analyses-%s.safetensors.gz" % name))
        self.keys = sorted(set(self.tensors) | {
            key[5:] for key in self.metadata if key.startswith("same:")})
        flags = [key[6:] for key in self.metadata if key.startswith("flags:")]
        self.variants = sorted(key for key in flags if not key.startswith("trace/"))
        self.settings = sorted(key[6:] for key in flags if key.startswith("trace/"))

    def flags(self, name):
        return self.metadata["flags:" + name].split()

    def get(self, key):
        return self.tensors[self.metadata.get("same:" + key, key)]

    def under(self, prefix):
        return [key[len(prefix):] for key in self.keys if key.startswith(prefix)]

    def error(self, key, kind="err32"):
        """The reference's own, in float32. A tensor of fewer than 100 different numbers takes the worst of
        its kin: the other tables of the same fact, or of the same command and metric."""
        if len(set(self.get(key).data)) >= 100:
            return float(self.metadata["%s:%s" % (kind, key)])
        return max(float(value) for name, value in self.metadata.items()
                   if name.startswith(kind + ":") and self.kin(name.split(":", 1)[1]) == self.kin(key))

    @staticmethod
    def kin(key):
        parts = key.split("/")
        if parts[0] == "trace" and parts[2] == "averages":
            return parts[0], parts[2], parts[4]
        if parts[0] == "trace":
            return parts[0], parts[1] if parts[1] in ("alone", "bos") else "", parts[2]
        return parts[0], parts[1].replace("-frozen", "")


@functools.lru_cache(maxsize=None)
def golden_of(name):
    return Golden(name)


class Case(unittest.TestCase):
    command = None

    def setUp(self):
        if self.command and help_of(self.command) is None:
            self.skipTest("actpatch has no `%s` yet" % self.command)

    def option(self, name):
        """Skip unless the command's help names this option."""
        if name not in help_of(self.command):
            self.skipTest("actpatch %s has no %s" % (self.command, name))

    def run_it(self, *words):
        return util.must(self.command, *words, env=ONE)

    def fails(self, *words, status=(1,), says=()):
        """It exits with one of these, with one line on stderr that says all of this."""
        done = util.actpatch(self.command, *words, env=ONE)
        self.assertIn(done.returncode, status, done.stderr)
        lines = done.stderr.strip().splitlines()
        self.assertEqual(len(lines), 1, done.stderr)
        self.assertTrue(lines[0].startswith("actpatch: "), lines[0])
        for text in says:
            self.assertIn(text, lines[0])

    def compare(self, golden, key, got, kind="err32", want=None):
        """One tensor against the bound; a failure names it and the others are still compared."""
        with self.subTest(tensor="%s/%s" % (golden.name, key)):
            if want is None:
                want = golden.get(key) if kind == "err32" else util.mean(golden.get(key))
            self.assertEqual(got.shape, want.shape, key)
            error32 = golden.error(key, kind)
            error, scale = util.worst(got.data, want.data)
            bound = 2 * error32 + 2.0 ** -22 * scale
            ok = error <= bound
            self.assertTrue(ok, "%s: off by %.3g; the reference in float32 by %.3g, bound %.3g" % (
                key, error, error32, bound))
            compared.append((error / error32 if error32 else 0.0 if error == 0 else math.inf,
                             error / bound if bound else 0.0, "%s/%s" % (golden.name, key)))

    def npy(self, name):
        tensor = util.read_npy(at(name))
        self.assertEqual(tensor.data.typecode, "f", name)
        return tensor

    def assert_all(self, got, want, what):
        """Every value is this one number, to the bit."""
        ok = bool(got) and all(value == want for value in got)
        self.assertTrue(ok, "%s: %r, not %r" % (what, sorted(set(got))[:4], want))


def prompts(name):
    """The model's prompts file with two more columns: group labels, and a position of each example."""
    source = (os.path.join(util.TINY, "ioi.tsv") if name == "tiny"
              else os.path.join(util.GOLDEN, name, "prompts.tsv"))
    golden = golden_of(name)
    groups, places = (golden.metadata[key].split() for key in ("groups", "column"))
    columns, rows = util.read_tsv(source)
    return util.write_tsv(at(name + ".tsv"), columns + ["group", "place"], [
        row + [group, place] for row, group, place in zip(rows, groups, places)])


def rewritten(name, change, output="rewritten.tsv"):
    """The model's prompts file with change(columns, rows) made to it."""
    columns, rows = util.read_tsv(prompts(name))
    columns, rows = change(columns, rows)
    return util.write_tsv(at(output), columns, rows)


def clean_only(columns, rows):
    keep = [n for n, column in enumerate(columns) if not column.startswith("corrupted")]
    return [columns[n] for n in keep], [[row[n] for n in keep] for row in rows]


def first_rows(n):
    return lambda columns, rows: (columns, rows[:n])


def self_pairs(columns, rows):
    """Each corrupted prompt is the clean one."""
    named = dict((column, n) for n, column in enumerate(columns))
    side = "clean_ids" if "clean_ids" in named else "clean"
    other = named[side.replace("clean", "corrupted")]
    return columns, [row[:other] + [row[named[side]]] + row[other + 1:] for row in rows]


def unpatched(model, tsv, *words):
    """[(clean, corrupted)] of every example, from `diff`."""
    util.must("diff", tsv, "-m", model, "-o", at("diff.npy"), *words, env=ONE)
    data = util.read_npy(at("diff.npy")).data
    return list(zip(data[0::2], data[1::2]))


def examples(tensor):
    """The flat values of each example."""
    size = util.count(tensor.shape[1:])
    return [tensor.data[b * size:(b + 1) * size] for b in range(tensor.shape[0])]


# ---- trace --------------------------------------------------------------------------------------------------


def averages_of(found, kind):
    """(value, band) as [6,L] of one kind from the JSON: averages.KIND.GROUP.mean and .band, the groups in
    their order; null where a group has no token."""
    groups = found["averages"][kind]
    if list(groups) != GROUPS:
        raise AssertionError("groups %r" % list(groups))
    return [numbers([group[name] for group in groups.values()]) for name in ("mean", "band")]


class Trace(Case):
    """Every cell of causal tracing is the reference's: Hugging Face hooks and NumPy's noise."""

    command = "trace"

    def facts(self, golden, setting):
        return util.write_tsv(at("facts.tsv"), ["prompt", "subject", "attribute"],
                              json.loads(golden.metadata["facts:" + setting]))

    def check(self, golden, setting, *words):
        words = golden.flags("trace/" + setting) + list(words)
        if "--bos" in words:
            self.option("--bos")
        wanted = {int(name.split("/")[1]): json.loads(text) for name, text in golden.metadata.items()
                  if name.startswith("fact:%s/" % setting)}
        for severed in ([], ["--severed"]):
            self.run_it(self.facts(golden, setting), "-m", flat_file(golden.name), "-o", at("trace.json"),
                        *(words + severed))
            found = read_json("trace.json")
            self.assertEqual(found["skipped"], int(golden.metadata["skipped:" + setting]))
            self.assertEqual([fact["line"] for fact in found["facts"]], sorted(wanted))
            for fact in found["facts"]:
                self.check_fact(fact, wanted[fact["line"]])
                prefix = "trace/%s/%d/" % (setting, fact["line"])
                for name in ("high", "low"):
                    self.compare(golden, prefix + name, numbers([fact[name]]))
                self.assertEqual(set(fact["kinds"]), set(KINDS))
                for kind in KINDS:
                    key = prefix + (SEVERED.get(kind, kind) if severed else kind)
                    self.compare(golden, key, numbers(fact["kinds"][kind]))
            for kind in KINDS if len(wanted) > 1 else []:
                value, band = averages_of(found, kind)
                prefix = "trace/%s/averages/%s/" % (setting, SEVERED.get(kind, kind) if severed else kind)
                self.compare(golden, prefix + "value", value)
                self.compare(golden, prefix + "band", band)

    def check_fact(self, fact, want):
        """Tokens, the subject's range and the answer; texts with halves of characters are left out."""
        self.assertEqual(len(fact["tokens"]), len(want["ids"]))
        for got, text, token in zip(fact["tokens"], want["tokens"], want["ids"]):
            if isinstance(got, int):
                self.assertEqual(got, token)
            elif "\ufffd" not in text:
                self.assertEqual(got, text)
        self.assertEqual(fact["subject"], want["subject"])
        if isinstance(fact["answer"], int):
            self.assertEqual(fact["answer"], want["answer_id"])
        elif "\ufffd" not in want["answer"]:
            self.assertEqual(fact["answer"], want["answer"])

    def test_one_fact_as_npy(self):
        """A file of one fact as .npy: [kind,T,L], kinds resid, mlp, attn; so with --severed."""
        for name in ("random-facts", "tiny"):
            golden = golden_of(name)
            for kinds, more in ((KINDS, []), ([SEVERED.get(kind, kind) for kind in KINDS], ["--severed"])):
                self.run_it(self.facts(golden, "alone"), "-m", flat_file(name), "-o", at("one.npy"),
                            *(golden.flags("trace/alone") + more))
                got = self.npy("one.npy")
                keys = ["trace/alone/2/" + kind for kind in kinds]
                self.assertEqual(got.shape, (len(kinds),) + golden.get(keys[0]).shape)
                for key, values in zip(keys, examples(got)):
                    self.compare(golden, key, util.Tensor(golden.get(key).shape, values))

    def test_one_kind(self):
        """--kind mlp: that table alone, the same numbers."""
        golden, words = golden_of("random-facts"), ["-m", flat_file("random-facts"), "--window", "1"]
        tsv = self.facts(golden, "alone")
        self.run_it(tsv, "-o", at("all.npy"), *words)
        self.run_it(tsv, "-o", at("mlp.npy"), "-o", at("mlp.json"), "--kind", "mlp", *words)
        every, one = self.npy("all.npy"), self.npy("mlp.npy")
        self.assertEqual(one.shape, (1,) + every.shape[1:])
        self.assertEqual(one.data, examples(every)[1])
        kinds = read_json("mlp.json")["facts"][0]["kinds"]
        self.assertEqual(list(kinds), ["mlp"])
        self.assertEqual(array.array("f", numbers(kinds["mlp"]).data), one.data)

    def test_other_processing(self):
        """Neither the noise nor a probability depends on the processing."""
        self.check(golden_of("random-facts"), "narrow", "--no-processing")
        self.check(golden_of("random-facts"), "few", "--no-fold-ln", "--no-center-unembed")

    def test_plain(self):
        """The same with the scalar reference kernels."""
        self.option("--plain")
        self.check(golden_of("random-facts"), "narrow", "--plain")

    def test_sigma(self):
        """sigma is `noise` times the deviation of all subjects' embeddings, where the output says it."""
        golden = golden_of("random-facts")
        self.run_it(self.facts(golden, "few"), "-m", flat_file("random-facts"), "-o", at("s.json"),
                    *golden.flags("trace/few"))
        found = read_json("s.json")
        sigma = found.get("sigma", (found.get("settings") or {}).get("sigma"))
        if sigma is None:
            self.skipTest("no `sigma` in the JSON of trace")
        want = float(golden.metadata["sigma:few"])
        ok = abs(sigma - want) <= 2.0 ** -23 * want
        self.assertTrue(ok, "%r, not %r" % (sigma, want))

    def test_first_noise(self):
        """The noise begins as NumPy's RandomState(1).randn does, where the output shows it as `z`."""
        golden = golden_of("random-facts")
        self.run_it(self.facts(golden, "alone"), "-m", flat_file("random-facts"), "-o", at("z.json"))
        found = read_json("z.json")
        shown = found.get("z") or found["facts"][0].get("z")
        if shown is None:
            self.skipTest("no `z` in the JSON of trace")
        while isinstance(shown[0], list):
            shown = shown[0]
        for got, want in zip(shown[:3], (1.62434536, -0.61175641, -0.52817175)):
            ok = abs(got - want) <= 5.1e-9
            self.assertTrue(ok, shown[:3])


class TraceEdges(Case):
    """Facts that do not fit, and tracing where nothing can be found."""

    command = "trace"

    def trace(self, facts, *words, columns=("prompt", "subject", "attribute")):
        self.run_it(util.write_tsv(at("edge.tsv"), columns, facts), "-m", flat_file("random-facts"), "-o",
                    at("edge.json"), *words)
        return read_json("edge.json")

    def test_subject_not_in_its_prompt(self):
        """An error that names the line."""
        tsv = util.write_tsv(at("absent.tsv"), ["prompt", "subject", "attribute"], [
            ["The capital of France is", "France", ""], ["The capital of Peru is", "Spain", ""]])
        self.fails(tsv, "-m", flat_file("random-facts"), "-o", at("absent.json"), says=["3"])

    def test_missing_column(self):
        """An error that names the column; FACTS without `attribute` may or may not be one."""
        tsv = util.write_tsv(at("columns.tsv"), ["prompt", "attribute"], [["The capital of Peru is", ""]])
        self.fails(tsv, "-m", flat_file("random-facts"), "-o", at("columns.json"), says=["subject"])

    def test_subject_cut_by_the_tokenizer(self):
        """A subject that ends inside a token takes the whole token."""
        found = self.trace([["The capital city of Iran is called", "Ira", ""],
                            ["The capital city of Iran is called", " Iran", ""],
                            ["The capital city of Iran is called", "I", ""]], "--kind", "resid")
        self.assertEqual([fact["subject"] for fact in found["facts"]], [[4, 6], [4, 6], [4, 5]])

    def test_unknown_fact(self):
        """A fact that the model does not know is skipped and counted; where it is the only one, that is an
        empty table or an error, and no crash."""
        unknown = ["The capital of Peru is", "Peru", "Lima"]
        tsv = util.write_tsv(at("unknown.tsv"), ["prompt", "subject", "attribute"], [unknown])
        done = util.actpatch("trace", tsv, "-m", flat_file("random-facts"), "-o", at("unknown.json"),
                             env=ONE)
        if done.returncode == 0:
            found = read_json("unknown.json")
            self.assertEqual((found["facts"], found["skipped"]), ([], 1))
        else:
            self.fails(tsv, "-m", flat_file("random-facts"), "-o", at("unknown.json"))
        found = self.trace([unknown, unknown[:2] + [""]])
        self.assertEqual(([fact["line"] for fact in found["facts"]], found["skipped"]), ([3], 1))

    def test_columns_by_name(self):
        """Columns are found by name; others are ignored."""
        fact = ["The capital of Peru is", "Peru", ""]
        plain = self.trace([fact], "--kind", "resid")
        other = self.trace([[fact[2], "x", fact[1], fact[0]]], "--kind", "resid",
                           columns=("attribute", "relation_id", "subject", "prompt"))
        self.assertEqual(plain["facts"], other["facts"])

    def test_windows_wider_than_the_model(self):
        """Every layer is in the window: each token has one value, whatever the width and the layer."""
        fact = [["The capital of Peru is the city of", "Peru", ""]]
        wide, wider = (self.trace(fact, "--window", w)["facts"][0]["kinds"] for w in ("10", "1000"))
        self.assertEqual(wide, wider)
        for kind in ("mlp", "attn"):
            for row in wide[kind]:
                self.assert_all(row, row[0], kind)

    def test_zero_effect_everywhere(self):
        """Noise too small for a float: high, low and every cell are one number."""
        fact = self.trace([["The capital of Peru is the city of", "Peru", ""]], "--noise", "1e-30",
                          "--severed")["facts"][0]
        for name, table in list(fact["kinds"].items()) + [("low", [[fact["low"]]])]:
            self.assert_all(numbers(table).data, fact["high"], name)

    def test_cells_without_effect(self):
        """Before the subject and in the last layer of all but the last token there is nothing to restore;
        the last token's last layer is the clean run; nothing severed after the last layer."""
        for severed in ([], ["--severed"]):
            fact = self.trace([["The capital of Peru is the city of", "Peru", ""]], "--window", "1",
                              *severed)["facts"][0]
            begin = fact["subject"][0]
            self.assertTrue(begin > 0 and fact["high"] != fact["low"])
            for kind, table in fact["kinds"].items():
                self.assert_all([x for row in table[:begin] for x in row], fact["low"], kind)
                self.assert_all([row[-1] for row in table[:-1]], fact["low"], kind)
            for kind in KINDS if severed else ["resid"]:
                self.assertEqual(fact["kinds"][kind][-1][-1], fact["high"], kind)

    def test_groups_of_no_and_of_one_token(self):
        """One fact with a one-token subject and one token after it: no middle and no further tokens (null),
        first is last, first subsequent is the last token, and the bands are 0."""
        found = self.trace([["The people know Mary for", "Mary", ""]])
        for kind in KINDS:
            value, band = averages_of(found, kind)
            layers = value.shape[1]
            self.assertEqual(value.shape, (len(GROUPS), layers))
            values, bands = examples(value), examples(band)
            for empty in (1, 4):
                self.assertTrue(all(x != x for x in values[empty]), "%s: %r" % (kind, values[empty]))
            self.assertEqual(values[0], values[2])
            self.assertEqual(values[3], values[5])
            for group in (0, 2, 3, 5):
                self.assert_all(bands[group], 0, kind)

    def test_several_facts_are_no_npy(self):
        """.npy takes one fact."""
        tsv = util.write_tsv(at("two.tsv"), ["prompt", "subject", "attribute"],
                             [["The capital of Peru is", "Peru", ""]] * 2)
        self.fails(tsv, "-m", flat_file("random-facts"), "-o", at("two.npy"), status=(1, 2))

    def test_usage(self):
        """What is no kind and no number is status 2."""
        tsv = util.write_tsv(at("usage.tsv"), ["prompt", "subject", "attribute"],
                             [["The capital of Peru is", "Peru", ""]])
        for words in (["--kind", "resid,qkv"], ["--samples", "0"], ["--samples", "x"], ["--window", "x"]):
            self.fails(tsv, "-m", flat_file("random-facts"), "-o", at("usage.json"), *words, status=(2,))


# ---- ablate -------------------------------------------------------------------------------------------------


class Ablate(Case):
    """Each cell after ablation is that of a plain loop of TransformerLens hooks."""

    command = "ablate"

    def values(self, name, site, by, *words, output="a.npy"):
        self.run_it(prompts(name), "-m", flat_file(name), "--site", site, "--by", by, "-o", at(output), *words)
        return self.npy(output)

    def check(self, golden, variant, how, *words):
        """how: zero, mean, or groups."""
        words = golden.flags(variant) + list(words)
        by, more = ("mean", ["--groups", "group"]) if how == "groups" else (how, [])
        for site in golden.under("%s/ablate/%s/" % (variant, how)):
            if "/" in site:
                continue
            key = "%s/ablate/%s/%s" % (variant, how, site)
            if site not in SITES and util.actpatch(
                    "ablate", prompts(golden.name), "-m", flat_file(golden.name), "--site", site, "--by", by,
                    "-o", at("try.npy"), env=ONE).returncode == 2:
                continue
            self.compare(golden, key, self.values(golden.name, site, by, "--per-prompt", *(more + words)))
            self.compare(golden, key, self.values(golden.name, site, by, *(more + words)), "mean32")

    def test_metrics(self):
        """Every metric; kl is against the clean run's distribution."""
        golden = golden_of("odd")
        for metric in ("logit", "prob", "logprob", "kl", "rank"):
            prefix = "default/ablate-%s/" % metric
            self.assertTrue(golden.under(prefix))
            for rest in golden.under(prefix):
                by, site = rest.split("/")
                words = ["odd", site, by, "--metric", metric]
                self.compare(golden, prefix + rest, self.values(*(words + ["--per-prompt"])))
                self.compare(golden, prefix + rest, self.values(*words), "mean32")

    def test_minus_the_baseline(self):
        """--normalize: minus the unablated metric."""
        pairs = unpatched(flat_file("odd"), prompts("odd"))
        clean = math.fsum(pair[0] for pair in pairs) / len(pairs)
        raw = self.values("odd", "attn_head_out_all_pos", "zero")
        got = self.values("odd", "attn_head_out_all_pos", "zero", "--normalize")
        self.assertEqual(got.shape, raw.shape)
        for g, r in zip(got.data, raw.data):
            ok = abs(g - (r - clean)) <= 1e-6 * (1 + abs(r) + abs(clean))
            self.assertTrue(ok, "%r from %r" % (g, r))

    def test_plain(self):
        """The same with the scalar reference kernels."""
        self.option("--plain")
        for how in ("zero", "mean", "groups"):
            self.check(golden_of("odd"), "default", how, "--plain")

    def test_resample(self):
        """Each value is that of another example's activation, never of its own; a call repeats itself."""
        golden = golden_of("odd")
        seeds = [[], ["--seed", "2"], ["--seed", "3"]] if "--seed" in help_of("ablate") else [[]]
        for site in golden.under("default/ablate/donors/"):
            for seed in seeds:
                self.check_donors(golden, site, seed)

    def check_donors(self, golden, site, seed):
        key = "default/ablate/donors/" + site
        want = golden.get(key)
        got = self.values("odd", site, "resample", "--per-prompt", *seed)
        first = read_bytes("a.npy")
        self.values("odd", site, "resample", "--per-prompt", *seed)
        self.assertEqual(first, read_bytes("a.npy"), site)
        self.assertEqual(got.shape, want.shape[:1] + want.shape[2:])
        bound = 2 * golden.error(key) + 2.0 ** -22 * max(map(abs, want.data))
        n, size = got.shape[0], util.count(got.shape[1:])
        own = 0
        for b in range(n):
            for cell in range(size):
                value = got.data[b * size + cell]
                donors = [want.data[(b * n + d) * size + cell] for d in range(n)]
                ok = any(abs(value - donors[d]) <= bound for d in range(n) if d != b)
                self.assertTrue(ok, "%s, example %d, cell %d: %r, others %r" % (site, b, cell, value, donors))
                own += abs(value - donors[b]) <= bound
        self.assertTrue(own < n * size, "%s: nothing was ablated" % site)

    def test_noise(self):
        """Noise changes something, is finite, and a call repeats itself."""
        pairs = unpatched(flat_file("odd"), prompts("odd"))
        for site in ("resid_pre", "attn_head_out_all_pos"):
            got = self.values("odd", site, "noise", "--per-prompt")
            first = read_bytes("a.npy")
            self.values("odd", site, "noise", "--per-prompt")
            self.assertEqual(first, read_bytes("a.npy"), site)
            self.assertEqual(got.shape, golden_of("odd").get("default/ablate/zero/" + site).shape)
            self.assertTrue(all(math.isfinite(x) for x in got.data))
            for (clean, _), cells in zip(pairs, examples(got)):
                self.assertTrue(any(x != clean for x in cells), site)

    def test_groups_of_one_row_change_nothing(self):
        """Zero effect everywhere: the mean of one row is itself, to the bit."""
        tsv = rewritten("odd", lambda columns, rows: (columns + ["own"], [
            row + ["g%d" % b] for b, row in enumerate(rows)]))
        pairs = unpatched(flat_file("odd"), tsv)
        for site in SITES:
            self.run_it(tsv, "-m", flat_file("odd"), "--site", site, "--by", "mean", "--groups", "own",
                        "--per-prompt", "-o", at("own.npy"))
            for (clean, _), cells in zip(pairs, examples(self.npy("own.npy"))):
                self.assert_all(cells, clean, site)

    def test_one_group_is_no_groups(self):
        """All rows in one group: the same bytes as without --groups."""
        tsv = rewritten("odd", lambda columns, rows: (columns + ["same"], [row + ["x"] for row in rows]))
        for site in ("resid_pre", "attn_head_out_by_pos"):
            words = [tsv, "-m", flat_file("odd"), "--site", site, "--by", "mean", "--per-prompt"]
            self.run_it(*(words + ["-o", at("without.npy")]))
            self.run_it(*(words + ["--groups", "same", "-o", at("with.npy")]))
            self.assertEqual(read_bytes("without.npy"), read_bytes("with.npy"))

    def test_the_clean_prompts_suffice(self):
        """No corrupted column is needed."""
        got = []
        for tsv in (prompts("odd"), rewritten("odd", clean_only)):
            self.run_it(tsv, "-m", flat_file("odd"), "--site", "mlp_out", "--by", "mean", "-o", at("c.npy"))
            got.append(read_bytes("c.npy"))
        self.assertEqual(*got)

    def test_errors(self):
        """Unknown words are status 2; a column that is not there is status 1 and named."""
        words = [prompts("odd"), "-m", flat_file("odd"), "-o", at("e.npy")]
        self.fails(*(words + ["--site", "resid_pro", "--by", "zero"]), status=(2,))
        self.fails(*(words + ["--site", "resid_pre", "--by", "one"]), status=(2,))
        self.fails(*(words + ["--site", "resid_pre", "--by", "mean", "--groups", "template"]),
                   says=["template"])


class AblateLists(Case):
    """--heads L.H,...: several heads at once, at all positions or some, or everything else (--keep)."""

    command = "ablate"

    def setUp(self):
        super().setUp()
        self.option("--heads")

    def check(self, golden, variant, cases=(("heads-all", []), ("keep-all", ["--keep"]))):
        words = [prompts(golden.name), "-m", flat_file(golden.name), "--heads", golden.metadata["heads"]]
        words += golden.flags(variant)
        for how in ("zero", "mean", "groups"):
            by = ["--by", "mean", "--groups", "group"] if how == "groups" else ["--by", how]
            for name, more in cases:
                key = "%s/ablate/%s/list/%s" % (variant, how, name)
                call = words + by + more + ["-o", at("l.npy")]
                self.run_it(*(call + ["--per-prompt"]))
                self.compare(golden, key, self.one_each(len(golden.get(key).data)))
                self.run_it(*call)
                self.compare(golden, key, util.Tensor((), self.one_each(1).data), "mean32")

    def one_each(self, n):
        """The file's values, one an example whatever axes of 1 there are beside."""
        got = self.npy("l.npy")
        self.assertEqual(len(got.data), n, got.shape)
        return util.Tensor((n,), got.data)

    def test_every_head_at_once(self):
        """--heads all: every head's z replaced."""
        self.check(golden_of("odd"), "default", [("every-all", ["--heads", "all"])])

    def test_positions(self):
        """--positions end, or a column's 0-based position of each example; with --keep the rest is ablated."""
        self.option("--positions")
        for name in ("odd", "tiny"):
            self.check(golden_of(name), "default", [
                ("heads-end", ["--positions", "end"]), ("heads-column", ["--positions", "place"]),
                ("keep-end", ["--keep", "--positions", "end"])])

    def test_faithfulness(self):
        """(F(C) - F(all ablated)) / (F(M) - F(all ablated)) of the kept heads, where the JSON says it."""
        for name in ("odd", "tiny"):
            golden = golden_of(name)
            self.run_it(prompts(name), "-m", flat_file(name), "--heads", golden.metadata["heads"], "--keep",
                        "--by", "mean", "-o", at("f.json"))
            found = read_json("f.json")
            if "faithfulness" not in found:
                self.skipTest("no `faithfulness` in the JSON of ablate --keep")
            kept, nothing = (util.mean(golden.get("default/ablate/mean/list/" + key)).data[0]
                             for key in ("keep-all", "every-all"))
            whole = util.mean(golden.get("default/baseline")).data[0]
            want = (kept - nothing) / (whole - nothing)
            error = 2 * golden.error("default/ablate/mean/list/keep-all", "mean32") + 2.0 ** -22 * max(
                map(abs, (kept, nothing, whole)))
            ok = abs(found["faithfulness"] - want) <= 2 * (1 + abs(want)) * error / abs(whole - nothing)
            self.assertTrue(ok, "%r, not %r" % (found["faithfulness"], want))

    def test_a_head_that_does_not_exist(self):
        """Status 1, and the head is named."""
        for head in ("3.0", "0.3", "99.99"):
            self.fails(prompts("odd"), "-m", flat_file("odd"), "--heads", "0.1," + head, "--by", "zero", "-o",
                       at("h.npy"), says=[head])

    def test_a_head_that_stands_there_twice(self):
        """Status 1: with --keep its minimality would be 0, since its twin is kept."""
        for more in ([], ["--keep"]):
            self.fails(prompts("odd"), "-m", flat_file("odd"), "--heads", "0.1,2.0,0.1", "-o", at("h.npy"), *more,
                       says=["0.1", "twice", "--heads"])


# ---- path ---------------------------------------------------------------------------------------------------


class Path(Case):
    """Path patching equals a plain three-step script, example by example, because means cancel."""

    command = "path"

    def check(self, golden, variant, direction, *words):
        words = golden.flags(variant) + ["--noising"] * (direction == "noising") + list(words)
        for step in ("path", "path-frozen"):
            for to in golden.under("%s/%s/%s/" % (variant, step, direction)):
                key = "%s/%s/%s/%s" % (variant, step, direction, to)
                call = [prompts(golden.name), "-m", flat_file(golden.name), "--to", to, "-o", at("p.npy")]
                call += ["--freeze-mlps"] * (step == "path-frozen") + words
                self.run_it(*(call + ["--per-prompt"]))
                self.compare(golden, key, self.npy("p.npy"))
                self.run_it(*call)
                self.compare(golden, key, self.npy("p.npy"), "mean32")

    def values(self, tsv, *words):
        self.run_it(tsv, "-m", flat_file("odd"), "-o", at("q.npy"), *words)
        return self.npy("q.npy")

    def test_plain(self):
        """The same with the scalar reference kernels."""
        self.option("--plain")
        self.check(golden_of("odd"), "default", "noising", "--plain")

    def test_final_is_the_default(self):
        """Without --to the receiver is the final residual stream."""
        self.values(prompts("odd"))
        without = read_bytes("q.npy")
        self.values(prompts("odd"), "--to", "final")
        self.assertEqual(without, read_bytes("q.npy"))

    def test_senders_that_cannot_reach(self):
        """A sender not below any receiver has the unpatched value, to the bit."""
        pairs = unpatched(flat_file("odd"), prompts("odd"))
        for to, layer in (("1.2.q", 1), ("1.0.k,1.1.v", 1), ("2.0.v,1.0.q", 2), ("0.0.q,0.1.v", 0)):
            for side, more in ((1, []), (0, ["--noising"])):
                got = self.values(prompts("odd"), "--to", to, "--per-prompt", *more)
                heads = got.shape[2]
                for pair, cells in zip(pairs, examples(got)):
                    self.assert_all(cells[layer * heads:], pair[side], to)
                    if layer:
                        self.assertTrue(any(x != pair[side] for x in cells[:layer * heads]), to)

    def test_zero_effect_everywhere(self):
        """Equal prompts: the unpatched value everywhere; normalised it is 0/0, NaN with a warning."""
        tsv = rewritten("odd", self_pairs)
        pairs = unpatched(flat_file("odd"), tsv)
        for to in ("final", "2.0.q,2.1.k,1.0.v"):
            for more in ([], ["--noising"], ["--freeze-mlps"]):
                got = self.values(tsv, "--to", to, "--per-prompt", *more)
                for (clean, _), cells in zip(pairs, examples(got)):
                    self.assert_all(cells, clean, to)
        done = self.run_it(tsv, "-m", flat_file("odd"), "--normalize", "-o", at("q.npy"))
        self.assertTrue(all(x != x for x in self.npy("q.npy").data))
        self.assertTrue(done.stderr, "no warning")

    def test_normalize(self):
        """(patched - corrupted) / (clean - corrupted), noising (patched - clean) / (clean - corrupted)."""
        pairs = unpatched(flat_file("odd"), prompts("odd"))
        clean, corrupted = (sum(side) / len(pairs) for side in zip(*pairs))
        for words, zero in (([], corrupted), (["--noising"], clean)):
            raw = self.values(prompts("odd"), *words)
            got = self.values(prompts("odd"), "--normalize", *words)
            self.assertEqual(got.shape, raw.shape)
            for g, r in zip(got.data, raw.data):
                ok = abs(g - (r - zero) / (clean - corrupted)) <= 1e-6 * (
                    1 + abs(r) + abs(zero)) / abs(clean - corrupted)
                self.assertTrue(ok, "%r from %r" % (g, r))

    def test_receivers_that_do_not_exist(self):
        """A receiver that the model does not have is status 1, and named; one that is no receiver is 2."""
        many = ",".join("%d.%d.q" % (i // 3, i % 3) for i in range(9))  # as many as the model has heads
        for to in ("3.0.q", "2.3.k", "99.0.v"):
            for before in ("1.0.q,", many + ","):
                self.fails(prompts("odd"), "-m", flat_file("odd"), "--to", before + to, "-o", at("q.npy"), says=[
                    to.rsplit(".", 1)[0]])
        for to in ("1.0.x", "1.0", "q", ""):
            self.fails(prompts("odd"), "-m", flat_file("odd"), "--to", to, "-o", at("q.npy"), status=(1, 2))

    def test_more_receivers_than_heads(self):
        """A list of receivers is read to its end, however long; one that stands there twice is an error."""
        every = ["%d.%d.%s" % (layer, head, letter) for letter in "qkv" for layer in range(3) for head in range(3)]
        forth = self.values(prompts("odd"), "--to", ",".join(every))
        self.assertEqual(self.values(prompts("odd"), "--to", ",".join(reversed(every))), forth)
        self.assertNotEqual(self.values(prompts("odd"), "--to", ",".join(every[:9])), forth)
        for last in ("x", "99.0.q", ""):
            self.fails(prompts("odd"), "-m", flat_file("odd"), "--to", ",".join(every + [last]), "-o", at("q.npy"))
        self.fails(prompts("odd"), "-m", flat_file("odd"), "--to", "1.0.q,2.1.k,1.0.q", "-o", at("q.npy"),
                   says=["1.0.q", "twice"])
        self.fails(prompts("odd"), "-m", flat_file("odd"), "--to", "all", "-o", at("q.npy"), says=["--to"])


# ---- lens ---------------------------------------------------------------------------------------------------


TABLES = ("accumulated", "layers", "heads")


class Lens(Case):
    """Attribution by layer and head is TransformerLens's, and its parts sum to the logit difference."""

    command = "lens"

    def tables(self, name, *words):
        self.run_it(prompts(name), "-m", flat_file(name), "-o", at("lens.npy"), "-o", at("lens.json"), *words)
        return ({table: self.npy("lens-%s.npy" % table) for table in TABLES},
                {table: read_json("lens-%s.json" % table) for table in TABLES})

    def check(self, golden, variant, *words):
        words = golden.flags(variant) + list(words)
        prefix = variant + "/lens/"
        each, _ = self.tables(golden.name, "--per-prompt", *words)
        mean, found = self.tables(golden.name, *words)
        for table in TABLES:
            self.compare(golden, prefix + table, each[table])
            self.compare(golden, prefix + table, mean[table], "mean32")
            self.assertEqual(found[table]["labels"]["part"], golden.metadata["labels:" + table].split())
            for name in ("bias", "ld"):
                want = util.mean(golden.get(prefix + name))
                self.compare(golden, prefix + name, util.Tensor(
                    want.shape, array.array("d", [found[table][name]])), "mean32", want)

    def test_parts_sum_to_the_logit_difference(self):
        """Every table's parts and the bias term are the logit difference (of accumulated, the last part)."""
        for name in ("odd", "tiny"):
            for words in ([], ["--no-processing"], ["--no-fold-ln"], ["--no-fold-value-biases"],
                          ["--no-center-writing-weights"], ["--refactor-factored-attn-matrices"]):
                mean, found = self.tables(name, *words)
                pairs = unpatched(flat_file(name), prompts(name), *words)
                want = math.fsum(clean for clean, _ in pairs) / len(pairs)
                for table in TABLES:
                    parts = mean[table].data[-1:] if table == "accumulated" else mean[table].data
                    total = math.fsum(parts) + found[table]["bias"]
                    ok = abs(total - want) <= 1e-5 * (1 + math.fsum(map(abs, parts)))
                    self.assertTrue(ok, "%s %s %s: %r, not %r" % (name, words, table, total, want))
                    ok = abs(found[table]["ld"] - want) <= 1e-6 * (1 + abs(want))
                    self.assertTrue(ok, "%r, not %r" % (found[table]["ld"], want))

    def test_accumulated_is_layers_summed(self):
        """0_pre is embed + pos_embed, 0_mid adds 0_attn_out, and so on."""
        mean, _ = self.tables("odd")
        parts, running = list(mean["layers"].data), list(mean["accumulated"].data)
        for n, value in enumerate(running):
            total = math.fsum(parts[:n + 2])
            ok = abs(total - value) <= 1e-5 * (1 + abs(value))
            self.assertTrue(ok, "part %d: %r, not %r" % (n, value, total))

    def test_recomputed(self):
        """The fourth table, `lens`: accumulated_resid(apply_ln=True) with the bias term added."""
        for name in ("odd", "tiny"):
            golden = golden_of(name)
            for variant in golden.variants:
                key = variant + "/lens/recomputed"
                want, bias = golden.get(key), golden.get(variant + "/lens/bias")
                want = util.Tensor(want.shape, array.array("d", (
                    value + b for row, b in zip(examples(want), bias.data) for value in row)))
                for words, kind, wanted in ((["--per-prompt"], "err32", want), ([], "mean32", util.mean(want))):
                    self.tables(name, *(golden.flags(variant) + words))
                    self.compare(golden, key, self.npy("lens-lens.npy"), kind, wanted)
                _, found = self.tables(name, *golden.flags(variant))
                self.assertEqual(read_json("lens-lens.json")["labels"], found["accumulated"]["labels"])

    def test_plain(self):
        """The same with the scalar reference kernels."""
        self.option("--plain")
        self.check(golden_of("odd"), "default", "--plain")

    def test_the_clean_prompts_suffice(self):
        """No corrupted column is needed."""
        got = []
        for tsv in (prompts("odd"), rewritten("odd", clean_only)):
            self.run_it(tsv, "-m", flat_file("odd"), "-o", at("c.npy"))
            got.append(read_bytes("c-layers.npy"))
        self.assertEqual(*got)


# ---- attn and heads -----------------------------------------------------------------------------------------


class Attn(Case):
    """Attention patterns of the clean prompts."""

    command = "attn"

    def tsv(self, name):
        return rewritten(name, first_rows(int(golden_of(name).metadata["attn_examples"])))

    def check(self, golden, variant, *words):
        self.run_it(self.tsv(golden.name), "-m", flat_file(golden.name), "--heads", "all", "-o", at("attn.npy"),
                    *(golden.flags(variant) + list(words)))
        self.compare(golden, variant + "/attn", self.npy("attn.npy"))

    def test_chosen_heads(self):
        """--heads 2.1,0.0: [B,heads,T,T] in the order given, the same numbers."""
        self.run_it(self.tsv("odd"), "-m", flat_file("odd"), "--heads", "all", "-o", at("all.npy"))
        self.run_it(self.tsv("odd"), "-m", flat_file("odd"), "--heads", "2.1,0.0", "-o", at("two.npy"))
        every = self.npy("all.npy")
        self.assertEqual(self.npy("two.npy"), util.take(every, 1, [2 * 3 + 1, 0]))

    def test_rows_sum_to_one(self):
        """Each row of a pattern is a distribution over what came before."""
        self.run_it(self.tsv("odd"), "-m", flat_file("odd"), "--heads", "all", "-o", at("sum.npy"))
        got = self.npy("sum.npy")
        length = got.shape[-1]
        for n in range(0, len(got.data), length):
            row, dest = got.data[n:n + length], n // length % length
            self.assertTrue(abs(math.fsum(row) - 1) <= 1e-6)
            self.assertTrue(all(x == 0 for x in row[dest + 1:]))

    def test_a_head_that_does_not_exist(self):
        """Status 1, and the head is named."""
        for head in ("3.0", "0.3", "99.99"):
            self.fails(self.tsv("odd"), "-m", flat_file("odd"), "--heads", "0.1," + head, "-o", at("h.npy"),
                       says=[head])


def copying_of(found):
    """(names, k, {positive, negative: [[L x H]]}) from the JSON of `heads`. Taken to be
    copying: {names: [...], positive: [[..]], negative: [[..]]}; None where it is not."""
    table = found.get("copying")
    if not isinstance(table, dict) or "names" not in table:
        return None
    return [name.strip() for name in table["names"]], {sign: table[sign] for sign in ("positive", "negative")}


class Heads(Case):
    """Previous token, duplicate token and induction scores are detect_head's by mul."""

    command = "heads"

    def check(self, golden, variant, *words):
        self.run_it(prompts(golden.name), "-m", flat_file(golden.name), "-o", at("heads.npy"),
                    *(golden.flags(variant) + list(words)))
        self.compare(golden, variant + "/heads", self.npy("heads.npy"))

    def test_random_repeated_tokens(self):
        """Without PROMPTS: scores between 0 and 1, the same at every call."""
        for name in ("odd", "tiny"):
            golden = golden_of(name)
            self.run_it("-m", flat_file(name), "-o", at("random.npy"))
            first = read_bytes("random.npy")
            got = self.npy("random.npy")
            self.assertEqual(got.shape, golden.get("default/heads").shape)
            self.assertTrue(all(0 <= x <= 1.000001 for x in got.data))
            self.run_it("-m", flat_file(name), "-o", at("random.npy"))
            self.assertEqual(first, read_bytes("random.npy"))

    def test_copying(self):
        """Copying scores: the share of the names within their own top 5 through W_OV and -W_OV."""
        golden = golden_of("tiny")
        known = json.loads(golden.metadata["names"])
        for variant in golden.variants:
            self.run_it(prompts("tiny"), "-m", flat_file("tiny"), "-o", at("copy.json"), *golden.flags(variant))
            found = copying_of(read_json("copy.json"))
            if found is None:
                self.skipTest("no `copying` with `names` in the JSON of heads")
            names, scores = found
            self.assertTrue(names and set(names) <= set(known), names)
            for sign, table in scores.items():
                want = golden.get("%s/copying/%s" % (variant, sign))
                got = numbers(table)
                self.assertEqual(got.shape, want.shape[:2])
                for value, hits in zip(got.data, (want.data[n:n + len(known)] for n in range(
                        0, len(want.data), len(known)))):
                    share = sum(hits[known.index(name)] for name in names) / len(names)
                    ok = abs(value - share) <= 1e-6
                    self.assertTrue(ok, "%s %s: %r, not %r" % (variant, sign, value, share))


class Threads(Case):
    """How many threads there are changes no bit."""

    def check(self, command, *words):
        if help_of(command) is None:
            self.skipTest("actpatch has no `%s` yet" % command)
        if command == "trace":
            golden = golden_of("random-facts")
            words = (util.write_tsv(at("facts.tsv"), ["prompt", "subject", "attribute"], json.loads(
                golden.metadata["facts:default"])), "-m", flat_file("random-facts")) + words
        else:
            words = (prompts("odd"), "-m", flat_file("odd")) + words
        made = []
        for threads in ("1", "2", "3"):
            util.must(command, *(words + ("-o", at("threads.json"), "--threads", threads)))
            names = sorted(name for name in os.listdir(folder.name) if name.startswith("threads"))
            made.append([(name, read_bytes(name)) for name in names])
            for name in names:
                os.remove(at(name))
        self.assertTrue(made[0])
        for other in made[1:]:
            self.assertTrue(other == made[0], command)

    def test_trace(self):
        """trace"""
        self.check("trace")

    def test_ablate(self):
        """ablate, by the mean and by noise"""
        self.check("ablate", "--site", "attn_head_out_by_pos", "--by", "mean", "--per-prompt")
        self.check("ablate", "--site", "resid_pre", "--by", "noise", "--per-prompt")

    def test_path(self):
        """path, to the final residual stream and to heads"""
        self.check("path", "--per-prompt")
        self.check("path", "--to", "2.0.q,2.1.k,1.0.v", "--per-prompt")

    def test_lens(self):
        """lens, every table"""
        self.check("lens", "--per-prompt")

    def test_heads(self):
        """heads"""
        self.check("heads")


# ---- one test a model and variant ---------------------------------------------------------------------------


def add(case, name, doc, *arguments):
    def test(self):
        self.check(golden_of(arguments[0]), *arguments[1:])

    test.__doc__ = doc
    setattr(case, "test_" + name.replace("-", "_"), test)


def add_tests():
    for name in ("random-facts", "tiny"):
        for setting in golden_of(name).settings:
            add(Trace, "%s_%s" % (name, setting), "trace of %s, %s: every cell, and the averages" % (
                name, setting), name, setting)
    for name in ("odd", "tiny"):
        for variant in golden_of(name).variants:
            words = "%s, %s" % (name, variant)
            golden = golden_of(name)
            for how in ("zero", "mean", "groups"):
                if golden.under("%s/ablate/%s/" % (variant, how)):
                    add(Ablate, "%s_%s_%s" % (name, variant, how), "ablate by %s: %s" % (how, words),
                        name, variant, how)
            if golden.under(variant + "/ablate/zero/list/"):
                add(AblateLists, "%s_%s" % (name, variant), "ablate --heads: %s" % words, name, variant)
            for direction in ("noising", "denoising"):
                if golden.under("%s/path/%s/" % (variant, direction)):
                    add(Path, "%s_%s_%s" % (name, variant, direction), "path, %s: %s" % (direction, words),
                        name, variant, direction)
            for case in (Lens, Attn, Heads):
                add(case, "%s_%s" % (name, variant), "%s: %s" % (case.__name__, words), name, variant)


add_tests()


class Runner(unittest.TestCase):
    """The goldens say something, and the comparison can fail."""

    def test_goldens_are_finite_and_have_errors(self):
        """Every number is finite and every tensor has a float32 error to be measured by."""
        for name in ("odd", "random-facts", "tiny"):
            golden = golden_of(name)
            self.assertTrue(len(golden.keys) > 100, name)
            for key in golden.keys:
                self.assertTrue(all(math.isfinite(x) for x in golden.get(key).data), key)
                if "/copying/" not in key and "/ablate-rank/" not in key:
                    self.assertTrue(0 < golden.error(key) < 1e-4, key)

    def test_wrong_numbers_are_noticed(self):
        """A value just beyond the bound, a NaN, an infinity and a wrong shape are failures."""
        golden = golden_of("odd")
        key = "default/path/noising/final"
        want = golden.get(key)
        bound = 2 * golden.error(key) + 2.0 ** -22 * max(map(abs, want.data))
        right = util.Tensor(want.shape, array.array("d", want.data))

        def failures(tensor):
            class One(Case):
                def runTest(self):
                    self.compare(golden, key, tensor)
            result = unittest.TestResult()
            One().run(result)
            return len(result.failures) + len(result.errors)

        before = len(compared)
        self.assertEqual(failures(right), 0)
        del compared[before:]
        for change in (1.01 * bound, -1.01 * bound, math.nan, math.inf):
            wrong = array.array("d", want.data)
            wrong[7] += change
            self.assertEqual(failures(util.Tensor(want.shape, wrong)), 1, change)
        self.assertEqual(failures(util.Tensor(want.shape[::-1], right.data)), 1)


if __name__ == "__main__":
    unittest.main()
