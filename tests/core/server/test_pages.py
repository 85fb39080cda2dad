"""The pages for browsers."""

from __future__ import annotations

import re

import pytest

from tests.core.server.fakes import FakeEngine
from tests.core.server.harness import client_of


@pytest.mark.parametrize("path", ["/", "/docs"])
async def test_a_page_needs_nothing_from_elsewhere(path: str) -> None:
    async with client_of(FakeEngine()) as client:
        response = await client.get(path)
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert not re.search(r"https?://|src=|@import|innerHTML|<link", response.text)


@pytest.mark.parametrize("path", ["/", "/docs"])
async def test_with_keys_the_operator_decides_whether_pages_are_public(path: str) -> None:
    async with client_of(FakeEngine(), api_keys=("k",)) as client:
        assert (await client.get(path)).status_code == 401
    async with client_of(FakeEngine(), api_keys=("k",), public_paths=(path,)) as client:
        assert (await client.get(path)).status_code == 200
