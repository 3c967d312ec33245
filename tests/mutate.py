# SPDX-License-Identifier: MIT
"""Do the fast tests notice a wrong token? Random changes of patch.c's core, each held against `make test-core`.

    python3 tests/mutate.py [--seed 1] [--count 50]         what `make mutate SEED=1 N=50` calls

A change is one token of chapters 1 to 10 (an operator turned, a whole number one more or one less, a
statement left out), never in a comment, a string or a line of the preprocessor. One that does not compile,
gives the same object file as before, or was drawn already is drawn again. Each goes into a copy of the
tree, where tests/run.py --core runs up to the first failure; a run that takes too long is caught too.
Survivors are printed. tests/mutants.txt lists those that cannot be noticed, each with its reason: one of
those counts as skipped, any other survivor as failed."""

import argparse
import hashlib
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import util  # noqa: E402

KNOWN = os.path.join(util.TESTS, "mutants.txt")
LONGEST = 120  # seconds for one change's tests; all of them take about 20 on one core
SWAPS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "&&": "||", "||": "&&", "+": "-",
         "-": "+", "*": "/", "/": "*", "%": "/", "+=": "-=", "-=": "+=", "++": "--", "--": "++", "&": "|", "|": "&",
         "<<": ">>", ">>": "<<", "^": "&", "|=": "&=", "!": ""}
TOKEN = re.compile(r"[A-Za-z_]\w*|0[xX][0-9a-fA-F]+[uUlL]*|(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?[fFuUlL]*|"
                   r"<<=|>>=|\.\.\.|->|\+\+|--|&&|\|\||[-+*/%&|^<>=!]=|<<|>>|\S")


def blank(text):
    """The text with comments, strings, characters and preprocessor lines as spaces, every place kept."""
    def spaces(match):
        return re.sub(r"[^\n]", " ", match.group(0))
    text = re.sub(r"/\*.*?\*/|//[^\n]*|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'", spaces, text, flags=re.S)
    return re.sub(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", spaces, text, flags=re.M)


def changes(text):
    """Every change of the core: (place, old, new)."""
    code = blank(text)
    begin, end = text.index("==== 1. "), text.index("==== 11. ")
    found = []
    for match in TOKEN.finditer(code, begin, end):
        token, at = match.group(0), match.start()
        if token in SWAPS:
            found.append((at, token, SWAPS[token]))
        number = re.fullmatch(r"(0[xX][0-9a-fA-F]+|\d+)([uUlL]*)", token)
        if number:
            value = int(number.group(1), 0 if "x" in token.lower() else 10)
            found += [(at, token, "%d%s" % (near, number.group(2))) for near in (value + 1, value - 1) if near >= 0]
    for match in re.finditer(r"(?<=[;{})])(\s*\n\s+)([A-Za-z_*(][^;{}]*;)(?=[ \t]*\n)", code[begin:end]):
        at, to = begin + match.start(2), begin + match.end(2)
        found.append((at, text[at:to], ";" + "\n" * text[at:to].count("\n")))
    return found


def line_of(text, place):
    return text.count("\n", 0, place) + 1


def key(text, change):
    """What tells a change from all others: where it stands in its line, not the line's number."""
    at, old, new = change
    start, end = text.rfind("\n", 0, at) + 1, text.find("\n", at + len(old))
    before = " ".join(text[start:end].split())
    after = " ".join((text[start:at] + new + text[at + len(old):end]).split())
    return before, after


def compile_object(compiler, source, out):
    """The object file's digest; None where it does not compile."""
    done = subprocess.run(compiler + ["-std=gnu99", "-O1", "-w", "-c", source, "-o", out, "-I", os.path.dirname(source)],
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if done.returncode:
        return None
    with open(out, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def caught(compiler, folder):
    """Why the changed tree in `folder` fails, in a few words; None where it passes."""
    binary = os.path.join(folder, "actpatch")
    subprocess.check_call(compiler + [os.path.join(folder, "patch.o"), "-o", binary, "-lm"])
    env = dict(os.environ, ACTPATCH_BIN=binary, OMP_NUM_THREADS="1")
    child = subprocess.Popen([sys.executable, os.path.join(folder, "tests", "run.py"), "--core", "--first"], env=env,
                             stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                             start_new_session=True)
    try:
        text = child.communicate(timeout=LONGEST)[0].decode("utf-8", "replace")
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, 9)  # the tests and what they started: a session of its own
        child.communicate()
        return "it takes too long"
    if child.returncode == 0:
        return None
    names = re.findall(r"^(?:\S+: )?FAILED: (\S+)", text, flags=re.M)
    return names[0].rstrip(":") if names else text.rstrip().split("\n")[-1]


def known():
    """{(line, changed line): reason} of tests/mutants.txt."""
    reasons = {}
    with open(KNOWN, encoding="utf-8") as file:
        blocks = re.split(r"\n\n+", re.sub(r"^#.*\n", "", file.read(), flags=re.M).strip())
    for block in filter(None, blocks):
        lines = block.split("\n")
        if len(lines) < 3 or lines[0][:2] != "- " or lines[1][:2] != "+ ":
            raise SystemExit("tests/mutants.txt: not '- line', '+ line', reason:\n" + block)
        reasons[lines[0][2:], lines[1][2:]] = " ".join(lines[2:])
    return reasons


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--only", type=int, help="only the change of this number")
    parser.add_argument("--least", type=float, help="per cent to be caught, where other survivors may be (.ci/run)")
    arguments = parser.parse_args()
    compiler = shlex.split(os.environ.get("CC") or "cc")
    with open(os.path.join(util.ROOT, "patch.c"), encoding="utf-8") as file:
        text = file.read()
    chance, all_changes, reasons = random.Random(arguments.seed), changes(text), known()
    chance.shuffle(all_changes)
    print("%d possible changes of the core" % len(all_changes))
    number, killed, excused, survived, started = 0, 0, 0, [], time.time()
    with tempfile.TemporaryDirectory(prefix="actpatch-mutate-") as folder:
        for name in ("patch.c", "patch.h", "convert_weights.py", "Makefile", "README.md"):
            shutil.copy(os.path.join(util.ROOT, name), folder)
        shutil.copytree(util.TESTS, os.path.join(folder, "tests"), ignore=shutil.ignore_patterns("__pycache__"))
        source, out = os.path.join(folder, "patch.c"), os.path.join(folder, "patch.o")
        plain = compile_object(compiler, source, out)
        why = caught(compiler, folder)
        if why:
            print("the unchanged core fails: %s\n0 passed, 1 failed, 0 skipped" % why)
            return 1
        while number < arguments.count:
            change = all_changes.pop()
            at, old, new = change
            with open(source, "w", encoding="utf-8") as file:
                file.write(text[:at] + new + text[at + len(old):])
            if compile_object(compiler, source, out) in (None, plain):
                continue
            number += 1
            if arguments.only and number != arguments.only:
                continue
            before, after = key(text, change)
            began = time.time()
            why = caught(compiler, folder)
            excuse = reasons.get((before, after))
            killed += why is not None
            excused += why is None and excuse is not None
            print("%2d line %d: %s: %s (%.0f s)" % (
                number, line_of(text, at), " ".join(("%s -> %s" % (old, new)).split()),
                why or "SURVIVES" + (": known: " + excuse if excuse else ""), time.time() - began), flush=True)
            if why is None and excuse is None:
                survived.append((number, line_of(text, at), before, after))
    counted = killed + len(survived)
    enough = arguments.least is not None and killed and 100.0 * killed / counted >= arguments.least
    for number, line, before, after in survived:
        print(("skipped" if enough else "FAILED") + ": change %d survives, patch.c:%d\n- %s\n+ %s" % (number, line, before, after))
    print("%.0f s in all" % (time.time() - started))
    bad = 0 if enough else len(survived)
    print("%d passed, %d failed, %d skipped" % (killed, bad, excused + len(survived) - bad))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
