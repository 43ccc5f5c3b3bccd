"""The README's commands compose, its code runs."""

import re
import shlex

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from PIL import Image

from segformer.processor import SegformerImageProcessor
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    shlex.split(line, comments=True)
    for language, block in BLOCKS
    if language == "bash"
    for line in block.splitlines()
    if line.strip()
]


def words(*wanted: str) -> list[list[str]]:
    return [command for command in COMMANDS if any(word in command for word in wanted)]


def test_the_two_first_commands_are_what_ci_and_newcomers_run() -> None:
    assert COMMANDS[0] == ["pip", "install", "uv", "&&", "uv", "run", "train.py"]
    assert COMMANDS[1] == ["pip", "install", "uv", "&&", "uv", "run", "--extra", "dev", "pytest"]
    assert "pip install uv && uv run --extra dev pytest" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("command", words("train.py", "evaluate.py"), ids=" ".join)
def test_script_commands_compose(command: list[str], tmp_path) -> None:
    script = next(word for word in command if word in ("train.py", "evaluate.py"))
    arguments = command[command.index(script) + 1 :]
    extra: list[str] = []
    if "-cd" in arguments:
        at = arguments.index("-cd")
        del arguments[at : at + 2]
        (yaml,) = [block for language, block in BLOCKS if language == "yaml"]
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "potholes.yaml").write_text(yaml)
        extra = [f"hydra.searchpath=[file://{tmp_path}]"]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose(script.removesuffix(".py"), [*arguments, *extra])
    if "data=potholes" in arguments:
        assert config.data.classes == ["background", "pothole"]
        assert config.data.train.images == "images/train/*"


def test_the_python_examples_run(tiny, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.save_pretrained("my-model")
    SegformerImageProcessor(size=64).save_pretrained("my-model")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)).save("street.jpg")
    first, second = [block for language, block in BLOCKS if language == "python"]
    names: dict = {}
    exec(first.replace("nvidia/segformer-b0-finetuned-ade-512-512", "my-model"), names)
    assert names["outputs"][0]["mask"].size == (90, 70)
    exec(second, {})
    assert "LABEL_" in capsys.readouterr().out


def test_tool_commands_parse() -> None:
    from segformer.__main__ import main

    for command in words("segformer"):
        with pytest.raises(SystemExit) as stop:
            main([*command[command.index("segformer") + 1 :], "--help"])
        assert stop.value.code == 0


def test_the_readme_stays_short_and_its_picture_is_there() -> None:
    assert len(README.splitlines()) <= 200 and "@" not in README  # no figure left to fill in
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / picture).is_file()
