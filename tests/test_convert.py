# SPDX-License-Identifier: MIT
"""convert_weights.py against files that safetensors, torch.save and transformers wrote.

The flat files are read here by a reader of the test's own, and their tensors compared with what
torch made of the same checkpoint (tests/make_convert_fixtures.py). The download is tried against a
server on the loopback interface."""

import contextlib
import copy
import hashlib
import http.server
import io
import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import unittest
import zipfile
import zlib
from unittest import mock

HERE = os.path.dirname(os.path.abspath(__file__))
FIXTURES = os.path.join(HERE, 'convert')
CONVERTER = os.path.join(os.path.dirname(HERE), 'convert_weights.py')
sys.path.insert(0, os.path.dirname(HERE))
import convert_weights  # noqa: E402  (it lies in the folder above)

with open(os.path.join(FIXTURES, 'expected.json'), encoding='utf-8') as _file:
    EXPECTED = json.load(_file)
FORMS = sorted(name for name in os.listdir(FIXTURES) if '-' in name)


# ---- A reader of the flat file -------------------------------------------------------------------

class Flat:
    """Reads a flat file and checks everything that the format promises; AssertionError if not."""

    def __init__(self, data):
        def check(condition, what):
            if not condition:
                raise AssertionError(what)
        self.data = data
        check(data[:12] == b'ACTPATCH' + struct.pack('<I', 1), 'magic and version')
        names = 'n_layer n_head d_model d_mlp n_ctx d_vocab act_fn'.split()
        self.head = dict(zip(names, struct.unpack_from('<7I', data, 12)))
        self.head['epsilon'], = struct.unpack_from('<d', data, 40)
        self.head['flags'], count = struct.unpack_from('<2I', data, 48)
        at, length, whole, table_crc, tokenizer_crc = struct.unpack_from('<3Q2I', data, 56)
        check(whole == len(data), 'file length')
        check(not any(data[88:124]), 'reserved bytes')
        check(struct.unpack_from('<I', data, 124)[0] == zlib.crc32(data[:124]), 'head crc')
        table = data[128:128 + 80 * count]
        check(len(table) == 80 * count and zlib.crc32(table) == table_crc, 'table crc')
        self.tokenizer = data[at:at + length]
        check(zlib.crc32(self.tokenizer) == tokenizer_crc, 'tokenizer crc')
        end = 128 + len(table)
        start = -(-end // 64) * 64
        check((at == start) if length else (at == 0 and tokenizer_crc == 0), 'tokenizer offset')
        check(not any(data[end:start]), 'gap before the tokenizer')
        end = start + length
        self.tensors = {}
        for row in range(count):
            name, dtype, rank, rows, cols, offset, crc, zero = struct.unpack_from(
                '<48s4IQ2I', table, 80 * row)
            name = name.rstrip(b'\0').decode()
            start = -(-end // 64) * 64
            check(offset == start and not any(data[end:start]), name + ' offset')
            end = start + rows * cols * (4, 2)[dtype]
            raw = data[start:end]
            check(zlib.crc32(raw) == crc and zero == 0, name + ' crc')
            check(rank in (1, 2) and (rank == 2 or cols == 1), name + ' shape')
            self.tensors[name] = ([rows, cols][:rank], dtype, raw)
        check(end == len(data), 'trailing bytes')

    def vocabulary(self):
        """-> (tokens, merges, eot)"""
        data = self.tokenizer
        count, merges, eot, zero = struct.unpack_from('<4I', data)
        tokens, at = [], 16
        for _ in range(count):
            length, = struct.unpack_from('<H', data, at)
            tokens.append(data[at + 2:at + 2 + length])
            at += 2 + length
        start = -(-at // 4) * 4
        if zero or any(data[at:start]) or start + 12 * merges != len(data):
            raise AssertionError('tokenizer section')
        return tokens, [list(m) for m in struct.iter_unpack('<3I', data[start:])], eot


def table_order(layers, tied):
    block = ('ln_1.weight ln_1.bias attn.c_attn.weight attn.c_attn.bias attn.c_proj.weight '
             'attn.c_proj.bias ln_2.weight ln_2.bias mlp.c_fc.weight mlp.c_fc.bias '
             'mlp.c_proj.weight mlp.c_proj.bias').split()
    return (['wte.weight', 'wpe.weight'] +
            ['h.%d.%s' % (layer, name) for layer in range(layers) for name in block] +
            ['ln_f.weight', 'ln_f.bias'] + ([] if tied else ['lm_head.weight']))


# ---- Common ground -------------------------------------------------------------------------------

class Case(unittest.TestCase):
    def setUp(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.scratch = scratch.name
        self.out = os.path.join(self.scratch, 'out.bin')

    def path(self, *names):
        return os.path.join(self.scratch, *names)

    def model(self, form='base-safetensors', tokenizer=()):
        """A copy of a fixture, free to be spoilt."""
        folder = tempfile.mkdtemp(dir=self.scratch)
        for name in os.listdir(os.path.join(FIXTURES, form)):
            shutil.copy(os.path.join(FIXTURES, form, name), folder)
        for name in tokenizer:
            shutil.copy(os.path.join(FIXTURES, 'tokenizer', name), folder)
        return folder

    def run_main(self, *argv):
        """-> (status, stdout, stderr), in this process; a traceback fails the test"""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = convert_weights.main(list(argv))
            except SystemExit as stop:
                status = stop.code
        return status, out.getvalue(), err.getvalue()

    def convert(self, source, *options):
        status, _, err = self.run_main(source, '-o', self.out, *options)
        self.assertEqual((status, err), (0, ''))
        with open(self.out, 'rb') as file:
            return file.read()

    def refused(self, source, *words, options=('--no-tokenizer',)):
        """The conversion fails with one line that holds `words`, and leaves nothing behind."""
        before = sorted(os.listdir(self.scratch))
        status, out, err = self.run_main(source, '-o', self.out, *options)
        self.assertEqual((status, out), (1, ''), err)
        self.assertRegex(err, r'\Aconvert_weights\.py: [^\n]+, [^\n]+, [^\n]+\n\Z')
        for word in words:
            self.assertIn(word, err)
        self.assertEqual(sorted(os.listdir(self.scratch)), before)
        return err

    def edit_json(self, path, **changes):
        with open(path, encoding='utf-8') as file:
            values = json.load(file)
        values.update(changes)
        with open(path, 'w', encoding='utf-8') as file:
            json.dump(values, file)


def write_safetensors(path, tensors):
    """tensors: {name: (dtype, shape, bytes)}"""
    header, data = {}, b''
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {'dtype': dtype, 'shape': shape,
                        'data_offsets': [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    with open(path, 'wb') as file:
        file.write(struct.pack('<Q', len(text)) + text + data)


def read_safetensors(path):
    with open(path, 'rb') as file:
        data = file.read()
    length, = struct.unpack_from('<Q', data)
    header = json.loads(data[8:8 + length].decode())
    header.pop('__metadata__', None)
    body = data[8 + length:]
    return {name: (entry['dtype'], entry['shape'], body[slice(*entry['data_offsets'])])
            for name, entry in header.items()}


# ---- Checkpoints ---------------------------------------------------------------------------------

class Checkpoints(Case):
    def check(self, flat, name, dtype):
        wanted = dict(EXPECTED[name])
        tensors = wanted.pop('tensors')
        self.assertEqual(flat.head, wanted)
        self.assertEqual(list(flat.tensors), table_order(wanted['n_layer'], name != 'untied'))
        self.assertEqual(set(flat.tensors), set(tensors))
        for key, (shape, f32, f16) in tensors.items():
            stored_shape, stored_dtype, raw = flat.tensors[key]
            half = dtype == 'f16' and len(shape) == 2
            self.assertEqual((stored_shape, stored_dtype), (shape, int(half)), key)
            self.assertEqual(hashlib.sha256(raw).hexdigest()[:32], f16 if half else f32, key)

    def test_every_form(self):
        """Each format, float type and naming gives the tensors that torch makes of it."""
        seen = {}
        for form in FORMS:
            for dtype in 'f32', 'f16':
                with self.subTest(form=form, dtype=dtype):
                    data = self.convert(os.path.join(FIXTURES, form), '--no-tokenizer',
                                        '--dtype', dtype)
                    name = form.split('-')[0]
                    self.check(Flat(data), name, dtype)
                    self.assertEqual(seen.setdefault((name, dtype), data), data)
        self.assertEqual(len(FORMS), 13)

    def test_pieces(self):
        """Tensors larger than a piece, whole, in rows and in columns, come out the same."""
        for form in 'base-safetensors', 'base-bin-strided':
            wanted = self.convert(os.path.join(FIXTURES, form), '--no-tokenizer')
            for piece in 1, 7, 40, 100:
                with self.subTest(form=form, piece=piece):
                    with mock.patch.multiple(convert_weights, PIECE=piece, STRIP=piece):
                        data = self.convert(os.path.join(FIXTURES, form), '--no-tokenizer')
                    self.assertEqual(data, wanted)

    def test_untied_flag(self):
        """lm_head.weight counts only where tie_word_embeddings is false, and is needed there."""
        folder = self.model('untied-safetensors')
        self.edit_json(os.path.join(folder, 'config.json'), tie_word_embeddings=True)
        self.assertNotIn('lm_head.weight', Flat(self.convert(folder, '--no-tokenizer')).tensors)
        folder = self.model()
        self.edit_json(os.path.join(folder, 'config.json'), tie_word_embeddings=False)
        self.refused(folder, 'lm_head.weight is missing')

    def test_config(self):
        """config.json: other names and defaults are understood, foreign models are refused."""
        folder = self.model()
        config = os.path.join(folder, 'config.json')
        with open(config, encoding='utf-8') as file:
            plain = file.read()
        for value, number in ('gelu_pytorch_tanh', 0), ('gelu', 1), ('relu', 2):
            self.edit_json(config, activation_function=value)
            flat = Flat(self.convert(folder, '--no-tokenizer'))
            self.assertEqual(flat.head['act_fn'], number)
        for changes, word in (
                ({'activation_function': 'silu'}, 'activation_function'),
                ({'model_type': 'llama'}, 'model_type'),
                ({'scale_attn_weights': False}, 'scale_attn_weights'),
                ({'add_cross_attention': True}, 'cross attention'),
                ({'n_head': 5}, 'not divisible'), ({'n_head': 0}, 'want 1..256'),
                ({'n_layer': 257}, 'want 1..256'), ({'n_layer': True}, 'n_layer'),
                ({'n_embd': '12'}, 'n_embd'), ({'vocab_size': 2 ** 40}, 'vocab_size'),
                ({'vocab_size': 281}, 'wte.weight'), ({'n_layer': 3}, 'h.2.ln_1.weight is missing'),
                ({'n_layer': 1}, 'h.1.'), ({'n_inner': None}, '[12, 48]'),
                ({'layer_norm_epsilon': 'x'}, 'layer_norm_epsilon'),
                ({'layer_norm_epsilon': float('nan')}, 'layer_norm_epsilon'),
                ({'tie_word_embeddings': 'no'}, 'tie_word_embeddings'),
                ({'scale_attn_by_inverse_layer_idx': 1}, 'scale_attn_by_inverse')):
            with self.subTest(changes=changes):
                with open(config, 'w', encoding='utf-8') as file:
                    file.write(plain)
                self.edit_json(config, **changes)
                self.refused(folder, word)
        for text, word in (('{', 'not JSON'), ('[]', 'not a JSON object'),
                           ('[' * 99999, 'not JSON'),
                           ('{"n_head": 3, "n_head": 4}', 'given twice'), ('\xff', 'not JSON')):
            with open(config, 'w', encoding='latin-1') as file:
                file.write(text)
            self.refused(folder, word)
        os.remove(config)
        self.refused(folder, 'no config.json')

    def test_tensors(self):
        """A tensor missing, unknown, given twice, of another shape or type is refused by name."""
        folder = self.model()
        path = os.path.join(folder, 'model.safetensors')
        good = read_safetensors(path)
        bias = 'transformer.h.0.ln_1.bias'
        dtype, shape, raw = good[bias]
        for change, words in (
                ({bias: None}, ['h.0.ln_1.bias is missing']),
                ({'transformer.h.0.extra': (dtype, shape, raw)}, ['h.0.extra', 'not part of']),
                ({'h.0.ln_1.bias': (dtype, shape, raw)}, ['given twice']),
                ({bias: (dtype, [6, 2], raw)}, ['[6, 2]', '[12]']),
                ({bias: ('I32', shape, raw)}, ['stored as I32']),
                ({bias: ('F8_E4M3', shape, raw[:12])}, ['stored as F8_E4M3']),
                ({bias: (dtype, [13], raw)}, ['do not hold']),
                ({bias: (dtype, [-12], raw)}, ['malformed']),
                ({bias: (dtype, [12.0], raw)}, ['malformed'])):
            with self.subTest(words=words):
                tensors = {**good, **change}
                write_safetensors(path, {k: v for k, v in tensors.items() if v is not None})
                self.refused(folder, folder, *words)
        self.assertFalse(os.path.exists(self.out))
        write_safetensors(path, {**good, 'transformer.h.1.attn.masked_bias': ('F32', [], b'\0' * 4),
                                 'transformer.h.1.attn.bias': ('U8', [1, 1, 2, 2], b'\0' * 4)})
        self.check(Flat(self.convert(folder, '--no-tokenizer')), 'base', 'f32')

    def test_values(self):
        """NaN and infinity pass through, half rounds to even, a finite overflow is an error."""
        folder = self.model()
        path = os.path.join(folder, 'model.safetensors')
        tensors = read_safetensors(path)
        name, nan = 'transformer.wpe.weight', float('nan')
        values = [1 + 2 ** -11, 1 + 3 * 2 ** -11, 65519.0, -65519.9, 2 ** -25, 2 ** -24 * 1.5,
                  float('inf'), -float('inf'), nan, -0.0]
        tensors[name] = ('F32', [8, 12], struct.pack('<96f', *(values + [0.5] * 86)))
        write_safetensors(path, tensors)
        half = Flat(self.convert(folder, '--no-tokenizer', '--dtype', 'f16'))
        raw = half.tensors['wpe.weight'][2]
        self.assertEqual(struct.unpack('<8H', raw[:16]),
                         (0x3c00, 0x3c02, 0x7bff, 0xfbff, 0, 2, 0x7c00, 0xfc00))
        self.assertEqual((raw[17] & 0x7e, raw[18:20]), (0x7e, b'\0\x80'))
        raw = Flat(self.convert(folder, '--no-tokenizer')).tensors['wpe.weight'][2]
        self.assertEqual(raw, tensors[name][2])
        for dtype, code, big, options in ('F32', 'f', 65520.0, ['--dtype', 'f16']), \
                                         ('F64', 'd', 1e39, []):
            tensors[name] = (dtype, [8, 12], struct.pack('<96' + code, big, *[0.5] * 95))
            write_safetensors(path, tensors)
            self.refused(folder, 'wpe.weight', 'too large', options=['--no-tokenizer', *options])

    def test_subnormal_and_bfloat16_bits(self):
        """Every 16-bit pattern of F16 and BF16 widens to exactly the float32 of the same value."""
        patterns = [i for i in range(65536) if (i & 0x7c00) != 0x7c00 or not i & 0x3ff]
        data = struct.pack('<%dH' % len(patterns), *patterns)
        wide = struct.unpack('<%df' % len(patterns), convert_weights.recode(data, 'F16', 'F32'))
        for bits, value in zip(patterns, wide):
            sign, power, fraction = bits >> 15, bits >> 10 & 31, bits & 1023
            size = (float('inf') if power == 31 else fraction * 2.0 ** -24 if power == 0
                    else (1024 + fraction) * 2.0 ** (power - 25))
            self.assertEqual(value, -size if sign else size)
        data = struct.pack('<65536H', *range(65536))
        wide = struct.unpack('<65536I', convert_weights.recode(data, 'BF16', 'F32'))
        self.assertEqual(wide, tuple(i << 16 for i in range(65536)))

    def test_shards(self):
        """A shard missing, an index that points elsewhere or places a tensor wrongly is refused."""
        for form, index in (('base-safetensors-shards', 'model.safetensors.index.json'),
                            ('base-bin-shards', 'pytorch_model.bin.index.json')):
            folder = self.model(form)
            path = os.path.join(folder, index)
            with open(path, encoding='utf-8') as file:
                placed = json.load(file)['weight_map']
            first = sorted(placed)[0]
            for change in '../' + placed[first], '/etc/passwd', '', '..', 5:
                self.edit_json(path, weight_map={**placed, first: change})
                self.refused(folder, 'weight_map', index)
            other = next(file for file in placed.values() if file != placed[first])
            self.edit_json(path, weight_map={**placed, first: other})
            self.refused(folder, first, other)
            self.edit_json(path, weight_map={**placed, 'ghost': other})
            self.refused(folder, 'ghost')
            self.edit_json(path, weight_map=placed)
            os.remove(os.path.join(folder, other))
            self.refused(folder, 'no weights')

    def test_safetensors_header(self):
        """A header that lies about lengths or offsets is refused."""
        folder = self.model()
        path = os.path.join(folder, 'model.safetensors')
        with open(path, 'rb') as file:
            good = file.read()
        length, = struct.unpack_from('<Q', good)
        header = json.loads(good[8:8 + length].decode())

        def packed(entries):
            text = json.dumps(entries).encode()
            return struct.pack('<Q', len(text)) + text + good[8 + length:]
        overlap, far = copy.deepcopy(header), copy.deepcopy(header)
        overlap['transformer.h.0.ln_1.bias']['data_offsets'] = \
            header['transformer.h.0.ln_1.weight']['data_offsets']
        far['transformer.h.0.ln_1.bias']['data_offsets'] = [2 ** 50, 2 ** 50 + 48]
        for data in (b'', good[:7], good[:8], good[:9], good[:-1], good + b'\0',
                     struct.pack('<Q', 0) + good[8:], struct.pack('<Q', 2 ** 63) + good[8:],
                     struct.pack('<Q', length + 1) + good[8:],
                     struct.pack('<Q', length - 1) + good[8:], packed(overlap), packed(far),
                     packed({**header, 'x': 5}), packed([]),
                     packed({**header, 'x': {'dtype': [], 'shape': 3, 'data_offsets': None}})):
            with open(path, 'wb') as file:
                file.write(data)
            self.refused(folder, path)

    def test_output(self):
        """The target is replaced only by a whole file, and never part of the model itself."""
        folder = self.model()
        with open(self.out, 'w') as file:
            file.write('before')
        path = os.path.join(folder, 'model.safetensors')
        with open(path, 'r+b') as file:
            file.truncate(20000)
        self.refused(folder, path)
        with open(self.out) as file:
            self.assertEqual(file.read(), 'before')
        with mock.patch.object(convert_weights, 'recode', side_effect=OSError(28, 'disk full')):
            self.refused(os.path.join(FIXTURES, 'base-bin'), 'disk full')
        with mock.patch.object(convert_weights, 'recode', side_effect=KeyboardInterrupt):
            self.refused(os.path.join(FIXTURES, 'base-bin'), 'interrupted')
        folder = self.model()
        for target in folder, os.path.join(folder, 'model.safetensors'), '/dev/null':
            status, _, err = self.run_main(folder, '-o', target, '--no-tokenizer')
            self.assertEqual(status, 1)
            self.assertIn('choose another name', err)
        status, _, err = self.run_main(folder, '-o', self.path('no', 'x'), '--no-tokenizer')
        self.assertEqual(status, 1)
        self.assertIn('No such file or directory', err)
        self.assertEqual(sorted(os.listdir(folder)), ['config.json', 'model.safetensors'])

    def test_usage(self):
        """Usage errors are one line with status 2; --help explains and succeeds."""
        for argv in [], ['x'], ['-o', 'x'], ['x', '-o', 'y', '--dtype', 'f8'], ['', '-o', 'y'], \
                    ['x', 'y', '-o', 'z'], ['x', '-o', 'y', '--what']:
            status, out, err = self.run_main(*argv)
            self.assertEqual((status, out), (2, ''))
            self.assertRegex(err, r'\Aconvert_weights\.py: [^\n]+, [^\n]+, [^\n]+\n\Z')
        status, out, _ = self.run_main('--help')
        self.assertEqual(status, 0)
        self.assertIn('--no-tokenizer', out)
        done = subprocess.run([sys.executable, CONVERTER, self.path('none'), '-o', self.out],
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.assertEqual((done.returncode, done.stdout, done.stderr.count(b'\n')), (1, b'', 1))


# ---- Pickles -------------------------------------------------------------------------------------

class Runs:
    """Pickled, this is a call of os.system: loading it would write the file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, ('echo ran > ' + self.path,)


class Pickles(Case):
    def zip_model(self, pickled):
        """base-bin with another data.pkl"""
        folder = self.model('base-bin')
        path = os.path.join(folder, 'pytorch_model.bin')
        with zipfile.ZipFile(path) as source:
            members = {info.filename: source.read(info) for info in source.infolist()}
        with zipfile.ZipFile(path, 'w') as target:
            for name, data in members.items():
                target.writestr(name, pickled if name.endswith('/data.pkl') else data)
        return folder

    def legacy_model(self, pickled):
        folder = self.model('base-bin-legacy')
        with open(os.path.join(folder, 'pytorch_model.bin'), 'wb') as file:
            for value in (0x1950a86a20f9469cfc6c, 1001, {'little_endian': True}):
                pickle.dump(value, file, protocol=2)
            file.write(pickled)
        return folder

    def test_a_pickle_that_would_run_a_command_is_refused(self):
        """No command runs, in either format and any protocol, at the top or beside weights."""
        ran = self.path('ran')
        for protocol in range(6):
            for value in Runs(ran), {'wte.weight': Runs(ran)}, [1, (Runs(ran),)]:
                pickled = pickle.dumps(value, protocol=protocol)
                for folder in self.zip_model(pickled), self.legacy_model(pickled):
                    err = self.refused(folder, 'pickle wants')
                    self.assertIn('do not trust this file', err)
        bare = self.model('base-bin')
        with open(os.path.join(bare, 'pytorch_model.bin'), 'wb') as file:
            pickle.dump(Runs(ran), file, protocol=2)
        self.refused(bare, 'posix.system')
        self.assertFalse(os.path.exists(ran))
        with contextlib.redirect_stdout(io.StringIO()):
            pickle.loads(pickle.dumps(Runs(ran)))      # it does run where it is loaded
        self.assertTrue(os.path.exists(ran))

    def test_only_tensors_are_built(self):
        """Names outside the list, calls of what is no function and odd arguments are refused."""
        rebuild = b'ctorch._utils\n_rebuild_tensor_v2\n'
        for body, word in (
                (b'cbuiltins\neval\n', 'builtins.eval'),
                (b'ctorch._utils\n_rebuild_tensor_v2.__globals__\n', 'pickle wants'),
                (b'ccollections\nnamedtuple\n', 'collections.namedtuple'),
                (b'X\6\0\0\0tensor)R', 'builds no tensor'),
                (b'ctorch\nFloatStorage\n)R', 'builds no tensor'),
                (rebuild + b')R', 'malformed'), (rebuild + b'(NNNNt R', 'malformed'),
                (rebuild + b'(NK\0))\x89Nt' + b'R', 'malformed'),
                (b'(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpu'
                 b'J\xff\xff\xff\xfftQ', 'malformed'),
                (b'(X\7\0\0\0storage(X\1\0\0\0XtX\1\0\0\x000X\3\0\0\0cpuK\1tQ', 'malformed'),
                (b'}))s', 'malformed'), (b'0', 'opcode POP'), (b'K\1', 'no table'),
                (b'}X\1\0\0\0aK\1s', 'not a tensor'), (b'h\5', 'malformed'), (b'R', 'malformed'),
                (b'q\1', 'malformed'), (b'u', 'malformed'), (b'', 'malformed'),
                (b'\x8d' + b'\xff' * 8, 'malformed'),
                (b'\x96' + b'\xff' * 7 + b'\x7f', 'malformed'),
                (b'r\xff\xff\xff\xff', 'malformed'), (b'Nr\xff\xff\xff\xff', 'no table')):
            with self.subTest(body=body):
                self.refused(self.zip_model(b'\x80\2' + body + b'.'), word)
        self.refused(self.zip_model(b'\x80\2}'), 'malformed')

    def test_zip64(self):
        """A zip whose members and directory use 64-bit fields reads the same."""
        wanted = self.convert(os.path.join(FIXTURES, 'base-bin'), '--no-tokenizer')
        folder = self.model('base-bin')
        path = os.path.join(folder, 'pytorch_model.bin')
        with zipfile.ZipFile(path) as source:
            members = {info.filename: source.read(info) for info in source.infolist()}
        with zipfile.ZipFile(path, 'w') as target:
            for name, data in members.items():
                with target.open(name, 'w', force_zip64=True) as file:
                    file.write(data)
        self.assertEqual(self.convert(folder, '--no-tokenizer'), wanted)
        # the smallest limit makes every offset and size too large for 32 bits
        with mock.patch.multiple(zipfile, ZIP64_LIMIT=10, ZIP_FILECOUNT_LIMIT=2):
            with zipfile.ZipFile(path, 'w') as target:
                for name, data in members.items():
                    target.writestr(name, data)
        with open(path, 'rb') as file:
            self.assertIn(b'PK\6\6', file.read())
        self.assertEqual(self.convert(folder, '--no-tokenizer'), wanted)

    def test_zip_members(self):
        """A member compressed, damaged, missing or cut is refused; absent checksums are allowed."""
        folder = self.model('base-bin')
        path = os.path.join(folder, 'pytorch_model.bin')
        wanted = self.convert(folder, '--no-tokenizer')
        with zipfile.ZipFile(path) as source:
            members = {info.filename: source.read(info) for info in source.infolist()}
            sums = [(info.CRC, info.filename) for info in source.infolist()]
        with open(path, 'rb') as file:
            good = file.read()

        def rewrite(changes, **options):
            with zipfile.ZipFile(path, 'w', **options) as target:
                for name, data in {**members, **changes}.items():
                    if data is not None:
                        target.writestr(name, data)
        root = next(name for name in members if name.endswith('data.pkl'))[:-len('data.pkl')]
        rewrite({}, compression=zipfile.ZIP_DEFLATED)
        self.refused(folder, 'compressed')
        rewrite({root + 'data/0': None})
        self.refused(folder, 'without ' + root + 'data/0')
        rewrite({root + 'data/0': b'1234'})
        self.refused(folder, 'storage 0 has 4 bytes')
        rewrite({root + 'byteorder': b'big'})
        self.refused(folder, 'little-endian')
        rewrite({root + 'data.pkl': None})
        self.refused(folder, 'data.pkl')
        with open(path, 'wb') as file:
            at = good.index(members[root + 'data/0']) + 100
            file.write(good[:at] + bytes([good[at] ^ 1]) + good[at + 1:])
        self.refused(folder, 'checksum')
        without = good                                # as torch writes where it computes no sums
        for crc, _ in sums:
            without = without.replace(struct.pack('<I', crc), b'\0\0\0\0')
        with open(path, 'wb') as file:
            file.write(without)
        self.assertEqual(self.convert(folder, '--no-tokenizer'), wanted)


# ---- Damage --------------------------------------------------------------------------------------

class Damage(Case):
    def outcomes(self, form, file_name, seed, rounds, tokenizer=()):
        """Spoils one file again and again. -> how many were refused; a traceback fails the test"""
        folder = self.model(form, tokenizer)
        path = os.path.join(folder, file_name)
        with open(path, 'rb') as file:
            good = file.read()
        luck, refused = random.Random(seed), 0
        options = () if tokenizer else ('--no-tokenizer',)
        for turn in range(rounds):
            bad = bytearray(good)
            if turn % 3 == 0:
                del bad[luck.randrange(len(bad)):]
            else:                 # the heads and directories at both ends are what matters most
                for _ in range(luck.choice((1, 1, 2, 8))):
                    at = luck.choice((luck.randrange(len(bad)), luck.randrange(min(3000, len(bad))),
                                      len(bad) - 1 - luck.randrange(min(3000, len(bad)))))
                    bad[at] = luck.choice((0, 255, bad[at] ^ 1 << luck.randrange(8),
                                           luck.randrange(256)))
            with open(path, 'wb') as file:
                file.write(bad)
            status, out, err = self.run_main(folder, '-o', self.out, *options)
            self.assertIn(status, (0, 1))
            if status == 0:
                with open(self.out, 'rb') as file:
                    Flat(file.read())
                os.remove(self.out)
            else:
                refused += 1
                self.assertRegex(err, r'\Aconvert_weights\.py: [^\n]+\n\Z')
                self.assertFalse(os.path.exists(self.out))
        return refused

    def test_weights(self):
        """Weight files cut or altered anywhere give a clean error, or a well-formed flat file."""
        for seed, (form, name) in enumerate((
                ('base-safetensors', 'model.safetensors'), ('base-bin', 'pytorch_model.bin'),
                ('base-bin-legacy', 'pytorch_model.bin'), ('base-bin-strided', 'pytorch_model.bin'),
                ('bf16-bin-legacy', 'pytorch_model.bin'),
                ('untied-safetensors', 'model.safetensors'))):
            with self.subTest(form=form):
                self.assertGreater(self.outcomes(form, name, seed, 90), 30)

    def test_json(self):
        """config.json, index and tokenizer files likewise."""
        for seed, (form, name, tokenizer) in enumerate((
                ('base-safetensors', 'config.json', ()),
                ('base-safetensors-shards', 'model.safetensors.index.json', ()),
                ('base-safetensors', 'tokenizer.json', ('tokenizer.json',)),
                ('base-safetensors', 'vocab.json', ('vocab.json', 'merges.txt')),
                ('base-safetensors', 'merges.txt', ('vocab.json', 'merges.txt')))):
            with self.subTest(name=name):
                self.assertGreater(self.outcomes(form, name, 100 + seed, 60, tokenizer), 10)


# ---- The tokenizer -------------------------------------------------------------------------------

class Tokenizers(Case):
    def setUp(self):
        super().setUp()
        self.folder = self.model(tokenizer=('tokenizer.json',))
        self.json = os.path.join(self.folder, 'tokenizer.json')
        with open(self.json, encoding='utf-8') as file:
            self.values = json.load(file)

    def write(self, change):
        """tokenizer.json with change(values) applied"""
        values = copy.deepcopy(self.values)
        change(values)
        with open(self.json, 'w', encoding='utf-8') as file:
            json.dump(values, file)

    def test_both_forms(self):
        """tokenizer.json, with merges as lists or strings, and vocab.json give the same section."""
        wanted = EXPECTED['tokenizer']
        both = ('vocab.json', 'merges.txt', 'added_tokens.json')
        first = self.convert(self.folder)
        tokens, merges, eot = Flat(first).vocabulary()
        self.assertEqual([token.hex() for token in tokens], wanted['tokens'])
        self.assertEqual((merges, eot), (wanted['merges'], wanted['eot']))
        self.assertEqual(tokens[eot], b'<|endoftext|>')
        self.write(lambda t: t['model'].update(merges=[' '.join(m) for m in t['model']['merges']]))
        self.assertEqual(self.convert(self.folder), first)
        self.assertEqual(self.convert(self.model(tokenizer=both)), first)
        self.write(lambda t: t['model'].pop('type'))        # as GPT-2's own file has it
        self.assertEqual(self.convert(self.folder), first)
        bare = Flat(self.convert(self.folder, '--no-tokenizer'))
        self.assertEqual(bare.tokenizer, b'')
        self.assertEqual(bare.tensors, Flat(first).tensors)

    def test_merges_that_look_like_comments(self):
        """The merge "# #" counts, the version line does not, CRLF is taken."""
        folder = self.model(tokenizer=('vocab.json', 'merges.txt'))
        self.edit_json(os.path.join(folder, 'vocab.json'), **{'##': 277})
        path = os.path.join(folder, 'merges.txt')
        with open(path, encoding='utf-8', newline='') as file:
            lines = file.read().split('\n')
        with open(path, 'w', encoding='utf-8', newline='') as file:
            file.write('\r\n'.join(lines[:1] + ['# #'] + lines[1:]))
        tokens, merges, _ = Flat(self.convert(folder)).vocabulary()
        self.assertEqual((tokens[277], tokens[276]), (b'##', b''))
        self.assertEqual(merges[0][2], 277)
        self.assertEqual(merges[1:], EXPECTED['tokenizer']['merges'])

    def test_foreign_tokenizers_are_refused(self):
        """Whatever is not GPT-2's byte-level BPE is refused rather than nearly followed."""
        def drop_byte_level(values):
            values['pre_tokenizer'] = {'type': 'Whitespace'}

        def two_steps(values):
            values['pre_tokenizer'] = {'type': 'Sequence', 'pretokenizers':
                                       [{'type': 'Digits'}, values['pre_tokenizer']]}
        for change in (drop_byte_level, two_steps,
                       lambda t: t.update(pre_tokenizer=None),
                       lambda t: t.update(normalizer={'type': 'NFC'}),
                       lambda t: t.update(model=[]),
                       lambda t: t['model'].update(type='WordPiece'),
                       lambda t: t['model'].update(ignore_merges=True),
                       lambda t: t['model'].update(end_of_word_suffix='</w>'),
                       lambda t: t['model'].update(vocab={'\u2581the': 0}, merges=[]),
                       lambda t: t['pre_tokenizer'].update(add_prefix_space=True),
                       lambda t: t['pre_tokenizer'].update(use_regex=False)):
            self.write(change)
            self.refused(self.folder, '--no-tokenizer', options=())
        for change in (lambda t: t['model']['merges'].append(['the', 'cat']),
                       lambda t: t['model']['merges'].append(['no such', 'a']),
                       lambda t: t['model']['merges'].append(t['model']['merges'][0]),
                       lambda t: t['model']['merges'].append('a b c'),
                       lambda t: t['model']['merges'].append(7),
                       lambda t: t['model'].update(merges=None),
                       lambda t: t['model'].update(vocab={}),
                       lambda t: t['model']['vocab'].update(the=280),
                       lambda t: t['model']['vocab'].update(the=1),
                       lambda t: t['model']['vocab'].update(the=-1),
                       lambda t: t['model']['vocab'].update(the=None),
                       lambda t: t['model']['vocab'].update({'': 279}),
                       lambda t: t['model']['vocab'].update({'a' * 65536: 279}),
                       lambda t: t['added_tokens'].append({'id': 279, 'content': '\ud800'}),
                       lambda t: t['added_tokens'].append({'id': 279}),
                       lambda t: t['added_tokens'].append({'content': 'x'}),
                       lambda t: t.update(added_tokens='x')):
            self.write(change)
            self.refused(self.folder, self.json, options=())
        self.write(lambda t: t.update(pre_tokenizer={
            'type': 'Sequence', 'pretokenizers': [t['pre_tokenizer']]}))
        self.convert(self.folder)

    def test_added_tokens_beyond_the_embedding_are_left_out(self):
        """An added token without an embedding is left out with a warning, others stay."""
        self.write(lambda t: t['added_tokens'].append({'id': 280, 'content': '[PAD]'}))
        status, _, err = self.run_main(self.folder, '-o', self.out)
        self.assertEqual((status, err.count('\n')), (0, 1))
        self.assertIn('warning', err)
        with open(self.out, 'rb') as file:
            self.assertEqual(len(Flat(file.read()).vocabulary()[0]), 276)

    def test_no_tokenizer_found(self):
        """Without a tokenizer the error names --no-tokenizer; without <|endoftext|> eot is none."""
        for have in (), ('vocab.json',), ('merges.txt',):
            self.refused(self.model(tokenizer=have), '--no-tokenizer', options=())

        def no_eot(values):
            del values['model']['vocab']['<|endoftext|>'], values['added_tokens'][0]
        self.write(no_eot)
        tokens, _, eot = Flat(self.convert(self.folder)).vocabulary()
        self.assertEqual((tokens[0], eot), (b'', 0xFFFFFFFF))


# ---- The cache and the hub -----------------------------------------------------------------------

COMMIT = '0123456789abcdef0123456789abcdef01234567'


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.files[path] as the hub or a content host would; server.tricks alter that."""

    def do_GET(self):
        self.server.requests.append((self.path, dict(self.headers)))
        trick = self.server.tricks.get(self.path.split('/')[-1], {})
        if 'redirect' in trick:
            return self.answer(302, b'', {'Location': trick['redirect'] + self.path,
                                          'X-Repo-Commit': COMMIT, **trick.get('headers', {})})
        needed = trick.get('token')
        if needed and self.headers.get('Authorization') != 'Bearer ' + needed:
            return self.answer(401, b'')
        if trick.get('status'):
            status, times = trick['status']
            trick['status'] = (status, times - 1) if times > 1 else None
            return self.answer(status, b'')
        if self.path not in self.server.files:
            return self.answer(404, b'Entry not found')
        body = self.server.files[self.path]
        headers = {'ETag': '"%s"' % hashlib.sha1(b'blob %d\0' % len(body) + body).hexdigest(),
                   'X-Repo-Commit': COMMIT, **trick.get('headers', {})}
        start = 0
        if 'Range' in self.headers and not trick.get('whole'):
            start = int(self.headers['Range'][len('bytes='):-1])
            if start >= len(body):
                return self.answer(416, b'', {'Content-Range': 'bytes */%d' % len(body)})
            headers['Content-Range'] = 'bytes %d-%d/%d' % (start, len(body) - 1, len(body))
        self.answer(206 if start else 200, body[start:], headers, trick.get('cut'))

    def answer(self, status, body, headers=(), cut=None):
        self.send_response(status)
        for key, value in {'Content-Length': str(len(body)), **dict(headers)}.items():
            if value is not None:
                self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body if cut is None else body[:cut])
        self.close_connection = True

    def log_message(self, *_):
        pass


class HubCase(Case):
    def serve(self):
        server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        server.files, server.tricks, server.requests = {}, {}, []
        thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01})
        thread.start()

        def stop():
            server.shutdown()
            server.server_close()
            thread.join()
        self.addCleanup(stop)
        return server

    def setUp(self):
        super().setUp()
        self.server = self.serve()
        self.base = 'http://127.0.0.1:%d' % self.server.server_port
        names = ('HF_', 'HUGGING', 'XDG_CACHE')
        kept = {key: value for key, value in os.environ.items()
                if not key.startswith(names) and not key.lower().endswith('_proxy')}
        for patch in (mock.patch.dict(os.environ, {
                **kept, 'HF_HOME': self.path('hf'), 'HF_ENDPOINT': self.base}, clear=True),
                      mock.patch.object(convert_weights, 'RETRY_PAUSE', 0)):
            patch.start()
            self.addCleanup(patch.stop)
        self.offer('gpt2', 'base-safetensors', ('tokenizer.json',))

    def offer(self, name, form, tokenizer):
        for part, files in ((form, os.listdir(os.path.join(FIXTURES, form))),
                            ('tokenizer', tokenizer)):
            for file_name in files:
                with open(os.path.join(FIXTURES, part, file_name), 'rb') as file:
                    self.server.files['/%s/resolve/main/%s' % (name, file_name)] = file.read()

    def weights(self, name='gpt2'):
        return self.server.files['/%s/resolve/main/model.safetensors' % name]

    def snapshot(self, name='models--gpt2'):
        return self.path('hf', 'hub', name, 'snapshots', COMMIT)

    def trick(self, name='model.safetensors', **trick):
        self.server.tricks[name] = trick

    def asked(self, server=None):
        return [path.split('/')[-1] for path, _ in (server or self.server).requests]

    def fails(self, *words, name='gpt2'):
        if os.path.exists(self.out):
            os.remove(self.out)
        status, out, err = self.run_main(name, '-o', self.out)
        self.assertEqual((status, out), (1, ''), err)
        self.assertRegex(err, r'\Aconvert_weights\.py: [^\n]+, [^\n]+, [^\n]+\n\Z')
        for word in words:
            self.assertIn(word, err)
        self.assertFalse(os.path.exists(self.out))


class Cache(HubCase):
    def place(self, folder, revision=COMMIT, reference=COMMIT, form='base-bin',
              tokenizer=('tokenizer.json',), cache=None):
        root = os.path.join(cache or self.path('hf', 'hub'), folder)
        os.makedirs(os.path.join(root, 'refs'))
        with open(os.path.join(root, 'refs', 'main'), 'w') as file:
            file.write(reference)
        os.makedirs(os.path.join(root, 'snapshots'))
        os.rename(self.model(form, tokenizer), os.path.join(root, 'snapshots', revision))

    def test_cached_models_need_no_network(self):
        """A cached model is found by either of its names, and nothing is asked of the hub."""
        os.environ['HF_ENDPOINT'] = 'http://127.0.0.1:1'
        wanted = self.convert(self.model(tokenizer=('tokenizer.json',)))
        self.place('models--openai-community--gpt2')
        self.place('models--distilgpt2')
        self.place('models--who--what')
        for name in ('gpt2', 'openai-community/gpt2', 'distilgpt2', 'distilbert/distilgpt2',
                     'who/what'):
            self.assertEqual(self.convert(name), wanted)

    def test_cache_places(self):
        """HF_HUB_CACHE comes before HF_HOME/hub, and that before XDG_CACHE_HOME/huggingface/hub."""
        self.place('models--gpt2-medium', cache=self.path('elsewhere'))
        os.environ['HF_HUB_CACHE'] = self.path('elsewhere')
        self.convert('gpt2-medium')
        del os.environ['HF_HUB_CACHE'], os.environ['HF_HOME']
        os.environ['XDG_CACHE_HOME'] = self.path('xdg')
        self.place('models--gpt2-large', cache=self.path('xdg', 'huggingface', 'hub'))
        self.convert('gpt2-large')
        self.assertEqual(self.server.requests, [])

    def test_incomplete_snapshots_are_not_used(self):
        """A snapshot without weights, without a shard, or without its tokenizer is fetched."""
        self.place('models--gpt2', tokenizer=())
        self.convert('gpt2', '--no-tokenizer')
        self.assertEqual(self.server.requests, [])
        self.convert('gpt2')
        self.assertIn('tokenizer.json', self.asked())
        self.place('models--gpt2-xl', reference='../../..')
        self.fails('gpt2-xl', name='gpt2-xl')

    def test_names(self):
        """What is neither a folder nor a model's name is an error before anything is asked."""
        for name in './gpt2', 'a/b/c', '/no/such', 'a b', '-x/y', 'a/../b', 'gpt2/':
            status, _, err = self.run_main('-o', self.out, '--', name)
            self.assertEqual(status, 1)
            self.assertIn('no such folder', err)
        status, _, err = self.run_main(CONVERTER, '-o', self.out)
        self.assertIn('not a folder', err)
        os.environ['HF_HUB_OFFLINE'] = '1'
        self.fails('HF_HUB_OFFLINE')
        self.assertEqual(self.server.requests, [])


class Download(HubCase):
    def test_download_fills_the_cache(self):
        """A download gives the folder's flat file, and the next run finds it in the cache."""
        wanted = self.convert(self.model(tokenizer=('tokenizer.json',)))
        self.assertEqual(self.convert('gpt2'), wanted)
        self.assertEqual(self.asked(), ['config.json', 'model.safetensors', 'tokenizer.json'])
        self.assertEqual(sorted(os.listdir(self.snapshot())),
                         ['config.json', 'model.safetensors', 'tokenizer.json'])
        with open(self.path('hf', 'hub', 'models--gpt2', 'refs', 'main')) as file:
            self.assertEqual(file.read(), COMMIT)
        self.assertEqual(self.convert('gpt2'), wanted)
        self.assertEqual(len(self.server.requests), 3)

    def test_other_files(self):
        """Shards, .bin and vocab.json are fetched where the model has no other, also by alias."""
        for form, tokenizer in (('base-safetensors-shards', ('tokenizer.json',)),
                                ('base-bin', ('vocab.json', 'merges.txt')),
                                ('base-bin-shards', ('tokenizer.json',))):
            name = 'openai-community/gpt2-xl' if form == 'base-bin' else 'us/' + form
            self.offer(name, form, tokenizer)
            self.convert('gpt2-xl' if form == 'base-bin' else name)
        self.server.files.pop('/gpt2/resolve/main/tokenizer.json')
        self.fails('no vocab.json', '--no-tokenizer')
        self.convert('gpt2', '--no-tokenizer')
        self.server.files['/empty/resolve/main/config.json'] = b'{}'
        self.fails('no model.safetensors', name='empty')

    def test_a_cut_connection_is_resumed(self):
        """What came before a cut is kept: in one run, and by the next run after giving up."""
        self.trick(cut=10000)
        self.assertEqual(self.convert('gpt2'),
                         self.convert(self.model(tokenizer=('tokenizer.json',))))
        ranges = [headers.get('Range') for path, headers in self.server.requests
                  if path.endswith('model.safetensors')]
        self.assertEqual(ranges, [None, 'bytes=10000-', 'bytes=20000-'])
        shutil.rmtree(self.path('hf'))
        with mock.patch.object(convert_weights, 'RETRIES', 1):
            self.fails('connection closed early', 'goes on where it stopped')
        partial = self.path('hf', 'hub', 'models--gpt2', 'model.safetensors.incomplete')
        self.assertEqual(os.path.getsize(partial), 10000)
        self.trick()
        del self.server.requests[:]
        self.convert('gpt2')
        self.assertEqual(self.server.requests[1][1].get('Range'), 'bytes=10000-')
        self.assertFalse(os.path.exists(partial))

    def test_partial_files(self):
        """A part that is whole, too long, of another file, or not resumable ends well."""
        partial = self.path('hf', 'hub', 'models--gpt2', 'model.safetensors.incomplete')
        good = self.weights()
        for data, trick in ((good, {}), (good + b'x', {}), (good[:99], {'whole': True})):
            shutil.rmtree(self.path('hf'), ignore_errors=True)
            os.makedirs(os.path.dirname(partial))
            with open(partial, 'wb') as file:
                file.write(data)
            self.trick(**trick)
            self.convert('gpt2')
        self.server.tricks.clear()
        shutil.rmtree(self.path('hf'))
        os.makedirs(os.path.dirname(partial))
        with open(partial, 'wb') as file:
            file.write(b'?' * 99)
        self.fails('wrong hash')
        self.convert('gpt2')

    def test_wrong_hash_is_refused(self):
        """A body that does not fit the SHA-256 or the git hash is removed and never converted."""
        sha = hashlib.sha256(self.weights()).hexdigest()
        for etag in sha[:-1] + '?', 'W/"%s"' % ('0' * 40), '"%s"' % ('0' * 64):
            self.trick(headers={'ETag': None, 'X-Linked-Etag': etag})
            self.fails('wrong hash', 'model.safetensors')
            self.assertEqual(os.listdir(self.snapshot()), ['config.json'])
            self.assertFalse(os.path.exists(self.path('hf', 'hub', 'models--gpt2', 'refs')))
        self.trick(headers={'X-Linked-Etag': '"%s"' % sha.upper(), 'ETag': '"%s"' % ('0' * 64)})
        self.convert('gpt2')

    def test_wrong_size_is_refused(self):
        """Sizes that contradict each other are refused, and so is a file without size or hash."""
        for size in len(self.weights()) - 1, len(self.weights()) + 1, 10 ** 30:
            self.trick(headers={'X-Linked-Size': str(size)})
            self.fails('wrong size', 'model.safetensors')
        self.trick(headers={'Content-Length': None, 'ETag': None})
        self.fails('neither size nor hash')
        self.trick(headers={'Content-Length': None})
        self.convert('gpt2')

    def test_status(self):
        """401, 403 and 404 each say what to do; a busy server is asked again, but not for ever."""
        self.trick('config.json', status=(401, 9))
        self.fails('401', 'HF_TOKEN')
        self.trick('config.json', status=(403, 9))
        self.fails('403', 'ask for access')
        self.trick('config.json', status=(418, 9))
        self.fails('418')
        self.server.tricks.clear()
        self.fails('404', 'check the name', name='us/none')
        self.assertFalse(os.path.exists(self.path('hf', 'hub', 'models--us--none')))
        self.trick('config.json', status=(503, 99))
        self.fails('503', 'download failed')
        self.trick('config.json', status=(503, 2))
        self.convert('gpt2')

    def test_no_server(self):
        """An endpoint that does not answer, or is none, is a clear error."""
        os.environ['HF_ENDPOINT'] = 'http://127.0.0.1:1'
        self.fails('download failed', 'refused')
        for endpoint in 'ftp://127.0.0.1', 'nonsense', 'http://[', 'http://x:y', 'http://':
            os.environ['HF_ENDPOINT'] = endpoint
            self.fails('HF_ENDPOINT')

    def test_token(self):
        """The token comes from HF_TOKEN, else HF_TOKEN_PATH, else HF_HOME/token."""
        self.trick('config.json', token='hf_secret')
        self.fails('401')
        os.makedirs(self.path('hf'), exist_ok=True)
        for place, variable in (('hf', None), ('at', 'HF_TOKEN_PATH')):
            path = self.path(place, 'token')
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, 'w') as file:
                file.write('hf_secret\n')
            if variable:
                os.environ[variable] = path
            self.convert('gpt2')
            shutil.rmtree(self.path('hf'))
        os.environ['HF_TOKEN'] = 'hf_other'
        self.fails('401')
        os.environ['HF_TOKEN'] = 'hf_se\ncret'
        self.fails('control characters')
        self.assertNotIn('cret', self.run_main('gpt2', '-o', self.out)[2])

    def test_token_stays_with_its_host(self):
        """The Authorization header never follows a redirect to another host or port."""
        other = self.serve()
        other.files = self.server.files
        os.environ['HF_TOKEN'] = 'hf_secret'
        sha = hashlib.sha256(self.weights()).hexdigest()
        linked = {'X-Linked-Etag': '"%s"' % sha, 'X-Linked-Size': str(len(self.weights()))}
        for host in '127.0.0.1:%d' % other.server_port, 'localhost:%d' % self.server.server_port:
            shutil.rmtree(self.path('hf'), ignore_errors=True)
            del self.server.requests[:]
            self.trick(redirect='http://%s/elsewhere' % host, headers=linked)
            path = '/elsewhere/gpt2/resolve/main/model.safetensors'
            self.server.files[path] = self.weights()
            if host.startswith('localhost'):   # the same server under another name
                self.server.tricks[path] = {}
                self.trick_once(path)
            self.convert('gpt2')
            asked = self.server.requests + other.requests
            sent = {path: headers.get('Authorization') for path, headers in asked}
            self.assertIsNone(sent[path])
            self.assertEqual(sent['/gpt2/resolve/main/model.safetensors'], 'Bearer hf_secret')

    def trick_once(self, path):
        """Let the redirect hold for every path but its own target."""
        trick = self.server.tricks.pop('model.safetensors')

        class Tricks(dict):
            def get(tricks, name, default=None):
                asked = self.server.requests[-1][0]
                return trick if name == 'model.safetensors' and asked != path else default
        self.server.tricks = Tricks()

    def test_redirects(self):
        """A redirect within the host keeps the token; loops and other schemes are refused."""
        os.environ['HF_TOKEN'] = 'hf_secret'
        self.trick('config.json', redirect='/x')
        self.server.files['/x/gpt2/resolve/main/config.json'] = \
            self.server.files['/gpt2/resolve/main/config.json']
        self.fails('redirects')
        self.assertEqual({headers.get('Authorization') for _, headers in self.server.requests},
                         {'Bearer hf_secret'})
        self.trick('config.json', redirect='file://')
        self.fails('something other than http')

    def test_hosts_redirected_to_are_checked_by_the_hubs_word(self):
        """Another host's body is held to the hash and size that the hub gave."""
        other = self.serve()
        other.files = {path: body[:-1] + b'?' for path, body in self.server.files.items()}
        sha = hashlib.sha256(self.weights()).hexdigest()
        self.trick(redirect='http://127.0.0.1:%d' % other.server_port,
                   headers={'X-Linked-Etag': '"%s"' % sha})
        self.fails('wrong hash')
        self.trick(redirect='http://127.0.0.1:%d' % other.server_port,
                   headers={'X-Linked-Size': '5'})
        self.fails('wrong size')

    def test_a_change_during_the_download_is_noticed(self):
        """Files of two revisions are never mixed."""
        self.trick('tokenizer.json', headers={'X-Repo-Commit': 'f' * 40})
        self.fails('changed during the download')


if __name__ == '__main__':
    unittest.main()
