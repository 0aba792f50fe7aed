"""The faults that mutation testing puts in are cosmic-ray's; none is in an annotation."""

import pytest

from dev.quality import mutation

SOURCE = """
Names = dict[str, int]
LIMIT = 3


def clipped(x: int | None, low: int = 0) -> int | None:
    if x < low:
        raise ValueError(x + 1)
    return min(x, LIMIT)
"""


def test_each_is_one_change_of_what_is_computed(tmp_path, monkeypatch) -> None:
    path = tmp_path / "module.py"
    path.write_text(SOURCE)
    monkeypatch.setattr(mutation, "CORE", tmp_path)
    found = {str(fault) for fault in mutation.faults(path)}
    assert "module.py: - if x < low: + if x <= low:" in found
    assert {"module.py: - LIMIT = 3 + LIMIT = 4", "module.py: - LIMIT = 3 + LIMIT = 2"} <= found
    assert any("x - 1" in fault for fault in found)
    assert not any("int |" in fault and "low: int = 0" not in fault for fault in found)
    assert not any("int + None" in fault or "int >> None" in fault for fault in found)


def test_a_fault_is_noticed_where_a_test_fails(tmp_path, monkeypatch) -> None:
    test = tmp_path / "test_it.py"
    test.write_text(f"def test_it():\n    assert open({str(tmp_path / 'value')!r}).read() == '1'\n")
    monkeypatch.setattr(mutation, "load_extension", lambda: None)
    for value, fails in (("1", False), ("2", True)):
        (tmp_path / "value").write_text(value)
        assert mutation.noticed(tmp_path / "module.py", "", [test]) is fails
    with pytest.raises(RuntimeError, match="pytest ended with 4"):
        mutation.noticed(tmp_path / "module.py", "", [tmp_path / "nothing.py"])
