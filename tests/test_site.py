"""The check of the site's layout finds what is too wide, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from check_site import check, find_browser

PAGE = '<!doctype html><meta charset="utf-8"><main><article style="margin:0">{}</article></main>'
BOX = '<div style="overflow-x:auto;width:{}px"><div id="inner" style="width:{}px">x</div></div>'


@pytest.mark.skipif(find_browser() is None, reason="no Chromium or Chrome is installed")
def test_elements_beyond_the_window_and_hidden_code_are_found(tmp_path: Path) -> None:
    contents = {
        "fits": "<p>" + "text " * 100 + BOX.format(300, 300),
        "scrolls": BOX.format(300, 800),  # allowed on a telephone, not in a window of 1280 pixels
        "wide": '<img style="width:600px;height:9px">',
        "widest": '<img style="width:2000px;height:9px">',
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.html").write_text(PAGE.format(content))
    pages = [f"{name}.html" for name in contents]
    found = {(page, width) for page, width, *_ in check(str(find_browser()), tmp_path, pages)}
    assert found == {
        ("scrolls.html", 1280),
        ("wide.html", 390),
        ("widest.html", 390),
        ("widest.html", 1280),
    }
    assert not list(tmp_path.glob("_*"))
