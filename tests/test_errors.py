import subprocess
import sys

import pytest
from torch.utils.data import DataLoader, Dataset

from segformer.errors import UserError, build, explained


def target(needed: int, optional: int = 1) -> int:
    return needed + optional


def test_a_signature_is_the_schema_of_its_section() -> None:
    assert build("data", target, {"needed": 1}, optional=5) == 6
    with pytest.raises(
        UserError, match=r"unknown key 'data.neded' \(did you mean 'needed'\?\): data takes needed, optional"
    ):
        build("data", target, {"neded": 1})
    with pytest.raises(UserError, match="'data.needed' is not set"):
        build("data", target, {})
    with pytest.raises(UserError, match="unknown key 'data.optional'"):  # what the program gives is not the user's
        build("data", target, {"needed": 1, "optional": 2}, optional=5)


def test_a_users_error_is_one_sentence_and_exit_code_1(capsys) -> None:
    with pytest.raises(SystemExit) as stop, explained():
        raise UserError("mask a.png holds the value 2")
    assert stop.value.code == 1
    assert capsys.readouterr().err == "error: mask a.png holds the value 2\n"


class _Broken(Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> None:
        raise UserError("mask a.png holds the value 2: list it")


def test_a_sentence_from_a_worker_process_arrives_alone(capsys) -> None:
    with pytest.raises(SystemExit), explained():
        next(iter(DataLoader(_Broken(), num_workers=1)))
    assert capsys.readouterr().err == "error: mask a.png holds the value 2: list it\n"


def test_a_bug_keeps_its_traceback_but_no_secret(capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "+logger.x={_target_:a.B,api_key:hunter2hunter2}"])
    monkeypatch.setenv("MY_TOKEN", "swordfish1")
    with pytest.raises(SystemExit) as stop, explained():
        raise KeyError("http://me:abc@host/x, hunter2hunter2, swordfish1")
    err = capsys.readouterr().err
    assert stop.value.code == 1 and "Traceback (most recent call last)" in err and __file__ in err
    assert "KeyError: 'http://<redacted>@host/x, <redacted>, <redacted>'" in err


def test_a_sentence_shows_no_secret(capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "logger.x.token=SE(CRETS"])
    with pytest.raises(SystemExit), explained():
        raise UserError("no viable alternative at input 'SE(CRETS', https://me:abc@host/x")
    assert capsys.readouterr().err == "error: no viable alternative at input '<redacted>', https://<redacted>@host/x\n"


def test_a_mismatched_torchvision_is_told(capsys) -> None:
    with pytest.raises(SystemExit), explained():
        raise RuntimeError("operator torchvision::nms does not exist")
    assert "do not belong together: install them in one command" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["train.py", "--help"], ["evaluate.py", "--help"], ["-m", "segformer", "--help"]])
def test_help_is_answered_without_torch(command) -> None:
    watched = "import runpy, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, '.')\n"
    if command[0] == "-m":
        watched += (
            "sys.argv = ['segformer', '--help']; run = lambda: runpy.run_module('segformer', run_name='__main__')\n"
        )
    else:
        watched += "run = lambda: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    watched += "try: run()\nexcept SystemExit: pass\nprint('TORCH', 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", watched, *command], capture_output=True, text=True, check=True)
    assert "TORCH False" in done.stdout and len(done.stdout.splitlines()) > 5
