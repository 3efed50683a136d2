"""What the Hub asks of a card's metadata, as far as our cards use it.

Source: huggingface.co/docs/hub/model-cards and the metadata specification in huggingface/hub-docs (modelcard.md).
"""

import re

import yaml

BLOCK = re.compile(r"\A\s*---\r?\n(.*?)^---[ \t\r]*$", re.DOTALL | re.MULTILINE)
# Licence ids of huggingface.co/docs/hub/repositories-licenses that code, weights and video data come under.
LICENSE_IDS = (
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bsd bsd-2-clause bsd-3-clause "
    "bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 "
    "cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 "
    "cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 "
    "epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc "
    "mpl-2.0 ms-pl odc-by odbl osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl unknown other "
)
LICENSES = frozenset(LICENSE_IDS.split())
TASKS = {"video-classification", "image-classification", "zero-shot-image-classification", "feature-extraction"}
REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
EMPTY = "empty or missing yaml metadata in repo card"


def front_matter(text: str) -> dict | None:
    """The metadata block of a README; None if there is none.

    Raises:
        ValueError: If the block is no YAML mapping.
    """
    match = BLOCK.match(text)
    if not match or not match[1].strip():
        return None
    try:
        loaded = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        raise ValueError(f"Error parsing YAML: {error}") from error
    if not isinstance(loaded, dict):
        raise ValueError("YAML metadata must be a mapping")
    return loaded


def judge(text: str, kind: str) -> tuple[list[str], list[str]]:
    """Errors, for which the Hub refuses a README, and warnings, which it only tells.

    It refuses what it reads: licence, datasets, base model, model index, tags. Unknown keys pass.
    """
    try:
        card = front_matter(text)
    except ValueError as error:
        return [str(error)], []
    if card is None:
        return [], [EMPTY]
    errors = list(texts(card, "tags")) + list(texts(card, "metrics"))
    for license in listed(card.get("license")):
        if license not in LICENSES:
            errors.append(f'"license" must be one of [{", ".join(sorted(LICENSES))}]')
    if card.get("license") == "other" and not card.get("license_name"):
        errors.append('"license_name" is required')
    for key in ("datasets", "base_model"):
        errors += texts(card, key)
        ids = [value for value in listed(card.get(key)) if isinstance(value, str)]
        errors += [f'"{key}" with value "{value}" is not valid' for value in ids if not REPO_ID.fullmatch(value)]
    if kind == "model":
        errors += model_index(card.get("model-index", []))
    task = card.get("pipeline_tag")
    warnings = [] if task is None or task in TASKS else [f'The pipeline tag "{task}" is not in the official list']
    return errors, warnings


def listed(value) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def texts(card: dict, key: str):
    if key in card and card[key] is None:
        yield f'"{key}" must be a string or a list of strings'
    for index, value in enumerate(listed(card.get(key))):
        if not isinstance(value, str):
            yield f'"{key}[{index}]" must be a string'


def model_index(index) -> list[str]:
    """What is wrong with a model-index: names, tasks, datasets and metrics are required."""
    if not isinstance(index, list):
        return ['"model-index" must be an array']
    errors = []
    for number, model in enumerate(index):
        where = f"model-index[{number}]"
        errors += missing(model, where, "name", "results")
        for place, result in enumerate(listed(model.get("results")) if isinstance(model, dict) else ()):
            at = f"{where}.results[{place}]"
            wrong = missing(result, at, "task", "dataset", "metrics")
            errors += wrong
            if wrong:
                continue
            errors += missing(result["task"], at + ".task", "type")
            errors += missing(result["dataset"], at + ".dataset", "type", "name")
            for count, metric in enumerate(listed(result["metrics"])):
                errors += missing(metric, f"{at}.metrics[{count}]", "type", "value")
    return errors


def missing(mapping, where: str, *keys: str) -> list[str]:
    if not isinstance(mapping, dict):
        return [f'"{where}" must be of type object']
    return [f'"{where}.{key}" is required' for key in keys if mapping.get(key) in (None, "")]


def judge_results(text: str) -> str | None:
    """What is wrong with a file in .eval_results/, or None. The Hub takes such a file but does not show it.

    Source: huggingface.co/docs/hub/eval-results.
    """
    try:
        entries = yaml.safe_load(text)
    except yaml.YAMLError as error:
        return f"Error parsing YAML: {error}"
    if not isinstance(entries, list) or not entries:
        return "must be a list of results"
    for number, entry in enumerate(entries):
        errors = missing(entry, f"[{number}]", "dataset", "value")
        errors = errors or missing(entry["dataset"], f"[{number}].dataset", "id", "task_id")
        if not errors and entry.get("source") is not None:
            errors = missing(entry["source"], f"[{number}].source", "url")
        if errors:
            return "; ".join(errors)
    return None
