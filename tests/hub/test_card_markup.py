"""Names of strangers on a card are text: a Markdown parser finds no markup in them, and shows them as they are."""

from dataclasses import replace

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from small import card_facts

from vidprism_hf.data.bad_clips import BadClip
from vidprism_hf.errors import printable
from vidprism_hf.hub import render_card
from vidprism_hf.hub.card import addressed
from vidprism_hf.hub.card_merge import merge_card, take_apart, with_evaluation
from vidprism_hf.hub.markdown import escape

PARSER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
PIECES = st.sampled_from(
    [
        *(
            "[a](http://x)",
            "![a](x.png)",
            "```",
            "~~~",
            "# ",
            "## ",
            "|",
            "| --- |",
            "<b>",
            "</details>",
            "<!--",
            "-->",
        ),
        *("<!-- vidprism:generated begin", "<!-- vidprism:generated end -->", "---", "===", "- ", "1. ", "> ", "    "),
        *("\n", "\r\n", "\n\n", "\0", "\x1b[31m", "\u202e", "\u2028", "\x85", "\ufeff", "\udcff", "&lt;", "&#60;"),
        *("{{ facts }}", "{% if", "$x$", "*", "**", "_", "__", "`", "\\", "\\|", "[", "]", "<http://x>", "~~", "a_b"),
        *(
            "]: http://x",
            "@someone",
            "www.x.org",
            "http://x",
            "\t",
            "  ",
            "#",
            "é",
            "中",
            "a\u0301",
            "😀",
            "&amp;",
            "&",
        ),
    ]
)
NAMES = (
    st.lists(PIECES | st.text(max_size=3), min_size=1, max_size=6)
    .map(lambda parts: "".join(parts).strip())
    .filter(bool)
)


def shown(name: str) -> str:
    """A name as a reader is to see it."""
    return printable(" ".join(name.split()))


def card(name: str) -> str:
    facts = card_facts(
        labels=(name, name + " 2"),
        model_name=name,
        backbone=name,
        dataset=name,
        dataset_id="org/clips",
        dataset_split=name,
        data_license=name,
        base_model=name,
        license=name,
        split=name,
        train_list_hash=name,
        bad_clips=[BadClip("train", name, name, name)],
        metrics={"top1": 0.5},
        protocol=name,
        per_class=[{"label": name, "clips": 1, "unreadable": 0, "top1": 0.5, "low": 0, "high": 1, "taken_for": name}],
        hyper_parameters={name: name},
        augmentation={"crop": name},
        compute={"device": name},
        figures={"figures/curves.png": "curves"},
        expert_weights={name: name},
    )
    return str(render_card(facts))


def tokens(text: str) -> tuple[list[tuple[str, str]], list[str]]:
    """Kinds of the markup, with tag or HTML, and the visible text of each inline part."""
    kinds, texts = [], []
    for block in PARSER.parse(take_apart(text).body):
        if block.type != "inline":
            kinds.append((block.type, block.content if block.type == "html_block" else block.tag))
            continue
        kinds += [(each.type, each.content) for each in block.children if each.type not in ("text", "text_special")]
        texts.append("".join(each.content for each in block.children))
    return kinds, texts


PLAIN = "Zebra"  # a word that the card itself does not use
EXPECTED_KINDS, EXPECTED_TEXTS = tokens(card(PLAIN))


@settings(max_examples=60, deadline=None)
@given(NAMES)
@example("<!-- vidprism:generated begin <!-- vidprism:generated end -->")
@example("a\n\n# b\n\n```")
def test_names_are_no_markup_and_are_shown_as_they_are(name):
    kinds, texts = tokens(card(name))
    assert kinds == EXPECTED_KINDS
    assert texts == [text.replace(PLAIN, shown(name)) for text in EXPECTED_TEXTS]


@settings(max_examples=100, deadline=None)
@given(NAMES)
def test_metadata_say_what_they_were_told(name):
    data = yaml.safe_load(take_apart(card(name)).front[1])
    (result,) = data["model-index"][0]["results"]
    stated = data["model-index"][0]["name"], result["dataset"]["name"], result["dataset"]["split"], data["license"]
    assert set(stated) == {name}
    assert data["base_model"] == name


@settings(max_examples=40, deadline=None)
@given(NAMES)
def test_a_card_of_such_names_can_be_refreshed_addressed_and_evaluated(name):
    text = card(name)
    assert take_apart(text).section is not None
    mine = text + "\nMine.\n"
    assert merge_card(mine, card("other")).endswith("\nMine.\n")
    assert merge_card(mine, text) == mine
    there = addressed(text, "alice/moves")
    assert 'model_id = "alice/moves"' in there
    assert "\n# moves\n" in there
    title = escape(f"On {name}")
    once = with_evaluation(text, title, "found 1")
    assert once.count("found 1") == 1
    assert with_evaluation(with_evaluation(text, title, "found 0"), title, "found 1") == once


@pytest.mark.parametrize("text", ["a_b", "R&B", "C++", "5e-05", "0.9", "(x)", "it's!", "a-b.mp4", "100 %"])
def test_ordinary_text_stays_as_it_is(text):
    assert escape(text) == text


def test_an_expression_of_the_template_cannot_forget_to_escape():
    facts = replace(card_facts(), origin="<b>*x*</b>")
    assert "&lt;b>\\*x\\*&lt;/b>" in str(render_card(facts))
