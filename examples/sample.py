"""Sample from a model in hand, and look at both log-probs of every token.

steerl tiny --out runs/tiny --worlds reviews
python examples/sample.py
"""

from transformers import AutoModelForCausalLM, AutoTokenizer

from steerl import Policy, Prompts, PromptSettings, Sampler, Sampling, teacher_forced

PATH = "runs/tiny/reviews/sft"


def main() -> None:
    policy = Policy.of(AutoModelForCausalLM.from_pretrained(PATH), AutoTokenizer.from_pretrained(PATH))
    rows = [{"prompt": "review of a comedy about a sailor :"}, {"prompt": "notes on a western about an old house :"}]
    prompts = Prompts(rows, "prompt", policy, PromptSettings())

    # Two samples of each prompt; top-p, and a policy over the whole vocabulary, which is then not what was sampled from.
    sampler = Sampler(policy, Sampling(max_new_tokens=24, n=2, top_p=0.9, replay_mask=False, seed=1))
    rollout, texts = sampler.sample(prompts.batch([0, 1]))

    for row, completion in enumerate(texts.completions):
        length = int(rollout.lengths_B[row])
        print(f"\n{texts.prompt_texts[row]}{completion}")
        for t in range(min(length, 5)):
            token = policy.tokenizer.decode(rollout.response_BR[row, t : t + 1])
            behaviour, own = rollout.behaviour_logprobs_BR[row, t], rollout.policy_logprobs_BR[row, t]
            print(f"  {token!r:12} drawn at {behaviour:7.3f}   policy {own:7.3f}   weight {(own - behaviour).exp():.3f}")

    # The policy's log-probs once more, from one forward pass over the finished rows.
    again_BR = teacher_forced(policy, rollout).logprobs_BR
    gap_BR = (again_BR - rollout.policy_logprobs_BR).abs()
    print(f"\nlargest gap between sampling and a forward pass: {gap_BR[rollout.action_mask_BR].max():.1e} nats")


if __name__ == "__main__":
    main()
