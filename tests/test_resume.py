import pytest
import torch

from segformer.resume import AtomicCheckpointIO


class _Unsaveable:
    def __reduce__(self):
        raise OSError("no space left on device")


def test_a_failing_save_keeps_the_previous_checkpoint(tmp_path) -> None:
    path = tmp_path / "run" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    with pytest.raises(OSError, match="no space left"):
        AtomicCheckpointIO().save_checkpoint({"step": 2, "weights": torch.zeros(10**5), "bad": _Unsaveable()}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]
