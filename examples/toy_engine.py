"""An engine of one's own: a table of odds that draws and knows nothing of the policy, which learns from its rows.

steerl tiny --out runs/tiny --worlds reviews
python examples/toy_engine.py
"""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from steerl import Policy, PPOSettings, PromptBatch, Prompts, Rollout, RunSettings, Samples, Sampling, Scores, Texts, train
from steerl.rollout.common.random import uniforms
from steerl.rollout.prompts.prompts import PromptSettings
from steerl.training.algorithm.importance import Correction

PATH = "runs/tiny/reviews/sft"


class Table:
    """Draws every token from the same odds."""

    def __init__(self, odds: torch.Tensor, policy: Policy, sampling: Sampling):
        self.odds_V, self.policy, self.sampling = odds / odds.sum(), policy, sampling
        self.updates, self.closed = 0, False

    def draw(self, prompts: PromptBatch, /, *, step: int, progress: float) -> Samples:
        """n rows of each prompt; the random numbers hang on the step, row and sample alone, so any number of ranks agree."""
        n = self.sampling.n
        many = prompts.select([i for i in range(len(prompts)) for _ in range(n)])
        sample_B = torch.tensor([prompts.sample(i, j, n) for i in range(len(prompts)) for j in range(n)], dtype=torch.int64)
        row_B, token_R = torch.tensor(many.rows, dtype=torch.int64), torch.arange(self.sampling.max_new_tokens)
        uniform_BR = uniforms(self.sampling.seed, step, row_B, sample_B, token_R)
        drawn_BR = torch.searchsorted(self.odds_V.cumsum(0), uniform_BR.float()).clamp(max=len(self.odds_V) - 1)
        logprobs_BR = self.odds_V.log()[drawn_BR].tolist()
        rollout = Rollout.of_ids(
            many.ids, drawn_BR.tolist(), row_B=row_B, sample_B=sample_B, ended_B=[False] * len(many),
            behaviour_logprobs_BR=logprobs_BR, policy_logprobs_BR=logprobs_BR, temperature=self.sampling.temperature,
            policy_step_B=[-1] * len(many),  # no weights of this run's drew them: the correction weighs all rows
        )  # fmt: skip
        completions = [self.policy.tokenizer.decode(row) for row in drawn_BR.tolist()]
        return Samples(rollout, Texts(prompts=many.prompts, prompt_texts=many.prompt_texts, completions=completions))

    def weights_changed(self, step: int) -> None:
        """Here an engine would fetch the policy's new weights."""
        self.updates += 1

    def close(self) -> None:
        self.closed = True


def thirds(rollout: Rollout, texts: Texts) -> Scores:
    """The share of a row's ids that 3 divides."""
    return Scores(((rollout.response_BR % 3 == 0) & rollout.action_mask_BR).sum(1) / rollout.actions_B)


def main() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(PATH), dtype=torch.float32).eval()  # knows nothing
    policy = Policy.of(model, AutoTokenizer.from_pretrained(PATH))
    rows = [{"prompt": text} for text in ("a sailor", "a robot", "a train")]
    prompts = Prompts(rows, "prompt", policy, PromptSettings())
    sampling = Sampling(max_new_tokens=12, n=8)
    table = Table(torch.rand(policy.vocab_size) + 0.5, policy, sampling)
    settings = PPOSettings(
        steps=6, rollouts_per_step=48, epochs=2, minibatches=2, learning_rate=3e-3, reference="none", kl_coef=0.0,
        eval_prompts=3, credit="rloo", correction=Correction("token_truncate"),
    )  # fmt: skip
    summary = train(policy, prompts, thirds, sampling, settings, RunSettings("runs/toy", overwrite=True), source=table)
    print(f"the policy's reward: {summary['reward_before']:.2f} before, {summary['reward_after']:.2f} after")
    print(f"{table.updates} updates of its weights, closed: {table.closed}")


if __name__ == "__main__":
    main()
