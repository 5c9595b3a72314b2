"""BERT (Devlin et al. 2019): an encoder with a head for masked tokens.

Left out: the pooler and the prediction of the next sentence, whose tensors an import passes over, and dropout of
attention weights.
"""

from llmjax.convert.families.common import EVEN_HEADS, GELU
from llmjax.convert.family import Family
from llmjax.convert.operations import Copy, Linear, Vector
from llmjax.convert.parts import Field, Fixed, Given
from llmjax.convert.rules import Row

LAYER = "bert.encoder.layer.{layer}"
HEAD = "cls.predictions"


def norm(theirs: str, ours: str) -> tuple[Row, Row]:
    """Scale and bias of a norm."""
    return Row(f"{theirs}.weight", f"{ours}/scale", Copy()), Row(f"{theirs}.bias", f"{ours}/bias", Copy())


def dense(theirs: str, ours: str) -> tuple[Row, Row]:
    """Matrix and bias of a projection within the residual stream and the MLP."""
    return Row(f"{theirs}.weight", ours, Linear()), Row(f"{theirs}.bias", f"{ours}_bias", Copy())


BERT = Family(
    model_type="bert",
    architecture="BertForMaskedLM",
    parts=(
        Field("vocab_size", "vocab_size"),
        Field("hidden_size", "dim"),
        Field("num_hidden_layers", "num_layers"),
        Field("num_attention_heads", "num_heads"),
        Field("intermediate_size", "mlp_dim"),
        Field("max_position_embeddings", "max_seq_len", 512),
        Field("type_vocab_size", "token_types", 2),
        Field("hidden_act", "activation", "gelu", GELU),
        Field("hidden_dropout_prob", "dropout", 0.1),
        Field("layer_norm_eps", "norm_eps", 1e-12),
        Field("initializer_range", "init_scale", 0.02),
        EVEN_HEADS,
        Given({
            "num_kv_heads": lambda theirs: theirs["num_attention_heads"],
            "positions": "learned", "embeddings": "tied", "attention.mask": "bidirectional", "attention.bias": "all",
            "mlp_bias": "all", "norm.kind": "layer", "norm.bias": "learned", "norm.placement": "sum",
            "norm.embedding": "norm", "norm.final": "none", "head_transform": "dense", "head_bias": "learned",
        }),
        Fixed({"is_decoder": False, "add_cross_attention": False, "tie_word_embeddings": True,
               "position_embedding_type": "absolute", "quantization_config": None}),
    ),
    rows=(
        Row("bert.embeddings.word_embeddings.weight", "embedder/table", Copy()),
        Row("bert.embeddings.position_embeddings.weight", "embedder/position_table", Copy()),
        Row("bert.embeddings.token_type_embeddings.weight", "embedder/type_table", Copy()),
        *norm("bert.embeddings.LayerNorm", "embedding_norm"),
        *(row for theirs, ours in (("query", "q"), ("key", "k"), ("value", "v")) for row in (
            Row(f"{LAYER}.attention.self.{theirs}.weight", f"blocks/attn/{ours}", Linear()),
            Row(f"{LAYER}.attention.self.{theirs}.bias", f"blocks/attn/{ours}_bias", Vector()))),
        Row(f"{LAYER}.attention.output.dense.weight", "blocks/attn/o", Linear(num_inputs=2)),
        Row(f"{LAYER}.attention.output.dense.bias", "blocks/attn/o_bias", Copy()),
        *norm(f"{LAYER}.attention.output.LayerNorm", "blocks/attn_post_norm"),
        *dense(f"{LAYER}.intermediate.dense", "blocks/mlp/up"),
        *dense(f"{LAYER}.output.dense", "blocks/mlp/down"),
        *norm(f"{LAYER}.output.LayerNorm", "blocks/mlp_post_norm"),
        Row(f"{HEAD}.transform.dense.weight", "head_transform/kernel", Linear()),
        Row(f"{HEAD}.transform.dense.bias", "head_transform/bias", Copy()),
        *norm(f"{HEAD}.transform.LayerNorm", "head_transform/norm"),
        Row(f"{HEAD}.bias", "head_bias/bias", Copy()),
        Row(f"{HEAD}.decoder.weight", "head/kernel", Linear()),
    ),
    derived=(r"(bert\.)?(embeddings\.position_ids|pooler\..*|cls\.seq_relationship\..*)|bert\.embeddings\.position_ids"
             r"|cls\.predictions\.decoder\.bias"),
    older_names={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
    prefix="bert.",
)  # fmt: skip
