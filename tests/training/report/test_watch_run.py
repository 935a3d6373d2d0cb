"""The live page in a real browser while real PPO runs go on: they begin, grow, are killed, go on and end."""

from __future__ import annotations

import json
import sys

import pytest

from tests import warm
from tests.browser import Browser
from tests.models import tiny, tiny_tokenizer
from tests.training.report.test_watch import address, serving, until

STEPS = 16
REWARD = """
def vowels(prompts, completions, log_metric=None, **columns):
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in completions]
"""


@pytest.fixture
def job(tmp_path):
    tiny("gpt2", 0).save_pretrained(tmp_path / "model")
    tiny_tokenizer(64).save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {word}"}) + "\n" for word in "abcdefg"))
    (tmp_path / "reward.py").write_text(REWARD)
    reward = [{"name": "vowels", "kind": "function", "function": f"{tmp_path / 'reward.py'}:vowels"}]

    def start(name, *flags):
        return warm.start(
            [
                *(sys.executable, "scripts/train_ppo.py", "--model.path", tmp_path / "model", "--reward", json.dumps(reward)),
                *(
                    "--prompts.path",
                    tmp_path / "prompts.jsonl",
                    "--run.dir",
                    tmp_path / "runs" / name,
                    "--ppo.steps",
                    str(STEPS),
                ),
                *("--sampling.max_new_tokens", "6", "--ppo.rollouts_per_step", "8", "--ppo.micro_batch_size", "4"),
                *(
                    "--ppo.minibatches",
                    "2",
                    "--ppo.eval_prompts",
                    "2",
                    "--ppo.eval_every",
                    "5",
                    "--run.save_every",
                    "4",
                    *flags,
                ),
            ]
        )

    return start


@pytest.mark.browser
def test_real_runs_are_followed_from_their_first_step_to_their_end(job, tmp_path):
    def points(name, kind="label", key="reward/mean"):
        label = f"{key} \u00b7 {name}" if twice else key
        path = f"document.querySelector('path[data-{kind}=\"{label}\"]')"
        return f"({path}?.getAttribute('d').match(/{'[ML]' if kind == 'label' else 'M'}/g)?.length ?? 0)"

    def state(number):
        return f"(document.querySelectorAll('.state')[{number}]?.textContent ?? '')"

    twice = False
    first = job("first")
    while not (tmp_path / "runs" / "first" / "metrics.jsonl").exists():
        assert first.poll() is None, first.communicate()
    with serving(tmp_path / "runs") as server, Browser() as browser:
        browser.open(address(server))
        until(browser, f"{points('first')} >= 2 && /^(starting|running), step \\d+ of {STEPS}/.test({state(0)})")
        seen = browser.run(points("first"))
        until(browser, f"{points('first')} >= {seen + 2} && document.querySelectorAll('#list li').length > 0")
        until(browser, f"{points('first')} >= 6")
        first.kill()
        first.communicate()
        until(browser, f"{state(0)}.startsWith('died, step')")
        twice = True
        second = job("second")
        until(browser, f"{points('second')} >= 2 && {state(1)}.startsWith('running')")
        _, said = second.communicate()
        assert second.returncode == 0, said
        until(browser, f"{points('second')} === {STEPS} && {state(1)}.startsWith('finished, step {STEPS}')")
        # the evaluations: before the first step, after each fifth, after the last
        assert browser.run(points("second", "of", "eval/reward")) == len({0, 5, 10, 15, STEPS})
        again = job("first", "--run.resume", "true")
        _, said = again.communicate()
        assert again.returncode == 0, said
        until(browser, f"{points('first')} === {STEPS} && {state(0)}.startsWith('finished')")
        stored = [json.loads(line) for line in (tmp_path / "runs" / "first" / "metrics.jsonl").read_text().splitlines()]
        held = "[...page.runs[0].series.get('reward/mean').values]"
        assert browser.run(held) == [line["reward/mean"] for line in stored]
        samples = [json.loads(line) for line in (tmp_path / "runs" / "first" / "samples.jsonl").read_text().splitlines()]
        assert browser.run("[page.runs[0].heads.row, page.runs[0].heads.step]") == [
            [s["row"] for s in samples],
            [s["step"] for s in samples],
        ]
        browser.run("document.getElementById('run').value = 0; document.getElementById('run').onchange()")
        until(browser, f"document.querySelector('.facts').innerText.startsWith('step {STEPS}')")
        assert browser.problems == []
