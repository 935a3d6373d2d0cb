"""The dump command, with real files and real processes: rows against teacher forcing, resume, damage, kills, a full disk."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from steerl.configs.reader import run_command

import numpy as np
import pandas
import psutil
import pytest
import torch
import transformers

from steerl.rollout.common.run_folder import MARKER
from steerl.rollout.dumps import store
from steerl.rollout.dumps.manifest import load_manifest
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.model.policy import ModelSettings, load_policy
from steerl.rollout.scoring.logprobs import teacher_forced
from steerl.rollout.steering import Steering
from steerl.scripts import inspect_rollouts
from steerl.scripts.dump_rollouts import DumpJob, main
from tests import warm
from tests.dumps import flip_bit, truncate
from tests.models import tiny, tiny_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a tokenizer and 250 prompts of several lengths."""
    folder = tmp_path_factory.mktemp("given")
    tiny("gpt2").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    lines = [json.dumps({"prompt": f"say {i} " + "abc " * (i % 6), "answer": i}) for i in range(250)]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    return folder


def flags(given: Path, run: Path, *more: str) -> list[str]:
    return [
        "--config", str(ROOT / "configs" / "dump.yaml"), "--model.path", str(given / "model"),
        "--prompts.path", str(given / "prompts.jsonl"), "--run.dir", str(run), "--sampling.max_new_tokens", "8", *more,
    ]  # fmt: skip


SMALL = ("--prompts.limit", "12", "--sampling.n", "3", "--run.save_every", "9")


def dump(argv: list[str]) -> int:
    try:
        run_command(main, DumpJob, argv)
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def rows_of(run: Path) -> pandas.DataFrame:
    return pandas.concat([pandas.read_parquet(path) for path in sorted(run.glob("*.parquet"))], ignore_index=True)


def files_of(run: Path) -> dict[str, bytes]:
    """Every file's content; of the manifest what does not tell where and by how many processes."""
    found = {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    kept = json.loads(found.pop("manifest.json"))
    for name in ("world_size", "versions", "config"):
        del kept[name]
    return {**found, "manifest.json": json.dumps(kept).encode()}


# -- what is written ----------------------------------------------------------------------------------------------------


def test_every_row_is_what_teacher_forcing_alone_says(given: Path, tmp_path: Path) -> None:
    assert dump(flags(given, tmp_path / "run", *SMALL, "--sampling.temperature", "0.7")) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(given / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "tokenizer")
    frame = rows_of(tmp_path / "run")
    assert list(zip(frame.prompt_index, frame.sample_index, strict=True)) == [(p, s) for p in range(12) for s in range(3)]
    for row in frame.itertuples():
        prompt = f"say {row.prompt_index} " + "abc " * (row.prompt_index % 6)
        assert json.loads(row.prompt) == prompt and json.loads(row.columns) == {"answer": row.prompt_index}
        assert list(row.prompt_ids) == tokenizer(prompt)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([[*row.prompt_ids, *row.response_ids]])).logits[0].double()
        law = torch.log_softmax(logits / 0.7, -1)
        start = len(row.prompt_ids) - 1
        wanted = [float(law[start + t, token]) for t, token in enumerate(row.response_ids)]
        assert np.allclose(row.policy_logprobs, wanted, atol=1e-5) and np.allclose(row.behaviour_logprobs, wanted, atol=1e-5)
        assert row.ended == (row.response_ids[-1] == 2) == (row.stop_reason == "eos") and len(row.response_ids) <= 8
        assert row.response_text == tokenizer.decode(row.response_ids, skip_special_tokens=True)


def test_plain_generate_dumps_the_same_rows(given: Path, tmp_path: Path) -> None:
    more = (*SMALL, "--sampling.top_p", "0.9", "--sampling.stop", "[e]")
    for kind in ("stream", "generate"):
        assert dump(flags(given, tmp_path / kind, *more, "--engine.kind", kind)) == 0
    stream, plain = (rows_of(tmp_path / kind) for kind in ("stream", "generate"))
    for name in stream.columns:
        if name in ("behaviour_logprobs", "policy_logprobs"):
            assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(stream[name], plain[name], strict=True)), name
        elif name == "kept":
            assert all([*map(list, a)] == [*map(list, b)] for a, b in zip(stream[name], plain[name], strict=True))
        else:
            assert all(np.array_equal(a, b) for a, b in zip(stream[name], plain[name], strict=True)), name
    assert load_manifest(tmp_path / "generate")["config"]["engine"]["kind"] == "generate"


def test_the_manifest_says_what_the_dump_was_made_from(given: Path, tmp_path: Path) -> None:
    assert dump(flags(given, tmp_path / "run", *SMALL)) == 0
    kept = load_manifest(tmp_path / "run")
    assert kept["finished"] and kept["world_size"] == 1 and kept["counts"]["rows"] == 36
    assert kept["config"]["sampling"]["n"] == 3 and kept["config"]["model"]["path"] == str(given / "model")
    assert set(kept["fingerprints"]) == {"model.path", "model.tokenizer", "prompts.path", "steering"}
    assert {"torch", "transformers", "git"} <= set(kept["versions"])
    assert [path.name for path in (tmp_path / "run").glob(".*")] == [MARKER] and not (tmp_path / "run" / "records").exists()


def test_two_noisy_sites_on_a_fraction_of_the_rows_under_top_p_are_scored_again_from_the_file_alone(tmp_path: Path) -> None:
    """Whatever seed the second pass has of its own."""
    tiny("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": "one", "much": 0.5}, {"prompt": "and another", "much": 1.5}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0)).tolist()
    sites = [
        {"name": "shake", "at": {"layers": [0]}, "op": {"type": "noise"}, "strength": {"samples": [0.3, 0.2, 0.2, 0.3]}},
        {"name": "push", "at": {"layers": [1]}, "op": {"type": "add"}, "vector": vector, "strength": {"column": "much"}},
    ]
    spec = {"sites": sites, "fraction": 0.5}
    more = ("--sampling.n", "8", "--sampling.top_p", "0.8", "--sampling.seed", "3", "--steering", json.dumps(spec))
    assert dump(flags(tmp_path, tmp_path / "run", *more)) == 0
    policy = load_policy(ModelSettings(path=str(tmp_path / "model")))
    steering = Steering(policy.model, spec, policy.tokenizer, 99)
    [(rollout, _)] = list(store.read_dump(tmp_path / "run"))
    steered_B = (rollout.strength_BK != 0).any(1)
    assert 0 < int(steered_B.sum()) < 16 and rollout.strength_BK.unique(dim=0).shape[0] == 5 and rollout.kept
    assert torch.equal(rollout.strength_BK[steered_B, 0], torch.tensor([0.3, 0.2, 0.2, 0.3])[rollout.sample_B % 4][steered_B])
    with torch.no_grad():
        forced = teacher_forced(policy, rollout, steering=steering)
        other = teacher_forced(policy, dataclasses.replace(rollout, steering_seed=99), steering=steering)
        wide = teacher_forced(policy, dataclasses.replace(rollout, kept=None), steering=steering)
    assert (forced.logprobs_BR - rollout.policy_logprobs_BR).abs().max() < 1e-5
    assert (other.logprobs_BR - rollout.policy_logprobs_BR)[steered_B].abs().max() > 1e-2
    assert (wide.logprobs_BR - rollout.policy_logprobs_BR).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_what_is_read_back_can_be_scored_again(tmp_path: Path, family: str) -> None:
    """For other rooms a dump is as good as the sampler: start ids, temperature, masks and steering travel with it."""
    tiny(family).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "one"}\n{"prompt": "and another"}\n')
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0)).tolist()
    site = {"name": "push", "at": {"layers": [1]}, "op": {"type": "add"}, "vector": vector, "strength": 1.5}
    more = ("--sampling.n", "5", "--sampling.temperature", "0.8", "--steering", json.dumps({"sites": [site]}))
    assert dump(flags(tmp_path, tmp_path / "run", *more)) == 0
    policy = load_policy(ModelSettings(path=str(tmp_path / "model")))
    steering = Steering(policy.model, {"sites": [site]}, policy.tokenizer)
    [(rollout, texts)] = list(store.read_dump(tmp_path / "run"))
    assert rollout.steering == steering.label and rollout.strength_B.tolist() == [1.5] * 10
    assert rollout.temperature == 0.8 and rollout.start_ids == policy.start_ids and len(texts) == 10
    with torch.no_grad():
        forced = teacher_forced(policy, rollout, steering=steering)
        plain = teacher_forced(policy, rollout)
    assert torch.allclose(forced.logprobs_BR, rollout.policy_logprobs_BR, atol=2e-5)
    assert not torch.allclose(plain.logprobs_BR, rollout.policy_logprobs_BR, atol=1e-2)


def test_verify_says_how_far_the_numbers_are_off(given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dump(flags(given, tmp_path / "run", *SMALL, "--verify", "true", "--sampling.top_p", "0.9")) == 0
    assert re.search(
        r"verify: 36 rows, \d+ tokens scored alone in float32: gap at most \S+ nats .* passed", capsys.readouterr().err
    )
    assert (
        dump(flags(given, tmp_path / "run", *SMALL, "--verify", "true", "--sampling.top_p", "0.9", "--run.resume", "true")) == 0
    )
    assert "nothing was sampled, so nothing was checked" in capsys.readouterr().err


@pytest.mark.parametrize("changes", [("--sampling.batch_size", "1"), ("--sampling.batch_size", "7"), ("--run.save_every", "1")])
def test_rows_do_not_depend_on_batches_and_shards(given: Path, tmp_path: Path, changes: tuple[str, str]) -> None:
    argv = ("--prompts.limit", "40", "--sampling.n", "2")
    assert dump(flags(given, tmp_path / "one", *argv)) == dump(flags(given, tmp_path / "two", *argv, *changes)) == 0
    one, two = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    for left, right in zip(one.itertuples(), two.itertuples(), strict=True):
        assert list(left.response_ids) == list(right.response_ids)
        assert np.allclose(left.policy_logprobs, right.policy_logprobs, atol=1e-5)


def test_settings_without_effect_are_said(given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dump(flags(given, tmp_path / "run", *SMALL, "--run.seed", "3")) == 0
    assert "run.seed: has no effect on a dump, sampling.seed has" in capsys.readouterr().err


# -- resume -------------------------------------------------------------------------------------------------------------


def test_changed_settings_weights_and_prompts_are_refused_by_name(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = tmp_path / "given"
    shutil.copytree(given, world)
    run = tmp_path / "run"
    assert dump(flags(world, run, *SMALL)) == 0

    def refused(*more: str) -> list[str]:
        capsys.readouterr()
        assert dump(flags(world, run, *SMALL, "--run.resume", "true", *more)) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.endswith("--run.overwrite true")]
        return [line.split(":")[0] for line in lines]

    assert refused("--sampling.temperature", "0.5") == ["sampling.temperature"]
    assert refused("--sampling.seed", "1", "--sampling.n", "2") == ["sampling.n", "sampling.seed"]
    assert refused("--sampling.stop", "[a]") == ["sampling.stop"]
    assert refused("--prompts.limit", "11") == ["prompts.limit"]
    (world / "prompts.jsonl").write_text((world / "prompts.jsonl").read_text().replace("say 3 ", "say X "))
    assert refused() == ["prompts.path"]
    shutil.copy(given / "prompts.jsonl", world / "prompts.jsonl")
    tiny("gpt2", seed=1).save_pretrained(world / "model")
    assert refused() == ["model.path"]
    shutil.rmtree(world / "model")
    shutil.copytree(given / "model", world / "model")
    assert dump(flags(world, run, *SMALL, "--run.resume", "true")) == 0


def test_resuming_a_finished_dump_changes_nothing(given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = flags(given, tmp_path / "run", *SMALL)
    assert dump([*argv, "--run.resume", "true"]) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert dump([*argv, "--run.resume", "true"]) == 0
    assert "finished already" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert dump(argv) == 2
    assert "--run.resume true or --run.overwrite true" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_shard_and_leaves_with_75(
    given: Path, tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site = {"at": {"layers": [0]}, "op": {"type": "noise"}, "strength": {"samples": [0.0, 0.3, 0.6]}}
    listed = (*SMALL, "--steering", json.dumps({"sites": [site]}))
    assert dump(flags(given, tmp_path / "whole", *listed)) == 0
    assert rows_of(tmp_path / "whole").steering_strength.tolist() == [0.0, np.float32(0.3), np.float32(0.6)] * 12
    calls, sample = [0], Sampler.sample

    def signalled(*given: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            signal.raise_signal(number)
        return sample(*given, **named)

    monkeypatch.setattr(Sampler, "sample", signalled)
    assert dump(flags(given, tmp_path / "run", *listed)) == 75
    told, following = capsys.readouterr().err.splitlines()[-2:]
    assert told.endswith("--run.resume true goes on")
    assert following.startswith("next: ") and following.endswith("--run.resume true")
    assert len(list((tmp_path / "run").glob("rollouts-*.parquet"))) == 2
    assert dump(flags(given, tmp_path / "run", *listed, "--run.resume", "true")) == 0
    assert files_of(tmp_path / "run") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("finished", [True, False])
def test_damaged_shards_are_named_and_made_again(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: bool
) -> None:
    argv, run = flags(given, tmp_path / "run", *SMALL), tmp_path / "run"
    assert dump(argv) == 0
    whole = files_of(run)
    if not finished:  # as a kill leaves it: records, and a manifest that knows no shard yet
        kept = load_manifest(run)
        (run / "records").mkdir()
        for index, record in enumerate(kept["shards"]):
            (run / "records" / f"{index:05d}.json").write_text(json.dumps(record))
        (run / "manifest.json").write_text(json.dumps({**kept, "finished": False, "shards": [], "counts": {}}))
    truncate(run / "rollouts-00000.parquet")
    flip_bit(run / "rollouts-00001.parquet")
    (run / "rollouts-00003.parquet").unlink()
    capsys.readouterr()
    assert dump([*argv, "--run.resume", "true"]) == 0
    said = capsys.readouterr().err
    assert "rollouts-00000.parquet: is damaged" in said and "rollouts-00001.parquet: is damaged" in said
    assert "rollouts-00003.parquet: is missing" in said and "rollouts-00002" not in said
    assert files_of(run) == whole


# -- processes ------------------------------------------------------------------------------------------------------------


def launch(argv: list[str]) -> subprocess.Popen[str]:
    command = warm.accelerate_launch("ddp", "scripts/dump_rollouts.py", *argv)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def kill(launcher: subprocess.Popen[str], whom: str, chance: random.Random) -> None:
    """kill -9 of all processes at once, of the launcher alone, or of one worker; returns when all of them are gone."""
    family = [psutil.Process(launcher.pid), *psutil.Process(launcher.pid).children(recursive=True)]
    alive = [p for p in family[1:] if p.status() != psutil.STATUS_ZOMBIE]  # one may just have done all of its work
    workers = [p for p in alive if "dump_rollouts.py" in " ".join(p.cmdline())]
    for victim in {"all": family, "launcher": family[:1], "worker": [chance.choice(workers or family)]}[whom]:
        victim.send_signal(signal.SIGKILL)
    launcher.communicate()
    psutil.wait_procs(family, timeout=60)
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family)


def killed_and_resumed(given: Path, tmp_path: Path, kills: int, seed: int, targets: tuple[str, ...] = ()) -> None:
    """Without `targets` both ranks are killed, and no launcher is there."""
    argv = flags(given, tmp_path / "killed", "--sampling.n", "8", "--run.save_every", "40")
    assert dump(flags(given, tmp_path / "whole", "--sampling.n", "8", "--run.save_every", "40")) == 0
    run, chance = tmp_path / "killed", random.Random(seed)
    marks = sorted(chance.randrange(0, 49) for _ in range(kills))
    for mark in marks:
        again = [*argv, "--run.resume", "true"]
        launcher = launch(again) if targets else None
        ranks = [] if launcher else warm.start_ranks("scripts/dump_rollouts.py", *again)

        def running(processes: list[Any]) -> bool:
            return all(process.poll() is None for process in processes)

        # Random instants of the work: from the moment the manifest is there, at a random number of shards, and a bit on.
        while running(ranks or [launcher]) and not (run / "manifest.json").exists():
            time.sleep(0.01)
        while running(ranks or [launcher]) and len(list((run / "records").glob("[0-9]*"))) < mark:
            time.sleep(0.001)
        time.sleep(chance.random() * 0.1)
        for rank in ranks:
            rank.kill()
        assert all(rank.wait() in (0, -signal.SIGKILL) for rank in ranks)
        if launcher and launcher.poll() is None:
            kill(launcher, chance.choice(targets), chance)
    last = warm.run_ranks("scripts/dump_rollouts.py", *argv, "--run.resume", "true")
    assert last.returncode == 0, last.stderr
    assert "2,000 rows" in last.stdout
    assert load_manifest(run)["world_size"] == 2
    assert files_of(run) == files_of(tmp_path / "whole")


@pytest.mark.slow
def test_five_kills_on_two_processes_lose_double_and_change_no_row(given: Path, tmp_path: Path) -> None:
    killed_and_resumed(given, tmp_path, kills=5, seed=17)


@pytest.mark.proofs
def test_thirty_kills_of_anyone_lose_double_and_change_no_row(given: Path, tmp_path: Path) -> None:
    for seed in range(5):
        killed_and_resumed(given, tmp_path / str(seed), kills=6, seed=seed, targets=("all", "launcher", "worker"))


# -- a full disk ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_full_disk_is_one_clear_line_and_the_job_goes_on_after_space_is_made(given: Path, tmp_path: Path) -> None:
    """A small tmpfs in a mount namespace of the test's own, so that nothing outlives it."""
    can = subprocess.run(["unshare", "-rm", "true"], capture_output=True) if shutil.which("unshare") else None
    if can is None or can.returncode:
        pytest.skip("no right to mount a file system")
    disk, run = tmp_path / "disk", tmp_path / "disk" / "run"
    disk.mkdir()
    argv = ["--sampling.n", "8", "--run.resume", "true"]
    job = " ".join([sys.executable, "scripts/dump_rollouts.py", *flags(given, run, *argv)])
    script = f"""
        mount -t tmpfs -o size=600k tmpfs {disk} || exit 77
        dd if=/dev/zero of={disk}/ballast bs=1k count=300 status=none
        {job}; echo "first $?"; ls -a {run}
        cp -r {run} {tmp_path}/saved
    """
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, cwd=ROOT)
    if done.returncode == 77:
        pytest.skip("no right to mount a file system")
    said, _, left = done.stdout.partition("first 2")
    assert said == "" and left
    assert re.search(r"run/rollouts-\d+.parquet: cannot be written: .*No space left on device; free some space", done.stderr)
    assert "Traceback" not in done.stderr and ".tmp" not in left
    assert dump(flags(given, tmp_path / "saved", *argv)) == 0
    assert dump(flags(given, tmp_path / "whole", "--sampling.n", "8")) == 0
    assert files_of(tmp_path / "saved") == files_of(tmp_path / "whole")


# -- at length ----------------------------------------------------------------------------------------------------------------


@pytest.mark.proofs
def test_a_hundred_thousand_rows_in_flat_memory(given: Path, tmp_path: Path) -> None:
    """Prints the rate beside plain `model.generate` of the same prompts, and the memory along the way, for docs/log.

    CPU time, one thread: what else runs on the machine does not count."""
    lines = (json.dumps({"prompt": f"say {i} " + "abc " * (i % 6)}) for i in range(12_500))
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    argv = flags(
        given, tmp_path / "run", "--sampling.n", "8", "--sampling.batch_size", "256", "--sampling.max_new_tokens", "16"
    )
    argv[argv.index("--prompts.path") + 1] = str(tmp_path / "prompts.jsonl")
    job = subprocess.Popen([sys.executable, "scripts/dump_rollouts.py", *argv], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    memory: list[tuple[int, float]] = []
    seconds = 0.0
    assert job.stderr is not None
    for line in job.stderr:
        if found := re.match(r"rollouts: ([\d,]+) of", line):
            print(line.rstrip())
            memory.append((int(found[1].replace(",", "")), psutil.Process(job.pid).memory_info().rss / 2**20))
            seconds = sum(psutil.Process(job.pid).cpu_times()[:2])
    assert job.wait() == 0
    kept = load_manifest(tmp_path / "run")
    tokens = kept["counts"]["tokens"]
    assert kept["counts"]["rows"] == 100_000
    print(f"dump: {tokens:,} tokens in {seconds:.0f} s of CPU time, {tokens / seconds:,.0f} tokens/s with start and files")
    print("memory, MB at rows:", ", ".join(f"{size:.0f} at {rows:,}" for rows, size in memory[::4]))
    early, late = memory[2][1], memory[-1][1]
    assert late < 1.1 * early
    found = inspect_rollouts.inspect(tmp_path / "run")
    assert found.whole and found.rows == 100_000
    assert sum(len(rollout) for rollout, _ in store.read_dump(tmp_path / "run")) == 100_000
    plain_generate(given)


def plain_generate(given: Path) -> None:
    """transformers alone: the same model, 256 rows at once, sampling without log-probs."""
    model = transformers.AutoModelForCausalLM.from_pretrained(given / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(given / "model", padding_side="left")
    tokens, began = 0, time.process_time()
    for call in range(20):
        texts = [f"say {i} " + "abc " * (i % 6) for i in range(32 * call, 32 * call + 32) for _ in range(8)]
        inputs = tokenizer(texts, return_tensors="pt", padding=True)
        with torch.no_grad():
            out = model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=16)
        said = out[:, inputs["input_ids"].shape[1] :]
        ends = (said == 2).cumsum(1)
        tokens += int(((ends == 0) | ((ends == 1) & (said == 2))).sum())
    seconds = time.process_time() - began
    print(
        f"plain generate, no log-probs, no files: {tokens:,} tokens in {seconds:.0f} s of CPU, {tokens / seconds:,.0f} tokens/s"
    )


def test_prompts_that_are_cut_are_counted_over_a_resume(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    argv = flags(given, run, *SMALL, "--prompts.max_tokens", "13")
    assert dump(argv) == 0
    texts = [json.loads(line)["prompt"] for line in (given / "prompts.jsonl").read_text().splitlines()][:12]
    cut = sum(len(text) > 13 for text in texts)
    said = capsys.readouterr()
    assert said.out.splitlines()[-2] == f"{run}: 36 rows in 4 shards; {cut} of 12 prompts were cut to 13 tokens"
    assert f"{cut} of the 12 prompts" in caplog.text and 0 < cut < 12
    (run / "rollouts-00002.parquet").unlink()
    assert dump([*argv, "--run.resume", "true"]) == 0
    assert load_manifest(run)["counts"]["cut_prompts"] == cut
