"""Faults on real parts: scenarios that break a running Timbre, and a checker that tells the cost.

    python -m tests.faults [NAME...] [--quick]

| module | what |
|---|---|
| `scenarios` | the list of faults, each a function |
| `delivery`, `stages`, `services`, `inputs`, `exposure`, `growth` | those functions, by kind |
| `stand` | a real Kafka, a real Redis, a server of audio, and real `timbre worker` processes |
| `checker` | reads the topics and nothing of the worker's: lost, duplicates, differing |
| `hostile` | messages that are no events, as property-based testing thinks of them |
| `audio_server` | serves short tracks, all distinct, and every fault that HTTP allows |
| `launcher` | a real worker whose network fails or hangs on marked tracks |
| `soak` | many tracks through one worker, with its memory, descriptors and files over time |
"""
