# SPDX-License-Identifier: MIT
"""What the tests share: where things are, how to run them, and readers for .npy and .safetensors.

Standard library only, Python 3.8 or later. A tensor is a Tensor(shape, data): a tuple and a flat
array.array, row-major, little-endian on disk and native here."""

import array
import collections
import functools
import gzip
import itertools
import json
import math
import os
import struct
import subprocess
import sys
import tempfile

TESTS = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(TESTS)
TINY = os.path.join(TESTS, "tiny")
TINY_MODEL = os.path.join(TINY, "model.bin")
GOLDEN = os.path.join(TESTS, "golden")
CONVERTER = os.path.join(ROOT, "convert_weights.py")

# What the drivers are compiled with: less time for `make test-core`, which compiles more than it runs.
CORE = "ACTPATCH_CORE_TESTS" in os.environ
LEVEL = "-O1" if CORE else "-O2"

Tensor = collections.namedtuple("Tensor", "shape data")

# ---- running things --------------------------------------------------------------------------------


def binary():
    """The program under test: $ACTPATCH_BIN, else ./actpatch, which is built where it is missing."""
    path = os.environ.get("ACTPATCH_BIN")
    if path:
        return os.path.abspath(path)
    path = os.path.join(ROOT, "actpatch")
    if not os.path.exists(path):
        build_program()
    return path


@functools.lru_cache(maxsize=None)
def build_program():
    """`make actpatch`, once a run; raises with the compiler's words where that fails."""
    done = subprocess.run(["make", "-C", ROOT, "actpatch"], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, universal_newlines=True)
    if done.returncode:
        raise RuntimeError("make actpatch failed:\n" + done.stdout)


def run(argv, stdin=None, env=None, cwd=None, timeout=300, binary_output=False):
    """Run argv and return the CompletedProcess, with stdout and stderr as text (bytes where asked).

    The environment has no ACTPATCH_MODEL and no colours, so that results depend on argv alone; env
    adds to it. Text is UTF-8, and bytes that are none survive as surrogates."""
    environment = dict(os.environ)
    for name in ("ACTPATCH_MODEL", "CLICOLOR_FORCE", "FORCE_COLOR"):
        environment.pop(name, None)
    environment["NO_COLOR"] = "1"
    environment.update(env or {})
    if isinstance(stdin, str):
        stdin = stdin.encode("utf-8", "surrogateescape")
    given = {"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}
    done = subprocess.run([str(word) for word in argv], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, env=environment, cwd=cwd or ROOT,
                          timeout=timeout, **given)
    if not binary_output:
        done.stdout = done.stdout.decode("utf-8", "surrogateescape")
        done.stderr = done.stderr.decode("utf-8", "surrogateescape")
    return done


def actpatch(*words, **options):
    """Run the program with these words; returns the CompletedProcess whatever its exit status."""
    return run([binary()] + list(words), **options)


def must(*words, **options):
    """Run the program and raise AssertionError with its own words unless it succeeds."""
    done = actpatch(*words, **options)
    if done.returncode != 0:
        raise AssertionError("actpatch %s: status %d\n%s" % (
            " ".join(str(word) for word in words), done.returncode, done.stderr))
    return done


def convert(source, target, *words):
    """Convert a Hugging Face folder into the flat file `target`; returns target."""
    done = run([sys.executable, CONVERTER, source, "-o", target] + list(words))
    if done.returncode != 0:
        raise AssertionError("convert_weights.py %s: status %d\n%s" % (
            source, done.returncode, done.stderr))
    return target


def scratch():
    """A temporary folder; give it to addCleanup(folder.cleanup) and use folder.name."""
    return tempfile.TemporaryDirectory(prefix="actpatch-test-")


# ---- prompts -----------------------------------------------------------------------------------------


def write_tsv(path, columns, rows):
    """Write a prompts file: the column names, then rows of strings, numbers or sequences of ids."""
    def field(value):
        if isinstance(value, (list, tuple)):
            return " ".join(str(number) for number in value)
        return str(value)
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write("\t".join(columns) + "\n")
        for row in rows:
            file.write("\t".join(field(value) for value in row) + "\n")
    return path


def read_tsv(path):
    """Read a prompts file: (columns, rows of strings), fields verbatim, empty lines left out."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        lines = [line.rstrip("\r") for line in file.read().split("\n")]
    lines = [line.split("\t") for line in lines if line]
    return lines[0], lines[1:]


# ---- tensors -----------------------------------------------------------------------------------------

_CODES = {"F64": "d", "F32": "f", "I64": "q", "I32": "i", "U8": "B"}
_NPY = {"<f8": "d", "<f4": "f", "<i8": "q", "<i4": "i", "|u1": "B"}


def count(shape):
    """How many elements a shape has."""
    n = 1
    for size in shape:
        n *= size
    return n


def _decode(code, raw):
    """Bytes, little-endian, to an array of the machine's own order."""
    values = array.array(code)
    values.frombytes(raw)
    if sys.byteorder == "big":
        values.byteswap()
    return values


def read_npy(path):
    """Read one .npy file (version 1 or 2, C order, as numpy writes it); nothing may follow the data."""
    with open(path, "rb") as file:
        raw = file.read()
    if raw[:6] != b"\x93NUMPY" or raw[6] not in (1, 2):
        raise ValueError("%s: not a .npy file" % path)
    wide = raw[6] == 2
    length, = struct.unpack_from("<I" if wide else "<H", raw, 8)
    start = (12 if wide else 10) + length
    if start % 16:
        raise ValueError("%s: the data starts at byte %d, not aligned" % (path, start))
    text = raw[12 if wide else 10:start].decode("latin-1")
    head = _literal_head(text)
    if head["fortran_order"]:
        raise ValueError("%s: Fortran order" % path)
    values = _decode(_NPY[head["descr"]], raw[start:])
    if len(values) != count(head["shape"]):
        raise ValueError("%s: %d values, shape %r" % (path, len(values), head["shape"]))
    return Tensor(tuple(head["shape"]), values)


def _literal_head(text):
    """The Python dictionary in a .npy head; exactly numpy's three keys."""
    import ast
    head = ast.literal_eval(text.strip())
    if set(head) != {"descr", "fortran_order", "shape"}:
        raise ValueError("keys of the .npy head: %r" % sorted(head))
    return head


def read_safetensors(path):
    """Read a .safetensors file (.gz too): ({name: Tensor}, metadata); every byte must be claimed."""
    with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
        raw = file.read()
    length, = struct.unpack_from("<Q", raw, 0)
    head = json.loads(raw[8:8 + length].decode("utf-8"))
    metadata = head.pop("__metadata__", {})
    body = memoryview(raw)[8 + length:]
    tensors, spans = {}, []
    for name, entry in head.items():
        begin, end = entry["data_offsets"]
        values = _decode(_CODES[entry["dtype"]], bytes(body[begin:end]))
        if len(values) != count(entry["shape"]):
            raise ValueError("%s: %s: %d values, shape %r" % (
                path, name, len(values), entry["shape"]))
        tensors[name] = Tensor(tuple(entry["shape"]), values)
        spans.append((begin, end))
    at = 0
    for begin, end in sorted(spans):
        if begin != at:
            raise ValueError("%s: a hole or an overlap at byte %d" % (path, begin))
        at = end
    if at != len(body):
        raise ValueError("%s: %d bytes after the last tensor" % (path, len(body) - at))
    return tensors, metadata


def take(tensor, axis, indices):
    """The tensor with only these indices along one axis."""
    outer = count(tensor.shape[:axis])
    size = tensor.shape[axis]
    inner = count(tensor.shape[axis + 1:])
    data = array.array(tensor.data.typecode)
    for o in range(outer):
        for i in indices:
            if not 0 <= i < size:
                raise IndexError("index %d of %d" % (i, size))
            begin = (o * size + i) * inner
            data.extend(tensor.data[begin:begin + inner])
    return Tensor(tensor.shape[:axis] + (len(indices),) + tensor.shape[axis + 1:], data)


def swap(tensor, a, b):
    """The tensor with the axes a and b exchanged, copied."""
    order = list(range(len(tensor.shape)))
    order[a], order[b] = b, a
    shape = tuple(tensor.shape[axis] for axis in order)
    strides = [count(tensor.shape[axis + 1:]) for axis in order]
    data = array.array(tensor.data.typecode, (
        tensor.data[sum(i * s for i, s in zip(index, strides))]
        for index in itertools.product(*(range(size) for size in shape))))
    return Tensor(shape, data)


def stack(tensors, axis):
    """Tensors of one shape joined along a new axis."""
    shape = tensors[0].shape
    inner = count(shape[axis:])
    data = array.array(tensors[0].data.typecode)
    for o in range(count(shape[:axis])):
        for tensor in tensors:
            if tensor.shape != shape:
                raise ValueError("shapes %r and %r" % (shape, tensor.shape))
            data.extend(tensor.data[o * inner:(o + 1) * inner])
    return Tensor(shape[:axis] + (len(tensors),) + shape[axis:], data)


def mean(tensor):
    """The mean over the first axis, in double."""
    n, inner = tensor.shape[0], count(tensor.shape[1:])
    data = array.array("d", (
        math.fsum(tensor.data[b * inner + i] for b in range(n)) / n for i in range(inner)))
    return Tensor(tensor.shape[1:], data)


def worst(got, want):
    """(largest |got - want|, largest finite |want|) of two flat arrays of one length.

    Infinities must be equal; where one is not, or anything is NaN, the first number is NaN, which
    no `<=` accepts."""
    if len(got) != len(want):
        raise ValueError("%d values, not %d" % (len(got), len(want)))
    error, scale = 0.0, 0.0
    for g, w in zip(got, want):
        if g != g or w != w or ((math.isinf(g) or math.isinf(w)) and g != w):
            return math.nan, scale
        if math.isinf(w):
            continue
        error = max(error, abs(g - w))
        scale = max(scale, abs(w))
    return error, scale
