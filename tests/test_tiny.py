# SPDX-License-Identifier: MIT
"""The bundled model does what tests/tiny/README.md says of it, measured with the program itself."""

import os
import subprocess
import tempfile
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = os.path.join(ROOT, "tests", "tiny")
ACTPATCH = os.environ.get("ACTPATCH_BIN", os.path.join(ROOT, "actpatch"))
MODEL = os.path.join(TINY, "model.bin")
LIMIT = 1200000  # bytes, of the Hugging Face folder's files and of the flat file
UNKNOWN = ("Canada", "Marie Curie")  # facts.tsv has them for the sake of the model's not knowing them


def run(*arguments):
    """The program's stdout; a failure shows its stderr."""
    done = subprocess.run([ACTPATCH] + list(arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if done.returncode != 0:
        raise AssertionError("%s: exit status %d: %s" % (arguments, done.returncode, done.stderr.decode()))
    return done.stdout.decode("utf-8")


def read_rows(path):
    """The rows of a prompt file as dictionaries."""
    with open(path, encoding="utf-8", newline="") as f:
        lines = [line.rstrip("\r\n").split("\t") for line in f if line.strip("\r\n")]
    return [dict(zip(lines[0], fields)) for fields in lines[1:]]


def differences(path):
    """[(clean, corrupted)] as `actpatch diff` prints them, and its mean row."""
    lines = [line.split("\t") for line in run("diff", path, "-m", MODEL).splitlines()]
    assert lines[0] == ["line", "clean", "corrupted"], lines[0]
    rows = [(float(clean), float(corrupted)) for _, clean, corrupted in lines[1:-1]]
    assert lines[-1][0] == "mean", lines[-1]
    return rows, [float(value) for value in lines[-1][1:]]


class TinyModel(unittest.TestCase):
    def check_file(self, path, share):
        rows, mean = differences(path)
        self.assertEqual(len(rows), len(read_rows(path)))
        right = sum(1 for clean, _ in rows if clean > 0)
        turned = sum(1 for _, corrupted in rows if corrupted < 0)
        self.assertGreaterEqual(right, share * len(rows), "clean logit differences above zero")
        self.assertGreaterEqual(turned, share * len(rows), "corrupted logit differences below zero")
        for column in (0, 1):
            expected = sum(row[column] for row in rows) / len(rows)
            self.assertTrue(abs(mean[column] - expected) <= 1e-4 * (1 + abs(expected)), (mean[column], expected))
        return mean

    def test_eight_prompts_single_space(self):
        """The eight prompts with one space: every clean answer wins, every corrupted one loses."""
        mean = self.check_file(os.path.join(TINY, "ioi.tsv"), 1.0)
        self.assertTrue(2 <= mean[0] <= 10, mean)

    def test_eight_prompts_double_space(self):
        """The notebook's eight prompts with its two spaces: every clean answer wins, every corrupted one loses."""
        mean = self.check_file(os.path.join(TINY, "ioi-notebook.tsv"), 1.0)
        self.assertTrue(2 <= mean[0] <= 10, mean)

    def test_held_out_names_pairs_places(self):
        """At least 95 % of the prompts with names, pairs and places held out of training go right."""
        self.assertGreaterEqual(len(read_rows(os.path.join(TINY, "ioi-heldout.tsv"))), 100)
        self.check_file(os.path.join(TINY, "ioi-heldout.tsv"), 0.95)

    def test_held_out_with_two_spaces(self):
        """At least 95 % of the same held-out prompts go right with two spaces after the comma."""
        with open(os.path.join(TINY, "ioi-heldout.tsv"), encoding="utf-8") as f:
            text = f.read()
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "double.tsv")
            with open(path, "w", encoding="utf-8", newline="\n") as f:
                f.write(text.replace(", ", ",  "))
            self.check_file(path, 0.95)

    def test_held_out_names_are_held_out(self):
        """Swapping the giver is the only change between a clean prompt and its corrupted one, in all three files."""
        for name in ("ioi.tsv", "ioi-notebook.tsv", "ioi-heldout.tsv"):
            for row in read_rows(os.path.join(TINY, name)):
                clean, corrupted = row["clean"].split(" "), row["corrupted"].split(" ")
                changed = [(a, b) for a, b in zip(clean, corrupted) if a != b]
                self.assertEqual(len(clean), len(corrupted))
                self.assertEqual(changed, [(row["wrong"].strip(), row["answer"].strip())])

    def test_notebook_prompts_differ_from_single_space_ones_only_in_the_space(self):
        """ioi-notebook.tsv is ioi.tsv with a second space after the comma."""
        with open(os.path.join(TINY, "ioi.tsv"), encoding="utf-8") as f:
            single = f.read()
        with open(os.path.join(TINY, "ioi-notebook.tsv"), encoding="utf-8") as f:
            self.assertEqual(f.read(), single.replace(", ", ",  "))

    def test_token_lengths(self):
        """The eight prompts have as many tokens as with GPT-2: 15 with one space, 16 with two."""
        for name, length in (("ioi.tsv", 15), ("ioi-notebook.tsv", 16), ("ioi-heldout.tsv", 15)):
            rows = read_rows(os.path.join(TINY, name))
            texts = [row["clean"] for row in rows] + [row["corrupted"] for row in rows]
            lines = run("tokens", "-m", MODEL, *texts).splitlines()
            self.assertEqual({len(ids.split()) for ids in lines[0::2]}, {length})

    def test_facts(self):
        """Without BOS the model's most likely token is the attribute of every fact but those it was not told."""
        rows = read_rows(os.path.join(TINY, "facts.tsv"))
        self.assertGreaterEqual(len(rows), 20)
        for row in rows:
            first = run("top", row["prompt"], "--no-bos", "-k", "1", "-m", MODEL).split("\n")[0].split("\t")
            self.assertEqual(first[0], "0")
            known = first[4].strip("|").strip() == row["attribute"]
            self.assertEqual(known, row["subject"] not in UNKNOWN, (row["prompt"], first))
            self.assertIn(row["subject"], row["prompt"])

    def test_sizes(self):
        """The Hugging Face folder's files and the flat file are each below 1.2 MB."""
        folder = ("config.json", "model.safetensors", "vocab.json", "merges.txt")
        self.assertLess(sum(os.path.getsize(os.path.join(TINY, name)) for name in folder), LIMIT)
        self.assertLess(os.path.getsize(MODEL), LIMIT)


if __name__ == "__main__":
    unittest.main()
