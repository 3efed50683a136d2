"""`vidprism push`: publishes an export on the Hub."""

import argparse
from pathlib import Path

from ..errors import printable, printable_lines
from ..hub.push import DESCRIPTION, MESSAGE, PushResult, push_export


def main(argv: list[str]) -> int:
    """`vidprism push`; the last line printed is the URL and the commit."""
    parser = argparse.ArgumentParser("vidprism push", description=DESCRIPTION)
    parser.add_argument("folder", type=Path, help="the export, such as runs/demo/export")
    parser.add_argument("--repo", required=True, metavar="ORG/NAME", help="the repository; made if it is not there")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="the branch; made if it is not there (default: main)")
    parser.add_argument("--tag", help="tag the commit, such as v1")
    parser.add_argument("--create-pr", action="store_true", help="propose the change as a pull request")
    parser.add_argument("--message", help=f"of the commit (default: {MESSAGE!r})")
    parser.add_argument("--dry-run", action="store_true", help="send nothing; list the files and print the card")
    settings = vars(parser.parse_args(argv))
    result = push_export(settings.pop("folder"), settings.pop("repo"), **settings)
    print_result(result, settings["dry_run"], settings["tag"])
    return 0


def print_result(result: PushResult, dry_run: bool, tag: str | None) -> None:
    """Files, notes and tag; the card for a dry run; URL and commit."""
    for file in result.files:
        print(f"{file.state:<9} {file.size:>13,} bytes  {printable(file.path)}")
    for note in result.notes:
        print(f"note: {printable(note)}")
    total = sum(result.uploaded.values())
    print(f"{'To send' if dry_run else 'Sent'}: {len(result.uploaded)} files, {total:,} bytes")
    if tag:
        print(f"{'To tag' if dry_run else 'Tagged'}: {tag}")
    if dry_run:
        print(f"\n{printable_lines(result.card)}\n")
    print(printable(result.url), result.commit or "(no commit yet)")
