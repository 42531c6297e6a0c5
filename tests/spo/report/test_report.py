"""The report: what is embedded is right, nothing in it is markup, and a browser shows it."""

import base64
import dataclasses
import hashlib
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch
from forests import forest_of

from spo.records import LENGTH, PROMPT, SEGMENT, STOP, Prompt
from spo.report import RunCurve, TreeView, write_report
from spo.report.html import embed_json, text_pieces

HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>&amp;<!--\u2028"
)
QUESTION = "Natalia sold 48 clips in April and half as many in May . How many did she sell in all ?"
STEPS = (
    "In May she sold 48 / 2 = 24 clips .\n",
    "Half of 48 is 24 , so May has 24 .\n",
    "April has 48 and May has 96 clips .\n",
    "We add both months : 48 + 24 = 72 .\n",
    "The sum is 48 + 96 = 144 clips .\n",
    "Let me check this once more .\n",
)
NAN = math.nan


class Words:
    """A tokenizer of words, each written with the space before it."""

    def __init__(self):
        self.words = []

    def ids(self, text):
        words = re.findall(r" ?[^ \n]+|\n", text)
        self.words += [word for word in dict.fromkeys(words) if word not in self.words]
        return [self.words.index(word) for word in words]

    def decode(self, ids):
        return "".join(self.words[i] for i in ids)


class Grower:
    """Builds a Forest node by node."""

    def __init__(self, seed=0):
        self.random = torch.Generator().manual_seed(seed)
        self.words, self.rows, self.ids, self.logprobs, self.sizes = Words(), [], [], [], []
        self.prompts = []

    def uniform(self):
        return float(torch.rand((), generator=self.random))

    def add(self, parent, text, *, finish=SEGMENT, reward=NAN, in_value=True, trained=True):
        ids = self.words.ids(text)
        if finish == PROMPT:
            self.prompts.append(Prompt(tuple(ids), "72", "gsm8k"))
            in_value = trained = False
        sure = [finish == PROMPT or self.uniform() > 0.2 for _ in ids]
        self.logprobs += [0.0 if s else math.log(0.05 + 0.8 * self.uniform()) for s in sure]
        self.ids += ids
        self.sizes.append(len(ids))
        born = -1 if finish == PROMPT else 3
        prompt = len(self.prompts) - 1
        self.rows.append((parent, reward, in_value, trained, finish, prompt, born))
        return len(self.rows) - 1

    def text(self, steps):
        picks = torch.randint(len(STEPS), (steps,), generator=self.random).tolist()
        return "".join(STEPS[i] for i in picks)

    def leaf(self, parent, **flags):
        cut = self.uniform() < 0.1
        reward = float(self.uniform() < 0.2 + 0.5 * ((parent * 7) % 3 == 0) and not cut)
        text = self.text(1 + int(4 * self.uniform()))
        text += "" if cut else " #### 72" if reward else " #### 144"
        finish = LENGTH if cut else STOP
        return self.add(parent, text, finish=finish, reward=reward, **flags)

    def tree(self, widths):
        level = [self.add(-1, QUESTION, finish=PROMPT)]
        for width in widths[:-1]:
            level = [self.add(n, self.text(2)) for n in level for _ in range(width)]
        for n in level:
            for _ in range(widths[-1]):
                self.leaf(n)

    def chain(self, trajectories, segments, probes):
        root = self.add(-1, QUESTION, finish=PROMPT)
        for _ in range(trajectories):
            node = root
            for _ in range(segments - 1):
                node = self.add(node, self.text(1), in_value=False)
                for _ in range(probes):
                    self.leaf(node, trained=False)
            self.leaf(node, in_value=False)

    def view(self, title, decode=None):
        parent, rewards, in_value, trained, finish, prompt, born = zip(*self.rows, strict=True)
        forest = forest_of(
            parent,
            self.sizes,
            token_ids=torch.tensor(self.ids, dtype=torch.int32),
            rollout_logprobs=torch.tensor(self.logprobs),
            rewards=torch.tensor(rewards),
            in_value=torch.tensor(in_value),
            trained=torch.tensor(trained),
            finish=torch.tensor(finish, dtype=torch.int8),
            prompt=torch.tensor(prompt, dtype=torch.int32),
            born=torch.tensor(born, dtype=torch.int32),
            prompts=tuple(self.prompts),
            temperature=0.6,
        )
        values = list(rewards)
        for n in reversed(range(len(parent))):
            counted = [
                values[c] for c in range(n + 1, len(parent)) if parent[c] == n and in_value[c]
            ]
            if math.isnan(rewards[n]) and counted:
                values[n] = sum(counted) / len(counted)
        above = [values[p] if p >= 0 else NAN for p in parent]
        advantages = [v - (0.5 if math.isnan(a) else a) for v, a in zip(values, above, strict=True)]
        kept = forest.rollout_logprobs < math.log(0.9)
        decode = decode or self.words.decode
        return TreeView(title, forest, torch.tensor(values), torch.tensor(advantages), decode, kept)


def curve(name, gain):
    """61 iterations and 13 evaluations; one figure is missing once."""
    lines = []
    for i in range(61):
        at = {"iteration": i, "seconds": 40.0 * i, "generated_tokens": 90_000 * i}
        score = 0.4 + gain * (1 - math.exp(-i / 20))
        if i % 5 == 0:
            lines.append({**at, "stage": "eval", "greedy": score, "sampled": score - 0.03})
            lines[-1] |= {"problems": 1319, "greedy_stderr": 0.0137, "sampled_stderr": 0.007}
        lines.append(
            {**at, "stage": "train", "reward_mean": score, "kept_share": 0.2, "loss": 0.01}
        )
        lines[-1] |= {"zero_advantage_share": 0.3, "clipfrac": 0.01, "entropy": 0.4, "lr": 1e-6}
        lines[-1] |= {"grad_norm": NAN if i == 7 else 1.0, "time_rollout": 30.0}
        lines[-1] |= {"tokens_per_s": 2200.0}
    return RunCurve(name, lines)


class Markup(HTMLParser):
    """What a browser would build: elements with attributes, and the text of each script."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.text, self.open = [], {}, None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.open = dict(attrs).get("id") or tag

    def handle_data(self, text):
        self.text[self.open] = self.text.get(self.open, "") + text


def sample():
    trees, chains = Grower(1), Grower(2)
    trees.tree((6, 4, 2))
    trees.tree((3, 2))
    chains.chain(3, 4, 9)
    runs = [curve("SPO", 0.16), curve("GRPO", 0.05)]
    return runs, [trees.view("trees"), chains.view("chains")]


def hostile(path, odd="\ud800 \0 "):
    grower = Grower(3)
    root = grower.add(-1, HOSTILE, finish=PROMPT)
    for reward in (0.0, 1.0):
        grower.add(root, HOSTILE + f" {odd}%%data%%", finish=STOP, reward=reward)
    runs = [RunCurve(HOSTILE, curve("", 0.1).metrics)]
    write_report(path, runs, [grower.view(HOSTILE)], HOSTILE, [HOSTILE + odd + "%%script%%"])
    return path.read_text(encoding="utf-8")


def test_embedded_json_is_inert_and_exact():
    text = embed_json({"a": [HOSTILE, 0.5, math.nan, -math.inf, True, 3]})
    assert not set("<>&\u2028\u2029") & set(text) and text.isascii()
    assert json.loads(text) == {"a": [HOSTILE, 0.5, None, None, True, 3]}


def test_hostile_text_stays_text(tmp_path):
    page = hostile(tmp_path / "report.html")
    plain = tmp_path / "plain.html"
    write_report(plain, *sample(), notes=["a note"])
    markup = Markup(page)
    tags = [tag for tag, _ in markup.elements]
    assert tags.count("script") == 2 and "img" not in tags
    assert set(tags) <= {tag for tag, _ in Markup(plain.read_text(encoding="utf-8")).elements}
    names = {name for _, attributes in markup.elements for name in attributes}
    assert not [n for n in names if n.startswith("on") or n in ("src", "href", "style", "action")]
    assert markup.text["h1"].startswith(HOSTILE)
    tree = json.loads(markup.text["data"])["trees"][0]
    assert tree["title"] == HOSTILE
    pieces = [piece if isinstance(piece, str) else piece[0] for piece in tree["text"][1]]
    assert "".join(pieces) == HOSTILE + " \ud800 \0 %%data%%"


def test_page_is_one_file_whose_policy_admits_only_its_own_script(tmp_path):
    page = hostile(tmp_path / "report.html")
    assert set(re.findall(r"https?://[\w./]+", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"url\(|@import|@font-face", page)
    script = page[page.rindex("<script>") + 8 : page.rindex("</script>")]
    style = page[page.index("<style>") + 7 : page.index("</style>")]
    for text, directive in ((script, "script-src"), (style, "style-src")):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in page
    assert "default-src 'none'" in page and "unsafe" not in page
    # The ways in which text becomes markup or code.
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", script)


def test_nodes_are_embedded_as_they_are(tmp_path):
    _, (view, chain) = sample()
    path = tmp_path / "report.html"
    write_report(path, trees=[view, chain])
    first = path.read_bytes()
    write_report(path, trees=[view, chain])
    assert path.read_bytes() == first
    tree = json.loads(Markup(first.decode()).text["data"])["trees"][0]
    forest = view.forest
    assert len(tree["text"]) == 1 + 6 + 24 + 48 + 1 + 3 + 6
    assert tree["parent"] == forest.parent.tolist() and tree["answers"] == ["72", "72"]
    torch.testing.assert_close(torch.tensor(tree["advantage"]), view.advantages)
    graded = [reward is not None for reward in tree["reward"]]
    assert graded == (~forest.rewards.isnan()).tolist()
    for node, pieces in enumerate(tree["text"]):
        text = "".join(piece if isinstance(piece, str) else piece[0] for piece in pieces)
        assert text == view.decode(forest.tokens(node))
        span = slice(forest.cu_tokens[node], forest.cu_tokens[node + 1])
        unsure = forest.rollout_logprobs[span][view.kept[span]].exp().tolist()
        shown = [piece[1] for piece in pieces if not isinstance(piece, str)]
        assert shown == pytest.approx(unsure, rel=6e-3)


def test_pieces_join_split_characters_and_keep_word_starts():
    def utf8(ids):
        return bytes(ids).decode("utf-8", errors="replace")

    ids = list("aé🙂b".encode())  # a | 2 bytes | 4 bytes | b
    logprobs = [math.log(0.5)] * 8
    marked = [False, True, False, False, False, True, False, True]
    pieces = text_pieces(utf8, [], ids, marked, logprobs)
    assert pieces == ["a", ("é", 0.5), "🙂", ("b", 0.5)]
    late = text_pieces(utf8, [], list("long é".encode()), [False] * 6 + [True], logprobs)
    assert late == ["long é"]  # however long the run that ends inside a character
    assert text_pieces(utf8, list("x🙂".encode())[:-1], ids[6:], [False, True], logprobs) == [
        "🙂", ("b", 0.5),
    ]  # fmt: skip

    words = ["▁the", "▁cat", "s", "▁sat"]

    def drops_first_space(ids):
        return "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" ")

    pieces = text_pieces(drops_first_space, [0], [1, 2, 3], [False, False, True], logprobs)
    assert pieces == [" cats", (" sat", 0.5)]
    assert text_pieces(drops_first_space, [], [0, 1], [False, False], logprobs) == ["the cat"]
    assert text_pieces(utf8, [], [], [], []) == []


def test_accuracy_table_is_worked_by_hand(tmp_path):
    def evaluation(i, **figures):
        at = {"iteration": i, "seconds": 1.0, "generated_tokens": 1_000_000 * i, "stage": "eval"}
        return {**at, "problems": 1319, **figures}

    both = [
        evaluation(0, greedy=0.40, greedy_stderr=0.03),
        evaluation(1, greedy=math.nan, greedy_stderr=math.nan),
        evaluation(2, greedy=0.35, greedy_stderr=0.04, sampled=0.25),
    ]
    path = tmp_path / "report.html"
    write_report(path, [RunCurve("a", both), RunCurve("b", both[:1]), RunCurve("new", [])])
    page = path.read_text(encoding="utf-8")
    rows = re.findall(r'<tr><th scope="row">(.*?)</tr>', page)
    cells = [re.findall(r"[^<>]+(?=<)", re.sub("</?(b|small)>", "", row) + "<") for row in rows]
    text = [[c for c in row if c not in ("/th", "td", "/td")] for row in cells]
    assert text == [
        ["a", "40.0 ± 3.0", "35.0 ± 4.0", "−5.0 ± 5.0", "–", "25.0", "–", "1,319", "2,000,000"],
        ["b", "–", "40.0 ± 3.0", "–", "–", "–", "–", "1,319", "0"],
        ["new", *"––––––––"],
    ]


def test_bad_input_is_named(tmp_path):
    _, (view, _) = sample()
    with pytest.raises(ValueError, match="runs and trees: expected at least one"):
        write_report(tmp_path / "report.html")
    for name in ("values", "advantages", "kept"):
        short = dataclasses.replace(view, **{name: getattr(view, name)[1:]})
        with pytest.raises(ValueError, match=rf"{name}: expected shape \(\d+,\), found \(\d+,\)"):
            write_report(tmp_path / "report.html", trees=[short])


def test_a_browser_shows_it(tmp_path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("chromium is not installed")
    hostile(tmp_path / "report.html", odd="")  # the dump, not the page, fails on odd characters
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
    flags += f" --disable-component-update --disable-sync --user-data-dir={tmp_path}/profile"
    page = subprocess.run(
        [chromium, *flags.split(), "--dump-dom", f"file://{tmp_path}/report.html"],
        capture_output=True, text=True, timeout=60, check=True,
    ).stdout  # fmt: skip
    markup = Markup(page)
    tags = [tag for tag, _ in markup.elements]
    assert markup.text["title"].startswith("</script>")  # not 'owned'
    assert tags.count("script") == 2 and "img" not in tags
    roles = [attributes.get("role") for _, attributes in markup.elements]
    assert roles.count("treeitem") == 3  # the prompt and its two children
    lines = [a for tag, a in markup.elements if tag == "path" and "line " in a.get("class", "")]
    assert len([a for a in lines if a["d"].count("L") == 12]) == 4  # 13 evaluations, 2 x 2 charts
    assert "+0.50" in page and "−0.50" in page
