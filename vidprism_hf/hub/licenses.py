"""Licence ids of the Hub; huggingface_hub has no list of them.

Source: huggingface.co/docs/hub/repositories-licenses, without `other`. Add new ids of that page here.
"""

from difflib import get_close_matches

from ..errors import UserError

PAGE = "huggingface.co/docs/hub/repositories-licenses"
LICENSE_IDS = """
afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0
cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0
creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2
fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0
lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 open-mdw
openrail openrail++ osl-3.0 pddl postgresql unknown unlicense wtfpl zlib
"""
LICENSES = frozenset(LICENSE_IDS.split())


def check_license(field: str, license: str | None) -> None:
    """Checks a licence id against the Hub's list.

    Args:
        field: The setting that names it.
        license: The id, or None.

    Raises:
        UserError: If it is not in the list.
    """
    if license is None or license in LICENSES:
        return
    if license == "other":
        raise UserError(
            f"{field}: other needs a license_name too; write both into the export's README, which keeps them, and "
            "remove the setting"
        )
    near = get_close_matches(license.lower().replace(" ", "-"), sorted(LICENSES), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "choose one"
    raise UserError(f"{field} {license!r}: not a licence id of the Hub; {hint} (the list: {PAGE})")
