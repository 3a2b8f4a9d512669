"""The three best answers of a beam search, and three samples of the same prompt."""

import phirt

with phirt.load() as model:
    prompt = [{"role": "user", "content": "Name a colour."}]
    best = model.generate(prompt, num_beams=4, n=3, do_sample=False, max_new_tokens=20)
    for answer in (best, *best.alternatives):
        print(f"{answer.score:.3f} {answer.text!r}")
    first = model.generate(prompt, n=3, temperature=0.8, seed=7, max_new_tokens=20)
    for answer in (first, *first.alternatives):
        print(f"seed {answer.seed}: {answer.text!r}")
