"""The value model: a model without a vocabulary, from the policy, a language model's folder or a reward model's.

policy, or folder ──> model with its output embedding taken out ──> hidden states where actions are predicted
                                                                    head: Linear(width, 1) in float32, from zero,
                                                                          or the score head of a reward model
"""

from __future__ import annotations

import copy
import dataclasses

import torch
import transformers
from torch import Tensor, nn

from steerl.rollout.common.errors import CheckpointError
from steerl.rollout.model import unread
from steerl.rollout.model.auto_classes import HEADS, choose_head, load_config, load_head
from steerl.rollout.model.policy import Policy


class NoVocabulary(nn.Module):
    """Stands where the output embedding was: its input is what the value reads, and no logits are made of it."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.weight = torch.empty(0, dtype=dtype)
        """No parameter: some models (Mamba) ask for the dtype of their head's weight."""
        self.bias = None
        """BERT and its kin take over the bias of what they are given."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden[..., :1]


def build_value_model(policy: Policy, value: str) -> tuple[Policy | None, nn.Linear]:
    """(the value's own model, or None where it shares the policy's; the head)."""
    width = hidden_width(policy.core)
    if value == "shared":
        return None, zero_head(width, policy.device)
    if value == "separate":
        # Its capabilities are the policy's, whose logits it no longer has to show them with.
        value_model = policy.with_model(copy.deepcopy(policy.model), like=policy)
        strip(value_model.core)
        return value_model, zero_head(width, policy.device)
    return _from_folder(policy, value)


def hidden_width(core: transformers.PreTrainedModel) -> int:
    """Width of what the output embedding reads."""
    head = core.get_output_embeddings()
    if head is None:
        raise CheckpointError(
            f"ppo.value: {type(core).__name__} has no output embedding, so a value cannot read its input; set ppo.credit rloo"
        )
    weight = getattr(head, "weight", None)
    return int(weight.shape[-1]) if weight is not None else int(core.config.get_text_config(decoder=True).hidden_size)


def zero_head(width: int, device: torch.device) -> nn.Linear:
    head = nn.Linear(width, 1, device=device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def strip(core: transformers.PreTrainedModel) -> None:
    """Take the output embedding out of a model, and what is added to its logits."""
    core.set_output_embeddings(NoVocabulary(core.get_input_embeddings().weight.dtype))
    if isinstance(getattr(core, "final_logits_bias", None), Tensor):
        core.final_logits_bias = torch.zeros(1, 1)


def _from_folder(policy: Policy, path: str) -> tuple[Policy, nn.Linear]:
    field = "ppo.value"
    config = load_config(path, field, policy.hub.code)
    kind = "seq2seq" if policy.is_seq2seq else "causal"
    if bool(config.is_encoder_decoder) != policy.is_seq2seq:
        raise CheckpointError(f"{field}: {path} is a {config.model_type} model and the policy is {kind}; name a {kind} model")
    saved = choose_head(config, "value", field=field, path=path)
    model = load_head(path, "value", dtype=torch.float32, field=field, read=False, hub=policy.hub.code)
    head = None
    if saved not in ("causal", "seq2seq"):
        head = _score_head(model, path)
        model = _as_language_model(model, kind, path, policy.hub.trust_remote_code)
    value_model = Policy.of(model, policy.tokenizer)
    width = hidden_width(model)
    strip(model)
    unread.to_device(model, policy.device)
    value_model = dataclasses.replace(value_model, start_ids=policy.start_ids, pad_id=policy.pad_id)
    if head is None:
        return value_model, zero_head(width, policy.device)
    return value_model, head.to(policy.device)


def _score_head(model: transformers.PreTrainedModel, path: str) -> nn.Linear:
    """The head of a reward model as the value's own, where it is one number read off one state."""
    score = getattr(model, "score", None)
    if not isinstance(score, nn.Linear) or score.out_features != 1:
        labels = f"{score.out_features} labels" if isinstance(score, nn.Linear) else "no plain score head"
        raise CheckpointError(
            f"ppo.value: {path} has {labels}; a value starts from a reward model with one label, or from a language model"
        )
    head = zero_head(score.in_features, score.weight.device)
    with torch.no_grad():
        head.weight.copy_(score.weight)
        if score.bias is not None:
            head.bias.copy_(score.bias)
    return head


def _as_language_model(
    model: transformers.PreTrainedModel, kind: str, path: str, trusted: bool
) -> transformers.PreTrainedModel:
    """The trunk of a classifier inside the language model of its architecture, which says how positions are predicted."""
    try:
        with torch.device("meta"):
            shell = HEADS[kind].from_config(model.config, trust_remote_code=trusted)
    except ValueError as error:
        raise CheckpointError(f"ppo.value: {path}: there is no {kind} model of type {model.config.model_type}") from error
    if hasattr(shell, shell.base_model_prefix):
        setattr(shell, shell.base_model_prefix, model.base_model)
    else:  # an encoder-decoder whose language model is its own trunk
        for name, child in model.base_model.named_children():
            setattr(shell, name, child)
    assert isinstance(shell, transformers.PreTrainedModel)
    return shell.eval()
