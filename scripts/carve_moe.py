"""Carve a Mixture-of-Experts out of a dense model's trained weights and save it as Qwen2-MoE in Hugging Face format.

    python scripts/carve_moe.py DENSE -o MOE [--text FILE ...]

DENSE is a folder of the llama family, for example SmolLM2-135M. Small models with trained experts are not to be had;
this is the next best: each expert holds neurons of the dense model, their weights bit for bit. Nothing is trained but
routers and norms, and no text is read but what the dense model writes itself (--text only measures perplexity).

The MLP of a layer is Σ_j h_j d_j over neurons j, with h_j = silu(g_j·x) (u_j·x). Its neurons are parted into a shared
expert S and routed experts E_1 … E_n of equal width, and the layer becomes

    2σ(s·x) Σ_{j in S} h_j d_j  +  n Σ_{e in top k} p_e Σ_{j in E_e} h_j d_j,     p = softmax(R x)

which is Qwen2-MoE with the factors folded into weights: 2 into the shared expert's down, n into up and down by halves,
so that neither stands out against the other. All are powers of two, hence exact in bfloat16. With all experts on, R = 0
and s = 0, it is the dense layer.

1. The dense model writes text: random first tokens, the rest sampled.
2. Shared are the neurons with most energy, h_j² ‖d_j‖² relative to the stream's, on average.
3. Experts are balanced clusters of the others: first k-means of gate rows; then, in turns, each token takes the k
   experts that hold most of its energy, and neurons go where they are used most (a linear assignment).
4. A router begins as a ridge regression of each expert's log energy on x and is fitted to the layer's output; then
   all routers and norms together are fitted to the dense model's distribution (KL).

Widths: rows of an expert's down matrix are as long as the expert is wide, and formats store groups of 32, 64 or 128
weights. Of 1,536 neurons, 512 shared and 16 experts of 64 are the widest legal parts with sixteen experts; groups of 64
fit gate and up as well, whose rows have 576.

Equal arguments on the same machine, with the same library versions, give the same files byte for byte.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

KEPT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
"""Settings that mean the same in Llama and Qwen2-MoE."""
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "chat_template.jinja",
)
AT_ONCE = 64  # windows that are written side by side
STEP_TOKENS = 1024  # of one step of all layers together
LAYER_RATE = 1e-4  # of a layer's router, relative to one over the size of its inputs
RATE = 5e-3  # of a router or a norm among all, relative to its size
CHUNK = 2048  # tokens whose experts' outputs are held at once
LENGTH = 512  # tokens of a window whose perplexity is measured
ROUNDS = 10  # of moving neurons between experts
RIDGE = 0.01  # of the mean square of the inputs
SCALES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.4, 2.0)  # of a first router; 0 weighs all experts alike
TINY = 1e-12


class UsageError(Exception):
    """Something the user can put right; its message is one line."""


@dataclass(frozen=True)
class Shape:
    """How a layer's neurons are parted. active: experts at work for each token, beside the shared one."""

    shared: int
    experts: int
    active: int
    neurons: int

    @property
    def width(self) -> int:
        """Neurons of one routed expert."""
        return (self.neurons - self.shared) // self.experts

    @property
    def scales(self) -> tuple[int, int]:
        """What up and down of a routed expert are multiplied with: powers of two, together the number of experts."""
        up = 1 << (self.experts.bit_length() - 1) // 2
        return up, self.experts // up


@dataclass(frozen=True)
class Schedule:
    """How routers are fitted: each layer's alone, then all together, each of `steps` on some windows."""

    layer_steps: int
    steps: int
    windows: int
    seed: int


@dataclass(frozen=True)
class Seen:
    """What a layer's MLP gets. weight: what each token counts, one over the energy of its stream [tokens]."""

    inputs: Tensor  # [tokens, hidden]
    weight: Tensor


class CarvedMLP(nn.Module):
    """A dense MLP whose neurons are parted: computes all of them and weighs each expert's, which is easy to train.

    order: the neurons of the shared expert, then of each routed one.
    """

    def __init__(self, mlp: Any, order: Tensor, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.gate = nn.Parameter(mlp.gate_proj.weight.data[order], requires_grad=False)
        self.up = nn.Parameter(mlp.up_proj.weight.data[order], requires_grad=False)
        self.down = nn.Parameter(mlp.down_proj.weight.data[:, order], requires_grad=False)
        hidden = self.gate.shape[1]
        self.router = nn.Parameter(torch.zeros(shape.experts, hidden))
        self.shared_gate = nn.Parameter(torch.zeros(hidden))

    def weights(self, x: Tensor) -> Tensor:
        """What the shared expert's and each routed one's output is multiplied with [..., 1 + experts]; 1 is dense."""
        chances = F.linear(x.float(), self.router).softmax(-1)
        kept = torch.zeros_like(chances).scatter(-1, chances.topk(self.shape.active, dim=-1).indices, 1.0)
        shared = 2 * (x.float() @ self.shared_gate).sigmoid()
        return torch.cat([shared[..., None], self.shape.experts * chances * kept], dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] to the same."""
        h = F.silu(F.linear(x, self.gate)) * F.linear(x, self.up)
        weights = self.weights(x).to(h.dtype)
        shared, routed = h.split([self.shape.shared, self.shape.neurons - self.shape.shared], dim=-1)
        routed = routed.unflatten(-1, (self.shape.experts, -1)) * weights[..., 1:, None]
        return F.linear(torch.cat([shared * weights[..., :1], routed.flatten(-2)], dim=-1), self.down)


def written(model: LlamaForCausalLM, windows: int, length: int, seed: int) -> Tensor:
    """Text of the model's own, int64 [windows, length]: random first tokens, the rest sampled as the model expects."""
    chance = torch.Generator().manual_seed(seed)
    counts = [min(AT_ONCE, windows - start) for start in range(0, windows, AT_ONCE)]
    return torch.cat([side_by_side(model, count, length, chance) for count in counts])


@torch.no_grad()
def side_by_side(model: LlamaForCausalLM, windows: int, length: int, chance: torch.Generator) -> Tensor:
    """Some windows of it."""
    ids = torch.randint(model.config.vocab_size, (windows, 1), generator=chance)
    known = None
    while ids.shape[1] < length:
        output = model(ids[:, -1:], past_key_values=known, use_cache=True)
        known = output.past_key_values
        drawn = torch.multinomial(output.logits[:, -1].float().softmax(-1), 1, generator=chance)
        ids = torch.cat([ids, drawn], dim=1)
    return ids


def shared_first(energy: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Neurons of the shared expert and the others, both in order, from energies [tokens, neurons]."""
    ranked = energy.mean(0).argsort(descending=True, stable=True)
    return ranked[: shape.shared].sort().values, ranked[shape.shared :].sort().values


def balanced(gain: np.ndarray, width: int) -> np.ndarray:
    """Cluster of each neuron from gains [neurons, clusters]: the largest sum with `width` neurons to a cluster."""
    _, slot = linear_sum_assignment(np.repeat(gain, width, axis=1), maximize=True)
    return slot // width


def by_rows(rows: Tensor, shape: Shape, chance: torch.Generator, rounds: int = 4) -> np.ndarray:
    """Balanced k-means of gate rows [neurons, hidden] by angle."""
    rows = F.normalize(rows, dim=1)
    centres = rows[torch.randperm(len(rows), generator=chance)[: shape.experts]]
    for _ in range(rounds):
        cluster = balanced((rows @ centres.T).numpy(), shape.width)
        centres = F.normalize(torch.stack([rows[cluster == e].sum(0) for e in range(shape.experts)]), dim=1)
    return cluster


def by_use(energy: Tensor, cluster: np.ndarray, shape: Shape, rounds: int) -> np.ndarray:
    """Better clusters: what the k best experts hold of the energy [tokens, neurons] grows with every round."""
    for _ in range(rounds):
        member = F.one_hot(torch.from_numpy(cluster), shape.experts).float()
        best = (energy @ member).topk(shape.active, dim=1).indices
        taken = torch.zeros(len(energy), shape.experts).scatter(1, best, 1.0)
        again = balanced((energy.T @ taken).numpy(), shape.width)
        if (again == cluster).all():
            break
        cluster = again
    return cluster


@torch.no_grad()
def watched(model: LlamaForCausalLM, ids: Tensor, at_once: int = 8) -> tuple[list[Seen], Tensor]:
    """What every layer's MLP gets on windows of tokens, and the states before the head [windows, length, hidden]."""
    layers = model.model.layers
    inputs: list[list[Tensor]] = [[] for _ in layers]
    energy: list[list[Tensor]] = [[] for _ in layers]
    hooks = []
    for index, layer in enumerate(layers):
        hooks.append(
            layer.mlp.register_forward_pre_hook(lambda _, x, own=inputs[index]: own.append(x[0].flatten(0, 1)))
        )
        hooks.append(layer.register_forward_hook(lambda _, x, y, own=energy[index]: own.append(stream_energy(y))))
    states = torch.cat([model.model(part).last_hidden_state for part in ids.split(at_once)])
    for hook in hooks:
        hook.remove()
    seen = [Seen(torch.cat(x).float(), torch.cat(e).reciprocal()) for x, e in zip(inputs, energy, strict=True)]
    return seen, states


def stream_energy(output: Any) -> Tensor:
    """Mean square of each token's stream behind a layer [tokens]."""
    stream = output[0] if isinstance(output, tuple) else output
    return stream.flatten(0, -2).float().square().mean(-1).clamp(min=TINY)


@torch.no_grad()
def part(mlp: Any, seen: Seen, shape: Shape, chance: torch.Generator) -> Tensor:
    """Order of a layer's neurons: the shared expert's, then each routed one's."""
    h = F.silu(F.linear(seen.inputs, mlp.gate_proj.weight.float())) * F.linear(seen.inputs, mlp.up_proj.weight.float())
    energy = h.square_().mul_(mlp.down_proj.weight.float().square().sum(0)).mul_(seen.weight[:, None])
    shared, others = shared_first(energy, shape)
    energy = energy[:, others]
    cluster = by_rows(mlp.gate_proj.weight[others].float(), shape, chance)
    cluster = by_use(energy, cluster, shape, ROUNDS)
    return torch.cat([shared, *(others[torch.from_numpy(cluster == e)] for e in range(shape.experts))])


@torch.no_grad()
def grams(carved: CarvedMLP, seen: Seen) -> Tensor:
    """Products of the experts' outputs with each other, weighed by token, [tokens, 1 + experts, 1 + experts]."""
    shape, gate, up, down = carved.shape, carved.gate.float(), carved.up.float(), carved.down.float()
    found = []
    for x, weight in zip(seen.inputs.split(CHUNK), seen.weight.split(CHUNK), strict=True):
        h = F.silu(F.linear(x, gate)) * F.linear(x, up)
        outputs = [F.linear(h[:, : shape.shared], down[:, : shape.shared])]
        for start in range(shape.shared, shape.neurons, shape.width):
            columns = slice(start, start + shape.width)
            outputs.append(F.linear(h[:, columns], down[:, columns]))
        stacked = torch.stack(outputs, dim=1) * weight.sqrt()[:, None, None]
        found.append(stacked @ stacked.mT)
    return torch.cat(found)


def missing(weights: Tensor, gram: Tensor) -> Tensor:
    """Energy of what a layer's output lacks, as a share of the output's, from weights [tokens, 1 + experts]."""
    lacks = 1 - weights
    return torch.einsum("te,tef,tf->", lacks, gram, lacks) / gram.sum()


@torch.no_grad()
def first_router(carved: CarvedMLP, seen: Seen, gram: Tensor) -> None:
    """Rows that predict each expert's log energy from x, and the scale of them that leaves the layer's output best."""
    x = seen.inputs
    target = gram.diagonal(dim1=1, dim2=2)[:, 1:].clamp(min=TINY).log()
    target = target - target.mean(1, keepdim=True)
    square = x.T @ x
    square.diagonal().add_(RIDGE * square.diagonal().mean())
    rows = torch.linalg.solve(square, x.T @ target).T
    lacks = []
    for scale in SCALES:
        carved.router.copy_(scale * rows)
        lacks.append(float(missing(carved.weights(x), gram)))
    carved.router.copy_(SCALES[int(np.argmin(lacks))] * rows)


def fit_router(carved: CarvedMLP, seen: Seen, gram: Tensor, schedule: Schedule) -> float:
    """Fit a layer's router and shared gate to the layer's output. Returns the share of energy that stays missing."""
    first_router(carved, seen, gram)
    size = float(seen.inputs.square().mean().sqrt())
    own = [carved.router, carved.shared_gate]
    optimizer = torch.optim.Adam(own, lr=LAYER_RATE / size)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / max(1, schedule.layer_steps))
    for _ in range(schedule.layer_steps):
        optimizer.zero_grad()
        missing(carved.weights(seen.inputs), gram).backward()
        optimizer.step()
        decay.step()
    with torch.no_grad():
        return float(missing(carved.weights(seen.inputs), gram))


def trained_together(student: LlamaForCausalLM) -> Iterator[nn.Parameter]:
    """Routers, shared gates and all norms."""
    for name, parameter in student.named_parameters():
        if name.endswith((".router", ".shared_gate")) or "norm" in name:
            yield parameter


def distil(student: LlamaForCausalLM, states: Tensor, ids: Tensor, schedule: Schedule) -> None:
    """Fit routers and norms of all layers in place, to the distribution that the dense model had at the same tokens.

    states: the dense model's before the head [windows, length, hidden].
    """
    head = student.lm_head.weight
    own = list(trained_together(student))
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    for parameter in own:
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    groups = [{"params": [p], "lr": RATE * float(p.detach().square().mean().sqrt())} for p in own]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.98))
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 * (1 - step / schedule.steps)))
    for step, batch in enumerate(batches(len(ids), schedule)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = student.model(ids[batch], use_cache=False).last_hidden_state
            logits = F.linear(output, head)
            with torch.no_grad():
                target = F.linear(states[batch], head)
        loss = F.kl_div(
            logits.float().log_softmax(-1).flatten(0, 1),
            target.float().log_softmax(-1).flatten(0, 1),
            log_target=True,
            reduction="batchmean",
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        print(f"step {step + 1}/{schedule.steps}  KL {loss.item():.4f}", flush=True)


def batches(windows: int, schedule: Schedule) -> Iterator[Tensor]:
    """Numbers of the windows of each step: all in random order, again and again."""
    chance = torch.Generator().manual_seed(schedule.seed)
    left = torch.zeros(0, dtype=torch.int64)
    for _ in range(schedule.steps):
        if len(left) < schedule.windows:
            left = torch.cat([left, torch.randperm(windows, generator=chance)])
        yield left[: schedule.windows]
        left = left[schedule.windows :]


def moe_config(dense: Any, shape: Shape) -> Qwen2MoeConfig:
    """The config of a Qwen2-MoE that does what the carved model does."""
    return Qwen2MoeConfig(
        **{name: getattr(dense, name) for name in KEPT},
        qkv_bias=False,
        moe_intermediate_size=shape.width,
        shared_expert_intermediate_size=shape.shared,
        num_experts=shape.experts,
        num_experts_per_tok=shape.active,
        norm_topk_prob=False,
        use_sliding_window=False,
        dtype="bfloat16",
    )


@torch.no_grad()
def as_moe(student: LlamaForCausalLM, shape: Shape) -> Qwen2MoeForCausalLM:
    """The same model as Qwen2-MoE in bfloat16. Scales of the experts go into their down matrices."""
    up_scale, down_scale = shape.scales
    state = {name: tensor for name, tensor in student.state_dict().items() if ".mlp." not in name}
    for index, layer in enumerate(student.model.layers):
        mlp, name = layer.mlp, f"model.layers.{index}.mlp"
        sizes = [shape.shared, shape.neurons - shape.shared]
        (gate, gates), (up, ups), (down, downs) = mlp.gate.split(sizes), mlp.up.split(sizes), mlp.down.split(sizes, 1)
        state |= {
            f"{name}.gate.weight": mlp.router,
            f"{name}.shared_expert_gate.weight": mlp.shared_gate[None],
            f"{name}.shared_expert.gate_proj.weight": gate,
            f"{name}.shared_expert.up_proj.weight": up,
            f"{name}.shared_expert.down_proj.weight": 2 * down,
            f"{name}.experts.gate_up_proj": torch.cat(
                [part.unflatten(0, (shape.experts, -1)) for part in (gates, up_scale * ups)], dim=1
            ),
            f"{name}.experts.down_proj": down_scale * downs.unflatten(1, (shape.experts, -1)).transpose(0, 1),
        }
    moe = Qwen2MoeForCausalLM(moe_config(student.config, shape)).to(torch.bfloat16)
    moe.load_state_dict(state)
    return moe.eval()


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, text: str, tokens: int) -> float:
    """Of a text's first tokens, in windows; the first token of each is given."""
    ids = tokenizer(text, return_tensors="pt", verbose=False, add_special_tokens=False)["input_ids"][:, :tokens]
    loss = count = 0
    for window in ids.split(LENGTH, dim=1):
        if window.shape[1] > 1:
            logits = model(window).logits[0, :-1].float()
            loss += float(F.cross_entropy(logits, window[0, 1:], reduction="sum"))
            count += window.shape[1] - 1
    return math.exp(loss / count)


def read_text(path: Path) -> str:
    """A whole UTF-8 file. Raises UsageError."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text") from error


def positive(text: str) -> int:
    """An argparse type: an integer above zero."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def natural(text: str) -> int:
    """An argparse type: an integer, zero or more."""
    return 0 if text == "0" else positive(text)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Carve a Mixture-of-Experts out of a dense model's weights and save it as Qwen2-MoE.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("dense", type=Path, help="folder of a dense model of the llama family")
    parser.add_argument("-o", "--output", required=True, type=Path, help="folder to write; must not exist")
    parser.add_argument("--text", nargs="*", default=(), type=Path, help="files to measure perplexity on; never to fit")
    parser.add_argument("--max-tokens", type=positive, default=2048, help="tokens of each text")
    parser.add_argument("--shared", type=positive, default=512, help="neurons of the shared expert")
    parser.add_argument("--experts", type=positive, default=16, help="routed experts per layer")
    parser.add_argument("--active", type=positive, default=6, help="routed experts at work for each token")
    parser.add_argument("--windows", type=positive, default=64, help="windows that the dense model writes")
    parser.add_argument("--length", type=positive, default=192, help="tokens of each")
    parser.add_argument("--layer-steps", type=natural, default=20, help="steps that fit each layer's router")
    parser.add_argument("--steps", type=natural, default=48, help="steps that fit all routers and norms together")
    parser.add_argument("--seed", type=int, default=0, help="seed of the text, the clusters and the order of windows")
    return parser


def load_dense(folder: Path) -> LlamaForCausalLM:
    """A dense model that Qwen2-MoE can hold, in bfloat16. Raises UsageError."""
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} holds no config.json; name a folder of a Hugging Face model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    config = model.config
    if not isinstance(model, LlamaForCausalLM):
        raise UsageError(f"{folder} is of the family {config.model_type}; only llama can be carved")
    if config.attention_bias or config.mlp_bias or config.hidden_act != "silu":
        raise UsageError(f"{folder} has biases or another activation than silu, which Qwen2-MoE cannot hold")
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raise UsageError(f"{folder} has heads of {config.head_dim}, which Qwen2-MoE cannot hold beside its hidden size")
    return model


def make_shape(args: argparse.Namespace, neurons: int) -> Shape:
    """How layers are parted. Raises UsageError if the neurons do not go round."""
    shape = Shape(args.shared, args.experts, args.active, neurons)
    if shape.shared >= neurons or (neurons - shape.shared) % shape.experts:
        raise UsageError(
            f"{neurons} neurons less --shared {shape.shared} are not equal parts for --experts {shape.experts}"
        )
    if shape.experts & (shape.experts - 1):
        raise UsageError(f"--experts must be a power of two, so that bfloat16 holds the weights, not {shape.experts}")
    if shape.active > shape.experts:
        raise UsageError(f"--active {shape.active} is more than --experts {shape.experts}")
    return shape


def carve(model: LlamaForCausalLM, shape: Shape, args: argparse.Namespace) -> None:
    """Part every layer's MLP and fit routers and norms, in place."""
    ids = written(model, args.windows, args.length, args.seed)
    print(f"{ids.numel():,} tokens written", flush=True)
    seen, states = watched(model, ids)
    schedule = Schedule(args.layer_steps, args.steps, max(1, STEP_TOKENS // args.length), args.seed)
    chance = torch.Generator().manual_seed(args.seed)
    for index, layer in enumerate(model.model.layers):
        order = part(layer.mlp, seen[index], shape, chance)
        layer.mlp = CarvedMLP(layer.mlp, order, shape)
        lacks = fit_router(layer.mlp, seen[index], grams(layer.mlp, seen[index]), schedule)
        print(f"layer {index}: {lacks:.1%} of the output's energy is missing", flush=True)
    if schedule.steps:
        distil(model, states, ids, schedule)


def run(args: argparse.Namespace) -> None:
    """Load, carve, save, measure. Raises UsageError."""
    if args.output.exists():
        raise UsageError(f"{args.output} already exists; choose another output folder")
    torch.use_deterministic_algorithms(True)
    texts = {path.name: read_text(path) for path in args.text}
    model = load_dense(args.dense)
    shape = make_shape(args, model.config.intermediate_size)
    tokenizer = AutoTokenizer.from_pretrained(args.dense) if texts else None
    dense = {name: perplexity(model, tokenizer, text, args.max_tokens) for name, text in texts.items()}
    carve(model, shape, args)
    as_moe(model, shape).save_pretrained(args.output)
    for name in TOKENIZER:
        if (args.dense / name).is_file():
            shutil.copyfile(args.dense / name, args.output / name)
    moe = AutoModelForCausalLM.from_pretrained(args.output, dtype=torch.bfloat16).eval()
    for name, text in texts.items():
        after = perplexity(moe, tokenizer, text, args.max_tokens)
        print(f"{name}: perplexity {dense[name]:.2f} dense, {after:.2f} carved, {after / dense[name]:.2f} times")
    print(f"saved {args.output}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 for a mistake in the arguments."""
    try:
        run(make_parser().parse_args(arguments))
    except UsageError as error:
        print(f"carve_moe: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
