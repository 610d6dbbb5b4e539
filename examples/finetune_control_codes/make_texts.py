"""Random sentences in five styles: stand-ins for OpenWebText, WikiText, IMDB, PG-19 and WritingPrompts, as .jsonl.

python examples/finetune_control_codes/make_texts.py FOLDER
"""

import json
import random
import sys
from pathlib import Path

NOUNS = [
    "river",
    "city",
    "film",
    "house",
    "captain",
    "garden",
    "letter",
    "engine",
    "winter",
    "bridge",
    "doctor",
    "market",
    "story",
    "island",
    "window",
]
VERBS = ["crossed", "built", "watched", "followed", "opened", "described", "remembered", "found", "painted", "left"]
ADJECTIVES = ["old", "quiet", "famous", "broken", "bright", "long", "strange", "small", "early", "northern"]
STYLES = {
    "web": (200, (2, 6), ["The {a} {n} {v} the {m}.", "How the {n} {v} a {a} {m}.", "Read more about the {a} {n}."]),
    "wikitext": (60, (2, 5), ["= The {n} =\nThe {n} is a {a} {m}.", "It {v} the {m} in 19{d} ."]),
    "imdb": (60, (2, 5), ["This {n} was {a} and I loved the {m}!", "10/10, the {n} {v} me.", "A {a} waste of a {m}."]),
    "pg19": (30, (8, 16), ["Upon the {a} {n}, he {v} the {m};", "and thus the {n} {v} all that was {a}."]),
    "writingprompts": (60, (2, 5), ["[WP] You {v} a {a} {n}.", '"The {m}," she said, "{v} the {n}."']),
}


def document(draw: random.Random, style: str) -> str:
    """Return a text of some sentences."""
    _, (least, most), sentences = STYLES[style]
    return " ".join(
        draw.choice(sentences).format(
            n=draw.choice(NOUNS),
            m=draw.choice(NOUNS),
            v=draw.choice(VERBS),
            a=draw.choice(ADJECTIVES),
            d=draw.randint(10, 99),
        )
        for _ in range(draw.randint(least, most))
    )


def main() -> None:
    """Write one file for each style."""
    folder, draw = Path(sys.argv[1]), random.Random(1)
    for style, (documents, _, _) in STYLES.items():
        lines = [json.dumps({"text": document(draw, style)}) + "\n" for _ in range(documents)]
        (folder / f"{style}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
