"""The report: what it holds equals what was stored (read back out of the page), and the page in a real browser."""

from __future__ import annotations

import base64
import gzip
import json
import random
import re

import pytest
import torch

from steerl.rollout.common.errors import UserError
from steerl.training.report import page as report
from steerl.training.report.run_data import read_lines, read_run
from tests.browser import Browser
from tests.dumps import episodes, made_dump, made_rows, write_scores
from tests.episodes import CALCULATOR, samples_of, talk

HOSTILE = [
    "<script>window.hacked = 1</script>", "<img src=x onerror='window.hacked = 2'>",
    "</script><script>window.hacked = 3</script>",
    "שלום", "👩‍🚀", "\u202e", "\n", "\x00", "", "&lt;b&gt;", "{{script}}", "plain",
]  # fmt: skip
STEPS, PER_STEP = 12, 3
BEFORE = {"eval/reward": 0.3}
"""What summary.json says of the policy before the first step."""


def metrics(step, shift=0.0):
    clipped = None if step == 2 else step / 100
    evaluated = {"eval/reward": step / 9} if step % 4 == 0 else {}
    return {
        "step": step, "reward/mean": 0.3 + 0.04 * step + shift, "reward/kind": step / 7, "kl/ref": 2 + (step % 3) / 9,
        "kl/coef": 0.05, "policy/entropy": 3 / step, "ppo/clip_fraction": clipped, "value/loss": 1e-7 * step,
        "time/sample_s": 0.5, "time/learn_s": 1.5, "time/tokens_per_s": 900.0, "memory/peak_mb": 600, "some/new_metric": -step,
        **evaluated,
    }  # fmt: skip


def sample(draw, step, i):
    tokens = [draw.choice(HOSTILE) for _ in range(9)] + HOSTILE[i::PER_STEP]
    numbers = {
        name: [round(draw.uniform(low, high), 6) for _ in tokens]
        for name, low, high in (
            ("policy_logprobs", -6, 0),
            ("reference_logprobs", -6, 0),
            ("advantages", -2, 2),
            ("values", 0, 1),
        )
    }
    return {
        "step": step, "kind": ("best", "worst", "random")[i], "row": step * 10, "sample": i, "prompt": "say it",
        "prompt_text": "say it", "completion": "".join(tokens) + f" needle{step}", "reward": draw.random(),
        "parts": {"kind": draw.random()}, "kl": draw.random(), "ended": True, "prompt_ids": [5, 6],
        "prompt_tokens": ["say", " it"], "response_ids": list(range(100, 100 + len(tokens))), "response_tokens": tokens,
        **numbers,
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder written by hand, and its lines."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    folder.mkdir()
    draw = random.Random(0)
    rows = [sample(draw, step, i) for step in range(1, STEPS + 1) for i in range(PER_STEP)]
    lines = [metrics(step) for step in range(1, STEPS + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "samples.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    (folder / "config.yaml").write_text("ppo:\n  kl_target: 2.25\n  note: '</pre><script>window.hacked = 4</script>'\n")
    (folder / "versions.json").write_text('{"torch": "9.9"}')
    (folder / "summary.json").write_text('{"reward_before": 0.3, "reward_after": 0.8, "steps": 12}')
    return folder, lines, rows


def blobs(path):
    """What the page holds, unpacked without its own script."""
    found = re.findall(r'<script type="text/plain" id="([^"]+)">([A-Za-z0-9+/=]*)</script>', path.read_text(encoding="utf-8"))
    return {name: json.loads(gzip.decompress(base64.b64decode(text))) for name, text in found}


def test_every_number_of_the_run_is_in_the_page(run, tmp_path):
    folder, lines, rows = run
    held = blobs(report.report([folder], tmp_path / "page.html"))
    index = held["index"]
    assert index["runs"][0]["metrics"]["step"] == list(range(1, STEPS + 1))
    assert index["runs"][0]["ends"] == {"eval/reward": [[0, 0.3], [12, 0.8]], "eval/kl": [[0, 0.0]]}
    for name in lines[3]:
        if name != "step":
            assert index["runs"][0]["metrics"]["columns"][name] == [line.get(name) for line in lines]
            assert sum(name in panel["keys"] for panel in index["panels"]) == 1, name
    assert [panel["target"] for panel in index["panels"] if "kl/ref" in panel["keys"]] == [2.25]
    shown = [row for chunk in range(len(held)) for row in held.get(f"rows-0-{chunk}", [])]
    assert len(shown) == len(rows)
    for row, stored, text in zip(shown, rows, held["texts-0"], strict=True):
        assert text == [stored["prompt_text"], stored["completion"]]
        assert row["tokens"] == stored["response_tokens"] and row["ids"] == stored["response_ids"]
        for name in ("policy_logprobs", "reference_logprobs", "advantages", "values"):
            assert row["quantities"][name] == stored[name]
        assert row["facts"]["reward"] == stored["reward"] and row["facts"]["parts"] == stored["parts"]


def test_a_folder_named_like_a_place_in_the_page_changes_nothing(run, tmp_path):
    folder = tmp_path / "{{script}}{{blobs}}{{style}}"
    folder.mkdir()
    for name in ("metrics.jsonl", "samples.jsonl"):
        (folder / name).write_bytes((run[0] / name).read_bytes())
    path = report.report([folder], tmp_path / "page.html")
    text = path.read_text(encoding="utf-8")
    assert f"<title>{folder.name}</title>" in text and blobs(path)["index"]["title"] == folder.name
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert [script.strip() for script in scripts] == [
        "\n".join((report.ASSETS / name).read_text() for name in ("data.js", "curves.js", "viewer.js", "page.js")).strip()
    ]


def test_a_torn_last_line_is_passed_over_with_a_word_and_any_other_is_named(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n{"step": 3, "a"')
    assert [line["step"] for line in read_lines(path)] == [1, 2]
    assert "metrics.jsonl: its last line was cut short" in capsys.readouterr().err
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2"):
        read_lines(path)


@pytest.mark.parametrize("make", [lambda f: None, lambda f: f.mkdir()])
def test_a_folder_that_is_no_run_is_named(tmp_path, make):
    make(tmp_path / "x")
    with pytest.raises(UserError, match="x "):
        report.report([tmp_path / "x"], tmp_path / "out.html")


def test_runs_of_one_name_are_told_apart(run, tmp_path):
    folder, _, _ = run
    other = tmp_path / "b" / "first"
    other.mkdir(parents=True)
    for name in ("metrics.jsonl", "samples.jsonl"):
        (other / name).write_bytes((folder / name).read_bytes())
    names = [one["name"] for one in blobs(report.report([folder, other], tmp_path / "p.html"))["index"]["runs"]]
    assert len(set(names)) == 2 and names[1].endswith("b/first")


def test_the_picture_is_a_png_of_the_runs(run, tmp_path):
    folder, _, _ = run
    path = report.figure([folder], tmp_path / "curves.png")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(UserError, match="nothing/here"):
        report.figure([folder], tmp_path / "x.png", keys=["nothing/here"])


# -- a dump -----------------------------------------------------------------------------------------------------------


def test_a_dump_has_the_same_page_with_its_scores(tmp_path):
    plan = made_dump(tmp_path / "dump", prompts=10, samples=2)
    identities = [(prompt, sample) for prompt in range(10) for sample in range(2)]
    write_scores(tmp_path / "dump", {key: {"total": key[0] / 3, "kind": 0.1 * key[1]} for key in identities})
    held = blobs(report.report([tmp_path / "dump"], tmp_path / "dump.html"))
    rows = held["rows-0-0"]
    assert len(rows) == plan.rows == 20 and held["index"]["runs"][0]["summary"]["rows"] == 20
    assert [(row["facts"]["row"], row["facts"]["sample"]) for row in rows] == identities
    rollout, texts = made_rows(range(10))
    for i, row in enumerate(rows):
        length = int(rollout.lengths_B[i])
        assert row["ids"] == rollout.response_BR[i, :length].tolist()
        assert torch.tensor(row["quantities"]["policy_logprobs"]).equal(rollout.policy_logprobs_BR[i, :length])
        gap = rollout.behaviour_logprobs_BR[i, :length] - rollout.policy_logprobs_BR[i, :length]
        assert row["quantities"]["gap"] == pytest.approx(gap.tolist(), abs=1e-6)
        assert torch.tensor(row["facts"]["reward"]).item() == torch.tensor(identities[i][0] / 3).item()
        assert held["texts-0"][i] == [texts.prompt_texts[i], texts.completions[i]]
    lengths = next(bars for bars in held["index"]["bars"] if "length" in bars["title"])
    counted = {label: (rollout.lengths_B == int(label)).sum().item() for label in lengths["labels"]}
    assert dict(zip(lengths["labels"], lengths["counts"], strict=True)) == counted
    few = blobs(report.report([tmp_path / "dump"], tmp_path / "few.html", rows=3))["rows-0-0"]
    assert [row["facts"]["row"] for row in few] == [0, 3, 7]


def test_a_dump_of_episodes_says_what_was_fed(tmp_path):
    """Lists stay as long as the response, with nothing at what was fed; lengths are of actions; a strength for each site."""
    made_dump(tmp_path / "dump", make=episodes)
    held = blobs(report.report([tmp_path / "dump"], tmp_path / "dump.html"))
    rollout, _ = episodes(range(10))
    gapped = 0
    for i, row in enumerate(held["rows-0-0"]):
        length = int(rollout.lengths_B[i])
        mask = rollout.action_mask_BR[i, :length].tolist()
        assert row["ids"] == rollout.response_BR[i, :length].tolist()
        assert row["action_mask"] == ([] if all(mask) else mask)
        for name in ("policy_logprobs", "behaviour_logprobs"):
            stored = getattr(rollout, f"{name}_BR")[i]
            found = [value if value is None else torch.tensor(value).item() for value in row["quantities"][name]]
            assert found == [stored[t].item() if mask[t] else None for t in range(length)]
        assert [value is None for value in row["quantities"]["gap"]] == [not drawn for drawn in mask]
        assert row["facts"]["length"] == sum(mask) and row["facts"].get("fed", 0) == length - sum(mask)
        for site in range(2):
            strength = rollout.strength_BK[i, site].item()
            assert torch.tensor(row["facts"]["strength"][str(site)]).item() == strength
            values = row["quantities"][f"steering strength of the row, site {site}"]
            assert [torch.tensor(value).item() for value in values] == [strength] * length
        gapped += not all(mask)
    assert gapped > 5
    bars = next(bars for bars in held["index"]["bars"] if "length" in bars["title"])
    counted = {label: (rollout.actions_B == int(label)).sum().item() for label in bars["labels"]}
    assert dict(zip(bars["labels"], bars["counts"], strict=True)) == counted


# -- in a browser -----------------------------------------------------------------------------------------------------

TOKEN = '.token[data-part="response"][data-place="{}"]'


@pytest.fixture(scope="module")
def page(run, tmp_path_factory):
    return report.report([run[0]], tmp_path_factory.mktemp("pages") / "page.html")


@pytest.fixture(scope="module")
def browser(page):
    with Browser() as opened:
        opened.open(page)
        opened.key("o")  # all groups of curves
        yield opened


def shown(browser):
    """(row, sample) of the sample in the viewer."""
    facts = browser.run("Object.fromEntries([...document.querySelectorAll('.facts > span')].map(s => s.innerText.split(' ')))")
    return int(facts["row"]), int(facts["sample"])


def stored(rows, identity):
    return next(row for row in rows if (row["row"], row["sample"]) == identity)


def choose(browser, name, value):
    choice = f"Object.assign(document.getElementById('{name}'), {{value: '{value}'}})"
    browser.run(f"{choice}.dispatchEvent(new Event('change'))")
    browser.settle()


@pytest.mark.browser
def test_nothing_that_a_model_wrote_runs_and_nothing_is_fetched(browser, page, run):
    for step in range(1, STEPS + 1):
        choose(browser, "step", step)
        for _ in range(PER_STEP):
            browser.key("j")
    assert browser.run("typeof window.hacked") == "undefined"
    assert browser.run("document.querySelectorAll('img, #viewer script, #settings script').length") == 0
    assert "</pre><script>" in browser.run("document.getElementById('settings-body').innerText")
    assert browser.requests == [page.absolute().as_uri()] and browser.problems == []


@pytest.mark.browser
def test_every_curve_is_drawn_where_its_numbers_say(browser, run):
    _, lines, _ = run
    for name in lines[3]:
        if name == "step":
            continue
        path = browser.run(f"document.querySelector('path[data-label=\"{name}\"]').getAttribute('d')")
        points = [(float(x), float(y)) for x, y in re.findall(r"[ML]([-.0-9]+) ([-.0-9]+)", path)]
        values = [(line["step"], line[name]) for line in [{"step": 0, **BEFORE}, *lines] if line.get(name) is not None]
        # One piece, but for the step that is missing; a ring around what stands alone, and around each evaluation.
        assert len(points) == len(values) and path.count("M") == {"ppo/clip_fraction": 2}.get(name, 1)
        rings = browser.run(f"document.querySelector('path[data-of=\"{name}\"]').getAttribute('d')")
        assert rings.count("M") == {"ppo/clip_fraction": 1, "eval/reward": 4}.get(name, 0)
        (step_a, a), (step_b, b) = values[0], values[-1]
        (x_a, y_a), (x_b, y_b) = points[0], points[-1]
        for (step, value), (x, y) in zip(values, points, strict=True):
            assert x == pytest.approx(x_a + (step - step_a) / (step_b - step_a) * (x_b - x_a), abs=0.2)
            if a != b:
                assert y == pytest.approx(y_a + (value - a) / (b - a) * (y_b - y_a), abs=0.3)
    assert browser.run("document.querySelectorAll('.target').length") == 1


@pytest.mark.browser
def test_the_crosshair_says_the_stored_numbers(browser, run):
    _, lines, _ = run
    browser.run("document.querySelector('.panel svg').focus()")
    for _ in range(4):  # before the first step, and three steps
        browser.key("ArrowRight")
    said = browser.run("document.querySelector('.panel .keys').innerText")
    assert str(lines[2]["reward/mean"]) in said and "step 3" in said
    browser.run("document.activeElement.blur()")


@pytest.mark.browser
def test_legends_are_short_and_whole_under_the_pointer(browser, run):
    """12 / 7 is 1.7142857142857142 in the file."""
    found = browser.run("[...document.querySelectorAll('.keys b')].map(one => [one.innerText, one.title])")
    assert max(len(text) for text, _ in found) <= 8
    assert ["1.714", str(STEPS / 7)] in found
    labels = browser.run("[...document.querySelectorAll('.tick[text-anchor=middle]')].map(one => one.textContent)")
    assert labels and all(label.isdigit() for label in labels)


def test_evaluations_before_and_after_a_run_are_points_of_its_curves(tmp_path):
    """The summary has both; of the KL of a policy to itself nothing is measured."""
    lines = [{"step": step, "reward/mean": step / 10} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "summary.json").write_text('{"reward_before": 0.1, "reward_after": 0.9, "kl_after": 2.5}')
    found = read_run(tmp_path, "run")
    assert found.steps == [1, 2, 3] and found.metrics == {"reward/mean": [0.1, 0.2, 0.3]}
    assert found.ends == {"eval/reward": [(0, 0.1), (3, 0.9)], "eval/kl": [(0, 0.0), (3, 2.5)]}


@pytest.mark.browser
def test_colours_and_hover_numbers_are_the_stored_ones(browser, run):
    _, _, rows = run
    choose(browser, "step", 4)
    row = stored(rows, shown(browser))
    for name in ("advantages", "policy_logprobs"):
        choose(browser, "quantity", name)
        largest = max(map(abs, row[name]))
        painted = browser.run("[...document.querySelectorAll('.token[data-part=response]')].map(t => t.style.backgroundColor)")
        assert len(painted) == len(row[name])
        for color, value in zip(painted, row[name], strict=True):
            red, _, blue, *alpha = map(float, re.findall(r"[.0-9]+", color))
            assert (red > blue) == (value >= 0)
            assert (alpha or [1.0])[0] == pytest.approx(0.75 * abs(value) / largest, abs=0.003)
    for place in range(len(row["response_ids"])):
        browser.mouse(TOKEN.format(place))
        said = browser.run(
            "Object.fromEntries([...document.querySelectorAll('#tip tr')].map(r => [...r.children].map(c => c.textContent)))"
        )
        assert int(said["id"]) == row["response_ids"][place]
        for name in ("policy_logprobs", "reference_logprobs", "advantages", "values"):
            assert float(said[name]) == row[name][place]
        assert float(said["reference gap"]) == pytest.approx(
            row["policy_logprobs"][place] - row["reference_logprobs"][place], abs=1e-6
        )


@pytest.mark.browser
def test_odd_characters_are_named_and_tokens_stay_in_their_places(browser, run):
    _, _, rows = run
    choose(browser, "step", 6)
    row = stored(rows, shown(browser))
    texts = browser.run("[...document.querySelectorAll('.token[data-part=response]')].map(t => t.textContent)")
    names = {"\u202e": "\u27e8U+202E\u27e9", "\x00": "\u27e8U+0000\u27e9", "\n": "\u21b5\n", "": "\u2205"}
    assert texts == [names.get(token, token) for token in row["response_tokens"]]
    assert browser.run("getComputedStyle(document.querySelector('.token')).unicodeBidi") == "isolate"


@pytest.mark.browser
def test_keys_move_between_samples_steps_tokens_and_colours(browser, run):
    choose(browser, "step", 2)
    assert shown(browser) == (20, 0)
    browser.key("j"), browser.key("j")
    assert shown(browser) == (20, 2)
    browser.key("j")
    assert shown(browser) == (20, 2)  # the last one
    browser.key("k")
    assert shown(browser) == (20, 1)
    browser.key("]")
    assert shown(browser) == (30, 0)
    browser.key("["), browser.key("[")
    assert shown(browser) == (10, 0)
    before = browser.run("document.getElementById('quantity').value")
    browser.key("c")
    assert browser.run("document.getElementById('quantity').value") != before
    browser.key("ArrowRight"), browser.key("ArrowRight")
    assert browser.run("document.querySelector('.token.at').dataset.place") == "1"
    browser.key("ArrowLeft"), browser.key("ArrowLeft")
    assert browser.run("document.querySelector('.token.at').dataset.part") == "prompt"
    browser.key("Escape")
    assert browser.run("document.getElementById('tip').hidden") is True
    browser.key("/")
    assert browser.run("document.activeElement.id") == "search"
    browser.key("Escape")
    assert browser.problems == []


@pytest.mark.browser
@pytest.mark.parametrize(
    ("order", "key", "sign"), [("worst reward", "reward", 1), ("best reward", "reward", -1), ("largest KL", "kl", -1)]
)
def test_sorting_shows_the_extreme_first(browser, run, order, key, sign):
    _, _, rows = run
    choose(browser, "step", "")
    choose(browser, "sort", order)
    expected = [(row["row"], row["sample"]) for row in sorted(rows, key=lambda row: sign * row[key])]
    found = [shown(browser)]
    for _ in range(4):
        browser.key("j")
        found.append(shown(browser))
    assert found == expected[:5]
    choose(browser, "sort", "as stored")


@pytest.mark.browser
def test_searching_finds_the_text(browser, run):
    choose(browser, "step", "")
    browser.key("/")
    browser.write("NEEDLE7")
    assert browser.run("document.getElementById('count').textContent") == f"1 of {PER_STEP} samples" and shown(browser)[0] == 70
    browser.write(" nothing")
    assert "0 of 0" in browser.run("document.getElementById('count').textContent")
    browser.run("document.getElementById('search').value = ''")
    browser.key("Escape")
    choose(browser, "step", "1")


def brightness(color):
    red, green, blue = (int(part) for part in re.findall(r"\d+", color)[:3])
    return 0.3 * red + 0.59 * green + 0.11 * blue


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1280])
def test_narrow_and_wide_light_and_dark(page, width, dark, tmp_path):
    with Browser(width, 800, dark) as browser:
        browser.open(page)
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")
        ink, ground = browser.run("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
        assert (brightness(ground) < 128) == dark and abs(brightness(ink) - brightness(ground)) > 150
        browser.mouse(TOKEN.format(3))
        box = browser.run("(b => [b.left, b.right, b.top, b.bottom])(document.getElementById('tip').getBoundingClientRect())")
        assert 0 <= box[0] < box[1] <= width and 0 <= box[2] < box[3] <= 800
        sizes = browser.run("[...document.querySelectorAll('.tick')].map(t => t.getBoundingClientRect().height)")
        assert min(sizes) >= 8  # readable, not shrunk with the drawing
        browser.mouse("#theme", "click")
        assert (brightness(browser.run("getComputedStyle(document.body).backgroundColor")) < 128) != dark
        assert browser.problems == []


@pytest.mark.browser
def test_a_page_that_says_that_it_is_ready_is_drawn(page):
    """On a machine under load frames come late: what is drawn in one would move the page when it is in use already."""
    with Browser() as browser:
        late = "window.frames_asked = 0; window.requestAnimationFrame = () => ++window.frames_asked"
        browser.call("Page.addScriptToEvaluateOnNewDocument", source=late)
        browser.open(page)
        drawn = "[document.querySelectorAll('.tick').length, document.body.scrollHeight]"
        before = browser.run(drawn)
        assert before[0] > 20
        browser.run("new Promise(done => setTimeout(done, 100))")
        assert browser.run(drawn) == before


@pytest.mark.browser
def test_runs_over_each_other_and_a_dump_beside_them(run, tmp_path):
    folder, lines, _ = run
    other = tmp_path / "second"
    other.mkdir()
    (other / "metrics.jsonl").write_text("".join(json.dumps(metrics(step, 0.1)) + "\n" for step in range(1, 6)))
    made_dump(tmp_path / "dump", prompts=4)
    with Browser() as browser:
        browser.open(report.report([folder, other, tmp_path / "dump"], tmp_path / "page.html"))
        labels = browser.run("[...document.querySelectorAll('.panel path[data-label]')].map(p => p.dataset.label)")
        assert "reward/mean \u00b7 first" in labels and "reward/mean \u00b7 second" in labels
        assert browser.run("[...document.getElementById('run').options].map(o => o.text)") == ["first", "dump"]
        assert browser.run("document.querySelectorAll('rect.bars').length") > 0
        choose(browser, "run", 2)
        assert shown(browser) == (0, 0)
        assert browser.problems == []


@pytest.mark.browser
def test_what_an_episode_was_fed_is_set_off(tmp_path):
    made_dump(tmp_path / "dump", make=episodes)
    rollout, _ = episodes(range(10))
    with Browser() as browser:
        browser.open(report.report([tmp_path / "dump"], tmp_path / "page.html"))
        for _ in range(len(rollout)):
            row, sample_index = shown(browser)
            i = 2 * row + sample_index
            mask = rollout.action_mask_BR[i, : rollout.lengths_B[i]].tolist()
            tokens = "[...document.querySelectorAll('.token[data-part=response]')]"
            assert browser.run(f"{tokens}.map(t => getComputedStyle(t).borderBottomStyle)") == [
                "none" if drawn else "dotted" for drawn in mask
            ]
            assert browser.run("document.querySelectorAll('#sample h3')[1].innerText.includes('fed')") == (not all(mask))
            browser.key("j")
        assert browser.problems == []


# -- episodes ---------------------------------------------------------------------------------------------------------

NASTY = talk("say <b>it</b>", ("<say </script>\u202e>", "Error: \x1b[2J<img src=x onerror='window.hacked = 9'>"), ("<i>done</i>", ""),
             rewards=[0.25, None], state={"seen": ["<b>", 1], "calls": 1})  # fmt: skip


def played_dump(folder):
    samples = samples_of([*CALCULATOR, NASTY], first_row=0)
    made_dump(folder, prompts=5, samples=1, make=lambda call, _: samples.select(list(call)))
    return samples


def test_turns_of_a_dump_are_in_the_page(tmp_path):
    samples = played_dump(tmp_path / "dump")
    held = blobs(report.report([tmp_path / "dump"], tmp_path / "page.html"))
    for row, episode in zip(held["rows-0-0"], samples.texts.episodes, strict=True):
        for shown, turn in zip(row["turns"], episode.turns, strict=True):
            assert {name: shown[name] for name in ("first", "end", "reward", "cut")} == {
                name: getattr(turn, name) for name in ("first", "end", "reward", "cut")
            }
            assert shown["errors"] == list(turn.errors) and len(shown["calls"]) == turn.calls
        assert row["facts"]["ended_by"] == episode.ended_by and row["facts"].get("failure", "") == episode.failure
    assert held["rows-0-0"][1]["turns"][1]["calls"] == ['mul {"of": ["4", "5"]}']
    assert held["rows-0-0"][0]["facts"]["environment_reward"] == 2.5
    bars = {bars["title"]: dict(zip(bars["labels"], bars["counts"], strict=True)) for bars in held["index"]["bars"]}
    assert bars["turns of an episode: dump"] == {"1": 2, "2": 2, "3": 1}
    assert bars["what ends episodes: dump"] == {"policy": 4, "failure": 1}


def test_turns_of_a_run_are_those_of_its_samples(tmp_path):
    samples = samples_of([NASTY])
    line = {"step": 1, "row": 0, "sample": 0, "reward": 0.5, "response_ids": samples.rollout.response_ids[0]}
    line |= {"action_mask": NASTY.mask, "completion": NASTY.response, "episode": NASTY.episode.as_json()}
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "environment/turns": 2.0, "environment/ended_policy": 1.0}\n')
    (tmp_path / "samples.jsonl").write_text(json.dumps(line) + "\n" + json.dumps({**line, "episode": None}) + "\n")
    held = blobs(report.report([tmp_path], tmp_path / "page.html"))
    first, second = held["rows-0-0"]
    assert [turn["first"] for turn in first["turns"]] == [turn.first for turn in NASTY.episode.turns]
    assert first["facts"]["environment"] == {"seen": '["<b>", 1]', "calls": "1"} and second["turns"] == []
    titles = [panel["title"] for panel in held["index"]["panels"]]
    assert titles == ["turns and calls of an episode", "what ends episodes, share"]


@pytest.mark.browser
def test_turns_are_set_off_from_what_the_policy_was_told(tmp_path):
    """Every block holds the tokens of its turn, or those that were fed after it; nothing that was written runs."""
    samples = played_dump(tmp_path / "dump")
    with Browser() as browser:
        browser.open(report.report([tmp_path / "dump"], tmp_path / "page.html"))
        for i, episode in enumerate(samples.texts.episodes):
            assert shown(browser) == (i, 0)
            blocks = "[...document.querySelectorAll('#sample .tokens[data-part=response]')]"
            places = browser.run(f"{blocks}.map(b => [...b.querySelectorAll('.token')].map(t => Number(t.dataset.place)))")
            told = browser.run(f"{blocks}.map(b => b.classList.contains('told'))")
            mask = samples.rollout.action_mask_BR[i].tolist()
            assert [place for block in places for place in block] == list(range(int(samples.rollout.lengths_B[i])))
            assert [{mask[place] for place in block} for block in places] == [{not fed} for fed in told]
            heads = browser.run("[...document.querySelectorAll('#sample h3.turn')].map(h => h.innerText)")
            assert len(heads) == len(episode.turns)
            for head, turn in zip(heads, episode.turns, strict=True):
                assert ("reward" in head) == (turn.reward is not None) and ("of" in head) == bool(turn.calls)
            errors = browser.run("[...document.querySelectorAll('#sample .error')].map(e => e.innerText)")
            wanted = [error.replace("\x1b", "\u27e8U+001B\u27e9") for turn in episode.turns for error in turn.errors]
            assert errors == wanted
            browser.key("ArrowRight")
            assert "position" in browser.run("document.getElementById('tip').innerText")
            browser.key("j")
        assert browser.run("typeof window.hacked") == "undefined" and browser.problems == []
