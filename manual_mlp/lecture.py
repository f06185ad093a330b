"""Print the lecture "Neural Networks – The essentials": `python -m manual_mlp.lecture [folder for pictures]`.

The lecture is the page lecture.md beside this file. Its code runs: each number that is printed has just been computed.
"""

import argparse
import io
import re
import textwrap
from collections.abc import Iterator
from contextlib import chdir, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

from manual_mlp.shell import while_read

PAGE = Path(__file__).with_name("lecture.md")
WIDTH = 80
BLOCK = re.compile(r"^```(\w*) ?(\w*)\n(.*?)^```$\n?", re.MULTILINE | re.DOTALL)


def executed(page: str, name: str = "page", pictures: bool = True) -> str:
    """Run the Python blocks of a page in one session; return the page with what they print in its text blocks.

    A text block that follows a Python block shows its output. pictures: run the blocks marked `picture`, too, which
    write files into the working directory.
    """
    session: dict[str, Any] = {"__name__": name}
    printed = ""

    def run(block: re.Match[str]) -> str:
        nonlocal printed
        language, mark, code = block.groups()
        if language == "text" and printed:
            code, printed = printed, ""
            return f"```text\n{code}```\n"
        if language == "python" and (pictures or mark != "picture"):
            above = "\n" * (page.count("\n", 0, block.start()) + 1)  # so that a traceback names the line of the page
            with redirect_stdout(io.StringIO()) as output:
                exec(compile(above + code, name, "exec"), session)
            printed = output.getvalue()
        return block[0]

    return BLOCK.sub(run, page)


def for_terminal(page: str) -> Iterator[str]:
    """Yield the paragraphs and outputs of a page in 80 columns; leave out the code."""
    for place, part in enumerate(parts := BLOCK.split(page)):  # prose, language, mark, content, prose, …
        if place % 4 == 0:
            for paragraph in part.split("\n\n"):
                yield from _prose(paragraph.strip("\n"))
        elif place % 4 == 3 and parts[place - 2] == "text":
            yield textwrap.indent(textwrap.dedent(part), "   ").rstrip("\n")


def _prose(paragraph: str) -> Iterator[str]:
    text = paragraph.replace("`", "")
    if text.startswith("#"):
        title = text.lstrip("# ")
        yield f"{title}\n{'─' * len(title)}"
    elif text:
        lines = text.split("\n") if text.startswith("- ") else [text]
        yield "\n".join(textwrap.fill(line, WIDTH, break_on_hyphens=False) for line in lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m manual_mlp.lecture", description="Print the lecture, in numbers.")
    parser.add_argument("folder", type=Path, nargs="?", help="write the pictures to this folder")
    folder = parser.parse_args(arguments).folder
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    with chdir(folder) if folder else nullcontext():
        page = executed(PAGE.read_text(encoding="utf-8"), PAGE.name, pictures=folder is not None)
    for part in for_terminal(page):
        print(f"{part}\n")
    if folder:
        print(f"pictures in {folder}")


if __name__ == "__main__":
    with while_read():
        main()
