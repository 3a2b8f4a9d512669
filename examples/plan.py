"""Ask what would run a model here and why; load it, and see what became of the plan."""

import phirt

plan = phirt.plan(context=4096, optimize="latency")
for candidate in plan.candidates:
    print(f"{candidate.status:9} {candidate.backend} on {candidate.device}: {candidate.reason}")
    if candidate.fix:
        print(f"{'':9} {candidate.fix}")

with phirt.load(context=4096) as model:
    chosen = model.plan.chosen
    print(f"\n{model.name} runs on {model.device} through {model.backend}")
    if chosen is not None and chosen.memory is not None:
        print(f"predicted to take {chosen.memory.total / 1e6:,.0f} MB")
    for note in model.plan.notes:
        print(note)
