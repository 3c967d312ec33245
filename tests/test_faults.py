# SPDX-License-Identifier: MIT
"""Faults one after the other: memory that is refused, files that fail or come short, files cut or altered
at every place, and programs that are interrupted (tests/faults_driver.c does the first three in one process).
With FAULTS_DEEP=1 three times as many, under sanitizers: what .ci/run does."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import util  # noqa: E402

DEEP = bool(os.environ.get("FAULTS_DEEP"))  # three times as many calls, under sanitizers

# Every command that writes: its outputs, and its words.
COMMANDS = {
    "diff": ("o.json,o.npy", ["diff", "in.tsv", "-o", "o.json", "-o", "o.npy"]),
    "cache": ("o.safetensors", ["cache", "in.tsv", "--names", "*resid_pre", "-o", "o.safetensors"]),
    "patch": ("o.npy,o.svg,o.html", ["patch", "in.tsv", "--sweep", "resid_pre", "-o", "o.npy", "-o", "o.svg", "-o",
                                     "o.html"]),
    "ablate": ("o.csv", ["ablate", "in.tsv", "--heads", "0.0,1.1", "--keep", "--by", "mean", "-o", "o.csv"]),
    "path": ("o.json", ["path", "in.tsv", "-o", "o.json"]),
    "lens": ("o-accumulated.npy,o-layers.npy,o-heads.npy,o-lens.npy", ["lens", "in.tsv", "-o", "o.npy"]),
    "heads": ("o.json", ["heads", "in.tsv", "-o", "o.json"]),
    "attn": ("o.safetensors.npy", ["attn", "in.tsv", "--heads", "0.0", "-o", "o.safetensors.npy"]),
    "trace": ("o.json", ["trace", "in.facts", "--samples", "1", "--kind", "resid", "-o", "o.json"]),
    "report": ("o.html", ["report", "in.tsv", "-o", "o.html"]),
    "fold": ("o.bin", ["fold", "-o", "o.bin"]),
    "merge": ("o.csv", ["merge", "in.part", "-o", "o.csv"]),
}


class Faults(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.scratch = util.scratch()
        cls.addClassCleanup(cls.scratch.cleanup)
        cls.binary = os.path.join(cls.scratch.name, "faults")
        cc = os.environ.get("CC") or "cc"
        words = [cc, "-std=gnu99", "-O1", "-g", os.path.join(util.TESTS, "faults_driver.c"), "-o", cls.binary, "-lm"]
        sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"] if DEEP else ["-O2"]
        if subprocess.run(words[:1] + sanitize + words[1:], stderr=subprocess.DEVNULL).returncode:
            subprocess.check_call(words)

    def setUp(self):
        folder = util.scratch()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        columns, rows = util.read_tsv(os.path.join(util.TINY, "ioi.tsv"))
        util.write_tsv(os.path.join(self.folder, "in.tsv"), columns, rows[:2])
        columns, rows = util.read_tsv(os.path.join(util.TINY, "facts.tsv"))
        util.write_tsv(os.path.join(self.folder, "in.facts"), columns, rows[:1])
        util.must("patch", "in.tsv", "--sweep", "mlp_out", "--shard", "1/1", "-o", "in.npy", cwd=self.folder)
        os.rename(os.path.join(self.folder, "in.npy.part"), os.path.join(self.folder, "in.part"))

    def drive(self, *words):
        env = dict(os.environ, ACTPATCH_MODEL=util.TINY_MODEL, ASAN_OPTIONS="detect_leaks=0", OMP_NUM_THREADS="1")
        done = subprocess.run([self.binary] + list(words), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, cwd=self.folder, env=env, timeout=600)
        text = done.stdout.decode("utf-8", "replace")
        said = os.path.join(self.folder, "said")
        if done.returncode and os.path.exists(said):
            with open(said, errors="replace") as file:
                text += file.read()[-3000:]
        self.assertEqual(done.returncode, 0, text + done.stderr.decode("utf-8", "replace")[-3000:])
        return text

    def calls(self, kind, command):
        outs, words = COMMANDS[command]
        for how in ("once", "all"):
            figures = re.search(r"(\d+) faults among \d+ calls, (\d+) of them errors",
                                self.drive("calls", kind, how, outs, *words))
            self.assertGreater(int(figures.group(1)), 5)
            self.assertGreater(int(figures.group(2)), 0)

    def test_files_cut_or_altered_anywhere(self):
        """Every truncation and bit of head, table and tokenizer, 10,000 of the weights: detected, all of them."""
        path = util.convert(os.path.join(util.GOLDEN, "odd"), os.path.join(self.folder, "odd.bin"), "--no-tokenizer")
        text = self.drive("file", path)
        self.assertIn("10000 bits of weights", text)

    def test_files_with_a_tokenizer_cut_or_altered_anywhere(self):
        """The same for a folded file with a tokenizer."""
        source = os.path.join(self.folder, "source")
        shutil.copytree(os.path.join(util.TESTS, "convert", "base-safetensors"), source)
        for name in os.listdir(os.path.join(util.TESTS, "convert", "tokenizer")):
            path = os.path.join(util.TESTS, "convert", "tokenizer", name)
            if os.path.isfile(path) and not os.path.exists(os.path.join(source, name)):
                shutil.copy(path, source)
        raw = util.convert(source, os.path.join(self.folder, "raw.bin"))
        util.must("fold", "-m", raw, "-o", os.path.join(self.folder, "folded.bin"))
        self.drive("file", os.path.join(self.folder, "folded.bin"))

    def test_interrupted(self):
        """SIGINT, SIGTERM or SIGKILL at any moment of any command: its files are whole or not there."""
        choice = random.Random(4)
        env = dict(os.environ, ACTPATCH_MODEL=util.TINY_MODEL, OMP_NUM_THREADS="1")
        for command, (outs, words) in sorted(COMMANDS.items()):
            argv = [util.binary()] + words
            started = time.time()
            subprocess.run(argv, cwd=self.folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
            seconds, whole = time.time() - started, {}
            for name in outs.split(","):
                with open(os.path.join(self.folder, name), "rb") as file:
                    whole[name] = file.read()
                os.remove(os.path.join(self.folder, name))
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL) * (8 if DEEP else 1):
                child = subprocess.Popen(argv, cwd=self.folder, env=env, stdout=subprocess.DEVNULL,
                                         stderr=subprocess.DEVNULL)
                time.sleep(choice.uniform(0, 1.1 * seconds))
                child.send_signal(number)
                child.wait()
                for name in whole:
                    path = os.path.join(self.folder, name)
                    if os.path.exists(path):
                        with open(path, "rb") as file:
                            self.assertEqual(file.read(), whole[name], "%s: %s" % (command, name))
                        os.remove(path)
            subprocess.run(argv, cwd=self.folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)


def add(kind, command, doc):
    def test(self):
        self.calls(kind, command)
    test.__doc__ = doc % command
    setattr(Faults, "test_%s_%s" % (kind, command), test)


for name in COMMANDS:
    add("memory", name, "%s: each allocation fails, alone and with all later ones: an error, nothing half done.")
    add("files", name, "%s: each call to a file fails, alone and with all later ones: an error, nothing half done.")

if __name__ == "__main__":
    unittest.main()
