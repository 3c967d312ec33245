# SPDX-License-Identifier: MIT
"""What analyzers say of patch.c: nothing but what tests/analyze.txt names, each with its reason.

    python3 tests/analyze.py [TOOL...]       TOOL: gcc-library, clang-tidy, cppcheck; by name only: gcc, clang

A finding is a tool, a check and the text of its line in patch.c, so that the list outlives changes
elsewhere. An analyzer that is not here is skipped by name; one that takes longer than 5 minutes fails.
.clang-tidy says which of clang-tidy's checks are asked. gcc (with the command line) and clang take over a
minute of processor time each, and what they find is not judged in the list."""

import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import util  # noqa: E402

LONGEST = 300
GCC = ["gcc", "-std=gnu99", "-O1", "-fanalyzer", "-c", "patch.c", "-o", os.devnull]
TOOLS = {
    "gcc": GCC,
    "clang": ["clang", "--analyze", "-Xclang", "-analyzer-output=text", "-std=gnu99", "-w", "patch.c", "-o", os.devnull],
    "gcc-library": GCC + ["-DPATCH_NO_MAIN"],
    "clang-tidy": ["clang-tidy", "--quiet", "patch.c", "--", "-std=gnu99", "-w"],
    "cppcheck": ["cppcheck", "-q", "--enable=warning,portability", "--std=c99", "--platform=unix64", "-D__unix__",
                 "-D__GNUC__=12", "-D__x86_64__", "--template={file}:{line}:{column}: {severity}: {message} [{id}]",
                 "patch.c"],
}
FINDING = re.compile(r"(?:\S*/)?patch\.c:(\d+):\d+: (?:warning|error|portability): (.*) \[([^\[\]]+)\]$", re.M)


def known():
    """{(tool, check, line's text): reason}."""
    reasons = {}
    with open(os.path.join(util.TESTS, "analyze.txt"), encoding="utf-8") as file:
        blocks = re.split(r"\n\n+", re.sub(r"^#.*\n", "", file.read(), flags=re.M).strip())
    for block in filter(None, blocks):
        head, line, reason = block.split("\n", 2)
        tool, check = head.split(" ", 1)
        reasons[tool, check, line] = " ".join(reason.split())
    return reasons


def analyze(tool):
    """(seconds, what is wrong or None, {(tool, check, text): first 'line: message'}) of one analyzer."""
    started = time.time()
    try:
        done = subprocess.run(TOOLS[tool], cwd=util.ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, timeout=LONGEST, env=dict(os.environ, LC_ALL="C"))
    except subprocess.TimeoutExpired:
        return LONGEST, "it takes longer than %d s" % LONGEST, {}
    said = done.stdout.decode("utf-8", "replace")
    found = {}
    with open(os.path.join(util.ROOT, "patch.c"), encoding="utf-8") as file:
        lines = file.read().split("\n")
    for number, message, check in FINDING.findall(said):
        check = re.sub(r"^-W|\] \[.*", "", check)
        text = " ".join(lines[int(number) - 1].split())
        found.setdefault((tool.split("-lib")[0], check, text), "patch.c:%s: %s" % (number, message))
    wrong = None if done.returncode == 0 else "status %d: %s" % (done.returncode, said[-2000:])
    return time.time() - started, wrong, found


def main():
    tools, reasons = sys.argv[1:] or ["gcc-library", "clang-tidy", "cppcheck"], known()
    here = [tool for tool in tools if shutil.which(TOOLS[tool][0])]
    passed, failed, skipped, used = 0, 0, len(tools) - len(here), set()
    for tool in tools:
        if tool not in here:
            print("skipped: %s is not here" % tool)
    with concurrent.futures.ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        for tool, (seconds, wrong, found) in zip(here, pool.map(analyze, here)):
            new = [key for key in found if key not in reasons]
            used.update(found)
            print("%s: %d findings, %d of them named in tests/analyze.txt (%.0f s)" % (
                tool, len(found), len(found) - len(new), seconds))
            if wrong:
                print("FAILED: %s: %s" % (tool, wrong))
            for key in new:
                print("FAILED: %s\n%s %s\n%s" % ((found[key],) + key))
            failed += bool(wrong or new)
            passed += not (wrong or new)
    if not sys.argv[1:] and not skipped:
        for key in sorted(set(reasons) - used):
            print("no longer found: %s %s: %s" % key)
    print("%d passed, %d failed, %d skipped" % (passed, failed, skipped))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
