"""The figures of the pages, from the last records in benchmarks/results.

    python benchmarks/pages.py            # writes tables, plots and results/<device>/gpu.md again
    python benchmarks/pages.py --check    # changes nothing; exits 1 and tells what is not of its record

A page holds a block where it says `from <record>: <name>` in a comment, up to a comment `end`; what lies between is
written here. `pages_cpu.py` and `pages_gpu.py` hold the blocks by name, `pages_plots.py` the plots, which need
matplotlib; the check does not.
"""

import argparse
import os
import re
import sys
from pathlib import Path

import pages_cpu
import pages_gpu
from pages_gpu import markdown
from pages_records import RESULTS, ROOT, digest, load

__all__ = ["differences", "markdown", "write"]

WRITERS = pages_cpu.WRITERS | pages_gpu.WRITERS
START = "<!-- from "
BLOCK = re.compile(rf"{START}(\S+): ([^>]+) -->\n(.*?)<!-- end -->", re.DOTALL)
CPU = [RESULTS / "cpu" / f"{name}.json" for name in ("diagonal_fisher", "flat", "dampen")]
TITLES = {"rivals": "Time of the others over ours", "ceiling": "Share of the ceiling"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where a page is not of its record")
    if not parser.parse_args(arguments).check:
        write()
        return 0
    stale = differences()
    for one in stale:
        print(f"{one}: not what the record says; run python benchmarks/pages.py")
    return 1 if stale else 0


def write() -> None:
    from pages_plots import DRAWN

    for page in _pages():
        page.write_text(_filled(page)[0])
    for record in _gpu_records():
        record.with_suffix(".md").write_text(markdown(load(record)))
    for image, (kind, files) in _plots().items():
        DRAWN[kind]([load(file) for file in files], TITLES[kind], image, _made_from(files))


def differences() -> list[str]:
    """What is not of its record: blocks, the GPU's pages, and plots that were made from another one."""
    stale = [f"{_told(page)}, block {block!r}" for page in _pages() for block in _filled(page)[1]]
    for record in _gpu_records():
        page = record.with_suffix(".md")
        if not page.exists() or page.read_text() != markdown(load(record)):
            stale.append(_told(page))
    for image, (_, files) in _plots().items():
        if not image.exists() or _made_from(files) not in image.read_text():
            stale.append(_told(image))
    return stale


def _filled(page: Path) -> tuple[str, list[str]]:
    """The page with its blocks written, and the names of those that were otherwise."""
    changed, text = [], page.read_text()

    def block(found: re.Match[str]) -> str:
        source, name, old = found.groups()
        if name not in WRITERS:
            raise ValueError(f"{_told(page)} has a block {name!r}: choose from {', '.join(WRITERS)}")
        link = os.path.relpath(ROOT / source, page.parent).replace(os.sep, "/")
        new = WRITERS[name](load(ROOT / source), link) + "\n"
        if new != old:
            changed.append(f"{name} of {source}")
        return f"{START}{source}: {name} -->\n{new}<!-- end -->"

    written, blocks = BLOCK.subn(block, text)
    if blocks != text.count(START):
        raise ValueError(f"{_told(page)} has {text.count(START)} blocks, of which {blocks} have a name and an end")
    return written, changed


def _pages() -> list[Path]:
    return [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]


def _gpu_records() -> list[Path]:
    return sorted(RESULTS.glob("*/gpu.json"))


def _plots() -> dict[Path, tuple[str, list[Path]]]:
    """Picture -> its kind and the records that it shows."""
    images = ROOT / "docs" / "images"
    plots = {images / "cpu_rivals.svg": ("rivals", CPU)}
    for record in _gpu_records():
        if load(record).get("bench"):
            plots |= {images / f"{record.parent.name}_{kind}.svg": (kind, [record]) for kind in ("ceiling", "rivals")}
    return plots


def _made_from(files: list[Path]) -> str:
    return f"sha256:{digest(files)}"


def _told(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


if __name__ == "__main__":
    sys.exit(main())
