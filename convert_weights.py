#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Turns a Hugging Face GPT-2 checkpoint into the one flat file that actpatch maps.

    python3 convert_weights.py SOURCE -o OUT.bin [--dtype f32|f16] [--no-tokenizer]

SOURCE is a folder with config.json, the weights (model.safetensors or pytorch_model.bin, whole or
in shards) and the tokenizer (tokenizer.json, or vocab.json and merges.txt); or a model's name such
as gpt2, taken from the local Hugging Face cache or else downloaded into it.

Only Python's standard library is needed. Nothing in a checkpoint is ever run: the pickles of
pytorch_model.bin are read by a small interpreter that can build tensors and nothing else. Weights
pass through in pieces of about a megabyte, so memory does not grow with the model. The same
weights give the same bytes, whichever format they came in.

The chapters: 1 errors and files, 2 tensors in pieces, 3 safetensors, 4 torch's pickles,
5 the checkpoint, 6 config.json, 7 the tokenizer, 8 the flat file, 9 the hub, 10 the command line.
"""

import argparse
import collections
import contextlib
import hashlib
import http.client
import io
import json
import math
import os
import pickletools
import re
import signal
import struct
import sys
import time
import urllib.parse
import urllib.request
import zipfile
import zlib

# ---- 1. Errors and files -------------------------------------------------------------------------

JSON_CEILING = 128 << 20  # bytes; GPT-2's own tokenizer.json has 1.4 MB
DAMAGED = 'download or copy the file again'


def printable(text):
    """One line of bounded length, whatever names a file or checkpoint has made up."""
    if len(text) > 600:
        text = text[:300] + '...' + text[-300:]
    return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class Problem(Exception):
    """What is wrong, where, and what to do about it: the three parts of every message."""

    def __init__(self, what, where, remedy):
        super().__init__(', '.join(printable(part) for part in (what, where, remedy)))


class Progress:
    """A percentage on stderr, only where a person sees it; `done` and `total` in bytes."""

    def __init__(self, label, total):
        self.label, self.total, self.shown = label, total, None
        self.wanted = sys.stderr.isatty()

    def at(self, done):
        percent = 100 * done // max(self.total, 1)
        if self.wanted and percent != self.shown:
            self.shown = percent
            sys.stderr.write('\r%s: %d%% of %.1f MB\x1b[K' % (
                self.label, percent, self.total / 1e6))
            sys.stderr.flush()

    def end(self):
        if self.shown is not None:
            sys.stderr.write('\r\x1b[K')


def parse_json(data, where):
    """The object in `data`. A key given twice is refused: readers differ on which one counts."""
    def unique(pairs):
        table = dict(pairs)
        if len(table) != len(pairs):
            twice = collections.Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise Problem('key "%s" is given twice' % twice, where, DAMAGED)
        return table
    try:
        found = json.loads(data.decode('utf-8-sig'), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise Problem('not JSON (%s)' % error, where, DAMAGED) from None
    if not isinstance(found, dict):
        raise Problem('not a JSON object', where, DAMAGED)
    return found


def read_text_file(path):
    """The bytes of a file that is small in every honest checkpoint."""
    with open(path, 'rb') as file:
        data = file.read(JSON_CEILING + 1)
    if len(data) > JSON_CEILING:
        raise Problem('larger than %d MB' % (JSON_CEILING >> 20), path, DAMAGED)
    return data


def read_json(path):
    return parse_json(read_text_file(path), path)


def is_count(value):
    """A non-negative int; bool is a subclass of int and does not count."""
    return type(value) is int and value >= 0


# ---- 2. Tensors in pieces ------------------------------------------------------------------------

ITEM_BYTES = {'F64': 8, 'F32': 4, 'F16': 2, 'BF16': 2, 'I64': 8, 'I32': 4, 'I16': 2, 'I8': 1,
              'U8': 1, 'BOOL': 1}
FLOATS = ('F64', 'F32', 'F16', 'BF16')
STRUCT_CODE = {'F64': 'd', 'F32': 'f', 'F16': 'e'}
MAX_RANK = 8            # dimensions; GPT-2 needs 2, and 4 for the mask that is ignored
PIECE = 1 << 18         # elements a piece: 1 MB of float32, about 8 MB while Python holds floats
STRIP = 1 << 21         # the same where columns are gathered: fewer, longer reads


class Extent:
    """`size` bytes of an open file from byte `start`, where one tensor's elements lie.

    With `crc` (a zip member's; 0 means that the writer left it out) a read from start to end is
    checked against it; reads in another order are not."""

    def __init__(self, file, path, start, size, crc=0):
        self.file, self.path, self.start, self.size, self.crc = file, path, start, size, crc
        self.summed, self.sum = 0, 0

    def read(self, at, count):
        self.file.seek(self.start + at)
        data = self.file.read(count)
        if len(data) != count:
            raise Problem('file ends early, at byte %d' % (self.start + at + len(data)),
                          self.path, DAMAGED)
        if self.crc and at == self.summed:
            self.sum, self.summed = zlib.crc32(data, self.sum), at + count
            if self.summed == self.size and self.crc != self.sum:
                raise Problem('checksum of the bytes from %d does not match' % self.start,
                              self.path, DAMAGED)
        return data


class Tensor:
    """One tensor as the checkpoint stores it. Element [i, j] is element
    offset + i * strides[0] + j * strides[1] of the extent; safetensors has only row-major ones."""

    def __init__(self, extent, dtype, shape, offset=0, strides=None):
        self.extent, self.dtype, self.shape, self.offset = extent, dtype, tuple(shape), offset
        self.strides = row_major(self.shape) if strides is None else tuple(strides)

    def fits(self):
        """Does every element lie inside the extent?"""
        if 0 in self.shape:
            return True
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides))
        return (last + 1) * ITEM_BYTES[self.dtype] <= self.extent.size

    def pieces(self, where):
        """The elements' bytes in row-major order, about PIECE elements at a time."""
        rows, cols = self.shape if len(self.shape) == 2 else (self.shape[0], 1)
        down, right = self.strides if len(self.strides) == 2 else (self.strides[0], 1)
        if cols == 1:
            right = 1
        if right == 1 and (down == cols or rows == 1):
            yield from self._whole(rows * cols)
        elif right == 1:
            yield from self._by_rows(rows, cols, down)
        elif down == 1 or rows == 1:
            yield from self._by_columns(rows, cols, right)
        else:
            raise Problem('stored with strides %d and %d' % (down, right), where,
                          'save it again after .contiguous()')

    def _read(self, first, count):
        size = ITEM_BYTES[self.dtype]
        return self.extent.read((self.offset + first) * size, count * size)

    def _whole(self, count):
        for first in range(0, count, PIECE):
            yield self._read(first, min(PIECE, count - first))

    def _by_rows(self, rows, cols, down):
        """Rows lie apart: a slice of something wider."""
        step = max(1, PIECE // cols)
        for top in range(0, rows, step):
            yield b''.join(self._read(i * down, cols) for i in range(top, min(top + step, rows)))

    def _by_columns(self, rows, cols, right):
        """Transposed: columns are what lies together, so a strip of rows is gathered from them."""
        code = {1: 'B', 2: 'H', 4: 'I', 8: 'Q'}[ITEM_BYTES[self.dtype]]
        step = max(1, STRIP // cols)
        for top in range(0, rows, step):
            high = min(step, rows - top)
            size = ITEM_BYTES[self.dtype]
            strip = bytearray(high * cols * size)
            cells = memoryview(strip).cast(code)
            for j in range(cols):
                cells[j::cols] = memoryview(self._read(top + j * right, high)).cast(code)
            for at in range(0, len(strip), PIECE * size):
                yield bytes(strip[at:at + PIECE * size])


def row_major(shape):
    strides, step = [], 1
    for size in reversed(shape):
        strides.insert(0, step)
        step *= size
    return tuple(strides)


def recode(data, source, target):
    """Little-endian elements of one float type as another, rounded to nearest, ties to even.

    Bytes move unread where that is enough: float32 is bfloat16 with 16 more zero bits. Otherwise
    struct does it, which raises OverflowError where a finite value would become infinite."""
    if source == target:
        return data
    if source == 'BF16':
        wide = bytearray(2 * len(data))
        wide[2::4], wide[3::4] = data[0::2], data[1::2]
        return recode(bytes(wide), 'F32', target)
    count = len(data) // ITEM_BYTES[source]
    values = struct.unpack('<%d%s' % (count, STRUCT_CODE[source]), data)
    return struct.pack('<%d%s' % (count, STRUCT_CODE[target]), *values)


# ---- 3. Safetensors ------------------------------------------------------------------------------
#
#   0            8                 8 + n                                file's end
#   | u64 n      | n bytes of JSON | data: the tensors, no gap, no overlap |
#   JSON: {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, ...}

SAFETENSORS_HEADER = 100_000_000  # bytes; the format's own ceiling


def read_safetensors(path, file, size):
    """-> {name: Tensor}"""
    prefix = file.read(8)
    length = struct.unpack('<Q', prefix)[0] if len(prefix) == 8 else 0
    if not 2 <= length <= min(size - 8, SAFETENSORS_HEADER):
        raise Problem('not a whole safetensors file (%d bytes, header of %d)' % (size, length),
                      path, DAMAGED)
    header = parse_json(Extent(file, path, 8, length).read(0, length), path)
    header.pop('__metadata__', None)
    tensors, spans = {}, []
    for name, entry in header.items():
        tensors[name], span = safetensors_entry(name, entry, path, file, 8 + length)
        spans.append(span)
    check_spans(spans, size - 8 - length, path)
    return tensors


def safetensors_entry(name, entry, path, file, base):
    """-> (Tensor, its (begin, end, name) within the data)"""
    where = '%s: %s' % (path, name)
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, span = (entry.get(key) for key in ('dtype', 'shape', 'data_offsets'))
    if not (isinstance(shape, list) and len(shape) <= MAX_RANK and all(map(is_count, shape))
            and isinstance(dtype, str) and isinstance(span, list) and len(span) == 2
            and all(map(is_count, span))):
        raise Problem('header entry is malformed', where, DAMAGED)
    if dtype not in ITEM_BYTES:
        raise Problem('stored as %s (want F64, F32, F16 or BF16)' % dtype, where,
                      'save the model in one of these')
    begin, end = span
    if end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise Problem('bytes %d to %d do not hold %s of shape %s' % (begin, end, dtype, shape),
                      where, DAMAGED)
    return Tensor(Extent(file, path, base + begin, end - begin), dtype, shape), (begin, end, name)


def check_spans(spans, size, path):
    """Do the tensors fill the data exactly once, as the format demands?"""
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            raise Problem('data begins at %d where %d is due' % (begin, at),
                          '%s: %s' % (path, name), DAMAGED)
        at = end
    if at != size:
        raise Problem('holds %d bytes of data where its header says %d' % (size, at), path, DAMAGED)


# ---- 4. Torch's pickles --------------------------------------------------------------------------
#
# torch.save writes a pickle in which every tensor is a call of _rebuild_tensor_v2 on a storage
# named by a persistent id ('storage', type, key, device, element count). The bytes lie elsewhere:
#
#   zip format:     NAME/data.pkl, NAME/byteorder, NAME/data/KEY ..., all members uncompressed
#   older format:   pickles: magic, protocol, system, the object, [KEY ...]
#                   then for each key: u64 element count, bytes

PICKLE_CEILING = 16 << 20  # bytes; the largest GPT-2's pickle has about 0.1 MB
LEGACY_MAGIC = 0x1950a86a20f9469cfc6c
LEGACY_PROTOCOL = 1001
RESAVE = 'save it again as safetensors (save_pretrained)'

STORAGES = {'Float': 'F32', 'Double': 'F64', 'Half': 'F16', 'BFloat16': 'BF16', 'Long': 'I64',
            'Int': 'I32', 'Short': 'I16', 'Char': 'I8', 'Byte': 'U8', 'Bool': 'BOOL'}
Storage = collections.namedtuple('Storage', 'dtype key count')
Stored = collections.namedtuple('Stored', 'storage offset shape strides')  # a tensor, not yet found

# Everything that a pickle may name. None of it is Python's own object of that name: Unpickler.call
# does by hand what the three kinds of function would have done.
Global = collections.namedtuple('Global', 'kind dtype')
GLOBALS = {'collections OrderedDict': Global('dict', None),
           'torch._utils _rebuild_tensor': Global('tensor', None),
           'torch._utils _rebuild_tensor_v2': Global('tensor', None),
           'torch._utils _rebuild_parameter': Global('parameter', None),
           **{'%s %sStorage' % (module, name): Global('storage', dtype)
              for module in ('torch', 'torch.cuda') for name, dtype in STORAGES.items()}}

PICKLE_LITERALS = {'BININT', 'BININT1', 'BININT2', 'LONG1', 'BINFLOAT', 'BINUNICODE',
                   'SHORT_BINUNICODE', 'BINUNICODE8', 'BINSTRING', 'SHORT_BINSTRING'}
PICKLE_CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False, 'EMPTY_TUPLE': ()}


class Unpickler:
    """Reads one pickle from a stream, by interpreting its opcodes without the pickle module.

    It knows only the opcodes that torch.save writes and calls only what GLOBALS lists: a pickle
    that asks for anything else is refused at that opcode, before anything was made or run."""

    def __init__(self, stream, where):
        self.stream, self.where = stream, where
        self.stack, self.marks, self.memo = [], [], {}

    def load(self):
        try:
            for op, argument, _ in pickletools.genops(self.stream):
                if op.name == 'STOP':
                    return self.stack.pop()
                self.step(op.name, argument)
        except (ValueError, TypeError, KeyError, IndexError, OverflowError, struct.error) as error:
            raise Problem('pickle is malformed (%s)' % error, self.where, DAMAGED) from None
        raise Problem('pickle has no end', self.where, DAMAGED)

    def refuse(self, what):
        raise Problem('pickle wants %s, which no weights need' % what, self.where,
                      'do not trust this file; ' + RESAVE)

    def since_mark(self):
        mark = self.marks.pop()
        taken = self.stack[mark:]
        del self.stack[mark:]
        return taken

    def step(self, name, argument):
        stack, memo = self.stack, self.memo
        if name in PICKLE_LITERALS:
            stack.append(argument)
        elif name in PICKLE_CONSTANTS:
            stack.append(PICKLE_CONSTANTS[name])
        elif name in ('PROTO', 'FRAME'):
            pass
        elif name in ('EMPTY_DICT', 'EMPTY_LIST'):
            stack.append({} if name == 'EMPTY_DICT' else [])
        elif name == 'MARK':
            self.marks.append(len(stack))
        elif name == 'TUPLE':
            stack.append(tuple(self.since_mark()))
        elif name in ('TUPLE1', 'TUPLE2', 'TUPLE3'):
            stack[-int(name[-1]):] = [tuple(stack[-int(name[-1]):])]
        elif name in ('APPEND', 'APPENDS'):
            items = [stack.pop()] if name == 'APPEND' else self.since_mark()
            self.top(list).extend(items)
        elif name in ('SETITEM', 'SETITEMS'):
            items = [stack.pop(-2), stack.pop()] if name == 'SETITEM' else self.since_mark()
            self.set_items(items)
        elif name in ('BINPUT', 'LONG_BINPUT', 'MEMOIZE'):
            memo[len(memo) if name == 'MEMOIZE' else argument] = stack[-1]
        elif name in ('BINGET', 'LONG_BINGET'):
            stack.append(memo[argument])
        elif name == 'GLOBAL':
            stack.append(self.find(argument))
        elif name == 'STACK_GLOBAL':
            stack.append(self.find(' '.join(self.popped(2))))
        elif name == 'BINPERSID':
            stack.append(self.storage(stack.pop()))
        elif name == 'REDUCE':
            stack.append(self.call(*self.popped(2)))
        elif name == 'BUILD':
            stack.pop()          # a state dict's _metadata: versions of modules, of no use here
            self.top(dict)
        else:
            self.refuse('opcode ' + name)

    def popped(self, count):
        taken = self.stack[-count:]
        del self.stack[-count:]
        return taken

    def top(self, kind):
        if type(self.stack[-1]) is not kind:
            raise ValueError('%s expected' % kind.__name__)
        return self.stack[-1]

    def set_items(self, items):
        keys, values = items[0::2], items[1::2]
        # Keys of other types are refused because hashing a nested tuple can take forever.
        if len(keys) != len(values) or any(type(key) is not str for key in keys):
            raise ValueError('names expected as keys')
        self.top(dict).update(zip(keys, values))

    def find(self, name):
        if name not in GLOBALS:
            self.refuse('"%s"' % name.replace(' ', '.'))
        return GLOBALS[name]

    def storage(self, identity):
        """('storage', type, key, device, count), and in the older format a view, always None."""
        kind, dtype, key, _, count = identity[:5]
        if kind != 'storage' or type(dtype) is not Global or dtype.kind != 'storage':
            raise ValueError('storage expected')
        if type(key) is not str or not is_count(count) or identity[5:] not in ((), (None,)):
            raise ValueError('storage of unknown extent')
        return Storage(dtype.dtype, key, count)

    def call(self, function, arguments):
        kind = function.kind if type(function) is Global else None
        if kind == 'dict' and arguments == ():
            return {}
        if kind == 'parameter':
            return arguments[0]
        if kind != 'tensor':
            self.refuse('a call that builds no tensor')
        storage, offset, shape, strides = arguments[:4]
        if not (type(storage) is Storage and type(shape) is tuple and type(strides) is tuple
                and len(shape) == len(strides) <= MAX_RANK and is_count(offset)
                and all(map(is_count, shape + strides))):
            raise ValueError('tensor with unfit arguments')
        return Stored(storage, offset, shape, strides)


def read_torch(path, file, size):
    """-> {name: Tensor} of a file that torch.save wrote in either format"""
    if file.read(4) == b'PK\3\4':
        state, extents = read_torch_zip(path, file, size)
    else:
        state, extents = read_torch_legacy(path, file, size)
    if type(state) is not dict:
        raise Problem('holds no table of tensors', path, RESAVE)
    tensors = {}
    for name, stored in state.items():
        where = '%s: %s' % (path, name)
        if type(stored) is not Stored:
            raise Problem('not a tensor', where, RESAVE)
        tensors[name] = Tensor(extents(stored.storage), stored.storage.dtype, stored.shape,
                               stored.offset, stored.strides)
        if not tensors[name].fits():
            raise Problem('reaches beyond its storage', where, DAMAGED)
    return tensors


def read_torch_zip(path, file, size):
    """-> (unpickled object, function from Storage to Extent)"""
    try:
        members = {info.filename: info for info in zipfile.ZipFile(file).infolist()}
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OverflowError,
            EOFError, IndexError, OSError) as error:
        raise Problem('not a whole zip file (%s)' % error, path, DAMAGED) from None
    pickles = [name for name in members if re.fullmatch(r'[^/]+/data\.pkl', name)]
    if len(pickles) != 1:
        raise Problem('zip file without one data.pkl', path, 'give a file that torch.save wrote')
    root = pickles[0][:-len('data.pkl')]

    def extent(name):
        if root + name not in members:
            raise Problem('zip file without ' + root + name, path, DAMAGED)
        return zip_extent(members[root + name], path, file, size)

    def storage_extent(storage):
        found = extent('data/' + storage.key)
        if found.size != storage.count * ITEM_BYTES[storage.dtype]:
            raise Problem('storage %s has %d bytes (want %d)' % (
                storage.key, found.size, storage.count * ITEM_BYTES[storage.dtype]), path, DAMAGED)
        return found

    order = extent('byteorder') if root + 'byteorder' in members else None
    if order and order.read(0, min(order.size, 6)) != b'little':
        raise Problem('not stored as little-endian', path, RESAVE)
    return Unpickler(io.BytesIO(read_pickle(extent('data.pkl'), path)), path).load(), storage_extent


def read_pickle(extent, path):
    if extent.size > PICKLE_CEILING:
        raise Problem('pickle of %d bytes' % extent.size, path, RESAVE)
    return extent.read(0, extent.size)


def zip_extent(info, path, file, size):
    """Where an uncompressed member's bytes lie: after its local header, whose length only the
    header itself tells (torch pads it so that the bytes are aligned)."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise Problem('zip member %s is compressed or encrypted' % info.filename, path, RESAVE)
    if not 0 <= info.header_offset <= size - 30:
        raise Problem('zip member %s lies outside the file' % info.filename, path, DAMAGED)
    local = Extent(file, path, info.header_offset, 30).read(0, 30)
    start = info.header_offset + 30 + sum(struct.unpack_from('<HH', local, 26))
    if local[:4] != b'PK\3\4' or start + info.file_size > size:
        raise Problem('zip member %s lies outside the file' % info.filename, path, DAMAGED)
    return Extent(file, path, start, info.file_size, info.CRC)


def read_torch_legacy(path, file, size):
    """-> (unpickled object, function from Storage to Extent)"""
    stream = io.BytesIO(Extent(file, path, 0, size).read(0, min(size, PICKLE_CEILING)))
    foreign = Problem('not a file that torch.save wrote', path,
                      'give model.safetensors or pytorch_model.bin')
    if stream.getvalue()[:1] != b'\x80' or Unpickler(stream, path).load() != LEGACY_MAGIC:
        raise foreign
    protocol, system, state, keys = (Unpickler(stream, path).load() for _ in range(4))
    if protocol != LEGACY_PROTOCOL or type(system) is not dict or type(keys) is not list:
        raise foreign
    if system.get('little_endian') is not True:
        raise Problem('not stored as little-endian', path, RESAVE)
    storages = {stored.storage.key: stored.storage for stored in
                (state.values() if type(state) is dict else ()) if type(stored) is Stored}
    extents, at = {}, stream.tell()
    for key in keys:
        if type(key) is not str or key not in storages:
            raise Problem('holds a storage that no tensor uses', path, RESAVE)
        storage = storages[key]
        length = storage.count * ITEM_BYTES[storage.dtype]
        if at + 8 + length > size:
            raise Problem('file ends early, in storage ' + key, path, DAMAGED)
        if struct.unpack('<Q', Extent(file, path, at, 8).read(0, 8))[0] != storage.count:
            raise Problem('storage %s has another length than its tensors say' % key, path, DAMAGED)
        extents[storage] = Extent(file, path, at + 8, length)
        at += 8 + length
    if at != size:
        raise Problem('%d bytes follow the last storage' % (size - at), path, DAMAGED)

    def storage_extent(storage):
        if storage not in extents:
            raise Problem('storage %s is missing' % storage.key, path, DAMAGED)
        return extents[storage]
    return state, storage_extent


# ---- 5. The checkpoint ---------------------------------------------------------------------------

WEIGHT_FILES = (('model.safetensors', read_safetensors), ('pytorch_model.bin', read_torch))
IGNORED = re.compile(r'h\.\d+\.attn\.(bias|masked_bias)')  # the causal mask, stored by old versions


def find_weights(folder):
    """-> (names of the weight files, their reader, {tensor: file} or {} if one file has all);
    ([], None, {}) if a file is missing. Safetensors come first, as in transformers."""
    for name, reader in WEIGHT_FILES:
        if os.path.exists(os.path.join(folder, name)):
            return [name], reader, {}
        index = os.path.join(folder, name + '.index.json')
        if os.path.exists(index):
            placed = read_index(index)
            files = sorted(set(placed.values()))
            if all(os.path.exists(os.path.join(folder, file)) for file in files):
                return files, reader, placed
    return [], None, {}


def read_index(path):
    """-> {tensor: file}. Names with a folder are refused: they could point anywhere."""
    placed = read_json(path).get('weight_map')
    if not isinstance(placed, dict) or not placed or not all(
            isinstance(file, str) and re.fullmatch(r'[\w-][\w.-]*', file)
            for file in placed.values()):
        raise Problem('no "weight_map" from tensors to file names', path, DAMAGED)
    return placed


def open_checkpoint(folder, opened):
    """-> {name without prefix: (Tensor, where)}; the ExitStack `opened` closes the files"""
    files, reader, placed = find_weights(folder)
    if not files:
        raise Problem('no weights (model.safetensors or pytorch_model.bin, or a shard of them)',
                      folder, 'give a folder that holds a whole model')
    tensors, origin = {}, {}
    for file_name in files:
        path = os.path.join(folder, file_name)
        file = opened.enter_context(open(path, 'rb', buffering=0))
        for full_name, tensor in reader(path, file, os.fstat(file.fileno()).st_size).items():
            name = full_name[len('transformer.'):] if full_name.startswith('transformer.') \
                else full_name
            if name in tensors:
                raise Problem('tensor is given twice', '%s: %s' % (path, full_name),
                              'keep one of the two')
            tensors[name] = tensor, '%s: %s' % (path, full_name)
            origin[full_name] = file_name
    for full_name, file_name in placed.items():
        if origin.get(full_name) != file_name:
            raise Problem('shard lacks the tensor %s that the index places there' % full_name,
                          os.path.join(folder, file_name), DAMAGED)
    return {name: found for name, found in tensors.items() if not IGNORED.fullmatch(name)}


def choose_tensors(tensors, config, folder):
    """-> [(name, Tensor, where)] in the flat file's order; nothing missing, nothing left over"""
    if config.tied:
        tensors.pop('lm_head.weight', None)  # torch.save writes the shared matrix under both names
    chosen = []
    for name, shape in config.tensors():
        if name not in tensors:
            raise Problem('tensor %s is missing' % name, folder,
                          'give a GPT-2 checkpoint that fits its config.json')
        tensor, where = tensors.pop(name)
        if tensor.shape != shape:
            raise Problem('shape is %s where config.json asks for %s' % (
                list(tensor.shape), list(shape)), where, 'use the config.json of this checkpoint')
        if tensor.dtype not in FLOATS:
            raise Problem('stored as %s (want F64, F32, F16 or BF16)' % tensor.dtype, where,
                          'save the model in one of these')
        chosen.append((name, tensor, where))
    for name, (_, where) in tensors.items():
        raise Problem('tensor is not part of a GPT-2 language model of %d layers' % config.n_layer,
                      where, 'give a GPT2LMHeadModel checkpoint that fits its config.json')
    return chosen


# ---- 6. config.json ------------------------------------------------------------------------------

ACTIVATIONS = {'gelu_new': 0, 'gelu_pytorch_tanh': 0, 'gelu': 1, 'relu': 2}

# field: names in config.json, first found counts; GPT2Config's default, which it leaves out;
# and the flat file's ceiling.
SIZES = (('n_layer', ('n_layer', 'num_hidden_layers'), 12, 256),
         ('n_head', ('n_head', 'num_attention_heads'), 12, 256),
         ('d_model', ('n_embd', 'hidden_size'), 768, 65536),
         ('d_mlp', ('n_inner',), None, 262144),
         ('n_ctx', ('n_positions', 'n_ctx', 'max_position_embeddings'), 1024, 1048576),
         ('d_vocab', ('vocab_size',), 50257, 4194304))


class Config:
    """What config.json says, checked: the sizes of SIZES as attributes, act_fn, epsilon, tied,
    inverse_layer."""

    def __init__(self, path):
        self.path, self.values = path, read_json(path)
        self.require('model_type', 'gpt2', 'only GPT-2 models can be converted')
        self.require('scale_attn_weights', True, 'attention without 1/sqrt(d) is not supported')
        self.require('add_cross_attention', False, 'cross attention is not supported')
        for field, names, default, ceiling in SIZES:
            setattr(self, field, self.size(names, default, ceiling))
        if self.d_model % self.n_head:
            raise Problem('n_embd = %d is not divisible by n_head = %d' % (
                self.d_model, self.n_head), path, 'correct one of them')
        self.act_fn = self.activation()
        self.epsilon = self.read_epsilon()
        self.tied = self.flag('tie_word_embeddings', True)
        self.inverse_layer = self.flag('scale_attn_by_inverse_layer_idx', False)

    def require(self, key, wanted, reason):
        value = self.values.get(key, wanted)
        if value != wanted:
            raise Problem('%s is %s (want %s)' % tuple(map(json.dumps, (key, value, wanted))),
                          self.path, reason)

    def size(self, names, default, ceiling):
        value = next((self.values[name] for name in names if self.values.get(name) is not None),
                     default)
        if value is None:                     # n_inner: null
            value = 4 * self.d_model
        if not is_count(value) or not 1 <= value <= ceiling:
            raise Problem('%s = %s (want 1..%d)' % (names[0], json.dumps(value), ceiling),
                          self.path, 'correct it')
        return value

    def flag(self, key, default):
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise Problem('%s is neither true nor false' % key, self.path, 'correct it')
        return value

    def activation(self):
        name = self.values.get('activation_function', 'gelu_new')
        if not isinstance(name, str) or name not in ACTIVATIONS:
            raise Problem('activation_function is %s' % json.dumps(name), self.path,
                          'only %s are supported' % ', '.join(ACTIVATIONS))
        return ACTIVATIONS[name]

    def read_epsilon(self):
        value = self.values.get('layer_norm_epsilon', 1e-5)
        if type(value) not in (int, float) or not 0 <= value <= 1:  # NaN fails this too
            raise Problem('layer_norm_epsilon = %s (want 0..1)' % json.dumps(value), self.path,
                          'correct it')
        return float(value)

    def tensors(self):
        """(name, shape) of every tensor, in the flat file's order. Matrices are [in, out]."""
        c, m = self.d_model, self.d_mlp
        yield 'wte.weight', (self.d_vocab, c)
        yield 'wpe.weight', (self.n_ctx, c)
        for layer in range(self.n_layer):
            for name, shape in (
                    ('ln_1.weight', (c,)), ('ln_1.bias', (c,)),
                    ('attn.c_attn.weight', (c, 3 * c)), ('attn.c_attn.bias', (3 * c,)),
                    ('attn.c_proj.weight', (c, c)), ('attn.c_proj.bias', (c,)),
                    ('ln_2.weight', (c,)), ('ln_2.bias', (c,)),
                    ('mlp.c_fc.weight', (c, m)), ('mlp.c_fc.bias', (m,)),
                    ('mlp.c_proj.weight', (m, c)), ('mlp.c_proj.bias', (c,))):
                yield 'h.%d.%s' % (layer, name), shape
        yield 'ln_f.weight', (c,)
        yield 'ln_f.bias', (c,)
        if not self.tied:
            yield 'lm_head.weight', (self.d_vocab, c)


# ---- 7. The tokenizer ----------------------------------------------------------------------------

EOT = '<|endoftext|>'
NO_ID = 0xFFFFFFFF
WITHOUT = 'leave it out with --no-tokenizer'


def byte_alphabet():
    """{character: byte}. Byte-level BPE writes each byte as one printable character: itself where
    Latin-1 prints it, else the next free one from U+0100 on."""
    printed = [*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printed]
    return {**{chr(byte): byte for byte in printed},
            **{chr(0x100 + i): byte for i, byte in enumerate(hidden)}}


def has_tokenizer(folder):
    def present(*names):
        return all(os.path.exists(os.path.join(folder, name)) for name in names)
    return present('tokenizer.json') or present('vocab.json', 'merges.txt')


def read_tokenizer(folder, d_vocab):
    """-> the flat file's tokenizer section; tokenizer.json counts where both forms are there"""
    if not has_tokenizer(folder):
        raise Problem('no tokenizer.json, nor vocab.json and merges.txt', folder,
                      'add them or convert with --no-tokenizer')
    path = os.path.join(folder, 'tokenizer.json')
    if os.path.exists(path):
        vocab, merges, added = read_tokenizer_json(path)
    else:
        path = os.path.join(folder, 'vocab.json')
        vocab, merges, added = read_vocab_and_merges(folder)
    for token, number in [*vocab.items(), *added.items()]:
        if not is_count(number):
            raise Problem('token %s has no number' % json.dumps(token), path, DAMAGED)
    added = drop_unembedded(added, d_vocab, path)
    return tokenizer_section(tokens_by_id(vocab, added, d_vocab, path),
                             merge_ids(vocab, merges, path),
                             added.get(EOT, vocab.get(EOT, NO_ID)))


def read_tokenizer_json(path):
    """-> ({token: id}, [(left, right)], {added token: id})"""
    found = read_json(path)
    model = found.get('model')
    if not isinstance(model, dict) or model.get('type', 'BPE') != 'BPE':
        raise Problem('the tokenizer is not BPE', path, WITHOUT)
    check_byte_level(found, model, path)
    vocab, merges, added = model.get('vocab'), model.get('merges'), found.get('added_tokens') or []
    if not (isinstance(vocab, dict) and isinstance(merges, list) and isinstance(added, list)):
        raise Problem('vocab, merges or added_tokens are malformed', path, DAMAGED)
    pairs = [merge.split(' ') if isinstance(merge, str) else merge for merge in merges]
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2
                and all(isinstance(part, str) for part in pair)):
            raise Problem('merge %s is no pair of tokens' % json.dumps(pair), path, DAMAGED)
    for token in added:
        if not isinstance(token, dict) or not isinstance(token.get('content'), str):
            raise Problem('an entry of added_tokens is malformed', path, DAMAGED)
    return vocab, pairs, {token['content']: token.get('id') for token in added}


def check_byte_level(found, model, path):
    """Refuses whatever would make another tokenizer of it than GPT-2's: a tokenizer that is nearly
    right would give silently wrong tokens."""
    step = found.get('pre_tokenizer')
    if isinstance(step, dict) and step.get('type') == 'Sequence':
        steps = step.get('pretokenizers')
        step = steps[0] if isinstance(steps, list) and len(steps) == 1 else None
    if not isinstance(step, dict) or step.get('type') != 'ByteLevel':
        raise Problem('the tokenizer is not GPT-2\'s byte-level BPE', path, WITHOUT)
    for table, key, plain in ((step, 'add_prefix_space', (False, None)),
                              (step, 'use_regex', (True, None)),
                              (found, 'normalizer', (None,)),
                              (model, 'dropout', (None, 0)),
                              (model, 'continuing_subword_prefix', (None, '')),
                              (model, 'end_of_word_suffix', (None, '')),
                              (model, 'ignore_merges', (None, False))):
        if table.get(key) not in plain:
            raise Problem('the tokenizer sets %s, which GPT-2\'s does not' % key, path, WITHOUT)


def read_vocab_and_merges(folder):
    """The same from vocab.json, merges.txt and, if it is there, added_tokens.json"""
    vocab = read_json(os.path.join(folder, 'vocab.json'))
    path = os.path.join(folder, 'merges.txt')
    try:
        lines = read_text_file(path).decode('utf-8').split('\n')
    except ValueError as error:
        raise Problem('not UTF-8 (%s)' % error, path, DAMAGED) from None
    pairs = []
    for number, line in enumerate(lines, 1):
        line = line.rstrip('\r')
        if line and not line.startswith('#version'):  # "# #" is a merge, not a comment
            pairs.append(line.split(' '))
            if len(pairs[-1]) != 2:
                raise Problem('line %d is no pair of tokens' % number, path, DAMAGED)
    extra = os.path.join(folder, 'added_tokens.json')
    return vocab, pairs, read_json(extra) if os.path.exists(extra) else {}


def drop_unembedded(added, d_vocab, path):
    """Tokens are often added without widening the embedding; the model cannot take those."""
    kept = {token: number for token, number in added.items() if number < d_vocab}
    if len(kept) < len(added):
        sys.stderr.write('convert_weights.py: warning: %d added tokens have no embedding, %s, '
                         'they are left out\n' % (len(added) - len(kept), printable(path)))
    return kept


def tokens_by_id(vocab, added, d_vocab, path):
    """-> [raw bytes of token 0, 1, ...], b'' where an id has no token"""
    alphabet, tokens = byte_alphabet(), {}
    for token, number in [*vocab.items(), *added.items()]:
        where = '%s: token %s' % (path, json.dumps(token))
        try:
            raw = token.encode('utf-8') if token in added else bytes(alphabet[c] for c in token)
        except (KeyError, UnicodeEncodeError):
            raise Problem('not a byte-level token', where, WITHOUT) from None
        if not 0 < len(raw) <= 0xFFFF or number >= d_vocab:
            raise Problem('%d bytes long with id %d (want 1..65535 and an id below %d)' % (
                len(raw), number, d_vocab), where, 'use the tokenizer of this model')
        if tokens.setdefault(number, raw) != raw:
            raise Problem('id %d is given twice' % number, where, DAMAGED)
    return [tokens.get(number, b'') for number in range(max(tokens, default=-1) + 1)]


def merge_ids(vocab, merges, path):
    """-> [(left id, right id, merged id)] in rank order"""
    ranked = {}
    for left, right in merges:
        ids = tuple(vocab.get(token) for token in (left, right, left + right))
        if None in ids or ids in ranked:
            raise Problem('merge "%s %s" %s' % (left, right, 'is given twice' if ids in ranked else
                                                'refers to a token that is not in the vocabulary'),
                          path, 'use the merges that belong to the vocabulary')
        ranked[ids] = True
    return list(ranked)


def tokenizer_section(tokens, merges, eot):
    section = bytearray(struct.pack('<4I', len(tokens), len(merges), eot, 0))
    for raw in tokens:
        section += struct.pack('<H', len(raw)) + raw
    section += bytes(-len(section) % 4)
    for ids in merges:
        section += struct.pack('<3I', *ids)
    return bytes(section)


# ---- 8. The flat file ----------------------------------------------------------------------------
#
# Head of 128 bytes, table of 80 bytes a tensor, then tokenizer section and tensors, each at the
# next multiple of 64, gaps zero. patch.c's chapter "model file" specifies every byte.

ALIGN = 64
DTYPES = {'F32': 0, 'F16': 1}


def aligned(offset):
    return -(-offset // ALIGN) * ALIGN


def lay_out(chosen, tokenizer, dtype):
    """-> ([(name, Tensor, where, stored dtype, offset)], offset of the tokenizer, file's length)"""
    start = aligned(128 + 80 * len(chosen))
    end, rows = start + len(tokenizer), []
    for name, tensor, where in chosen:
        stored = 'F16' if dtype == 'f16' and len(tensor.shape) == 2 else 'F32'
        offset = aligned(end)
        rows.append((name, tensor, where, stored, offset))
        end = offset + math.prod(tensor.shape) * ITEM_BYTES[stored]
    return rows, start, end


def write_flat(out, config, chosen, tokenizer, dtype):
    """Writes the file in one go, then head and table, which need the checksums, over zeros."""
    rows, start, end = lay_out(chosen, tokenizer, dtype)
    out.write(bytes(start) + tokenizer)
    progress, table = Progress('converting', end), b''
    for name, tensor, where, stored, offset in rows:
        out.write(bytes(offset - out.tell()))
        crc = copy_tensor(out, tensor, where, stored, progress)
        table += struct.pack('<48s4IQ2I', name.encode(), DTYPES[stored], len(tensor.shape),
                             *(tensor.shape + (1,))[:2], offset, crc, 0)
    progress.end()
    head = struct.pack('<8s8Id2I3Q2I', b'ACTPATCH', 1, config.n_layer, config.n_head,
                       config.d_model, config.d_mlp, config.n_ctx, config.d_vocab, config.act_fn,
                       config.epsilon, config.inverse_layer, len(rows),
                       start if tokenizer else 0, len(tokenizer), end,
                       zlib.crc32(table), zlib.crc32(tokenizer))
    head = head.ljust(124, b'\0')
    out.seek(0)
    out.write(head + struct.pack('<I', zlib.crc32(head)) + table)


def copy_tensor(out, tensor, where, stored, progress):
    """-> CRC-32 of what was written"""
    crc = 0
    for piece in tensor.pieces(where):
        try:
            data = recode(piece, tensor.dtype, stored)
        except OverflowError:
            raise Problem('holds a value too large for %s' % stored, where,
                          'convert with --dtype f32' if stored == 'F16' else
                          'save the model with smaller weights') from None
        crc = zlib.crc32(data, crc)
        out.write(data)
        progress.at(out.tell())
    return crc


def convert(folder, target, dtype, with_tokenizer):
    """Converts one model folder. The file is written beside its target and renamed when whole, so
    that there is never half a model under the target's name."""
    if not os.path.exists(os.path.join(folder, 'config.json')):
        raise Problem('no config.json', folder, 'give a folder that holds a whole model')
    config = Config(os.path.join(folder, 'config.json'))
    tokenizer = read_tokenizer(folder, config.d_vocab) if with_tokenizer else b''
    target = os.path.realpath(target)
    partial = '%s.%d.partial' % (target, os.getpid())
    with contextlib.ExitStack() as opened:
        chosen = choose_tensors(open_checkpoint(folder, opened), config, folder)
        if os.path.exists(target) and (not os.path.isfile(target) or
                                       target in map(os.path.realpath, source_files(folder))):
            raise Problem('output is a part of the model or no plain file', target,
                          'choose another name')
        try:
            with open(partial, 'wb') as out:
                write_flat(out, config, chosen, tokenizer, dtype)
            os.replace(partial, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(partial)
            raise
    return config


def source_files(folder):
    return [os.path.join(folder, name) for name in os.listdir(folder)
            if re.fullmatch(r'.*\.(safetensors|json|txt)|pytorch_model.*\.bin', name)]


# ---- 9. The hub ----------------------------------------------------------------------------------
#
# The cache is laid out as Hugging Face's own tools do: HUB/models--ORG--NAME/refs/main holds a
# revision, HUB/models--ORG--NAME/snapshots/REVISION/ the files.

HUB = 'https://huggingface.co'
ALIASES = {**{name: 'openai-community/' + name
              for name in ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')},
           'distilgpt2': 'distilbert/distilgpt2'}
TIMEOUT = 30             # seconds without a byte
RETRIES = 4              # attempts in a row that bring no new byte
RETRY_PAUSE = 1.0        # seconds, doubled from attempt to attempt
REDIRECTS = 10
BLOCK = 1 << 18          # bytes a read


def hf_home():
    cache = os.environ.get('XDG_CACHE_HOME') or os.path.join('~', '.cache')
    return os.path.expanduser(os.environ.get('HF_HOME') or os.path.join(cache, 'huggingface'))


def hub_cache():
    return os.path.expanduser(os.environ.get('HF_HUB_CACHE') or os.path.join(hf_home(), 'hub'))


def read_token():
    """HF_TOKEN, else what the file HF_TOKEN_PATH or HF_HOME/token holds, else ''"""
    token, where = os.environ.get('HF_TOKEN', '').strip(), 'HF_TOKEN'
    if not token:
        where = os.path.expanduser(os.environ.get('HF_TOKEN_PATH') or
                                   os.path.join(hf_home(), 'token'))
        if os.path.isfile(where):
            token = read_text_file(where).decode('latin-1').strip()
    if not re.fullmatch(r'[!-~]*', token):  # else http.client's error would print it
        raise Problem('the token holds spaces or control characters', where, 'set it again')
    return token


def names_of(name):
    """The name as given, then the other name of the same model."""
    both = [name] + [b if name == a else a for a, b in ALIASES.items() if name in (a, b)]
    return both


def repository_folder(name):
    return os.path.join(hub_cache(), 'models--' + name.replace('/', '--'))


def is_complete(folder, with_tokenizer):
    return (os.path.exists(os.path.join(folder, 'config.json')) and bool(find_weights(folder)[0])
            and (has_tokenizer(folder) or not with_tokenizer))


def cached_model(name, with_tokenizer):
    """-> the folder of the cached revision `main` if it has all that is needed, else None"""
    for known in names_of(name):
        try:
            reference = os.path.join(repository_folder(known), 'refs', 'main')
            revision = read_text_file(reference).decode('ascii').strip()
        except (OSError, ValueError):
            continue
        folder = os.path.join(repository_folder(known), 'snapshots', revision)
        if re.fullmatch(r'\w[\w.-]*', revision) and is_complete(folder, with_tokenizer):
            return folder
    return None


def origin_of(url):
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {'https': 443, 'http': 80}.get(parts.scheme)


class EveryStatus(urllib.request.HTTPErrorProcessor):
    """Hands back each response as it came: redirects are followed by hand, so that the token is
    never sent to another host and each hop's headers are seen."""

    def http_response(self, request, response):
        return response

    https_response = http_response


class Reply:
    """An HTTP response after redirects, and what the hub said of the file. What a host that it
    redirected to says does not count: an ETag there is the host's own affair."""

    def __init__(self, response, facts):
        self.response, self.status = response, response.status
        revision = re.fullmatch(r'[0-9a-f]{40}', facts.get('X-Repo-Commit', ''))
        self.revision = revision.group() if revision else None
        self.linked_size = first_number(r'(\d+)', facts.get('X-Linked-Size'))
        self.hash = re.sub(r'^W/|"', '', facts.get('X-Linked-Etag') or facts.get('ETag') or '')

    def header_number(self, name, pattern):
        return first_number(pattern, self.response.headers.get(name))

    def extent(self, asked):
        """-> (first byte that the body holds, the whole file's size or None). A server may ignore
        the byte `asked` for and send everything."""
        length = self.header_number('Content-Length', r'(\d+)')
        first, total = 0, None
        if self.status == 206:
            first = self.header_number('Content-Range', r'bytes (\d+)-.*')
            total = self.header_number('Content-Range', r'.*/(\d+)')
            if first != asked:
                raise ValueError('the server sent another part than asked for')
        sizes = {self.linked_size, total, None if length is None else first + length} - {None}
        if len(sizes) > 1:
            raise Problem('wrong size: %s bytes' % ' or '.join(map(str, sorted(sizes))),
                          self.response.url, 'run this again; the server contradicts itself')
        return first, sizes.pop() if sizes else None


def first_number(pattern, text):
    match = re.fullmatch(pattern, text or '')
    return int(match.group(1)) if match else None


def size_of(path):
    return os.path.getsize(path) if os.path.exists(path) else 0


class Hub:
    """The server that HF_ENDPOINT names."""

    def __init__(self):
        self.endpoint = (os.environ.get('HF_ENDPOINT') or HUB).rstrip('/')
        try:
            scheme, host, _ = origin_of(self.endpoint)
        except ValueError:
            scheme = host = None
        if scheme not in ('http', 'https') or not host:
            raise Problem('"%s" is no http address' % self.endpoint, 'HF_ENDPOINT', 'correct it')
        self.token = read_token()
        self.opener = urllib.request.build_opener(EveryStatus)

    def get(self, url, start):
        """-> Reply after redirects. Only the endpoint itself, scheme, host and port, gets the
        token."""
        facts = {}
        for _ in range(REDIRECTS):
            at_home = origin_of(url) == origin_of(self.endpoint)
            headers = {'User-Agent': 'convert_weights.py', 'Accept-Encoding': 'identity'}
            if start:
                headers['Range'] = 'bytes=%d-' % start
            if at_home and self.token:
                headers['Authorization'] = 'Bearer ' + self.token
            response = self.opener.open(urllib.request.Request(url, headers=headers),
                                        timeout=TIMEOUT)
            for key in ('X-Repo-Commit', 'X-Linked-Size', 'X-Linked-Etag', 'ETag'):
                if at_home and response.headers.get(key):
                    facts.setdefault(key, response.headers[key])
            if response.status not in (301, 302, 303, 307, 308):
                return Reply(response, facts)
            response.close()
            url = urllib.parse.urljoin(url, response.headers.get('Location') or '')
            if urllib.parse.urlsplit(url).scheme not in ('http', 'https'):
                raise Problem('redirect to something other than http', url, 'check HF_ENDPOINT')
        raise Problem('more than %d redirects' % REDIRECTS, url, 'check HF_ENDPOINT')

    def download(self, url, partial):
        """Fetches url into the file `partial`, going on where it ends, also in a later run.
        -> Reply with the file whole and its hash checked, or None where there is no such file"""
        failures = 0
        while True:
            before = size_of(partial)
            try:
                reply = self.get(url, before)
                with reply.response:
                    if reply.status == 404:
                        return None
                    refuse_status(reply, url)
                    size = receive(reply, partial, before)
                if size is None or size_of(partial) == size:
                    verify(partial, size, reply.hash, url)
                    return reply
                reason = 'connection closed early'
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = getattr(error, 'reason', None) or error
            failures = 1 if size_of(partial) > before else failures + 1
            if failures >= RETRIES:
                raise Problem('download failed (%s)' % reason, url,
                              'run this again, it goes on where it stopped; or give a folder')
            time.sleep(RETRY_PAUSE * failures)


def refuse_status(reply, url):
    """Only 200, 206 and 416 pass; ValueError asks for another attempt."""
    where = '%s: HTTP %d' % (url, reply.status)
    if reply.status == 401:
        raise Problem('not authorised, or no such model', where,
                      'check the name; for a private model set HF_TOKEN to a valid token')
    if reply.status == 403:
        raise Problem('access denied', where,
                      'ask for access on the model\'s page and set HF_TOKEN to your token')
    if reply.status == 429 or reply.status >= 500:
        raise ValueError('the server is busy: HTTP %d' % reply.status)
    if reply.status not in (200, 206, 416):
        raise Problem('unexpected answer', where, 'check the name and HF_ENDPOINT')


def receive(reply, partial, before):
    """Writes the body into `partial`, of which `before` bytes are there. -> whole size or None"""
    if reply.status == 416:  # nothing follows: the file is whole, or it was of another revision
        whole = reply.header_number('Content-Range', r'bytes \*/(\d+)')
        if whole == before and reply.hash:
            return whole
        os.remove(partial)
        raise ValueError('the part at hand does not fit')
    first, size = reply.extent(before)
    progress = Progress('downloading ' + urllib.parse.urlsplit(reply.response.url).path[-40:],
                        size or 0)
    with open(partial, 'ab' if first else 'wb') as file:
        while True:
            block = reply.response.read(BLOCK)
            if not block:
                break
            file.write(block)
            progress.at(file.tell())
    progress.end()
    return size


def verify(path, size, expected, url):
    """The hub gives a large file's SHA-256, and of a small one the hash of git's blob object."""
    if len(expected) == 64:
        digest = hashlib.sha256()
    elif len(expected) == 40:
        digest = hashlib.sha1(b'blob %d\0' % size_of(path))
    elif size is None:
        os.remove(path)
        raise Problem('the server states neither size nor hash', url,
                      'check HF_ENDPOINT; what came may be cut short')
    else:
        return
    with open(path, 'rb') as file:
        for block in iter(lambda: file.read(BLOCK), b''):
            digest.update(block)
    if digest.hexdigest() != expected.lower():
        os.remove(path)
        raise Problem('wrong hash: %s, not %s' % (digest.hexdigest(), expected), url,
                      'run this again; the bad copy was removed')


class Snapshot:
    """One model's folder in the cache while it is filled. What is not whole stays beside the
    snapshots, as FILE.incomplete."""

    def __init__(self, hub, name):
        self.hub, self.name, self.root = hub, name, repository_folder(name)
        self.revision = None            # known from the first answer

    def folder(self):
        return os.path.join(self.root, 'snapshots', self.revision)

    def fetch(self, file):
        """-> is the file there now? False where the repository has none of that name"""
        if self.revision and os.path.exists(os.path.join(self.folder(), file)):
            return True
        url = '%s/%s/resolve/main/%s' % (self.hub.endpoint, self.name, file)
        partial = os.path.join(self.root, file + '.incomplete')
        os.makedirs(self.root, exist_ok=True)
        reply = self.hub.download(url, partial)
        if reply is None:
            return False
        if self.revision and reply.revision and self.revision != reply.revision:
            raise Problem('the model was changed during the download', url, 'run this again')
        self.revision = self.revision or reply.revision or 'main'
        os.makedirs(self.folder(), exist_ok=True)
        os.replace(partial, os.path.join(self.folder(), file))
        return True

    def fetch_all(self, files, remedy):
        for file in files:
            if not self.fetch(file):
                raise Problem('no %s' % file, '%s: %s' % (self.hub.endpoint, self.name), remedy)

    def fetch_weights(self):
        for file, _ in WEIGHT_FILES:
            if self.fetch(file):
                return
            if self.fetch(file + '.index.json'):
                placed = read_index(os.path.join(self.folder(), file + '.index.json'))
                self.fetch_all(sorted(set(placed.values())), 'choose another model')
                return
        self.fetch_all(['model.safetensors'], 'choose a model that has PyTorch weights')

    def finish(self):
        """Names this revision `main`, as the last step: until then the cache has no such model."""
        reference = os.path.join(self.root, 'refs', 'main')
        os.makedirs(os.path.dirname(reference), exist_ok=True)
        with open(reference + '.incomplete', 'w') as file:
            file.write(self.revision)
        os.replace(reference + '.incomplete', reference)


def download_model(name, with_tokenizer):
    """-> the folder of the downloaded model"""
    if os.environ.get('HF_HUB_OFFLINE', '').upper() in ('1', 'ON', 'YES', 'TRUE'):
        raise Problem('not in the cache, and HF_HUB_OFFLINE is set', name,
                      'unset it or give a folder')
    hub = Hub()
    for known in names_of(name):
        snapshot = Snapshot(hub, known)
        if snapshot.fetch('config.json'):
            break
        with contextlib.suppress(OSError):
            os.rmdir(snapshot.root)      # made for nothing
    else:
        raise Problem('no such folder, and no such model at %s (HTTP 404)' % hub.endpoint, name,
                      'check the name')
    snapshot.fetch_weights()
    if with_tokenizer and not snapshot.fetch('tokenizer.json'):
        snapshot.fetch_all(['vocab.json', 'merges.txt'], WITHOUT)
    snapshot.finish()
    return snapshot.folder()


def find_model(source, with_tokenizer):
    """-> the folder that SOURCE means"""
    if os.path.isdir(source):
        return source
    if os.path.exists(source):
        raise Problem('not a folder', source, 'give the folder that holds it')
    if not re.fullmatch(r'[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?', source, re.ASCII):
        raise Problem('no such folder', source, 'give a model folder or a name such as gpt2')
    return cached_model(source, with_tokenizer) or download_model(source, with_tokenizer)


# ---- 10. The command line ------------------------------------------------------------------------

class Arguments(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, 'convert_weights.py: %s, command line, try --help\n' % printable(message))


def parse_arguments(argv):
    parser = Arguments(prog='convert_weights.py', description='Turn a GPT-2 checkpoint into the '
                       'flat file that actpatch reads.')
    parser.add_argument('source', metavar='SOURCE', help='model folder, or a name such as gpt2: '
                        'looked for in the Hugging Face cache, else downloaded')
    parser.add_argument('-o', dest='out', metavar='OUT.bin', required=True, help='file to write')
    parser.add_argument('--dtype', choices=('f32', 'f16'), default='f32',
                        help='how matrices are stored (default f32; f16 halves the file)')
    parser.add_argument('--no-tokenizer', action='store_true', help='leave the tokenizer out')
    arguments = parser.parse_args(argv)
    if not arguments.source or not arguments.out:
        parser.error('SOURCE or OUT.bin is empty')
    return arguments


def main(argv=None):
    """-> exit status; every failure is one line on stderr"""
    arguments = parse_arguments(argv)
    try:
        with_tokenizer = not arguments.no_tokenizer
        folder = find_model(arguments.source, with_tokenizer)
        config = convert(folder, arguments.out, arguments.dtype, with_tokenizer)
        print(printable('%s: %d layers, %d heads, d_model %d, d_mlp %d, n_ctx %d, d_vocab %d, %s, '
                        '%d bytes' % (arguments.out, config.n_layer, config.n_head, config.d_model,
                                      config.d_mlp, config.n_ctx, config.d_vocab, arguments.dtype,
                                      os.path.getsize(arguments.out))))
        return 0
    except Problem as found:
        problem = found
    except OSError as error:
        problem = Problem(str(error.strerror or error), str(error.filename or arguments.out),
                          'check the path, its permissions and the free space')
    except MemoryError:
        problem = Problem('out of memory', arguments.source, 'check that its files are whole')
    except KeyboardInterrupt:
        problem = Problem('interrupted', arguments.source, 'run it again')
    line_start = '\r\x1b[K' if sys.stderr.isatty() else ''  # over what Progress left there
    sys.stderr.write('%sconvert_weights.py: %s\n' % (line_start, problem))
    return 1


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that partial files are removed
    sys.exit(main())
