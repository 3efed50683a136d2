"""Merging a README with a new card: what is generated is refreshed, every other byte stays."""

import pytest
import yaml
from hub_server.cards import front_matter, judge
from hypothesis import given
from hypothesis import strategies as st
from small import card_facts

from vidprism_hf.hub import render_card
from vidprism_hf.hub.card import merge_card

OLD = str(render_card(card_facts(metrics={"top1": 0.5}, base_model="org/old", license="mit"))) + "\n"
NEW = str(render_card(card_facts(metrics={"top1": 0.9}, base_model="org/new", dataset_id="org/clips"))) + "\n"
BARE = str(render_card(card_facts())) + "\n"
BEGIN, END = "<!-- vidprism:generated begin", "<!-- vidprism:generated end -->"
# A person's words: no line of them is a mark of ours, and lines end in one way.
words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r")).filter(
    lambda text: "<!--" not in text
)


def parts(text: str) -> tuple[str, str, str]:
    """What stands before, in and behind the generated part; before without metadata."""
    before, _, rest = text.partition(BEGIN)
    section, _, after = rest.partition(END)
    return before.partition("\n---\n")[2], section, after


def test_takes_over_all_of_a_card_that_nobody_edited():
    assert merge_card(NEW, NEW) == NEW
    assert parts(merge_card(OLD, NEW)) == parts(NEW)
    kept = {"license": "mit"}
    assert front_matter(merge_card(OLD, NEW)) == front_matter(NEW) | kept


@given(before=words, after=words)
def test_a_persons_words_stay(before, after):
    edited = OLD.replace(BEGIN, before + BEGIN).replace(END, END + after)
    merged = merge_card(edited, NEW)
    old, new = parts(edited), parts(merged)
    assert (new[0], new[1], new[2]) == (old[0], parts(NEW)[1], old[2])
    assert merge_card(merged, NEW) == merged


def test_a_persons_metadata_stays():
    mine = "# mine\nthumbnail: 'a.png'  # a picture\nlanguage:\n- en\n\n- de\n"
    mine += "widget:\n  - text: |\n      a: b\n\n      c\n"
    edited = OLD.replace("license: mit\n", "license: apache-2.0\n").replace("---\n", "---\n" + mine, 1)
    merged = merge_card(edited, NEW)
    assert merged.startswith("---\n" + mine)
    data = front_matter(merged)
    assert data["license"] == "apache-2.0"
    assert data["language"] == ["en", "de"]
    assert data["base_model"] == "org/new"
    assert data["datasets"] == ["org/clips"]  # which the old card had not
    assert data["model-index"] == front_matter(NEW)["model-index"]
    assert judge(merged, "model") == ([], [])
    assert merge_card(merged, NEW) == merged


def test_results_of_earlier_weights_go_and_the_rest_stays():
    data = front_matter(merge_card(OLD, BARE))
    assert not {"model-index", "metrics"} & data.keys()
    assert data["base_model"] == "org/old"


@pytest.mark.parametrize(
    "text",
    [
        "My own words.",
        "---\nlicense: mit\n---\n# Mine\n",
        OLD.replace(END, ""),
        OLD.replace(BEGIN, "<!-- "),
        OLD + OLD,
        OLD + BEGIN,
    ],
    ids=["text", "metadata", "no end", "no begin", "two parts", "two begins"],
)
def test_a_readme_without_one_generated_part_stays(text):
    assert merge_card(text, NEW) == text


@pytest.mark.parametrize("text", ["", "\n", "---\nlicense: mit\ntags:\n- mine\n---\n"])
def test_a_readme_without_text_is_filled(text):
    merged = merge_card(text, NEW)
    assert parts(merged)[1:] == parts(NEW)[1:]
    expected = front_matter(NEW) | (front_matter(text) or {})
    assert front_matter(merged) == expected


def test_a_part_without_metadata_gets_it():
    alone = NEW.partition("\n---\n")[2]
    assert front_matter(merge_card(alone, NEW)) == front_matter(NEW)
    assert merge_card(alone, NEW).endswith(alone)


def test_line_ends_stay():
    merged = merge_card(OLD.replace("\n", "\r\n"), NEW)
    assert merged.count("\n") == merged.count("\r\n")
    assert merged.replace("\r\n", "\n") == merge_card(OLD, NEW)


def test_metadata_in_quotes_is_found():
    quoted = OLD.replace("base_model: org/old", "'base_model': org/old")
    block = merge_card(quoted, NEW).split("---")[1]
    assert block.count("base_model") == 1
    assert yaml.safe_load(block)["base_model"] == "org/new"
