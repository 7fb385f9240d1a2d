"""Shared blocks are equal in all scripts that hold them.

    python tests/test_shared_blocks.py                      # list what is wrong
    python tests/test_shared_blocks.py --fix iql_ooo.py     # copy that script's blocks over the other scripts' copies

A block begins with the line `# === NAME (shared) ===` and ends before the next banner, or before `if __name__`.
"""

import argparse
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Which scripts hold which block. A new script adds its name here, in every block that it holds.
DATA = {"iql_ooo.py", "td3_rnd.py", "pex.py", "rlpd_ooo.py", "calql_ooo.py"}
ALL = DATA | {"pointmass_didactic.py"}
BLOCKS = {
    "ranges": ALL,
    "adam": ALL,
    "networks": {"iql_ooo.py", "td3_rnd.py", "pex.py"},
    "iql agent": {"iql_ooo.py", "pex.py"},
    "running statistics": DATA - {"pex.py"},
    "rnd": {"iql_ooo.py", "td3_rnd.py"},
    "rnd of cal-ql and rlpd": {"calql_ooo.py", "rlpd_ooo.py"},
    "iql update": {"iql_ooo.py", "pex.py"},
    "simplified td3": {"iql_ooo.py", "td3_rnd.py"},
    "evaluation": DATA,
    "replay buffer": DATA,
    "environments": DATA,
    "offline data": DATA,
    "command line, run directory": ALL,
    "exploit only": {"iql_ooo.py", "rlpd_ooo.py", "calql_ooo.py"},
}

BANNER = re.compile(r"^# === (.*) ===\n|^if __name__ ", re.MULTILINE)


# === the checker ===


def read(path):
    """Text of a file with its line ends as they are, so that equal text means equal bytes."""
    return path.read_bytes().decode()


def find_blocks(text):
    """Shared blocks of a script as {name: (start, end)} in characters, without the blank lines at the end, and a list
    of problems."""
    spans, problems = {}, []
    banners = list(BANNER.finditer(text))
    for banner, end in zip(banners, [b.start() for b in banners[1:]] + [len(text)], strict=False):
        if banner[1] and (name := banner[1].removesuffix(" (shared)")) != banner[1]:
            if name in spans:
                problems.append(f"block '{name}' occurs twice")
            spans[name] = banner.start(), banner.start() + len(text[banner.start() : end].rstrip("\n")) + 1
    for line in text.splitlines():
        if "(shared)" in line and not BANNER.match(line + "\n"):
            problems.append(f"not written as a banner: {line.strip()}")
    return spans, problems


def first_difference(a, b):
    """Line number within the blocks, and both lines, where two unequal blocks differ first."""
    lines_a, lines_b = a.splitlines(keepends=True), b.splitlines(keepends=True)
    for number, (line_a, line_b) in enumerate(zip(lines_a, lines_b, strict=False), 1):
        if line_a != line_b:
            return f"line {number} of the block: {line_a!r} and {line_b!r}"
    return f"{len(lines_a)} and {len(lines_b)} lines"


def find_problems(root, table):
    """Everything wrong with the shared blocks of the scripts in root, a list of lines; empty if all is well."""
    problems, holders = [], {}
    for path in sorted(root.glob("*.py")):
        text = read(path)
        spans, found = find_blocks(text)
        problems += [f"{path.name}: {problem}" for problem in found]
        for name, (start, end) in spans.items():
            holders.setdefault(name, {})[path.name] = text[start:end]
    for name in sorted(table.keys() | holders.keys()):
        copies, listed = holders.get(name, {}), table.get(name, set())
        problems += [f"{script}: block '{name}' is missing" for script in sorted(listed - copies.keys())]
        problems += [f"{script}: block '{name}' is not listed in BLOCKS" for script in sorted(copies.keys() - listed)]
        first, *others = copies or [None]
        for other in others:
            if copies[other] != copies[first]:
                difference = first_difference(copies[first], copies[other])
                problems.append(f"block '{name}' differs between {first} and {other}: {difference}")
    return problems


def write_atomic(path, text):
    """Replace a file at once: a reader sees the old text or the new one, never a part."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text.encode())
        shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def spread(root, source):
    """Copy the blocks of the script `source` over the copies in root's other scripts; returns the names changed."""
    texts = {path.name: read(path) for path in sorted(root.glob("*.py"))}
    found = {name: find_blocks(text) for name, text in texts.items()}
    for name, (_, problems) in found.items():
        if problems:
            raise ValueError(f"{name}: {problems[0]}")
    blocks = {name: texts[source][start:end] for name, (start, end) in found[source][0].items()}
    changed = []
    for script, old in texts.items():
        new = old
        # From the last block to the first, so that the positions still to come stay right.
        for name, (start, end) in sorted(found[script][0].items(), key=lambda item: -item[1][0]):
            new = new[:start] + blocks.get(name, old[start:end]) + new[end:]
        if new != old:
            write_atomic(root / script, new)
            changed.append(script)
    return changed


def main(argv=None, root=ROOT, table=BLOCKS):
    parser = argparse.ArgumentParser(description="Check the shared blocks of the scripts, or make their copies equal.")
    parser.add_argument("--fix", metavar="SCRIPT", help="script whose blocks replace the copies in the other scripts")
    source = parser.parse_args(argv).fix
    if source is not None:
        if not (root / source).is_file() or Path(source).name != source:
            parser.error(f"{source}: no such script in the top folder")
        try:
            changed = spread(root, source)
        except ValueError as error:
            print(f"nothing copied: {error}", file=sys.stderr)
            return 1
        print(f"changed: {', '.join(changed) or 'nothing'}")
    problems = find_problems(root, table)
    print("\n".join(problems) or "all shared blocks are equal")
    return 1 if problems else 0


# === the scripts of this repository ===


def test_shared_blocks_of_the_scripts():
    assert find_problems(ROOT, BLOCKS) == []


# === the checker's own tests ===

BUFFER = "# === buffer (shared) ===\nx = 1  # a comment\n\n\n"
LOGGER = "# === logger (shared) ===\n\ny = 2\n\n\n"
OWN = "# === own ===\n"
TABLE = {"buffer": {"a.py", "b.py"}, "logger": {"a.py"}}


@pytest.fixture
def scripts(tmp_path):
    """Two scripts that agree: a.py holds both blocks, b.py holds one, at another place and beside other code."""
    (tmp_path / "a.py").write_bytes(f"import os\n{BUFFER}{LOGGER}{OWN}print('a')\n".encode())
    (tmp_path / "b.py").write_bytes(f"print('b')\nprint('c')\n{BUFFER}".encode())
    return tmp_path


def edit(root, name, old, new):
    path = root / name
    assert old in read(path)
    path.write_bytes(read(path).replace(old, new, 1).encode())


def test_equal_blocks_pass(scripts):
    assert find_problems(scripts, TABLE) == []
    assert main([], scripts, TABLE) == 0


@pytest.mark.parametrize(
    ("script", "old", "new", "problem"),
    [
        ("b.py", "a comment", "another comment", "differs between a.py and b.py: line 2"),
        ("b.py", "x = 1", "x =  1", "differs between a.py and b.py: line 2"),
        ("b.py", "a comment\n", "a comment\r\n", "differs between a.py and b.py: line 2"),
        ("b.py", "a comment\n", "a comment\nz = 3\n", "differs between a.py and b.py: 2 and 3 lines"),
        ("b.py", "buffer (shared) ===\n", "buffer (shared) === \n", "not written as a banner"),
        ("b.py", "# === buffer", "#=== buffer", "not written as a banner"),
        ("b.py", BUFFER, "", "b.py: block 'buffer' is missing"),
        ("a.py", LOGGER, "", "a.py: block 'logger' is missing"),
        ("b.py", BUFFER, BUFFER + LOGGER, "b.py: block 'logger' is not listed"),
        ("a.py", "print('a')\n", BUFFER, "block 'buffer' occurs twice"),
    ],
)
def test_faults_are_found(scripts, script, old, new, problem):
    edit(scripts, script, old, new)
    assert problem in "\n".join(find_problems(scripts, TABLE))
    assert main([], scripts, TABLE) == 1


def test_a_script_that_the_table_does_not_know_is_found(scripts):
    (scripts / "c.py").write_text(BUFFER)
    assert find_problems(scripts, TABLE) == ["c.py: block 'buffer' is not listed in BLOCKS"]


def test_fix_repairs_a_changed_copy(scripts):
    before = read(scripts / "b.py")
    (scripts / "b.py").chmod(0o755)
    edit(scripts, "b.py", "a comment", "a much longer comment\n# and one line more")
    source = read(scripts / "a.py")
    assert main(["--fix", "a.py"], scripts, TABLE) == 0
    assert read(scripts / "b.py") == before
    assert (scripts / "b.py").stat().st_mode & 0o777 == 0o755
    assert read(scripts / "a.py") == source
    assert sorted(path.name for path in scripts.iterdir()) == ["a.py", "b.py"]


def test_fix_copies_several_blocks_and_only_from_the_named_script(scripts):
    (scripts / "b.py").write_text(f"{LOGGER.replace('y = 2', 'y = 33')}{OWN}\n{BUFFER.replace('x = 1', 'x = 44')}")
    assert spread(scripts, "b.py") == ["a.py"]
    assert read(scripts / "a.py") == (
        f"import os\n{BUFFER.replace('x = 1', 'x = 44')}{LOGGER.replace('y = 2', 'y = 33')}{OWN}print('a')\n"
    )
    assert spread(scripts, "b.py") == []


@pytest.mark.parametrize("source", ["a.py", "b.py"])
def test_fix_copies_nothing_while_a_block_occurs_twice(scripts, source):
    edit(scripts, "a.py", "x = 1", "x = 5")
    (scripts / "c.py").write_text(BUFFER + BUFFER)
    before = {path.name: read(path) for path in scripts.iterdir()}
    with pytest.raises(ValueError, match="c.py: block 'buffer' occurs twice"):
        spread(scripts, source)
    assert main(["--fix", source], scripts, TABLE) == 1
    assert {path.name: read(path) for path in scripts.iterdir()} == before


def test_fix_refuses_an_unknown_script(scripts):
    with pytest.raises(SystemExit) as stop:
        main(["--fix", "no_such.py"], scripts, TABLE)
    assert stop.value.code == 2


if __name__ == "__main__":
    sys.exit(main())
