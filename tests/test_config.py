import pytest

from segformer.config import VARIANTS, SegformerConfig
from segformer.errors import UserError


def test_fields_and_defaults_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.SegformerConfig().to_dict(), SegformerConfig().to_dict()
    assert ours.keys() - theirs.keys() == {"layer_norm_eps_kind", "classifier_dropout_kind", "merged_decode"}  # our own
    for name in ours.keys() & theirs.keys():
        found = list(theirs[name]) if isinstance(theirs[name], tuple) else theirs[name]
        assert ours[name] == found, name


def test_a_config_file_is_read_and_written_as_transformers_does(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    config = SegformerConfig.from_variant("b2", id2label={0: "road", 1: "car"}, favourite="road")
    config.save_pretrained(tmp_path)
    theirs = transformers.SegformerConfig.from_pretrained(tmp_path)
    assert theirs.depths == config.depths and theirs.id2label == config.id2label and theirs.favourite == "road"
    theirs.save_pretrained(tmp_path / "back")
    again = SegformerConfig.from_pretrained(tmp_path / "back")
    assert again.to_dict().items() >= config.to_dict().items()
    assert SegformerConfig.from_pretrained(tmp_path / "config.json") == config
    with pytest.raises(UserError, match="no config.json in .*expected a folder"):
        SegformerConfig.from_pretrained(tmp_path / "back" / "..", num_labels=3).from_pretrained(tmp_path.parent)


def test_a_count_that_is_the_stored_one_keeps_the_names() -> None:
    stored = SegformerConfig(id2label={0: "cat", 1: "dog"}).to_dict()
    assert SegformerConfig.from_dict(stored, num_labels=2).id2label == {0: "cat", 1: "dog"}
    assert SegformerConfig.from_dict(stored, num_labels=3).id2label[2] == "LABEL_2"


def test_the_plain_values_are_a_copy() -> None:
    config = SegformerConfig()
    config.to_dict()["depths"][0] = 99
    assert config.depths == [2, 2, 2, 2] and SegformerConfig(**config.to_dict()) == config
    config.update({"drop_path_rate": 0.3})
    assert config.drop_path_rate == 0.3 and config.use_return_dict


def test_new_classes_replace_both_of_the_stored_tables() -> None:
    stored = SegformerConfig(id2label={0: "road", 1: "car"}).to_dict()
    changed = SegformerConfig.from_dict(stored, id2label={0: "cat", 1: "dog", 2: "cow"})
    assert changed.label2id == {"cat": 0, "dog": 1, "cow": 2} and changed.num_labels == 3
    changed.num_labels = 2
    assert changed.id2label == {0: "LABEL_0", 1: "LABEL_1"} and changed.label2id["LABEL_1"] == 1
    assert changed.num_hidden_layers == changed.num_encoder_blocks == 4


def test_unknown_keywords_are_kept_and_written_back() -> None:
    config = SegformerConfig(output_hidden_states=True, favourite="road")
    assert config.favourite == "road" and SegformerConfig.from_dict(config.to_dict()).output_hidden_states is True


def test_classes_come_from_a_count_or_from_names() -> None:
    assert SegformerConfig().num_labels == 2
    assert SegformerConfig(num_labels=3).id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    named = SegformerConfig(id2label={"0": "road", "1": "car"})  # json turns keys into strings
    assert named.id2label == {0: "road", 1: "car"} and named.label2id == {"road": 0, "car": 1}
    assert SegformerConfig.from_dict(named.to_dict(), num_labels=5).num_labels == 5


def test_classes_are_ordered_by_id_whatever_the_file_says() -> None:
    shuffled = {str(index): f"c{index}" for index in (0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9)}
    assert list(SegformerConfig(id2label=shuffled).id2label.values()) == [f"c{index}" for index in range(12)]


def test_variants_are_the_published_sizes() -> None:
    assert {name: sum(sizes["depths"]) for name, sizes in VARIANTS.items()} == {
        "b0": 8, "b1": 8, "b2": 16, "b3": 28, "b4": 41, "b5": 52
    }  # fmt: skip
    assert SegformerConfig.from_variant("b2", num_labels=19).decoder_hidden_size == 768


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SegformerConfig.from_variant("b9"), "unknown variant 'b9'"),
        (lambda: SegformerConfig(depths=[1, 2]), "depths is \\[1, 2\\], expected 4 values"),
        (lambda: SegformerConfig(hidden_sizes=[32, 64, 161, 256]), "161 is not a multiple of its 5"),
        (lambda: SegformerConfig(num_labels=2, id2label={0: "a"}), "num_labels is 2 but id2label names 1"),
        (lambda: SegformerConfig(id2label={1: "a", 2: "b"}), "id2label has the ids .1, 2., expected 0 to 1"),
        (lambda: SegformerConfig.from_dict({"depths": None}), "config.json does not describe a SegFormer"),
        (lambda: SegformerConfig.from_dict({"id2label": {"a": "b"}}), "config.json does not describe a SegFormer"),
        (lambda: SegformerConfig.from_dict({"model_type": "beit"}), "describes a 'beit' model"),
    ],
)
def test_impossible_configurations_are_told(make, message) -> None:
    with pytest.raises(UserError, match=message):
        make()
