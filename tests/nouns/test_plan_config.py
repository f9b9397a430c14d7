import json
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import BaseModel

from alphaq.cli.options import Asked, as_command
from alphaq.errors import AlphaQError, PlanError
from alphaq.nouns.option import Option, settings_of
from alphaq.nouns.plan import Plan, Reads
from alphaq.nouns.settings import Budget, PlanConfig
from alphaq.report.commands import plan_options, reproduce


def read(config: object) -> Plan:
    return Plan.from_json(json.dumps({"choices": {"a": "2g128"}, "config": config}), "p.json")


def test_a_plan_without_settings_has_none_and_is_written_as_before() -> None:
    for plan in (Plan(choices={"a": "2"}), read({}), Plan.from_json('{"choices": {"a": "2"}}', "p.json")):
        assert plan.config is None and plan.codec is None and plan.method is None
        assert json.loads(plan.to_json())["config"] == {}
        assert Plan.from_json(plan.to_json(), "p.json") == plan


def test_settings_of_other_versions_and_tools_are_left_out() -> None:
    assert read({"made by": "another tool"}).config is None
    newer = read({"budget": {"bits": 2.5}, "method": "alphaq", "shade": "blue"}).config
    assert newer == PlanConfig(budget=Budget(bits=2.5), method="alphaq")
    older = read({"budget": {"bits": 2.5, "bpw": None, "size_bytes": None}, "engine": "native", "seed": 0}).config
    assert older == PlanConfig(budget=Budget(bits=2.5)) and older.bos and older.check


def test_a_plan_by_hand_may_name_a_codec_without_a_budget() -> None:
    plan = read({"codec": "zstd", "imatrix": "i m.gguf 0123"})
    assert plan.codec == "zstd" and plan.imatrix == "i m.gguf 0123"
    assert plan.config is not None and not plan.config.budget.stated and reproduce(plan) == []
    assert plan.coded_by("none").codec is None and plan.coded_by("zstd") == plan
    read_before = Plan(choices={"a": "2"}, read_bytes=5, reads=Reads(by_choice={"2": 5}, layers=1))
    coded = read_before.coded_by("zstd")
    assert coded.read_bytes is coded.reads is None and read_before.coded_by(None) == read_before


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        ([], "config"),
        ({"imatrix": 3}, "config.imatrix"),
        ({"budget": {"bits": "few"}}, "config.budget.bits"),
        ({"codec": "zip9"}, "zip9"),
        ({"noise": "loud"}, "config.noise"),
    ],
)
def test_settings_that_cannot_be_read_are_named(config: object, fault: str) -> None:
    with pytest.raises(PlanError, match=fault):
        read(config)


def test_every_setting_of_a_plan_is_an_option() -> None:
    fields = {*PlanConfig.model_fields} - {"budget"} | {*Budget.model_fields}
    assert settings_of(PlanConfig).keys() == fields


def test_a_new_setting_is_one_field() -> None:
    class Wider(PlanConfig):
        shade: Annotated[str | None, Option("A colour.", varies=True)] = None

    taken: list[Asked[Wider]] = []

    def command(asked: "Asked[Wider]") -> None:
        taken.append(asked)

    command.__annotations__ = {"asked": Asked[Wider]}
    import typer
    from typer.testing import CliRunner

    app = typer.Typer()
    app.command()(as_command(command))
    ran = CliRunner().invoke(app, ["--shade", "blue", "--bits", "3"])
    assert ran.exit_code == 0, ran.output
    (asked,) = taken
    assert asked.typed == {"shade": "--shade", "bits": "--bits"}
    config = asked.build(budget=Budget(bits=3), stats=None, imatrix=None)
    assert config.shade == "blue"
    assert plan_options(config, "measured") == ["--bits", "3.0", "--shade", "blue"]


def test_a_record_says_which_of_its_names_is_unknown() -> None:
    class Record(BaseModel):
        path: Annotated[Path | None, Option("A file.")] = None

    assert settings_of(Record)["path"].parse(Path("a")) == Path("a")
    with pytest.raises(AlphaQError, match="Did you mean 'hill'"):
        settings_of(PlanConfig)["tail"].parse("hil")
