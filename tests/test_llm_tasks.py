"""Tasks of the LLM runs: a compact prompt decides its answer, a reward is 1 for right answers alone, held out means never trained on.

The answers are found again from the compact prompt alone, by code that knows neither reasoning-gym nor the package.
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import reasoning_gym
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.llm.arithmetic_answers import evaluate_expression
from tbrm_theory.llm.boxed_answers import BoxedVerifier, boxed_answer, math_reward
from tbrm_theory.llm.compact_prompts import COMPACT
from tbrm_theory.llm.math_data import BOXED_INSTRUCTION, math_split
from tbrm_theory.llm.tasks import PromptStyle, Split, is_held_out, is_right, reasoning_gym_reward, reasoning_gym_split
from tbrm_theory.llm.tokenizer import END, PAD, PRINTABLE, character_tokenizer, check_readable

DIFFICULTY: dict[str, dict[str, Any]] = {"quantum_lock": {"difficulty": 3}, "countdown": {"max_numbers": 4}}


def split(task: str, train: int = 12, held_out: int = 4, **options: Any) -> Split:
    return reasoning_gym_split(task, train=train, held_out=held_out, difficulty=DIFFICULTY.get(task), **options)


# -- compact prompts -----------------------------------------------------------------------------------------


def courses(prompt: str) -> str:
    """Kahn's algorithm."""
    count, _, listed = prompt.partition(":")
    edges = [tuple(map(int, pair.split("<"))) for pair in listed.split(",") if pair]
    left = set(range(int(count)))
    while free := {course for course in left if not any(b in left and c == course for b, c in edges)}:
        left -= free
    return "F" if left else "T"


def island(prompt: str) -> str:
    land = {(i, j) for i, row in enumerate(prompt.split("/")) for j, cell in enumerate(row) if cell == "1"}
    largest = 0
    while land:
        island, frontier = 0, [land.pop()]
        while frontier:
            i, j = frontier.pop()
            island += 1
            near = {(i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)} & land
            land -= near
            frontier += near
        largest = max(largest, island)
    return str(largest)


def path_length(prompt: str) -> int | None:
    rows = prompt.split("/")
    cells = {(i, j): cell for i, row in enumerate(rows) for j, cell in enumerate(row)}
    start = next(place for place, cell in cells.items() if cell == "*")
    seen, queue = {start}, deque([(start, 0)])
    while queue:
        (i, j), steps = queue.popleft()
        if cells[i, j] == "#":
            return steps
        for place in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):
            if cells.get(place, "X") != "X" and place not in seen:
                seen.add(place)
                queue.append((place, steps + 1))
    return None


def presses(prompt: str) -> int:
    """The fewest presses that reach the target, by search over sequences."""
    head, *buttons = prompt.split(" ")
    value, light, target = re.fullmatch(r"(\d+)([rg])>(\d+)", head).groups()  # type: ignore[union-attr]
    moves = [re.fullmatch(r"[ABC]([+*-])(\d+)([rg]?)", button).groups() for button in buttons]  # type: ignore[union-attr]
    states, count = {(int(value), light)}, 0
    while int(target) not in {value for value, _ in states}:
        states = {
            ({"+": v + int(n), "-": v - int(n), "*": v * int(n)}[sign], "g" if light == "r" else "r")
            for v, light in states
            for sign, n, when in moves
            if when in ("", light)
        }
        count += 1
    return count


def arithmetic(prompt: str) -> str:
    return str(eval(prompt.replace("/", "//"), {"__builtins__": {}}))


ANSWERS: dict[str, Callable[[str, str], bool]] = {
    "course_schedule": lambda prompt, answer: courses(prompt) == answer,
    "largest_island": lambda prompt, answer: island(prompt) == answer,
    "shortest_path": lambda prompt, answer: path_length(prompt) == (None if answer == "-" else len(answer)),
    "quantum_lock": lambda prompt, answer: presses(prompt) == len(answer),
    "chain_sum": lambda prompt, answer: arithmetic(prompt) == answer,
    "basic_arithmetic": lambda prompt, answer: arithmetic(prompt) == answer,
    "gcd": lambda prompt, answer: str(math.gcd(*map(int, re.findall(r"\d+", prompt)))) == answer,
    "countdown": lambda prompt, answer: arithmetic(answer) == prompt.split(">")[1],
}


@pytest.mark.parametrize("task", ANSWERS)
def test_a_compact_prompt_decides_its_answer(task: str) -> None:
    problems = split(task).train
    answers = problems["solution"]
    assert len(set(answers)) > 1
    for prompt, answer in zip(problems["prompt"], answers, strict=True):
        assert prompt.endswith("=")
        assert ANSWERS[task](prompt.removesuffix("="), answer), (prompt, answer)


def test_compact_prompts_read_as_documented() -> None:
    """Where renaming would keep the answer: the order of two courses, the colour of the light."""
    courses = {"courses": [0, 1, 2], "prerequisites": [[2, 1], [1, 0]]}  # (course, what comes before)
    assert COMPACT["course_schedule"].prompt({"metadata": courses}) == "3:0<1,1<2="
    buttons = [
        {"name": name, "type": kind, "value": value, "active_state": when}
        for name, kind, value, when in (("A", "subtract", 2, "green"), ("B", "add", 2, "any"), ("C", "add", 1, "red"))
    ]
    lock = {"initial_value": 0, "initial_state": "red", "target_value": 8, "buttons": buttons}
    assert COMPACT["quantum_lock"].prompt({"metadata": lock}) == "0r>8 A-2g B+2 C+1r="


def test_a_compact_family_holds_every_name_and_every_tie() -> None:
    for row in split("family_relationships").train:
        entry = json.loads(row["entry"])
        story, _ = entry["question"].split("\n\n")
        *couples, asked = row["prompt"].removesuffix("=").split(";")
        told = " ".join(couples)
        assert set(re.findall(r"[A-Z]\w*", told)) == set(re.findall(r"[A-Z]\w*", story)) - {"They"}
        assert story.count("married") == len(couples)
        assert all(f"{pair.split('>')[0].replace('+', ' is married to ')}." in story for pair in couples)
        assert asked.split("?") == [entry["metadata"]["person1"], entry["metadata"]["person2"]]
        assert row["solution"] == entry["answer"]


def test_the_official_answer_for_a_daughter_in_law_is_wrong() -> None:
    """A finding, kept: what Sarah, married to the son, is to his mother is called mother-in-law. Ours is the official score."""
    entry = reasoning_gym.create_dataset("family_relationships", seed=1, size=1)[0]
    assert "Elizabeth. They have a child called Edward. Edward is married to Sarah" in entry["question"]
    assert "What is Sarah to Elizabeth?" in entry["question"]
    assert entry["answer"] == "mother-in-law"


# -- rewards -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", COMPACT)
def test_solutions_earn_one_and_the_answers_of_others_zero(task: str) -> None:
    for style in ("compact", "full", "chat"):
        problems = split(task, train=6, held_out=2, style=style).train
        reward = reasoning_gym_reward(task, style)
        columns = {"entry": problems["entry"], "trainer_state": None, "completion_ids": [[0]] * 6}  # as TRL calls it
        assert reward(problems["prompt"], problems["solution"], **columns) == [1.0] * 6
        empty = [[{"role": "assistant", "content": ""}] if style == "chat" else "" for _ in range(6)]
        assert reward(problems["prompt"], empty, **columns) == [0.0] * 6
        for row in problems:
            entry = json.loads(row["entry"])
            bad = spoiled(task, row["solution"] if style == "compact" else entry["answer"])
            assert not is_right(task, bad if style == "compact" else f"<answer>{bad}</answer>", entry, style=style)


def spoiled(task: str, answer: str) -> str:
    """A well-formed answer that is wrong: one more, the contrary, a step too many, a number that is not there."""
    contrary = {"T": "F", "F": "T", "True": "False", "False": "True", "infeasible": "up", "-": "U"}
    if answer in contrary:
        return contrary[answer]
    if task in ("quantum_lock", "shortest_path"):
        return answer + (
            f" → {answer[-1]}" if "→" in answer else f" {answer.split()[-1]}" if " " in answer else answer[-1]
        )
    if task == "family_relationships":
        return "uncle" if answer != "uncle" else "aunt"
    return f"{answer}+0" if task == "countdown" else str(int(answer) + 1)


def entry_of(task: str, **metadata: Any) -> dict[str, Any]:
    return {"answer": metadata.pop("answer"), "metadata": metadata}


GRID = [["*", "O", "#"], ["O", "O", "O"]]
PAID_IN_PART = [
    ("largest_island", entry_of("largest_island", answer="7"), "1234567"),
    ("gcd", entry_of("gcd", answer="12", numbers=[24, 36]), "1 2 3 4 6 12"),
    ("chain_sum", entry_of("chain_sum", answer="5"), "5 or 6"),
    ("course_schedule", entry_of("course_schedule", answer="True"), "True False"),
    ("shortest_path", entry_of("shortest_path", answer="right right", matrix=GRID), "down right right up"),
    ("countdown", entry_of("countdown", answer="4*6", numbers=[4, 6], target=24), "4+6"),
]


@pytest.mark.parametrize(("task", "entry", "response"), PAID_IN_PART)
def test_what_the_official_scorer_pays_in_part_earns_nothing(task: str, entry: dict[str, Any], response: str) -> None:
    official = reasoning_gym.create_dataset(task, seed=0, size=1).score_answer(response, entry)
    assert 0 < official < 1
    assert not is_right(task, f"<answer>{response}</answer>", entry, style="full")


@pytest.mark.parametrize("cheat", ["4+6+0xe", "4+6+int('14')", "4+6+0b1110", "4+6+0o16"])
def test_the_official_scorer_of_countdown_is_cheated_and_ours_is_not(cheat: str) -> None:
    entry = entry_of("countdown", answer="4*6", numbers=[4, 6], target=24)
    score = reasoning_gym.create_dataset("countdown", seed=0, size=1).score_answer(cheat, entry)
    assert score == 1.0 or "int" in cheat
    pairs: list[tuple[PromptStyle, str]] = [("compact", cheat), ("full", f"<answer>{cheat}</answer>")]
    for style, response in pairs:
        assert not is_right("countdown", response, entry, style=style)
        assert is_right("countdown", response.replace(cheat, "4*6"), entry, style=style)


def test_the_model_s_text_is_never_run(tmp_path: Path) -> None:
    target = tmp_path / "made"
    text = f"__import__('pathlib').Path({str(target)!r}).touch()"
    entry = entry_of("countdown", answer="4*6", numbers=[4, 6], target=24)
    assert not is_right("countdown", f"<answer>{text}</answer>", entry, style="full")
    assert not target.exists()


def test_the_last_answer_counts() -> None:
    entry = entry_of("gcd", answer="12", numbers=[24, 36])
    assert is_right("gcd", "<answer>3</answer> no: <answer> 12 </answer> done", entry, style="full")
    assert not is_right("gcd", "<answer>12</answer> no: <answer>3</answer>", entry, style="full")
    assert not is_right("gcd", "12</answer>", entry, style="full")
    assert not is_right("gcd", "12", entry, style="full")


@st.composite
def expressions(draw: st.DrawFn, depth: int = 3) -> tuple[str, Fraction | None, list[int]]:
    """An expression in brackets throughout, its value (``None``: divides by zero), and its numbers."""
    if depth == 0 or draw(st.booleans()):
        number = draw(st.integers(0, 99))
        return str(number), Fraction(number), [number]
    left, a, some = draw(expressions(depth=depth - 1))
    right, b, others = draw(expressions(depth=depth - 1))
    sign = draw(st.sampled_from("+-*/"))
    if a is None or b is None or (sign == "/" and b == 0):
        return f"({left}{sign}{right})", None, some + others
    value = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else a}[sign]
    return f"({left} {sign} {right})", value, some + others


@given(expressions())
@settings(max_examples=60)
def test_expressions_are_worth_what_they_say(case: tuple[str, Fraction | None, list[int]]) -> None:
    text, value, numbers = case
    assert evaluate_expression(text) == (None if value is None else (value, numbers))
    assert evaluate_expression(f"-{text}") == (None if value is None else (-value, numbers))


@pytest.mark.parametrize(
    "text", ["", "2**3", "7//2", "0x10", "1e3", "07", "1_0", "(1", "1 2", "1/0", "1.5", "x", "+1", "()", "1,2"]
)
def test_what_is_no_arithmetic_has_no_value(text: str) -> None:
    assert evaluate_expression(text) is None


def test_deep_and_long_expressions_have_no_value() -> None:
    assert evaluate_expression("(" * 99 + "1" + ")" * 99) in (None, (Fraction(1), [1]))
    assert evaluate_expression("1+" * 100 + "1") is None
    assert evaluate_expression("-" * 199 + "1") in (None, (Fraction(-1), [1]))


# -- held out ------------------------------------------------------------------------------------------------


def test_no_seed_trains_on_a_held_out_problem() -> None:
    tiny = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}  # 200 problems in all
    splits = [reasoning_gym_split("chain_sum", train=100, held_out=25, seed=seed, difficulty=tiny) for seed in range(3)]
    held_out = set(splits[0].held_out["prompt"])
    assert len(held_out) == 25
    for made in splits:
        assert len(set(made.train["prompt"])) == 100
        assert set(made.held_out["prompt"]) == held_out
        assert not held_out & set(made.train["prompt"])
        assert all(map(is_held_out, made.held_out["prompt"]))
        assert not any(map(is_held_out, made.train["prompt"]))
    assert splits[0].train["prompt"] != splits[1].train["prompt"]
    assert (
        splits[0].train["prompt"]
        == reasoning_gym_split("chain_sum", train=100, held_out=1, difficulty=tiny).train["prompt"]
    )


def test_neighbouring_seeds_of_reasoning_gym_share_their_problems_and_ours_do_not() -> None:
    first, second = (reasoning_gym.create_dataset("gcd", seed=seed, size=9) for seed in (0, 1))
    assert [first[i + 1]["question"] for i in range(8)] == [second[i]["question"] for i in range(8)]
    a, b = (set(split("gcd", train=50, seed=seed).train["prompt"]) for seed in (0, 1))
    assert len(a & b) <= 2


def test_the_same_problem_in_other_words_is_the_same_problem() -> None:
    entries = [
        entry_of("gcd", answer="6", numbers=numbers) | {"question": question}
        for numbers, question in (([12, 18], "the gcd of 12, 18"), ([18, 12], "the gcd of 18, 12"))
    ]
    assert len({COMPACT["gcd"].prompt(entry) for entry in entries}) == 1


def test_a_fifth_is_held_out() -> None:
    share = sum(is_held_out(f"{a}+{b}=") for a in range(100) for b in range(100)) / 1e4
    assert abs(share - 0.2) < 4 * math.sqrt(0.2 * 0.8 / 1e4)


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"task": "sudoku"}, "task"),
        ({"train": 0}, "task"),
        ({"seed": -1}, "task"),
        ({"train": 500}, "task"),
        ({"difficulty": {"max_terms": 0}}, "difficulty"),
        ({"difficulty": {"digits": 3}}, "difficulty"),
    ],
)
def test_what_no_problems_can_be_made_of_is_refused(
    options: dict[str, Any], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tbrm_theory.llm.tasks._PATIENCE", 500)
    tiny = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    made: dict[str, Any] = {"task": "chain_sum", "train": 5, "held_out": 2, "difficulty": tiny, **options}
    with pytest.raises(InvalidInputError, match=f"^{where}: "):
        reasoning_gym_split(**made)


# -- tokenizer -----------------------------------------------------------------------------------------------


@given(st.lists(st.text(st.sampled_from(PRINTABLE), max_size=20), min_size=1, max_size=3))
@settings(max_examples=30)
def test_every_text_comes_back_one_token_for_each_character(texts: list[str]) -> None:
    tokenizer = character_tokenizer()
    batch = tokenizer(texts, padding=True, return_attention_mask=True)
    longest = max(map(len, texts))
    for text, ids, mask in zip(texts, batch.input_ids, batch.attention_mask, strict=True):
        assert len(ids) == longest
        assert mask == [0] * (longest - len(text)) + [1] * len(text)
        assert ids[: longest - len(text)] == [tokenizer.pad_token_id] * (longest - len(text))
        assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text


def test_a_saved_tokenizer_is_the_same(tmp_path: Path) -> None:
    tokenizer = character_tokenizer("01+=")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 1, 6)
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token) == (
        PAD,
        END,
        None,
        None,
    )
    tokenizer.save_pretrained(tmp_path)
    for again in (AutoTokenizer.from_pretrained(tmp_path), type(tokenizer).from_pretrained(tmp_path)):
        assert again.get_vocab() == tokenizer.get_vocab()
        assert again("10+1=").input_ids == [3, 2, 4, 3, 5]
        assert (again.padding_side, again.pad_token_id, again.eos_token_id) == ("left", 0, 1)


def test_what_a_tokenizer_cannot_read_is_refused() -> None:
    with pytest.raises(Exception, match="UNK"):
        character_tokenizer("01")("012")
    with pytest.raises(InvalidInputError, match=r"^texts\[1\]: '2' is not in the alphabet"):
        check_readable("01", ["01", "012"])
    for alphabet in ("", "00", f"0{END}", f"{PAD}1"):
        with pytest.raises(InvalidInputError, match=r"^alphabet: "):
            character_tokenizer(alphabet)


@pytest.mark.parametrize("task", COMPACT)
def test_prompts_and_solutions_are_printable(task: str) -> None:
    for style in ("compact", "full"):
        for side in split(task, train=4, held_out=2, style=style):
            check_readable(PRINTABLE, [*side["prompt"], *side["solution"]])


# -- answers in a box ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def verifier() -> Iterator[BoxedVerifier]:
    with BoxedVerifier(seconds=20.0) as made:
        yield made


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{34}.", "34"),
        (r"\boxed{1} no, \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{34", None),
        (r"\boxed{ }", None),
        ("34", None),
        ("", None),
    ],
)
def test_the_last_box_is_read_with_its_brackets(response: str, answer: str | None) -> None:
    assert boxed_answer(response) == answer


@pytest.mark.parametrize(
    ("known", "answer", "equal"),
    [
        ("34", "34", True),
        ("34", "x=34", True),
        ("34", r"\frac{68}{2}", True),
        ("1000", "1,000", True),
        (r"\frac12", "0.5", True),
        ("34", "35", False),
        ("34", r"34 \text{ or } 35", False),
        ("34", "34,35", False),
        ("34", "-34", False),
        ("34", "0" * 400 + "34", False),
    ],
)
def test_answers_are_equal_in_any_form(known: str, answer: str, equal: bool, verifier: BoxedVerifier) -> None:
    assert verifier.equal(known, answer) == equal


def test_a_thread_gets_a_verdict_and_an_endless_answer_is_wrong() -> None:
    """math-verify's alarms work in no thread, and do not stop one long multiplication."""
    verdicts: list[bool] = []
    with BoxedVerifier(seconds=0.5) as quick:

        def ask() -> None:
            started = time.monotonic()
            verdicts.append(quick.right("34", r"\boxed{9^{9^{9^9}}}"))
            assert time.monotonic() - started < 60

        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        child = quick._child
        quick.seconds = 20.0
        assert child is None  # it was ended
        verdicts.append(quick.right("34", r"\boxed{34}"))
    assert verdicts == [False, True]


def test_the_math_reward_in_trl_s_convention(verifier: BoxedVerifier) -> None:
    reward = math_reward(verifier)
    turns = [[{"role": "assistant", "content": text}] for text in (r"\boxed{34}", r"\boxed{35}", "34")]
    assert reward([None] * 3, turns, answer=["34", "34", "34"], trainer_state=None) == [1.0, 0.0, 0.0]
    with pytest.raises(InvalidInputError, match=r"^seconds: "):
        BoxedVerifier(seconds=0.0)


# -- problems in prose ---------------------------------------------------------------------------------------


def dapo(number: int) -> dict[str, Any]:
    """A row as DAPO-Math-17k has it."""
    before = (
        "Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer"
        " (without quotes) where $Answer is the answer to the problem."
    )
    after = 'Remember to put your answer on its own line after "Answer:".'
    return {
        "prompt": [{"role": "user", "content": f"{before}\n\nWhat is {number} + 1?\n\n{after}"}],
        "reward_model": {"ground_truth": str(number + 1), "style": "rule"},
    }


def written(folder: Path, rows: list[Any], kind: str) -> str:
    path = folder / f"problems.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    else:
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_problems_in_prose_are_split_by_what_they_are(kind: str, tmp_path: Path) -> None:
    rows = [dapo(i) for i in range(30)]
    made = math_split(written(tmp_path, rows * 3, kind), held_out=5)
    held_out = {row["prompt"][0]["content"] for row in made.held_out}
    train = {row["prompt"][0]["content"] for row in made.train}
    assert (len(made.train), len(made.held_out), len(train), len(held_out)) == (25, 5, 25, 5)
    assert not train & held_out
    again = math_split(written(tmp_path, rows[::-1], kind), held_out=5, style="full")
    assert {row["prompt"] for row in again.held_out} == {f"{text}\n" for text in held_out}
    for row in made.train:
        number = int(re.findall(r"\d+", row["prompt"][0]["content"])[0])
        assert row["prompt"][0]["content"] == f"What is {number} + 1?\n\n{BOXED_INSTRUCTION}"
        assert row["answer"] == str(number + 1)
        assert boxed_answer(row["solution"][0]["content"]) == row["answer"]


@pytest.mark.parametrize(
    ("bad", "where"),
    [
        ("{", r"problems\.jsonl:3: not JSON"),
        ("[1]", r"problems\.jsonl:3: expected a JSON object"),
        ({"prompt": "What?"}, r"problems\.jsonl:3\.reward_model\.ground_truth: expected text"),
        ({"prompt": [], "reward_model": {"ground_truth": "1"}}, r"problems\.jsonl:3\.prompt: expected text"),
        ({"prompt": " ", "reward_model": {"ground_truth": "1"}}, r"problems\.jsonl:3\.prompt: expected text"),
    ],
)
def test_a_bad_row_is_refused_by_its_number(bad: Any, where: str, tmp_path: Path) -> None:
    source = written(tmp_path, [dapo(0), dapo(1), bad, dapo(2)], "jsonl")
    with pytest.raises(InvalidInputError, match=where):
        math_split(source, held_out=1)


def test_a_problem_with_two_answers_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = {"prompt": "What is 0  + 1?", "reward_model": {"ground_truth": 2}}
    made = math_split(written(tmp_path, [*(dapo(i) for i in range(4)), other], "jsonl"), held_out=1, style="full")
    left = {row["prompt"].splitlines()[0] for side in made for row in side}
    assert left == {f"What is {i} + 1?" for i in (1, 2, 3)}
    assert "1 problems with two answers left out, as 'What is 0 + 1?'" in caplog.text


def test_files_that_cannot_serve_are_refused(tmp_path: Path) -> None:
    source = written(tmp_path, [dapo(0), dapo(1)], "parquet")
    for held_out in (0, 2):
        with pytest.raises(InvalidInputError, match=r"^held_out: expected 1 to 1"):
            math_split(source, held_out=held_out)
    with pytest.raises(InvalidInputError, match=r"parquet, row 1\.question: expected text"):
        math_split(source, held_out=1, prompt_column="question")
    with pytest.raises(InvalidInputError, match=r"^style: "):
        math_split(source, held_out=1, style="compact")
    (tmp_path / "bad.parquet").write_text("no")
    with pytest.raises(InvalidInputError, match="not Parquet"):
        math_split(str(tmp_path / "bad.parquet"), held_out=1)
