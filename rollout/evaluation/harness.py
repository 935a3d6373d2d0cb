"""The model `steerl` of lm-evaluation-harness: importing this file registers it there.

    import steerl.rollout.evaluation.harness
    lm_eval.simple_evaluate(model="steerl", model_args={"path": DIR, "steering": SPEC}, tasks=[...])
    SteerlLM(policy, steering=steering)          of objects in hand

Requests mean what they mean to the harness's own HFLM: how texts become ids, where they are cut, where windows begin.
"""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text, resolve_max_length

from steerl.rollout.common import processes
from steerl.rollout.common.errors import ConfigError, DataError
from steerl.rollout.common.progress import Progress
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.decoding.stops import can_spell
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.evaluation.answers import Answer, Pair, generations, likelihoods, row_key
from steerl.rollout.evaluation.settings import AnswerSettings, Arguments, Spec, read_arguments, steering_of
from steerl.rollout.model.policy import Policy, load_policy
from steerl.rollout.prompts.chat import TEMPLATE_ERRORS
from steerl.rollout.steering import Steering

_logger = logging.getLogger(__name__)

DRAWN = ("temperature", "top_p", "top_k", "min_p")
KNOWN = ("until", "max_gen_toks", "do_sample", *DRAWN, "repetition_penalty", "no_repeat_ngram_size")
"""Of a task's generation_kwargs; other names of the limit are max_gen_toks by then."""
NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}
"""What other models are told, and holds here."""
Draws = Callable[[Sampling, Any], Any]


@register_model("steerl")
class SteerlLM(TemplateLM):
    """A policy as the harness sees a model."""

    def __init__(
        self,
        path: str | Policy = "",
        *,
        steering: Spec | Steering | None = None,
        answers: AnswerSettings | None = None,
        draws: Draws | None = None,
        device: str | torch.device | None = None,
        max_batch_size: int | None = None,
        **arguments: Any,
    ):
        """A path, with `arguments` as settings.Arguments has them, or a policy with its `answers`. `draws` makes what draws
        from (sampling, steering): another engine's sampler."""
        super().__init__()
        me = processes.start()
        self._rank, self._world_size = me.rank, me.world_size
        if isinstance(path, Policy):
            self.policy = path
            self.answers = answers or AnswerSettings(**arguments)
        else:
            self.answers = read = read_arguments({**arguments, **({"path": path} if path else {})})
            assert isinstance(read, Arguments)
            # The harness's command line says cuda where nobody says anything.
            elsewhere = me.world_size > 1 or (str(device).startswith("cuda") and not torch.cuda.is_available())
            self.policy = load_policy(read, me.device if device is None or elsewhere else device)
        made = steering is None or isinstance(steering, Steering)
        self.steering: Any = steering if made else steering_of(self.policy, steering, self.answers.seed)  # type: ignore[arg-type]
        self.draws = draws or (lambda sampling, steering: Sampler(self.policy, sampling, steering))
        self.tokenizer = self.policy.tokenizer
        self.backend = self.policy.kind
        self._device = self.policy.device

    # -- what the harness asks of a model ----------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id if self.tokenizer.eos_token_id is not None else self.policy.pad_id)

    @property
    def prefix_token_id(self) -> int:
        given, bos = self.answers.prefix_token_id, self.tokenizer.bos_token_id
        return given if given is not None else bos if bos is not None else self.eot_token_id

    @property
    def max_length(self) -> int:
        if self.answers.max_length is not None:
            return self.answers.max_length
        limit = int(resolve_max_length(self.policy.core.config, self.tokenizer))
        return limit if self.policy.token_budget is None else min(limit, self.policy.token_budget)

    @property
    def max_gen_toks(self) -> int:
        return 256

    @property
    def batch_size(self) -> int:
        return self.answers.batch_size

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.tensor(processes.gather_objects([tensor.tolist()]), device=tensor.device)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        assert dst == 0, "the main process gathers"
        found = processes.gather_to_main([obj])
        return found if self.rank == dst else None

    def barrier(self) -> None:
        processes.barrier()

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise ConfigError("apply_chat_template: the tokenizer has no chat template; leave it out, or save one with it")
        thinking = self.answers.enable_thinking
        how: dict[str, Any] = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
            **({} if thinking is None else {"enable_thinking": thinking}),
        }
        try:
            return str(self.tokenizer.apply_chat_template(chat_history, **how))
        except TEMPLATE_ERRORS as error:
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise DataError(f"chat template: {error}") from error
            _logger.warning("the chat template takes no system message (%s); it is left out", error)
            return str(self.tokenizer.apply_chat_template(rest, **how))

    def get_model_info(self) -> dict[str, Any]:
        core = self.policy.core
        steering = {"steering": self.steering.label} if self.steering is not None else {}
        return {"model_num_parameters": core.num_parameters(), "model_dtype": str(core.dtype), **steering}

    # -- texts and ids -----------------------------------------------------------------------------------------------------

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        special = add_special_tokens if add_special_tokens is not None else self.answers.add_bos_token
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            special = False
        how = {} if special is None else {"add_special_tokens": special}
        return [int(i) for i in self.tokenizer.encode(string, **how)]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        before, after = super()._encode_pair(context, continuation)
        if not after and continuation:  # it has become part of the context's last token
            after = self.tok_encode(continuation, add_special_tokens=False)
        return before or [self.prefix_token_id], after

    # -- log-likelihoods -----------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[Answer]:
        limit, pairs, cut = self.max_length, [], 0
        for _, context, response in requests:
            self._check_response(response, limit)
            room = limit if self.policy.is_seq2seq else limit + 1 - len(response)  # the last token is never read
            cut += len(context) > room
            pairs.append(Pair(context[-room:], response, len(response), row_key(context)))
        if cut:
            _logger.warning("%d contexts are longer than the %d tokens that fit; cut on the left", cut, limit)
        return self._answered("log-likelihoods", pairs, [strings for strings, _, _ in requests], disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        pairs: list[Pair] = []
        texts: list[int] = []
        for number, (text,) in enumerate(request.args for request in requests):
            ids = self.tok_encode(text)
            windows = utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            for context, response in map(utils.make_disjoint_window, windows):
                pairs.append(self._window(list(context), list(response), row_key(ids)))
                texts.append(number)
        totals = [0.0] * len(requests)
        for number, (total, _) in zip(texts, self._answered("rolling log-likelihoods", pairs, None, disable_tqdm), strict=True):
            totals[number] += total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _window(self, context: list[int], response: list[int], row: int) -> Pair:
        """What a window brings along from the one before is response, too, where a steering tells it from a prompt."""
        if self.steering is None or self.policy.is_seq2seq:
            return Pair(context, response, len(response), row)
        return Pair(context[:1], [*context[1:], *response], len(response), row)

    def _check_response(self, response: list[int], limit: int) -> None:
        decoder = self.policy.decoder_context
        most = limit if decoder is None else min(limit, decoder - len(self.policy.start_ids) + 1)
        if len(response) > most:
            raise DataError(
                f"a continuation has {len(response)} tokens, more than the {most} that the model takes; "
                "evaluate such texts with a task of output_type loglikelihood_rolling"
            )

    def _answered(self, what: str, pairs: list[Pair], strings: list[Any] | None, quiet: bool) -> list[Answer]:
        found: list[Answer] = [(0.0, True)] * len(pairs)
        answers = likelihoods(self.policy, pairs, self.steering, self.answers.batch_size, self.answers.batch_tokens)
        for at, answer in self._shown(answers, what, len(pairs), quiet):
            found[at] = answer
            if strings is not None and strings[at] is not None:
                self.cache_hook.add_partial("loglikelihood", strings[at], answer)
        return found

    def _shown(self, passes: Iterable[list[Any]], what: str, count: int, quiet: bool) -> Iterator[Any]:
        progress = Progress(what, count, None if quiet or self.rank else sys.stderr)
        for answers in passes:
            yield from answers
            progress.add(len(answers))
        progress.close()

    # -- generations -----------------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for at, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(at)
        for places in groups.values():
            given = requests[places[0]].args[1]
            sampling, until = self._sampling(given)
            prompts = self._prompts([requests[at].args[0] for at in places], sampling.max_new_tokens)
            made = generations(self.policy, prompts, sampling, self.steering, self.draws, self.answers.batch_tokens)
            for i, ids in self._shown(made, "generations", len(places), disable_tqdm):
                at = places[i]
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                texts[at] = postprocess_generated_text(text, until, self.answers.think_end_token or None)
                self.cache_hook.add_partial("generate_until", (requests[at].args[0], given), texts[at])
        return texts

    def _prompts(self, contexts: list[str], new: int) -> list[tuple[list[int], int]]:
        """Ids, cut so that `new` tokens fit, and what the row is keyed by: the same request again is another sample."""
        room = self.max_length if self.policy.is_seq2seq else self.max_length - new
        if room < 1:
            raise ConfigError(
                f"gen_kwargs: max_gen_toks {new} leaves no room for a prompt in the model's {self.max_length} tokens; "
                "give {max_gen_toks: N} of less"
            )
        seen: Counter[str] = Counter()
        prompts: list[tuple[list[int], int]] = []
        cut = 0
        for context in contexts:
            ids = self.tok_encode(context) or [self.prefix_token_id]
            cut += len(ids) > room
            prompts.append((ids[-room:], row_key(ids, seen[context])))
            seen[context] += 1
        if cut:
            _logger.warning(
                "%d prompts are longer than the %d tokens that fit beside %d new ones; cut on the left", cut, room, new
            )
        return prompts

    def _sampling(self, given: dict[str, Any]) -> tuple[Sampling, list[str]]:
        """A task's generation_kwargs as ours; and where its texts end."""
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        strange = [name for name, value in kwargs.items() if name not in KNOWN and NEUTRAL.get(name) != value]
        if strange:
            raise ConfigError(f"gen_kwargs: {', '.join(strange)}: not known here; there are {', '.join(KNOWN)}")
        until = [text for text in kwargs["until"] if text]
        if self.tokenizer.eos_token and self.tokenizer.eos_token not in until:
            until.append(self.tokenizer.eos_token)
        settings = {name: kwargs[name] for name in KNOWN[3:] if kwargs.get(name) is not None}
        greedy = not kwargs["do_sample"]
        if greedy:
            settings = {name: value for name, value in settings.items() if name not in DRAWN}
        sampling = Sampling(
            max_new_tokens=kwargs["max_gen_toks"],
            stop=[text for text in until if can_spell(self.tokenizer, text)],
            greedy=greedy,
            replay_mask=None if greedy else False,
            seed=self.answers.seed,
            batch_size=self.answers.batch_size,
            **settings,
        )
        return sampling, until
