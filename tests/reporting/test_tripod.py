"""The TRIPOD+AI checklist: complete, and filled with known facts only."""

import re
import string

from ichprog.reporting import tripod


def test_the_checklist_has_every_item_once_and_in_order():
    """The statement counts 27 items with 52 parts."""
    numbers = [row["number"] for row in tripod.fill_checklist({})]
    assert len(numbers) == len(set(numbers)) == 52
    split = [re.fullmatch(r"(\d+)([a-g]?)", number).groups() for number in numbers]
    assert sorted(split, key=lambda each: (int(each[0]), each[1])) == split
    assert {int(number) for number, _ in split} == set(range(1, 28))
    for number in range(1, 28):
        letters = "".join(letter for of, letter in split if int(of) == number)
        assert letters == string.ascii_lowercase[: len(letters)], number


def test_an_item_with_an_unknown_fact_is_left_to_the_authors():
    answers = {row["number"]: row["answer"] for row in tripod.fill_checklist({})}
    assert answers["17"] == "To be written by the authors."
    assert answers["20a"] == "To be written by the authors."
    assert not any("{" in answer for answer in answers.values())


def test_known_facts_are_filled_in():
    facts = {"patients": 6, "labels": "prognosis (good: 2, poor: 3)", "missing": None}
    answers = {row["number"]: row["answer"] for row in tripod.fill_checklist(facts)}
    assert answers["20a"].startswith(
        "6 patients: prognosis (good: 2, poor: 3). To be written by the authors: screening"
    )
    assert answers["20b"] == "To be written by the authors."
