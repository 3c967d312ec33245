# SPDX-License-Identifier: MIT
"""What only instruments see: races between threads that share a model, and memory that is misused or kept.

ThreadSanitizer takes the library without OpenMP, where the caller's pthreads are all there is. With OpenMP it
cannot: gcc's runtime has no instruments, and with it suppressed the driver does not end in 5 minutes. valgrind runs whole programs. Run by .ci/run:

    ACTPATCH_DEEP=1 python3 tests/test_deep.py          about a minute"""

import os
import shlex
import shutil
import subprocess
import sys
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import util  # noqa: E402

CC = shlex.split(os.environ.get("CC") or "cc")
SOURCE = os.path.join(util.ROOT, "patch.c")
DRIVER = os.path.join(util.TESTS, "library_driver.c")
MODEL = os.path.join(util.TINY, "model.bin")


@unittest.skipUnless(os.environ.get("ACTPATCH_DEEP"), "only where ACTPATCH_DEEP is set: .ci/run does")
class Deep(unittest.TestCase):
    def setUp(self):
        folder = util.scratch()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        self.prompts = os.path.join(self.folder, "in.tsv")
        columns, rows = util.read_tsv(os.path.join(util.TINY, "ioi.tsv"))
        util.write_tsv(self.prompts, columns, rows[:2])

    def at(self, name):
        return os.path.join(self.folder, name)

    def compiled(self, name, *words):
        """The program's path; None where this compiler cannot build it."""
        done = subprocess.run(CC + ["-std=gnu99", "-O1", "-g", "-w"] + list(words) + ["-o", self.at(name), "-lm"],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return None if done.returncode else self.at(name)

    def sanitized(self):
        """The driver with ThreadSanitizer; skips where there is none."""
        probe = self.at("probe.c")
        with open(probe, "w") as file:
            file.write("int main(void) { return 0; }\n")
        if not self.compiled("probe", "-fsanitize=thread", probe) or subprocess.run([self.at("probe")]).returncode:
            self.skipTest("no ThreadSanitizer here")
        return self.compiled("threads", "-fsanitize=thread", "-pthread", "-DPATCH_NO_MAIN", "-D_POSIX_C_SOURCE=200809L",
                             "-I", util.ROOT, SOURCE, DRIVER)

    def threads(self, program):
        done = util.run([program, "threads", MODEL], env={"TSAN_OPTIONS": "exitcode=66"})
        self.assertEqual((done.returncode, done.stderr), (0, ""), done.stdout)
        self.assertRegex(done.stdout, "[1-9][0-9]* checks, 0 failed\n$")

    def test_threads_that_share_a_model(self):
        """Two pthreads use one model by every function of patch.h at once: no race, the same results."""
        self.threads(self.sanitized())

    def test_the_sanitizer_notices(self):
        """Two threads that count in one number are a race, and are told."""
        source = self.at("race.c")
        with open(source, "w") as file:
            file.write("#include <pthread.h>\nstatic int n;\nstatic void *count(void *p) { for (int i = 0; i < 99999; i++)"
                       " n++; return p; }\nint main(void) { pthread_t t; pthread_create(&t, 0, count, 0); count(0);"
                       " pthread_join(t, 0); return n < 0; }\n")
        self.sanitized()
        done = util.run([self.compiled("race", "-fsanitize=thread", "-pthread", source)])
        self.assertEqual(done.returncode, 66, done.stderr)

    def valgrind(self, *words):
        if not shutil.which("valgrind"):
            self.skipTest("no valgrind here")
        program = self.compiled("actpatch", SOURCE)
        done = util.run(["valgrind", "-q", "--error-exitcode=99", "--leak-check=full", program, words[0], "-m", MODEL] +
                        list(words[1:]), cwd=self.folder)
        self.assertEqual((done.returncode, done.stderr), (0, ""), done.stdout[-2000:])

    def test_valgrind_diff(self):
        """diff: no bad access, nothing uninitialised used, nothing lost."""
        self.valgrind("diff", self.prompts, "-o", "o.json")

    def test_valgrind_sweep(self):
        """patch: the same."""
        self.valgrind("patch", self.prompts, "--sweep", "resid_pre,attn_head_all_pos_every", "-o", "o.npy")

    def test_valgrind_trace(self):
        """trace: the same."""
        columns, rows = util.read_tsv(os.path.join(util.TINY, "facts.tsv"))
        util.write_tsv(self.at("facts.tsv"), columns, rows[:1])
        self.valgrind("trace", self.at("facts.tsv"), "--samples", "2", "-o", "o.json")

    def test_valgrind_report(self):
        """report: the same."""
        self.valgrind("report", self.prompts, "-o", "o.html")


if __name__ == "__main__":
    unittest.main()
