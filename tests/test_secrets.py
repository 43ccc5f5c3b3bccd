"""What is never told."""

import json

import pytest

from segformer.secrets import names_secret, redacted, redacted_arguments

SECRET = (
    "token hf_token HF_TOKEN wandbToken accesstoken api_key apikey apiKey API-Key key ssh-key aws_access_key_id "
    "private_key secret client_secret password db.password passwd pwd credential credentials auth basic-auth "
    "authorization api_keys X-Api-Key secrets pass user_pass Cookie tokens logger.x.tokens"
)
PLAIN = (
    "monitor tokens_per_batch num_tokens keyframe keypoints monkey turkey author tokenizer secretary passes logger lr "
    "keep_ratio max_steps keys"
)


@pytest.mark.parametrize("key", SECRET.split())
def test_keys_of_secrets_are_known(key: str) -> None:
    assert names_secret(key)


@pytest.mark.parametrize("key", PLAIN.split())
def test_keys_that_only_look_like_secrets_stay(key: str) -> None:
    assert not names_secret(key)


def test_a_redacted_configuration_is_a_copy_without_secrets() -> None:
    config = {
        "logger": {"wandb": {"api_key": "abc", "offline": True, "entity": "me"}},
        "password": 1234,
        "token": "",
        "secret": None,
        "auth": {"user": "me", "words": ["abc", "def"], "on": False},
        "data": {"root": "https://me:abc@host/x", "classes": ["a", "b"], "scale": (0.5, 2.0)},
    }
    before = json.dumps(config)
    assert redacted(config) == {
        "logger": {"wandb": {"api_key": "<redacted>", "offline": True, "entity": "me"}},
        "password": "<redacted>",
        "token": "",
        "secret": None,
        "auth": {"user": "<redacted>", "words": ["<redacted>", "<redacted>"], "on": False},
        "data": {"root": "https://<redacted>@host/x", "classes": ["a", "b"], "scale": [0.5, 2.0]},
    }
    assert json.dumps(config) == before and redacted(redacted(config)) == redacted(config)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("https://me:abc@host/x", "https://<redacted>@host/x"),
        ("https://ghp_abc@github.com/a/b", "https://<redacted>@github.com/a/b"),
        ("from http://a:b@c and ftp://d:e@f", "from http://<redacted>@c and ftp://<redacted>@f"),
        ("postgres://me:p@ss@host/db", "postgres://<redacted>@host/db"),
        ("redis://:abc@host:1", "redis://<redacted>@host:1"),
        ("https://me:a/b@host", "https://<redacted>@host"),
        ("https://h/x?token=abc&y=1#z", "https://h/x?token=<redacted>&y=1#z"),
        ("https://h/x?X-Amz-Signature=abc&X=1", "https://h/x?X-Amz-Signature=<redacted>&X=1"),
        *((same, same) for same in ("https://host:443/@scope/x", "hf://datasets/a/b@main/x", "git@github.com:a/b")),
        *((same, same) for same in ("sqlite:////tmp/x@y.db", "s3://bucket/key", "images/*/a@2x.png", "")),
    ],
)
def test_addresses_lose_who_logs_in(text: str, told: str) -> None:
    assert redacted({"x": [text]}) == {"x": [told]}
    assert redacted_arguments([text]) == [told] or "?" in text


def test_settings_inside_a_text_and_the_environments_secrets_are_hidden(monkeypatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "swordfish1")
    monkeypatch.setenv("SHORT_KEY", "a")
    monkeypatch.setenv("PWD", "/some/folder")
    found = redacted(
        {"env": ["HF_TOKEN=abc", "a=b"], "conn": "Server=x;Password=abc;Port=1", "x": "is swordfish1 in /some/folder"}
    )
    assert found == {
        "env": ["HF_TOKEN=<redacted>", "a=b"],
        "conn": "Server=x;Password=<redacted>;Port=1",
        "x": "is <redacted> in /some/folder",
    }


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["logger.wandb.api_key=abc"], ["logger.wandb.api_key=<redacted>"]),
        (["+a={token:abc,b:1}", "seed=1"], ["+a=<redacted>", "seed=1"]),
        (['++a.b=[{"api-key": "a b c"}]'], ["++a.b=<redacted>"]),
        (["++x.auth.word=abc"], ["++x.auth.word=<redacted>"]),
        (["--token", "abc", "--other", "1"], ["--token", "<redacted>", "--other", "1"]),
        (["--token=abc"], ["--token=<redacted>"]),
        (["data.root=https://me:abc@host/x"], ["data.root=https://<redacted>@host/x"]),
        (["train.py", "model=b0", "data.train.images=a/*.jpg", "optim.betas=[0.9,0.99]"],) * 2,
    ],
)
def test_a_command_line_keeps_everything_but_secrets(words: list[str], told: list[str]) -> None:
    assert redacted_arguments(words) == told
