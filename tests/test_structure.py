"""Every top-level script stands alone, declares what it imports, and can be started as it is documented.

Nothing here trains: the scripts are read, imported, and their command lines parsed.
"""

import ast
import importlib.util
import itertools
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import asdict, fields
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ["report.py", "reproduce.py"]  # these start the scripts and read what they leave; not single files
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if path.name not in TOOLS)

NANO = "nano_ooo.py"  # no task table, no options but the seed
each_script = pytest.mark.parametrize("script", [script for script in SCRIPTS if script != NANO])


def load(script):
    """Import a script by its path; once, so that all tests see one module."""
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    if spec.name in sys.modules:
        return sys.modules[spec.name]
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


# === imports and dependencies ===


@pytest.mark.parametrize("tool", TOOLS)
def test_imports_of_tools_are_required(tool):
    wanted = [line for line in (ROOT / "requirements-reproduce.txt").read_text().splitlines() if line[0] != "#"]
    allowed = distributions(required_by_scripts() + wanted)
    installed = metadata.packages_distributions()
    names = imported_modules((ROOT / tool).read_text()) - sys.stdlib_module_names - {Path(x).stem for x in TOOLS}
    assert all(allowed & {canonicalize_name(name) for name in installed.get(x, [])} for x in names), names


def required_by_scripts():
    """The first section of requirements.txt, a list of requirement strings; sections begin with a line `# ---`."""
    sections = []
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line.startswith("# ---"):
            sections.append([])
        elif line.strip() and not line.startswith("#"):
            sections[-1].append(line.strip())
    assert len(sections) == 2, "requirements.txt has two sections: what scripts import, and the rest"
    return sections[0]


def distributions(requirements):
    """Names of the packages that these requirements ask for, those of their extras included."""
    names = set()
    for requirement in map(Requirement, requirements):
        names.add(canonicalize_name(requirement.name))
        for extra in requirement.extras:
            for line in metadata.requires(requirement.name) or []:
                part = Requirement(line)
                if part.marker and part.marker.evaluate({"extra": extra}) and not part.marker.evaluate({"extra": ""}):
                    names.add(canonicalize_name(part.name))
    return names


def imported_modules(source):
    """Top-level names of all modules that a source text imports, inside functions too; "." for a relative import."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." if node.level else node.module.split(".")[0])
    return names


def test_imported_modules_finds_every_kind_of_import():
    source = "import a.b as c, d\nfrom e.f import g\ndef h():\n    import i\n    from . import j\n"
    assert imported_modules(source) == {"a", "d", "e", "i", "."}


@each_script
def test_imports_are_standard_library_or_required(script):
    allowed = distributions(required_by_scripts())
    installed = metadata.packages_distributions()
    foreign = {
        name
        for name in imported_modules((ROOT / script).read_text()) - sys.stdlib_module_names
        if not allowed & {canonicalize_name(distribution) for distribution in installed.get(name, [])}
    }
    assert not foreign, "neither standard library nor in the first section of requirements.txt"


def script_metadata(source):
    """The PEP 723 table at the top of a script: the comment lines between `# /// script` and `# ///`."""
    lines = source.splitlines()
    assert lines.count("# /// script") == 1
    begin = lines.index("# /// script") + 1
    end = lines.index("# ///", begin)
    return tomllib.loads("\n".join(line.removeprefix("#") for line in lines[begin:end]))


@each_script
def test_script_metadata_agrees_with_requirements(script):
    table = script_metadata((ROOT / script).read_text())
    assert table["requires-python"] == ">=3.11,<3.14"  # what the pins have wheels for
    assert set(table["dependencies"]) <= set(required_by_scripts())
    declared, installed = distributions(table["dependencies"]), metadata.packages_distributions()
    names = imported_modules((ROOT / script).read_text()) - sys.stdlib_module_names
    assert not {name for name in names if not declared & set(map(canonicalize_name, installed.get(name, [])))}


@each_script
def test_importing_starts_nothing(script, tmp_path):
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('script', {str(ROOT / script)!r})\n"
        "sys.modules['script'] = module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
    )
    command = [sys.executable, "-B", "-c", code, "--no-such-option", "garbage"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


# === arguments ===


@each_script
def test_task_settings_are_arguments(script):
    module = load(script)
    known = {field.name for field in fields(module.Args)}
    assert module.TASKS
    for env_id, task in module.TASKS.items():
        assert task.settings.keys() <= known, env_id


@each_script
def test_a_script_is_read_from_the_method_to_the_plumbing(script):
    """The paper's update early, Algorithm 1 above the line below which nothing of the method is; short functions."""
    source = (ROOT / script).read_text()
    lines, tree = source.splitlines(), ast.parse(source)
    (line,) = [number for number, text in enumerate(lines, 1) if text.startswith("# Below is plumbing")]
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert functions["main"].lineno < line and functions["parse_args"].lineno > line
    losses = ("_loss", "_losses", "_update", "_step")
    first_loss = min(node.lineno for name, node in functions.items() if name.endswith(losses))
    assert first_loss < 620 and max(map(len, lines)) <= 120
    long = {name for name, node in functions.items() if node.end_lineno - node.lineno >= 72}
    assert not long


@each_script
def test_no_function_is_handed_around(script):
    """The method is straight loops over local names: no generators, no functions as arguments, no namespace objects."""
    tree = ast.parse((ROOT / script).read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    (main,) = [node for node in functions if node.name == "main"]
    names = {node.name for node in functions}
    for function in functions:
        for node in ast.walk(function) if function.lineno <= main.lineno else ():
            assert not isinstance(node, ast.Lambda | ast.Yield | ast.YieldFrom), node.lineno
            assert not (isinstance(node, ast.Name) and node.id == "SimpleNamespace"), node.lineno
            if isinstance(node, ast.Call):
                handed = {arg.id for arg in node.args if isinstance(arg, ast.Name)} & names
                assert not handed - {"update"}, (node.lineno, handed)


@each_script
def test_a_wrong_argument_is_refused(script, capsys):
    with pytest.raises(SystemExit) as stop:
        load(script).parse_args(["--env-id", next(iter(load(script).TASKS)), "--no-such-option", "1"])
    assert stop.value.code == 2
    assert "no-such-option" in capsys.readouterr().err


# === documented commands ===

# A shell command that starts one of our scripts, after an optional prompt, loop head and variables; then its arguments.
COMMAND = re.compile(
    r"^(?:\$ )?(?:for .*\bdo )?(?:\w+=\S* )*(?:(?:\S*/)?python[\d.]*|uv run) ("
    + "|".join(map(re.escape, [script for script in SCRIPTS if script != NANO] + TOOLS))
    + r")(?= |$)(.*)"
)
LOOP = re.compile(r"\bfor (\w+) in ([^;]+)")
REDIRECTION = re.compile(r"\s\d?>>?\s*(?:&\d|\S+)")


def commands_in(text):
    """All (script, arguments) of a shell text; a command inside a for loop is repeated for each value of the loop."""
    loops, found = {}, []
    for line in text.replace("\\\n", " ").splitlines():
        for name, values in LOOP.findall(line):
            loops[name] = values.split()
        if match := COMMAND.match(line.strip()):
            script, rest = match.groups()
            used = [name for name in loops if re.search(rf"\$\{{?{name}\b", rest)]
            for values in itertools.product(*(loops[name] for name in used)):
                one = rest
                for name, value in zip(used, values, strict=True):
                    one = re.sub(rf"\$\{{{name}\}}|\${name}\b", value, one)
                found.append((script, shell_words(one)))
    return found


def shell_words(text):
    """The words of one simple command: up to a comment or an operator such as ; | && and without redirections."""
    lexer = shlex.shlex(REDIRECTION.sub(" ", text), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    return list(itertools.takewhile(lambda word: word.strip("();<>|&"), lexer))


def fenced_blocks(markdown):
    """Contents of the fenced code blocks of a Markdown text."""
    return re.findall(r"^ *```[^\n]*\n(.*?)^ *```", markdown, flags=re.DOTALL | re.MULTILINE)


def docstrings(source):
    """All docstrings of a Python source."""
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(source)) if isinstance(node, holders)]


def documented_commands():
    """All (file, script, arguments) in the pages' code blocks and the scripts' docstrings, each once."""
    texts = {path.name: fenced_blocks(path.read_text()) + TABLE_COMMAND.findall(path.read_text()) for path in PAGES}
    texts |= {script: docstrings((ROOT / script).read_text()) for script in SCRIPTS + TOOLS}
    found = [(file, *command) for file, parts in texts.items() for part in parts for command in commands_in(part)]
    return [command for number, command in enumerate(found) if command not in found[:number]]


TABLE_COMMAND = re.compile(r"^\|[^`\n]*\| `(python [^`\n]*)`", flags=re.MULTILINE)
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
DOCUMENTED = documented_commands()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_readme_is_read_to_its_end():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def parse(script, arguments, monkeypatch):
    """Parse a command line of a script as the script does; a run directory it names is made up."""
    module = load(script)
    if script in TOOLS:
        return module.parse_args(arguments)

    def read_config(run_dir, scripts=()):
        # Run directories are called ENV_ID__EXP_NAME__SEED.
        env_id = Path(run_dir).name.split("__")[0]
        assert env_id in module.TASKS, f"{run_dir} is not named after a task"
        return {"args": asdict(module.parse_args(["--env-id", env_id]))}

    if hasattr(module, "read_config"):
        monkeypatch.setattr(module, "read_config", read_config)
    assert isinstance(module.parse_args(arguments), module.Args)


@pytest.mark.parametrize(
    ("file", "script", "arguments"), [pytest.param(*c, id=f"{c[0]}: {c[1]} {shlex.join(c[2])}") for c in DOCUMENTED]
)
def test_documented_command_parses(file, script, arguments, monkeypatch):
    try:
        parse(script, arguments, monkeypatch)
    except SystemExit as stop:
        assert stop.code == 0 and {"-h", "--help"} & set(arguments), f"{file} shows a command that {script} refuses"


@each_script
def test_docstring_shows_commands(script):
    assert any(file == script == started for file, started, _ in DOCUMENTED)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")



def test_commands_are_found_in_a_text():
    script = SCRIPTS[0]
    text = f"""
    $ python {script} --seed 3   # a comment
    MUJOCO_GL=egl CUDA_VISIBLE_DEVICES=0 .venv/bin/python {script} --a \\
        --b 'two words' > log.txt 2>&1 &
    cd somewhere && make test
    for seed in 1 2; do python {script} --seed $seed --name x_${{seed}}; done
    for task in p q; do
      python3.11 {script} --env-id $task | tee log
    uv run {script}
    python tools/plot_run.py {script}
    Then python {script} is prose.
    python {script}c
    """
    assert commands_in(text) == [
        (script, ["--seed", "3"]),
        (script, ["--a", "--b", "two words"]),
        (script, ["--seed", "1", "--name", "x_1"]),
        (script, ["--seed", "2", "--name", "x_2"]),
        (script, ["--env-id", "p"]),
        (script, ["--env-id", "q"]),
        (script, []),
    ]
    markdown = "a\n```bash\nb\n```\nc\n```\nd\ne\n```\n"
    assert fenced_blocks(markdown) == ["b\n", "d\ne\n"]


def test_the_lock_holds_every_pin():
    """Each line of requirements.txt at its version, with hashes."""
    text = (ROOT / "requirements.lock").read_text()
    locked = dict(re.findall(r"^([\w.-]+)(?:\[[^\]]*\])?==(\S+).*\\\n    --hash=sha256:", text, flags=re.M))
    pins = re.findall(r"^([\w.-]+)(?:\[[^\]]*\])?==(\S+)", (ROOT / "requirements.txt").read_text(), flags=re.M)
    assert len(pins) > 15
    for name, version in pins:
        assert locked[canonicalize_name(name)] == version, name
