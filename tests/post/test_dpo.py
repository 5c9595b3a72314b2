"""DPO against TRL's own trainer on the same tiny weights, and against what the equation implies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from llmjax.core.mesh import make_mesh, single_device_mesh
from llmjax.core.sections import MeshConfig, TaskConfig
from llmjax.models.decoder import abstract_model, init_params
from llmjax.models.stack import Execution
from llmjax.post.dpo import make_loss, preference_loss
from llmjax.train.batch import put_batch
from llmjax.train.gradients import make_loss_and_grad
from tests.post.tiny import CONFIG, assert_same_gradients, hf_llama, to_ours

BETA = 0.3
# (prompt, chosen, rejected) as token ids
PAIRS = [([1, 5, 9], [4, 7, 2], [8, 2]), ([1, 3], [6, 2], [11, 12, 13, 2]), ([1, 20, 21, 22], [9, 2], [10, 3, 2])]


def our_batch(pairs: list, *, seq_len: int) -> dict[str, jax.Array]:
    """Inputs and next-token targets, padded on the right; weight 1 where the target belongs to the answer."""
    shape = (len(pairs), 2, seq_len)
    arrays: dict[str, Any] = {f"{name}_BPT": np.zeros(shape, np.int32) for name in
                              ("tokens", "targets", "positions", "segment_ids")}  # fmt: skip
    arrays["weights_BPT"] = np.zeros(shape, np.float32)
    for b, (prompt, *answers) in enumerate(pairs):
        for p, answer in enumerate(answers):
            ids = [*prompt, *answer]
            n = len(ids) - 1
            arrays["tokens_BPT"][b, p, :n], arrays["targets_BPT"][b, p, :n] = ids[:-1], ids[1:]
            arrays["positions_BPT"][b, p, :n] = np.arange(n)
            arrays["segment_ids_BPT"][b, p, :n] = 1
            arrays["weights_BPT"][b, p, len(prompt) - 1 : n] = 1
    return {name: jnp.asarray(value) for name, value in arrays.items()}


def trl_trainer(policy: Any, reference: Any, folder: Path) -> Any:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    words = {f"w{i}": i for i in range(29)} | {"<pad>": 29, "<eos>": 30, "<unk>": 31}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    unused = datasets.Dataset.from_list([{"prompt": "w1", "chosen": "w2", "rejected": "w3"}])
    args = trl.DPOConfig(output_dir=str(folder), beta=BETA, report_to=[], use_cpu=True, bf16=False, max_length=None)
    return trl.DPOTrainer(
        model=policy, ref_model=reference, args=args, train_dataset=unused, processing_class=tokenizer
    )


def trl_batch(pairs: list) -> dict[str, Any]:
    torch = pytest.importorskip("torch")
    rows = [(prompt, chosen) for prompt, chosen, _ in pairs] + [(prompt, rejected) for prompt, _, rejected in pairs]
    width = max(len(prompt) + len(answer) for prompt, answer in rows)

    def padded(values: list[int], fill: int) -> list[int]:
        return values + [fill] * (width - len(values))

    return {
        "input_ids": torch.tensor([padded(prompt + answer, 29) for prompt, answer in rows]),
        "attention_mask": torch.tensor([padded([1] * (len(prompt) + len(answer)), 0) for prompt, answer in rows]),
        "completion_mask": torch.tensor([padded([0] * len(prompt) + [1] * len(answer), 0) for prompt, answer in rows]),
    }


@pytest.mark.filterwarnings("ignore")
def test_loss_and_gradients_equal_trls(tmp_path: Path) -> None:
    policy, reference = hf_llama(0), hf_llama(1)
    trainer = trl_trainer(policy, reference, tmp_path)
    trainer.model.train()
    their_loss = trainer.compute_loss(trainer.model, trl_batch(PAIRS))
    their_loss.backward()

    params = to_ours(dict(policy.named_parameters()))
    frozen = {"reference": to_ours(dict(reference.named_parameters()))}
    model, batch = abstract_model(CONFIG), our_batch(PAIRS, seq_len=9)
    loss = make_loss(TaskConfig(name="dpo", beta=BETA))

    def mean_loss(params: Any) -> tuple[jax.Array, Any]:
        out = loss(model, params, frozen, batch, jax.random.key(0))
        return out.loss_sum / out.weight, out

    (our_loss, out), grads = jax.jit(jax.value_and_grad(mean_loss, has_aux=True))(params)
    assert float(our_loss) == pytest.approx(their_loss.item(), rel=1e-5)
    assert float(out.weight) == len(PAIRS)
    theirs = trainer._metrics["train"]
    for name, total in out.metrics.items():
        assert float(total / out.weight) == pytest.approx(theirs[name][0], rel=1e-4, abs=1e-6), name
    assert_same_gradients(grads, to_ours({name: param.grad for name, param in policy.named_parameters()}))


def test_sharded_pairs_give_the_losses_and_gradients_of_one_device() -> None:
    pairs = [*PAIRS, ([2], [3, 4, 5], [6])]
    model = abstract_model(CONFIG)
    loss = make_loss(TaskConfig(name="dpo", beta=BETA), execution=Execution(remat="full"))
    loss_and_grad = make_loss_and_grad(model, loss, num_microbatches=1)
    batch = {name: np.asarray(array) for name, array in our_batch(pairs, seq_len=8).items()}

    def run(mesh: Mesh) -> Any:
        with jax.set_mesh(mesh):
            params, reference = (init_params(CONFIG, jax.random.key(seed), mesh) for seed in (0, 1))
            out = jax.jit(loss_and_grad)(params, {"reference": reference}, put_batch(batch, mesh), jax.random.key(0))
            return jax.device_get(out)

    alone, alone_grads = run(single_device_mesh())
    spread, spread_grads = run(make_mesh(MeshConfig(data=1, fsdp=2, context=2, tensor=2)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), spread, alone)
    assert float(alone.weight) == len(pairs)
    assert_same_gradients(spread_grads, alone_grads)


def test_a_policy_that_is_the_reference_starts_at_log_two() -> None:
    logps_BP = jnp.asarray([[-3.0, -4.0], [-1.0, -9.0]])
    out = preference_loss(logps_BP, logps_BP, jnp.ones(2), beta=0.1)
    assert float(out.loss_sum / out.weight) == pytest.approx(np.log(2))


def test_padding_pairs_count_nothing() -> None:
    policy_BP, reference_BP = jnp.asarray([[-3.0, -4.0], [7.0, -9.0]]), jnp.zeros((2, 2))
    both = preference_loss(policy_BP, reference_BP, jnp.asarray([1.0, 0.0]), beta=0.5)
    alone = preference_loss(policy_BP[:1], reference_BP[:1], jnp.ones(1), beta=0.5)
    jax.tree.map(np.testing.assert_allclose, both, alone)
