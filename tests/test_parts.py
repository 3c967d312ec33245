# SPDX-License-Identifier: MIT
"""A sweep that is killed, sharded or short of disk loses nothing, and ends in the same bytes."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import util  # noqa: E402

PROMPTS = os.path.join(util.TINY, "ioi.tsv")
SMALL = ["--max-memory", "6800K"]  # groups of some hundred cells: many writes to the part file


def read(path):
    with open(path, "rb") as file:
        return file.read()


class Parts(unittest.TestCase):
    def setUp(self):
        folder = util.scratch()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def at(self, name):
        return os.path.join(self.folder, name)

    def sweep(self, name, *words, **options):
        return util.actpatch("patch", PROMPTS, "--sweep", "attn_head_by_pos_every", "--threads", "1", "-o",
                             self.at(name), *words, **options)

    def test_killed_at_every_write(self):
        """kill -9 in the middle of the first, second, third ... write: the same command ends in the same file."""
        self.assertEqual(self.sweep("whole.npy").returncode, 0)
        whole, n, died = read(self.at("whole.npy")), 1, 0
        while True:
            done = self.sweep("k.npy", *SMALL, env={"ACTPATCH_DIE_AT_WRITE": str(n)})
            if done.returncode == 0:
                break
            self.assertEqual(done.returncode, -signal.SIGKILL)
            self.assertFalse(os.path.exists(self.at("k.npy")))
            self.assertTrue(os.path.exists(self.at("k.npy.part")))
            died += 1
            again = self.sweep("k.npy", *SMALL)
            self.assertEqual(again.returncode, 0, again.stderr)
            self.assertEqual(read(self.at("k.npy")), whole)
            self.assertFalse(os.path.exists(self.at("k.npy.part")))
            os.remove(self.at("k.npy"))
            n += 1 if n < 3 else 9
        self.assertGreaterEqual(died, 3)

    def test_a_killed_run_goes_on_and_does_not_begin_again(self):
        """Cells in the part file are not computed a second time."""
        self.sweep("k.npy", *SMALL, env={"ACTPATCH_DIE_AT_WRITE": "5"})
        done = self.sweep("k.npy", "--stats", *SMALL)
        self.assertEqual(done.returncode, 0, done.stderr)
        import json
        cells = json.loads(done.stderr[done.stderr.index("{"):])["cells"]
        whole = util.must("patch", PROMPTS, "--sweep", "attn_head_by_pos_every", "--stats", "-o", self.at("w.npy"))
        self.assertLess(cells, json.loads(whole.stderr[whole.stderr.index("{"):])["cells"])

    def test_killed_at_random_moments(self):
        """SIGKILL at 50 random moments of a sweep of about five seconds: the same file in the end."""
        columns, rows = util.read_tsv(PROMPTS)
        many = util.write_tsv(self.at("many.tsv"), columns, rows * 5)
        argv = [util.binary(), "patch", many, "--sweep", "attn_head_pattern_dest_src_pos", "--threads", "1"] + SMALL
        argv = [str(word) for word in argv]
        subprocess.run(argv + ["-o", self.at("whole.npy")], check=True)
        choice, kills, grew, size = random.Random(5), 0, 0, 0
        while kills < 50 and not os.path.exists(self.at("r.npy")):
            child = subprocess.Popen(argv + ["-o", self.at("r.npy")])
            time.sleep(choice.uniform(0.02, 0.15))
            kills += child.poll() is None
            child.kill()
            child.wait()
            before, size = size, os.path.getsize(self.at("r.npy.part")) if os.path.exists(self.at("r.npy.part")) else 0
            grew += size > before
        subprocess.run(argv + ["-o", self.at("r.npy")], check=True)
        self.assertEqual(read(self.at("r.npy")), read(self.at("whole.npy")))
        self.assertGreater(kills, 0)
        self.assertGreater(grew, 1)

    def test_other_settings_are_refused_with_the_line_that_says_which(self):
        """A part of another direction, metric, prompt file or model is not gone on with."""
        self.sweep("k.npy", *SMALL, env={"ACTPATCH_DIE_AT_WRITE": "3"})
        part = read(self.at("k.npy.part"))
        columns, rows = util.read_tsv(PROMPTS)
        other = util.write_tsv(self.at("other.tsv"), columns, rows[::-1])
        for words, said in ((["--noising"], "noising"), (["--metric", "prob"], "metric"),
                            (["--no-processing"], "settings"), (["--per-prompt"], "per-prompt")):
            done = self.sweep("k.npy", *(SMALL + words))
            self.assertEqual(done.returncode, 1)
            self.assertIn(said, done.stderr)
            self.assertEqual(done.stderr.count("\n"), 1)
        done = util.actpatch("patch", other, "--sweep", "attn_head_by_pos_every", "-o", self.at("k.npy"), *SMALL)
        self.assertEqual(done.returncode, 1)
        self.assertIn("prompts", done.stderr)
        self.assertEqual(read(self.at("k.npy.part")), part)

    def test_damaged_parts_are_computed_again(self):
        """A byte changed or cut off anywhere in the records changes nothing in the end."""
        self.assertEqual(self.sweep("whole.npy").returncode, 0)
        self.sweep("k.npy", *SMALL, env={"ACTPATCH_DIE_AT_WRITE": "6"})
        part = read(self.at("k.npy.part"))
        head = int(part[22:32])
        choice = random.Random(6)
        for _ in range(4):
            at = choice.randrange(head, len(part))
            for data in (part[:at], part[:at] + bytes([part[at] ^ 1]) + part[at + 1:]):
                with open(self.at("k.npy.part"), "wb") as file:
                    file.write(data)
                done = self.sweep("k.npy")
                self.assertEqual(done.returncode, 0, done.stderr)
                self.assertEqual(read(self.at("k.npy")), read(self.at("whole.npy")))

    def test_a_full_disk_keeps_what_was_done(self):
        """With no room left the call fails with one line; with room again it ends in the same file."""
        if os.geteuid() != 0 or not shutil.which("mount"):
            self.skipTest("needs root and mount for a tiny file system")
        disk = self.at("disk")
        os.mkdir(disk)
        if subprocess.call(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk],
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
            self.skipTest("tmpfs cannot be mounted here")
        self.addCleanup(subprocess.call, ["umount", disk])
        done = self.sweep("disk/k.npy", *SMALL)
        self.assertEqual(done.returncode, 1)
        self.assertEqual(done.stderr.count("\n"), 1, done.stderr)
        self.assertGreater(os.path.getsize(os.path.join(disk, "k.npy.part")), 10000)
        shutil.copy(os.path.join(disk, "k.npy.part"), self.at("k.npy.part"))
        self.assertEqual(self.sweep("whole.npy").returncode, 0)
        self.assertEqual(self.sweep("k.npy", *SMALL).returncode, 0)
        self.assertEqual(read(self.at("k.npy")), read(self.at("whole.npy")))

    def test_shards_join_to_the_single_run(self):
        """--shard I/N and merge give every format byte for byte, for 1, 3 and 7 shards."""
        files = ["-o", "%s.npy", "-o", "%s.json", "-o", "%s.csv", "-o", "%s.svg"]
        words = ["patch", PROMPTS, "--sweep", "block_every,attn_head_out_all_pos", "--per-prompt"]

        def named(stem):
            return [word % self.at(stem) if "%" in word else word for word in files]
        util.must(*(words + named("whole")))
        made = sorted(name for name in os.listdir(self.folder))
        for n in (1, 3, 7):
            parts = []
            for i in range(1, n + 1):
                util.must(*(words + ["-o", self.at("s%d-%d.json" % (n, i)), "--shard", "%d/%d" % (i, n)]))
                parts.append(self.at("s%d-%d.json.part" % (n, i)))
            util.must("merge", *(parts[::-1] + named("merged")))
            for name in made:
                self.assertEqual(read(self.at(name)), read(self.at(name.replace("whole", "merged"))), name)

    def test_missing_and_foreign_parts_are_refused(self):
        """merge names what is missing or does not belong."""
        for i in (1, 2):
            util.must("patch", PROMPTS, "--sweep", "resid_pre", "-o", self.at("a%d.npy" % i), "--shard", "%d/2" % i)
        util.must("patch", PROMPTS, "--sweep", "resid_pre", "--noising", "-o", self.at("b.npy"), "--shard", "2/2")
        for parts, said in ((["a1"], "item"), (["a1", "b"], "noising")):
            done = util.actpatch("merge", *([self.at(part + ".npy.part") for part in parts] + ["-o", self.at("m.npy")]))
            self.assertEqual(done.returncode, 1)
            self.assertIn(said, done.stderr)
            self.assertFalse(os.path.exists(self.at("m.npy")))
        for data in (b"", b"actpatch part 1\nhead: 9999999999\n", read(PROMPTS), os.urandom(400)):
            with open(self.at("x.part"), "wb") as file:
                file.write(data)
            done = util.actpatch("merge", self.at("x.part"), "-o", self.at("m.npy"))
            self.assertEqual(done.returncode, 1)
            self.assertEqual(done.stderr.count("\n"), 1, done.stderr)

    def test_bad_shards_are_usage_errors(self):
        """I/N with I from 1 to N, and a file to write into."""
        for shard in ("0/2", "3/2", "1", "1/0", "a/b", "1/2/3", ""):
            done = util.actpatch("patch", PROMPTS, "--sweep", "resid_pre", "-o", self.at("x.npy"), "--shard", shard)
            self.assertEqual(done.returncode, 2, shard)
        self.assertEqual(util.actpatch("patch", PROMPTS, "--sweep", "resid_pre", "--shard", "1/2").returncode, 2)


class ManyPrompts(unittest.TestCase):
    def test_a_thousand_examples_in_the_memory_of_a_hundred(self):
        """With --max-memory 1,000 examples take little more than 100 and give the values of smaller files."""
        folder = util.scratch()
        self.addCleanup(folder.cleanup)
        choice, rows = random.Random(3), []
        for _ in range(1000):
            clean = [639] + [choice.randrange(300, 600) for _ in range(11)]
            corrupted = list(clean)
            corrupted[choice.randrange(2, 10)] = choice.randrange(300, 600)
            rows.append([clean, corrupted] + choice.sample(range(300, 600), 2))

        def sweep(some, *words):
            """(values, peak resident bytes) of the examples rows[some]."""
            prompts = util.write_tsv(os.path.join(folder.name, "p.tsv"),
                                     ["clean_ids", "corrupted_ids", "answer_id", "wrong_id"], rows[some])
            out = os.path.join(folder.name, "out.npy")
            child = subprocess.Popen([util.binary(), "patch", prompts, "--sweep", "block_every", "--per-prompt",
                                      "--threads", "1", "-m", util.TINY_MODEL, "-o", out] + list(words))
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = status
            self.assertEqual(status, 0)
            return util.read_npy(out).data, usage.ru_maxrss * 1024
        values, peak = sweep(slice(0, 1000), "--max-memory", "48M")
        few, peak_of_few = sweep(slice(0, 100), "--max-memory", "48M")
        each = len(few) // 100
        self.assertEqual(len(values), 1000 * each)
        self.assertEqual(values[:100 * each], few)
        self.assertEqual(values[900 * each:], sweep(slice(900, 1000))[0])
        self.assertEqual(values[500 * each:501 * each], sweep(slice(500, 501))[0])
        self.assertLessEqual(peak, 1.25 * peak_of_few)
        self.assertLessEqual(peak, 1.1 * (48 << 20))
        self.assertGreater(sweep(slice(0, 1000))[1], 2 * peak)  # so that the bound is what held it


if __name__ == "__main__":
    unittest.main()
