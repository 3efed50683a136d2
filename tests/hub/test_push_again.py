"""Pushing to a repository that holds an earlier export, or a person's files: what goes, what stays, what is told."""

import shutil

import pytest
from hub_server.cards import front_matter
from push_helpers import as_published, push, repo_of, with_bytes
from small import files_of, tiny_export

pytest_plugins = ["hub_server.fixtures"]

REPLACE = "to have the local one instead, delete README.md on the Hub and push again"
DIFFERS = f"README.md: differs from the local one, and stays on the Hub as it is: {{}}; {REPLACE}"
OUTSIDE = "its text outside the generated section"
BEGIN, END = "<!-- vidprism:generated begin", "<!-- vidprism:generated end -->"


@pytest.fixture
def folder(exported, tmp_path):
    """An export of its own, which a test may change."""
    return shutil.copytree(exported, tmp_path / "export")


@pytest.fixture
def newer(tmp_path):
    """An export of another model."""
    return tiny_export(tmp_path / "newer", labels=("a", "b", "c"))


def edit(folder, **replaced):
    """Changes the README of an export: `words` are added, keys of the metadata set."""
    text = (folder / "README.md").read_text()
    text += replaced.pop("words", "")
    for key, line in replaced.items():
        text = text.replace(f"{key}: unknown\n", line) if key == "license" else text.replace("tags:\n", line)
    (folder / "README.md").write_text(text)


def on_the_hub(hub, path="README.md") -> str:
    return repo_of(hub).commit("main").files[path].read().decode()


def states(result) -> dict[str, str]:
    return {file.path: file.state for file in result.files}


# The README


def test_a_readme_that_a_person_wrote_stays(hub, api, folder, tmp_path):
    hub.add_model("alice/m", with_bytes(tmp_path / "old", {"README.md": b"# Mine\n"}))
    before = files_of(folder)
    result = push(hub, api.token, folder)
    assert on_the_hub(hub) == result.card == "# Mine\n"
    assert states(result)["README.md"] == "kept"
    assert [note for note in result.notes if "README.md" in note and "stays as it is" in note]
    assert "README.md" not in result.uploaded
    assert len(repo_of(hub).commits) == 2
    assert files_of(folder) == before
    again = push(hub, api.token, folder)
    assert (again.commit, again.uploaded, again.notes) == (result.commit, {}, result.notes)


def test_the_generated_section_is_refreshed_and_a_persons_words_of_the_hub_stay(hub, api, folder, newer, tmp_path):
    edit(folder, words="Ask me.\n", license="license: mit\n", tags="tags:\n- mine\n")
    hub.add_model("alice/m", folder)
    before = files_of(newer)
    result = push(hub, api.token, newer)
    text = on_the_hub(hub)
    assert "knows 3 classes" in text
    assert "knows 2 classes" not in text
    assert text.endswith("\nAsk me.\n")
    assert front_matter(text)["license"] == "mit"
    assert "mine" in front_matter(text)["tags"]
    assert states(result)["README.md"] == "changed"
    assert files_of(newer) == before
    # The new card has neither words nor a licence to lose; its tags are others.
    assert result.notes == [DIFFERS.format("tags")]


def test_a_persons_words_go_up_where_the_hub_has_none(hub, api, folder, newer):
    push(hub, api.token, folder)
    edit(newer, words="Ask me.\n", license="license: mit\n")
    result = push(hub, api.token, newer)
    assert on_the_hub(hub) == as_published(newer)["README.md"].decode()
    assert result.notes == []


@pytest.mark.parametrize(
    ("there", "here", "told"),
    [
        ({"words": "Theirs."}, {"words": "Mine."}, OUTSIDE),
        ({"words": "Mine."}, {"words": "\n Mine.\n"}, None),
        ({"words": "Theirs."}, {}, None),
        ({"license": "license: mit\n"}, {"license": "license: isc\n"}, "license"),
        ({"license": "license: mit\n"}, {"license": "license: 'mit'  # so\n"}, None),
        ({"license": "license: mit\n"}, {}, None),
        ({}, {"license": "license: mit\n"}, None),
        ({"words": "Theirs."}, {"words": "Mine.", "tags": "language: en\ntags:\n- mine\n"}, f"{OUTSIDE}, tags"),
    ],
)
def test_what_stays_on_the_hub_in_spite_of_the_local_readme_is_told(hub, api, folder, tmp_path, there, here, told):
    edit(shutil.copytree(folder, tmp_path / "there"), **there)
    hub.add_model("alice/m", tmp_path / "there")
    edit(folder, **here)
    notes = push(hub, api.token, folder).notes
    assert notes == ([DIFFERS.format(told)] if told else [])
    text, local = on_the_hub(hub), (folder / "README.md").read_text()
    assert there.get("words", here.get("words", "")) in text.partition(END)[2]
    stated = [front_matter(each)["license"] for each in ((tmp_path / "there" / "README.md").read_text(), local)]
    assert front_matter(text)["license"] == (stated[0] if stated[0] != "unknown" else stated[1])


@pytest.mark.parametrize("mine", ["# Mine\n", None], ids=["a person's", "with other words"])
def test_how_the_local_readme_can_win(hub, api, folder, tmp_path, mine):
    edit(shutil.copytree(folder, tmp_path / "there"), words="Theirs.\n")
    hub.add_model("alice/m", with_bytes(tmp_path / "there", {"README.md": mine.encode()} if mine else {}))
    edit(folder, words="Mine.\n")
    (note,) = push(hub, api.token, folder).notes
    assert note.endswith(f"; {REPLACE}")
    api.delete_file("README.md", "alice/m")
    assert push(hub, api.token, folder).notes == []
    assert on_the_hub(hub) == as_published(folder)["README.md"].decode()


def test_a_local_readme_without_a_generated_section(hub, api, folder, newer):
    push(hub, api.token, folder)
    (newer / "README.md").write_text("---\nlicense: mit\n---\n# All my own\n")
    result = push(hub, api.token, newer)
    assert on_the_hub(hub).endswith("---\n# All my own\n")
    assert BEGIN not in on_the_hub(hub)
    assert result.notes == []


def test_a_local_readme_without_a_generated_section_gives_way_to_an_edited_one(hub, api, folder, newer):
    edit(folder, words="Theirs.\n")
    push(hub, api.token, folder)
    (newer / "README.md").write_text("# All my own\n")
    result = push(hub, api.token, newer)
    assert on_the_hub(hub) == as_published(folder)["README.md"].decode()
    assert states(result)["README.md"] == "kept"
    assert "the local one is not published" in result.notes[0]


def test_a_byte_order_mark_before_a_readme(hub, api, folder, newer, tmp_path):
    marked = b"\xef\xbb\xbf" + (folder / "README.md").read_bytes()
    hub.add_model("alice/m", with_bytes(tmp_path / "old", {"README.md": marked}))
    (newer / "README.md").write_bytes(b"\xef\xbb\xbf" + (newer / "README.md").read_bytes())
    push(hub, api.token, newer)
    assert on_the_hub(hub).count("license:") == 1
    assert front_matter(on_the_hub(hub))["library_name"] == "transformers"
    assert "knows 3 classes" in on_the_hub(hub)


def test_a_readme_that_is_no_text_stays(hub, api, folder, newer):
    content = (folder / "README.md").read_bytes() + b"caf\xe9\n"
    (folder / "README.md").write_bytes(content)
    hub.add_model("alice/m", folder)
    assert states(push(hub, api.token, newer))["README.md"] == "kept"
    assert repo_of(hub).commit("main").files["README.md"].read() == content


# Other files


def test_files_of_an_earlier_export_go_and_those_of_others_stay(hub, api, folder, tmp_path):
    ours = {"recipe.yaml", "split.json", "train_clips.txt", "figures/curves.png", "figures/experts.png"}
    ours |= {"model-00001-of-00002.safetensors", "model.safetensors.index.json"}
    theirs = {"figures/mine.png", "paper.pdf", "more/recipe.yaml", ".eval_results/org--name.yaml"}
    old = with_bytes(tmp_path / "old", dict.fromkeys(ours | theirs, b"old"))
    hub.add_model("alice/m", old)
    dry = push(hub, api.token, folder, dry_run=True)
    result = push(hub, api.token, folder)
    assert {path for path, state in states(result).items() if state == "removed"} == ours
    assert states(dry) == states(result)
    assert repo_of(hub).commit("main").files.keys() == theirs | files_of(folder).keys()
    assert [note for note in result.notes if "eval_results/org--name.yaml" in note and "other weights" in note]
    assert len(result.notes) == 1


def test_files_that_the_export_has_stay(hub, api, folder):
    files = {"recipe.yaml": b"a: 1\n", "figures/curves.png": b"a", ".eval_results/org--name.yaml": b"[]"}
    with_bytes(folder, files)
    push(hub, api.token, folder)
    result = push(hub, api.token, folder)
    assert set(states(result).values()) == {"unchanged"}
    assert result.notes == []
    for name in files:
        (folder / name).unlink()
    result = push(hub, api.token, folder)
    assert {path for path, state in states(result).items() if state == "removed"} == {
        "recipe.yaml",
        "figures/curves.png",
    }
