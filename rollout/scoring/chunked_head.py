"""A forward pass whose output embedding gives log-probs and entropies instead of logits, computed chunk by chunk.

    model ── hidden (B, T, D) ──> the rows that predict a real action (N, D)
             chunk of rows ──> head ── logit post-processing ── / temperature ── softmax ──> two numbers of each row (N, 2)
                                                      over what could be drawn, where the rollout says it ^
    backward    the chunk's logits again, the gradient where the softmax begins, back through the head

The head's forward is exchanged for the length of the pass, inside the module: the model, its wrappers and their hooks
(which gather the head's weight, now and on the way back) run as ever. Where anybody is to see the logits themselves, a
user's hook or a steering site on the head, or where rows cannot go through it in chunks, the model keeps its own way.

Logits exist for one chunk at a time. The last chunk's probabilities are kept for the backward pass where they are all it
needs: with a small vocabulary that is the only chunk, and nothing is computed again.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from steerl.rollout.model import compat, hooks
from steerl.rollout.model.language_model import no_dropout
from steerl.rollout.model.policy import Policy
from steerl.rollout.ragged import Kept
from steerl.rollout.scoring.alignment import predicting_places
from steerl.rollout.scoring.logit_postprocessing import LogitPostprocessing, logit_postprocessing
from steerl.rollout.types import Rollout

enabled = True
"""False leaves all logits to the model at once: slower and larger, the same numbers."""
CHUNK = {"cpu": 2**22, "cuda": 2**27}
"""Logits that are computed together. On CPU 16 MB of float32: larger buffers go back to the system after every use."""
KEPT = {"cpu": 4, "cuda": 1}
"""Chunks whose probabilities are kept for the backward pass; those of the others are computed again."""


# -- rows through the head -------------------------------------------------------------------------------------------


class ChunkedHead:
    """One head for many rows: how logits are made of them, forward and again backward."""

    def __init__(
        self,
        core: nn.Module,
        head: nn.Module,
        forward: Callable[..., Tensor],
        postprocessing: LogitPostprocessing,
        temperature: float,
        want_entropy: bool,
        device: str,
        kept: tuple[Kept, Tensor] | None = None,
        want_likeliest: bool = False,
    ):
        """`kept`: what could be drawn, and which of its places each of the rows to come is. `want_likeliest`: whether the
        token is the likeliest one, in the entropy's place."""
        self.kept, self.want_likeliest = kept, want_likeliest
        self.core, self.head, self.forward, self.postprocessing = core, head, forward, postprocessing
        self.temperature, self.want_entropy, self.device = temperature, want_entropy, device
        self.autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        plain = type(head) is nn.Linear and getattr(forward, "__func__", None) is nn.Linear.forward
        self.is_matrix = plain and not postprocessing.operations
        """One matrix and nothing else: its gradients are two products, and need no graph."""
        sizes = (getattr(head, name, None) for name in ("out_features", "nf", "num_embeddings"))
        self.vocabulary = next((size for size in sizes if isinstance(size, int)), 2**16)

    def __call__(self, hidden_ND: Tensor, tokens_N: Tensor) -> Tensor:
        """(N, 2): log-prob of each row's token and entropy of its distribution, 0 where it is not wanted."""
        if not torch.is_grad_enabled():
            return self.numbers(hidden_ND, tokens_N, keep=False)[0]
        numbers_N2: Tensor = _Chunks.apply(self, hidden_ND, tokens_N, *self.weights())
        return numbers_N2

    def weights(self) -> list[Tensor]:
        """Looked up each time: engines put other tensors in their places between the passes."""
        return [p for p in self.head.parameters() if p.requires_grad]

    def chunks(self, count: int) -> list[slice]:
        """Even ones: the last would else be a sliver."""
        rows = max(1, CHUNK.get(self.device, CHUNK["cuda"]) // self.vocabulary)
        parts = -(-count // rows)
        return [slice(i * count // parts, (i + 1) * count // parts) for i in range(parts)]

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Before the temperature, in float32, under the autocast of the forward pass.

        Without autocast's cache: what it keeps of a pass without gradients would be used in one with them."""
        with (
            no_dropout(self.head),
            torch.autocast(self.device, dtype=self.autocast, enabled=self.autocast is not None, cache_enabled=False),
        ):
            return self.postprocessing(self.core, self.forward(hidden_ND)).float()

    def scores(self, logits_nV: Tensor, part: slice) -> Tensor:
        """They take the logits' place, where these are nobody else's: a head of any make may give what is not its own."""
        if not self.is_matrix:
            logits_nV = logits_nV.detach().clone()
        scores_nV = logits_nV.div_(self.temperature) if self.temperature != 1 else logits_nV
        if self.kept is not None:
            kept, place_N = self.kept
            scores_nV.masked_fill_(kept.mask(place_N[part], scores_nV.shape[1]).logical_not_(), float("-inf"))
        return scores_nV

    @torch.no_grad()
    def numbers(self, hidden_ND: Tensor, tokens_N: Tensor, *, keep: bool) -> tuple[Tensor, list[Tensor]]:
        """Log-probs and entropies; and, with `keep`, the probabilities of the last chunks."""
        numbers_N2 = torch.zeros(len(hidden_ND), 2, device=hidden_ND.device)
        chunks, kept = self.chunks(len(hidden_ND)), list[Tensor]()
        first_kept = len(chunks) - KEPT.get(self.device, 1) if keep and self.is_matrix else len(chunks)
        for number, part in enumerate(chunks):
            scores_nV = self.scores(self.logits(hidden_ND[part]), part)
            most_n1 = scores_nV.amax(-1, keepdim=True)
            probs_nV = torch.softmax(scores_nV, dim=-1)
            # Of the likeliest token it is 1 / sum(exp(score - most)): no second pass of exp.
            log_sum_n = -probs_nV.amax(-1).log()
            numbers_N2[part, 0] = (scores_nV.gather(-1, tokens_N[part, None]) - most_n1)[:, 0] - log_sum_n
            if self.want_entropy:
                # Tokens of probability 0 add nothing; their score of -inf must not meet their 0.
                scores_nV.sub_(most_n1).clamp_(min=torch.finfo(scores_nV.dtype).min)
                numbers_N2[part, 1] = log_sum_n - torch.linalg.vecdot(probs_nV, scores_nV)
            elif self.want_likeliest:
                numbers_N2[part, 1] = (scores_nV.argmax(-1) == tokens_N[part]).float()
            if number >= first_kept:
                kept.append(probs_nV)
            del scores_nV, probs_nV
        return numbers_N2, kept

    def gradients(
        self, grad_N2: Tensor, hidden_ND: Tensor, tokens_N: Tensor, numbers_N2: Tensor, saved: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Of hidden states and of the head's weights. `saved` is emptied."""
        grad_ND, weights = torch.zeros_like(hidden_ND), self.weights()
        sums = [_Sum(weight) for weight in weights]
        for part in reversed(self.chunks(len(hidden_ND))):
            hidden_nD = hidden_ND[part].detach()
            if self.is_matrix:
                probs_nV = saved.pop() if saved else torch.softmax(self.scores(self.logits(hidden_nD), part), dim=-1)
                slope_nV = self.slope(probs_nV, grad_N2[part], tokens_N[part], numbers_N2[part])
                grad_ND[part] = self.through_matrix(slope_nV, hidden_nD, weights, sums)
            else:
                with torch.enable_grad():
                    logits_nV = self.logits(hidden_nD.requires_grad_())
                probs_nV = torch.softmax(self.scores(logits_nV, part), dim=-1)
                slope_nV = self.slope(probs_nV, grad_N2[part], tokens_N[part], numbers_N2[part])
                grad_nD, *others = torch.autograd.grad(logits_nV, [hidden_nD, *weights], slope_nV, allow_unused=True)
                grad_ND[part] = grad_nD
                for total, gradient in zip(sums, others, strict=True):
                    total.add(gradient)
                del logits_nV
            del probs_nV, slope_nV
        return grad_ND, [total.value() for total in sums]

    def slope(self, probs_nV: Tensor, grad_n2: Tensor, tokens_n: Tensor, numbers_n2: Tensor) -> Tensor:
        """The gradient of the logits, in place of the probabilities: d logp = onehot - p, d entropy = - p (log p + entropy)."""
        grad_n1, grad_entropy_n1 = (grad_n2 / self.temperature).split(1, dim=1)
        if self.want_entropy:
            bend_nV = torch.special.xlogy(probs_nV, probs_nV).addcmul_(probs_nV, numbers_n2[:, 1:]).mul_(grad_entropy_n1)
            probs_nV.mul_(-grad_n1).sub_(bend_nV)
        else:
            probs_nV.mul_(-grad_n1)
        return probs_nV.scatter_add_(-1, tokens_n[:, None], grad_n1)

    def through_matrix(self, slope_nV: Tensor, hidden_nD: Tensor, weights: list[Tensor], sums: list[_Sum]) -> Tensor:
        matrix_VD: Any = self.head.weight
        dtype = self.autocast or matrix_VD.dtype
        slope_nV, hidden_nD = slope_nV.to(dtype), hidden_nD.to(dtype)
        with torch.autocast(self.device, enabled=False):
            for weight, total in zip(weights, sums, strict=True):
                if weight is matrix_VD:
                    total.add_product(slope_nV.T, hidden_nD)
                else:
                    total.add(slope_nV.sum(0))
            return slope_nV @ matrix_VD.to(dtype)


class _Sum:
    """A weight's gradient, added up over chunks in float32 at least."""

    def __init__(self, weight: Tensor):
        self.weight = weight
        self.dtype = torch.promote_types(weight.dtype, torch.float32)
        self.total: Tensor | None = None

    def add(self, gradient: Tensor | None) -> None:
        if gradient is not None:
            self.total = gradient.to(self.dtype) if self.total is None else self.total.add_(gradient)

    def add_product(self, left: Tensor, right: Tensor) -> None:
        if self.total is None or left.dtype != self.dtype:
            self.add(left @ right)
        else:
            self.total.addmm_(left, right)

    def value(self) -> Tensor:
        return torch.zeros_like(self.weight) if self.total is None else self.total.to(self.weight.dtype)


class _Chunks(torch.autograd.Function):
    """The chunks under one node of the graph. The weights are arguments, so that their gradients go where they belong."""

    @staticmethod
    def forward(ctx: Any, head: ChunkedHead, hidden_ND: Tensor, tokens_N: Tensor, *weights: Tensor) -> Tensor:
        numbers_N2, ctx.probs = head.numbers(hidden_ND, tokens_N, keep=any(ctx.needs_input_grad))
        ctx.head = head
        ctx.save_for_backward(hidden_ND, tokens_N, numbers_N2)
        return numbers_N2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N2: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, tokens_N, numbers_N2 = ctx.saved_tensors
        grad_ND, others = ctx.head.gradients(grad_N2, hidden_ND, tokens_N, numbers_N2, ctx.probs)
        return None, grad_ND, None, *others


# -- whether a model's head can be read in chunks ----------------------------------------------------------------------


def readable(policy: Policy) -> LogitPostprocessing | None:
    """What comes after the head, or None where rows cannot go through it by themselves, or somebody is to see the logits."""
    head = policy.core.get_output_embeddings()
    if not enabled or head is None or any(_watched(module) for module in (policy.core, *head.modules())):
        return None
    # Whether an engine puts the weights together when the module is called, and on the way back when its output is met.
    gathered = any(hasattr(p, "ds_id") or hasattr(p, "device_mesh") for p in head.parameters())
    if compat.is_wrapped(head) or (gathered and any(head.children())):  # or its parts gather their weights one by one
        return None
    postprocessing = logit_postprocessing(policy)
    return None if postprocessing is None or (postprocessing.operations and gathered) else postprocessing


_NOT_USERS = ("torch.", "deepspeed.", "accelerate.", "peft.", "transformers.", "steerl.")
"""Owners of hooks that do their own work and read no logits."""


def _watched(module: nn.Module) -> bool:
    """Whether hooks of a user, or an active steering, are to see what the module gives."""
    frame = hooks.current()
    if frame is not None and any((id(module), io) in frame.points for io in ("input", "output")):
        return True
    for hook in compat.forward_hooks(module):
        while isinstance(hook, functools.partial):
            hook = hook.func
        if not str(getattr(hook, "__module__", "")).startswith(_NOT_USERS):
            return True
    return False


# -- the head's forward, for the length of a pass ------------------------------------------------------------------------


class HeadPass:
    """What one pass wants of its head, and what it got; None where the head was not called as it was observed to be."""

    def __init__(
        self,
        core: Any,
        postprocessing: LogitPostprocessing,
        rollout: Rollout,
        first_B: Tensor | None,
        temperature: float,
        want_entropy: bool,
        want_likeliest: bool = False,
    ):
        self.core, self.head, self.postprocessing = core, core.get_output_embeddings(), postprocessing
        self.rollout, self.first_B = rollout, first_B
        self.temperature, self.want_entropy, self.want_likeliest = temperature, want_entropy, want_likeliest
        self.hidden_BTD: Tensor | None = None
        self.numbers_BR2: Tensor | None = None
        """Log-prob and entropy (0 where it is not wanted) of every action; masked entries hold 0."""

    def __call__(self, hidden_BTD: Tensor, forward: Callable[..., Tensor]) -> Tensor:
        """Stands for the head's output. Where the model goes on to do something to its logits, it gets none."""
        rows, width, device = len(self.rollout), self.rollout.response_width, hidden_BTD.device
        self.hidden_BTD = hidden_BTD
        real_N = self.rollout.action_mask_BR.flatten().nonzero()[:, 0].to(device)
        place_N = predicting_places(hidden_BTD, self.first_B, width).flatten()[real_N]
        hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, place_N)
        tokens_N = self.rollout.response_BR.flatten().to(device)[real_N]
        kept = None if self.rollout.kept is None else (self.rollout.kept.to(device), real_N)
        wanted = (self.temperature, self.want_entropy, device.type, kept, self.want_likeliest)
        head = ChunkedHead(self.core, self.head, forward, self.postprocessing, *wanted)
        numbers_N2 = head(hidden_ND, tokens_N)
        numbers = numbers_N2.new_zeros(rows * width, 2).index_copy(0, real_N, numbers_N2)
        self.numbers_BR2 = numbers.view(rows, width, 2)
        return self.numbers_BR2 if not self.postprocessing.operations else hidden_BTD.new_empty(rows, 0, head.vocabulary)


_PASS: ContextVar[HeadPass | None] = ContextVar("head_pass", default=None)
_swapping = threading.Lock()


class _Forward:
    """A head's forward: that of the pass which is active in this context, else the head's own (other threads)."""

    def __init__(self, own: Any, was_replaced: bool):
        self.own, self.was_replaced, self.users = own, was_replaced, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        head_pass = _PASS.get()
        if head_pass is None or head_pass.numbers_BR2 is not None or len(args) != 1 or kwargs or args[0].dim() != 3:
            return self.own(*args, **kwargs)
        return head_pass(args[0], self.own)


@contextlib.contextmanager
def swapped_in(head_pass: HeadPass) -> Iterator[None]:
    """Inside, the model's head gives numbers instead of logits."""
    head = head_pass.head
    with _swapping:
        forward = vars(head).get("forward")
        if not isinstance(forward, _Forward):
            forward = head.forward = _Forward(head.forward, was_replaced="forward" in vars(head))
        forward.users += 1
    token = _PASS.set(head_pass)
    try:
        yield
    finally:
        _PASS.reset(token)
        with _swapping:
            forward.users -= 1
            if not forward.users and forward.was_replaced:
                head.forward = forward.own
            elif not forward.users:
                del head.forward
