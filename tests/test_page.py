# SPDX-License-Identifier: MIT
"""The HTML page in a real browser: headless Chromium, driven through ChromeDriver (Debian's chromium and
chromium-driver; $CHROMEDRIVER and $CHROMIUM name others). Skipped by name where they are not installed.

Standard library only: the WebDriver protocol is JSON over HTTP on the loopback interface. With
$PAGE_SHOTS, a folder, screenshots at 800 and 1600 pixels, light and dark, are left there."""

import base64
import html.parser
import json
import math
import os
import random
import re
import shutil
import subprocess
import tempfile
import time
import unittest
import urllib.error
import urllib.request

import test_pictures as pictures
from test_pictures import HOSTILE, WORDS, Table, ask, doubles, number, smooth, text

CHROMEDRIVER = os.environ.get("CHROMEDRIVER") or shutil.which("chromedriver") or ""
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or ""
SHOTS = os.environ.get("PAGE_SHOTS")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]


def setUpModule():
    pictures.start()
    unittest.addModuleCleanup(pictures.stop)


def pattern(source, n):
    """A causal attention pattern like a real head's: much on the first token or on one offset."""
    first, offset, values = source.uniform(0, 4), source.randrange(1, 4), []
    for d in range(n):
        row = [math.exp(source.gauss(0, 1) + first * (s == 0) + 3 * (s == d - offset)) for s in range(d + 1)]
        values += [w / sum(row) for w in row] + [0.0] * (n - 1 - d)
    return values


class Page:
    """A Page of patch.c. differences: (clean, corrupted) a prompt; attention: [prompt][head] patterns."""

    def __init__(self, tables=(), tokens=(), heads=(), attention=(), differences=(), prompts=(), title="IOI",
                 settings='{"a":1}', prose=()):
        self.tables, self.tokens, self.heads, self.attention = tables, tokens, heads, attention
        self.differences, self.prompts, self.title = differences, prompts, title
        self.settings, self.prose = settings, prose

    def html(self):
        out = text(self.title) + text(self.settings) + number(len(self.prose))
        out += b"".join(text(paragraph) for paragraph in self.prose)
        out += number(len(self.tables)) + b"".join(table.request() for table in self.tables)
        out += number(len(self.differences)) + b"".join(text(prompt) for prompt in self.prompts)
        out += number(1) + doubles([value for pair in self.differences for value in pair])
        out += number(len(self.tokens)) + number(len(self.heads))
        out += number(len(self.tokens[0]) if self.tokens else 0) + b"".join(text(head) for head in self.heads)
        out += b"".join(text(token) for line in self.tokens for token in line)
        return ask("html", out + doubles([w for prompt in self.attention for head in prompt for w in head]))


def demo(prompts=8, layers=12, heads=12, words=WORDS + ["."], seed=5):
    """The notebook's size: eight prompts, 144 heads, 16 tokens, the usual figures."""
    source = random.Random(seed)
    names = ["L%dH%d" % (layer, head) for layer in range(layers) for head in range(heads)]
    n = len(words)
    blocks = Table([("kind", ["resid_pre", "attn_out", "mlp_out"]), ("layer", layers), ("pos", n)],
                   smooth((3, layers, n)), tokens=words, name="block_every")
    each = Table([("layer", layers), ("head", heads)], smooth((layers, heads)), name="attn_head_out_all_pos")
    return Page([Table([("layer", layers), ("pos", n)], smooth((layers, n)), tokens=words), blocks, each],
                [words] * prompts, names, [[pattern(source, n) for _ in names] for _ in range(prompts)],
                [(3.5 - i / 3, -3 + i / 4) for i in range(prompts)], ["".join(map(str, words[1:]))] * prompts,
                "Indirect object identification",
                '{"model":"gpt2","sweeps":["resid_pre","block_every"],"metric":"logit_diff","bos":true}',
                ["Clean activations are put into the corrupted run; 1 is the clean run's logit difference."])


class Browser:
    """One headless Chromium; every call is one of the WebDriver protocol's."""

    def __init__(self):
        self.profile = tempfile.TemporaryDirectory()
        self.driver = subprocess.Popen([CHROMEDRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for line in self.driver.stdout:
            port = re.search(rb"started successfully on port (\d+)", line)
            if port:
                break
        self.base = "http://127.0.0.1:%d/session" % int(port.group(1))
        self.session = ""
        options = {"binary": CHROMIUM, "args": FLAGS + ["--user-data-dir=" + self.profile.name]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        self.session = "/" + self.call("", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def call(self, path, body=None, method=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + self.session + path, data, method=method,
                                         headers={"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read())["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from None

    def close(self):
        try:
            self.call("", method="DELETE")
        finally:
            self.driver.terminate()
            self.driver.wait()
            self.driver.stdout.close()
            self.profile.cleanup()

    def script(self, code, *words):
        return self.call("/execute/sync", {"script": code, "args": list(words)})

    def devtools(self, command, **words):
        return self.call("/goog/cdp/execute", {"cmd": command, "params": words})

    def size(self, width, height=1000):
        self.devtools("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                      mobile=False)

    def scheme(self, value):
        self.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": value}])

    def find(self, css, index=0):
        """The element as the protocol names it, scrolled to where a mouse can reach it."""
        return self.script("const e = document.querySelectorAll(arguments[0])[arguments[1]];"
                           "e.scrollIntoView({block: 'center'}); return e;", css, index)

    def mouse(self, css, index=0, click=False):
        """Move the mouse onto an element, and press its button where asked."""
        actions = [{"type": "pointerMove", "origin": self.find(css, index), "x": 0, "y": 0, "duration": 0}]
        if click:
            actions += [{"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}]
        self.call("/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": actions}]})

    def key(self, code):
        self.call("/actions", {"actions": [{"type": "key", "id": "keys", "actions": [
            {"type": "keyDown", "value": code}, {"type": "keyUp", "value": code}]}]})

    def text(self, css, index=0):
        return self.script("return document.querySelectorAll(arguments[0])[arguments[1]].textContent", css, index)

    def count(self, css):
        return self.script("return document.querySelectorAll(arguments[0]).length", css)

    def shot(self, name):
        if SHOTS:
            height = self.script("return document.documentElement.scrollHeight")
            width = self.script("return innerWidth")
            picture = self.devtools("Page.captureScreenshot", captureBeyondViewport=True, clip={
                "x": 0, "y": 0, "width": width, "height": min(height, 4000), "scale": 1})
            with open(os.path.join(SHOTS, name + ".png"), "wb") as f:
                f.write(base64.b64decode(picture["data"]))

    def logs(self):
        """Console messages, and the URLs that were asked for, since the last call."""
        messages = [entry["message"] for entry in self.call("/se/log", {"type": "browser"})]
        events = [json.loads(entry["message"])["message"] for entry in self.call("/se/log", {"type": "performance"})]
        return messages, [event["params"]["request"]["url"] for event in events
                          if event["method"] == "Network.requestWillBeSent"]


@unittest.skipUnless(CHROMEDRIVER and CHROMIUM, "no chromium and chromedriver (apt-get install chromium-driver)")
class InTheBrowser(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.browser = Browser()
        cls.addClassCleanup(cls.browser.close)
        cls.folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.folder.cleanup)

    def open(self, page, name="page"):
        path = os.path.join(self.folder.name, name + ".html")
        with open(path, "wb") as f:
            f.write(page.html())
        self.browser.size(1600)
        self.browser.logs()
        self.browser.call("/url", {"url": "file://" + path})
        return path

    def check_quiet(self, path):
        """No message on the console, and no request but for the page itself (and its empty icon)."""
        messages, urls = self.browser.logs()
        self.assertEqual(messages, [])
        self.assertEqual([url for url in urls if url != "data:,"], ["file://" + path])

    def test_hover_click_keys_and_prompts(self):
        """The viewer: enlarge by click, follow by mouse and keys, keep by click, change the prompt."""
        page, browser = demo(prompts=2, layers=3, heads=4), self.browser
        path = self.open(page)
        weights = page.attention[0][6]
        n = len(page.tokens[0])
        self.assertEqual(browser.count(".prompt:not([hidden]) .heads svg"), 12)
        self.assertEqual(browser.text("#view h3"), "L0H0")
        browser.mouse(".heads button", 6, click=True)
        self.assertEqual(browser.text("#view h3"), "L1H2")

        browser.mouse("#view .tokens button", 5)
        chips = browser.script(
            "return Array.from(document.querySelectorAll('#view .tokens small'), e => e.textContent)")
        for j, shown in enumerate(chips):
            want = weights[5 * n + j] if j <= 5 else weights[j * n + 5]
            self.assertTrue(abs(float(shown or 0) - want) < 0.006, (j, shown, want))
        best = max(range(6), key=lambda s: weights[5 * n + s])
        self.assertTrue(browser.text("#said").startswith(
            "\u201c went\u201d_5 attends to \u201c%s\u201d_%d 0." % (page.tokens[0][best], best)))

        browser.mouse("#view .tokens button", 7, click=True)
        browser.mouse("#view .tokens button", 2)
        self.assertTrue(browser.text("#said").startswith("\u201c the\u201d_7 "), "a click keeps the token")
        browser.mouse("#view .tokens button", 7, click=True)
        browser.mouse("#view .matrix tr", 1 + 9)
        self.assertTrue(browser.text("#said").startswith("\u201c,\u201d_9 "))
        browser.script("document.querySelectorAll('#view .tokens button')[3].focus()")
        browser.key("\ue004")
        self.assertTrue(browser.text("#said").startswith("\u201c Mary\u201d_4 "), "Tab goes on")
        cells = browser.script("return Array.from(document.querySelectorAll('#view .matrix td[title]'), e => e.title)")
        self.assertEqual(len(cells), n * (n + 1) // 2)

        browser.script("const s = document.getElementById('choose'); s.selectedIndex = 1;"
                       "s.dispatchEvent(new Event('change'));")
        self.assertEqual(browser.text("#view h3"), "L1H2", "another prompt keeps the head")
        self.assertEqual(browser.script("return document.querySelectorAll('.prompt')[0].hidden"), True)
        browser.mouse("#view .tokens button", n - 1)
        weights = page.attention[1][6]
        best = max(range(n), key=lambda s: weights[(n - 1) * n + s])
        shown = re.search(r"attends to .*?_(\d+) ([\d.]+)", browser.text("#said"))
        self.assertEqual(int(shown.group(1)), best)
        self.assertTrue(abs(float(shown.group(2)) - weights[(n - 1) * n + best]) < 0.001, shown.group())
        self.check_quiet(path)

    def test_hostile_tokens_stay_text(self):
        """Tokens, prompts, labels, settings and prose full of markup: no element of theirs, no script runs."""
        bad = "</script><img src=x onerror=alert(1)><script>document.title='pwned'</script>'\"&\u2028<!--"
        words = HOSTILE + ["<b>bold</b>"]
        page = demo(prompts=1, layers=1, heads=2, words=words)
        page.heads = [bad, "L0H1"]
        page.title, page.prompts, page.prose = bad, [bad], [bad]
        page.settings = json.dumps({"x": bad})
        path = self.open(page)
        self.assertEqual(self.browser.count("img, b, iframe"), 0)
        self.assertEqual(self.browser.count("script"), 1)
        self.assertTrue(self.browser.script("return document.title").startswith("</script><img"))
        for i in range(len(words)):
            self.browser.mouse("#view .tokens button", i)
        self.assertIn("<b>bold</b>", self.browser.text("#view .tokens button", len(words) - 1))
        self.assertIn("</script><script>alert(1)</script>", self.browser.text("#view .tokens button", 0))
        self.browser.mouse(".heads button", 1, click=True)
        self.assertEqual(self.browser.count("img, b, iframe"), 0)
        self.check_quiet(path)

    def test_whole_size(self):
        """8 prompts x 144 heads x 16 x 16: below 1.5 MB, quick to show, no wider than the window."""
        page = demo()
        self.assertLess(len(page.html()), 1500000)
        begun = time.time()
        path = self.open(page, "whole")
        self.assertLess(time.time() - begun, 10)
        self.browser.mouse(".heads button", 100, click=True)
        for width in (1600, 800, 360):
            self.browser.size(width)
            self.assertLessEqual(self.browser.script("return document.documentElement.scrollWidth"), width)
        for scheme in ("light", "dark"):
            self.browser.scheme(scheme)
            for width in (1600, 800):
                self.browser.size(width)
                self.browser.mouse("#view .tokens button", 10)
                self.browser.shot("page-%d-%s" % (width, scheme))
        self.browser.scheme("light")
        self.check_quiet(path)

    def test_dark_and_light(self):
        """prefers-color-scheme decides; text and paper always differ."""
        self.open(demo(prompts=1, layers=1, heads=1))
        seen = []
        for scheme in ("light", "dark"):
            self.browser.scheme(scheme)
            seen.append(self.browser.script(
                "const s = getComputedStyle(document.body), t = getComputedStyle(document.querySelector('figure svg'));"
                "return [s.backgroundColor, s.color, t.color]"))
        self.browser.scheme("light")
        self.assertEqual(seen[0][0], "rgb(255, 255, 255)")
        self.assertNotEqual(seen[0][0], seen[1][0])
        for background, ink, figure in seen:
            self.assertNotEqual(background, ink)
            self.assertEqual(ink, figure)

    def test_readable_without_script(self):
        """With scripts off: every prompt's tokens, every head's thumbnail, figures, table and settings."""
        self.browser.devtools("Emulation.setScriptExecutionDisabled", value=True)
        try:
            self.open(demo(prompts=2, layers=2, heads=2))
            self.browser.shot("page-noscript")
            tree = json.dumps(self.browser.devtools("Accessibility.getFullAXTree"))
        finally:
            self.browser.devtools("Emulation.setScriptExecutionDisabled", value=False)
        for word in ("Example 1", "L1H1", " Mary", "gpt2", "Logit differences", "clean into corrupted"):
            self.assertIn(word, tree)


class AsAFile(unittest.TestCase):
    def test_nothing_from_elsewhere(self):
        """No link, image, import or address but the SVG name space; a policy that forbids requests."""
        page = demo(prompts=1, layers=2, heads=2).html().decode()
        self.assertEqual(set(re.findall(r"https?://[^'\" ]*", page)), {"http://www.w3.org/2000/svg"})
        self.assertIn("default-src 'none'", page)
        self.assertEqual(re.findall(r"(?:href|src)='[^']*'", page), ["href='data:,'"])
        self.assertFalse(re.search(r"@import|url\(|fetch\(|XMLHttp", page))

    def test_parts_may_be_missing(self):
        """Nothing at all, only tables, only attention: a page each time, with a script only where needed."""
        self.assertNotIn(b"<script", Page(settings=None).html())
        self.assertNotIn(b"<script", Page([Table([("layer", 2), ("pos", 2)], smooth((2, 2)))]).html())
        self.assertNotIn(b"<figure", Page(tokens=[["a"]], heads=["L0H0"], attention=[[[1.0]]]).html())
        self.assertIn(b">nan<", Page(differences=[(float("nan"), -1)], prompts=["x"]).html())

    def test_elements_are_closed(self):
        """Every element that HTML wants closed is, in order, also around hostile tokens."""
        open_elements, problems = [], []

        class Checker(html.parser.HTMLParser):
            def handle_starttag(self, tag, attributes):
                if tag not in ("meta", "link"):
                    open_elements.append(tag)

            def handle_startendtag(self, tag, attributes):
                pass

            def handle_endtag(self, tag):
                if not open_elements or open_elements.pop() != tag:
                    problems.append((tag, self.getpos()))

        Checker().feed(demo(prompts=2, layers=1, heads=2, words=HOSTILE).html().decode())
        self.assertEqual((open_elements, problems), ([], []))


if __name__ == "__main__":
    unittest.main()
