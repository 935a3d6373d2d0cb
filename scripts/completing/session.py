"""A policy that is asked in a terminal: completions side by side with steered ones, episodes, a chat."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from steerl.rollout.analysis.verify import verify
from steerl.rollout.chat import episodes
from steerl.rollout.chat.completion import Completed, check_dialog, check_sampling, complete, raw_logprobs
from steerl.rollout.chat.confidence import Confidence, confidence
from steerl.rollout.chat.terminal import (
    EARS,
    Live,
    Piece,
    columns,
    interruptible,
    legend,
    paint,
    pieces_of,
    visible,
    wants_color,
)
from steerl.rollout.common import processes
from steerl.rollout.common.errors import UserError
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.sampler import Sampler, drawing
from steerl.rollout.engines.vllm.sampler import ServerSampler, server_of
from steerl.rollout.environments.environment import Environment, environment_of
from steerl.rollout.environments.sampler import EpisodeSampler
from steerl.rollout.episodes import Turn
from steerl.rollout.model.policy import Policy, load_policy
from steerl.rollout.prompts.chat import Speller, conversation_ids, text_ids, text_of
from steerl.rollout.prompts.prompts import PromptBatch, load_prompts
from steerl.rollout.steering import Steering, load_spec
from steerl.rollout.types import Samples
from steerl.scripts.completing.settings import CompleteJob


@dataclass(frozen=True)
class Asked:
    """One prompt: as read, and as ids."""

    prompt: Any
    ids: list[int]
    row: dict[str, Any] = field(default_factory=dict)
    """The data's other columns."""


class Session:
    """A policy, how it is asked, and where its answers are shown."""

    def __init__(self, job: CompleteJob, policy: Policy, ending: contextlib.ExitStack):
        self.job, self.policy, self.speller = job, policy, Speller(policy.tokenizer)
        spec = load_spec(job.steering) if job.steering else None
        self.steering = Steering(policy.model, spec, policy.tokenizer, job.sampling.seed) if spec is not None else None
        if self.steering is not None and drawing(self.steering) is None:
            raise UserError("steering.role: preventative acts on no completion, only while PPO learns; set it to policy")
        self.server = None
        if job.engine.kind == "vllm":
            self.server = ending.enter_context(server_of(policy, self.steering, job.engine))
        self.color = wants_color(sys.stdout) if job.color == "auto" else job.color == "always"

    # -- asking -----------------------------------------------------------------------------------------------------------

    def answer(self, asked: list[Asked], step: int = 0, first: int = 0, live: Live | None = None) -> list[list[Completed]]:
        """For each prompt the plain completion and, with steering, the steered one."""
        ids, rows = [one.ids for one in asked], range(first, first + len(asked))
        asked_as: dict[str, Any] = {"logprobs": True, "step": step, "rows": rows, "on_token": live, "draws": self.draws}
        found = [
            complete(self.policy, ids, self.job.sampling, steering=steering, **asked_as)
            for steering in ([None, self.steering] if self.steering else [None])
        ]
        return [list(pair) for pair in zip(*found, strict=True)]

    def draws(self, sampling: Sampling, steering: Steering | None) -> Sampler | ServerSampler:
        if self.server is not None:
            return ServerSampler(self.server, sampling, steering)
        return Sampler(self.policy, sampling, steering, self.job.engine)

    def stream(self, one: Asked, step: int = 0) -> tuple[str, bool]:
        """Show a completion as it comes (JSON, and two side by side, when whole). Its text, and whether it was interrupted."""
        if self.steering or self.job.json or self.job.engine.kind != "stream":
            text = ""
            with interruptible() as state:
                found = self.answer([one], step)[0]
                self.show(one, found)
                text = found[-1].text
            return text, state.interrupted
        sampling = self.job.sampling
        ends = [*self.policy.eos_ids, *sampling.stop_ids]
        live = Live(self.policy.tokenizer, lambda piece: say(self.paint(piece)), ends, sampling.stop, self.before(one.ids))
        done = None
        with interruptible() as state:
            done = self.answer([one], step, live=live)[0][0]
        live.end(None if done is None else done.text)
        say("\n")
        if done is not None:
            self.report([done])
        return live.written, state.interrupted

    # -- showing ----------------------------------------------------------------------------------------------------------

    def show(self, one: Asked, done: list[Completed]) -> None:
        if self.job.json:
            say(json.dumps(self.record(one, done), ensure_ascii=False) + "\n")
        elif len(done) == 1:
            say(self.painted(done[0]) + "\n")
        else:
            assert self.steering is not None
            sides = [(head, self.pieces(each)) for head, each in zip(("unsteered", self.steering.label), done, strict=True)]
            width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
            say("\n".join(columns(sides[0], sides[1], width or 80, self.color)) + "\n")
        self.report(done)

    def report(self, done: list[Completed]) -> None:
        for each, steering in zip(done, (None, self.steering), strict=False):
            if self.job.logprobs and not self.job.json:
                self.tell(each)
            if self.job.verify and each.rollout is not None:
                for line in verify(self.policy, each.rollout, self.job.sampling, steering=steering).lines():
                    print(line, file=sys.stderr)

    def tell(self, done: Completed) -> None:
        """A line per token, and the report."""
        if self.color:
            say(legend() + "\n")
        for token, logprob in zip(self.tokens(done), done.logprobs or [], strict=True):
            say(f"{logprob:10.4f}  {token!r}\n")
        say("\n".join(self.confidence(done).lines()) + "\n")

    def confidence(self, done: Completed) -> Confidence:
        return confidence(self.tokens(done), done.logprobs or [], self.job.least, self.job.below)

    def tokens(self, done: Completed) -> list[str]:
        return [self.speller.token(token) for token in done.ids]

    def pieces(self, done: Completed) -> list[Piece]:
        return self.cut_pieces(done.text, done.ids, done.logprobs or [], self.before(done.prompt_ids))

    def cut_pieces(self, text: str, ids: list[int], logprobs: list[float], before: list[int]) -> list[Piece]:
        """As long as `text`: what matched a stop string is left out."""
        pieces, room = [], len(text)
        for piece in pieces_of(self.policy.tokenizer, ids, logprobs, before):
            pieces.append(Piece(piece.text[:room], piece.logprob))
            room = max(room - len(piece.text), 0)
        return pieces

    def before(self, prompt_ids: list[int]) -> list[int]:
        """What a completion's text goes on from; nothing for an encoder-decoder."""
        return [] if self.policy.is_seq2seq else prompt_ids

    def painted(self, done: Completed) -> str:
        return "".join(self.paint(piece) for piece in self.pieces(done))

    def paint(self, piece: Piece) -> str:
        return paint(piece, self.color, raw=not sys.stdout.isatty())

    def record(self, one: Asked, done: list[Completed]) -> dict[str, object]:
        def of(each: Completed) -> dict[str, object]:
            sure = self.confidence(each)
            chat = not isinstance(one.prompt, str)
            return {
                "generation": {"role": "assistant", "content": each.text} if chat else each.text,
                "ids": each.ids,
                "tokens": self.tokens(each),
                "logprobs": each.logprobs,
                "stop_reason": each.stop_reason,
                "average_logprob": sure.average_logprob,
                "perplexity": sure.perplexity,
                "least_certain": [{**vars(token), "probability": token.probability} for token in sure.least_certain],
                "under": {"probability": sure.below, "count": len(sure.under)},
            }

        record = {"prompt": one.prompt, **of(done[0])}
        if self.steering:
            record["steered"] = {"steering": self.steering.label, **of(done[1])}
        return record

    # -- episodes ---------------------------------------------------------------------------------------------------------

    def watch(self, environment: Environment, asked: list[Asked], first: int) -> None:
        """Play an episode of each prompt, without and with the steering."""
        ids, prompts, rows = zip(*((one.ids, one.prompt, one.row) for one in asked), strict=True)
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        batch = PromptBatch([*ids], [*range(first, first + len(asked))], [*prompts], [""] * len(asked), columns)
        for steering in [None, self.steering] if self.steering else [None]:
            samples = EpisodeSampler(self.draws(self.job.sampling, steering), environment).sample(batch)
            logprobs = raw_logprobs(self.policy, samples.rollout, self.job.sampling, steering).tolist()
            label = {"steering": steering.label if steering else None} if self.steering else {}
            for i, numbers in enumerate(logprobs):
                if self.job.json:
                    record = episodes.record(samples, i, numbers, self.speller)
                    say(json.dumps(label | record, ensure_ascii=False) + "\n")
                else:
                    told = episodes.lines(samples, i, partial(self.turn, samples, i, numbers))
                    say("".join(f"{line}\n" for line in [*(f"{name or 'unsteered'}:" for name in label.values()), *told]))

    def turn(self, samples: Samples, i: int, logprobs: list[float], turn: Turn) -> str:
        ids, part = samples.rollout.response_ids[i], slice(turn.first, turn.end)
        before = [*samples.rollout.prompt_ids[i], *ids[: turn.first]]
        return "".join(self.paint(piece) for piece in self.cut_pieces(turn.text, ids[part], logprobs[part], before))

    # -- chat -------------------------------------------------------------------------------------------------------------

    def chat(self) -> None:
        """Line by line until the end of input. Ctrl-C stops an answer, or clears the line; /new begins a new dialog."""
        is_chat = bool(getattr(self.policy.tokenizer, "chat_template", None))
        begin = [{"role": "system", "content": self.job.system}] if self.job.system else []
        hint = "Ctrl-C stops an answer, Ctrl-D leaves" + (", /new begins a new dialog" if is_chat else "")
        print(hint + ("" if is_chat else "; no chat template, so every line is a text to go on from"), file=sys.stderr)
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  line editing, and widths right for wide characters
        with EARS.deaf():
            self.turns(is_chat, begin)

    def turns(self, is_chat: bool, begin: list[Any]) -> None:
        dialog, turn = list(begin), 0
        while True:
            try:
                with EARS.listening():
                    line = input("> ")
            except KeyboardInterrupt:
                say("\n")
                continue
            except EOFError:
                say("\n")
                return
            if line.strip() == "/new":
                dialog = list(begin)
            elif line.strip():
                turn += 1
                asked = [*dialog, {"role": "user", "content": line}] if is_chat else line
                try:
                    text, _ = self.stream(ask(self.policy, asked), step=turn)
                except UserError as problem:
                    print("\n".join(problem.lines), file=sys.stderr)
                    continue  # the dialog stands as it was
                except KeyboardInterrupt:  # between the block that hears it and its own except
                    continue
                if is_chat:
                    dialog = [*asked, {"role": "assistant", "content": text}]


def ask(policy: Policy, prompt: Any) -> Asked:
    if isinstance(prompt, str):
        return Asked(prompt, text_ids(policy, prompt))
    check_dialog(prompt)
    if not getattr(policy.tokenizer, "chat_template", None):
        raise UserError(
            "chat: the tokenizer has no chat template; give texts without --chat, or save a template with the tokenizer"
        )
    return Asked(prompt, conversation_ids(policy.tokenizer, prompt))


def say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def read_prompts(job: CompleteJob, policy: Policy) -> list[Asked]:
    """What the job asks for in one go; nothing where it is a chat."""
    texts: list[object] = list(job.prompt)
    rows: list[dict[str, Any]] = []
    if isinstance(job.prompts.path, str) and job.prompts.path.endswith(".txt"):
        path = Path(job.prompts.path)
        if not path.is_file():
            raise UserError(f"prompts.path: {path} does not exist; check the path")
        texts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    elif job.prompts.path:
        prompts = load_prompts(job.prompts, policy, job.sampling.max_new_tokens, once="steerl complete")
        batch = prompts.batch(range(len(prompts)))
        columns = batch.columns | {batch.column: batch.prompts}
        rows = [{name: column[i] for name, column in columns.items()} for i in range(len(batch))]
        if not job.chat:
            return [Asked(*each) for each in zip(batch.prompts, batch.ids, rows, strict=True)]
        texts = batch.prompts
    elif not texts and not sys.stdin.isatty():
        texts = [sys.stdin.read().rstrip("\n")]
        if not texts[0]:
            raise UserError('prompt: missing; give one, steerl complete --model.path DIR "prompt"')
    if job.chat:
        begin = [{"role": "system", "content": job.system}] if job.system else []
        texts = [text if isinstance(text, list) else [*begin, {"role": "user", "content": text}] for text in texts]
    rows = rows or [{} for _ in texts]
    return [replace(ask(policy, text), row=row) for text, row in zip(texts, rows, strict=True)]


def run(job: CompleteJob, ending: contextlib.ExitStack) -> None:
    policy = load_policy(job.model, processes.start().device)
    asked = read_prompts(job, policy)
    session = Session(job, policy, ending)
    environment = ending.enter_context(environment_of(job.environment, policy))
    if environment is not None:
        if not asked:
            raise UserError("prompt: missing; an episode begins with one: give a text, or --prompts.path")
        if environment.pool.kind != "gym" and any(isinstance(one.prompt, str) for one in asked):
            raise UserError("environment: tools need conversations; add --chat true")
        check_sampling(job.sampling)
        for start in range(0, len(asked), size := job.sampling.batch_size):
            session.watch(environment, asked[start : start + size], start)
    elif not asked:
        session.chat()
    elif len(asked) == 1 and not job.json:
        if session.stream(asked[0])[1]:
            raise SystemExit(130)
    else:
        with interruptible() as state:
            show_all(session, asked)
        if state.interrupted:
            say("\n")
            raise SystemExit(130)


def show_all(session: Session, asked: list[Asked]) -> None:
    """Batch by batch, each prompt above its completion in a terminal."""
    size = session.job.sampling.batch_size
    for start in range(0, len(asked), size):
        part = asked[start : start + size]
        for one, done in zip(part, session.answer(part, first=start), strict=True):
            if sys.stdout.isatty() and not session.job.json:
                say(f"> {visible(one.prompt if isinstance(one.prompt, str) else text_of(one.prompt[-1].get('content')))}\n")
            session.show(one, done)
