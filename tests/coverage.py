# SPDX-License-Identifier: MIT
"""How much of patch.c the tests run: lines and branches, by chapter, joined over all builds that they make.

    python3 tests/coverage.py [--floor 95] [TEST...]       what `make coverage` calls

Every test compiles what it needs with $CC. Here $CC is a script that adds --coverage, so that programs,
libraries and drivers all leave their counts: a line is covered where any of them ran it. Branches are
joined by line, function and number. All builds are made with -O1, for time. Needs gcc with its gcov.
The last line counts one check (the floor) and each file of tests that failed."""

import argparse
import concurrent.futures
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import run  # noqa: E402
import util  # noqa: E402

TESTS = (
    " ".join("test_faults.Faults.test_%s_%s" % (kind, name) for kind in ("memory", "files")
             for name in ("diff", "cache", "patch", "path", "lens", "trace", "report", "fold", "merge")),
    "test_analyses", "test_golden.Diff test_golden.Cache test_golden.Sweeps test_golden.Identities test_golden.Rest",
    "test_cli", "test_engine", "test_tokenizer", "test_kernels", "test_library", "test_pictures", "test_parts",
    "test_fuzz", "test_tiny")
SOURCE = os.path.join(util.ROOT, "patch.c")
WRAPPER = """#!/bin/sh
folder=$(mktemp -d "%s/XXXXXXXX") && exec %s "$@" -O1 --coverage -dumpdir "$folder/" -Wl,--exclude-libs,ALL
"""


def tool(words, what):
    """Does this command run here?"""
    try:
        return subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout.decode().find(what) >= 0
    except OSError:
        return False


def chapters():
    """[(first line, "5 Kernels")] of patch.c, in order."""
    found = []
    with open(SOURCE, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            head = re.match(r"/?\*? *==== (\w+)\. (.*?) =*(?: \*/)?$", line.rstrip("\n"))
            if head:
                found.append((number, "%2s %s" % head.groups()))
    return found


def run_tests(folder, compiler, tests):
    """Run the tests with a compiler that counts; returns the names of the files of tests that failed."""
    counts = os.path.join(folder, "counts")
    program = os.path.join(folder, "program")
    os.makedirs(counts)
    os.makedirs(program)
    wrapper = os.path.join(folder, "cc")
    with open(wrapper, "w", encoding="utf-8") as file:
        file.write(WRAPPER % (counts, " ".join(map(shlex.quote, compiler))))
    os.chmod(wrapper, 0o755)
    os.symlink(util.TESTS, os.path.join(program, "tests"))  # the bundled model beside the program
    binary = os.path.join(program, "actpatch")
    subprocess.check_call([wrapper, "-std=gnu99", "-fopenmp", "-w", SOURCE, "-o", binary, "-lm"])
    os.environ.update(CC=wrapper, ACTPATCH_BIN=binary)

    def one(names):
        done = subprocess.run([sys.executable, os.path.join(util.TESTS, "run.py")] + names.split(), stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        return names, done.returncode, done.stdout.decode("utf-8", "replace")
    failed = []
    with concurrent.futures.ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        for names, status, text in pool.map(one, tests):
            print("%s: %s" % (names.split(".")[0], text.rstrip().split("\n")[-1]), flush=True)
            if status:
                failed.append(names)
                print("\n".join(text.split("\n")[-60:]), flush=True)
    return failed, counts


def join(counts):
    """({line: count}, {(line, function, number): count}) of patch.c over all counted objects."""
    lines, branches = {}, {}
    paths = sorted(os.path.join(at, name) for at, _, names in os.walk(counts) for name in names if name.endswith(".gcda"))

    def read(path):
        done = subprocess.run(["gcov", "--json-format", "--stdout", "--branch-probabilities", path], cwd=counts,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
        return [json.loads(text) for text in done.stdout.decode().split("\n") if text]
    with concurrent.futures.ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        for found in pool.map(read, paths):
            for file in (file for unit in found for file in unit["files"]):
                if os.path.basename(file["file"]) != "patch.c":  # a test copies it
                    continue
                for line in file["lines"]:
                    number = line["line_number"]
                    lines[number] = lines.get(number, 0) + line["count"]
                    for i, branch in enumerate(line["branches"]):
                        key = number, line.get("function_name"), i
                        branches[key] = branches.get(key, 0) + branch["count"]
    return lines, branches, len(paths)


def ranges(numbers):
    """'3, 7-9' of sorted numbers."""
    text, numbers = [], list(numbers)
    while numbers:
        n = 1
        while n < len(numbers) and numbers[n] == numbers[0] + n:
            n += 1
        text.append(str(numbers[0]) if n == 1 else "%d-%d" % (numbers[0], numbers[n - 1]))
        numbers = numbers[n:]
    return ", ".join(text)


def share(part, whole):
    return 100.0 * part / whole if whole else 100.0


def report(lines, branches):
    """Print a table by chapter and what is not covered; returns the share of lines."""
    heads = chapters()
    ends = [line for line, _ in heads[1:]] + [10 ** 9]
    print("%-34s %13s %7s %15s %7s" % ("chapter", "lines", "%", "branches", "%"))
    missing = []
    for (start, title), end in list(zip(heads, ends)) + [((0, "all"), 10 ** 9)]:
        inside = {n: count for n, count in lines.items() if start <= n < end}
        ways = [count for (n, _, _), count in branches.items() if start <= n < end]
        if not inside:
            continue
        ran, taken = sum(count > 0 for count in inside.values()), sum(count > 0 for count in ways)
        print("%-34s %6d /%5d %6.1f%% %7d /%6d %6.1f%%" % (
            title, ran, len(inside), share(ran, len(inside)), taken, len(ways), share(taken, len(ways))))
        if start:
            missing.append((title, ranges(sorted(n for n, count in inside.items() if count == 0))))
    for title, text in missing:
        if text:
            print("not run in %s: %s" % (title.strip(), text))
    return share(ran, len(inside))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--floor", type=float, default=95.0)
    parser.add_argument("tests", nargs="*")
    arguments = parser.parse_args()
    compiler = shlex.split(os.environ.get("CC") or "gcc")
    if not tool(compiler + ["--version"], "Free Software Foundation"):
        compiler = ["gcc"]
    if not tool(compiler + ["--version"], "Free Software Foundation") or not tool(["gcov", "--version"], "gcov") or \
            not shutil.which("mktemp"):
        print("skipped: coverage: no gcc with gcov here\n0 passed, 0 failed, 1 skipped")
        return 77
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="actpatch-coverage-") as folder:
        failed, counts = run_tests(folder, compiler, arguments.tests or TESTS)
        lines, branches, objects = join(counts)
    got = report(lines, branches)
    enough = got >= arguments.floor
    print("%.1f %% of patch.c's lines and %.1f %% of its branches, over %d builds; the floor is %g %% of the lines" % (
        got, share(sum(count > 0 for count in branches.values()), len(branches)), objects, arguments.floor))
    print("%d passed, %d failed, 0 skipped" % (enough and not failed, len(failed) + (not enough)))
    return 0 if enough and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
