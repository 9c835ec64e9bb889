"""Ways in which a program behind the endpoint can misbehave: none loses or doubles a rollout, each is named."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from runs import own_imports, steps, train

from tora.reporting.completions import read_parquet

pytest.importorskip("uvicorn")
PROGRAM = '''
import http.client, json, os, re, signal, socket, threading, time, urllib.error, urllib.parse, urllib.request

def ask(base_url, api_key, prompt, body=None, timeout=60):
    messages = [{"role": "user", "content": prompt}]
    body = json.dumps({"messages": messages, "max_tokens": 12}).encode() if body is None else body
    request = urllib.request.Request(f"{base_url}/chat/completions", body, {"Authorization": f"Bearer {api_key}"})
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return json.load(answer)

def refused(*arguments):
    try:
        ask(*arguments)
    except urllib.error.HTTPError as error:
        assert error.code in (400, 401), error.code
        return
    raise AssertionError("it was answered")

def leave(base_url, api_key, prompt):
    """Ask, and go before the answer."""
    where = urllib.parse.urlparse(base_url)
    connection = http.client.HTTPConnection(where.hostname, where.port)
    body = json.dumps({"messages": [{"role": "user", "content": prompt}]})
    connection.request("POST", f"{where.path}/chat/completions", body, {"Authorization": f"Bearer {api_key}"})
    connection.close()

def play(base_url, api_key, prompt, how="", mark=os.devnull, **row):
    """The first rollout of a group misbehaves, if the row says so."""
    try:
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
        bad = how
    except FileExistsError:
        bad = ""
    if bad == "silent": return 1.0
    if bad == "before": raise ValueError("bad")
    if bad == "garbage":
        for body in (b"", b"{", b"[]", b"null", b"\\xff", b'{"messages": 3}', b'{"messages": [3]}', b"{}" * 200000):
            refused(base_url, api_key, prompt, body)
        refused(base_url, api_key + "x", prompt)
    if bad == "leave":
        leave(base_url, api_key, prompt)
    ask(base_url, api_key, prompt)
    if bad == "raise": raise ValueError("bad")
    if bad == "sys.exit": raise SystemExit(3)
    if bad == "interrupt": raise KeyboardInterrupt
    if bad == "exit": os._exit(3)
    if bad == "kill": os.kill(os.getpid(), signal.SIGKILL)
    if bad == "hang": time.sleep(3600)
    if bad == "lock": re.match("(a+)+$", "a" * 60 + "b")
    if bad == "nan": return float("nan")
    if bad == "text": return "good"
    if bad == "object": return object()
    if bad == "many":
        threads = [threading.Thread(target=ask, args=(base_url, api_key, f"{prompt} {n}")) for n in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
    return time.perf_counter() % 1
'''
CASES = [
    ("silent", "asked the policy nothing"),
    ("before", "raised .*ValueError: bad"),
    ("garbage", ""),
    ("leave", ""),
    ("raise", "raised .*ValueError: bad"),
    ("sys.exit", "raised .*SystemExit"),
    ("interrupt", "raised .*KeyboardInterrupt"),
    ("exit", "ended its process|its interpreter has ended"),
    ("kill", "ended its process|its interpreter has ended"),
    ("hang", "took longer"),
    ("lock", "took longer"),
    ("nan", "returned nan"),
    ("text", "returned 'good'"),
    ("object", "returned <object|is not JSON"),
    ("many", ""),
]
RUN = [
    "rollout.engine=torch", "batch_size=4", "num_steps=4", "max_generated_tokens=96", "log_completions=1", "tools=[]",
    "max_tool_calling_iterations=null", "environment_timeout_s=6", "environment_processes=8", "shuffle=false",
    "dataset._component_=bad.rows", "agent=bad.play", "max_failed_rewards=0.9", "eval=null",
    "rewards=[{_component_: tora.environments.get_reward}]",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("where", ["async_rl=false", "async_rl=true", "elsewhere"])
def test_a_run_survives_them_all(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    where: str,
) -> None:
    rows = [{"prompt": f"What is {n} ?", "how": how, "mark": str(tmp_path / how)} for n, (how, _) in enumerate(CASES)]
    rows.append({"prompt": "What is 99 ?"})
    (tmp_path / "bad.py").write_text(f"{PROGRAM}\ndef rows():\n    return {rows!r}\n")
    monkeypatch.chdir(tmp_path)
    own_imports(monkeypatch)
    overrides = [where]
    if where == "elsewhere":
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "other")], check=True)
        overrides = ["async_rl=false", f"agent_python={tmp_path}/other/bin/python"]
    written = train("quickstart_tools", tmp_path / "run", *RUN, *overrides)
    said = caplog.text + "".join(capfd.readouterr())
    assert len(steps(written)) == 4, "the run ends well"
    files = [tmp_path / f"run/completions/step_{step}.parquet" for step in (1, 2, 3, 4)]
    ids = [row["prompt_id"] for file in files for row in read_parquet(file)]
    assert len(set(ids)) == 16 and all(2 <= ids.count(number) <= 4 + 8 for number in ids), (
        "no group is trained on twice"
    )
    failed = [sum(v for k, v in row.items() if re.fullmatch("reward/failed/.*", k)) for row in steps(written)]
    generated = sum(f / row["reward/failed_share"] for f, row in zip(failed, steps(written), strict=True) if f)
    assert generated == pytest.approx(round(generated)) and sum(failed) >= sum(bool(said) for _, said in CASES)
    for how, pattern in CASES:
        assert (tmp_path / how).exists(), "it was played"
        if pattern:
            assert re.search(pattern, said), (how, said[-3000:])
