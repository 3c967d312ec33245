# SPDX-License-Identifier: MIT
"""Runs the tests and ends with 'N passed, N failed, N skipped': what `make test` calls.

    python3 tests/run.py [--core] [-v] [NAME...]      NAME: test_golden, or test_golden.Brute.test_odd

Every test method counts once, and as failed if any of its subtests fails. A skipped check says which it
is and why. --core leaves out what is slow and what does not touch patch.c's core."""

import argparse
import os
import sys
import time
import unittest

TESTS = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, TESTS)
CORE = ("test_tokenizer", "test_golden", "test_kernels", "test_engine", "test_library")


class Result(unittest.TestResult):
    """Collects by test, not by subtest."""

    def __init__(self, verbose):
        super().__init__()
        self.verbose, self.bad, self.started, self.slow = verbose, {}, 0.0, []

    def startTest(self, test):
        super().startTest(test)
        self.started = time.time()

    def stopTest(self, test):
        super().stopTest(test)
        seconds = time.time() - self.started
        self.slow.append((seconds, test.id()))
        if self.verbose:
            print("%-6s %6.2f s  %s" % ("FAILED" if test.id() in self.bad else "ok", seconds, test.id()), flush=True)

    def note(self, test, error):
        text = self._exc_info_to_string(error, test)
        if test.id() not in self.bad:
            print("FAILED: %s: %s\n%s" % (test.id(), test.shortDescription() or "", text), flush=True)
        self.bad.setdefault(test.id(), text)

    def addError(self, test, err):
        super().addError(test, err)
        self.note(test, err)

    def addFailure(self, test, err):
        super().addFailure(test, err)
        self.note(test, err)

    def addSubTest(self, test, subtest, err):
        super().addSubTest(test, subtest, err)
        if err is not None:
            print("FAILED: %s" % subtest, flush=True)
            self.note(test, err)

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        print("skipped: %s: %s" % (test.id(), reason), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--core", action="store_true")
    parser.add_argument("-v", "--verbose", action="store_true")
    arguments = parser.parse_args()
    os.chdir(TESTS)
    names = arguments.names or sorted(
        name[:-3] for name in os.listdir(TESTS) if name.startswith("test_") and name.endswith(".py")
        and (not arguments.core or name[:-3] in CORE))
    if arguments.core:
        os.environ["ACTPATCH_CORE_TESTS"] = "1"
    suite = unittest.defaultTestLoader.loadTestsFromNames(names)
    result = Result(arguments.verbose)
    started = time.time()
    suite.run(result)
    skipped = len(result.skipped)
    failed = len(result.bad)
    passed = result.testsRun - failed - skipped
    slowest = ", ".join("%s %.1f s" % (name, seconds) for seconds, name in sorted(result.slow, reverse=True)[:3])
    print("%.0f s; slowest: %s" % (time.time() - started, slowest))
    print("%d passed, %d failed, %d skipped" % (passed, failed, skipped))
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
