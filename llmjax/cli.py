"""The command line: `llmjax VERB --config=FILE[:arg] --config.a.b=c`.

A verb is a module with `add_arguments(parser)` and `run(args, overrides)`, imported only when it is asked for, so that
`--help` answers at once. Every failure ends in one line on standard error and the exit status that CONVENTION explains.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import llmjax
from llmjax.core.errors import LlmjaxError

CONVENTION = "exit status: 0 done, 1 failed, 2 wrong use, 75 stopped on purpose and wants a restart"
INTERRUPTED = 130  # as a shell reports a process that Ctrl-C ended
LESS_MEMORY = "lower data.batch_size or data.seq_len, raise train.accumulation, or set train.remat=full"
PIPE_CLOSED = 141  # as a shell reports a process that SIGPIPE ended


@dataclasses.dataclass(frozen=True)
class Verb:
    """Where a verb lives and what `llmjax --help` says of it."""

    module: str
    summary: str


@dataclasses.dataclass(frozen=True)
class Command:
    """One parsed command line."""

    verb: Any  # the module
    args: argparse.Namespace
    overrides: dict[str, str]


VERBS = {
    "train": Verb("llmjax.verbs.train", "pre-training, fine-tuning, preference optimisation; resumes by itself"),
    "generate": Verb("llmjax.verbs.generate", "text from a workdir"),
    "eval": Verb("llmjax.verbs.eval", "bits per byte, perplexity, BLEU, ROUGE, harness tasks"),
    "serve": Verb("llmjax.verbs.serve", "an HTTP server that speaks OpenAI's API"),
    "import-hf": Verb("llmjax.verbs.hf", "a Hugging Face folder into a workdir"),
    "export-hf": Verb("llmjax.verbs.hf", "a workdir into a Hugging Face folder"),
    "data": Verb("llmjax.verbs.data", "raw documents to token shards; a past batch"),
    "tokenizer": Verb("llmjax.verbs.tokenizer", "train a tokenizer, report how well it fits"),
    "plan": Verb("llmjax.verbs.plan", "compile for a TPU pod without one: memory, compute, communication"),
    "fit": Verb("llmjax.verbs.fit", "scaling laws from a folder of runs"),
    "scout": Verb("llmjax.verbs.scout", "a ladder of small runs and the loss it predicts"),
    "check": Verb("llmjax.verbs.check", "the invariance matrix: the same numbers on every mesh of some devices"),
    "sweep": Verb("llmjax.verbs.sweep", "a grid over config fields"),
    "doctor": Verb("llmjax.verbs.doctor", "what this machine has and lacks"),
}


class Help(argparse.HelpFormatter):
    """Wraps descriptions and leaves examples as they are written, to be copied."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "example:" in text else super()._fill_text(text, width, indent)


class Parser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviations."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", Help)
        super().__init__(allow_abbrev=False, **kwargs)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        status = dispatch(argv)
        sys.stdout.flush()  # so that a closed pipe is noticed here
        return status
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get("LLMJAX_DEBUG") == "1":
            raise
        return report(error, verb="".join(argv[:1]))


def dispatch(argv: list[str]) -> int:
    """Parse `argv` and hand it to its verb; raises what the verb raises, SystemExit on wrong use."""
    if not argv or argv[0] not in VERBS:
        return _top_level(argv)
    command = parse(argv)
    from llmjax.core.platform import prepare

    prepare()
    return command.verb.run(command.args, command.overrides)


def parse(argv: list[str]) -> Command:
    """A verb's module with its arguments, checked but not run; SystemExit on wrong use."""
    name, (rest, overrides) = argv[0], split_overrides(argv[1:])
    verb = importlib.import_module(VERBS[name].module)
    parser = Parser(prog=f"llmjax {name}", description=VERBS[name].summary)
    parser.set_defaults(verb=name)
    verb.add_arguments(parser)
    args = parser.parse_args(rest)
    if overrides and not hasattr(args, "config"):
        parser.error(f"--config.{next(iter(overrides))}: this command takes no config")
    return Command(verb, args, overrides)


def split_overrides(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """Take `--config.a.b=c` (or `--config.a.b c`) out of the arguments; the last one of a field counts."""
    rest, overrides = [], {}
    words = iter(argv)
    for word in words:
        if not word.startswith("--config."):
            rest.append(word)
            continue
        path, equals, value = word.removeprefix("--config.").partition("=")
        if not equals:
            following = next(words, None)
            if following is None:
                _wrong_use(f"{word}: a value is needed, as in {word}=VALUE")
            value = following
        overrides[path] = value
    return rest, overrides


def _top_level(argv: list[str]) -> int:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:{width}}  {verb.summary}" for name, verb in VERBS.items())
    parser = Parser(
        prog="llmjax", usage="llmjax VERB [--config=FILE[:arg]] [--config.path.to.field=value ...] [flags]",
        description=llmjax.__doc__,
        epilog=f"verbs (llmjax VERB --help says more):\n{verbs}\n\nexample: llmjax train --config=configs/quickstart.py"
               f"\n{CONVENTION}",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"llmjax {llmjax.__version__}")
    if argv and not argv[0].startswith("-"):
        near = difflib.get_close_matches(argv[0], VERBS, n=1)
        _wrong_use(f"{argv[0]}: no such verb; {f'nearest: {near[0]}' if near else 'llmjax --help lists them'}")
    parser.parse_args(argv or ["--help"])
    return 0


def _wrong_use(line: str) -> NoReturn:
    print(f"llmjax: {line}", file=sys.stderr)
    raise SystemExit(2)


def report(error: BaseException, *, verb: str) -> int:
    """Say in one line what went wrong; returns the exit status."""
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing left to flush at exit
        return PIPE_CLOSED
    print(f"llmjax {verb}: {describe(error, verb=verb)}", file=sys.stderr)
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return error.exit_status if isinstance(error, LlmjaxError) else 1


def describe(error: BaseException, *, verb: str) -> str:
    """One line for a person: what failed and, where we know it, the way out."""
    text = " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        way_on = "; the same command goes on from the last checkpoint" if verb == "train" else ""
        return f"interrupted{way_on}"
    if isinstance(error, LlmjaxError):
        return text
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "Out of memory" in text:
        detail = f" ({text[:120]})" if text else ""
        return f"out of memory{detail}: {LESS_MEMORY}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space left on the disk{f' of {error.filename}' if error.filename else ''}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if type(error) is ValueError:
        return text
    return f"{type(error).__name__}: {text[:300]} (LLMJAX_DEBUG=1 shows where)"


if __name__ == "__main__":
    sys.exit(main())
