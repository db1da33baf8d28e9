"""One trainer of TRL, a step at a time: a plain script for the Python of an environment that has TRL and no srppo.

    python trl_worker.py versions      -> one JSON line: versions and trainers
    python trl_worker.py               first line in: the work, JSON. After that a line in, `{"answers": [lengths]}`, is
                                       one step, and a JSON line out: what it took

`bench.step_rivals` is the other side. A step is what the trainer does for one batch, from the end of the step before it
to its own end: generating, scoring, updating, and what it logs and collects between steps. Trainers are left at their
defaults but for what makes the work the same: fp32, whole models without gradient checkpointing, sizes, passes,
minibatches, Adam at a constant rate, a KL penalty to the SFT model, reward log pi_sft - log pi_base of the answer.
Answers end at the lengths that were asked for: until then the end token cannot be drawn, then no other can.

A minibatch is worked on in `rows` rows at a time. With several minibatches PPOTrainer takes one optimizer step a pass,
by its own rule of accumulation.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import re
import resource
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import Any, TextIO

Moment = tuple[float, float]
"""Seconds of the clock, CPU seconds of this process over its threads."""

PAD, END = 0, 1
PPO = (1, 12)  # the release whose PPOTrainer is compared with
GROUPS = (1, 16)  # the release from which GRPO and RLOO are


def versions() -> dict[str, Any]:
    """What is installed here, and the trainers of it that this script knows how to run."""
    found: dict[str, str | None] = {}
    for name in ("trl", "torch", "transformers", "accelerate"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    release = tuple(int(part) for part in re.findall(r"\d+", found["trl"] or "0.0")[:2])
    trainers = ["ppo"] if release == PPO else ["grpo", "rloo"] if GROUPS <= release < (2, 0) else []
    return {"versions": found, "trainers": trainers}


def main() -> None:
    """Build the trainer of the work that stands on the first line, and train as lines come."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is not taken for an answer
    work = json.loads(sys.stdin.readline())
    import torch

    torch.set_num_threads(work["threads"])
    turns = Turns(work, answers)
    policy, trainer = {"ppo": ppo_trainer, "grpo": group_trainer, "rloo": group_trainer}[work["trainer"]](work)
    watch(policy, turns)

    def before_forward(*_: Any) -> None:
        if torch.is_grad_enabled():  # scoring and generating run without
            turns.update_begins()

    trainer.model.register_forward_pre_hook(before_forward)
    trainer.add_callback(turns.callback())
    trainer.train()


class Turns:
    """When a step is asked for, and what it took.

    rollout: within generate(). update: from the first pass with gradients. score: all else, from step to step.
    gc_cpu_s: what Python's collector took of all that.
    """

    def __init__(self, work: dict[str, Any], answers: TextIO) -> None:
        self.answers = answers
        gc.callbacks.append(self.collecting)
        self.updates = work["epochs"] * work["minibatches"] if work["trainer"] != "ppo" else 1
        self.done = 0
        self.lengths: list[int] = []
        self.began: Moment | None = None
        self.updating: Moment | None = None

    def callback(self) -> Any:
        """What tells a trainer of transformers to wait and to answer."""
        from transformers import TrainerCallback

        turns = self

        class Callback(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                turns.wait()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                turns.done += 1
                if turns.done % turns.updates == 0:
                    turns.answer()
                    turns.wait()

        return Callback()

    def wait(self) -> None:
        """Until a step is asked for; the process ends where none will be."""
        line = sys.stdin.readline()
        if not line:
            os._exit(0)  # trainers have no way out that does not train to the end or print a traceback
        self.lengths = json.loads(line)["answers"]
        self.rollout, self.gc_cpu_s, self.tokens, self.answer_tokens, self.updating = (0.0, 0.0), 0.0, 0, 0, None
        self.began = now()

    def collecting(self, phase: str, _: Any) -> None:
        """Called by Python before and after each collection."""
        if phase == "start":
            self.collected = time.process_time()
        elif self.began is not None:
            self.gc_cpu_s += time.process_time() - self.collected

    def update_begins(self) -> None:
        """Called before each pass with gradients; the first counts."""
        self.updating = self.updating or now()

    def answer(self) -> None:
        """Say what the step took."""
        end, both = now(), []
        assert self.began is not None and self.updating is not None
        for clock in range(2):
            rollout, update = self.rollout[clock], end[clock] - self.updating[clock]
            score = end[clock] - self.began[clock] - rollout - update
            both.append({"rollout": rollout, "score": score, "update": update})
        row = {"seconds": both[0], "cpu_s": both[1], "gc_cpu_s": self.gc_cpu_s}
        row |= {"tokens": self.tokens, "answer_tokens": self.answer_tokens}
        row["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(row), file=self.answers)


def now() -> Moment:
    """This moment."""
    return time.perf_counter(), time.process_time()


def watch(policy: Any, turns: Turns) -> None:
    """Let `policy.generate` end each answer at its length, and time and count what it writes."""
    import torch
    from transformers import LogitsProcessorList

    generate = policy.generate

    def counted(*args: Any, input_ids: Any, **kwargs: Any) -> Any:
        began, width = now(), input_ids.shape[1]
        lengths_B = torch.tensor(turns.lengths)
        if len(lengths_B) != len(input_ids):
            raise ValueError(f"{len(lengths_B)} lengths for {len(input_ids)} answers")

        def end(tokens_BS: Any, logits_BV: Any) -> Any:
            due_B = lengths_B == tokens_BS.shape[1] + 1 - width
            logits_BV[:, [PAD, END]] = -torch.inf
            if due_B.any():
                logits_BV[due_B] = -torch.inf
                logits_BV[due_B, END] = 0.0
            return logits_BV

        written = generate(*args, input_ids=input_ids, logits_processor=LogitsProcessorList([end]), **kwargs)
        answer_tokens = int((getattr(written, "sequences", written)[:, width:] != PAD).sum())
        turns.tokens += int(kwargs["attention_mask"].sum()) + answer_tokens
        turns.answer_tokens += answer_tokens
        wall, cpu = now()
        turns.rollout = turns.rollout[0] + wall - began[0], turns.rollout[1] + cpu - began[1]
        return written

    policy.generate = counted


# Models and what trainers want beside them


def models(work: dict[str, Any]) -> tuple[Any, Any]:
    """The base and the SFT model, which lies in the folder `sft` too; random where no model is named."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    base: Any
    if work["model"] is None:
        base = LlamaForCausalLM(LlamaConfig(**work["config"]))
    else:
        base = AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.float32)
    base.config.pad_token_id, base.config.eos_token_id = PAD, END
    base.generation_config = GenerationConfig(pad_token_id=PAD, eos_token_id=END)
    sft = copy.deepcopy(base)
    with torch.no_grad():
        for weight in sft.parameters():
            weight.add_(0.01 * torch.randn_like(weight))
    sft.save_pretrained("sft")
    return base.requires_grad_(False).eval(), sft.requires_grad_(False).eval()


def loaded(kind: Any, **more: Any) -> Any:
    """A trainable model that begins as the SFT model does."""
    import torch

    return kind.from_pretrained("sft", dtype=torch.float32, **more)


def tokenizer(vocabulary: int) -> Any:
    """Words `<0> <1> ...`, so that text is token ids."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"<{i}>": i for i in range(vocabulary)}, unk_token=f"<{PAD}>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=f"<{PAD}>", eos_token=f"<{END}>", padding_side="left"
    )


def arguments(work: dict[str, Any], **more: Any) -> dict[str, Any]:
    """What every trainer is told."""
    same: dict[str, Any] = {"output_dir": "out", "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    same |= {"per_device_train_batch_size": work["rows"], "temperature": 1.0}
    same |= {"learning_rate": 1e-5, "lr_scheduler_type": "constant"}
    return same | {"report_to": "none", "save_strategy": "no", "disable_tqdm": True} | more


def log_ratio(sft: Any, base: Any, tokens_BS: Any, mask_BS: Any, width: int) -> Any:
    """log pi_sft - log pi_base of the last `width` tokens of each row, BT."""

    def logprobs(model: Any) -> Any:
        positions_BS = (mask_BS.cumsum(1) - 1).clamp(min=0)
        inputs = {"input_ids": tokens_BS, "attention_mask": mask_BS.long(), "position_ids": positions_BS}
        logits_BTV = model(**inputs, use_cache=False, logits_to_keep=width + 1).logits[:, :-1]
        chosen_BT = logits_BTV.gather(-1, tokens_BS[:, -width:, None])[..., 0]
        return chosen_BT - logits_BTV.logsumexp(-1)

    return (logprobs(sft) - logprobs(base)) * mask_BS[:, -width:]


# PPOTrainer of TRL 1.12


def ppo_trainer(work: dict[str, Any]) -> tuple[Any, Any]:
    """Policy and trainer: PPO with a critic of the SFT model's body, and the log-ratio as a reward model."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    base, sft = models(work)
    context = max(map(len, work["prompts"]))  # the width that a batch of all prompts is padded to

    class Body(torch.nn.Module):
        def forward(self, input_ids: Any, attention_mask: Any, **_: Any) -> Any:
            ratio_BT = log_ratio(sft, base, input_ids, attention_mask, input_ids.shape[1] - context)
            so_far_BS = torch.nn.functional.pad(ratio_BT.cumsum(1), (context, 0))
            return SimpleNamespace(hidden_states=(so_far_BS.unsqueeze(-1),))

    class Reward(torch.nn.Module):
        """What get_reward() reads at the last token of an answer: the log-ratio of the answer so far."""

        base_model_prefix = "body"

        def __init__(self) -> None:
            super().__init__()
            self.body, self.score = Body(), torch.nn.Identity()

    policy = loaded(AutoModelForCausalLM)
    config = PPOConfig(
        **arguments(work),
        gradient_accumulation_steps=work["rollouts"] // work["rows"],
        num_mini_batches=work["minibatches"],
        num_ppo_epochs=work["epochs"],
        total_episodes=work["rollouts"] * work["steps"],
        response_length=work["longest"],
        stop_token_id=END,
        num_sample_generations=0,
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer(base.config.vocab_size),
        model=policy,
        ref_model=sft,
        reward_model=Reward(),
        value_model=loaded(AutoModelForSequenceClassification, num_labels=1),
        train_dataset=Dataset.from_dict({"input_ids": work["prompts"]}),
    )
    return policy, trainer


# GRPOTrainer and RLOOTrainer from TRL 1.16 on


def group_trainer(work: dict[str, Any]) -> tuple[Any, Any]:
    """Policy and trainer: GRPO or RLOO with several answers to each prompt, and the log-ratio as a reward function."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import pad

    base, sft = models(work)
    words, kind = tokenizer(base.config.vocab_size), work["trainer"].upper()

    @torch.no_grad()
    def reward(prompts: Any, completions: Any, completion_ids: Any, **_: Any) -> list[float]:
        asked = [torch.tensor(ids) for ids in words(prompts)["input_ids"]]
        said = [torch.tensor(ids) for ids in completion_ids]
        sides = [(asked, "left"), (said, "right")]
        tokens_BS = torch.cat([pad(rows, padding_value=PAD, padding_side=side) for rows, side in sides], 1)
        masks = [
            pad([torch.ones_like(row) for row in rows], padding_value=0, padding_side=side) for rows, side in sides
        ]
        width = max(map(len, said))
        return log_ratio(sft, base, tokens_BS, torch.cat(masks, 1).bool(), width).sum(1).tolist()

    policy = loaded(AutoModelForCausalLM)
    config = getattr(trl, f"{kind}Config")(
        **arguments(work),
        steps_per_generation=work["rollouts"] // work["rows"],
        gradient_accumulation_steps=work["rollouts"] // work["minibatches"] // work["rows"],
        num_iterations=work["epochs"],
        num_generations=work["per_prompt"],
        max_completion_length=work["longest"],
        max_steps=work["steps"] * work["epochs"] * work["minibatches"],
        beta=0.05,  # RLOO's default; GRPO's is none, which would spare it the SFT model's pass
        logging_strategy="no",
    )
    prompts = [" ".join(f"<{token}>" for token in prompt) for prompt in work["prompts"][:: work["per_prompt"]]]
    trainer = getattr(trl, f"{kind}Trainer")(
        model=policy,
        reward_funcs=reward,
        args=config,
        processing_class=words,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
    )
    return policy, trainer


if __name__ == "__main__":
    if sys.argv[1:] == ["versions"]:
        print(json.dumps(versions()))
    else:
        main()
