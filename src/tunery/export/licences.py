"""A base's licence as the front matter of a model card names it.

The hub refuses a card whose `license` is none of its identifiers (huggingface.co/docs/hub/repositories-licenses); what
it does not list is "other", with a name.
"""

from __future__ import annotations

import re

_LISTED = """
afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0
eupl-1.1 gemma gfdl gpl gpl-2.0 gpl-3.0 h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3
llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openrail openrail++ osl-3.0
pddl postgresql unknown unlicense wtfpl zlib
"""
LISTED = frozenset(_LISTED.split())
"""Identifiers that the hub knows."""


def front_matter(stated: str) -> dict[str, str | list[str]]:
    """`license`, and `license_name` where the hub does not list it.

    Args:
        stated: as the base states it; several, joined with commas, as tunery.models.model_source gives them.
    """
    names = [name.strip().lower() for name in stated.split(",") if name.strip()]
    if names and LISTED.issuperset(names):
        return {"license": names[0] if len(names) == 1 else names}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", stated.lower()).strip("-.") or "unnamed"}
