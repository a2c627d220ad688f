"""A small GPT from a config, and sentences of unequal lengths of a language with a memory of one word."""

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

WORDS = 24


def model(*, seed=0, dtype=torch.float32, size=32):
    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=WORDS,
        max_position_embeddings=32,
        hidden_size=size,
        intermediate_size=4 * size,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPTNeoXForCausalLM(config).to(dtype)


def sentences(n, *, seed):
    """Each of 4 to 31 words; the next is one of four, told by the one before."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randint(WORDS, (WORDS, 4), generator=torch.Generator().manual_seed(1))
    found = []
    for length in torch.randint(4, 32, (n,), generator=generator).tolist():
        words = torch.randint(WORDS, (1,), generator=generator).tolist()
        picks = torch.multinomial(torch.tensor([8.0, 4.0, 2.0, 1.0]), length, replacement=True, generator=generator)
        for pick in picks.tolist()[1:]:
            words.append(int(table[words[-1], pick]))
        found.append(torch.tensor(words))
    return found


def collate(examples):
    """Padded to the longest; what is padding is no label."""
    examples = [each["input_ids"] if isinstance(each, dict) else each for each in examples]
    words = torch.nn.utils.rnn.pad_sequence(examples, batch_first=True)
    length = torch.tensor([len(each) for each in examples])[:, None]
    mask = torch.arange(words.shape[1]) < length
    return {"input_ids": words, "attention_mask": mask.long(), "labels": words.where(mask, -100)}


def tokens_lost(net, batch):
    """The sum of the cross entropies of all words but the first, and their number."""
    logits = net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    return loss, int((labels != -100).sum())
