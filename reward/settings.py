"""What a user may say of rewards, texts and selections, checked before anything of it is imported or opened.

A kind's settings stand here (the rules' are the rules themselves, kinds/rules.py); its file in kinds/ has `build`.
"""

from __future__ import annotations

import math
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from steerl.rollout.common.settings_reader import Checked, within

SECONDS = {"above": 0.0, "high": 86_400.0, "unit": " s"}
"""The range of a time limit; longer ones some clocks do not hold."""
Tokens = Literal["auto", "ids", "text"]
Reads = Literal["both", "completion", "pair"]
Output = Literal["logit", "probability", "log_probability"]


# -- the kinds of the reward's parts ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FunctionSettings(Checked):
    """A reward function of the user's own."""

    function: str | Callable[..., object]
    """`file.py:name` or `module:name`; a class, or a function that says `-> Callable`, makes the function of its arguments."""
    arguments: dict[str, object] | None = None
    """Further keyword arguments, the same in every call."""
    timeout: float | None = within(None, **SECONDS)
    """Seconds that one call may take. Unless it is asynchronous, the function then runs in a process of its own."""
    fallback: float | None = None
    """The score of rows that raise, hang or give no finite number; without it such a row is an error."""

    def problems(self) -> list[str]:
        named = not isinstance(self.function, str) or all(self.function.rpartition(":")[::2])
        return [] if named else [f"function: expected file.py:name or module:name, found {self.function!r}"]


@dataclass(frozen=True, kw_only=True)
class RewardModelSettings(Checked):
    """A sequence-classification model of any architecture."""

    path: str | list[str]
    """A folder or hub name, an adapter's folder too (its base is loaded with it); several make an ensemble."""
    tokenizer: str = ""
    """A folder or hub name when the tokenizer does not lie beside the model."""
    tokens: Tokens = "auto"
    """ids: the sampled ids as they are. text: the text through the model's own tokenizer and chat template. auto: ids where
    the policy's vocabulary is the same, token for token; else text."""
    reads: Reads = "both"
    """both: prompt and completion, joined. completion: it alone. pair: the two as a sentence pair (BERT-like models)."""
    add_eos: bool = False
    """Texts (not conversations): end rows that stopped by themselves with the model's eos, as trl's RewardTrainer does."""
    label: str | int | None = None
    """Which label is the score, by name or number; not needed where there is one."""
    position: Literal["last", "last_not_pad"] = "last"
    """Decoders: which token's state is scored. last_not_pad: the last that is not the pad id, where transformers looks; for
    models trained with pad equal to eos, which were read one token before the eos."""
    output: Output = "logit"
    """probability and log_probability: of the label, by softmax (by sigmoid where there is one label)."""
    batch_size: int = within(64, low=1)
    too_long: Literal["refuse", "cut"] = "refuse"
    """Rows over the model's context: refused by name, or cut on their left."""
    max_tokens: int | None = within(None, low=1)
    """A smaller limit than the model's own context."""
    empty: float | None = None
    """The score of rows with an empty completion; without it they are scored as they stand."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto = as the checkpoint was saved."""
    device: str | None = None
    revision: str = ""
    """Branch, tag or commit of the hub; empty = the newest."""
    trust_remote_code: bool = False
    """Run Python code that lies beside the model, with all your rights; read it first."""
    attn: str | None = None
    """Attention implementation: sdpa, eager, flash_attention_2."""
    allow_new_head: bool = False
    """Let a model without a score head start with a random one (for trying things out)."""
    combine: Literal["mean", "min", "mean_minus_std"] = "mean"
    """Of an ensemble's members."""
    k: float = 1.0
    """mean_minus_std: how many standard deviations (population) are taken off the mean."""

    def problems(self) -> list[str]:
        wrong = []
        if not self.path or not all(self.path):
            wrong.append("path: empty; name a folder or hub name")
        if (self.combine != "mean" or self.k != 1.0) and isinstance(self.path, str):
            wrong.append("combine: without effect on one model; give path a list of models")
        elif self.k != 1.0 and self.combine != "mean_minus_std":
            wrong.append(f"k: without effect with combine: {self.combine}")
        return wrong


@dataclass(frozen=True, kw_only=True)
class ProcessSettings(Checked):
    """A token-classification model of any architecture."""

    path: str
    """A folder or hub name, an adapter's folder too."""
    tokenizer: str = ""
    """A folder or hub name when the tokenizer does not lie beside the model."""
    tokens: Literal["auto", "ids"] = "auto"
    """auto: an error where the vocabularies differ. ids: read the sampled ids whatever the tokenizer says."""
    separator: str | None = None
    """What ends a step, such as "\\n\\n"; the end of a turn (so of the response) ends one too."""
    label: str | int | None = None
    """Which label is the value, by name or number; not needed where there is one."""
    output: Output = "logit"
    reduce: Literal["sum", "mean", "min", "last", "product"] = "sum"
    """sum: every step's value is earned at its last token. The others give one number, earned at the response's end."""
    batch_size: int = within(64, low=1)
    too_long: Literal["refuse"] = "refuse"
    max_tokens: int | None = within(None, low=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str | None = None
    revision: str = ""
    """Branch, tag or commit of the hub; empty = the newest."""
    trust_remote_code: bool = False
    """Run Python code that lies beside the model, with all your rights; read it first."""
    attn: str | None = None
    allow_new_head: bool = False

    def problems(self) -> list[str]:
        return ["separator: empty; leave it out to judge every token"] if self.separator == "" else []


@dataclass(frozen=True, kw_only=True)
class FrozenSettings(Checked):
    """Which model reads."""

    model: str | None = None
    """A folder or hub name of the policy's vocabulary; null = a copy of the policy as it starts."""
    batch_size: int = within(64, low=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str | None = None
    revision: str = ""
    """Branch, tag or commit of the hub; empty = the newest."""
    trust_remote_code: bool = False
    """Run Python code that lies beside the model, with all your rights; read it first."""

    def problems(self) -> list[str]:
        unused = [name for name in ("revision", "trust_remote_code") if getattr(self, name) and self.model is None]
        return [f"{name}: without effect where model is not given; leave it out" for name in unused]


@dataclass(frozen=True, kw_only=True)
class ProbeSettings(FrozenSettings):
    """A probe's file, and which model it is read in."""

    probe: str
    """What `steerl extract --extract.method probe` made: a vector file with a bias and a threshold."""
    layer: int | None = within(None, low=0)
    """Which of the file's; not needed where there is one."""
    position: Literal["mean", "last", "max"] | None = None
    """Over a row's actions, its stop token left out: the logit of the mean activation, that of the last action, or the highest.
    null = mean or last, as the file was made."""
    output: Literal["logit", "probability"] = "logit"
    above: float | Literal["file"] | None = None
    """Values that are not above it count 0; file = the threshold that the file holds. null = every value counts."""
    screen: bool = False
    """Nothing is learned from rows above the threshold (the file's, or `above`), and the part adds nothing to the reward."""


@dataclass(frozen=True, kw_only=True)
class NoveltySettings(FrozenSettings):
    """An elliptical bonus on the hidden states of a frozen model."""

    layer: int | None = None
    """The block whose output is read, negative from the end; null = the last."""
    position: Literal["mean", "last"] = "mean"
    """Over a row's actions, its stop token left out."""
    dimensions: int = within(32, low=1)
    """Of the projection."""
    ridge: float = within(1.0, above=0.0)
    history: Literal["step", "run"] = "step"
    """What a row is compared with: the step's rows, or all that the run has drawn to learn from."""
    seed: int = 0
    """Of the projection's numbers."""


@dataclass(frozen=True, kw_only=True)
class HttpSettings(Checked):
    """A reward that a server gives."""

    url: str
    """http://host:port; the path is /score unless it says another."""
    timeout: float = within(60.0, **SECONDS)
    """Seconds that one request may take, from connecting to the last byte of the answer."""
    retries: int = within(3, low=0)
    """Further tries after one that was late, refused or answered by an error of the server's."""
    backoff: float = within(0.5, low=0.0, high=SECONDS["high"], unit=" s")
    """Seconds before the first further try; doubled before each next one. A server's Retry-After counts, if longer."""
    batch_size: int = within(1024, above=0)
    """Rows per request."""
    concurrency: int = within(4, above=0)
    """Requests at once."""
    token_env: str = "STEERL_REWARD_TOKEN"
    """The environment variable that holds the bearer token; nothing is sent where it is not set."""
    fallback: float | None = None
    """The score of rows that got none; without it they are an error."""

    def problems(self) -> list[str]:
        try:
            parsed = urllib.parse.urlsplit(self.url)
            whole = parsed.scheme in ("http", "https") and bool(parsed.hostname) and self.url.isprintable() and parsed.port != 0
        except ValueError:  # a port that is none, half a bracket
            whole = False
        return [] if whole else [f"url: expected http://host:port, found {self.url!r:.200}"]


@dataclass(frozen=True, kw_only=True)
class EnvironmentTermSettings(Checked):
    """What the environment gave. It does not apply to an episode that came to its end and was given nothing; one that was cut
    at a limit, or lost its environment, earned what it was given until then."""

    fallback: float | None = None
    """The score of an episode whose environment was lost, in place of what it was given until then."""


# -- what every part may say --------------------------------------------------------------------------------------------


def check_shape(normalise: Any, clip: Any) -> list[str]:
    """What is wrong with the two settings, a line each that begins with the field's name."""
    wrong = []
    if isinstance(normalise, str) and normalise != "running":
        wrong.append(f"normalise: unknown value {normalise!r}; write running, {{mean: m, std: s}} or {{reference: FILE}}")
    if isinstance(normalise, Mapping):
        keys = set(normalise)
        if keys == {"mean", "std"}:
            numbers = [normalise["mean"], normalise["std"]]
            if not all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in numbers):
                wrong.append(f"normalise: expected two numbers, found {dict(normalise)}")
            elif normalise["std"] <= 0:
                wrong.append(f"normalise.std: expected more than 0, found {normalise['std']}")
        elif "reference" not in keys:
            wrong.append(f"normalise: expected {{mean: m, std: s}} or {{reference: FILE}}, found {dict(normalise)}")
    if clip is not None and not (len(clip) == 2 and clip[0] < clip[1]):
        wrong.append(f"clip: expected [low, high] with low under high, found {clip}")
    return wrong


# -- jobs over rewards --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextSettings:
    """A dataset of texts or conversations, and which of its columns are what."""

    path: str = ""
    """jsonl, json, csv or parquet file, a saved dataset's folder, or a hub name."""
    split: str = ""
    """Split of a dataset with several; train where it is not given."""
    name: str = ""
    """Configuration of a hub dataset that has several."""
    messages: str = ""
    """The column with whole conversations; `messages` where it is there and no other column is named."""
    prompt: str = ""
    """The column with the prompt; `prompt` where it is there."""
    completion: str = ""
    """The column to score; completion, response, answer or text, whichever is there first."""
    limit: int = 0
    """Only the first rows; 0 = all."""


@dataclass(frozen=True)
class SelectionSettings(Checked):
    """Which rows of a scored dump are kept."""

    mode: Literal["best", "worst", "reject", "pairs"] = "best"
    """best, worst: the `count` highest or lowest of each prompt. reject: all at or above `threshold` (rejection sampling).
    pairs: the best against the worst of each prompt."""
    score: str = "total"
    """The column of the scores to judge by: total or a part's name."""
    count: int = within(1, low=1)
    """best, worst: rows kept per prompt."""
    threshold: float | None = None
    """reject: the least score kept; best, worst: rows below it (worst: above it) are left out too."""
    min_gap: float = within(0.0, low=0)
    """pairs: kept where the best is better than the worst by more than this."""
    ended: bool = False
    """Only responses that ended by themselves; those cut at the limit are left out."""
    unique: bool = True
    """Of equal responses to a prompt keep one: the best-scored (worst: the worst-scored), of equal scores the earlier."""

    def problems(self) -> list[str]:
        wrong = []
        if self.mode == "reject" and self.threshold is None:
            wrong.append("threshold: missing; mode reject keeps the rows at or above it, --select.threshold X")
        if self.mode == "pairs" and self.threshold is not None:
            wrong.append("threshold: has no effect with mode pairs; use select.min_gap")
        if self.mode in ("reject", "pairs") and self.count != 1:
            wrong.append(f"count: has no effect with mode {self.mode}; leave it out")
        if self.mode != "pairs" and self.min_gap:
            wrong.append(f"min_gap: has no effect with mode {self.mode}; leave it out")
        return wrong
