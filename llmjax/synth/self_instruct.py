"""Self-Instruct (Wang et al., 2023): a model writes instructions like the ones it is shown, and answers them.

Each prompt shows examples, most of them human, and leaves the next one open. What a teacher writes is parsed, judged by
the filters of `novelty`, and appended to a JSONL file that fine-tuning and `data build` read; the same command goes on
from it. Left out: the separate steps that tell classification tasks apart and write their inputs first.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llmjax.core.errors import RunError
from llmjax.serve.sampling import SamplingParams
from llmjax.synth import novelty
from llmjax.synth.novelty import Example, Health, Pool
from llmjax.synth.settings import Settings
from llmjax.synth.teachers import Teacher

STOP = "\n###"
_PARTS = re.compile(r"\s*(.*?)\s*^Input:\s*(.*?)\s*^Output:\s*(.*?)\s*\Z", re.MULTILINE | re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of the candidates."""

    accepted: int
    rejected: dict[str, int]
    by_teacher: dict[str, int]
    health: Health


def read_seeds(path: Path) -> list[Example]:
    """Seed tasks: lines with `instruction` and either `instances` or `input` and `output`; RunError for others."""
    seeds = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            task = json.loads(line)
            instances = task.get("instances") or [task]
            try:
                first = instances[0]
                seeds.append(Example(task["instruction"], first.get("input", ""), first["output"]))
            except KeyError as error:
                raise RunError(f"{path}:{number}: a seed task needs {error}") from None
    if not seeds:
        raise RunError(f"{path} holds no seed task")
    return seeds


def generate(seeds: Sequence[Example], teachers: Sequence[Teacher], out: Path, *, settings: Settings,
             on_progress: Callable[[int, int], None] = lambda accepted, candidates: None) -> Report:  # fmt: skip
    """Fill `out` up to `settings.count` examples, teachers taking turns.

    Raises RunError when generation collapses or one of several teachers writes too much; what was accepted stays.
    """
    records = _read(out)
    pool = Pool([seed.instruction for seed in seeds] + [record["instruction"] for record in records])
    verdicts: collections.Counter[str] = collections.Counter()
    watch = _Watch(novelty.health([seed.instruction for seed in seeds], candidates=len(seeds)), settings)
    turn = records[-1]["turn"] + 1 if records else 0
    with out.open("a", encoding="utf-8") as file:
        while len(records) < settings.count:
            for candidate in _ask(teachers[turn % len(teachers)], seeds, records, turn, settings):
                reason = _fault(candidate, pool, settings)
                verdicts[reason or ""] += 1
                if reason is None and len(records) < settings.count:
                    records.append(_record(candidate, len(records), turn))
                    pool.add(records[-1]["instruction"])
                    file.write(json.dumps(records[-1], ensure_ascii=False) + "\n")
                watch.look(records, candidates=verdicts.total(), out=out)
            file.flush()
            on_progress(len(records), verdicts.total())
            turn += 1
    by_teacher = collections.Counter(record["teacher"] for record in records)
    if len(teachers) > 1:
        _check_diversity(by_teacher, settings, out)
    accepted = verdicts.pop("", 0)
    health = novelty.health([record["instruction"] for record in records], candidates=accepted + verdicts.total())
    return Report(len(records), dict(verdicts), dict(by_teacher), dataclasses.replace(
        health, accepted=accepted / max(accepted + verdicts.total(), 1)))


def prompt(shown: Sequence[Example]) -> str:
    """Examples in the form that answers are parsed in, and the beginning of the next one."""
    parts = ["Come up with a series of varied tasks, each with an instruction, an input (or nothing) and the output.\n"]
    for example in shown:
        parts.append(f"### Instruction: {example.instruction}\nInput: {example.input}\nOutput: {example.output}\n")
    return "\n".join([*parts, "### Instruction:"])


def parse(text: str) -> Example | None:
    """What a teacher wrote behind the prompt as an example, None where the form is not kept."""
    found = _PARTS.fullmatch(text.split(STOP)[0])
    return Example(*found.groups()) if found else None


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What a teacher wrote; the example is None where nothing could be parsed."""

    example: Example | None
    teacher: str


class _Watch:
    """Looks at the latest examples after every window of candidates."""

    def __init__(self, seeds: Health, settings: Settings):
        self._seeds, self._settings = seeds, settings
        self._first = 0  # record of the window

    def look(self, records: Sequence[dict[str, Any]], *, candidates: int, out: Path) -> None:
        if candidates % self._settings.window:
            return
        window = [record["instruction"] for record in records[self._first :]]
        self._first = len(records)
        limits = {name: getattr(self._settings, name) for name in ("least_accepted", "least_distinct")}
        if reason := novelty.alarm(novelty.health(window, candidates=self._settings.window), self._seeds, **limits):
            raise RunError(f"data synth: generation collapses: {reason}; the {len(records)} examples in {out} stay. "
                           "Use more seeds, another teacher or a higher --temperature")


def _ask(teacher: Teacher, seeds: Sequence[Example], records: Sequence[dict[str, Any]], turn: int,
         settings: Settings) -> Iterator[Candidate]:  # fmt: skip
    """One batch of prompts to one teacher; the draw depends on the seed, the turn and what is in the file."""
    rng = random.Random(f"{settings.seed}/{turn}")
    params = SamplingParams(max_new_tokens=settings.max_new_tokens, temperature=settings.temperature,
                            top_p=settings.top_p, seed=rng.randrange(2**31), stop=(STOP,))
    prompts = [prompt(_shown(seeds, records, settings, rng)) for _ in range(settings.batch)]
    for text in teacher.complete(prompts, params):
        yield Candidate(parse(text), teacher.name)


def _shown(seeds: Sequence[Example], records: Sequence[dict[str, Any]], settings: Settings,
           rng: random.Random) -> list[Example]:  # fmt: skip
    ours = rng.sample(records, min(settings.shown_synthetic, len(records)))
    human = rng.sample(seeds, min(settings.shown - len(ours), len(seeds)))
    shown = human + [Example(record["instruction"], record["input"], record["output"]) for record in ours]
    rng.shuffle(shown)
    return shown


def _fault(candidate: Candidate, pool: Pool, settings: Settings) -> str | None:
    if candidate.example is None:
        return "unparsed"
    if reason := novelty.fault(candidate.example):
        return reason
    return "not_new" if pool.similarity(candidate.example.instruction) >= settings.max_similarity else None


def _record(candidate: Candidate, number: int, turn: int) -> dict[str, Any]:
    example = candidate.example
    assert example
    asked = f"{example.instruction}\n\n{example.input}" if example.input else example.instruction
    return {"id": f"synthetic-{number}", "text": f"{asked}\n\n{example.output}", **dataclasses.asdict(example),
            "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": example.output}],
            "origin": "synthetic", "author": candidate.teacher, "teacher": candidate.teacher, "turn": turn}  # fmt: skip


def _check_diversity(by_teacher: collections.Counter[str], settings: Settings, out: Path) -> None:
    (name, most), total = by_teacher.most_common(1)[0], by_teacher.total()
    if most / total > settings.max_teacher:
        raise RunError(f"data synth: {name} wrote {most / total:.0%} of {out}, more than --max-teacher="
                       f"{settings.max_teacher}; add a teacher or raise it")


def _read(out: Path) -> list[dict[str, Any]]:
    """The examples of an earlier run; a line that was cut off by its end is taken away."""
    if not out.exists():
        return []
    whole = out.read_bytes().rpartition(b"\n")[0].splitlines()
    out.write_bytes(b"".join(line + b"\n" for line in whole))
    return [json.loads(line) for line in whole]
