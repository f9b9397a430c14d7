"""Run token ids through vLLM in a process of its own: `run_vllm.py FOLDER ARGUMENTS`, both as the test gives them.

ARGUMENTS is JSON: prompts, count (of new tokens) and arguments of `vllm.LLM`. Prints one JSON object as the last line:
greedy tokens, log-probabilities of the prompts' tokens, and bytes that the model holds by the end of a tensor's name.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main(folder: str, prompts: list[list[int]], count: int, arguments: dict[str, Any]) -> None:
    from decoding_kernels import compute_as_on_gpus
    from vllm import LLM, SamplingParams

    compute_as_on_gpus()
    engine = LLM(folder, skip_tokenizer_init=True, max_model_len=64, max_num_seqs=4, seed=0, **arguments)
    sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, prompt_logprobs=0)
    answers = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    model = engine.llm_engine.model_executor.driver_worker.worker.model_runner.model
    held: dict[str, int] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        held[name] = tensor.nbytes
    result = {
        "tokens": [list(answer.outputs[0].token_ids) for answer in answers],
        "logprobs": [
            [place[token].logprob for place, token in zip(answer.prompt_logprobs[1:], prompt[1:], strict=True)]
            for answer, prompt in zip(answers, prompts, strict=True)
        ],
        "held": held,
    }
    sys.stdout.write("\n" + json.dumps(result) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    given = json.loads(sys.argv[2])
    main(sys.argv[1], given["prompts"], given["count"], given["arguments"])
