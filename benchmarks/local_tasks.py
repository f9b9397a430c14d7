"""Six zero-shot tasks without a network: lm-eval's own task definitions on questions that are made of texts.

    python benchmarks/local_tasks.py TEXT [TEXT ...] -o FOLDER [--documents 100]

Which piece of text follows, which word is missing, does this follow: 100 questions in the format of each of ARC (easy,
challenge), BoolQ, HellaSwag, PIQA and WinoGrande. Prompts and metrics are lm-eval's, so that `paper.py` and `alphaq
certify --tasks arc_easy --include-path FOLDER` run as on the public data; scores say nothing about those. Where answers
are pieces of text, the wrong ones of ARC (challenge) and BoolQ lie near by, those of others anywhere.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

GIVEN, ANSWER = 24, 8
"""Words of what is given, and of an answer."""
TRIES = 1000
"""Places that are looked at for wrong answers."""
Document = Mapping[str, object]


@dataclass(frozen=True)
class Source:
    """Words of a text, and a generator of chance."""

    words: Sequence[str]
    chance: random.Random

    def place(self) -> int:
        """Where an answer begins that has enough before and after it."""
        return self.chance.randrange(2 * GIVEN, len(self.words) - 2 * GIVEN)

    def text(self, start: int, words: int) -> str:
        """A piece of the text."""
        return " ".join(self.words[start : start + words])

    def shuffled(self, right: str, wrong: Sequence[str]) -> tuple[list[str], int]:
        """All answers, and the number of the right one."""
        number = self.chance.randrange(len(wrong) + 1)
        return [*wrong[:number], right, *wrong[number:]], number

    def wrong(self, right: str, places: Iterable[int], count: int) -> list[str]:
        """Pieces of as many words as the right one, the first at these places that differ from it and one another.

        Raises ValueError if there are too few.
        """
        words = len(right.split())
        pieces = (self.text(place, words) for place in islice(places, TRIES))
        found = list(islice((piece for piece in dict.fromkeys(pieces) if piece != right), count))
        if len(found) < count:
            raise ValueError("A text repeats itself, so that wrong answers would be right ones. Give another.")
        return found

    def after(self, place: int) -> range:
        """Where the pieces after the one at a place begin."""
        return range(place + ANSWER, len(self.words) - ANSWER, ANSWER)

    def anywhere(self) -> Iterator[int]:
        """Places by chance."""
        while True:
            yield self.place()

    def choices(self, place: int, count: int, near: bool = False) -> tuple[list[str], int]:
        """The piece at a place among others that have none of its words, and its number."""
        right = self.text(place, ANSWER)
        apart = (other for other in self.anywhere() if abs(other - place) >= ANSWER)
        return self.shuffled(right, self.wrong(right, self.after(place) if near else apart, count - 1))


def arc(source: Source, near: bool = False) -> Document:
    """Which of four pieces follows."""
    place = source.place()
    answers, number = source.choices(place, 4, near)
    return {
        "question": source.text(place - GIVEN, GIVEN),
        "choices": {"text": answers, "label": list("ABCD")},
        "answerKey": "ABCD"[number],
    }


def arc_challenge(source: Source) -> Document:
    """The same, the wrong ones being the pieces after it."""
    return arc(source, near=True)


def boolq(source: Source) -> Document:
    """Whether a piece follows, or the one after it."""
    place, label = source.place(), source.chance.randrange(2)
    right = source.text(place, ANSWER)
    asked = right if label else source.wrong(right, source.after(place), 1)[0]
    return {"passage": source.text(place - GIVEN, GIVEN), "question": f"does it go on with {asked}", "label": label}


def hellaswag(source: Source) -> Document:
    """Which of four endings follows."""
    place = source.place()
    endings, number = source.choices(place, 4)
    before = source.text(place - GIVEN, GIVEN)
    return {"activity_label": "Text", "ctx_a": before, "ctx_b": "", "endings": endings, "label": str(number)}


def piqa(source: Source) -> Document:
    """Which of two pieces follows."""
    place = source.place()
    (first, second), number = source.choices(place, 2)
    return {"goal": source.text(place - GIVEN, GIVEN), "sol1": first, "sol2": second, "label": number}


def winogrande(source: Source) -> Document:
    """Which of two words stands in a gap."""
    place = source.place()
    right = source.words[place]
    (first, second), number = source.shuffled(right, source.wrong(right, source.anywhere(), 1))
    sentence = f"{source.text(place - GIVEN, GIVEN)} _ {source.text(place + 1, ANSWER)}"
    return {"sentence": sentence, "option1": first, "option2": second, "answer": str(number + 1)}


TASKS: dict[str, tuple[str, Callable[[Source], Document]]] = {
    "arc_challenge": ("arc/arc_challenge.yaml", arc_challenge),
    "arc_easy": ("arc/arc_easy.yaml", arc),
    "boolq": ("super_glue/boolq/default.yaml", boolq),
    "hellaswag": ("hellaswag/hellaswag.yaml", hellaswag),
    "piqa": ("piqa/piqa.yaml", piqa),
    "winogrande": ("winogrande/default.yaml", winogrande),
}
"""lm-eval's definition of each task, and what makes a question for it."""


def documents(name: str, texts: Sequence[str], count: int) -> list[Document]:
    """Questions in a task's format, the same ones each time.

    Raises ValueError for a text that is too short or repeats itself.
    """
    chance = random.Random(name)
    sources = [Source(text.replace("_", " ").split(), chance) for text in texts]  # "_" is WinoGrande's gap
    if any(len(source.words) < 10 * GIVEN for source in sources):
        raise ValueError(f"A text has fewer than {10 * GIVEN} words. Give a longer one.")
    return [TASKS[name][1](sources[number % len(sources)]) for number in range(count)]


def definition(name: str, tasks: Path, data: Path) -> str:
    """A task file: lm-eval's own, in its folder of tasks, but for the data."""
    keys = {
        "include": str(tasks / TASKS[name][0]),
        "task": name,
        "tag": None,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"validation": str(data)}},
        "training_split": None,
        "validation_split": "validation",
        "test_split": None,
    }
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in keys.items())


def main() -> None:
    """Write the folder."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    arguments.add_argument("texts", type=Path, nargs="+", help="UTF-8 texts")
    arguments.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    arguments.add_argument("--documents", type=int, default=100, help="of each task")
    given = arguments.parse_args()
    found = find_spec("lm_eval")
    if found is None or found.origin is None:
        raise SystemExit("lm-eval is not installed: pip install 'alphaq[eval]'.")
    folder = given.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    texts = [path.read_text(encoding="utf-8-sig") for path in given.texts]
    for name in TASKS:
        data = folder / f"{name}.jsonl"
        lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in documents(name, texts, given.documents)]
        data.write_text("".join(lines), encoding="utf-8")
        written = definition(name, Path(found.origin).parent / "tasks", data)
        (folder / f"{name}.yaml").write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
