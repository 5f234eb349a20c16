import io
import sys

import pytest

from fisherlens._progress import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("enabled", "terminal", "drawn"),
    [(None, True, True), (None, False, False), (True, False, True), (False, True, False)],
)
def test_a_bar_is_drawn_where_it_is_wanted(monkeypatch, enabled, terminal, drawn):
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(progress([1, 2, 3], desc="Capture", enabled=enabled)) == [1, 2, 3]
    assert ("Capture" in stream.getvalue()) == drawn


def test_a_total_is_counted_to_and_no_stream_at_all_is_silence(monkeypatch):
    with progress(5, desc="Products", enabled=True) as bar:
        bar.update(2)
        assert (bar.n, bar.total) == (2, 5)
    monkeypatch.setattr(sys, "stderr", None)
    assert list(progress([1], desc="Capture")) == [1]
