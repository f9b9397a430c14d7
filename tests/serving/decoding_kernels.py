"""Kernels that let vLLM run compressed-tensors files on any CPU: weights are restored when they are loaded.

vLLM 0.32 has kernels for CPUs of 4-bit weights alone; those of experts ask for AMX, know two ways of routing, and round
what goes in to 8 bits. With these, vLLM builds, merges and loads modules by the scheme that it finds for each, as it
does for a GPU, and multiplies in float32: what is left is whether the files are what its models expect. Two more of its
functions for CPUs compute otherwise than those for GPUs, and are replaced: routing, and rotary embeddings of latent
attention, of which one head alone would be turned. So is its gated delta rule, which knows bfloat16 alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.kernels.linear import _POSSIBLE_KERNELS, MPLinearKernel, MPLinearLayerConfig
from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
from vllm.model_executor.layers.fused_moe.router import cpu_router
from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_wna16 as experts,
)
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.platforms import PlatformEnum
from vllm.utils.torch_utils import LayerNameType, _resolve_layer_name


def restored(packed: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """Weights [..., rows, columns] rounded to bf16, of words [..., rows, words] and scales [..., rows, groups]."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    codes = (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)
    weights = (codes.flatten(-2) - 2 ** (bits - 1)).to(scales.dtype)
    weights *= scales.repeat_interleave(weights.shape[-1] // scales.shape[-1], -1)
    return weights.bfloat16().to(scales.dtype)


class DecodingLinear(MPLinearKernel):
    """Of linear layers."""

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        return True, None

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        bits = self.config.weight_type.size_bits
        weight = restored(layer.weight_packed.data, layer.weight_scale.data, bits)
        layer.weight = nn.Parameter(weight, requires_grad=False)

    def apply_weights(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return nn.functional.linear(x, layer.weight, bias)


def _restore_experts(self: Any, layer: Any) -> None:
    """Instead of giving them to a kernel."""
    for name in ("w13", "w2"):
        packed, scales = getattr(layer, f"{name}_weight_packed"), getattr(layer, f"{name}_weight_scale")
        setattr(layer, f"{name}_weight", nn.Parameter(restored(packed.data, scales.data, self.num_bits), False))
    plain = UnquantizedFusedMoEMethod(self.moe)
    layer._replace_quant_method(plain)
    plain.process_weights_after_loading(layer)


def _route(self: Any, hidden_states: torch.Tensor, router_logits: torch.Tensor, *others: Any, **options: Any) -> Any:
    """What vLLM's routers of GPUs do with scores that are no softmax, or corrected: the CPU's knows them in groups."""
    plain = self.scoring_func == "softmax" and self.e_score_correction_bias is None
    if not (plain or self.use_grouped_topk or self.custom_routing_function or self.scoring_func == "sqrtsoftplus"):
        self.use_grouped_topk, self.num_expert_group, self.topk_group = True, 1, 1
    return _cpu_route(self, hidden_states, router_logits, *others, **options)


_cpu_route = cpu_router.CPURouter._compute_routing


def _gated_delta_rule(
    mixed_qkv: torch.Tensor, b: torch.Tensor, a: torch.Tensor, core_attn_out: torch.Tensor, layer_name: LayerNameType
) -> None:
    """Of whole prompts, token by token, into core_attn_out [tokens, heads, values]; see `_one_prompt`."""
    context, name = get_forward_context(), _resolve_layer_name(layer_name)
    layer = context.no_compile_layers[name]
    if context.attn_metadata is None:  # vLLM only tries how much memory it needs
        return
    places = context.attn_metadata[name]
    assert places.num_decodes == 0
    assert not places.has_initial_state.any()
    gates = -layer.A_log.exp() * nn.functional.softplus(a + layer.dt_bias)
    for begin, end in zip(places.non_spec_query_start_loc, places.non_spec_query_start_loc[1:], strict=False):
        prompt = slice(int(begin), int(end))
        _one_prompt(layer, mixed_qkv[prompt], gates[prompt].exp(), b[prompt].sigmoid(), core_attn_out[prompt])


def _one_prompt(
    layer: Any, mixed_qkv: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor, out: torch.Tensor
) -> None:
    """S ← decay S, S ← S + k (β (v - kS)), o = qS for a state S of each head. vLLM's for CPUs knows bfloat16 alone."""
    width = layer.conv1d.weight.shape[-1]
    padded = nn.functional.pad(mixed_qkv.T, (width - 1, 0))
    mixed = nn.functional.conv1d(padded, layer.conv1d.weight, groups=len(padded))
    query, key, value = (one[0] for one in layer.rearrange_mixed_qkv(nn.functional.silu(mixed).T.contiguous()))
    query, key = (one * (one.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for one in (query, key))
    query, key = (one.repeat_interleave(value.shape[1] // one.shape[1], 1) for one in (query, key))
    state = torch.zeros(value.shape[1], key.shape[2], value.shape[2])
    for token in range(len(value)):
        state *= decay[token, :, None, None]
        lacking = value[token] - torch.einsum("hk,hkv->hv", key[token], state)
        state += torch.einsum("hk,hv->hkv", key[token], lacking * beta[token, :, None])
        out[token] = torch.einsum("hk,hkv->hv", query[token], state) / key.shape[2] ** 0.5


def compute_as_on_gpus() -> None:
    """What vLLM computes otherwise on CPUs, whatever the files."""
    torch.cpu._is_amx_tile_supported = lambda: False  # its kernels of latent attention know no float32
    cpu_router.CPURouter._compute_routing = _route
    RotaryEmbedding.forward_cpu = RotaryEmbedding.forward_native


def install() -> None:
    """For every model that is loaded from now on."""
    compute_as_on_gpus()
    gdn_attention.cpu_gdn_attention_core = _gated_delta_rule
    _POSSIBLE_KERNELS[PlatformEnum.CPU] = [DecodingLinear]
    experts.select_wna16_moe_backend = lambda **asked: (WNA16MoEBackend.EMULATION, CPUUnquantizedExperts)
    experts.CompressedTensorsWNA16MoEMethod.process_weights_after_loading = _restore_experts
