"""What the repository promises about itself."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("elastic_jax", "converters", "aot_cache")
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/*.md")
ALLOWED_IGNORES = 5

HOME = re.compile(r"(?<![\w.~-])/(?:home|Users|root|work|tmp)/[\w.-]+")
IGNORE = re.compile(r"#\s*(?:pyright:\s*(?:ignore|basic)|type:\s*ignore)")
MAKE = re.compile(r"\bmake ([a-z][a-z-]*)\b")
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")
NAMED_FILE = re.compile(r"`((?:elastic_jax|converters|aot_cache|tests|benches|docs|scripts|\.ci)/[\w./-]*\w)`")


def documents() -> dict[Path, str]:
    return {path: path.read_text("utf-8") for glob in DOCUMENTS for path in REPOSITORY.glob(glob)}


def sources() -> dict[Path, str]:
    return {path: path.read_text("utf-8") for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py")}


def code_blocks_and_spans(text: str) -> str:
    return "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL))


@pytest.fixture(scope="module")
def committed() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := REPOSITORY / name).is_file()]


def test_readme_has_its_two_commands():
    assert {"demo", "test"} <= set(MAKE.findall((REPOSITORY / "README.md").read_text("utf-8")))


def test_every_make_command_in_the_documents_exists():
    makefile = (REPOSITORY / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    named = {
        target
        for text in [*documents().values(), (REPOSITORY / ".ci" / "run").read_text("utf-8")]
        for target in MAKE.findall(code_blocks_and_spans(text) or text)
    }
    assert named - targets == set()


def test_links_and_file_names_in_the_documents_exist():
    missing = [
        f"{path.relative_to(REPOSITORY)}: {target}"
        for path, text in documents().items()
        for base, targets in ((path.parent, LINK.findall(text)), (REPOSITORY, NAMED_FILE.findall(text)))
        for target in targets
        if not (base / target).exists()
    ]
    assert missing == []


def test_version_is_the_changelogs_newest():
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    changelog = (REPOSITORY / "CHANGELOG.md").read_text("utf-8")
    newest = re.search(r"^## \[(\d[^\]]*)\]", changelog, re.MULTILINE)
    assert newest is not None
    assert newest[1] == version


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_typed_and_shipped(package):
    assert (REPOSITORY / package / "py.typed").is_file()
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))
    assert package in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]


def test_few_type_checks_are_ignored():
    lines = [(path, line.strip()) for path, text in sources().items() for line in text.splitlines()]
    ignores = [f"{path.name}: {line}" for path, line in lines if IGNORE.search(line)]
    assert len(ignores) <= ALLOWED_IGNORES, "\n".join(ignores)


def test_sources_import_no_torch_and_check_nothing_by_assert():
    found = []
    for path, text in sources().items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                names = ["assert"] if isinstance(node, ast.Assert) else []
            found += [
                f"{path.name}:{node.lineno}: {name}" for name in names if name.split(".")[0] in ("torch", "assert")
            ]
    assert found == []


def test_no_committed_text_names_a_machines_folders(committed):
    found = []
    for path in committed:
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(REPOSITORY)}: {match[0]}" for match in HOME.finditer(text)]
    assert found == []


def test_libraries_name_no_folder_of_the_machine_that_built_them(committed):
    libraries = [path for path in committed if path.suffix == ".so"]
    assert libraries
    found = [
        f"{path.name}: {match[0]}" for path in libraries for match in HOME.finditer(path.read_bytes().decode("latin-1"))
    ]
    assert found == []


def test_no_committed_file_is_large(committed):
    limit = 4 << 20
    assert [f"{path.name}: {size}" for path in committed if (size := path.stat().st_size) > limit] == []


def test_shell_scripts_are_executable_and_parse(committed):
    scripts = [path for path in committed if path.suffix != ".py" and path.read_bytes().startswith(b"#!")]
    assert REPOSITORY / "scripts" / "uv" in scripts
    for script in scripts:
        assert script.stat().st_mode & 0o111, script
        subprocess.run(["bash", "-n", str(script)], check=True)
