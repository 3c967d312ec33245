# SPDX-License-Identifier: MIT
"""Runs the tests and ends with 'N passed, N failed, N skipped': what `make test` calls.

    python3 tests/run.py [--core] [--first] [-v] [NAME...]      NAME: test_golden, or test_golden.Brute.test_odd

Every test method counts once, and as failed if any of its subtests fails. A skipped check says which it
is and why. --core leaves out what is slow and what does not touch patch.c's core; --first ends at the first failure."""

import argparse
import concurrent.futures
import os
import re
import subprocess
import sys
import time
import unittest

TESTS = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, TESTS)
CORE = ("test_golden", "test_engine", "test_library", "test_tokenizer", "test_kernels")
SLOW = re.compile(  # not for --core: they take long, or a build of their own
    "Brute|a_megabyte|every_code_point|anitize|round_trips|without_mmap|head_comment|example_says|header_as|Ctypes|"
    "_(avx2|avx512|plain)$|some_tier|plain_gives|any_bytes_come|altered_sections|refactored|the_driver_can_fail|"
    "Engine.test_(edges|threads|rows)")


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


def run_module(name, words=()):
    """One file of tests in a process of its own: (its output without the last line, passed, failed, skipped)."""
    done = subprocess.run([sys.executable, os.path.join(TESTS, "run.py"), name] + list(words), stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    text = done.stdout.decode("utf-8", "replace").rstrip("\n")
    body, _, last = text.rpartition("\n")
    counts = re.fullmatch(r"(\d+) passed, (\d+) failed, (\d+) skipped", last)
    if counts is None or (done.returncode == 0) != (counts.group(2) == "0" and counts.group(1) != "0"):
        return text + "\nFAILED: %s ended with status %d" % (name, done.returncode), 0, 1, 0
    return (body,) + tuple(map(int, counts.groups()))


def tests_of(suite):
    """The tests in a suite, one by one."""
    return [test for part in suite for test in (tests_of(part) if isinstance(part, unittest.TestSuite) else [part])]


def run_first(names):
    """The core's files, one after the other, up to the first that fails."""
    sums = [0, 0, 0]
    for name in names:
        found = run_module(name, ["--core", "--first"])
        print("%s: %s" % (name, found[0]), flush=True)
        sums = [total + n for total, n in zip(sums, found[1:])]
        if sums[1]:
            break
    print("%d passed, %d failed, %d skipped" % tuple(sums))
    return 1 if sums[1] or not sums[0] else 0


def run_all(names, words=()):
    """All files, two at a time where there are two cores; the long ones first."""
    slow = ("test_golden", "test_tokenizer", "test_page", "test_pictures", "test_analyses", "test_kernels", "test_cli")
    names = sorted(names, key=lambda name: slow.index(name) if name in slow else len(slow))
    started, sums = time.time(), [0, 0, 0]
    with concurrent.futures.ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        for name, found in zip(names, pool.map(lambda name: run_module(name, words), names)):
            print("%s: %s" % (name, found[0]), flush=True)
            sums = [total + n for total, n in zip(sums, found[1:])]
    print("%.0f s in all" % (time.time() - started))
    print("%d passed, %d failed, %d skipped" % tuple(sums))
    return 1 if sums[1] or not sums[0] else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--core", action="store_true")
    parser.add_argument("--first", action="store_true")
    parser.add_argument("-v", "--verbose", action="store_true")
    arguments = parser.parse_args()
    os.chdir(TESTS)
    names = arguments.names or (CORE if arguments.core else sorted(
        name[:-3] for name in os.listdir(TESTS) if name.startswith("test_") and name.endswith(".py")
        and (name != "test_deep.py" or "ACTPATCH_DEEP" in os.environ)))
    if arguments.core:
        os.environ["ACTPATCH_CORE_TESTS"] = "1"
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # two files of tests run at a time
    if not arguments.names:
        return run_first(names) if arguments.first else run_all(names, ["--core"] if arguments.core else [])
    suite = unittest.defaultTestLoader.loadTestsFromNames(names)
    if arguments.core:
        suite = unittest.TestSuite(test for test in tests_of(suite) if not SLOW.search(test.id()))
    result = Result(arguments.verbose)
    result.failfast = arguments.first
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
