"""GPT-3 175B (Brown et al. 2020, arXiv 2005.14165) on 256 TPU v5p chips, 32 k to 3.1 M tokens a step.

    llmjax plan --config=configs/gpt3_175b.py --topology=v5p:4x8x8

Hardware: v5p:4x8x8, weights and moments sharded over all 256 chips. Time: 69 days for 300 B tokens at 45 % MFU. Loss:
1.73 nats a token by the report's own fit (figure 3.1). Neither is a measurement: no TPU was at hand. Not as in the
report: all layers attend to everything, where every other one was sparse; the vocabulary is padded from 50,257, for the
tensor axis; a full batch has 1,536 rows (3.1 M tokens, not 3.2 M).
"""

from ml_collections import ConfigDict

SEQ_LEN, ROWS = 2048, 1536
# Appendix B: from 32 k tokens to a full batch within 12 B tokens; here in doublings, tokens by the rows of a batch.
RAMP = {rows: 12_000_000_000 * min(rows, 512) // ROWS for rows in (16, 32, 64, 128, 256, 512, 1024)}
# Table 2.2: what a batch is made of, in per cent.
MIXTURE = {"common_crawl": 60, "webtext2": 22, "books1": 12, "books2": 8, "wikipedia": 3}


def get_config() -> ConfigDict:
    """174.6 B parameters, context 2,048: GPT-2's parts (section 2.1), wider and deeper."""
    ramp_steps = [tokens // (rows * SEQ_LEN) for rows, tokens in RAMP.items()]
    full_steps = (260_000_000_000 - sum(RAMP.values())) // (ROWS * SEQ_LEN)
    return ConfigDict({
        "model": {  # table 2.1
            "vocab_size": 50_304, "num_layers": 96, "dim": 12_288, "num_heads": 96, "num_kv_heads": 96, "head_dim": 128,
            "mlp_dim": 49_152, "max_seq_len": SEQ_LEN, "positions": "learned", "activation": "gelu_tanh",
            "mlp_bias": "all", "attention": {"bias": "all"}, "norm": {"kind": "layer", "bias": "learned"},
            "embeddings": "tied",
        },
        "data": {"sources": ",".join(f"{name}/*.jsonl" for name in MIXTURE), "seq_len": SEQ_LEN, "batch_size": ROWS,
                 "mixture": ",".join(f"{name}/*.jsonl={share}" for name, share in MIXTURE.items())},
        # Table 2.1: the rate; appendix B: the rest. Warm-up over 375 M tokens, a tenth of the peak after 260 B.
        "optim": {"learning_rate": 0.6e-4, "schedule": "cosine", "end_fraction": 0.1, "b1": 0.9,
                  "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "clip_norm": 1.0,
                  "warmup_steps": sum(ramp_steps[:2]), "schedule_steps": sum(ramp_steps) + full_steps},
        "stages": [*[{"tokens": tokens, "batch_size": rows} for rows, tokens in RAMP.items()],
                   {"tokens": 300_000_000_000 - sum(RAMP.values())}],
        "mesh": {"data": 1, "fsdp": 16, "tensor": 16},
        "train": {"remat": "full"},
        "checkpoint": {"every": 1000, "keep": 3},
    })  # fmt: skip
