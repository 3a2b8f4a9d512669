"""What does int8 lose against the original weights? A quick look; more tokens say it surer."""

import phirt

TEXT = """The sun rises in the east and sets in the west. In the summer the days are long, and
people sit outside until late in the evening. In the winter they are short and cold, and the
snow lies on the fields. Every season has its own work, and every farmer knows it by heart.
"""

report = phirt.compare_quality(
    "smollm2-135m-instruct",  # as fp32, as nothing else is asked for
    "smollm2-135m-instruct",
    precision="int8",
    text=TEXT,
    tokens=256,
    speed=False,
)

for kernel, quality in report.kernels.items():
    figures = quality.figures
    print(f"{kernel}: mean KL {figures.kl_mean:.4f} nats over {figures.positions} positions,")
    print(f"  the same most likely token at {figures.top1_agreement:.1%}")

worst = report.leading.worst[0]
print(f"Most different after {worst.before!r}:")
print(f"  {worst.reference_token!r} {worst.reference_probability:.0%} became", end=" ")
print(f"{worst.candidate_token!r} {worst.candidate_probability:.0%}")
print(f"{report.verdict.grade}, {report.candidate.bytes / report.reference.bytes:.0%} of the size")
