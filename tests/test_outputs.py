import copy
import pickle

import pytest
import torch
from torch.utils import _pytree

from segformer.outputs import BaseModelOutput, SemanticSegmenterOutput


def output() -> SemanticSegmenterOutput:
    return SemanticSegmenterOutput(torch.tensor(1.0), torch.ones(2, 3, 4, 4))


def test_it_is_a_dictionary_of_the_fields_that_are_there() -> None:
    found = output()
    assert (
        isinstance(found, dict) and list(found) == ["loss", "logits"] and len(found) == 2 and "attentions" not in found
    )
    assert found["logits"] is found.logits is found[1] is dict(**found)["logits"]
    loss, logits = found.to_tuple()
    assert loss is found.loss and found[:1] == (loss,) and logits is found.get("logits")
    with pytest.raises(KeyError):
        found["attentions"]
    with pytest.raises(AttributeError):
        found.nothing  # noqa: B018


def test_fields_can_be_set_either_way() -> None:
    found = output()
    found["logits"] = found.loss = torch.zeros(1)
    assert found.logits is found["logits"] and found.loss is found["loss"]
    found.loss = None
    assert list(found) == ["logits"] and found.to_tuple() == (found.logits,)


def test_it_is_rebuilt_from_pairs_as_gathering_and_casting_do() -> None:
    pair = [output(), output()]
    both = type(pair[0])((name, torch.stack([one[name] for one in pair])) for name in pair[0])
    assert both.logits.shape == (2, 2, 3, 4, 4) and both.loss.shape == (2,)
    again = type(both)({name: value.half() for name, value in both.items()})
    assert again.logits.dtype == torch.float16 and list(again) == ["loss", "logits"]
    only = BaseModelOutput({"last_hidden_state": torch.ones(1)})
    assert only.last_hidden_state.item() == 1 and only.hidden_states is None


def test_torch_finds_its_leaves_and_it_survives_copies() -> None:
    doubled = _pytree.tree_map(lambda tensor: 2 * tensor, output())
    assert isinstance(doubled, SemanticSegmenterOutput) and doubled.loss == 2 and len(_pytree.tree_leaves(doubled)) == 2
    for again in (copy.deepcopy(doubled), pickle.loads(pickle.dumps(doubled))):
        assert again.loss == 2 and list(again) == ["loss", "logits"] and again["logits"] is again.logits
