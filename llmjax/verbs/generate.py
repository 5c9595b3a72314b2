"""`llmjax generate`: text, or token ids, from a workdir."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmjax.core.errors import ConfigError, RunError
from llmjax.verbs.common import add_run_arguments, find_workdir

if TYPE_CHECKING:
    from llmjax.data.tokenizer import Tokenizer
    from llmjax.serve.engine import Generation, Token
    from llmjax.serve.load import Loaded


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's flags."""
    parser.description = "Continue a prompt with the latest checkpoint of a workdir."
    parser.epilog = "example: llmjax generate --workdir=runs/quickstart --prompt='def ' --temperature=0.8 --top-p=0.95"
    add_run_arguments(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT",
                        help="the text to continue, behind the begin token; with an encoder, its source")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="the same, from a UTF-8 file")
    prompt.add_argument("--prompt-ids", metavar="1,2,3",
                        help="token ids as they are, nothing put in front; works without a tokenizer")
    parser.add_argument("--max-new-tokens", type=int, metavar="N",
                        help="how many tokens at most (default: serve.max_new_tokens, or what the context still takes)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T",
                        help="0 always takes the most probable token (default), 1 samples as the model says")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="sample among the K most probable (0: all)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P",
                        help="sample among the fewest that hold probability P together (1: all)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed draws the same tokens (default 0)")
    parser.add_argument("--json", action="store_true",
                        help="one JSON object as the last line: token_ids (with the end token), logprobs, text")


def run(args: argparse.Namespace, overrides: dict[str, str]) -> int:
    """Print the continuation; returns the exit status."""
    from llmjax.serve.engine import Engine
    from llmjax.serve.load import load_workdir
    from llmjax.serve.sampling import SamplingParams

    params = SamplingParams(max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_k=args.top_k,
                            top_p=args.top_p, seed=args.seed)
    workdir = find_workdir(args, overrides)
    loaded = load_workdir(workdir, overrides)
    prompt_ids = _prompt_ids(args, loaded, workdir)
    engine = Engine(loaded.model, loaded.params, tokenizer=loaded.tokenizer, config=loaded.config.serve)
    on_token = None if args.json else _print_text if loaded.tokenizer else _print_id
    if args.prompt is not None and not args.json:
        print(args.prompt, end="", flush=True)
    generation = engine.generate(prompt_ids, params, on_token=on_token)
    print(json.dumps(_as_dict(generation, loaded.tokenizer)) if args.json else "")
    return 0


def _prompt_ids(args: argparse.Namespace, loaded: Loaded, workdir: Path) -> Sequence[int]:
    if args.prompt_ids is not None:
        try:
            return [int(word) for word in args.prompt_ids.split(",")]
        except ValueError:
            raise ConfigError(f"--prompt-ids={args.prompt_ids}: whole numbers between commas, as in 1,2,3") from None
    if loaded.tokenizer is None:
        raise RunError(f"{workdir} holds no tokenizer, so it takes --prompt-ids alone")
    return loaded.prompt_ids(args.prompt if args.prompt_file is None else _read(args.prompt_file))


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")  # as it is, line ends included
    except UnicodeDecodeError as error:
        raise RunError(f"--prompt-file={path} is not UTF-8: {error.reason} at byte {error.start}") from error


def _print_text(token: Token) -> None:
    print(token.text, end="", flush=True)


def _print_id(token: Token) -> None:
    print(token.id, end="" if token.finish_reason else ",", flush=True)


def _as_dict(generation: Generation, tokenizer: Tokenizer | None) -> dict[str, object]:
    return {"token_ids": generation.token_ids, "logprobs": generation.logprobs,
            "text": generation.text if tokenizer else None}
