"""Self-contained pages of HTML: one look, every text of the user's escaped."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files


def render_page(template: str, values: Mapping[str, object], package: str = "tunery.evaluation") -> str:
    """A page's HTML text.

    Args:
        template: a file of `package`; what it includes may also lie here (style.css).
        values: for its names; one that is missing is an error.
    """
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    def load(name: str) -> str | None:
        found = [files(home) / name for home in dict.fromkeys((package, "tunery.evaluation"))]
        return next((file.read_text(encoding="utf-8") for file in found if file.is_file()), None)

    environment = Environment(
        loader=FunctionLoader(load),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)
