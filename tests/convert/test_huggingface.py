"""Folders in and out: `transformers` writes what we import and loads what we export."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_tensors

from llmjax.convert import rules, safetensors
from llmjax.convert.families.llama import LLAMA
from llmjax.convert.huggingface import export_hf, import_hf, sections, to_params
from llmjax.convert.registry import FAMILIES, family_of_folder, family_of_model
from llmjax.core import config as configs
from llmjax.core.errors import ConfigError, RunError
from llmjax.core.mesh import make_mesh
from llmjax.core.model_sections import AttentionConfig, RopeScaling
from llmjax.core.sections import MeshConfig, ModelConfig, TokenizerConfig
from llmjax.data.tokenizer import Tokenizer, train_tokenizer
from llmjax.models.decoder import abstract_model, init_params
from llmjax.train.checkpoint import restore_params, save_params
from tests.convert import published
from tests.convert.published import LINEAR_ROPE, LLAMA3_ROPE, TINY, make_llama

CASES = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "llama3": {"rope_parameters": LLAMA3_ROPE},
    "linear": {"rope_parameters": LINEAR_ROPE},
    "wide heads": {"head_dim": 16, "num_key_value_heads": 4},
}


def state(model: transformers.LlamaForCausalLM) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}


def load(folder) -> transformers.LlamaForCausalLM:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("shard_bytes", [20_000, 10**9])
@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_there_and_back(fields, shard_bytes, tmp_path):
    theirs = make_llama(**fields)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="20KB" if shard_bytes < 10**9 else "5GB")
    import_hf(tmp_path / "hf", tmp_path / "run")
    export_hf(tmp_path / "run", tmp_path / "out", shard_bytes=shard_bytes)
    again = load(tmp_path / "out")
    assert again.dtype == torch.float32
    assert state(again).keys() == state(theirs).keys()
    for name, tensor in state(theirs).items():
        assert torch.equal(state(again)[name], tensor), name
    for field in (*TINY, "tie_word_embeddings", "rope_parameters", "head_dim"):
        assert getattr(again.config, field) == getattr(theirs.config, field), field
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == (shard_bytes < 10**9)


@pytest.mark.parametrize(
    ("dtype", "ours"), [(torch.bfloat16, "bfloat16"), (torch.float16, "float32"), (torch.float32, "float32")]
)
def test_precision_in_and_out(dtype, ours, tmp_path):
    theirs = make_llama().to(dtype)
    theirs.save_pretrained(tmp_path / "hf")
    config = import_hf(tmp_path / "hf", tmp_path / "run")
    assert config.model.param_dtype == ours
    assert configs.from_workdir(tmp_path / "run") == config
    export_hf(tmp_path / "run", tmp_path / "out")
    again = load(tmp_path / "out")
    assert again.dtype == getattr(torch, ours)
    assert all(torch.equal(state(again)[name], tensor.to(again.dtype)) for name, tensor in state(theirs).items())


def test_the_balancing_bias_stays_in_float32(tmp_path):
    """As it is published beside weights in bfloat16: its steps are small."""
    published.make("deepseek_v3").save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf/model.safetensors"
    stored = {name: tensor if "correction_bias" in name else tensor.bfloat16()
              for name, tensor in load_file(file).items()}
    save_tensors(stored, file)
    assert import_hf(tmp_path / "hf", tmp_path / "run").model.param_dtype == "bfloat16"
    export_hf(tmp_path / "run", tmp_path / "out")
    again = load_file(tmp_path / "out/model.safetensors")
    assert {tensor.dtype for tensor in again.values()} == {torch.float32, torch.bfloat16}
    assert all(again[name].dtype == tensor.dtype and torch.equal(again[name], tensor)
               for name, tensor in stored.items())


def test_the_older_forms_of_a_config():
    older = {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}, **TINY}
    newer = {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}, **TINY}
    assert LLAMA.to_ours(older, dtype="float32") == LLAMA.to_ours(newer, dtype="float32")
    bare = {name: value for name, value in TINY.items() if name not in ("num_key_value_heads", "rms_norm_eps")}
    model = LLAMA.to_ours(bare, dtype="float32")
    assert (model.num_kv_heads, model.head_dim, model.norm_eps, model.rope_theta) == (4, 8, 1e-6, 10_000.0)


@pytest.mark.parametrize(
    "scaling", [RopeScaling(), RopeScaling("linear", 2.0), RopeScaling("llama3", 4.0, 1.0, 3.0, 16)]
)
def test_configs_come_back(scaling):
    model = ModelConfig(vocab_size=9, rope_scaling=scaling, embeddings="tied", compute_dtype="float32")
    theirs = LLAMA.to_theirs(model)
    assert LLAMA.to_ours(json.loads(json.dumps(theirs)), dtype="float32") == model


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_type is 'longrope'; one of 'default', 'linear'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.1}}, "model.head_dim=8: .* even number above 0"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 0.7}}, "mscale is 0.7"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"hidden_size": None}, "hidden_size is missing"),
    ],
)
def test_what_we_do_not_have_is_refused_by_name(fields, line):
    theirs = {name: value for name, value in (TINY | fields).items() if value is not None}
    with pytest.raises(ConfigError, match=line):
        LLAMA.to_ours(theirs, dtype="float32")


def test_weights_that_do_not_fit_are_named(tmp_path):
    make_llama().save_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps(config | {"num_hidden_layers": 3, "vocab_size": 97}))
    with pytest.raises(RunError, match=r"missing: model.layers.2.*shape.*embed_tokens.weight \(96, 32\) \(97, 32\)"):
        import_hf(tmp_path / "hf", tmp_path / "run")


def test_folders_in_use_are_left_alone(tmp_path):
    make_llama().save_pretrained(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "run")
    with pytest.raises(RunError, match="holds a run already"):
        import_hf(tmp_path / "hf", tmp_path / "run")
    with pytest.raises(RunError, match="is not empty"):
        export_hf(tmp_path / "run", tmp_path / "hf")
    with pytest.raises(RunError, match="no Hugging Face folder"):
        import_hf(tmp_path / "nothing", tmp_path / "other")


def test_ids_that_end_a_text_are_kept(tmp_path):
    model = make_llama()
    model.generation_config.eos_token_id = [2, 7]
    model.save_pretrained(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "run")
    export_hf(tmp_path / "run", tmp_path / "out")
    assert load(tmp_path / "out").generation_config.eos_token_id == [2, 7]


@pytest.fixture
def trained_run(tmp_path):
    """A workdir as training leaves it, with a tokenizer of ours."""
    corpus = ["def f(x):\n    return x\n" * 20]
    tokenizer = train_tokenizer(corpus, TokenizerConfig(vocab_size=300), tmp_path / "run/tokenizer")
    model = ModelConfig(vocab_size=tokenizer.vocab_size, num_layers=2, dim=32, num_heads=4, num_kv_heads=2, head_dim=8,
                        mlp_dim=48, compute_dtype="float32")  # fmt: skip
    configs.save(configs.resolve(sections(model)), tmp_path / "run")
    params = init_params(model, jax.random.key(0), None)
    save_params(tmp_path / "run/checkpoints", params, {"tokenizer_hash": tokenizer.hash})
    return tmp_path / "run", tokenizer, params


def test_a_run_of_ours_goes_out_and_comes_back(trained_run, tmp_path):
    run, tokenizer, params = trained_run
    export_hf(run, tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.encode("def </s>", add_special_tokens=False) == tokenizer.encode("def </s>")
    assert load(tmp_path / "out").generation_config.eos_token_id == tokenizer.eos_id
    config = import_hf(tmp_path / "out", tmp_path / "again")
    assert config.model == configs.from_workdir(run).model
    assert Tokenizer.load(tmp_path / "again").encode("def </s>") == tokenizer.encode("def </s>")
    like = abstract_model(config.model).abstract_params(None)
    again = restore_params(tmp_path / "again/checkpoints", like)
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize(
    ("model_type", "fields", "line"),
    [
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ("mpt", {"attn_config": {"alibi": False}}, "alibi is False"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
        ("gemma2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is"),
        ("gemma3_text", {"rope_parameters": {"sliding_attention": {"rope_type": "linear"}}}, "sliding_attention"),
    ],
)  # fmt: skip
def test_settings_that_a_family_has_and_we_do_not(model_type, fields, line):
    theirs = next(case for name, case in published.CASES.items() if name.split("_text")[0] == model_type.split("_")[0])
    config = theirs.config(**theirs.fields).to_dict() | fields
    with pytest.raises(ConfigError, match=line):
        FAMILIES[model_type].to_ours(config, dtype="float32")


def test_an_unknown_architecture_names_the_known_ones():
    line = r"model_type is 'whisper', architectures are \['W'\]; known are llama, mistral"
    with pytest.raises(ConfigError, match=line):
        family_of_folder({"model_type": "whisper", "architectures": ["W"]})
    assert family_of_folder({"architectures": ["LlamaForCausalLM"]}) is LLAMA


def test_a_model_goes_out_as_the_family_that_says_all_of_it():
    plain = ModelConfig(vocab_size=9, dim=32, num_heads=4, num_kv_heads=4, head_dim=8)
    assert family_of_model(plain) is LLAMA
    assert family_of_model(plain, preferred="mistral") is FAMILIES["mistral"]
    window = dataclasses.replace(plain, attention=AttentionConfig(window=8))
    assert family_of_model(window) is FAMILIES["mistral"]
    with pytest.raises(ConfigError, match="nearest, mistral, lacks model.attention.softcap=2.0"):
        family_of_model(dataclasses.replace(window, attention=AttentionConfig(window=8, softcap=2.0)))
    assert FAMILIES["mixtral"].misfits(plain) == ["model.moe.num_experts=0"]  # its tensors are those of experts


def test_names_without_their_prefix(tmp_path):
    """Published GPT-2 and BLOOM folders leave it out."""
    theirs = published.make("gpt2")
    theirs.save_pretrained(tmp_path / "hf")
    reader = safetensors.Reader(tmp_path / "hf")
    bare = {name.removeprefix("transformer."): reader.read(name) for name in reader.names}
    save_file(bare | {"h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32)}, tmp_path / "hf/model.safetensors")
    import_hf(tmp_path / "hf", tmp_path / "run")
    export_hf(tmp_path / "run", tmp_path / "out")
    again = state(load(tmp_path / "out"))
    assert all(torch.equal(again[name], tensor) for name, tensor in state(theirs).items())


def test_straight_onto_a_mesh(tmp_path):
    make_llama().save_pretrained(tmp_path / "hf")
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    theirs = json.loads((tmp_path / "hf/config.json").read_text())
    model = LLAMA.to_ours(theirs, dtype="float32")
    params = to_params(safetensors.Reader(tmp_path / "hf"), family=LLAMA, model=model, mesh=mesh)
    shapes = abstract_model(model).abstract_params(mesh)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == jax.tree.map(lambda leaf: leaf.sharding, shapes)
    alone = to_params(safetensors.Reader(tmp_path / "hf"), family=LLAMA, model=model)
    jax.tree.map(np.testing.assert_array_equal, params, alone)


def test_sizes_that_transformers_refuses():
    with pytest.raises(ConfigError, match="model.dim=30.*model.num_heads=4"):
        LLAMA.to_theirs(ModelConfig(vocab_size=9, dim=30, num_heads=4, num_kv_heads=4))


def test_exported_names_are_those_of_transformers():
    model = LLAMA.to_ours(make_llama().config.to_dict(), dtype="float32")
    shapes = rules.their_shapes(LLAMA.rows, rules.flatten(abstract_model(model).shapes))
    assert shapes == {name: tuple(tensor.shape) for name, tensor in state(make_llama()).items()}
    assert jnp.dtype(model.param_dtype) == np.float32
