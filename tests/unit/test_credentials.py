"""A credential in an address is refused, and never repeated."""

from __future__ import annotations

import pytest

from rayrl import cli
from rayrl.credentials import redacted, refuse_credentials

CARRIERS = [
    "s3://AKIA:hush@bucket/run",
    "https://user:hush@host/score",
    "https://host/score?api_key=hush",
    "https://host/score?x=1&access_token=hush",
    "s3://bucket/run?secret_key=hush",
]


@pytest.mark.parametrize("address", CARRIERS)
def test_an_address_with_a_credential_is_refused_without_repeating_it(address):
    with pytest.raises(ValueError, match="carries a credential") as raised:
        refuse_credentials(address)
    assert "hush" not in str(raised.value)
    assert "hush" not in redacted(f"{address} (got '{address}') failed")


@pytest.mark.parametrize(
    "address",
    ["", "s3://bucket/run?region=us-east-1", "https://host:8000/v1", "/shared/a@b", "gs://b/x@y"],
)
def test_other_addresses_pass_unchanged(address):
    assert refuse_credentials(address) == address == redacted(address)


@pytest.mark.parametrize("address", CARRIERS)
def test_the_command_line_does_not_repeat_it_either(address, capsys):
    with pytest.raises(SystemExit):
        cli.parse(["--train.checkpoint_uri", address], program="grpo_coco.py", description="d")
    error = capsys.readouterr().err
    assert "train.checkpoint_uri: the address carries a credential" in error
    assert "hush" not in error


def test_a_key_in_place_of_its_variable_s_name_is_refused_without_repeating_it(tmp_path, capsys):
    file = tmp_path / "job.yaml"
    term = "{kind: http, url: 'https://host', api_key_variable: sk-hush-123}"
    file.write_text(f"reward: {{terms: {{judge: {term}}}}}")
    with pytest.raises(SystemExit):
        cli.parse(["--config", str(file)], program="grpo_coco.py", description="d")
    error = capsys.readouterr().err
    assert "want the name of the environment variable" in error and "hush" not in error


def test_a_relative_checkpoint_address_is_refused():
    with pytest.raises(cli.UsageError, match=r"want s3://…, gs://…, file:///… or an absolute path"):
        cli.load(None, ["--train.checkpoint_uri", "copies/run"])
