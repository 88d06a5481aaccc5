"Writes colours.jsonl and reverse.jsonl: 600 prompts each, behind two solved tasks of the same kind."
import json
import random
from collections.abc import Callable
from pathlib import Path

NAMES = "Ann Bob Cai Dee Eva Fay Gus Hal Ida Jon Kim Leo Mia Ned Oma Pia".split()
COLOURS = "red blue green black white pink grey brown".split()
THINGS = "hat coat scarf bag shirt cup".split()
WORDS = ("apple river house green stone light chair bread cloud horse music paper glass tiger lemon plant ocean sugar "
         "train queen window garden basket winter pencil bridge").split()


def colours(rng: random.Random) -> tuple[str, str]:
    "A question about who has which colour, and its answer."
    m = rng.choice((3, 4))
    names, colors, thing = rng.sample(NAMES, m), rng.sample(COLOURS, m), rng.choice(THINGS)
    k = rng.randrange(m)
    has = [f"{name} has a {color} {thing}" for name, color in zip(names, colors)]
    return f"{', '.join(has[:-1])} and {has[-1]}. What colour is the {thing} of {names[k]}?", colors[k]


def reverse(rng: random.Random) -> tuple[str, str]:
    "Words to be reversed, and the answer."
    words = rng.sample(WORDS, rng.choice((3, 4)))
    return f"Write these words in reverse order: {', '.join(words)}.", ", ".join(words[::-1])


def write(folder: Path, make: Callable, count: int = 600):
    "Write the prompts of one task."
    rng, found = random.Random(f"smollm2/{make.__name__}"), {}
    while len(found) < count + 2:
        question, answer = make(rng)
        found.setdefault(question, answer)
    solved = list(found.items())[:2]
    turns = [dict(role=role, content=text) for pair in solved for role, text in zip(("user", "assistant"), pair)]
    rows = [dict(messages=[*turns, dict(role="user", content=q)], answer=a) for q, a in list(found.items())[2:]]
    (folder / f"{make.__name__}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    for task in (colours, reverse): write(Path(__file__).parent, task)
