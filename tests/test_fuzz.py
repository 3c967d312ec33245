# SPDX-License-Identifier: MIT
"""Inputs that fuzzing found, and some near them, once more: tests/fuzz/TARGET-NAME into tests/fuzz_driver.c."""

import os
import shutil
import subprocess
import sys
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import fuzz  # noqa: E402
import util  # noqa: E402

CASES = os.path.join(util.TESTS, "fuzz")


class Replay(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.scratch = util.scratch()
        cls.addClassCleanup(cls.scratch.cleanup)
        cls.binary = os.path.join(cls.scratch.name, "replay")
        cc = os.environ.get("CC") or "cc"
        source = os.path.join(util.TESTS, "fuzz_driver.c")
        words = [cc, "-std=gnu99", "-O1", "-g", "-DREPLAY", source, "-o", cls.binary, "-lm"]
        sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
        if subprocess.run(words[:1] + sanitize + words[1:], stderr=subprocess.DEVNULL).returncode:
            subprocess.check_call(words)

    def replay(self, target):
        """Each case of a target, and what fuzzing of it begins with: no sanitizer says a word."""
        folder = os.path.join(self.scratch.name, target)
        os.makedirs(os.path.join(folder, "run"))
        fuzz.around(os.path.join(folder, "run"))
        cases = [os.path.join(CASES, name) for name in sorted(os.listdir(CASES)) if name.startswith(target + "-")]
        seeds = fuzz.seeds(target, os.path.join(folder, "seeds"))
        cases += [os.path.join(seeds, name) for name in sorted(os.listdir(seeds))]
        done = subprocess.run([self.binary] + cases, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                              cwd=os.path.join(folder, "run"), env=fuzz.environment(target), timeout=300)
        self.assertEqual(done.returncode, 0, done.stderr.decode("utf-8", "replace")[-3000:])
        shutil.rmtree(folder)

    def test_every_case_has_a_target(self):
        """The name of a case says which target it is for."""
        for name in os.listdir(CASES):
            self.assertIn(name.split("-")[0], fuzz.TARGETS)

    def test_the_driver_notices(self):
        """A text that does not come back would end the driver: it does so for a model that is none."""
        env = dict(fuzz.environment("text"), FUZZ_MODEL=os.devnull)
        done = subprocess.run([self.binary, os.path.join(util.TINY, "ioi.tsv")], stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL, env=env, cwd=self.scratch.name)
        self.assertNotEqual(done.returncode, 0)


def add(target):
    def test(self):
        self.replay(target)
    test.__doc__ = Replay.replay.__doc__
    setattr(Replay, "test_" + target, test)


for name in fuzz.TARGETS:
    add(name)

if __name__ == "__main__":
    unittest.main()
