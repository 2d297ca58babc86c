"""The mini task of examples/evaluation in lm-evaluation-harness: our model and the harness' backend `hf`.

Where torch is not installed, ours is compared with what `hf` said when data/evaluation.json was written:
QWEN2_BLESS=1 scripts/ecosystem -k test_harness
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed; see scripts/ecosystem")
from conftest import DEMO, ROOT
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from qwen2_rs import InvalidArgumentError
from qwen2_rs.evaluation.harness import Qwen2LM

TASKS = ROOT / "examples" / "evaluation"
RECORDED = Path(__file__).resolve().parents[1] / "data" / "evaluation.json"
LONG = " ".join(f"What is {a} plus {b}?" for a in range(3, 20) for b in (4, 30))
TOLERANCE = 1e-3  # two f32 implementations of sums over some hundred tokens; 9e-5 was seen


def evaluated(model: Any, chat: bool, **more: Any) -> dict[str, Any]:
    """What the model said of every sample of each task."""
    results = simple_evaluate(
        model=model,
        tasks=["demo_choice", "demo_answer", "demo_text"],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        apply_chat_template=chat,
        bootstrap_iters=0,
        **more,
    )
    assert results is not None
    said = {
        task: [
            [list(one[0]) if isinstance(one[0], tuple) else one[0] for one in sample["resps"]]
            for sample in samples
        ]
        for task, samples in results["samples"].items()
    }
    return {"said": said, "correct": results["results"]["demo_answer"]["exact_match,none"]}


def windows(model: Any) -> dict[str, Any]:
    """Texts that are longer than the model's max_length."""

    def request(kind: str, *arguments: Any) -> Instance:
        return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)

    pairs = [request("loglikelihood", LONG, " What is"), request("loglikelihood", "", "What is 2")]
    options = {"until": ["3"], "max_gen_toks": 20, "temperature": 0}
    return {
        "loglikelihood": [list(found) for found in model.loglikelihood(pairs, disable_tqdm=True)],
        "rolling": model.loglikelihood_rolling([request("rolling", LONG)], disable_tqdm=True),
        "generate": model.generate_until([request("generate", LONG, options)], disable_tqdm=True),
    }


def everything(model: Any, windowed: Any) -> dict[str, Any]:
    return {
        "plain": evaluated(model, chat=False),
        "chat": evaluated(model, chat=True),
        "windows": windows(windowed),
    }


@pytest.fixture(scope="module")
def ours() -> dict[str, Any]:
    model = Qwen2LM(str(DEMO), dtype="f32", device="cpu", threads=2)
    return everything(model, Qwen2LM(str(DEMO), dtype="f32", device="cpu", threads=2, max_length=64))


def assert_equal(found: Any, expected: Any, path: str = "") -> None:
    """Numbers to the tolerance, all else exactly."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for key, value in expected.items():
            assert_equal(found[key], value, f"{path}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), path
        for index, value in enumerate(expected):
            assert_equal(found[index], value, f"{path}/{index}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=TOLERANCE, rel=0), path
    else:
        assert found == expected, path


def test_ours_says_what_the_transformers_backend_says(ours: dict[str, Any]) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    from lm_eval.models.huggingface import HFLM

    model = HFLM(str(DEMO), dtype="float32", device="cpu", batch_size=4)
    windowed = HFLM(str(DEMO), dtype="float32", device="cpu", max_length=64)
    theirs = json.loads(json.dumps(everything(model, windowed), default=float))
    if os.environ.get("QWEN2_BLESS") == "1":
        RECORDED.write_text(json.dumps(theirs, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    assert_equal(ours, theirs)


def test_ours_says_what_the_transformers_backend_said(ours: dict[str, Any]) -> None:
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    assert_equal(ours, recorded)
    # The demo model answers what it was trained for, in its template only.
    assert recorded["chat"]["correct"] > 0.9 > recorded["plain"]["correct"]


def test_a_last_message_is_left_open_to_be_continued() -> None:
    model = Qwen2LM(str(DEMO), device="cpu", threads=2)
    history = [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "2 + 3 ="}]
    text = model.apply_chat_template(history, add_generation_prompt=False)
    assert text.endswith("<|im_start|>assistant\n2 + 3 =")
    assert model.apply_chat_template(history[:1]).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert model.tok_encode(text) == model.tokenizer.encode_chat(
        history[:1], add_generation_prompt=True
    ) + model.tok_encode("2 + 3 =")


@pytest.mark.parametrize(
    ("options", "named"), [({"num_beams": 4}, "num_beams"), ({"max_gen_toks": 1024}, "max_new_tokens")]
)
def test_what_cannot_be_done_is_an_error(options: dict[str, Any], named: str) -> None:
    model = Qwen2LM(str(DEMO), device="cpu", threads=2)
    request = Instance(request_type="generate_until", doc={}, arguments=("What", options), idx=0)
    with pytest.raises(InvalidArgumentError, match=named):
        model.generate_until([request], disable_tqdm=True)


def test_the_command_knows_the_model(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qwen2_rs.evaluation", "--model", "qwen2_rs", "--tasks", "demo_answer"]
    command += ["--model_args", f"pretrained={DEMO},quantize=q8,threads=2", "--include_path", str(TASKS)]
    command += ["--apply_chat_template", "--output_path", str(tmp_path / "results.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (written,) = tmp_path.glob("**/results*.json")
    result = json.loads(written.read_text())["results"]["demo_answer"]
    assert result["exact_match,none"] > 0.9
