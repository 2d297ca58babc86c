"""OpenCompass' own BaseModel under our classes, beside its own classes for transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

for package in ("torch", "transformers", "opencompass"):
    pytest.importorskip(package, reason=f"{package} is not installed; see scripts/ecosystem")
from conftest import DEMO, ROOT
from datasets import Dataset, DatasetDict
from mmengine.config import Config
from opencompass.models.huggingface import HuggingFaceCausalLM
from opencompass.models.huggingface_above_v4_33 import HuggingFaceBaseModel, HuggingFacewithChatTemplate
from opencompass.openicl.icl_dataset_reader import DatasetReader
from opencompass.openicl.icl_inferencer import GenInferencer, PPLInferencer
from opencompass.openicl.icl_prompt_template import PromptTemplate
from opencompass.openicl.icl_retriever import ZeroRetriever
from opencompass.utils import build_model_from_cfg
from opencompass.utils.prompt import PromptList
from qwen2_rs import InvalidArgumentError
from qwen2_rs.evaluation.opencompass import Qwen2, Qwen2Chat

TEXTS = ["What is 24 + 19?", "30加69等于多少？ 30 + 69 = 99。", "A fire truck is red."]
TOLERANCE = 1e-3


def their(kind: Any, dtype: str = "torch.float32") -> Any:
    model = kind(str(DEMO), max_seq_len=512, model_kwargs={"torch_dtype": dtype, "device_map": "cpu"})
    # Version 5 of transformers calls it so, which OpenCompass 0.5 does not know.
    model.tokenizer.batch_encode_plus = model.tokenizer.__call__
    return model


@pytest.fixture(scope="module")
def base() -> Any:
    model = their(HuggingFaceBaseModel)
    model.drop_middle = False
    return model


@pytest.fixture(scope="module")
def ours() -> Qwen2:
    return Qwen2(str(DEMO), dtype="f32", device="cpu", threads=2, max_seq_len=512)


@pytest.mark.parametrize("masks", [None, [2, 3, 1]])
def test_perplexities_are_theirs(base: Any, ours: Qwen2, masks: list[int] | None) -> None:
    # One by one: in a batch of theirs, shorter texts count their first token as well, foretold from padding.
    expected = [
        base.get_ppl([text], mask_length=None if masks is None else [masks[index]])[0]
        for index, text in enumerate(TEXTS)
    ]
    assert ours.get_ppl(TEXTS, masks) == pytest.approx(expected, abs=TOLERANCE, rel=0)


def test_likelihoods_of_continuations_are_theirs(ours: Qwen2) -> None:
    inputs, continuations = ["What is 24 + 19? 43.", "A frog is green."], [" 43.", " green."]
    expected = their(HuggingFaceCausalLM, "float32").get_loglikelihood(inputs, continuations)
    assert ours.get_loglikelihood(inputs, continuations) == pytest.approx(expected, abs=TOLERANCE, rel=0)


def test_answers_are_theirs(base: Any, ours: Qwen2) -> None:
    assert ours.generate(TEXTS, 12) == base.generate(TEXTS, 12)
    assert ours.generate(TEXTS[:1], 12, stopping_criteria=["3"]) == base.generate(
        TEXTS[:1], 12, stopping_criteria=["3"]
    )
    assert ours.get_token_len(TEXTS[1]) == base.get_token_len(TEXTS[1])
    assert ours.decode(ours.encode(TEXTS[1])) == TEXTS[1]


def test_answers_to_conversations_are_theirs() -> None:
    def said(role: str, prompt: str) -> dict[str, str]:
        return {"role": role, "prompt": prompt}

    section = [{"section": "round", "pos": "begin"}, {"section": "round", "pos": "end"}]
    turns = [said("HUMAN", "What is 2 + 3?"), said("BOT", "2 + 3 = 5."), said("HUMAN", "What is 24 + 19?")]
    prompts = [
        PromptList([section[0], *turns, said("BOT", ""), section[1]]),
        PromptList(
            [section[0], said("SYSTEM", "Answer."), said("HUMAN", "12 + 30"), said("BOT", ""), section[1]]
        ),
        "What colour is a frog?",
    ]
    ours = Qwen2Chat(str(DEMO), dtype="f32", device="cpu", threads=2, max_seq_len=512)
    answers = ours.generate_from_template(prompts, max_out_len=30)
    assert answers == their(HuggingFacewithChatTemplate).generate_from_template(prompts, max_out_len=30)
    assert answers[0] == "24 + 19 = 43."
    with pytest.raises(InvalidArgumentError, match="Qwen2"):
        ours.get_ppl(["text"])


class Questions:
    """The mini task of examples/evaluation as a dataset of OpenCompass."""

    def __init__(self) -> None:
        lines = (ROOT / "examples" / "evaluation" / "demo.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines][:10]
        self.gold = ["ABCD"[row["gold"]] for row in rows]
        split = Dataset.from_list([{**row, **dict(zip("ABCD", row["choices"], strict=True))} for row in rows])
        columns = ["question", *"ABCD"]
        splits = DatasetDict({"train": split, "test": split})
        self.reader = DatasetReader(splits, input_columns=columns, output_column="answer")
        self.train, self.test = self.reader.dataset["train"], self.reader.dataset["test"]


def test_opencompass_infers_the_mini_task_as_with_theirs(base: Any, ours: Qwen2, tmp_path: Path) -> None:
    questions = Questions()
    chat = "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"

    def choices(model: Any, batch_size: int) -> Any:
        template = PromptTemplate({letter: f"{chat}{{{letter}}}<|im_end|>" for letter in "ABCD"})
        inferencer = PPLInferencer(model=model, batch_size=batch_size, output_json_filepath=str(tmp_path))
        return inferencer.inference(ZeroRetriever(questions), prompt_template=template)

    def answers(model: Any) -> Any:
        inferencer = GenInferencer(
            model=model,
            max_out_len=24,
            batch_size=4,
            stopping_criteria=["<|im_end|>"],
            output_json_filepath=str(tmp_path),
        )
        return inferencer.inference(ZeroRetriever(questions), prompt_template=PromptTemplate(chat))

    found = choices(ours, 8)
    assert found == choices(base, 1)
    assert sum(a == b for a, b in zip(found, questions.gold, strict=True)) >= 8
    assert answers(ours) == answers(base)


def test_a_config_names_the_class(tmp_path: Path) -> None:
    """A run of OpenCompass writes its config and reads it in other processes."""
    config = tmp_path / "config.py"
    model = f"dict(type=Qwen2Chat, path={str(DEMO)!r}, threads=2, max_out_len=30, run_cfg=dict(num_gpus=0))"
    config.write_text(f"from qwen2_rs.evaluation.opencompass import Qwen2Chat\nmodels = [{model}]\n")
    Config.fromfile(str(config), format_python_code=False).dump(str(tmp_path / "dumped.py"))
    read = Config.fromfile(str(tmp_path / "dumped.py"), format_python_code=False)
    assert isinstance(build_model_from_cfg(read.models[0]), Qwen2Chat)


def test_a_tokenizer_alone_counts_and_computes_nothing() -> None:
    alone = Qwen2(str(DEMO), tokenizer_only=True)
    assert alone.get_token_len("What is") == 2
    with pytest.raises(InvalidArgumentError, match="tokenizer_only"):
        alone.get_ppl(["What is"])
