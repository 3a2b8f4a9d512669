"""What an artifact lost against its reference: perplexity, divergence, agreement, speed.

Both sides are driven through the narrow waist (`phirt.protocols`), so that they may be of any
format and on any backend. `phirt.quality.comparison` has the face, `compare_quality`;
`phirt.quality.passes` what it rests on, for whoever has token ids and loaded models.
"""
