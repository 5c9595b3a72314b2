"""Small configs of every kind, for the invariance matrix."""

from __future__ import annotations

import dataclasses
from typing import Any

from llmjax.core.model_sections import LatentConfig
from llmjax.core.sections import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig, TrainConfig

CONFIG = Config(
    model=ModelConfig(vocab_size=32, num_layers=4, dim=16, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=32,
                      max_seq_len=64, compute_dtype="float32", init_scale=0.2),
    data=DataConfig(seq_len=32, batch_size=32),
    optim=OptimConfig(learning_rate=1e-3, warmup_steps=0),
    train=TrainConfig(accumulation=4),
)  # fmt: skip


def change(config: Config = CONFIG, **sections: dict[str, Any]) -> Config:
    """A copy with some fields of some sections replaced."""
    return dataclasses.replace(config, **{name: dataclasses.replace(getattr(config, name), **fields)
                                          for name, fields in sections.items()})  # fmt: skip


def attention(**fields: Any) -> Config:
    """A config whose attention differs."""
    return change(model={"attention": dataclasses.replace(CONFIG.model.attention, **fields)})


def sparse(**fields: Any) -> Config:
    """A mixture of four experts, two a token."""
    moe = dataclasses.replace(CONFIG.model.moe, num_experts=4, top_k=2, expert_mlp_dim=16, **fields)
    return change(model={"moe": moe})


LATENT = LatentConfig(kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
# All of them on packed documents, with four microbatches to a step.
CONFIGS = {
    "dense": CONFIG,
    "tied": change(model={"embeddings": "tied"}),
    "window": attention(window=9),
    "capped": attention(softcap=5.0, sinks="learned"),
    "dropout": change(model={"dropout": 0.2}),
    "sparse": sparse(num_shared_experts=1, jitter=0.1, balance_loss=0.1, z_loss=0.01),
    "balanced": sparse(router_bias="balancing", score="sigmoid"),
    "latent": change(model={"latent": LATENT}),
    "encoder-decoder": change(model={"encoder_layers": 2, "positions": "relative"}, data={"target_len": 16}),
}
MESHES = {
    "fsdp along a torus": MeshConfig(data=1, fsdp=8, torus="2x2x2"),
    "ZeRO-2": MeshConfig(data=2, fsdp=4, shard="gradients"),
    "ZeRO-1": MeshConfig(data=2, fsdp=2, tensor=2, shard="optimizer"),
    "ring": MeshConfig(data=1, fsdp=2, context=4),
    "all_gather": MeshConfig(data=2, context=2, tensor=2, context_method="all_gather"),
    "ulysses": MeshConfig(data=2, context=2, fsdp=2, context_method="ulysses"),
    "gpipe": MeshConfig(data=2, stage=2, tensor=2),
    "circular": MeshConfig(data=2, stage=2, fsdp=2, schedule="circular", rounds=2),
    "1f1b": MeshConfig(data=2, stage=2, tensor=2, schedule="1f1b"),
    "slices": MeshConfig(slice=2, data=1, stage=2, context=2),
    "expert": MeshConfig(data=1, expert=2, fsdp=2, tensor=2),
}
# What every run of the tests compares, and what slow ones do: each mesh with the models that it treats apart.
QUICK = [("dense", "ring"), ("dense", "1f1b")]
SLOW = [
    *(("dense", mesh) for mesh in MESHES if ("dense", mesh) not in QUICK and mesh != "expert"),
    ("tied", "ZeRO-1"), ("tied", "gpipe"),
    ("window", "ring"), ("capped", "ulysses"),
    ("dropout", "all_gather"), ("dropout", "1f1b"),
    ("sparse", "expert"), ("sparse", "1f1b"), ("sparse", "ring"), ("balanced", "expert"),
    ("latent", "ZeRO-1"), ("latent", "gpipe"), ("latent", "ring"),
    ("encoder-decoder", "ZeRO-1"), ("encoder-decoder", "fsdp along a torus"),
]  # fmt: skip
