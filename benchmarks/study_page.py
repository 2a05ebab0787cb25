"""The pages of docs/ whose numbers a study writes: in regions that are marked, between words that people write."""

import re


def fill(page: str, texts: dict[str, str]) -> str:
    """The page with what stands between `<!-- name -->` and `<!-- /name -->` replaced."""
    for name, text in texts.items():
        page, found = re.subn(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", rf"\g<1>{text}\n\g<2>", page, flags=re.S)
        if found != 1:
            raise ValueError(f"the page has {found} regions {name!r}: it must have one")
    return page
