"""How fast a model is with each backend and device of this machine, as a user of it sees it.

`phirt.benchmark.run` has the face, `bench`; `phirt.benchmark.turns` lets the candidates take
turns, each in a process of its own (`phirt.benchmark.child`), which `phirt.benchmark.streams`
is what happens in.
"""
