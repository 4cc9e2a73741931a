"""Pages from templates that extend `page.html.jinja`, which holds the colours of light, dark and print."""

from jinja2 import Environment, PackageLoader, PrefixLoader, StrictUndefined

# Where the templates of each page lie.
_PACKAGES = {"pages": "mlx_forget.pages", "audit": "mlx_forget.audit", "report": "mlx_forget.report"}


def render_page(template: str, **values: object) -> str:
    """A page, given its template as `package/file`; names that a template uses and nobody gives are an error."""
    package = template.partition("/")[0]
    loaders = {name: PackageLoader(_PACKAGES[name], ".") for name in {"pages", package}}
    environment = Environment(
        loader=PrefixLoader(loaders), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(**values)
