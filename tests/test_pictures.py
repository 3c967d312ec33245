# SPDX-License-Identifier: MIT
"""The writers for people: pictures are parsed, their colours turned back into numbers and compared with the
table; so are tables on a terminal, whose columns are counted.

The C is driven through pictures_driver.c, which includes patch.c ($PATCH_SOURCE: another file), with
sanitizers where the compiler has them. Standard library only."""

import json
import math
import os
import random
import re
import shlex
import struct
import subprocess
import tempfile
import unittest
import xml.etree.ElementTree as ElementTree

TESTS = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(TESTS)
SOURCE = os.environ.get("PATCH_SOURCE", os.path.join(ROOT, "patch.c"))
SVG = "{http://www.w3.org/2000/svg}"
NAN = float("nan")

work = None
drivers = {}


def setUpModule():
    start()
    unittest.addModuleCleanup(stop)


def start():
    global work
    work = tempfile.TemporaryDirectory()


def stop():
    drivers.clear()
    work.cleanup()


def driver():
    """The driver's path; with sanitizers where such a program links and runs."""
    for kind, extra in (("sanitized", ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]),
                        ("plain", [])):
        if "any" in drivers:
            break
        path = os.path.join(work.name, "pictures-" + kind)
        done = subprocess.run(
            shlex.split(os.environ.get("CC", "cc")) +
            ["-O1", "-w", "-I", ROOT, "-DPATCH_SOURCE=\"%s\"" % SOURCE] + extra +
            [os.path.join(TESTS, "pictures_driver.c"), "-o", path, "-lm"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode == 0 and subprocess.run([path], stderr=subprocess.DEVNULL).returncode == 2:
            drivers["any"] = path
        elif kind == "plain":
            raise RuntimeError("pictures_driver.c does not compile:\n" + done.stdout.decode())
    return drivers["any"]


# ---- requests ------------------------------------------------------------------------------------------


def number(n):
    return struct.pack("=I", n)


def text(value):
    if value is None:
        return number(0xffffffff)
    value = value.encode("utf-8") if isinstance(value, str) else value
    return number(len(value)) + value


def doubles(values):
    return struct.pack("=%dd" % len(values), *values)


class Table:
    """A Table of patch.c. axes: (name, size) or (name, labels); values: flat, row-major."""

    def __init__(self, axes, values, tokens=None, name="resid_pre", command="patch", metric="logit_diff",
                 direction="denoising", normalized=True, baseline=None, spread=0.0, band=None):
        self.axes = [(axis, labels if isinstance(labels, int) else len(labels),
                      None if isinstance(labels, int) else labels) for axis, labels in axes]
        self.values, self.tokens, self.name, self.command = list(values), tokens, name, command
        self.metric, self.direction, self.normalized = metric, direction, normalized
        self.baseline, self.spread, self.band = baseline, spread, band
        assert len(self.values) == math.prod(size for _, size, _ in self.axes)

    def request(self):
        out = text(self.command) + text(self.name) + text(self.metric) + text(self.direction)
        out += number(self.normalized) + number(self.baseline is not None)
        out += doubles((self.baseline or (0.0, 0.0)) + (self.spread,)) + number(len(self.axes))
        for axis, size, labels in self.axes:
            out += text(axis) + number(size) + number(labels is not None)
            out += b"".join(text(label) for label in labels or [])
        out += number(0xffffffff if self.tokens is None else len(self.tokens))
        out += b"".join(text(token) for token in self.tokens or [])
        out += doubles(self.values) + number(self.band is not None)
        return out + doubles(self.band or [])


def ask(what, request):
    done = subprocess.run([driver(), what], input=request, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=100)
    if done.returncode != 0:
        raise AssertionError("driver %s: status %d: %s" % (what, done.returncode, done.stderr.decode()))
    return done.stdout


def svg(table):
    return ask("svg", table.request())


def screen(table, columns=80, colours=0):
    """The lines of a table on a terminal of so many columns (0: none) and colours."""
    out = ask("screen", table.request() + number(columns) + number(colours)).decode()
    assert out.endswith("\n")
    return out[:-1].split("\n")


# ---- the colour scale, written anew ----------------------------------------------------------------------

RDBU = "67001f b2182b d6604d f4a582 fddbc7 ffffff d1e5f0 92c5de 4393c3 2166ac 053061".split()
PURPLES = "fcfbfd efedf5 dadaeb bcbddc 9e9ac8 807dba 6a51a3 54278f 3f007d".split()
GREENS = "f7fcf5 e5f5e0 c7e9c0 a1d99b 74c476 41ab5d 238b45 006d2c 00441b".split()
REDS = "fff5f0 fee0d2 fcbba1 fc9272 fb6a4a ef3b2c cb181d a50f15 67000d".split()


def rgb(colour):
    return [int(colour.lstrip("#")[i:i + 2], 16) for i in (0, 2, 4)]


def invert(colour, stops, low, high):
    """The value of a colour: its projection onto the nearest segment between neighbouring stops."""
    point, best = rgb(colour), None
    for i in range(len(stops) - 1):
        a, b = rgb(stops[i]), rgb(stops[i + 1])
        step = [y - x for x, y in zip(a, b)]
        u = sum((p - x) * d for p, x, d in zip(point, a, step)) / sum(d * d for d in step)
        u = min(max(u, 0), 1)
        distance = sum((x + u * d - p) ** 2 for x, d, p in zip(a, step, point))
        if best is None or distance < best[0]:
            best = distance, low + (high - low) * (i + u) / (len(stops) - 1)
    assert best[0] < 3, "%s lies off the scale" % colour
    return best[1]


def largest(values):
    return max((abs(v) for v in values if math.isfinite(v)), default=0) or 1


def marks(picture):
    """[(tooltip, element)] of an SVG's cells and points, in the order of drawing."""
    root = ElementTree.fromstring(picture)
    return [(element.find(SVG + "title").text, element) for element in root.iter()
            if element.find(SVG + "title") is not None]


def texts(picture):
    return ["".join(element.itertext()) for element in ElementTree.fromstring(picture).iter(SVG + "text")]


def smooth(shape, seed=1):
    """Values of both signs, -0.4 .. 1, of that shape."""
    source = random.Random(seed)
    return [source.uniform(-0.4, 1) for _ in range(math.prod(shape))]


WORDS = ["<|endoftext|>", "When", " John", " and", " Mary", " went", " to", " the", " shop", ",", " John",
         " gave", " the", " bag", " to"]
HOSTILE = [b"</script><script>alert(1)</script>", b"\"'&<>", b"\x00\x01\x1f\x7f", b"\xff\xfe\xc3", b"\n\t\r\\",
           "\u2028\u2029\u202e\ufeff\ufffe".encode(), b"]]>", b"<!--", b"&amp;", "\u6771\u4eac".encode(),
           b"\xed\xa0\x80", b"x" * 300, b"", b" ", b"%s%n"]


class ColourScale(unittest.TestCase):
    def colours(self, table, values, kind=0):
        out = ask("scale", table.request() + number(kind) + number(len(values)) + doubles(values))
        return ["#" + line for line in out.decode().split()]

    def check(self, stops, table, low, high, kind=0):
        values = [low + (high - low) * i / 999 for i in range(1000)]
        for value, colour in zip(values, self.colours(table, values, kind)):
            back = invert(colour, stops, low, high)
            self.assertTrue(abs(back - value) <= (high - low) / (400 if stops is RDBU else 200), (value, colour, back))

    def test_every_colour_gives_its_value_back(self):
        """RdBu to 1/400 of the range, about 0 whatever the data; the paler scales to 1/200."""
        self.check(RDBU, Table([("layer", 1), ("pos", 3)], [0.5, -0.1, NAN]), -0.5, 0.5)
        self.check(RDBU, Table([("layer", 1), ("pos", 3)], [1, -3, 2]), -3, 3)
        self.check(RDBU, Table([("layer", 1), ("pos", 1)], [1], spread=2.0), -2, 2)

    def test_traces_go_from_low_upwards(self):
        """Purples, Greens and Reds: from the corrupted mean to the kind's own largest value."""
        trace = Table([("kind", ["resid", "mlp", "attn"]), ("pos", 1), ("layer", 2)],
                      [0.2, 0.9, 0.1, 0.5, 0.12, 0.3], command="trace", baseline=(0.9, 0.05))
        for kind, (stops, high) in enumerate([(PURPLES, 0.9), (GREENS, 0.5), (REDS, 0.3)]):
            self.check(stops, trace, 0.05, high, kind)

    def test_ends_middle_and_nan(self):
        table = Table([("layer", 1), ("pos", 1)], [2])
        inf = float("inf")
        self.assertEqual(self.colours(table, [0, -0.0, 2, 9, inf, -2, -inf, NAN, -NAN]),
                         ["#ffffff"] * 2 + ["#053061"] * 3 + ["#67001f"] * 2 + ["#bbbbbb"] * 2)

    def test_ranges_of_one_value_and_of_none(self):
        """All zero, all NaN, huge and tiny values: a scale all the same."""
        for values, one in (([0, 0], 1), ([NAN, float("inf")], 1), ([1e308, -1.7e308], 1.7e308), ([1e-320, 0], 1)):
            table = Table([("layer", 1), ("pos", 2)], values)
            self.assertEqual(self.colours(table, [0, one, -one]), ["#ffffff", "#053061", "#67001f"])
        trace = Table([("pos", 1), ("layer", 2)], [0.3, 0.3], command="trace", name="resid", baseline=(0.3, 0.3))
        self.assertEqual(self.colours(trace, [0.3, 5]), ["#fcfbfd", "#3f007d"])


class HeatMap(unittest.TestCase):
    def check(self, table, stops=RDBU):
        """Colours and tooltips agree with the values, every cell is there once; returns the marks."""
        picture = svg(table)
        found = marks(picture)
        self.assertEqual(len(found), len(table.values))
        high = table.spread or largest(table.values)
        got = sorted((invert(cell.get("fill"), stops, -high, high), title) for title, cell in found
                     if cell.get("fill") != "#bbbbbb")
        want = sorted(min(max(v, -high), high) for v in table.values if not math.isnan(v))
        self.assertEqual(len(got), len(want))
        for (value, title), expected in zip(got, want):
            self.assertTrue(abs(value - expected) <= high / 200, (title, value, expected))
        for title, cell in found:
            value = float(title.rsplit(": ", 1)[1])
            if math.isnan(value):
                self.assertEqual(cell.get("fill"), "#bbbbbb")
            else:
                back = invert(cell.get("fill"), stops, -high, high)
                self.assertTrue(abs(back - min(max(value, -high), high)) <= high / 150, (title, back))
        return found

    def test_layer_by_position(self):
        """The demo's picture: layer 0 on top, tokens along x, tooltips as `L9 " to"_14: 0.2541`."""
        values = smooth((12, 15))
        values[9 * 15 + 14] = 0.25414
        table = Table([("layer", 12), ("pos", 15)], values, tokens=WORDS)
        found = self.check(table)
        title, cell = found[9 * 15 + 14]
        self.assertEqual(title, 'L9 " to"_14: 0.2541')
        self.assertLess(float(found[0][1].get("y")), float(cell.get("y")))
        self.assertLess(float(found[0][1].get("x")), float(cell.get("x")))
        words = texts(svg(table))
        self.assertEqual(words[0], "resid_pre, logit_diff, denoising (clean into corrupted), normalized")
        for word in ("Layer", "Position", "11", " Mary_4", " to_14", "0.25"):
            self.assertIn(word, words)
        turned = [element for element in ElementTree.fromstring(svg(table)).iter(SVG + "text")
                  if "rotate(-90)" in element.get("transform", "")]
        self.assertIn(" John_2", ["".join(element.itertext()) for element in turned])

    def test_sizes(self):
        """1 x 1 to 48 x 60: every cell inside the picture, none on top of another."""
        for rows, columns in ((1, 1), (4, 5), (12, 15), (48, 60), (60, 1), (1, 60)):
            table = Table([("layer", rows), ("pos", columns)], smooth((rows, columns)))
            root = ElementTree.fromstring(svg(table))
            places = set()
            for _, cell in self.check(table):
                x, y, w, h = (float(cell.get(key)) for key in ("x", "y", "width", "height"))
                self.assertTrue(0 < x and x + w <= float(root.get("width")), (x, w))
                self.assertTrue(0 < y and y + h <= float(root.get("height")), (y, h))
                self.assertTrue(w >= 10 and h >= 11)
                places.add((x, y))
            self.assertEqual(len(places), rows * columns)

    def test_heads(self):
        found = self.check(Table([("layer", 12), ("head", ["H%d" % h for h in range(12)])], smooth((12, 12)),
                                 name="attn_head_out_all_pos"))
        self.assertTrue(found[9 * 12 + 6][0].startswith("L9 H6: "))

    def test_facets_have_the_papers_titles(self):
        for name, kinds, titles, axes in (
                ("block_every", ["resid_pre", "attn_out", "mlp_out"],
                 ["Residual Stream", "Attn Output", "MLP Output"], [("layer", 4), ("pos", 5)]),
                ("attn_head_all_pos_every", ["out", "q", "k", "v", "pattern"],
                 ["Output", "Query", "Key", "Value", "Pattern"], [("layer", 4), ("head", 4)])):
            shape = [len(kinds)] + [size for _, size in axes]
            table = Table([("kind", kinds)] + axes, smooth(shape), name=name, tokens=WORDS)
            self.check(table)
            words = texts(svg(table))
            self.assertEqual([word for word in words if word in titles], titles)

    def test_three_axes_are_rows_of_heads(self):
        """[layer, pos, head] and [layer, head, dest]: a row "L1H2" by position, and the right value in it."""
        for axes in ([("layer", 3), ("pos", 5), ("head", 4)], [("layer", 3), ("head", 4), ("dest", 5)]):
            values = [i / 100 for i in range(60)]
            table = Table(axes, values, tokens=WORDS)
            index = 1 * 20 + 3 * 4 + 2 if axes[1][0] == "pos" else 1 * 20 + 2 * 5 + 3
            found = self.check(table)
            self.assertEqual(found[index][0], 'L1 H2 " and"_3: %.4g' % values[index])
            place = {title.rsplit(":", 1)[0]: (float(cell.get("x")), float(cell.get("y"))) for title, cell in found}
            x, y = place['L1 H2 " and"_3']
            self.assertEqual(len({px for px, py in place.values() if py == y}), 5)
            self.assertEqual(len({py for px, py in place.values() if px == x}), 12)
            self.assertLess(place['L1 H1 " and"_3'][1], y)
            self.assertLess(place['L1 H2 " John"_2'][0], x)
            self.assertIn("L1H2", texts(svg(table)))

    def test_more_axes(self):
        """Examples, kinds and whole patterns: small panels, each named, nothing lost."""
        tokens = WORDS[:6]
        for axes in ([("example", 3), ("layer", 2), ("pos", 6)],
                     [("example", 2), ("kind", ["out", "q"]), ("layer", 2), ("pos", 3), ("head", 2)],
                     [("layer", 2), ("head", 3), ("dest", 6), ("src", 6)],
                     [("example", 2), ("head", ["L0H1", "L1H3"]), ("dest", 6), ("src", 6)],
                     [("example", 2), ("layer", 2), ("head", 2), ("dest", 3), ("src", 3)]):
            shape = [size if isinstance(size, int) else len(size) for _, size in axes]
            self.check(Table(axes, smooth(shape), tokens=tokens))
        self.assertIn("Example 1 L1H3", texts(svg(Table(
            [("example", 2), ("head", ["L0H1", "L1H3"]), ("dest", 6), ("src", 6)], smooth((2, 2, 6, 6))))))

    def test_nan_and_infinity(self):
        table = Table([("layer", 1), ("pos", 5)], [NAN, float("inf"), -float("inf"), 0.5, -0.25])
        titles = [title.rsplit(" ", 1)[1] for title, _ in self.check(table)]
        self.assertEqual(titles, ["nan", "inf", "-inf", "0.5", "-0.25"])

    def test_one_value_everywhere(self):
        for value in (0.0, 7.0, -3e-5, 1e300, NAN):
            self.check(Table([("layer", 2), ("pos", 3)], [value] * 6))

    def test_range(self):
        self.check(Table([("layer", 2), ("pos", 3)], smooth((2, 3)), spread=0.25))

    def test_no_cells(self):
        self.assertIn("no cells", texts(svg(Table([], [1.0]))))
        for axes in ([("layer", 0), ("pos", 5)], [("layer", 4), ("pos", 0)], [("kind", []), ("layer", 1)],
                     [("part", 0)]):
            table = Table(axes, [])
            self.assertEqual(marks(svg(table)), [])
            self.assertIn("no cells", texts(svg(table)))

    def test_traces(self):
        """A panel and a colour for each kind, tokens as rows with the subject starred."""
        labels = ["The_0*", " Space_1*", " is_2"]
        table = Table([("kind", ["resid", "mlp", "attn"]), ("pos", labels), ("layer", 4)],
                      [0.05 + 0.01 * i for i in range(36)], tokens=["The", " Space", " is"], command="trace",
                      name="trace", metric="prob", direction=None, normalized=False, baseline=(0.9, 0.05))
        found = marks(svg(table))
        for kind, (stops, high) in enumerate([(PURPLES, 0.16), (GREENS, 0.28), (REDS, 0.4)]):
            for i in range(12):
                title, cell = found[kind * 12 + i]
                back = invert(cell.get("fill"), stops, 0.05, high)
                self.assertTrue(abs(back - table.values[kind * 12 + i]) < 0.005, (title, back))
        self.assertEqual(found[12][0], 'MLP Output "The"_0* L0: 0.17')
        self.assertIn("The_0*", texts(svg(table)))


class Text(unittest.TestCase):
    def shown(self, token):
        """The token as a tooltip shows it."""
        title = marks(svg(Table([("layer", 1), ("pos", 1)], [1], tokens=[token])))[0][0]
        return re.match(r'L0 "(.*)"_0: 1$', title, re.S).group(1)

    def test_hostile_tokens_stay_text(self):
        """No markup, no control byte and no invalid UTF-8 gets out; what is shown tells the bytes."""
        for token in HOSTILE:
            self.shown(token)
        picture = svg(Table([("layer", 2), ("pos", len(HOSTILE))], smooth((2, len(HOSTILE))), tokens=HOSTILE))
        picture.decode("utf-8")
        for bad in (b"<script", b"<!--", b"]]>"):
            self.assertNotIn(bad, picture)
        self.assertFalse(re.search(rb"[\x00-\x09\x0b-\x1f\x7f]", picture))
        self.assertFalse(re.search("[\u2028\u2029\u202e\ufeff\ufffe]", picture.decode()))

    def test_escapes_as_the_tokens_command_has_them(self):
        for token, want in ((b"</script>", "</script>"), (b"\"'&", "\"'&"), (b"\n\t\r\\", r"\n\t\r\\"),
                            (b"\x00\x1f\x7f", r"\x00\x1F\x7F"), (b"\xff\xc3", r"\xFF\xC3"),
                            (b"\xed\xa0\x80", r"\xED\xA0\x80"), (b"\xc0\xaf", r"\xC0\xAF"),
                            ("\u202e".encode(), r"\xE2\x80\xAE"), ("\x85".encode(), r"\xC2\x85"),
                            ("\u6771\u4eac\U0001f600".encode(), "\u6771\u4eac\U0001f600"), (b"x" * 300, "x" * 300)):
            self.assertEqual(self.shown(token), want)

    def test_long_labels_are_cut(self):
        """300 characters: whole in the tooltip, cut beside the axis, and the picture stays small."""
        picture = svg(Table([("layer", 2), ("pos", 2)], smooth((2, 2)), tokens=["a" * 300, "\u6771" * 100]))
        labels = [word for word in texts(picture) if "\u2026" in word]
        self.assertEqual(labels, ["a" * 24 + "\u2026_0", "\u6771" * 12 + "\u2026_1"])
        self.assertLess(float(ElementTree.fromstring(picture).get("height")), 400)

    def test_nothing_from_elsewhere(self):
        """No reference to any other file."""
        picture = svg(Table([("layer", 2), ("pos", 2)], smooth((2, 2)))).decode()
        self.assertEqual(re.findall(r"https?://[^'\" ]*", picture), ["http://www.w3.org/2000/svg"])
        self.assertFalse(re.search(r"href|url\(|@import|<script", picture))


class LinePlot(unittest.TestCase):
    LABELS = [label for layer in range(12) for label in ("%d_pre" % layer, "%d_mid" % layer)] + ["final_post"]

    def test_points(self):
        """Points stand in proportion to their values, labels below them; NaN interrupts the line."""
        values = smooth((25,))
        values[7] = NAN
        table = Table([("part", self.LABELS)], values, name="accumulated", command="lens", direction=None)
        found = marks(svg(table))
        self.assertEqual([title for title, _ in found],
                         ["%s: %.4g" % pair for pair in zip(self.LABELS, values) if not math.isnan(pair[1])])
        points = [(float(title.rsplit(" ", 1)[1]), float(mark.get("cy"))) for title, mark in found]
        (v0, y0), (v1, y1) = min(points), max(points)
        for v, y in points:
            self.assertTrue(abs(y - (y0 + (v - v0) * (y1 - y0) / (v1 - v0))) < 0.1, (v, y))
        self.assertLess(y1, y0)
        words = texts(svg(table))
        for label in self.LABELS:
            self.assertIn(label, words)
        lines = [path for path in ElementTree.fromstring(svg(table)).iter(SVG + "path")
                 if "L" in path.get("d")]
        self.assertEqual(len(lines), 22)

    def test_examples_and_odd_values(self):
        self.assertEqual(len(marks(svg(Table([("example", 3), ("part", self.LABELS)], smooth((3, 25)))))), 75)
        for values in ([1.0], [5.0, 5.0], [NAN, NAN], [1e308, -1e308], [0.0, 5e-324]):
            found = marks(svg(Table([("part", len(values))], values)))
            self.assertEqual(len(found), sum(not math.isnan(v) for v in values))

    def test_groups_are_lines(self):
        """An axis named group: a line for each, named beside the panels."""
        groups = ["first subject token", "last subject token", "last token"]
        table = Table([("kind", ["resid", "mlp", "attn"]), ("group", groups), ("layer", 6)], smooth((3, 3, 6)),
                      command="trace", name="averages", direction=None, normalized=False)
        self.assertEqual(len(marks(svg(table))), 54)
        for group in groups:
            self.assertIn(group, texts(svg(table)))

    def test_bands(self):
        """A band lies around each line, as wide as the table says; the scale reaches its edges."""
        values, band = smooth((2, 6)), [0.1 * (i % 4) for i in range(12)]
        values[2], band[9] = NAN, NAN
        table = Table([("group", ["first_subject", "last"]), ("layer", 6)], values, command="trace",
                      name="averages", direction=None, band=band)
        root = ElementTree.fromstring(svg(table))
        bands = [path for path in root.iter(SVG + "path") if path.get("fill-opacity")]
        points = {title.rsplit(":", 1)[0]: float(mark.get("cy")) for title, mark in marks(svg(table))}
        corners = [[tuple(map(float, corner.split())) for corner in path.get("d")[1:-1].split("L")]
                   for path in bands]
        self.assertEqual([len(corner) for corner in corners], [4, 6, 6, 4])
        frame = next(path for path in root.iter(SVG + "path") if path.get("stroke-opacity") == ".6").get("d")
        top = float(frame.split("h")[0].split()[1])
        for corner in corners:
            half = len(corner) // 2
            for (x, upper), (below, lower) in zip(corner[:half], reversed(corner[half:])):
                self.assertEqual(x, below)
                self.assertTrue(top < upper <= lower < top + 242, (upper, lower))
        (_, upper), (_, lower) = corners[0][1], corners[0][2]
        self.assertTrue(abs((upper + lower) / 2 - points["first_subject L1"]) < 0.01)
        scale = (points["first_subject L0"] - points["first_subject L1"]) / (values[1] - values[0])
        self.assertTrue(abs((lower - upper) - 2 * band[1] * scale) < 0.01)
        for odd in ([NAN] * 6, [1e308] * 6, [float("inf")] * 6, [0.0] * 6):
            for line in ([0.5] * 6, [1e308] * 6, [NAN] * 6):
                picture = svg(Table([("group", ["last"]), ("layer", 6)], line, command="trace", band=odd))
                self.assertFalse(re.search(rb"[ML' ](nan|-?inf)\b[^<]*d=", picture))
                self.assertNotIn(b"nan' ", picture)

    def test_lens_heads_are_a_heat_map(self):
        """L0H0 .. and a remainder: layers by heads, the remainder in the title."""
        labels = ["L%dH%d" % (layer, head) for layer in range(3) for head in range(4)] + ["remainder"]
        table = Table([("part", labels)], [i / 12 for i in range(12)] + [0.125], name="heads", command="lens",
                      direction=None)
        found = marks(svg(table))
        self.assertEqual(len(found), 12)
        self.assertEqual(found[6][0], "L1 H2: 0.5")
        self.assertIn("remainder 0.125", texts(svg(table))[0])


class Terminal(unittest.TestCase):
    SGR = re.compile(r"\x1b\[[0-9;]*m")
    CELL = re.compile(r"\x1b\[48;2;(\d+);(\d+);(\d+);38;5;(?:16|231)m([^\x1b]*)\x1b\[0m")

    def plain(self, lines):
        return [self.SGR.sub("", line) for line in lines]

    def test_widths(self):
        """80 columns, 20 columns, 1 column: no row is wider than the screen if a cell fits at all."""
        tokens = ["<|endoftext|>", "a" * 300, "\u6771" * 100, "x\u0301", "\n"]
        for axes in ([("layer", 12), ("pos", 5)], [("layer", 2), ("pos", 5), ("head", 60)], [("pos", 5)],
                     [("layer", 2), ("head", 3), ("dest", 5), ("src", 5)], [("layer", 48), ("head", 48)]):
            table = Table(axes, smooth([size for _, size in axes]), tokens=tokens)
            for columns in (200, 80, 20):
                for colours in (0, 256, 1 << 24):
                    for line in self.plain(screen(table, columns, colours))[1:]:
                        if line.startswith(("red ", "layer ")): # below and above panels: may wrap
                            continue
                        width = sum(0 if c == "\u0301" else 2 if c == "\u6771" else 1 for c in line)
                        self.assertLessEqual(width, columns, (axes, line))
            for columns in (1, 2, 3, 7, 0):
                self.assertGreater(len(screen(table, columns, 256)), 2)

    def test_colours(self):
        """Each cell has the picture's colour of its value, and its value."""
        values = smooth((3, 4))
        cells = self.CELL.findall("\n".join(screen(Table([("layer", 3), ("head", 4)], values), 80, 1 << 24)))
        self.assertEqual(len(cells), 12)
        high = largest(values)
        for (r, g, b, shown), value in zip(cells, values):
            back = invert("%02x%02x%02x" % (int(r), int(g), int(b)), RDBU, -high, high)
            self.assertTrue(abs(back - value) < high / 200, (back, value))
            self.assertEqual(shown.strip(), "%.2f" % value)

    def test_traces(self):
        """Kind after kind in its own colours from the corrupted mean upwards, the subject starred."""
        labels = ["The*", " Space*", " is"]
        for layers in (4, 40):
            values = [0.05 + 0.01 * i for i in range(9 * layers)]
            table = Table([("kind", ["resid", "mlp", "attn"]), ("pos", labels), ("layer", layers)], values,
                          command="trace", name="trace", metric="prob", direction=None, normalized=False,
                          baseline=(0.9, 0.05))
            lines = screen(table, 80, 1 << 24)
            cells = self.CELL.findall("\n".join(lines))
            self.assertEqual(len(cells), len(values))
            for i, (r, g, b, _) in enumerate(cells):
                kind = i // (3 * layers)
                high = values[3 * layers * (kind + 1) - 1]
                back = invert("%02x%02x%02x" % (int(r), int(g), int(b)), (PURPLES, GREENS, REDS)[kind], 0.05, high)
                self.assertTrue(abs(back - values[i]) < (high - 0.05) / 100, (i, back))
            words = self.plain(lines)
            self.assertEqual(sum(line.startswith("The*") for line in words), 3)
            self.assertEqual([line for line in words if line.startswith("kind")],
                             ["kind resid", "kind mlp", "kind attn"])
            self.assertEqual([line for line in words if line.startswith("pale 0.05, dark ")] != [], layers == 40)

    def test_odd_values(self):
        """One value everywhere, NaN, infinities, no cells: a line for each row, or a line that says so."""
        for value in (0.0, 7.0, -3e-5, 1e300, NAN, float("inf"), -float("inf"), 5e-324):
            for columns, colours in ((80, 256), (20, 0), (0, 0)):
                self.assertGreaterEqual(len(screen(Table([("layer", 2), ("pos", 3)], [value] * 6), columns, colours)), 5)
        for axes in ([("layer", 0), ("pos", 5)], [("layer", 4), ("pos", 0)], [("kind", []), ("layer", 1)],
                     [("part", 0)], [("example", 0), ("layer", 2), ("pos", 2)]):
            for columns in (0, 20, 80):
                self.assertEqual(screen(Table(axes, []), columns, 256), ["resid_pre: no cells"])


class Machines(unittest.TestCase):
    def test_tokens_with_a_nul(self):
        """A NUL does not end a label: pictures and the terminal show it escaped, JSON holds it."""
        table = Table([("layer", 1), ("pos", 2)], [1, 2], tokens=[b"a\x00b", b"\x00"])
        self.assertIn(r'L0 "a\x00b"_0: 1', [title for title, _ in marks(svg(table))])
        self.assertTrue(any(line.startswith(r"a\x00b_0 ") for line in screen(table)))
        self.assertEqual(json.loads(ask("json", table.request()))["labels"]["pos"], ["a\0b_0", "\0_1"])
        self.assertEqual(ask("csv", table.request()).split(b"\n")[1], b"resid_pre,0,0,a\0b,1")

    def test_no_cells(self):
        for axes in ([("layer", 0), ("pos", 5)], [("kind", []), ("layer", 1)], [("part", 0)]):
            read = json.loads(ask("json", Table(axes, []).request()))
            self.assertEqual((read["values"], len(read["labels"][axes[0][0]])), ([], 0))
            self.assertEqual(ask("csv", Table(axes, []).request()).count(b"\n"), 1)

    def test_odd_values_in_json(self):
        table = Table([("pos", 4)], [NAN, float("inf"), 1e300, 5e-324], baseline=(NAN, 1.0))
        read = json.loads(ask("json", table.request()))
        self.assertEqual(read["values"], [None, None, 1e300, 5e-324])
        self.assertIsNone(read["clean"])


if __name__ == "__main__":
    unittest.main()
