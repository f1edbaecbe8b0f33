"""What commands print of their results, and options that they do not have."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.cli import main, parser

TRAINED = {
    "model_uri": "models:/pong-agent/3",
    "policy": "/home/policy",
    "agent_steps": 900,
    "agent_steps_per_s": 81.25,
}
PRETRAINED = {
    **{"model_uri": "models:/pong-encoder/1", "bundle": "/home/bundle", "aliases": ["champion"], "has_heldout": True},
    **{"game": "pong", "protocol": "machado"},
    **{"bits_per_dim": 0.18374612345678, "elbo_nats": -1040.2345678, "active_units": 17, "seconds": 61.5},
}


def said(command: str, result: dict[str, Any]) -> str:
    return str(parser().parse_args(command.split()).present(result))


def test_a_training_ends_with_its_agents_address() -> None:
    text = said("train --game pong", TRAINED)
    assert "  models:/pong-agent/3\n" in text
    assert text.endswith("next: latentrl evaluate models:/pong-agent/3 --episodes 20")
    unregistered = said("train --game pong", {**TRAINED, "model_uri": None})
    assert unregistered.endswith("next: latentrl evaluate /home/policy --episodes 20")


def test_figures_are_rounded_for_people() -> None:
    text = said("pretrain --data d --register r", PRETRAINED)
    figures = dict(line.strip().rsplit("  ", 1) for line in text.splitlines()[:-1])
    shown = {name.strip(): value.strip() for name, value in figures.items()}
    assert shown["bits per dim"] == "0.183746"
    assert shown["elbo nats"] == "-1040.23"
    assert (shown["active units"], shown["seconds"]) == ("17", "61.5")


def test_what_is_typed_next_is_not_refused() -> None:
    """A training plays by the encoder's rules; what was collected for a benchmark's part goes where it belongs."""
    train = "latentrl train --game pong --protocol machado --encoder models:/pong-encoder/1 --mode frozen"
    assert said("pretrain --data d --register r", PRETRAINED).endswith(f"next: {train}")
    of_benchmark = said("pretrain probe --data d --register r", {**PRETRAINED, "protocol": "atariari"})
    assert of_benchmark.endswith("next: latentrl probe models:/pong-encoder/1 --data DIR")
    for part, following in (
        (None, "pretrain --register NAME --data /d"),
        ("pretrain", "pretrain probe --register NAME --data /d"),
        ("probe", "probe ENCODER --data /d"),
    ):
        text = said("collect --game pong --frames 9 --out d", {"dataset": "/d", "part": part})
        assert text.endswith(f"next: latentrl {following}")
        assert parser().parse_args(text.rsplit("latentrl ", 1)[1].split())


@pytest.mark.parametrize("command", ["lineage x", "gc", "sync x", "report x", "probe x --data d"])
def test_what_uses_no_ray_takes_no_address_of_one(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--ray-address", "auto"])
    assert ended.value.code == 2
    assert "unrecognized arguments: --ray-address auto" in capfd.readouterr().err
