"""TRL's SFTTrainer with LoRA: a tiny model and a tokenizer of words, both made on the spot."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import anybatch
from anybatch.integrations.transformers import attach
from integrations import gpt, task
from integrations.transformers_workers import QUIET


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # TRL asks for it by its old name
def test_lora_is_trained_as_at_the_base_batch_and_measured_by_tokens(tmp_path):
    task.as_launched(0, 1)
    sentences = gpt.sentences(200, seed=1)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(gpt.WORDS)}, unk_token="w0"))
    net = gpt.model(dtype=torch.float64)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    trainer = SFTTrainer(
        net,
        SFTConfig(f"{tmp_path}", **{**QUIET, "max_steps": 20, "bf16": False}),
        train_dataset=Dataset.from_dict({"input_ids": [s.tolist() for s in sentences]}),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w0"),
        peft_config=LoraConfig(r=4, target_modules=["query_key_value"], task_type="CAUSAL_LM"),
    )
    # A micro-batch has the mean over its tokens, g_i; the step the mean of those, weighted by tokens.
    trained = [p for p in net.parameters() if p.requires_grad]
    own, tokens = [], []
    for first in range(0, 16, 4):
        loss, count = gpt.tokens_lost(net, gpt.collate(sentences[first : first + 4]))
        own.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss / count, trained)]).double())
        tokens.append(count)
    shares = [n / sum(tokens) for n in tokens]
    observed = [w * g for w, g in zip(shares, own, strict=True)]
    mean = sum(observed)
    q = sum(w * w for w in shares)
    variance = 4 * float(sum(h.square().sum() for h in observed) - q * mean.square().sum()) / (1 - q)  # of a base batch
    sqnorm = float(mean.square().sum()) - variance / 4

    adapter = attach(trainer, base_batch=4, record=f"{tmp_path}/run.jsonl")
    trainer.train()
    first = anybatch.read_record(f"{tmp_path}/run.jsonl").steps[0]
    population = 200 / 4  # one pass shows no example twice: what draws with replacement would have shown
    assert first.raw_variance == pytest.approx(variance * (1 - 1 / population), rel=1e-5)
    assert first.raw_sqnorm == pytest.approx(sqnorm + variance / population, rel=1e-5)
    assert max(shares) > 1.2 * min(shares)
    assert adapter.controller.scale == 4
    assert 20 <= adapter.controller.tau < 24
    for name, p in net.named_parameters():
        plain = name.replace(".base_layer", "")
        assert ("lora" in name and p.requires_grad) or torch.equal(p, before[plain])
    assert any(bool(p.detach().abs().sum() > 0) for name, p in net.named_parameters() if "lora_B" in name)
