"""Our models under lm-evaluation-harness (EleutherAI, 0.4.13), by its own LM interface; needs no torch.

Encoding, truncation, windows and stop texts follow its Hugging Face backend, so an exported checkpoint scores the same
there. That includes a wart of `loglikelihood_rolling`: where the tokenizer puts a begin token in front of every text,
that backend puts a second one there and counts the first among the predictions. Our own bits per byte do not.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from llmjax.core.errors import ConfigError, RunError
from llmjax.core.task import Params
from llmjax.data.tokenizer import HUGGINGFACE_FILE, Tokenizer
from llmjax.evals import score
from llmjax.models import decoder
from llmjax.serve.engine import Engine
from llmjax.serve.sampling import SamplingParams

EncodedRequest = tuple[tuple[str, str], list[int], list[int]]  # texts, context ids, continuation ids


class HarnessLM(TemplateLM):
    """The harness' view of a model; hand it to `lm_eval.simple_evaluate` or to `run_tasks`.

    begin_ids: tokens put in front of a text, see `begin_ids`.
    """

    def __init__(self, model: decoder.Model, params: Params, tokenizer: Tokenizer, *, begin_ids: Sequence[int]):
        super().__init__()
        self.model, self.params, self.tokenizer, self.begin_ids = model, params, tokenizer, list(begin_ids)
        self.engine = Engine(model, params, tokenizer=tokenizer)
        self.max_length = model.config.max_seq_len
        self.max_gen_toks = 256

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        return self.tokenizer.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, after the tokens that begin a text unless it spells the begin token itself or they are refused."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.bos_token)
        return (self.begin_ids if add_special_tokens else []) + self.tokenizer.encode(string)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in windows of the whole context that do not share a prediction."""
        windows = [self._windows(request.args[0]) for request in requests]
        scores = iter(self._score([span for spans in windows for span in spans]))
        return [sum(next(scores).total for _ in spans) for spans in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop text, requests with the same settings decoded together."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        texts = [""] * len(requests)
        for members in groups.values():
            settings = requests[members[0]].args[1]
            for i, text in zip(members, self._generate([requests[i].args[0] for i in members], settings), strict=True):
                texts[i] = text
        return texts

    def _loglikelihood_tokens(self, requests: list[EncodedRequest], **kwargs: Any) -> list[tuple[float, bool]]:
        """Log-probability of a continuation, and whether greedy decoding gives it; a long context loses its start."""
        spans = []
        for (_, text), context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise RunError(f"a continuation of {len(continuation)} tokens cannot be scored in a context of "
                               f"{self.max_length}: {text[:60]!r}")
            spans.append(score.Span(np.array(context + continuation)[-(self.max_length + 1):], len(continuation)))
        return [(scored.total, bool(scored.greedy.all())) for scored in self._score(spans)]

    def _score(self, spans: Sequence[score.Span]) -> list[score.SpanScore]:
        return score.score(self.model, self.params, spans, seq_len=self.max_length)

    def _windows(self, text: str) -> list[score.Span]:
        ids = np.array([self.prefix_token_id, *self.tok_encode(text)])
        return score.windows(ids, seq_len=self.max_length, stride=self.max_length)

    def _generate(self, prompts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        normal: dict[str, Any] = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        num_new, sampled = normal["max_gen_toks"], normal["do_sample"]
        stops = handle_stop_sequences(normal["until"], eos=self.tokenizer.eos_token)
        room = self.max_length - num_new  # the harness keeps it free for the answer, however short that will be
        if room < 1:
            raise ConfigError(f"max_gen_toks={num_new}: the model's context is {self.max_length} tokens, so at most "
                              f"{self.max_length - 1} can be generated; set it in the task's generation_kwargs")
        encoded = [self.tok_encode(prompt)[-room:] or [self.prefix_token_id] for prompt in prompts]
        params = SamplingParams(max_new_tokens=num_new, temperature=normal["temperature"] if sampled else 0.0,
                                top_k=normal.get("top_k", 0) if sampled else 0,
                                top_p=normal.get("top_p", 1.0) if sampled else 1.0, stop=tuple(filter(None, stops)))
        return [postprocess_generated_text(generation.text, stops, think_end_token=None)
                for generation in self.engine.generate_batch(encoded, params)]


def begin_ids(tokenizer: Tokenizer, folder: Path) -> list[int]:
    """What transformers puts in front of a text: as the folder's tokenizer.json says; our own models' begin token."""
    if not (folder / HUGGINGFACE_FILE).is_file():
        return [tokenizer.bos_id]
    import tokenizers

    return list(tokenizers.Tokenizer.from_file(str(folder / HUGGINGFACE_FILE)).encode("").ids)


def run_tasks(lm: HarnessLM, tasks: Sequence[str], *, limit: int | None = None) -> dict[str, Any]:
    """The harness' own results for tasks given as YAML files, folders of them, or names it knows.

    Paths inside a task file are read as the harness reads them: data files from the current folder. Its own tasks
    are indexed (half a minute) only when one is named, and fetch their data from the network.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folders = [task for task in tasks if Path(task).is_dir()]
    files = [task for task in tasks if Path(task).is_file()]
    names = [task for task in tasks if task not in folders and task not in files]
    manager = TaskManager(include_path=folders or None, include_defaults=bool(names))
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise ConfigError(f"--tasks: {unknown[0]!r} is neither a task of llmjax, nor one of lm-evaluation-harness, nor "
                          f"a file or folder of its task files")
    inside = [name for name, entry in manager.task_index.items()
              if any(entry.yaml_path and entry.yaml_path.is_relative_to(folder) for folder in folders)]
    return simple_evaluate(lm, tasks=[*names, *inside, *files], task_manager=manager, limit=limit, batch_size=1,
                           bootstrap_iters=1000)
