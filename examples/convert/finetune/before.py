"""Fine-tuning in the Hugging Face Trainer, with an optimizer and a linear schedule of the user's own."""

import argparse
import json

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)

parser = argparse.ArgumentParser()
parser.add_argument("--batch-size", type=int, default=16, help="examples of one backward")
parser.add_argument("--accumulation", type=int, default=1)
parser.add_argument("--resume", action="store_true")
parser.add_argument("--max-steps", type=int, default=-1, help="end here instead of after the epochs")
args = parser.parse_args()

epochs, learning_rate = 3, 2e-3
torch.manual_seed(0)
torch.set_num_threads(1)
words = torch.randint(1, 12, (640, 10))
labels = (words > 6).sum(1) > 4
data = [{"input_ids": w, "labels": label} for w, label in zip(words, labels.long(), strict=True)]

config = BertConfig(vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
model = BertForSequenceClassification(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
steps = epochs * len(data) // (args.batch_size * args.accumulation)
scheduler = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=steps // 10, num_training_steps=steps)

arguments = TrainingArguments(
    "runs",
    num_train_epochs=epochs,
    max_steps=args.max_steps,
    per_device_train_batch_size=args.batch_size,
    gradient_accumulation_steps=args.accumulation,
    save_steps=10,
    report_to="none",
    disable_tqdm=True,
    use_cpu=True,
    dataloader_pin_memory=False,
)
trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, scheduler))
trainer.train(resume_from_checkpoint=args.resume)
print(json.dumps({"lr": scheduler.get_last_lr()[0], "steps": trainer.state.global_step}))
