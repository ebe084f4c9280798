"""HTML pages out of the templates of `data_tools/templates`; all text out of data is escaped."""

from pathlib import Path

from jinja2 import Environment, PackageLoader

from vlkit.errors import DataError
from vlkit.escape import one_line


def write_page(path: str | Path, template: str, **values: object) -> None:
    """Write one page that needs no other file.

    Args:
        path: of the page; its folder is made.
        template: a file's name.
        values: by their names in the template, which also has `visible`, for text that may hold control characters.

    Raises:
        DataError: the page cannot be written.
    """
    # autoescape for every template: the default goes by the suffix, and .j2 would not be escaped.
    environment = Environment(loader=PackageLoader("data_tools"), autoescape=True)
    page = environment.get_template(template).render(**values, visible=one_line)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(page, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise DataError(f"Cannot write {path}: {error.strerror or error}.") from error
