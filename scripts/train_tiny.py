"""Train a tiny Qwen2-MoE language model on your own text and save it in Hugging Face format.

The defaults are the sizes and the recipe of the model AlphaQ bundles as `tiny`: 4 layers of 8 routed
experts (top-2) and one shared expert, hidden size 256, untied head. Routing is balanced by an auxiliary loss in every
layer; transformers' own one pools all layers, which lets single layers stay unbalanced.

Example, about 36 minutes on two cores for the default 9.6 million tokens:

    python scripts/train_tiny.py docs/*.txt dictionary.txt -o my-tiny

Equal arguments on the same machine, with the same library versions, give the same files byte for byte.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen2MoeConfig, Qwen2MoeForCausalLM
from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # every byte, and the end of text
CHUNK_CHARACTERS = 1 << 16
HEAD_SIZE = 64
LONGEST_WARM_UP = 60


class UsageError(Exception):
    """Something the user can put right; its message is one line."""


def positive(text: str) -> int:
    """An argparse type: an integer above zero."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Train a tiny Mixture-of-Experts language model and save it in Hugging Face format.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("texts", nargs="+", type=Path, metavar="TEXT", help="UTF-8 text files to train on")
    parser.add_argument("-o", "--output", required=True, type=Path, help="folder to write; must not exist")
    parser.add_argument("--steps", type=positive, default=1170, help="optimizer steps")
    parser.add_argument("--tokens-per-step", type=positive, default=8192, help="tokens per optimizer step")
    parser.add_argument("--window", type=positive, default=512, help="tokens per training sequence")
    parser.add_argument("--layers", type=positive, default=4, help="decoder layers")
    parser.add_argument("--experts", type=positive, default=8, help="routed experts per layer, two at work per token")
    parser.add_argument("--hidden", type=positive, default=256, help=f"hidden size, a multiple of {HEAD_SIZE}")
    parser.add_argument("--expert-width", type=positive, default=256, help="inner width of every expert")
    parser.add_argument("--vocabulary", type=positive, default=4096, help="tokens to learn if no tokenizer is given")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json to use instead of learning one")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the order of the text")
    parser.add_argument("--log-every", type=positive, default=20, help="steps between printed losses")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot work before any time is spent. Raises UsageError."""
    if args.output.exists():
        raise UsageError(f"{args.output} already exists; choose another output folder")
    if args.experts < 2:
        raise UsageError("--experts must be at least 2, because every token uses two")
    if args.hidden % HEAD_SIZE:
        raise UsageError(f"--hidden must be a multiple of {HEAD_SIZE}, not {args.hidden}")
    if args.tokens_per_step < args.window:
        raise UsageError(f"--tokens-per-step ({args.tokens_per_step}) must be at least --window ({args.window})")
    if args.vocabulary < SMALLEST_VOCABULARY:
        raise UsageError(f"--vocabulary must be at least {SMALLEST_VOCABULARY}, not {args.vocabulary}")


def read_text(path: Path) -> str:
    """A whole UTF-8 file. Raises UsageError."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text") from error


def chunks(text: str) -> Iterator[str]:
    """The text in pieces small enough to tokenize in little memory."""
    for start in range(0, len(text), CHUNK_CHARACTERS):
        yield text[start : start + CHUNK_CHARACTERS]


def learn_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """A GPT-2-style byte-level BPE; short texts may give fewer tokens than asked for."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((chunk for text in texts for chunk in chunks(text)), trainer)
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer.json that knows the end of text. Raises UsageError."""
    text = read_text(path)
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise UsageError(f"{path} is not a tokenizer.json") from error
    if tokenizer.token_to_id(END_OF_TEXT) is None:
        raise UsageError(f"{path} has no {END_OF_TEXT} token")
    return tokenizer


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], window: int) -> torch.Tensor:
    """All texts as one row of ids, each closed by the end of text. Raises UsageError."""
    ids: list[int] = []
    for text in texts:
        for chunk in chunks(text):
            ids.extend(tokenizer.encode(chunk, add_special_tokens=False).ids)
        ids.append(tokenizer.token_to_id(END_OF_TEXT))
    if len(ids) <= window:
        raise UsageError(f"the text is too short: {len(ids)} tokens, and one window takes {window + 1}")
    return torch.tensor(ids)


def make_model(args: argparse.Namespace, tokenizer: Tokenizer) -> Qwen2MoeForCausalLM:
    """A fresh model with weights drawn from the seed."""
    heads = args.hidden // HEAD_SIZE
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    config = Qwen2MoeConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=args.hidden,
        intermediate_size=2 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2 if heads % 2 == 0 else heads,
        max_position_embeddings=max(1024, args.window),
        moe_intermediate_size=args.expert_width,
        shared_expert_intermediate_size=args.expert_width,
        num_experts=args.experts,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.01,
        tie_word_embeddings=False,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
    )
    torch.manual_seed(args.seed)
    return Qwen2MoeForCausalLM(config)


def draw_batch(ids: torch.Tensor, sequences: int, window: int, generator: torch.Generator) -> torch.Tensor:
    """Random windows of the text, [sequences, window + 1]: inputs and, shifted by one, targets."""
    starts = torch.randint(len(ids) - window, (sequences, 1), generator=generator)
    return ids[starts + torch.arange(window + 1)]


def losses(model: Qwen2MoeForCausalLM, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy per token, and the load-balancing loss summed over the layers."""
    config = model.config
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(input_ids=batch[:, :-1], output_router_logits=True, use_cache=False)
    entropy = F.cross_entropy(output.logits.float().flatten(0, 1), batch[:, 1:].flatten())
    per_layer = [
        load_balancing_loss_func((logits.float(),), config.num_experts, config.num_experts_per_tok)
        for logits in output.router_logits
    ]
    return entropy, torch.stack(per_layer).sum()


def rate_factor(step: int, steps: int) -> float:
    """Learning rate of a step as a share of the peak: warm-up, constant, linear decay over the second half."""
    warm_up = min(LONGEST_WARM_UP, max(1, steps // 10))
    return min(1.0, (step + 1) / warm_up, 2 * (steps - step) / steps)


def train(model: Qwen2MoeForCausalLM, ids: torch.Tensor, args: argparse.Namespace) -> None:
    """Train in place and print the loss every few steps."""
    torch.use_deterministic_algorithms(True)
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, args.steps))
    model.train()
    for step in range(1, args.steps + 1):
        batch = draw_batch(ids, args.tokens_per_step // args.window, args.window, generator)
        entropy, balance = losses(model, batch)
        (entropy + model.config.router_aux_loss_coef * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step == 1 or step % args.log_every == 0 or step == args.steps:
            print(f"step {step}/{args.steps}  loss {entropy.item():.4f}", flush=True)


def save(model: Qwen2MoeForCausalLM, tokenizer: Tokenizer, output: Path) -> None:
    """Write weights in bf16, tokenizer and configs."""
    model.to(torch.bfloat16).save_pretrained(output)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
    wrapped.save_pretrained(output)


def run(args: argparse.Namespace) -> None:
    """Read, train, save. Raises UsageError."""
    check_arguments(args)
    texts = [read_text(path) for path in args.texts]
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else learn_tokenizer(texts, args.vocabulary)
    ids = tokenize(tokenizer, texts, args.window)
    model = make_model(args, tokenizer)
    print(
        f"{model.num_parameters():,} parameters, {tokenizer.get_vocab_size():,} tokens known, {len(ids):,} in the text"
    )
    train(model, ids, args)
    save(model, tokenizer, args.output)
    print(f"saved {args.output}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 for a mistake in the arguments or the text."""
    try:
        run(make_parser().parse_args(arguments))
    except UsageError as error:
        print(f"train_tiny: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
