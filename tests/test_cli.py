# SPDX-License-Identifier: MIT
"""The command line: exit statuses, one-line errors with place and remedy, nothing half-written, what is printed.

Every call runs in an empty folder, and a call that fails must leave the folder as it was."""

import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import util  # noqa: E402

IOI = os.path.join(util.TINY, "ioi.tsv")
COMMANDS = ("info", "tokens", "top", "diff", "cache", "patch", "fold", "trace", "ablate", "path", "lens", "attn",
            "heads", "report", "merge")
CLEAN = "When John and Mary went to the shops, John gave the bag to"
CORRUPTED = "When John and Mary went to the shops, Mary gave the bag to"
COLUMNS = ["clean", "corrupted", "answer", "wrong"]
IDS = ["clean_ids", "corrupted_ids", "answer_id", "wrong_id"]
ROW = [CLEAN, CORRUPTED, " Mary", " John"]
ESCAPE = re.compile("\033\\[[0-9;]*m")

TABLES = [".npy", ".csv", ".json", ".svg", ".html"]
# Every command that writes files, without -o, and the endings that it takes. fact.tsv: see one_fact.
WRITERS = (
    (["patch", IOI, "--sweep", "resid_pre"], TABLES), (["diff", IOI], [".npy", ".csv", ".json"]),
    (["cache", "--text", "a", "--names", "*"], [".safetensors"]), (["fold"], [".bin"]),
    (["lens", IOI], TABLES), (["attn", IOI, "--heads", "0.2"], TABLES),
    (["heads"], TABLES), (["path", IOI], TABLES), (["ablate", IOI, "--site", "resid_pre"], TABLES),
    (["trace", "fact.tsv", "--samples", "1"], [".json"]), (["report", IOI], [".html"]))

shared = None
models = {}


def setUpModule():
    global shared
    shared = util.scratch()
    unittest.addModuleCleanup(shared.cleanup)
    unittest.addModuleCleanup(models.clear)


def model(name):
    """A flat file: `tiny`, `tiny16` in half precision, or a golden model, which has no tokenizer."""
    if name not in models:
        path = os.path.join(shared.name, name + ".bin")
        if name.startswith("tiny"):
            models[name] = util.convert(util.TINY, path, "--dtype", "f16" if name == "tiny16" else "f32")
        else:
            models[name] = util.convert(os.path.join(util.GOLDEN, name), path, "--no-tokenizer")
    return models[name]


class Case(unittest.TestCase):
    def setUp(self):
        folder = util.scratch()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def at(self, name):
        return os.path.join(self.folder, name)

    def write(self, name, data):
        with open(self.at(name), "wb") as file:
            file.write(data if isinstance(data, bytes) else data.encode("utf-8"))
        return name

    def read(self, name):
        with open(self.at(name), "rb") as file:
            return file.read()

    def tsv(self, rows, columns=COLUMNS, name="p.tsv"):
        util.write_tsv(self.at(name), columns, rows)
        return name

    def one_fact(self):
        return self.tsv([["The capital of France is the city of", "France", ""]],
                        ["prompt", "subject", "attribute"], "fact.tsv")

    def files(self):
        return {name: self.read(name) for name in os.listdir(self.folder) if os.path.isfile(self.at(name))}

    def actpatch(self, *words, **options):
        env = dict({"ACTPATCH_MODEL": util.TINY_MODEL}, **(options.pop("env", None) or {}))
        return util.actpatch(*words, cwd=self.folder, env=env, **options)

    def succeeds(self, *words, **options):
        done = self.actpatch(*words, **options)
        self.assertEqual(done.returncode, 0, "%s: %s" % (words, done.stderr))
        return done

    def quiet(self, *words, **options):
        """Succeeds, and says nothing on stderr; returns stdout."""
        done = self.succeeds(*words, **options)
        self.assertEqual(done.stderr, "", words)
        return done.stdout

    def clone(self):
        """The program with its bundled files in a place of their own; returns its path."""
        os.makedirs(self.at("clone/tests/tiny"))
        os.mkdir(self.at("away"))
        shutil.copy(util.binary(), self.at("clone/actpatch"))
        for name in ("model.bin", "ioi.tsv"):
            shutil.copy(os.path.join(util.TINY, name), self.at("clone/tests/tiny"))
        return self.at("clone/actpatch")

    def fails(self, status, pattern, *words, **options):
        """One line on stderr that the pattern matches, nothing on stdout, the folder as it was."""
        before = self.files()
        done = self.actpatch(*words, **options)
        self.assertEqual(done.returncode, status, "%s: %s%s" % (words, done.stdout[:500], done.stderr))
        self.assertRegex(done.stderr, "^actpatch: [^\n]+, [^\n]*, [^\n]+\n$", words)
        self.assertRegex(done.stderr, pattern, words)
        self.assertEqual(done.stdout, "", words)
        self.assertEqual(self.files(), before, words)
        return done.stderr

    def refused(self, pattern, *words, **options):
        return self.fails(1, pattern, *words, **options)


# ---- usage: status 2 -----------------------------------------------------------------------------------


class Usage(Case):
    def test_unknown_words_are_status_2(self):
        """An unknown command, option, sweep, metric or file ending; values that are missing or no numbers."""
        for pattern, words in (
                ("unknown command, nope,", ["nope"]), ("unknown command, --nope,", ["--nope"]),
                ("unknown command, ,", [""]), ("--nope", ["info", "--nope"]), ("-z", ["diff", IOI, "-z"]),
                ("no option --noising", ["info", "--noising"]), ("no option -o", ["tokens", "a", "-o", "x.csv"]),
                ("--sweep is missing", ["patch", IOI]), ("sweep nope", ["patch", IOI, "--sweep", "nope"]),
                ("sweep resid", ["patch", IOI, "--sweep", "resid_pre,resid"]),
                ("unknown sweep", ["patch", IOI, "--sweep", ""]),
                ("unknown sweep", ["patch", IOI, "--sweep", "resid_pre,"]),
                ("unknown sweep", ["patch", IOI, "--sweep", ",resid_pre"]),
                ("sweep allx", ["patch", IOI, "--sweep", "allx"]),
                ("foo, --metric", ["patch", IOI, "--sweep", "all", "--metric", "foo"]),
                ("foo, --metric", ["diff", IOI, "--metric=foo"]), ("--metric", ["diff", IOI, "--metric="]),
                ("ending, x.foo", ["patch", IOI, "--sweep", "resid_pre", "-o", "x.foo"]),
                ("ending, x,", ["patch", IOI, "--sweep", "resid_pre", "-o", "x"]),
                ("ending, x.svg", ["diff", IOI, "-o", "x.svg"]), ("ending, .d/x", ["diff", IOI, "-o", ".d/x"]),
                ("ending, x.NPY", ["diff", IOI, "-o", "x.NPY"]),
                ("ending, y.foo", ["diff", IOI, "-o", "x.npy", "-o", "y.foo"]),
                ("ending, a.npy", ["cache", IOI, "--names", "*", "-o", "a.npy"]),
                ("one file", ["cache", IOI, "--names", "*"]), ("one file", ["fold"]),
                ("one file", ["fold", "-o", "a", "-o", "b"]), ("ending, -", ["fold", "-o", "-"]),
                ("--names is missing", ["cache", IOI, "-o", "a.safetensors"]),
                ("PROMPTS or --text", ["cache", "--names", "*", "-o", "a.safetensors"]),
                ("PROMPTS or --text", ["cache", IOI, "--text", "a", "--names", "*", "-o", "a.safetensors"]),
                ("upside, --run", ["cache", IOI, "--names", "*", "--run", "upside", "-o", "a.safetensors"]),
                ("pink, --color", ["patch", IOI, "--sweep", "all", "--color", "pink"]),
                ("PROMPTS is missing", ["diff"]), ("TEXT is missing", ["top"]), ("TEXT... is missing", ["tokens"]),
                ("b is a word too many", ["top", "a", "b"]), ("b is a word too many", ["diff", "a", "b"]),
                ("x is a word too many", ["info", "x"]), ("value is missing, -o", ["diff", IOI, "-o"]),
                ("value is missing, -m", ["info", "-m"]), ("value is missing, --metric", ["diff", IOI, "--metric"]),
                ("no value, --verify", ["info", "--verify=1"]), ("no value, --no-bos", ["tokens", "--no-bos=", "a"]),
                ("-1 is no number", ["top", "a", "-k", "-1"]), ("x is no number", ["top", "a", "-k", "x"]),
                (" is no number", ["top", "a", "-k", ""]), ("1.5 is no number", ["top", "a", "-k", "1.5"]),
                ("is no number", ["top", "a", "-k", "2147483648"]), ("is no number", ["top", "a", "-k", "9" * 30]),
                ("0 is no number", ["info", "--threads", "0"]), ("is no number", ["info", "--threads", "9999999"]),
                ("0 is no number of bytes", ["info", "--max-memory", "0"]),
                ("5Q is no number of bytes", ["info", "--max-memory", "5Q"]),
                ("K is no number of bytes", ["info", "--max-memory=K"]),
                ("is no number of bytes", ["info", "--max-memory", "99999999999999999999G"]),
                ("is no number of bytes", ["info", "--max-memory", "64MB"])):
            with self.subTest(words=words):
                self.fails(2, re.escape(pattern), *words)

    def test_help(self):
        """-h and --help of every command, with the options that it takes, and of those it takes all."""
        values = {"NAME": "prob", "NAME,...": "resid_pre", "GLOB,...": "*", "TEXT": "a", "SIDE": "clean", "N": "1",
                  "WHEN": "auto", "FILE": "a.npy", "MODEL": "no file", "BYTES": "64M", "I/N": "1/2", "WAY": "zero"}
        takes = {}
        for command in COMMANDS:
            text = self.quiet(command, "-h")
            self.assertEqual(text, self.quiet(command, "--help"))
            self.assertTrue(text.startswith("usage: actpatch %s " % command), text)
            self.assertTrue(all(len(line) <= 100 for line in text.splitlines()), text)
            takes[command] = dict(re.findall(r"^  (--?\S+) (\S*)", text[text.index("\noptions:"):], flags=re.M))
            self.assertTrue(takes[command], text)
        every = sorted({name for options in takes.values() for name in options})
        for command, options in takes.items():
            words = []
            for name, value in options.items():
                flag = not re.match("^[A-Z]", value)
                words += [name] if flag else [name, values.get(value, "1")]
            self.assertEqual(self.quiet(command, *(words + ["-h"])), self.quiet(command, "-h"))
            foreign = [name for name in every if name not in options]
            for name in foreign[::4]:
                self.fails(2, "no option %s" % name, command, name, "1", "-h")

    def test_short_help(self):
        """Without arguments, and for -h: all commands, and three lines that work as typed."""
        program = self.clone()
        texts = [util.run([program] + words, cwd=self.at("away")) for words in ([], ["-h"], ["--help"])]
        text = texts[0].stdout
        for done in texts:
            self.assertEqual((done.returncode, done.stdout, done.stderr), (0, text, ""))
        for command in COMMANDS:
            self.assertRegex(text, "\n  %s +\\S" % command)
        lines = [line.strip() for line in text.splitlines() if line.startswith("  %s " % program)]
        self.assertEqual(len(lines), 3)
        for line in lines:
            done = util.run(["sh", "-c", line], cwd=self.at("away"))
            self.assertEqual((done.returncode, done.stderr), (0, ""), line)
            self.assertGreater(len(done.stdout.splitlines()), 8)

    def test_version(self):
        """--version is patch.h's."""
        with open(os.path.join(util.ROOT, "patch.h"), encoding="utf-8") as file:
            version = re.search("#define PATCH_VERSION \"(.*)\"", file.read()).group(1)
        self.assertEqual(self.quiet("--version"), "actpatch %s\n" % version)

    def test_values_and_operands(self):
        """--option=value is --option value; -- ends the options; options may stand anywhere."""
        want = self.quiet("top", "a", "-k", "3", "--answer", " John")
        self.assertEqual(self.quiet("top", "-k", "3", "--answer= John", "a"), want)
        self.assertEqual(self.quiet("top", "--answer", " John", "-k", "3", "--", "a"), want)
        self.assertEqual(self.quiet("tokens", "--no-bos", "--", "-x", "--no-bos"),
                         self.quiet("tokens", "--no-bos", "--", "-x") +
                         self.quiet("tokens", "--no-bos", "--", "--no-bos"))


# ---- models --------------------------------------------------------------------------------------------


class Models(Case):
    def test_missing_and_foreign_files(self):
        """No file, a folder, an empty file, a text, a checkpoint: what is wrong, where, what to do."""
        os.mkdir(self.at("folder"))
        self.write("empty.bin", b"")
        self.write("text.bin", "clean\tcorrupted\n" * 50)
        self.write("short.bin", b"ACTPATCH")
        for pattern, path in (("No such file", "none.bin"), ("not an ordinary file", "folder"),
                              ("empty", "empty.bin"), ("byte 0: not an actpatch model", "text.bin"),
                              ("too short", "short.bin"), ("No such file", ""),
                              ("not an actpatch model", os.path.join(util.TINY, "model.safetensors")),
                              ("not an actpatch model|too short", os.path.join(util.TINY, "config.json"))):
            for words in (["info"], ["tokens", "a"], ["diff", IOI, "-o", "x.npy"], ["fold", "-o", "y.bin"],
                          ["patch", IOI, "--sweep", "resid_pre", "-o", "x.json"],
                          ["cache", IOI, "--names", "*", "-o", "x.safetensors"]):
                with self.subTest(path=path, words=words):
                    self.assertIn("convert", self.refused(pattern, *(words + ["-m", path])))

    def test_truncated_files(self):
        """Cut anywhere, or with a byte too many: refused, and it says at which byte."""
        with open(model("tiny"), "rb") as file:
            whole = file.read()
        lengths = [1, 7, 8, 127, 128, 129, 300, 4000, 5000, 20000, len(whole) // 2, len(whole) - 64, len(whole) - 1]
        for data in [whole[:n] for n in lengths] + [whole + b"\0", whole + b"x" * 64]:
            self.write("cut.bin", data)
            self.refused("byte [0-9]+: .*cut.bin", "info", "-m", "cut.bin")
            self.refused("byte [0-9]+: .*cut.bin", "top", "a", "-m", "cut.bin")

    def test_altered_files(self):
        """A changed byte of head, table or tokenizer is noticed at once, of a weight by --verify."""
        with open(model("tiny"), "rb") as file:
            whole = bytearray(file.read())
        tokenizer, = struct.unpack_from("<Q", whole, 56)
        n_tensors, = struct.unpack_from("<I", whole, 52)
        weights, = struct.unpack_from("<Q", whole, 128 + 64)
        for byte in [0, 8, 12, 16, 20, 24, 28, 32, 36, 41, 48, 52, 56, 64, 72, 80, 84, 88, 100, 124, 128, 180, 200,
                     128 + 80 * (n_tensors - 1), tokenizer, tokenizer + 100, weights - 65]:
            whole[byte] ^= 4
            self.write("bad.bin", bytes(whole))
            self.refused("byte [0-9]+: .*bad.bin", "info", "-m", "bad.bin")
            whole[byte] ^= 4
        self.write("good.bin", bytes(whole))
        self.assertIn("\nchecksums\tgood\n", self.quiet("info", "--verify", "-m", "good.bin"))
        for tensor, name in ((0, "wte.weight"), (n_tensors - 1, "ln_f.bias")):
            offset, = struct.unpack_from("<Q", whole, 128 + 80 * tensor + 64)
            whole[offset + 5] ^= 1
            self.write("bad.bin", bytes(whole))
            self.quiet("info", "-m", "bad.bin")
            self.refused("byte %d: checksum of %s.*bad.bin" % (offset, re.escape(name)), "info", "--verify", "-m",
                         "bad.bin")
            whole[offset + 5] ^= 1

    def test_which_model(self):
        """-m, else $ACTPATCH_MODEL, else the bundled one."""
        program, odd = self.clone(), {"ACTPATCH_MODEL": model("odd")}
        for want, env, words in (("64", {}, []), ("64", {"ACTPATCH_MODEL": ""}, []), ("51", odd, []),
                                 ("18", odd, ["-m", model("scaled")])):
            done = util.run([program, "info"] + words, cwd=self.at("away"), env=env)
            self.assertIn("\nd_model\t%s\n" % want, done.stdout)
        self.refused("No such file.*, no.bin,", "info", env={"ACTPATCH_MODEL": "no.bin"})
        os.remove(self.at("clone/tests/tiny/model.bin"))
        done = util.run([program, "info"], cwd=self.at("away"))
        if done.returncode:  # else one is installed
            self.assertEqual((done.returncode, done.stdout), (1, ""))
            self.assertRegex(done.stderr, "^actpatch: no model is named, .*, -m, give -m MODEL [^\n]*\n$")

    def test_info(self):
        """Dimensions, parameters, processing and SHA-256 are the file's and the options'."""
        for name, words in (("tiny", []), ("odd", ["--no-processing"]), ("untied", ["--no-fold-ln"]), ("tiny16", [])):
            lines = dict(line.split("\t") for line in self.quiet("info", "-m", model(name), *words).splitlines())
            source = util.TINY if name.startswith("tiny") else os.path.join(util.GOLDEN, name)
            with open(os.path.join(source, "config.json"), encoding="utf-8") as file:
                config = json.load(file)
            for ours, theirs in (("n_layers", "n_layer"), ("n_heads", "n_head"), ("d_model", "n_embd"),
                                 ("n_ctx", "n_positions"), ("d_vocab", "vocab_size")):
                self.assertEqual(int(lines[ours]), config[theirs])
            self.assertEqual(float(lines["eps"]), config["layer_norm_epsilon"])
            tensors, _ = util.read_safetensors(os.path.join(source, "model.safetensors"))
            self.assertEqual(int(lines["parameters"]), sum(util.count(t.shape) for t in tensors.values()))
            with open(model(name), "rb") as file:
                data = file.read()
            self.assertEqual(lines["sha256"], hashlib.sha256(data).hexdigest())
            self.assertEqual(int(lines["file_bytes"]), len(data))
            self.assertEqual(lines["dtype"], "f16" if name == "tiny16" else "f32")
            self.assertEqual(lines["fold_ln"], "no" if words else "yes")
            self.assertEqual(lines["center_unembed"], "no" if words == ["--no-processing"] else "yes")
            self.assertEqual(lines["refactor_factored_attn_matrices"], "no")
            self.assertEqual(int(lines["bos"]), 639 if name.startswith("tiny") else -1)

    def test_memory_that_does_not_suffice(self):
        """--max-memory far too small is an error, a little more than the least is not."""
        self.refused("no memory", "diff", IOI, "--max-memory", "1")
        self.refused("no memory", "patch", IOI, "--sweep", "resid_pre", "-o", "x.npy", "--max-memory", "100K")
        self.assertEqual(self.quiet("diff", IOI, "--max-memory", "7M"), self.quiet("diff", IOI))
        said = self.refused("no memory", "diff", IOI, "--max-memory", "1M")
        advised = re.search(r"max_memory, give (\d+K) or more\n$", said).group(1)
        self.assertEqual(self.quiet("diff", IOI, "--max-memory", advised), self.quiet("diff", IOI))

    def test_no_tokenizer(self):
        """A model without one takes ids, and says so where it is given texts."""
        self.refused("has no tokenizer", "tokens", "a", "-m", model("odd"))
        self.refused("has no tokenizer", "top", "a", "-m", model("odd"))
        self.refused("has no tokenizer", "diff", self.tsv([ROW]), "-m", model("odd"))
        ids = self.tsv([([1, 2, 3], [1, 4, 3], 5, 6)], IDS, "i.tsv")
        self.quiet("patch", ids, "--sweep", "resid_pre", "-o", "x.json", "-m", model("odd"))
        self.assertEqual(json.loads(self.read("x.json"))["labels"]["pos"], ["1_0", "2_1", "3_2"])


class Folded(Case):
    def results(self, name, *words):
        """Bytes of what diff, patch and top give; a .json without the model's name."""
        self.quiet("diff", self.prompts, "-m", name, "-o", "x.npy", "-o", "x.json", *words)
        self.quiet("patch", self.prompts, "-m", name, "--sweep", "attn_head_all_pos_every,resid_post", "--metric", "kl",
                   "-o", "x.npy", "-o", "x.json", *words)
        self.quiet("cache", self.prompts, "-m", name, "--names", "*,*result", "-o", "x.safetensors", *words)
        found = {file: data for file, data in self.files().items() if file.startswith("x")}
        self.assertEqual(len(found), 7)
        return {file: re.sub(b"\"model\": ?\"[0-9a-f]*\"", b"", data) for file, data in found.items()}

    def test_folded_models_give_the_same_bits(self):
        """`fold` with any options: diff, patch and cache are byte for byte those of the raw model."""
        for name in ("tiny", "untied", "tiny16"):
            path = IOI if name.startswith("tiny") else os.path.join(util.GOLDEN, name, "prompts.tsv")
            columns, rows = util.read_tsv(path)
            self.prompts = self.tsv(rows[:1], columns)
            for words in ([], ["--no-processing"], ["--refactor-factored-attn-matrices"],
                          ["--no-processing", "--refactor-factored-attn-matrices"],
                          ["--no-fold-ln", "--no-center-unembed"], ["--no-fold-value-biases"]):
                if (name == "tiny" and len(words) > 0) or (name == "tiny16" and words != ["--no-processing"]):
                    continue  # the small model takes all ways
                with self.subTest(model=name, words=words):
                    want = self.results(model(name), *words)
                    self.quiet("fold", "-m", model(name), "-o", "f.bin", *words)
                    self.assertEqual(self.results("f.bin"), want)
                    info = self.quiet("info", "--verify", "-m", "f.bin")
                    raw = self.quiet("info", "-m", model(name), *words)
                    self.assertIn("\nfolded\tyes\n", info)
                    self.assertIn("\nchecksums\tgood\n", info)
                    for line in raw.splitlines():
                        if line.split("\t")[0] in ("fold_ln", "center_unembed", "d_mlp", "parameters", "bos",
                                                   "refactor_factored_attn_matrices", "fold_value_biases"):
                            self.assertIn("\n%s\n" % line, info)
                    self.quiet("fold", "-m", "f.bin", "-o", "g.bin")
                    self.assertEqual(self.read("f.bin") == self.read("g.bin"), True)

    def test_a_folded_model_refuses_another_processing(self):
        """Options that ask for what the file does not hold; none, or the same ones, are fine."""
        without = ["--no-fold-ln", "--no-center-unembed"]
        for words, others in (([], [["--no-processing"], ["--no-fold-value-biases"],
                                    ["--refactor-factored-attn-matrices"]]),
                              (without, [["--no-processing"], ["--no-fold-ln"]])):
            self.quiet("fold", "-o", "f.bin", *words)
            for other in others:
                self.refused("folded.*f.bin.*leave the processing options out", "top", "a", "-m", "f.bin", *other)
            self.assertEqual(self.quiet("top", "a", "-m", "f.bin"), self.quiet("top", "a", "-m", "f.bin", *words))

    def test_altered_folded_files(self):
        """They are checked as raw ones are."""
        self.quiet("fold", "-o", "f.bin")
        whole = self.read("f.bin")
        for n in (100, 5000, len(whole) - 1):
            self.write("g.bin", whole[:n])
            self.refused("g.bin", "top", "a", "-m", "g.bin")
        self.write("g.bin", whole[:-1] + bytes([whole[-1] ^ 1]))
        self.refused("checksum.*g.bin", "info", "--verify", "-m", "g.bin")

    def test_half_precision(self):
        """An f16 file is half as large, and its numbers are those of the rounded weights."""
        whole, half = os.path.getsize(model("tiny")), os.path.getsize(model("tiny16"))
        self.assertTrue(0.5 < half / whole < 0.56)
        rows = [dict(line.split("\t")[::2] for line in self.quiet("diff", IOI, "-m", model(name)).splitlines()[1:])
                for name in ("tiny", "tiny16")]
        self.assertEqual(set(rows[0]), set(rows[1]))
        for line in rows[0]:
            self.assertTrue(0 < abs(float(rows[0][line]) - float(rows[1][line])) <= 0.05, line)


# ---- prompts -------------------------------------------------------------------------------------------


class Prompts(Case):
    def check(self, pattern, rows, columns=COLUMNS, commands=("diff", "patch")):
        name = self.tsv(rows, columns)
        for command in commands:
            self.refused(pattern, command, name, *(["--sweep", "resid_pre", "-o", "x.npy"] if command == "patch" else
                                                   ["-o", "x.json"]))

    def test_columns(self):
        """Both forms of a role, a role twice or not at all, wrong numbers of fields: the line is named."""
        self.check("both clean and clean_ids, p.tsv: line 1,", [[CLEAN, "1 2"] + ROW[1:]],
                   ["clean", "clean_ids"] + COLUMNS[1:])
        self.check("both wrong and wrong_id, p.tsv: line 1,", [ROW + ["5"]], COLUMNS + ["wrong_id"])
        self.check("two columns answer, p.tsv: line 1,", [ROW + [" Mary"]], COLUMNS + ["answer"])
        self.check("two columns clean_ids, p.tsv: line 1,", [["1", "1"] + ROW[1:]],
                   ["clean_ids", "clean_ids"] + COLUMNS[1:])
        self.check("no column wrong, p.tsv: line 1,", [ROW[:3]], COLUMNS[:3])
        self.check("no column answer, p.tsv: line 1,", [ROW], ["clean", "corrupted", "Answer", "wrong"])
        self.check("no column clean, p.tsv: line 1,", [ROW], ["clean ", "corrupted", "answer", "wrong"])
        self.check("no column corrupted, p.tsv: line 1,", [[CLEAN, " Mary", " John"]], ["clean", "answer", "wrong"],
                   ["patch"])
        self.check("3 fields where the first line names 4 columns, p.tsv: line 3,", [ROW, ROW[:3]])
        self.check("5 fields where the first line names 4 columns, p.tsv: line 2,", [ROW + ["x"], ROW])
        self.check("1 fields where the first line names 4 columns, p.tsv: line 2,", [["no tabs"]])

    def test_other_columns_do_not_matter(self):
        """Unknown columns, and columns in any order, give the same file."""
        self.quiet("diff", self.tsv([ROW]), "-o", "a.json")
        self.quiet("diff", self.tsv([["x", ROW[3], "", ROW[2], ROW[1], "9 9", ROW[0]]],
                                    ["note", "wrong", "", "answer", "corrupted", "Clean_ids", "clean"]), "-o", "b.json")
        self.assertEqual(self.read("a.json"), self.read("b.json"))

    def test_roles_that_a_metric_does_not_read(self):
        """kl reads no answer, prob no wrong one; a column that is there is then not looked at."""
        self.quiet("diff", self.tsv([ROW[:2]], COLUMNS[:2]), "--metric", "kl")
        self.quiet("diff", self.tsv([ROW[:3] + ["no such token at all"]]), "--metric", "prob")
        self.refused("no column answer", "diff", self.tsv([ROW[:2]], COLUMNS[:2]), "--metric", "rank")

    def test_lengths(self):
        """Prompts that differ in length: the line, both lengths, the first token that differs."""
        longer = CORRUPTED + " the"
        self.check(r"corrupted has 16 tokens where clean has 15, .* number 10, \| Mary\| where that has \| John\|, "
                   r"p.tsv: line 3,", [ROW, [CLEAN, longer] + ROW[2:]])
        self.check(r"corrupted has 16 tokens where clean has 15, .* number 15, \| the\| where that has none, "
                   r"p.tsv: line 2,", [[CLEAN, CLEAN + " the"] + ROW[2:]])
        self.check(r"this prompt has 16 tokens where line 2 has 15, .* number 15, \| the\| where that has none, "
                   r"p.tsv: line 4,", [ROW, ROW, [CLEAN + " the", longer] + ROW[2:]], commands=["patch"])
        name = self.tsv([ROW, [CLEAN + " the", longer] + ROW[2:]])
        self.assertEqual(len(self.quiet("diff", name).splitlines()), 4)  # no sweep: each its own
        self.refused("this prompt has 16 tokens where line 2 has 15.*line 3,", "cache", name, "--names", "*", "-o",
                     "x.safetensors")
        self.check("corrupted_ids has 2 tokens where clean has 3.*line 2,", [[[1, 2, 3], [1, 2], 1, 2]], IDS)

    def test_answers(self):
        """An answer is one token, and the message shows those that it is."""
        self.check(r"answer is 2 tokens \(\|[^|]+\|\|[^|]+\|\) and must be one, p.tsv: line 3,",
                   [ROW, ROW[:2] + [" Mary John", " John"]])
        self.check(r"wrong is [0-9]+ tokens \(.*\.\.\.\) and must be one, p.tsv: line 2,",
                   [ROW[:3] + [" John and Mary"]])
        self.check("answer is empty, p.tsv: line 2,", [ROW[:2] + ["", " John"]])
        self.check("answer_id is 2 tokens", [ROW[:2] + ["5 6", " John"]], ["clean", "corrupted", "answer_id", "wrong"])
        self.refused("the answer is 2 tokens", "top", CLEAN, "--answer", " Mary John")
        self.refused("the answer is empty", "top", CLEAN, "--answer", "")

    def test_prompts_that_are_too_long_or_empty(self):
        """More tokens than n_ctx, or none; a megabyte of text is refused as quickly."""
        long = " John" * 64
        self.check("clean has 65 tokens, the model takes 64|clean has 65 tokens.*64", [[long] * 2 + ROW[2:]])
        self.quiet("diff", self.tsv([[long] * 2 + ROW[2:]]), "--no-bos")
        self.check("clean has 200001 tokens.*64", [[" John" * 200000] * 2 + ROW[2:]], commands=["diff"])
        self.refused("the prompt has 65 tokens.*64", "top", long)
        self.refused("the prompt has 65 tokens.*64", "cache", "--text", long, "--names", "*", "-o", "x.safetensors")
        self.refused("the prompt is empty", "top", "", "--no-bos")
        self.check("clean_ids is empty, p.tsv: line 2,", [["", "1", "1", "2"]], IDS)

    def test_ids(self):
        """Numbers below d_vocab, parted by spaces, and nothing else; taken as they are."""
        for ids, pattern in (("1 640 3", "clean_ids: .*id 640"), ("1 2147483647 3", "id 2147483647"),
                             ("1 2147483648 3", "2147483648 3 is no id"), ("1 " + "9" * 40, "is no id"),
                             ("1 -2 3", "-2 3 is no id"), ("1,2,3", ",2,3 is no id"), ("1 2a 3", "a 3 is no id"),
                             ("a", "a is no id"), ("1 2.0", ".0 is no id"), ("0x10", "x10 is no id"),
                             (" ", "clean_ids is empty")):
            self.check("%s, p.tsv: line 3," % pattern, [["1", "2", 3, 4], [ids, "1 2 3", 3, 4]], IDS, ["diff"])
        self.check("answer_id: .*id 640", [["1 2 3", "1 4 3", 640, 4]], IDS)
        self.check("John is no id, p.tsv: line 2,", [["1 2 3", "1 4 3", 3, " John"]], IDS)
        plain = self.quiet("diff", self.tsv([["1 2 3", "1 4 3", 3, 4]], IDS))
        self.assertEqual(self.quiet("diff", self.tsv([["  1 2   3 ", "01 4 3", " 3", "004 "]], IDS)), plain)

    def test_ids_are_texts(self):
        """A text and its ids, <|endoftext|> in front, give the same numbers."""
        def ids(text, *words):
            return self.quiet("tokens", text, *words).splitlines()[0]
        row = [ids(CLEAN), ids(CORRUPTED), ids(" Mary", "--no-bos"), ids(" John", "--no-bos")]
        self.quiet("diff", self.tsv([ROW]), "-o", "a.npy")
        self.quiet("diff", self.tsv([row], IDS), "-o", "b.npy")
        self.assertEqual(self.read("a.npy"), self.read("b.npy"))
        mixed = ["clean", "corrupted_ids", "answer", "wrong_id"]
        self.quiet("diff", self.tsv([[CLEAN, row[1], ROW[2], row[3]]], mixed),
                   "-o", "b.npy")
        self.assertEqual(self.read("a.npy"), self.read("b.npy"))

    def test_files_without_examples(self):
        """Nothing, a BOM, empty lines, names alone, a folder, no file."""
        for data in (b"", b"\n", b"\xef\xbb\xbf", b"\r\n\r\n", b"clean\tcorrupted\tanswer\twrong",
                     b"clean\tcorrupted\tanswer\twrong\n\n\n", b"\xef\xbb\xbfclean\n"):
            self.refused("no examples, p.tsv,", "diff", self.write("p.tsv", data))
            self.refused("no examples, standard input,", "diff", "-", stdin=data)
        self.refused("No such file or directory, none.tsv,", "diff", "none.tsv")
        os.mkdir(self.at("folder"))
        self.refused(", folder,", "diff", "folder")
        self.refused("no column clean|fields", "diff", model("odd"))  # no table at all

    def test_ways_to_write_a_table(self):
        """BOM, CRLF, empty lines, no newline at the end and standard input change nothing but line numbers."""
        lines = ["\t".join(row) for row in (COLUMNS, ROW, [CORRUPTED, CLEAN, " John", " Mary"])]
        want = self.quiet("diff", self.write("p.tsv", "\n".join(lines) + "\n"))
        self.assertEqual([line.split("\t")[0] for line in want.splitlines()], ["line", "2", "3", "mean"])
        for data in ("\n".join(lines), "\r\n".join(lines), "\r\n".join(lines) + "\r\n", "\ufeff" + "\n".join(lines),
                     "\ufeff" + "\r\n".join(lines) + "\r\n", "\n".join(lines) + "\n\n\r\n\n"):
            self.assertEqual(self.quiet("diff", self.write("p.tsv", data)), want)
            self.assertEqual(self.quiet("diff", "-", stdin=data), want)
        said = self.quiet("diff", self.write("p.tsv", "\n\r\n%s\n\n%s\n\n\n%s" % tuple(lines)))
        self.assertEqual([line.split("\t")[0] for line in said.splitlines()], ["line", "5", "8", "mean"])
        self.assertEqual([line.split("\t")[1:] for line in said.splitlines()],
                         [line.split("\t")[1:] for line in want.splitlines()])
        self.refused("line 6,", "diff", self.write("p.tsv", "\n\r\n%s\n\n\nbad" % lines[0]))
        self.refused("no examples", "diff", self.write("p.tsv", "\r".join(lines)))  # CR alone ends no line
        self.refused("no column clean", "diff", self.write("p.tsv", "\n".join(["\ufeff\ufeff" + lines[0]] + lines[1:])))

    def test_any_bytes(self):
        """NUL, control bytes and bytes that are no UTF-8 are tokens like others, and cut nothing off."""
        def tokens(text):
            data = b"clean\n" + text + b"\n"
            self.quiet("cache", self.write("p.tsv", data), "--names", "hook_embed", "-o", "c.safetensors")
            return list(util.read_safetensors(self.at("c.safetensors"))[0]["tokens"].data)
        parts = [tokens(b"When" + byte + b" John and") for byte in (b"\0", b"\x01", b"\xff")]
        self.assertEqual([len(ids) for ids in parts], [5, 5, 5])
        self.assertEqual(len({ids[2] for ids in parts}), 3)
        self.assertEqual(len({tuple(ids[:2] + ids[3:]) for ids in parts}), 1)
        self.assertEqual(tokens(b"a\rb"), tokens(b"a\rb\r"))  # a CR is a CR, but at the line's end
        self.assertNotEqual(tokens(b"a\rb"), tokens(b"ab"))
        self.refused("no column clean", "diff", self.write(
            "p.tsv", b"cl\0ean\tcorrupted\tanswer\twrong\na\ta\t a\t a\n"))
        self.refused("is no id, p.tsv: line 2,", "diff", self.write(
            "p.tsv", b"clean_ids\tcorrupted_ids\tanswer_id\twrong_id\n1 2\0 3\t1 2 3\t1\t2\n"))
        for data in (b"\0", b"\0\n\0\n", b"\xff\xfe\n\xff\n", os.urandom(3000).replace(b"\t", b" ")):
            self.refused("actpatch", "diff", self.write("p.tsv", data))
        self.quiet("patch", self.write("p.tsv", b"clean\tcorrupted\tanswer\twrong\na\0\xff\x02b\tb\0\xff\x02b\ta\tb\n"),
                   "--no-bos", "--sweep", "resid_pre", "-o", "x.json", "--metric", "kl")
        json.loads(self.read("x.json").decode("utf-8"))

    def test_globs(self):
        """A glob that matches no hook point is named, and nothing is written."""
        for names in ("nothing", "hook_embed,nothing", "nothing,*", "hook_embe", "blocks.4.hook_resid_pre", "", "*,",
                      "HOOK_EMBED", "[!h]ook_embed"):
            bad = [glob for glob in names.split(",") if glob not in ("*", "hook_embed")][0]
            self.refused("no hook point .*, %s, " % re.escape(bad), "cache", "--text", "a", "--names", names, "-o",
                         "x.safetensors")
        for names, want in (("*", 4 + 4 * 17), ("*resid_pre", 4), ("blocks.[13].hook_mlp_out", 2),
                            ("blocks.?.attn.hook_[qk]", 8),
                            ("hook_embed,*embed", 2), ("*hook_result", 4), ("blocks.[!0].ln1.*", 6)):
            self.quiet("cache", "--text", "a", "--names", names, "-o", "x.safetensors")
            found = set(util.read_safetensors(self.at("x.safetensors"))[0]) - {"tokens", "logits"}
            self.assertEqual(len(found), want, names)

    def test_warnings(self):
        """A double space and an answer without its space are told once a file, with the line; ids are not."""
        double = [text.replace("shops,", "shops, ") for text in (CLEAN, CORRUPTED)]
        done = self.succeeds("diff", self.tsv([ROW, double + ROW[2:], double + ROW[2:]]))
        self.assertRegex(done.stderr, "^actpatch: warning: clean has a double space.*, p.tsv: line 3, [^\n]*\n$")
        done = self.succeeds("diff", self.tsv([ROW, ROW[:2] + ["M", "J"], ROW[:2] + ["J", "M"]]))
        self.assertRegex(done.stderr, "^actpatch: warning: answer has no leading space, p.tsv: line 3, [^\n]*\n$")
        done = self.succeeds("patch", self.tsv([double + ["M", "J"]] * 3), "--sweep", "resid_pre")
        self.assertEqual(len(done.stderr.splitlines()), 2)
        self.assertEqual(self.quiet("diff", self.tsv([["1  2", "1  2", "3", "4"]], IDS)).count("\n"), 3)
        done = self.succeeds("patch", self.tsv([[CLEAN, CLEAN] + ROW[2:]]), "--sweep", "resid_pre", "--normalize")
        self.assertRegex(done.stderr, "^actpatch: warning: [^\n]*, --normalize, [^\n]*\n$")


# ---- what is written -----------------------------------------------------------------------------------


class Outputs(Case):
    def values(self, name):
        """The flat values of a table in any format."""
        data = self.read(name)
        if name.endswith(".npy"):
            return list(util.read_npy(self.at(name)).data)
        if name.endswith(".json"):
            return [float("nan") if value is None else value for value in json.loads(data.decode())["values"]]
        return [float(line.rpartition(",")[2]) for line in data.decode().splitlines()[1:]]

    def test_formats_agree(self):
        """Several -o in one call: .npy, .csv, .json and - hold the same numbers, - as CSV."""
        said = self.quiet("patch", self.tsv([ROW]), "--sweep", "attn_head_q_by_pos", "-o", "x.npy", "-o", "x.csv",
                          "-o", "-", "-o", "x.json", "-o", "y.npy")
        self.assertEqual(said.encode(), self.read("x.csv"))
        self.assertEqual(self.read("x.npy"), self.read("y.npy"))
        wide, single = self.values("x.csv"), self.values("x.npy")
        self.assertEqual(len(wide), 4 * 15 * 4)
        self.assertEqual(wide, self.values("x.json"))
        self.assertTrue(all(abs(a - b) <= 1e-7 * abs(b) for a, b in zip(single, wide)))
        self.assertEqual(len(single), len(wide))
        self.assertEqual(set(self.files()), {"p.tsv", "x.npy", "x.csv", "x.json", "y.npy"})
        head = json.loads(self.read("x.json").decode())
        self.assertEqual((head["sweep"], head["shape"]), ("attn_head_q_by_pos", [4, 15, 4]))
        self.assertEqual(head["axes"], ["layer", "pos", "head"])

    def test_several_tables(self):
        """Several sweeps become FILE-SWEEP.EXT; on standard output they follow each other."""
        name = self.tsv([ROW])
        said = self.quiet("patch", name, "--sweep", "resid_pre,mlp_out,resid_pre", "-o", "x.y.csv", "-o", "-")
        self.assertEqual(set(self.files()), {"p.tsv", "x.y-resid_pre.csv", "x.y-mlp_out.csv"})
        self.assertEqual(said.encode(), self.read("x.y-resid_pre.csv") + self.read("x.y-mlp_out.csv"))
        self.quiet("patch", name, "--sweep", "all", "-o", "all.npy")
        self.assertEqual(len([file for file in self.files() if file.startswith("all-")]), 18)
        self.assertNotIn("all-attn_head_pattern_dest_src_pos.npy", self.files())

    def test_diff(self):
        """diff prints what it writes; one column where there is no corrupted prompt."""
        name = self.tsv([ROW, [CORRUPTED, CLEAN, " John", " Mary"]])
        said = self.quiet("diff", name, "-o", "d.csv", "-o", "d.npy", "-o", "d.json")
        self.assertEqual(said.replace("\t", ","), self.read("d.csv").decode())
        self.assertEqual(self.quiet("diff", name, "-o", "-"), self.read("d.csv").decode())
        self.assertEqual(util.read_npy(self.at("d.npy")).shape, (2, 2))
        found = json.loads(self.read("d.json").decode())
        self.assertEqual([row["line"] for row in found["examples"]], [2, 3])
        rows = [line.split("\t") for line in said.splitlines()]
        self.assertEqual(rows[0], ["line", "clean", "corrupted"])
        self.assertEqual([[float(x) for x in row[1:]] for row in rows[1:3]],
                         [[row["clean"], row["corrupted"]] for row in found["examples"]])
        self.assertEqual([float(x) for x in rows[3][1:]], [found["clean"], found["corrupted"]])
        self.quiet("diff", self.tsv([[CLEAN, " Mary", " John"]], ["clean", "answer", "wrong"]), "-o", "one.npy",
                   "-o", "one.json")
        self.assertEqual(util.read_npy(self.at("one.npy")).shape, (1, 1))
        self.assertIsNone(json.loads(self.read("one.json").decode())["corrupted"])

    def test_folders_that_refuse(self):
        """A target that cannot be written: an error before the work, other files are not made."""
        os.mkdir(self.at("folder.npy"))
        name = self.tsv([ROW])
        self.write("old.npy", "old")
        for path in ("no/such/x.npy", "folder.npy", "x" * 300 + ".npy"):
            for words in (["diff", name], ["patch", name, "--sweep", "resid_pre"]):
                error = self.refused(re.escape(path[:100]), *(words + ["-o", "good.npy", "-o", "old.npy", "-o", path]))
                self.assertIn("cannot be written", error)
        for path in ("pipe.npy", "null.npy"):  # neither replaced nor waited for
            os.mkfifo(self.at(path)) if path == "pipe.npy" else os.symlink(os.devnull, self.at(path))
            for words in (["diff", name], ["patch", name, "--sweep", "resid_pre"]):
                self.refused("cannot be written", *(words + ["-o", "good.npy", "-o", path]))
            os.rename(self.at(path), self.at("behind.npy.part"))
            self.refused("cannot be written", "patch", name, "--sweep", "resid_pre", "-o", "behind.npy")
            self.refused("not an ordinary file", "info", "-m", "behind.npy.part")
            os.remove(self.at("behind.npy.part"))
        self.refused("no/f.bin", "fold", "-o", "no/f.bin")
        self.refused("no/c.safetensors", "cache", "--text", "a", "--names", "*", "-o", "no/c.safetensors")

    def test_every_command_refuses_bad_outputs(self):
        """Unknown endings are wrong calls; a folder, a missing one and a file in a folder's place, errors."""
        self.one_fact()
        os.mkdir(self.at("folder.d"))
        self.write("plain", "no folder")
        for words, endings in WRITERS:
            for path in ("x", "x.foo", "x" + endings[0].upper(), "x%s.gz" % endings[0], "folder.d/", "", "."):
                if endings[0] != ".bin":  # fold takes any name
                    self.fails(2, "ending", *(words + ["-o", path]))
            for ending in endings:
                if not os.path.isdir(self.at("d" + ending)):
                    os.mkdir(self.at("d" + ending))
                for path, why in (("d" + ending, "Is a directory"), ("no/x" + ending, "No such file"),
                                  ("plain/x" + ending, "Not a directory"), ("x" * 300 + ending, "File name too long")):
                    self.refused("cannot be written: %s[^,]*, %s" % (why, path[:50]), *(words + ["-o", path]))
            self.assertFalse(any(os.listdir(self.at(name)) for name in os.listdir(self.folder)
                                 if os.path.isdir(self.at(name))), words)

    def test_every_command_on_a_full_disk(self):
        """One line, no half file, and what stood under the name before is still there."""
        disk = self.at("disk")
        os.mkdir(disk)
        if os.geteuid() != 0 or not shutil.which("mount") or subprocess.call(
                ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], stderr=subprocess.DEVNULL):
            self.skipTest("a tiny file system needs root and mount")
        self.addCleanup(subprocess.call, ["umount", disk])
        self.one_fact()
        for ending in sorted({ending for _, endings in WRITERS for ending in endings}):
            self.write("disk/x" + ending, "old")
        try:
            self.write("disk/filler", bytes(1 << 20))
        except OSError:
            pass
        before = {name: self.read("disk/" + name) for name in os.listdir(disk)}
        for words, endings in WRITERS:
            for ending in endings:
                done = self.actpatch(*(words + ["-o", "disk/x" + ending]))
                self.assertEqual(done.returncode, 1, words)
                self.assertRegex(done.stderr, "^actpatch: could not be written[^\n]*, disk/x[^\n]*, [^\n]+\n$", words)
                after = {name: self.read("disk/" + name) for name in os.listdir(disk)}
                after.pop("x%s.part" % ending, None)  # of a sweep: what was done is kept
                self.assertEqual(after, before, words)

    def test_old_files_survive_errors(self):
        """What stood under the name stays until the new file is whole."""
        self.write("x.json", "old")
        self.write("x.safetensors", "old")
        self.write("x.bin", "old")
        self.refused("2 tokens", "diff", self.tsv([ROW[:2] + [" Mary John", " John"]]), "-o", "x.json")
        self.refused("no hook", "cache", "--text", "a", "--names", "x", "-o", "x.safetensors")
        self.refused("No such", "fold", "-m", "none.bin", "-o", "x.bin")
        self.assertEqual([self.read("x." + ending) for ending in ("json", "safetensors", "bin")], [b"old"] * 3)
        self.quiet("diff", self.tsv([ROW]), "-o", "x.json")
        self.quiet("fold", "-o", "x.bin")
        self.assertEqual(set(self.files()), {"p.tsv", "x.json", "x.safetensors", "x.bin"})
        self.assertNotEqual(self.read("x.json"), b"old")

    @unittest.skipUnless(os.path.exists("/dev/full"), "this system has no /dev/full")
    def test_prompts_are_never_overwritten(self):
        """An output that is the file of prompts, by whatever name, is an error, and the prompts stay."""
        for name, words in (("in.csv", ["diff"]), ("in.npy", ["patch", "--sweep", "resid_pre"]),
                            ("in.html", ["report"])):
            os.rename(self.at(self.tsv([ROW])), self.at(name))
            before = self.read(name)
            os.symlink(name, self.at("link-" + name))
            for output in (name, "./" + name, "link-" + name):
                self.refused("it is what is read, ", *(words + [name, "-o", output]))
            self.assertEqual(self.read(name), before)
            self.assertEqual([file for file in self.files() if ".tmp" in file or ".part" in file], [])

    def test_standard_output_that_is_full(self):
        """What could not be printed is an error too."""
        printers = [words for words, endings in WRITERS if ".csv" in endings]
        printers += [words + ["-o", "-"] for words in printers]
        for words in [["info"], ["tokens", "a"], ["top", "a"], ["-h"], ["patch", "-h"]] + printers:
            with open("/dev/full", "wb") as full:
                done = subprocess.run([util.binary()] + words, stdout=full, stderr=subprocess.PIPE, cwd=self.folder,
                                      env=dict(os.environ, ACTPATCH_MODEL=util.TINY_MODEL))
            self.assertEqual(done.returncode, 1, words)
            self.assertRegex(done.stderr.decode(), "^actpatch: [^\n]*, standard output, [^\n]*\n$")

    def test_odd_file_names(self):
        """Spaces, dashes and newlines in names; an error about them is still one line."""
        self.quiet("diff", self.tsv([ROW], name="a b\t;c.tsv"), "-o", "-x y.npy", "-o", "new\nline.csv")
        self.assertIn("-x y.npy", self.files())
        self.assertIn("new\nline.csv", self.files())
        self.refused("none", "diff", "none\n\x1b[31m; here")
        self.refused("none", "info", "-m", "none\n" + "x" * 500)
        self.refused("p{20}.tsv: line 2,", "diff", self.tsv([["a", "b c", " a", " a"]], name="p" * 200 + ".tsv"))

    def test_nothing_but_the_inputs_counts(self):
        """Threads, memory, kernels and the plain loop change no byte of any output; --stats adds its own."""
        words = ["patch", os.path.join(util.GOLDEN, "scaled", "prompts.tsv"), "-m", model("scaled"), "--sweep",
                 "resid_pre,attn_head_v_all_pos", "--metric", "logprob", "-o", "x.json", "-o", "x.npy", "-o", "x.csv"]
        found = []
        for more in ([], ["--threads", "3"], ["--max-memory", "7M"], ["--plain"], ["--brute"]):
            self.quiet(*(words + more))
            found.append(self.files())
        self.assertEqual(len(found[0]), 6)
        self.assertTrue(all(files == found[0] for files in found))
        done = self.succeeds(*(words + ["--stats"]))
        stats = json.loads(done.stderr)
        shape = json.loads(self.read("x-resid_pre.json").decode())["shape"]
        self.assertEqual(stats["cells"] % (shape[0] * shape[1] + 3 * 2), 0)
        for name in ("cells", "cells_skipped", "rows", "rows_shared", "flops", "weight_bytes_read", "peak_bytes"):
            self.assertGreater(stats[name], 0, name)
        self.assertEqual(json.loads(self.read("x-resid_pre.json").decode())["stats"], stats)
        self.assertEqual(self.read("x-resid_pre.npy"), found[0]["x-resid_pre.npy"])


# ---- tokens and top ------------------------------------------------------------------------------------


class Texts(Case):
    def test_tokens(self):
        """Two lines a text: the ids, and the tokens between bars."""
        said = self.quiet("tokens", CLEAN, " John", "")
        lines = said.splitlines()
        self.assertEqual(len(lines), 6)
        self.assertTrue(lines[1].startswith("|<|endoftext|>|When| John| and| Mary|"), lines[1])
        self.assertEqual(lines[1].count("|"), len(lines[0].split()) + 3)  # two are in <|endoftext|>
        self.assertEqual(lines[0].split()[0], "639")
        self.assertEqual((lines[4], lines[5]), ("639", "|<|endoftext|>|"))
        bare = self.quiet("tokens", "--no-bos", CLEAN, " John", "").splitlines()
        self.assertEqual(bare[0], lines[0][4:])
        self.assertEqual(bare[1].replace("|", ""), CLEAN)
        self.assertEqual((bare[2].count(" "), bare[3], bare[4], bare[5]), (0, "| John|", "", "|"))

    def test_escapes(self):
        """\\n \\t \\r \\\\ and \\xHH for what a line cannot show; characters stay."""
        def shown(text):
            done = self.actpatch("tokens", "--no-bos", text, binary_output=True)
            self.assertEqual((done.returncode, done.stderr), (0, b""))
            ids, line = done.stdout.split(b"\n")[:2]
            self.assertEqual(len(ids.split()), line.count(b"|") - 1 - text.count("|"))
            return line[1:-1].replace(b"|", b"").decode()
        self.assertEqual(shown("a\nb\tc\rd\\e"), "a\\nb\\tc\\rd\\\\e")
        self.assertEqual(shown("\x01\x1f\x7f"), "\\x01\\x1F\\x7F")
        self.assertEqual(shown("\udcff"), "\\xFF")
        self.assertEqual(re.sub(r"\\x", "", shown("\u00e9\u2603")), "C3A9E29883")  # a byte a token here
        self.assertEqual(shown("plain text"), "plain text")

    def test_top(self):
        """Ranks from 0, logits that fall, probabilities that sum to 1; then the answers, as they are."""
        lines = [line.split("\t") for line in self.quiet("top", CLEAN, "-k", "10000").splitlines()]
        self.assertEqual([int(line[0]) for line in lines], list(range(640)))
        self.assertEqual(sorted(int(line[1]) for line in lines), list(range(640)))
        logits = [float(line[2]) for line in lines]
        self.assertEqual(logits, sorted(logits, reverse=True))
        self.assertTrue(abs(sum(float(line[3]) for line in lines) - 1) <= 1e-6)
        self.assertEqual(self.quiet("top", CLEAN).splitlines(), ["\t".join(line) for line in lines[:10]])
        said = self.quiet("top", CLEAN, "-k", "0", "--answer", " Mary", "--answer", " John", "--answer", " Mary")
        want = {line[4]: "\t".join(line) for line in lines}
        self.assertEqual(said.splitlines(), [want["| Mary|"], want["| John|"], want["| Mary|"]])
        self.assertEqual(self.quiet("top", CLEAN, "-k", "0"), "")


# ---- the screen ----------------------------------------------------------------------------------------


class Screen(Case):
    def terminal(self, columns, *words, **env):
        """What the program prints on a terminal so wide."""
        try:
            import fcntl
            import pty
            import termios
        except ImportError:
            self.skipTest("this system has no pseudo terminals")
        reader, writer = pty.openpty()
        fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        environment = {name: value for name, value in os.environ.items()
                       if name not in ("NO_COLOR", "COLORTERM", "COLUMNS", "ACTPATCH_MODEL")}
        environment.update({"TERM": "xterm-256color", "ACTPATCH_MODEL": util.TINY_MODEL}, **env)
        process = subprocess.Popen([util.binary()] + list(words), stdin=subprocess.DEVNULL, stdout=writer,
                                   stderr=subprocess.PIPE, env=environment, cwd=self.folder)
        os.close(writer)
        errors = []
        thread = threading.Thread(target=lambda: errors.append(process.stderr.read()))
        thread.start()
        data = b""
        while True:
            try:
                piece = os.read(reader, 65536)
            except OSError:  # Linux: the other end is closed
                break
            if not piece:
                break
            data += piece
        os.close(reader)
        thread.join()
        process.stderr.close()
        self.assertEqual((process.wait(), errors[0]), (0, b""))
        return data.decode().replace("\r\n", "\n")

    def sweep(self, name="resid_pre", *words):
        row = ["Then John and Mary went", "Then John and John went", " to", " and"]
        return ["patch", self.tsv([row]), "--sweep", name, *words]

    def test_colours(self):
        """Where stdout is a terminal that wants them: TERM, NO_COLOR and --color, in rising order."""
        def coloured(*words, **env):
            return "\033[" in self.terminal(80, *self.sweep("resid_pre", *words), **env)
        self.assertTrue(coloured())
        self.assertFalse(coloured(TERM="dumb"))
        self.assertFalse(coloured(TERM=""))
        self.assertFalse(coloured(NO_COLOR="1"))
        self.assertTrue(coloured(NO_COLOR=""))
        self.assertFalse(coloured("--color", "never"))
        self.assertTrue(coloured("--color", "always", NO_COLOR="1"))
        self.assertTrue(coloured("--color", "always", TERM="dumb"))
        self.assertFalse(coloured("--color", "auto", NO_COLOR="1"))
        self.assertIn("48;2;", self.terminal(80, *self.sweep(), COLORTERM="truecolor"))
        self.assertIn("48;5;", self.terminal(80, *self.sweep()))

    def test_pipes_are_not_coloured(self):
        """Unless --color always says so; the text is the same."""
        plain = self.quiet(*self.sweep(), env={"NO_COLOR": "", "TERM": "xterm-256color", "COLORTERM": "truecolor"})
        self.assertNotIn("\033", plain)
        forced = self.quiet(*self.sweep("resid_pre", "--color", "always"))
        self.assertIn("\033[", forced)
        self.assertEqual(len(plain.splitlines()), len(forced.splitlines()))
        self.assertTrue(all(len(ESCAPE.sub("", line)) <= 80 for line in forced.splitlines()[2:]))

    def test_width(self):
        """On terminals of 200, 80, 40 and 20 columns no row of a grid is wider; every cell is there."""
        for sweep, cells in (("resid_pre", 28), ("attn_head_pattern_by_pos", 112), ("block_every", 84)):
            for columns in (200, 80, 40, 20):
                for words in ([], ["--color", "never"]) if columns < 80 else ([],):
                    with self.subTest(sweep=sweep, columns=columns, words=words):
                        text = self.terminal(columns, *self.sweep(sweep, *words))
                        lines = text.splitlines()
                        self.assertRegex(lines[0], "^%s " % sweep)
                        self.assertRegex(lines[1], "^unpatched: clean ")
                        wide = [ESCAPE.sub("", line) for line in lines[2:]]
                        over = [line for line in wide if len(line) > columns and not line.startswith("red ")]
                        self.assertEqual(over, [])
                        if not words:
                            self.assertEqual(text.count("\033[48;"), cells)
                        self.assertEqual(text.count("\033[0m"), text.count("\033[48;"))

    def test_numbers_on_the_screen(self):
        """Without a terminal all digits are there: the numbers of the .npy, rounded as %.9g."""
        said = self.quiet(*self.sweep("attn_head_out_all_pos", "-o", "x.csv"))
        self.assertEqual(said, "")  # -o: no table
        numbers = [line.rpartition(",")[2] for line in self.read("x.csv").decode().splitlines()[1:]]
        shown = self.quiet(*self.sweep("attn_head_out_all_pos")).splitlines()
        self.assertEqual([word for line in shown[3:] for word in line.split()[1:]], numbers)


if __name__ == "__main__":
    unittest.main()
