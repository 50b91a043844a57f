"""Every law for every family and mixer that discovery finds; see isotach/testing/laws.py."""

import pytest

from isotach.testing import laws, subjects
from isotach.testing.laws import Law
from isotach.testing.subjects import Subject


@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: f"{law.number}")
@pytest.mark.parametrize("subject", subjects.find(), ids=lambda s: f"{type(s).__name__}-{s.name}")
def test_law(subject: Subject, law: Law) -> None:
    verdict = laws.judge(law, subject)
    assert verdict.holds, f"{verdict.worst}: {verdict.error:.2e} > {verdict.limit:.0e}"


def test_discovery_finds_what_is_there() -> None:
    names = {(type(subject).__name__, subject.name) for subject in subjects.find()}
    assert names >= {("Family", "decay"), ("Family", "history"), ("Layer", "lightning"), ("Layer", "softmax")}
