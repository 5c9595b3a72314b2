"""Train steps on the CPU beside PyTorch's, taken in turns so that a noisy machine disturbs all alike.

    python benchmarks/cpu_step.py [--rounds=10] [--variants=torch-fp32,llmjax-fp32,...]

The work: a Llama of 4 layers, width 256, 8 heads of 32, MLP 1024, untied vocabulary of 8192; 8 rows of 512 random
tokens; AdamW (0.9, 0.95, decay 0.1), gradients clipped at 1.0, no rematerialisation. Every variant is a process of its
own with a cold compilation cache; they are started one after the other, which gives the time to the end of the first
step, and then take one step each in every round. Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

START = time.time()
ROOT = Path(__file__).resolve().parents[1]
VOCAB, LAYERS, WIDTH, HEADS, HEAD_DIM, MLP, SEQ_LEN, BATCH = 8192, 4, 256, 8, 32, 1024, 512, 8
BASELINE = "torch-fp32"
# name -> (library, precision, mesh sizes)
VARIANTS: dict[str, tuple[str, str, dict[str, int]]] = {
    "torch-fp32": ("torch", "float32", {}),
    "llmjax-fp32": ("llmjax", "float32", {"data": 1}),
    "llmjax-fp32-fsdp8": ("llmjax", "float32", {"data": 1, "fsdp": 8}),
    "llmjax-fp32-fsdp4-tensor2": ("llmjax", "float32", {"data": 1, "fsdp": 4, "tensor": 2}),
    "torch-bf16": ("torch", "bfloat16", {}),
    "llmjax-bf16": ("llmjax", "bfloat16", {"data": 1}),
}


def torch_step(precision: str) -> Callable[[], float]:
    """One optimiser step of transformers' Llama; returns the loss."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=MLP, num_hidden_layers=LAYERS, head_dim=HEAD_DIM,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=SEQ_LEN, use_cache=False,
        tie_word_embeddings=False)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-5, betas=(0.9, 0.95), weight_decay=0.1)

    def step() -> float:
        tokens = torch.randint(0, VOCAB, (BATCH, SEQ_LEN))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def llmjax_step(precision: str, sizes: dict[str, int]) -> Callable[[], float]:
    """One step of the very function that `llmjax train` compiles; returns the loss."""
    from llmjax.core.platform import prepare

    num_devices = max(1, sizes.get("fsdp", 1) * sizes.get("tensor", 1))
    prepare(num_devices if num_devices > 1 else None)
    import jax
    import numpy as np

    from llmjax.core.mesh import make_mesh
    from llmjax.core.sections import Config, MeshConfig, ModelConfig, OptimConfig
    from llmjax.models.decoder import abstract_model, init_params
    from llmjax.train.batch import put_batch
    from llmjax.train.build import build_training
    from llmjax.train.pretrain import make_loss

    config = Config(
        model=ModelConfig(vocab_size=VOCAB, num_layers=LAYERS, dim=WIDTH, num_heads=HEADS, num_kv_heads=HEADS,
                          head_dim=HEAD_DIM, mlp_dim=MLP, embeddings="untied", compute_dtype=precision),
        optim=OptimConfig(learning_rate=3e-5, schedule="constant", warmup_steps=0), mesh=MeshConfig(**sizes))
    mesh, model = make_mesh(config.mesh), abstract_model(config.model)
    training = build_training(config, model, make_loss(config.task))
    train_step = jax.jit(training.step, donate_argnums=0)
    with jax.set_mesh(mesh):
        state = jax.jit(training.init)(init_params(config.model, jax.random.key(0), mesh))
    rng = np.random.default_rng(0)
    shape = (BATCH, SEQ_LEN)
    same = {"positions_BT": np.broadcast_to(np.arange(SEQ_LEN, dtype=np.int32), shape).copy(),
            "segment_ids_BT": np.ones(shape, np.int32), "weights_BT": np.ones(shape, np.float32)}

    def step() -> float:
        nonlocal state
        tokens = rng.integers(0, VOCAB, (BATCH, SEQ_LEN + 1)).astype(np.int32)
        with jax.set_mesh(mesh):
            batch = put_batch({"tokens_BT": tokens[:, :-1], "targets_BT": tokens[:, 1:], **same}, mesh)
            state, metrics = train_step(state, {}, batch)
        return float(metrics["loss"])

    return step


def work(name: str) -> None:
    """A variant's process: a first step at once, then one for every line on standard input."""
    library, precision, sizes = VARIANTS[name]
    step = torch_step(precision) if library == "torch" else llmjax_step(precision, sizes)
    loss = step()
    print(json.dumps({"loss": loss}), flush=True)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        print(json.dumps({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}), flush=True)


def launch(name: str) -> tuple[subprocess.Popen[str], float]:
    """Start a variant; returns it and the seconds to the end of its first step, process start included."""
    env = {k: v for k, v in os.environ.items() if k not in ("JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS")}
    env["PYTHONPATH"] = f"{ROOT}:{env.get('PYTHONPATH', '')}"
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, __file__, f"--work={name}"], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True, env=env)
    reply(process)
    return process, time.perf_counter() - began


def reply(process: subprocess.Popen[str]) -> dict[str, float]:
    """The next line a variant prints."""
    assert process.stdout
    return json.loads(process.stdout.readline())


def compare(names: list[str], *, rounds: int) -> dict[str, dict[str, float]]:
    """Medians of every variant, and the median over the rounds of its wall time over the baseline's."""
    processes, first = {}, {}
    for name in names:
        processes[name], first[name] = launch(name)
        print(f"{name}: first step after {first[name]:.1f} s", file=sys.stderr)
    times: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(rounds + 1):
        for name, process in processes.items():
            assert process.stdin
            process.stdin.write("\n")
            process.stdin.flush()
            times[name].append(reply(process))
    for process in processes.values():
        process.stdin.close()  # type: ignore[union-attr]
        process.wait()
    results = {}
    for name in names:
        counted = times[name][1:]  # the first round warms up
        base = times[BASELINE][1:]
        results[name] = {"first_step": first[name]} | {
            key: statistics.median(t[key] for t in counted) for key in ("wall", "cpu")} | {
            f"{key}_ratio": statistics.median(t[key] / b[key] for t, b in zip(counted, base, strict=True))
            for key in ("wall", "cpu")}
    return results


def main() -> None:
    """Print the table and, as the last line, the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work)
        return
    names = [BASELINE, *(name for name in args.variants.split(",") if name != BASELINE)]
    results = compare(names, rounds=args.rounds)
    print(f"| variant | first step, s | wall a step, s | CPU-s a step | wall / {BASELINE} | CPU / {BASELINE} |")
    print("|---|---|---|---|---|---|")
    for name, r in results.items():
        print(f"| {name} | {r['first_step']:.1f} | {r['wall']:.3f} | {r['cpu']:.3f} | {r['wall_ratio']:.2f} "
              f"| {r['cpu_ratio']:.2f} |")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
