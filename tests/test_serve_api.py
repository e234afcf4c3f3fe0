"""What clients of other servers send serve.py: names of the model, parameters one by one, other
addresses than the usual."""

import pytest
from conftest import run

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
from test_serve import served

COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"


def test_a_model_has_the_names_that_it_is_given(tiny):
    ask = {"prompt": "import", "max_tokens": 1}
    with served(tiny, "--name=org/sft, gpt-4o-mini", name="org/sft") as site:
        cards = site.get("/v1/models").json()["data"]
        assert [card["id"] for card in cards] == ["org/sft", "gpt-4o-mini"]
        for name in ("org/sft", "gpt-4o-mini"):
            assert site.get(f"/v1/models/{name}").json()["id"] == name
            assert site.complete(**ask, model=name)["model"] == "org/sft"
        assert site.complete(**ask)["model"] == "org/sft"
        refused = site.post(COMPLETE, ask | {"model": "tiny"})
        assert refused.status_code == 404
        assert "this server has 'org/sft' or 'gpt-4o-mini'" in refused.json()["error"]["message"]
    with served(tiny, env={"BARELM_NAME": "one,two"}, name="one") as site:
        assert len(site.get("/v1/models").json()["data"]) == 2
    for wrong in ("--name=", "--name=a,,b", "--name=a\nb"):
        done = run(tiny, "serve.py", "--model=out/tiny", wrong, check=False)
        assert done.returncode == 1 and "expected names with commas" in done.stderr
