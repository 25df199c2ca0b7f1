"""Experts that lie in host memory or on a disk, and come to the device when tokens need them (docs/offloading.md).

- slots: which of a layer's experts are on the device, which make room, what a guess was worth: decisions alone
- records: an expert's tensors as one row of bytes; where the rows lie
- lane: what brings rows to the device, beside what is computed
- experts: a layer's experts as kernels ask for them, each while it is on the device
- guess: what the next layer's router would choose, while this one runs
- loads: how often each expert was used elsewhere
- plan: how many experts fit, and a model that has the others elsewhere
- meter: what happened, for people and logs
"""
