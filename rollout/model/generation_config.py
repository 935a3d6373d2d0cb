"""The generation config of every pass: nothing of the checkpoint's own gets in."""

from __future__ import annotations

from collections.abc import Sequence

import transformers


class ClosedGenerationConfig(transformers.GenerationConfig):
    """A generation config that takes nothing from the checkpoint's own.

    generate fills every field that is None from the model's config (`update(defaults_only=True)`), whole configs that the
    user passes included. This one refuses that, and sets what generate's preparation reads.
    """

    def update(self, defaults_only: bool = False, allow_custom_entries: bool = False, **kwargs: object) -> dict[str, object]:
        if defaults_only:
            return {}
        unused: dict[str, object] = super().update(allow_custom_entries=allow_custom_entries, **kwargs)
        return unused

    @staticmethod
    def of(pad_id: int, start_ids: Sequence[int], **fields: object) -> ClosedGenerationConfig:
        """Plain sampling with this pad and decoder start; `fields` say the rest (max_new_tokens, outputs, eos)."""
        plain = {
            "do_sample": True, "num_beams": 1, "num_return_sequences": 1, "temperature": 1.0, "top_k": 0, "top_p": 1.0,
            "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0, "use_cache": True,
            "output_scores": False, "output_logits": False, "output_attentions": False, "output_hidden_states": False,
            "return_dict_in_generate": False, "is_assistant": False, "disable_compile": True, "pad_token_id": pad_id,
        }  # fmt: skip
        if start_ids:
            plain["decoder_start_token_id"] = start_ids[0]
        return ClosedGenerationConfig(**{**plain, **fields})
