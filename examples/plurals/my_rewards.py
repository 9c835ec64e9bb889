def right(completions, answer, **columns):
    """1 if the last word is the answer."""
    last = [text.strip().rstrip(".").lower().split()[-1:] for text in completions]
    return [float(word == [gold]) for word, gold in zip(last, answer, strict=True)]


def brief(completion_ids, **columns):
    """1 for no token, down to 0 for 16."""
    return [1 - min(len(ids), 16) / 16 for ids in completion_ids]
