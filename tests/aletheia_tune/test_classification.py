"""Sequence classification: labels in, a head and adapters out that stock PEFT loads, accuracy beside the loss."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from aletheia_tune import cli
from aletheia_tune.classification import class_of, head_modules, in_order_of
from aletheia_tune.data import Collator, Fields, class_names, load_examples
from aletheia_tune.errors import UserError
from aletheia_tune.evaluation import held_out
from aletheia_tune.loading import load_model
from aletheia_tune.merge import merge_adapter
from aletheia_tune.metrics import TrainResult
from aletheia_tune.plan import Plan, uniform_plan
from aletheia_tune.probe import METHODS
from aletheia_tune.race import Arm, RaceResult, race
from aletheia_tune.recipe import Recipe
from aletheia_tune.referee import Verdict, judge
from aletheia_tune.report import write_verdict
from aletheia_tune.train import fine_tune
from aletheia_tune.training_config import TrainConfig
from benchmarks.family_table import FAMILIES
from tests.at_step import AtStep, Killed, die

WORDS = ["good", "bad", "a", "the", "film", "scene", "plot"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
CLASSES = ("neg", "pos")
CONFIG = TrainConfig(
    steps=6, batch_size=8, learning_rate=1e-2, warmup=0, dtype="float32", progress=False, schedule="constant"
)


def tokenizer() -> PreTrainedTokenizerFast:
    ids = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


def settings(**changes: Any) -> BertConfig:
    values = {
        "vocab_size": len(SPECIAL) + len(WORDS), "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
        "intermediate_size": 48, "max_position_embeddings": 24, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "pad_token_id": 0, "initializer_range": 0.2,
    }  # fmt: skip
    return BertConfig(**{**values, **changes})


def saved(path: Path, build: Callable[[], Any]) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        build().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def encoder_dir(tmp_path_factory) -> Path:
    """A random BERT of 4 layers without a head, as encoders are published (float32)."""
    return saved(tmp_path_factory.mktemp("encoder") / "model", lambda: BertModel(settings()))


def reviews(count: int, seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        label = draw.choice(CLASSES)
        words = [*draw.choices(WORDS[2:], k=draw.randint(1, 6)), *["good" if label == "pos" else "bad"] * 2]
        draw.shuffle(words)
        rows.append({"text": " ".join(words), "label": label})
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def train_file(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("train") / "train.jsonl", reviews(64, seed=1))


@pytest.fixture(scope="module")
def eval_file(tmp_path_factory) -> Path:
    """21 texts: no multiple of a batch size."""
    return write(tmp_path_factory.mktemp("eval") / "eval.jsonl", reviews(21, seed=2))


def upper_half(model: Any) -> Plan:
    return uniform_plan(model, rank=4, layers=(2, 3))


@pytest.fixture
def tune(encoder_dir, train_file, eval_file):
    """fine_tune on a fresh copy of the encoder, its head drawn by the configuration's seed."""

    def run(
        out: Path,
        config: TrainConfig = CONFIG,
        plan: Callable[[Any], Plan] = upper_half,
        model_dir: Path = encoder_dir,
        **options: Any,
    ) -> TrainResult:
        model, words = load_model(model_dir, config.dtype, CLASSES, config.seed)
        train, eval_ = (load_examples(path, words, classes=CLASSES) for path in (train_file, eval_file))
        return fine_tune(model, words, train, eval_, plan(model), config, out, **options)

    return run


# Labels


def labelled(*labels: Any) -> list[dict[str, Any]]:
    return [{"text": "a film", "label": label} for label in labels]


def test_the_columns_of_a_file_say_whether_it_is_to_be_classified():
    assert class_names(labelled("pos", "neg", "pos")) == ("neg", "pos")
    assert class_names(labelled(10, 2, 10, -1)) == ("-1", "2", "10")
    assert class_names(labelled("10", "2")) == ("10", "2")
    assert class_names([{"text": "a film"}, {"text": "a film", "label": 1}]) is None
    assert class_names(labelled("pos", "neg"), Fields(text="text")) is None
    pair = {"prompt": "a", "completion": "b", "text": "c", "label": 1}
    assert class_names([pair, {**pair, "label": 2}]) is None
    assert class_names([]) is None


def test_the_names_of_a_datasets_labels_are_the_classes(encoder_dir):
    from datasets import ClassLabel, Dataset, Features, Value

    def dataset(names: list[str], *labels: int) -> Dataset:
        features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
        return Dataset.from_list(labelled(*labels), features=features)

    # "meh" has no text, but the numbers are those of the names.
    source = dataset(["pos", "meh", "neg"], 2, 0, 2)
    classes = class_names(source)
    assert classes == ("pos", "meh", "neg")
    assert [example["labels"] for example in load_examples(source, tokenizer(), classes=classes)] == [2, 0, 2]
    held_out = load_examples(dataset(["neg", "pos"], 0, 1), tokenizer(), classes=classes)
    assert [example["labels"] for example in held_out] == [2, 0]
    model, _ = load_model(encoder_dir, "float32", classes)
    assert class_of(model) == classes
    with pytest.raises(UserError, match="every label is 'neg': a classifier needs at least two"):
        class_names(dataset(["pos", "neg"], 1, 1))
    with pytest.raises(UserError, match="train record 2: label -1 has no name: leave out"):
        class_names(dataset(["pos", "neg"], 1, -1))


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (labelled("pos", "pos"), r"\.jsonl: every label is 'pos': a classifier needs at least two"),
        ([*labelled("pos"), {"text": "a"}], r"\.jsonl line 2: no field 'label', only fields 'text'"),
        (labelled("pos", None), r"\.jsonl line 2: field 'label' is neither a string nor an integer but null"),
        (labelled("pos", True), "line 2: field 'label' is neither a string nor an integer but a boolean"),
        (labelled(0, 0.5), "line 2: field 'label' is neither a string nor an integer but a number"),
    ],
    ids=["one", "missing", "null", "boolean", "fraction"],
)
def test_labels_that_cannot_be_meant(tmp_path, rows, says):
    with pytest.raises(UserError, match=says) as caught:
        class_names(write(tmp_path / "data.jsonl", rows))
    assert "\n" not in str(caught.value)


def test_a_text_keeps_its_ending_and_gets_the_number_of_its_class():
    words = tokenizer()
    rows = [{"text": "good film", "label": "pos"}, {"text": "the plot " * 9, "label": "neg"}]
    examples = load_examples(rows, words, classes=CLASSES, max_length=6)
    assert [words.decode(example["input_ids"]) for example in examples] == [
        "[CLS] good film [SEP]",
        "[CLS] the plot the plot [SEP]",
    ]
    assert [example["labels"] for example in examples] == [1, 0]
    assert (examples.truncated, examples.dropped) == (1, 0)
    words.model_max_length = 5
    assert len(load_examples(rows, words, classes=CLASSES)[1]["input_ids"]) == 5
    batch = Collator(0)(examples)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 8)
    assert batch["labels"].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": "a", "label": "meh"}, "eval record 2: label 'meh' is none of the training data's: 'neg', 'pos'"),
        ({"text": "a"}, "eval record 2: no field 'label'"),
        ({"text": 3, "label": "pos"}, "eval record 2: field 'text' is not a string but a number"),
    ],
)  # fmt: skip
def test_a_held_out_text_that_does_not_fit(row, says):
    with pytest.raises(UserError, match=says):
        load_examples([*labelled("pos"), row], tokenizer(), classes=CLASSES, name="eval")


# The model


def test_the_head_is_new_the_same_for_one_seed_and_at_no_cost_to_other_draws(encoder_dir):
    state = torch.get_rng_state()
    heads = [load_model(encoder_dir, "float32", CLASSES, seed)[0].classifier.weight for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_a_head_that_is_there_is_kept(tmp_path):
    path = saved(tmp_path / "model", lambda: BertForSequenceClassification(settings(num_labels=3)))
    model, words = load_model(path, "float32", ("x", "y", "z"))
    assert torch.equal(model.classifier.weight, load_file(path / "model.safetensors")["classifier.weight"])
    assert class_of(model) == ("x", "y", "z")
    assert words.model_max_length == 24
    with pytest.raises(UserError, match=r"classifier\.bias is not for the data's 2 classes"):
        load_model(path, "float32", CLASSES)


def test_the_classes_of_a_head_keep_their_numbers(tmp_path, train_file, eval_file):
    """The file's labels in their order are neg, pos; the head's first row says pos."""
    names = {"id2label": {0: "pos", 1: "neg"}, "label2id": {"pos": 0, "neg": 1}}
    path = saved(tmp_path / "model", lambda: BertForSequenceClassification(settings(**names)))
    assert in_order_of(path, ("neg", "pos")) == ("pos", "neg")
    assert in_order_of(path, ("neg", "none")) == ("neg", "none")
    with pytest.raises(
        UserError, match="the checkpoint numbers its classes pos, neg: give them in this order"
    ):
        load_model(path, "float32", ("neg", "pos"))
    model, _ = load_model(path, "float32", ("pos", "neg"))
    assert torch.equal(model.classifier.weight, load_file(path / "model.safetensors")["classifier.weight"])
    config = dataclasses.replace(CONFIG, steps=2)
    result = race(
        [Arm("one", upper_half(model), kernels=True)], path, train_file, eval_file, config, tmp_path / "race"
    )
    assert result.arms[0].training.classes == ("pos", "neg")


def test_an_adapter_merges_with_its_head(tune, tmp_path, encoder_dir, eval_file):
    result = tune(tmp_path / "out")
    assert merge_adapter(encoder_dir, tmp_path / "out", tmp_path / "merged") > 1
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert class_of(merged) == CLASSES
    examples = load_examples(eval_file, tokenizer(), classes=CLASSES)
    loss, accuracy = held_out(merged, examples, Collator(0), 4)
    assert loss == pytest.approx(result.eval_loss_after, rel=1e-4)
    assert accuracy == result.eval_accuracy_after
    (tmp_path / "out" / "metrics.json").unlink()
    with pytest.raises(UserError, match=r"no metrics\.json beside it names the classes"):
        merge_adapter(encoder_dir, tmp_path / "out", tmp_path / "again")


def test_a_text_as_long_as_the_model_has_positions(tune, tmp_path):
    sizes = settings(max_position_embeddings=20, pad_token_id=0).to_dict()
    del sizes["model_type"]
    path = saved(tmp_path / "model", lambda: RobertaModel(RobertaConfig(**sizes)))
    model, words = load_model(path, "float32", CLASSES)
    assert words.model_max_length == 19  # the row of padding is no token's
    examples = load_examples(
        [*labelled("pos", "neg"), {"text": "film " * 40, "label": "pos"}], words, classes=CLASSES
    )
    assert examples.most == 19
    result = fine_tune(
        model, words, examples, examples, uniform_plan(model, rank=2), CONFIG, tmp_path / "out"
    )
    assert result.stopped is None


def test_a_checkpoint_without_all_of_its_backbone_is_refused(tmp_path):
    path = saved(tmp_path / "model", lambda: BertModel(settings(), add_pooling_layer=False))
    with pytest.raises(UserError, match=r"lacks bert\.pooler\.dense\.bias \(of 2 weights"):
        load_model(path, "float32", CLASSES)


@pytest.mark.parametrize(
    ("family", "names"),
    {
        "BERT": ["classifier"],
        "DeBERTa-v2": ["pooler", "classifier"],
        "ModernBERT": ["head", "classifier"],
        "Llama": [],
    }.items(),
)
def test_what_is_trained_beside_the_adapters(family, names):
    model = FAMILIES[family].build()
    assert head_modules(model) == names
    config = uniform_plan(model, rank=2).to_lora_config(model)
    assert config.modules_to_save == (names or None)
    assert config.task_type == ("SEQ_CLS" if names else "CAUSAL_LM")


def test_a_decoder_reads_the_last_token_of_a_text_not_padding(tiny_model_dir):
    model, words = load_model(tiny_model_dir, "float32", CLASSES)
    rows = [{"text": text, "label": "pos"} for text in ("a b c", "d e f a b c d e f a")]
    examples = load_examples(rows, words, classes=CLASSES)
    model.eval()
    with torch.no_grad():
        together = model(**Collator(words.pad_token_id)(examples)).logits
        alone = [model(input_ids=torch.tensor([example["input_ids"]])).logits for example in examples]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)


# Training


def test_accuracy_is_reported_and_stock_peft_loads_adapters_and_head(
    tune, tmp_path, encoder_dir, eval_file, train_file
):
    result = tune(tmp_path / "out", dataclasses.replace(CONFIG, steps=40, eval_every=20))
    assert [record.step for record in result.evals] == [0, 20, 40]
    assert result.eval_loss_after < 0.5 * result.eval_loss_before
    assert result.eval_accuracy_after > max(0.8, result.eval_accuracy_before)
    assert result.classes == CLASSES
    assert result.prefix_layers == 2
    assert result.head.startswith("all rows")
    assert {module["path"] for module in result.patch_report["modules"]} == {"kernel"}
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert TrainResult.from_dict(metrics) == dataclasses.replace(result, model=None)
    assert metrics["eval_accuracy_after"] == result.eval_accuracy_after

    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert result.trainable_parameters == sum(tensor.numel() for tensor in weights.values())
    assert {name for name in weights if "lora_" not in name} == {
        f"base_model.model.classifier.{name}" for name in ("weight", "bias")
    }
    # The head of this base is drawn anew: it is the saved one that counts.
    base = AutoModelForSequenceClassification.from_pretrained(encoder_dir, num_labels=2)
    stock = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    words = tokenizer()
    right = 0
    for row in (json.loads(line) for line in eval_file.read_text().splitlines()):
        with torch.no_grad():
            logits = stock(**words(row["text"], return_tensors="pt", return_token_type_ids=False)).logits
        right += CLASSES[int(logits.argmax())] == row["label"]
    assert result.eval_accuracy_after == right / 21
    examples = load_examples(eval_file, words, classes=CLASSES)
    for batch_size in (1, 4, 100):
        loss, accuracy = held_out(stock, examples, Collator(0), batch_size)
        assert loss == pytest.approx(result.eval_loss_after, rel=1e-5)
        assert accuracy == result.eval_accuracy_after


def test_a_head_of_several_layers_trains_in_float32_and_stock_peft_computes_the_same(tune, tmp_path):
    config = RobertaConfig(**settings(max_position_embeddings=24, initializer_range=0.05).to_diff_dict())
    path = saved(tmp_path / "model", lambda: RobertaModel(config))
    dtypes: list[set[torch.dtype]] = []

    def look(model: Any) -> None:
        dtypes.append({p.dtype for name, p in model.named_parameters() if "modules_to_save" in name})

    bfloat16 = dataclasses.replace(CONFIG, dtype="bfloat16", learning_rate=2e-3)
    result = tune(tmp_path / "out", bfloat16, model_dir=path, callbacks=[AtStep(3, look)])
    assert dtypes == [{torch.float32}]
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    head = {name: tensor.dtype for name, tensor in weights.items() if "lora_" not in name}
    assert head == dict.fromkeys(
        (f"base_model.model.classifier.{m}.{w}" for m in ("dense", "out_proj") for w in ("weight", "bias")),
        torch.bfloat16,
    )
    base = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2, dtype=torch.bfloat16)
    stock = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    ids = torch.tensor([[2, 4, 5, 6, 3]])
    with torch.no_grad():
        assert torch.equal(result.model.eval()(input_ids=ids).logits, stock(input_ids=ids).logits)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_kernels_give_the_losses_of_plain_peft(tune, tmp_path, dropout):
    config = settings(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    path = saved(tmp_path / "model", lambda: BertModel(config))
    steps = dataclasses.replace(CONFIG, steps=4)
    fast = tune(tmp_path / "fast", steps, model_dir=path)
    plain = tune(tmp_path / "plain", dataclasses.replace(steps, kernels=False), model_dir=path)
    for mine, theirs in zip(fast.history, plain.history, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-4)
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-3)
    assert fast.eval_loss_before == pytest.approx(plain.eval_loss_before, rel=1e-5)
    assert fast.eval_accuracy_before == plain.eval_accuracy_before
    # What a race compares before any update is the same for any plan, dropout of the model or not.
    first = dataclasses.replace(CONFIG, steps=1)
    everywhere = tune(tmp_path / "all", first, lambda model: uniform_plan(model, rank=4), path)
    assert everywhere.history[0].loss == pytest.approx(fast.history[0].loss, rel=1e-5)


def test_a_step_of_two_passes_is_a_step_of_one_twice_as_large(tune, tmp_path):
    once = tune(tmp_path / "once", dataclasses.replace(CONFIG, steps=2))
    twice = tune(
        tmp_path / "twice", dataclasses.replace(CONFIG, steps=2, batch_size=4, gradient_accumulation=2)
    )
    for mine, theirs in zip(twice.history, once.history, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-4)
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-3)


def test_goes_on_from_a_checkpoint(tune, tmp_path):
    whole = tune(tmp_path / "whole")
    config = dataclasses.replace(CONFIG, checkpoint_every=3, eval_every=2)
    with pytest.raises(Killed):
        tune(tmp_path / "out", config, callbacks=[AtStep(5, die)])
    went_on = tune(tmp_path / "out", config, resume=True)
    trained = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "out")]
    assert trained[0].keys() == trained[1].keys()
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
    assert [one.step for one in went_on.evals] == [0, 2, 4, 6]
    assert went_on.evals[-1].accuracy == whole.evals[-1].accuracy


def test_options_that_act_on_a_classifier_too(tune, tmp_path):
    config = dataclasses.replace(CONFIG, steps=2)
    plain = tune(tmp_path / "plain", config)
    for name, changes in {
        "smoothed": {"label_smoothing": 0.2},
        "lora-plus": {"lora_plus": 4.0},
        "start": {"init": "gradient"},
        "sampled": {"sampled_depth": {2: 0.2, 3: 0.8}},
        "half": {"dtype": "bfloat16"},
    }.items():
        result = tune(tmp_path / name, dataclasses.replace(config, **changes))
        assert result.history[-1].loss != plain.history[-1].loss, name
    cached = tune(tmp_path / "cached", dataclasses.replace(config, prefix_cache=str(tmp_path / "cache")))
    assert re.match(r"[1-9]\d* examples read, ", cached.prefix_cache)
    assert [r.loss for r in cached.history] == pytest.approx([r.loss for r in plain.history], rel=1e-5)
    with pytest.raises(UserError, match="packing is for language models"):
        tune(tmp_path / "packed", dataclasses.replace(CONFIG, packing=True))


# Plans


@pytest.mark.parametrize("score", [*METHODS, "top", "bottom", "spaced", "random"])
def test_every_score_makes_a_plan_for_a_classifier(encoder_dir, train_file, score):
    model, words = load_model(encoder_dir, "float32", CLASSES)
    examples = load_examples(train_file, words, classes=CLASSES)
    plan = Recipe(score=score, layers=50, rank=4, probe_batches=2).plan(model, words, examples, 0)
    assert len(plan.layers) == 2


def test_the_pooling_of_cka_is_the_recipes(encoder_dir, train_file):
    model, words = load_model(encoder_dir, "float32", CLASSES)
    examples = load_examples(train_file, words, classes=CLASSES)
    scores = {
        pooling: Recipe(score="cka", layers=50, pooling=pooling)
        .plan(model, words, examples, 0)
        .meta["layer_scores"]
        for pooling in ("last", "mean")
    }
    assert scores["last"] != scores["mean"]
    with pytest.raises(UserError, match="pooling 'first' is unknown"):
        Recipe(score="cka", pooling="first")


# The command line, and the race


@pytest.fixture
def run(monkeypatch, capsys):
    def invoke(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["aletheia", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return invoke


def test_probe_plan_train_from_the_command_line(run, encoder_dir, train_file, eval_file, tmp_path):
    scores, plan, out = tmp_path / "scores.json", tmp_path / "plan.json", tmp_path / "adapter"
    given = ("--model", encoder_dir, "--train", train_file)
    assert run("probe", *given, "--out", scores)[0] == 0
    assert run("plan", "--scores", scores, "--rank", "4", "--out", plan)[0] == 0
    rest = ("--eval", eval_file, "--plan", plan, "--out", out, "--steps", "3", "--dtype", "float32")
    code, shown, _ = run("train", *given, *rest)
    assert code == 0
    assert ", accuracy 0." in shown
    assert json.loads((out / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"

    before = sorted(tmp_path.rglob("*"))
    code, _, shown = run("probe", *given, "--out", tmp_path / "faithful.json", "--faithful")
    assert (code, shown.count("\n")) == (2, 1)
    assert "--faithful is the published probe of language models" in shown
    stray = write(tmp_path / "stray.jsonl", [*reviews(3, 0), {"text": "a film", "label": "meh"}])
    rest = ("--eval", stray, "--plan", plan, "--out", tmp_path / "stray", "--steps", "3")
    code, _, shown = run("train", *given, *rest)
    assert code == 2
    assert shown.splitlines()[-1].startswith(f"aletheia: error: {stray} line 4: label 'meh' is none of")
    stray.unlink()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_miniature_race(encoder_dir, train_file, eval_file, tmp_path):
    arms = [Arm("half", Recipe("aletheia", 50, rank=4), kernels=True)]
    config = dataclasses.replace(CONFIG, steps=4, eval_every=2, threads=1)
    arguments = (arms, encoder_dir, train_file, eval_file, config)
    with pytest.raises(UserError, match="a classifier has no perplexity"):
        race(*arguments, tmp_path / "race", extra_text="a film")
    result = race(*arguments, tmp_path / "race", slice_steps=2)
    assert result.objection() is None
    assert RaceResult.from_json((tmp_path / "race" / "race.json").read_text()) == result
    assert result.meta["classes"] == ["neg", "pos"]
    cells = result.cells()
    assert cells.header[6] == "held-out accuracy"
    assert all(len(row) == len(cells.header) for row in cells.rows)

    peft = dataclasses.replace(result.arms[0], name="peft")
    both = dataclasses.replace(result, arms=(peft, *result.arms))
    task: Any = SimpleNamespace(baselines=[SimpleNamespace(name="peft")], equal_time=("half",))
    figures = judge(task, both, result, "half")
    accuracy = result.arms[0].training.evals[-1].accuracy
    assert (figures.accuracy, figures.baseline_accuracy) == (accuracy, accuracy)
    costs = {"trainable_parameters": 1.0, "peak_memory_mb": 1.0, "step_seconds": 1.0}
    verdict = Verdict(
        task="tiny", digest="", rates={}, chosen={"half": 1e-2}, objection=None, arms={"half": {"0": figures}},
        recommended="half", table={"half": costs}, machine={},
        races={"0": {"race": json.loads(both.to_json()), "equal_time": json.loads(result.to_json())}},
    )  # fmt: skip
    cells = verdict.cells()
    assert (
        dict(zip(cells.header, cells.rows[0], strict=True))["accuracy"]
        == f"{accuracy:.3f} against {accuracy:.3f}"
    )
    write_verdict(tmp_path / "page.html", verdict, commands=[])
    page = (tmp_path / "page.html").read_text()
    assert "nats a text" in page
    assert "nats a token" not in page
