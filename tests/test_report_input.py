"""report.py on logs and places of other forms: each is a right result or one line."""

import pytest
from conftest import run

import report
from barelm.run import UserError

DEEP = "[" * 100_000


def test_logs_of_any_form_are_compared(tmp_path):
    lines = [DEEP, '{"step": "1"}', "[1]", "\ufffe", '{"step": 1, "loss": 1e308, "tokens": "9"}']
    lines += ['{"step": 2, "loss": 1' + "0" * 400 + ', "tokens": [1]}', '{"step": 3, "loss": 2.5}']
    (tmp_path / "log.jsonl").write_bytes("\n".join(lines).encode() + b"\n\xff\xfe")
    rows = report.read_log(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert report.curve(rows, "loss", "step") == [(3, 2.5)]
    done = run(tmp_path, "report.py", "--compare=.")
    assert "2.5000" in done.stdout and (tmp_path / "report.svg").exists()


REPORTS = {"": "expected a name", "x.svg": "expected a name", "out": "no plain file"}
REPORTS |= {"/dev/null": "no plain file", "f/x.md": "Not a directory", "a" * 300: "too long"}


def test_odd_places_for_a_report_are_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "log.jsonl").write_text('{"step": 3, "loss": 2.5}')
    (tmp_path / "f").write_text("")
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(report, "compare", ".")
    for name, message in REPORTS.items():
        monkeypatch.setattr(report, "report", name)
        with pytest.raises(UserError, match=message) as error:
            report.compare_runs()
        assert "\n" not in str(error.value)
    monkeypatch.setattr(report, "compare", ",")
    with pytest.raises(UserError, match="expected the folders of runs"):
        report.compare_runs()
