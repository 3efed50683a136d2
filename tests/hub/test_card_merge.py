"""Merging a README with a new card: what is generated is refreshed, every other byte stays."""

import pytest
import yaml
from hub_server.cards import front_matter, judge
from hypothesis import given
from hypothesis import strategies as st
from small import card_facts

from vidprism_hf.hub import render_card
from vidprism_hf.hub.merge import OWNED, left_out, merge_card, merge_metadata, with_evaluation

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


def test_what_follows_the_weights_goes_with_them_and_the_rest_stays():
    mine = NEW.replace("license: unknown", "license: mit").replace("tags:\n", "tags:\n- mine\n")
    data = front_matter(merge_card(mine, BARE))
    assert front_matter(mine).keys() - data.keys() == {"model-index", "metrics"}
    # Which a person may have written, where the run knew none.
    by_hand = {"base_model": "org/new", "datasets": ["org/clips"]}
    assert data == front_matter(BARE) | by_hand | {"license": "mit", "tags": ["mine", *front_matter(BARE)["tags"]]}
    assert left_out(BARE, merge_card(NEW, BARE)) == ["base_model", "datasets"]


items = st.sampled_from(["- org/a\n", "- org/b\n", "# held out too\n", "\n", "  # so\n"])
keys = st.sampled_from(["datasets", "base_model", "tags", "language", "metrics", "model-index", "thumbnail", "license"])
blocks = st.lists(st.tuples(keys, st.lists(items, max_size=4)), max_size=5, unique_by=lambda entry: entry[0]).map(
    lambda entries: "".join(f"{key}:\n{''.join(lines)}" for key, lines in entries)
)


@given(old=blocks, new=blocks)
def test_metadata_stays_metadata_whatever_comments_stand_in_it(old, new):
    merged = merge_metadata(old, new)
    there, stated, made = (yaml.safe_load(block) or {} for block in (old, new, merged))
    assert made.keys() - {"metrics", "model-index"} == (there.keys() | stated.keys()) - {"metrics", "model-index"}
    for key, value in made.items():
        assert value == (stated if key not in there or (key in OWNED and key in stated) else there)[key]
    assert merge_metadata(merged, new) == merged


@pytest.mark.parametrize(
    ("there", "new", "license"),
    [("unknown", "mit", "mit"), ("mit", "unknown", "mit"), ("mit", "isc", "mit"), ("unknown", "unknown", "unknown")],
)
def test_a_license_that_nobody_has_stated_gives_way(there, new, license):
    there, new = (BARE.replace("license: unknown", f"license: {name}  # so") for name in (there, new))
    assert front_matter(merge_card(there, new))["license"] == license


@given(before=words, after=words, license=st.sampled_from(["unknown", "isc"]))
def test_a_persons_words_in_the_new_card_come_in_where_there_are_none(before, after, license):
    edited = (
        NEW.replace(BEGIN, before + BEGIN).replace(END, END + after).replace("license: unknown", "license: " + license)
    )
    merged = merge_card(OLD, edited)
    if (before + after).strip():
        assert parts(merged) == parts(edited)
    else:
        assert parts(merged) == (parts(OLD)[0], parts(NEW)[1], parts(OLD)[2])
    assert front_matter(merged) == front_matter(NEW) | {"license": "mit"}
    mine = OLD.replace(BEGIN, "Mine.\n" + BEGIN)
    assert parts(merge_card(mine, edited))[::2] == parts(mine)[::2]


PERSONS = "---\nlicense: isc\n---\n# All my own\n"


def test_a_new_card_without_a_generated_part_replaces_what_nobody_edited():
    merged = merge_card(OLD, PERSONS)
    assert merged.endswith("\n---\n# All my own\n")
    assert front_matter(merged) == {"base_model": "org/old", "license": "mit", "tags": front_matter(OLD)["tags"]}
    mine = OLD + "Mine.\n"
    assert merge_card(mine, PERSONS) == mine


@pytest.mark.parametrize("mark", ["\ufeff", "\n\n", "\ufeff\r\n"])
def test_what_stands_before_the_metadata_hides_it_not(mark):
    expected = merge_card(OLD, NEW)
    assert merge_card(OLD, mark + NEW) == expected
    merged = merge_card(mark + OLD, NEW)
    assert front_matter(merged) == front_matter(expected)
    assert merged.count("license:") == 1
    assert "\ufeff" not in merged


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


@given(before=words, after=words)
@pytest.mark.parametrize("card", [OLD, BARE], ids=["evaluated", "not evaluated"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_an_evaluation_is_put_in_and_replaced(card, newline, before, after):
    head, _, rest = card.partition(BEGIN)
    section, _, tail = rest.partition(END)
    readme = f"{head}{before}\n{BEGIN}{section}{END}{after}{tail}".replace("\n", newline)
    first = with_evaluation(readme, "On a (b)", "found 1\n\n| a |")
    both = with_evaluation(first, "On c", "found 2")
    again = with_evaluation(both, "On a (b)", "found 3")
    assert again == with_evaluation(again, "On c", "found 2")
    for one, other in ((readme, first), (first, both), (both, again)):
        assert parts(one)[0::2] == parts(other)[0::2]
        assert one.partition(BEGIN)[0] == other.partition(BEGIN)[0]
    text = parts(again)[1].replace("\r\n", "\n")
    assert text.count("## Evaluation\n") == 1
    assert "### On a (b)\n\nfound 3\n\n### On c\n\nfound 2\n\n## " in text
    assert "found 1" not in text
    # All else of the generated part stays.
    kept = text.replace("### On a (b)\n\nfound 3\n\n### On c\n\nfound 2\n\n", "")
    assert kept.replace("## Evaluation\n\n## Limitations", "## Limitations") == parts(readme)[1].replace("\r\n", "\n")


def test_no_evaluation_goes_into_a_persons_readme():
    for readme in ("# Mine\n", NEW + NEW, ""):
        assert with_evaluation(readme, "On a", "found") == readme
